"""One loss per example, for each family of models: ``loss_fn(model, batch) -> Tensor (batch,)``."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from datainf.errors import InputError

# The label of a token that a completion's loss leaves out: of the prompt, or padding.
IGNORED = -100


def classification(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each example's label, -log p(y | f(x)) (paper D.1).

    `batch` is what a transformers data collator makes: ``labels`` (batch,) and the model's inputs. What the model's
    configuration says the labels are (``problem_type``) decides, as in the model's own loss: for several labels at a
    time (batch, k) the mean of their binary losses, for numbers the mean squared error.

    Raises:
        InputError: labels that are none of the model's, of another shape or missing; padding that the model would take
            for text.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    check_names(batch, "labels")
    check_ids(model, batch)
    misread = _misread_padding(model, batch)
    logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels, kind = batch["labels"], _kind_of_labels(model, logits, batch["labels"])
    if kind == "regression":
        by_label = (logits - labels.view_as(logits)).square()
    elif kind == "multi_label_classification":
        by_label = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
    else:
        wrong = (labels != labels.long()) | (labels < 0) | (labels >= logits.shape[1])
        _refuse(wrong, labels, f"Label {{}} is not one of the model's: they are 0 to {logits.shape[1] - 1}.")
        misread = misread | wrong
        by_label = nn.functional.cross_entropy(logits, labels.long(), reduction="none")[:, None]
    return by_label.mean(dim=1).masked_fill(misread, torch.nan)


def _kind_of_labels(model: nn.Module, logits: Float[Tensor, "batch k"], labels: Tensor) -> str:
    """What the labels are, by the model's configuration, or else as transformers guesses it.

    Raises:
        InputError: the labels cannot be that.
    """
    n, k = logits.shape
    config = config_of(model)
    kind = getattr(config, "problem_type", None)
    if kind is None:
        several = labels.is_floating_point() and labels.dim() > 1
        if several and k > 1 and getattr(config, "model_type", "").startswith("deberta"):
            raise InputError("DeBERTa takes such labels for shares of one: set config.problem_type to what they are.")
        kind = "regression" if k == 1 else "multi_label_classification" if several else "single_label_classification"
    allowed = {"regression": [(n, k), (n,)] if k == 1 else [(n, k)], "multi_label_classification": [(n, k)]}
    if (shape := tuple(labels.shape)) not in allowed.get(kind, [(n,)]):
        raise InputError(f"Labels have shape {shape}, but the model has {k} for each of {n} examples, as {kind}.")
    return kind


def check_ids(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: names one.
    """
    ids, embeddings = batch.get("input_ids"), getattr(model, "get_input_embeddings", lambda: None)()
    if ids is None or not hasattr(embeddings, "num_embeddings"):
        return
    many = embeddings.num_embeddings
    _refuse(
        (ids < 0) | (ids >= many),
        ids,
        f"Token {{}} has no embedding, of which the model has {many}: the tokenizer is of another model, or has tokens "
        "that were added later.",
    )


def _refuse(wrong: Bool[Tensor, " *shape"], values: Tensor, sentence: str) -> None:
    """Raise InputError where a value is wrong, which the sentence names. On a GPU a look would wait for all that is
    under way there, so that what is wrong is left to the GPU's own assertions, or to a loss that is no number."""
    if not wrong.is_cuda and wrong.any():
        raise InputError(sentence.format(values[wrong][0].item()))


def completion(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each response given its prompt (paper D.2.1): -log p(y_t | x, y_1..y_{t-1}).

    `batch` has ``input_ids``, ``attention_mask`` and ``labels``, all (batch, tokens), as `causal_lm.encode` makes them:
    labels are the input ids on the response and its end, `IGNORED` elsewhere; padding may be on either side.
    `reduction` over an example's tokens: "mean" or "sum". Of an encoder-decoder the labels are the response alone,
    (batch, tokens of the response). The loss of an example of which no token counts is no number.

    Raises:
        InputError: something of that is missing, or a label is another token than the one in its place.
    """
    if _is_encoder_decoder(model):
        return _of_decoder(model, batch, reduction)
    check_names(batch, "input_ids", "attention_mask", "labels")
    labels, counted = batch["labels"], batch["labels"] != IGNORED
    other = counted & (labels != batch["input_ids"])
    _refuse(other, labels, "The label {} is not the input id in its place: labels are the input ids, or -100.")
    losses = negative_log_likelihood(model, batch, counted, reduction)
    return losses.masked_fill(other.any(dim=1), torch.nan)


def as_published(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each *prompt*: what the published code takes gradients of, answers excluded.

    There the padding counts too; here it does not, so that an example's loss does not depend on its batch.

    Raises:
        InputError: the batch lacks something, or the model is an encoder-decoder, which gives its prompt no likelihood.
    """
    refuse_encoder_decoder(model)
    check_names(batch, "input_ids", "attention_mask", "labels")
    prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORED)
    return negative_log_likelihood(model, batch, prompt, reduction)


