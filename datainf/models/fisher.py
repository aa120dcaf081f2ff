"""Losses whose gradients are the rows of the true Fisher information, to be given as `influence`'s ``curvature=``.

The outer products of the training labels' gradients are the empirical Fisher information; the true one takes labels as
the model itself would give them. The two are equal where the model is right about the labels' distribution.
"""

import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from datainf.models.losses import (
    IGNORED,
    check_names,
    classification,
    config_of,
    negative_log_likelihood,
    refuse_encoder_decoder,
)


def of_every_label(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
    """sqrt(k p(y)) times -log p(y), with p(y) taken for a constant.

    Over examples that stand k times in the dataset, once `with_every_label`, the mean of their outer products is the
    mean over examples of E_y[g g^T] with y as the model itself would have it. Errors as of `classification`.
    """
    losses, k = classification(model, batch), config_of(model).num_labels
    return (k * (-losses.detach()).exp()).sqrt() * losses


def with_every_label(examples: Sequence, k: int = 2) -> list[dict]:
    """Each example k times, with the labels 0 to k - 1."""
    return [{**example, "labels": label} for example in examples for label in range(k)]


def sampled_completion(
    model: nn.Module, batch: Mapping[str, Tensor], *, seed: int = 0, reduction: str = "mean"
) -> Float[Tensor, " batch"]:
    """`completion` of a response that the model itself gives: the rows of a sampled true Fisher information.

    Each token is drawn from what the model says after the true ones before it, by `seed` and the example's own tokens,
    so that an example is always given the same ones.

    Raises:
        InputError: something is missing of the batch, or the model is an encoder-decoder.
    """
    refuse_encoder_decoder(model)
    check_names(batch, "input_ids", "attention_mask", "labels")
    return negative_log_likelihood(model, batch, batch["labels"] != IGNORED, reduction, partial(_drawn, seed))


def _drawn(
    seed: int, logits: Float[Tensor, "batch tokens vocabulary"], ids: Tensor, counted: Bool[Tensor, "batch tokens"]
) -> Tensor:
    """A token for each that is counted, from the model's own distribution; the others as they are."""
    drawn = ids[:, 1:].clone()
    for row, (own, places) in enumerate(zip(ids, counted, strict=True)):
        text = own[: int(places.nonzero()[-1]) + 2] if places.any() else own[:0]  # without its padding
        generator = torch.Generator().manual_seed(zlib.crc32(text.cpu().numpy().tobytes()) + seed)
        u = torch.rand(int(places.sum()), 1, generator=generator, dtype=torch.float64).to(logits.device)
        below = logits[row, places].double().softmax(dim=-1).cumsum(dim=-1)
        drawn[row, places] = torch.searchsorted(below, u).clamp(max=logits.shape[-1] - 1)[:, 0]
    return drawn
