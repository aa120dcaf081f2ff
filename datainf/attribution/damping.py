"""What is added to the eigenvalues of H before it is inverted."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from datainf.errors import InputError
from datainf.storage.rows import Matrix, double, square_norms

Damping = float | Mapping[str, float]
"""In units of a layer's mean eigenvalue; one number for all layers, or layer name -> its own."""


def layer_damping(G: Matrix, damping: float = 0.1) -> float:
    """lam_l = damping * (n d_l)^-1 * sum_i ||g_i||^2 (paper section 4): `damping` times H's mean eigenvalue."""
    check_damping(damping)
    n, d = G.shape
    return float(damping) * double(square_norms(G)).sum().item() / (n * d)


def damping_of_training(
    train: Mapping[str, Tensor], total_learning_rate: float, batch_size: int, *, share: float = 0.1
) -> dict[str, float]:
    """Layer name -> the damping of a fine-tuning by Adam that stops, to be given as ``damping=``.

    Gradient descent that stops after T steps of size eta answers a push on one example as 1 / (s + lam) does, with lam
    = 1 / (eta T), where the inverse of H would say 1 / s (notebook 71). Adam's steps are the learning rate over the
    root mean square q of the batches' gradients, so that lam_l = q_l / (the learning rates' sum), with

        q_l^2 = ((mean of ||g_i||^2 - ||mean of g_i||^2) / batch_size + ||mean of g_i||^2) / d_l

    and of that a `share`, which was chosen on one task (SST-2, rank 4, one seed): gradients at the end are not those of
    all steps.

    Args:
        train: as of `influence`.
        total_learning_rate: the sum of the learning rates of all steps; of a linear decay to 0 half of the first one
            times the number of steps.
        batch_size: examples in a step.

    Raises:
        InputError: `total_learning_rate`, `batch_size` or `share` is not above zero, or a layer's gradients are all 0.
    """
    for name, value in (("total_learning_rate", total_learning_rate), ("batch_size", batch_size), ("share", share)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise InputError(f"{name} must be a number above zero, not {value!r}.")
    found = {}
    for name in train:
        G = double(train.rows(name) if hasattr(train, "rows") else train[name])
        n, d = G.shape
        square = square_norms(G).sum().item() / n
        if not 0 < square < math.inf:
            raise InputError(f"The gradients of layer {name!r} are all zero, or not finite: leave the layer out.")
        of_mean = (torch.ones(1, n, dtype=G.dtype, device=G.device) @ G / n).square().sum().item()
        of_batches = ((square - of_mean) / batch_size + of_mean) / d
        found[name] = share * math.sqrt(of_batches) / total_learning_rate / (square / d)
    return found


def check_damping(damping: Damping, layers: Iterable[str] = ()) -> None:
    """Refuse, as an InputError, what is no number above zero, or says nothing of one of the layers."""
    if isinstance(damping, Mapping):
        for name in layers:
            if name not in damping:
                raise InputError(f"damping says nothing of layer {name!r}: give a number, or one for each layer.")
            check_damping(damping[name])
        return
    try:
        is_good = not isinstance(damping, str | bool) and 0 < float(damping) < math.inf
    except (TypeError, ValueError, RuntimeError):
        is_good = False
    if not is_good:
        what = "damping must be positive and finite, a number such as 0.1"
        raise InputError(f"{what}, not {damping!r}: without it H has no inverse when d_l > n.")