def full(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of prompt and response together. Errors as of `as_published`."""
    refuse_encoder_decoder(model)
    check_names(batch, "input_ids", "attention_mask")
    return negative_log_likelihood(model, batch, batch["attention_mask"].bool(), reduction)


TEXT = {"completion": completion, "as_published": as_published, "full": full}
"""The losses of a causal language model by name."""


def text(name: str, reduction: str) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """A loss of `TEXT` with its reduction.

    Raises:
        InputError: no such loss or reduction.
    """
    if name not in TEXT:
        raise InputError(f"Unknown loss {name!r}: choose one of {', '.join(TEXT)}.")
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction must be mean or sum, not {reduction!r}.")
    return partial(TEXT[name], reduction=reduction)


def right_label(model: nn.Module, batch: Mapping[str, Tensor]) -> Bool[Tensor, " batch"]:
    """Whether a classifier gives each example its label."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs).logits.argmax(dim=-1) == batch["labels"]


def right_response(model: nn.Module, batch: Mapping[str, Tensor]) -> Bool[Tensor, " batch"]:
    """Whether a causal language model, always taking the likeliest token, would respond with just the response.

    It would where every token of the response, its end included, is the likeliest after the true ones before it.
    """
    response = batch["labels"] != IGNORED
    ids, mask, response = _padded_right(batch["input_ids"], batch["attention_mask"], response)
    likeliest = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] : -1].argmax(dim=-1)
    return ((likeliest == ids[:, 1:]) | ~response[:, 1:]).all(dim=1)


