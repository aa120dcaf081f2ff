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
        InputError: labels that are none of the model's, of another shape or missing.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "labels" not in batch:
        raise InputError(f"The batch has no labels, only {', '.join(inputs)}: name the column of the labels so.")
    check_ids(model, batch)
    _refuse_padding_on_the_left(batch)
    logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels, kind = batch["labels"], _kind_of_labels(model, logits, batch["labels"])
    if kind == "regression":
        return (logits - labels.view_as(logits)).square().mean(dim=1)
    if kind == "multi_label_classification":
        by_label = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
        return by_label.mean(dim=1)
    return nn.functional.cross_entropy(logits, labels.long(), reduction="none")


def _kind_of_labels(model: nn.Module, logits: Float[Tensor, "batch k"], labels: Tensor) -> str:
    """What the labels are, by the model's configuration, or else as transformers guesses it.

    Raises:
        InputError: the labels cannot be that.
    """
    n, k = logits.shape
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind is None:
        several = labels.is_floating_point() and labels.dim() > 1
        kind = "regression" if k == 1 else "multi_label_classification" if several else "single_label_classification"
    allowed = {"regression": [(n, k), (n,)] if k == 1 else [(n, k)], "multi_label_classification": [(n, k)]}
    if (shape := tuple(labels.shape)) not in allowed.get(kind, [(n,)]):
        raise InputError(f"Labels have shape {shape}, but the model has {k} for each of {n} examples, as {kind}.")
    if kind == "single_label_classification" and not labels.is_cuda:  # where a look at them would wait for the GPU
        if (wrong := labels[(labels != labels.long()) | (labels < 0) | (labels >= k)]).numel():
            raise InputError(f"Label {wrong[0].item()} is not one of the model's: they are 0 to {k - 1}.")
    return kind


def check_ids(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: names one.
    """
    ids, embeddings = batch.get("input_ids"), getattr(model, "get_input_embeddings", lambda: None)()
    if ids is None or ids.is_cuda or not hasattr(embeddings, "num_embeddings"):
        return
    if (wrong := ids[(ids < 0) | (ids >= embeddings.num_embeddings)]).numel():
        raise InputError(
            f"Token {wrong[0].item()} has no embedding, of which the model has {embeddings.num_embeddings}: the "
            "tokenizer is of another model, or has tokens that were added later."
        )


def completion(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each response given its prompt (paper D.2.1): -log p(y_t | x, y_1..y_{t-1}).

    `batch` has ``input_ids``, ``attention_mask`` and ``labels``, all (batch, tokens), as `causal_lm.encode` makes them:
    labels are the input ids on the response and its end, `IGNORED` elsewhere; padding may be on either side.
    `reduction` over an example's tokens: "mean" or "sum". Of an encoder-decoder the labels are the response alone,
    (batch, tokens of the response).
    """
    if _is_encoder_decoder(model):
        return _of_decoder(model, batch, reduction)
    return _negative_log_likelihood(model, batch, batch["labels"] != IGNORED, reduction)


def as_published(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each *prompt*: what the published code takes gradients of, answers excluded.

    There the padding counts too; here it does not, so that an example's loss does not depend on its batch.

    Raises:
        InputError: the model is an encoder-decoder, which gives its prompt no likelihood.
    """
    _refuse_encoder_decoder(model)
    prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORED)
    return _negative_log_likelihood(model, batch, prompt, reduction)


def full(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of prompt and response together. Errors as of `as_published`."""
    _refuse_encoder_decoder(model)
    return _negative_log_likelihood(model, batch, batch["attention_mask"].bool(), reduction)


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


def _negative_log_likelihood(
    model: nn.Module, batch: Mapping[str, Tensor], counted: Bool[Tensor, "batch tokens"], reduction: str
) -> Float[Tensor, " batch"]:
    """Mean or sum over each example's `counted` tokens of -log p(token | the tokens before it).

    The first token has nothing before it and is never counted.
    """
    check_ids(model, batch)
    ids, mask, counted = _padded_right(batch["input_ids"], batch["attention_mask"], counted)
    attended = mask.bool()
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits = logits[:, -ids.shape[1] :]  # those of virtual tokens come first
    counted = counted[:, 1:] & attended[:, :-1]
    return _by_example(logits[:, :-1], ids[:, 1:], counted, reduction)


def _by_example(
    logits: Float[Tensor, "batch tokens vocabulary"], ids: Tensor, counted: Bool[Tensor, "batch tokens"], reduction: str
) -> Float[Tensor, " batch"]:
    """Mean or sum over each example's `counted` tokens of -log p(id)."""
    logits = logits[counted]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    by_token = nn.functional.cross_entropy(logits, ids[counted], reduction="none")
    examples = torch.arange(len(ids), device=ids.device)[:, None].expand_as(counted)[counted]
    total = by_token.new_zeros(len(ids)).index_add(0, examples, by_token)
    return total / counted.sum(dim=1) if reduction == "mean" else total


def _of_decoder(model: nn.Module, batch: Mapping[str, Tensor], reduction: str) -> Float[Tensor, " batch"]:
    """`completion` of an encoder-decoder, whose decoder is given the labels moved on by one."""
    _refuse_padding_on_the_left(batch)
    logits = model(**batch).logits[:, -batch["labels"].shape[1] :]  # those of virtual tokens come first
    return _by_example(logits, batch["labels"], batch["labels"] != IGNORED, reduction)


def _padded_right(ids: Tensor, mask: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same tokens with padding that is on the left moved to the right, since models count positions from there."""
    if mask[:, 0].all():
        return ids, mask, counted
    start = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    order = (torch.arange(mask.shape[1], device=mask.device) + start) % mask.shape[1]
    return ids.gather(1, order), mask.gather(1, order), counted.gather(1, order)


def _refuse_padding_on_the_left(batch: Mapping[str, Tensor]) -> None:
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not mask[:, 0].all():
        raise InputError("The batch is padded on the left, which moves the positions of this model: pad on the right.")


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _arguments_of(model: nn.Module) -> set[str]:
    """The names of what the model's forward takes."""
    return set(inspect.signature(_base_of(model).forward).parameters)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(_base_of(model), "config", None), "is_encoder_decoder", False))


def _refuse_encoder_decoder(model: nn.Module) -> None:
    if _is_encoder_decoder(model):
        raise InputError("An encoder-decoder gives its prompt no likelihood: take that of the response, completion.")
