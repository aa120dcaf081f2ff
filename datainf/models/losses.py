"""One loss per example, for each family of models: ``loss_fn(model, batch) -> Tensor (batch,)``."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from datainf.errors import InputError

# The label of a token that a completion's loss leaves out: of the prompt, or padding.
IGNORED = -100


def classification(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each example's label, -log p(y | f(x)) (paper D.1).

    `batch` is what a transformers data collator makes: ``labels`` (batch,) and the model's inputs.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def completion(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each response given its prompt (paper D.2.1): -log p(y_t | x, y_1..y_{t-1}).

    `batch` has ``input_ids``, ``attention_mask`` and ``labels``, all (batch, tokens), as `causal_lm.encode` makes them:
    labels are the input ids on the response and its end, `IGNORED` elsewhere. `reduction` over an example's tokens:
    "mean" or "sum".
    """
    return _negative_log_likelihood(model, batch, batch["labels"] != IGNORED, reduction)


def as_published(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each *prompt*: what the published code takes gradients of, answers excluded.

    There the padding counts too; here it does not, so that an example's loss does not depend on its batch.
    """
    prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORED)
    return _negative_log_likelihood(model, batch, prompt, reduction)


def full(model: nn.Module, batch: Mapping[str, Tensor], *, reduction: str = "mean") -> Float[Tensor, " batch"]:
    """Negative log-likelihood of prompt and response together."""
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
    the latents of each, and over the versions by `reduction`, "mean" or "sum".
    """
    versions = batch["timestep"].shape[1]
    predicted = model(
        batch["sample"].flatten(0, 1),
        batch["timestep"].flatten(),
        batch["encoder_hidden_states"].repeat_interleave(versions, dim=0),
    ).sample
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
    ids, counted = batch["input_ids"], counted[:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1][counted]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    by_token = nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    examples = torch.arange(len(ids), device=ids.device)[:, None].expand_as(counted)[counted]
    total = by_token.new_zeros(len(ids)).index_add(0, examples, by_token)
    return total / counted.sum(dim=1) if reduction == "mean" else total