def denoising(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Squared error of what a diffusion model says about the noise in a picture's latents (paper section 4.3).

    `batch` is of `diffusion.NoisyLatents`: ``sample`` and ``target`` (batch, T, channels, height, width), the latents
    with noise and what the model should say, ``timestep`` (batch, T), and ``encoder_hidden_states`` (batch, tokens,
    width) of the prompt. The T noisy versions of all examples go through the model together; the error is averaged over
    the latents of each, and over the versions by `reduction`, "mean" or "sum". What else a model asks for, such as
    SDXL's ``added_cond_kwargs``, may be in the batch, for each example once.

    Raises:
        InputError: the batch has something that the model does not take.
    """
    versions = batch["timestep"].shape[1]
    conditions = {name: value for name, value in batch.items() if name not in ("sample", "target", "timestep")}
    if unknown := conditions.keys() - _arguments_of(model):
        raise InputError(f"The model takes no {min(unknown)!r}, which is in the batch: leave it out of the examples.")
    conditions = tree_map_only(Tensor, lambda value: value.repeat_interleave(versions, dim=0), conditions)
    predicted = model(batch["sample"].flatten(0, 1), batch["timestep"].flatten(), **conditions).sample
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    by_version = (predicted - batch["target"].flatten(0, 1)).square().flatten(1).mean(dim=1).view(-1, versions)
    return by_version.mean(dim=1) if reduction == "mean" else by_version.sum(dim=1)


IMAGE: dict[str, dict[str, object]] = {
    "mean": {"loss_fn": denoising, "concatenate": False},
    "concat": {"loss_fn": partial(denoising, reduction="sum"), "concatenate": True},
}
"""What `per_sample_gradients` is told for the gradient of the mean over the noisy versions, and for the gradients of
them all side by side, as the published code has it."""


def image(name: str) -> dict[str, object]:
    """An entry of `IMAGE`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in IMAGE:
        raise InputError(f"Unknown loss {name!r}: choose one of {', '.join(IMAGE)}.")
    return IMAGE[name]


WEIGHT = "weight"
"""The column of an example's weight in the loss that a model is trained by."""

OF_TRAINING = {"SEQ_CLS": classification, "CAUSAL_LM": partial(completion, reduction="sum")}
"""PEFT's task type -> what an example adds to the loss by which transformers trains such a model, which is that of a
batch divided by its examples, or by its tokens."""


def weighted(loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]) -> Callable:
    """A loss, times the weight of each example where the batch has one."""

    def times_weight(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
        rest = {name: value for name, value in batch.items() if name != WEIGHT}
        return loss(model, rest) * batch.get(WEIGHT, 1)

    return times_weight


def negative_log_likelihood(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    counted: Bool[Tensor, "batch tokens"],
    reduction: str,
    drawn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean or sum over each example's `counted` tokens of -log p(token | the tokens before it).

    The first token has nothing before it and is never counted. `drawn` gives other tokens in their places, of the
    logits (batch, tokens - 1, vocabulary), the ids (batch, tokens) and which are counted (batch, tokens - 1).
    """
    check_ids(model, batch)
    ids, mask, counted = _padded_right(batch["input_ids"], batch["attention_mask"], counted)
    attended = mask.bool()
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits = logits[:, -ids.shape[1] :]  # those of virtual tokens come first
    counted, logits = counted[:, 1:] & attended[:, :-1], logits[:, :-1]
    tokens = ids[:, 1:] if drawn is None else drawn(logits.detach(), ids, counted)
    return _by_example(logits, tokens, counted, reduction)


def _by_example(
    logits: Float[Tensor, "batch tokens vocabulary"], ids: Tensor, counted: Bool[Tensor, "batch tokens"], reduction: str
) -> Float[Tensor, " batch"]:
    """Mean or sum over each example's `counted` tokens of -log p(id)."""
    logits = logits[counted]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    by_token = nn.functional.cross_entropy(logits, ids[counted], reduction="none")
    examples = torch.arange(len(ids), device=ids.device)[:, None].expand_as(counted)[counted]
    total = by_token.new_zeros(len(ids)).index_add(0, examples, by_token)
    number = counted.sum(dim=1)
    return total / number if reduction == "mean" else total.masked_fill(number == 0, torch.nan)


def _of_decoder(model: nn.Module, batch: Mapping[str, Tensor], reduction: str) -> Float[Tensor, " batch"]:
    """`completion` of an encoder-decoder, whose decoder is given the labels moved on by one."""
    check_names(batch, "labels")
    check_ids(model, batch)
    misplaced = _padded_at(batch, 0)
    _refuse(misplaced, misplaced, ON_THE_LEFT)
    logits = model(**batch).logits[:, -batch["labels"].shape[1] :]  # those of virtual tokens come first
    losses = _by_example(logits, batch["labels"], batch["labels"] != IGNORED, reduction)
    return losses.masked_fill(misplaced, torch.nan)


def _padded_right(ids: Tensor, mask: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same tokens with padding that is on the left moved to the right, since models count positions from there."""
    if mask[:, 0].all():
        return ids, mask, counted
    start = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    order = (torch.arange(mask.shape[1], device=mask.device) + start) % mask.shape[1]
    return ids.gather(1, order), mask.gather(1, order), counted.gather(1, order)


ON_THE_LEFT = "The batch is padded on the left, which moves the positions of this model: pad on the right."
ON_THE_RIGHT = "The batch is padded on the right, where this model sums its texts up: pad on the left."


def _misread_padding(model: nn.Module, batch: Mapping[str, Tensor]) -> Bool[Tensor, " batch"]:
    """The examples whose padding this classifier would take for text.

    Raises:
        InputError: there are some (on a GPU they are only returned).
    """
    mask, ids, config = batch.get("attention_mask"), batch.get("input_ids"), config_of(model)
    at_the_end = getattr(config, "summary_type", None) == "last"  # XLNet sums a text up in the last place
    misplaced = _padded_at(batch, -1 if at_the_end else 0)
    _refuse(misplaced, misplaced, ON_THE_RIGHT if at_the_end else ON_THE_LEFT)
    if ids is None or mask is None or mask.shape != ids.shape or not _finds_the_end_by_id(model):
        return misplaced
    padding = -1 if config.pad_token_id is None else config.pad_token_id
    strange = (mask == 0) & (ids != padding)
    _refuse(
        strange,
        ids,
        f"The batch is padded with token {{}}, but the model's config.pad_token_id is {config.pad_token_id}, by which "
        "this model finds where a text ends: set one to the other.",
    )
    return misplaced | strange.any(dim=1)


def _finds_the_end_by_id(model: nn.Module) -> bool:
    """Whether a classifier sums a text up in its last token, and knows it by the ids alone, as decoders do."""
    forwards = [
        inspect.unwrap(vars(kind)["forward"]) for kind in type(_base_of(model)).mro() if "forward" in vars(kind)
    ]
    ids = {"pad_token_id", "eos_token_id"}
    return any(ids.intersection(forward.__code__.co_names) for forward in forwards if hasattr(forward, "__code__"))


def _padded_at(batch: Mapping[str, Tensor], place: int) -> Bool[Tensor, " batch"]:
    """Which examples have padding in this place; none where no mask says so."""
    mask, labels = batch.get("attention_mask"), batch["labels"]
    if mask is None or mask.dim() != 2:
        return torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    return mask[:, place] == 0


def check_names(batch: Mapping[str, Tensor], *names: str) -> None:
    """Refuse a batch that lacks something.

    Raises:
        InputError: names it.
    """
    if missing := next((name for name in names if name not in batch), None):
        raise InputError(f"The batch has no {missing!r}, only {', '.join(batch)}: have the collator make it.")


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def config_of(model: nn.Module) -> object:
    """The configuration of a transformers model, or of what of it reads text; None of any other model."""
    config = getattr(_base_of(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _arguments_of(model: nn.Module) -> set[str]:
    """The names of what the model's forward takes."""
    return set(inspect.signature(_base_of(model).forward).parameters)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(_base_of(model), "config", None), "is_encoder_decoder", False))


def refuse_encoder_decoder(model: nn.Module) -> None:
    if _is_encoder_decoder(model):
        raise InputError("An encoder-decoder gives its prompt no likelihood: take that of the response, completion.")
