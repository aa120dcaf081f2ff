"""What a study will cost, stage by stage, before it is begun: from sizes, and from a probe of some seconds."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from datainf import scaling
from datainf.attribution.influence import ihvp, scores
from datainf.attribution.inputs import check_device
from datainf.attribution.kronecker import Shape
from datainf.attribution.methods import Method, name_of, needs_of, resolve_method, takes
from datainf.gradients.batches import length
from datainf.gradients.layers import Layers, trainable_layers
from datainf.gradients.per_sample import LossFn, per_sample_gradients
from datainf.progress import in_time
from datainf.storage.memory import Memory, bytes_of, in_words, share_out
from datainf.storage.rows import BLOCK_BYTES
from datainf.storage.store import GradientStore, matrix_shape

PROBE_BATCHES = 3
# The largest layer that is probed; larger ones are scaled up from it.
PROBE_N, PROBE_M, PROBE_D = 1024, 256, 4096


@dataclass(frozen=True)
class Estimate:
    """What each stage keeps, holds and takes; printed as a table.

    Attributes:
        stages: indexed by stage; ``kept_bytes`` of results, for gradients the size of the store; ``peak_bytes``
            held beside the model and what is kept; ``seconds``, not a number where nothing was probed.
    """

    stages: pd.DataFrame

    def __str__(self) -> str:
        table = pd.DataFrame(
            {
                "keeps": self.stages["kept_bytes"].map(in_words),
                "holds": self.stages["peak_bytes"].map(lambda size: in_words(size) if size == size else "?"),
                "takes about": self.stages["seconds"].map(lambda value: in_time(value) if value == value else "?"),
            }
        )
        return table.to_string()

    __repr__ = __str__


def estimate(
    model: nn.Module,
    n: int,
    m: int,
    examples: Sequence | None = None,
    loss_fn: LossFn | None = None,
    *,
    collate_fn: Callable[[list], Mapping] | None = None,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    rows_per_example: int = 1,
    concatenate: bool = False,
    layers: Layers = None,
    dtype: torch.dtype = torch.float32,
    method: str | Method = "datainf",
    device: torch.device | str = "cpu",
    memory: Memory = None,
) -> Estimate:
    """Bytes and seconds of the gradients of n training examples and m queries, and of their influence scores.

    Some batches of `examples` are differentiated, and the method is run on random gradients of the layers' sizes (at
    most 1,024 x 4,096; larger layers are scaled up by the number of operations). Times are of this machine as it is
    now and good to a factor of two or three; reading gradients from a disk comes on top. One process is assumed.

    The stages are those of `ihvp` and `scores`; `influence` does both at once and keeps the scores alone.

    Args:
        examples: some of the training examples, and `loss_fn` their loss; without them the time and the memory of the
            gradients are not known.
        method, device, memory: as in `influence`; all else as in `per_sample_gradients`.

    Raises:
        ValueError: as `per_sample_gradients` and `influence` do of the same arguments.
    """
    options = {"rows_per_example": rows_per_example, "concatenate": concatenate, "layers": layers, "dtype": dtype}
    batching = {"collate_fn": collate_fn, "batch_size": batch_size, "batch_tokens": batch_tokens}
    parts = rows_per_example if concatenate else 1
    shapes = [matrix_shape(weight.shape, parts) for weight in trainable_layers(model, layers).values()]
    widths = [math.prod(shape) for shape in shapes]
    row_bytes = sum(widths) * dtype.itemsize
    # What is wrong with them is said before anything is probed.
    method, memory = resolve_method(method), None if memory is None else bytes_of(memory)
    check_device(device)
    if n < 1 or m < 1:
        raise ValueError(f"n and m must be 1 at least, not {n} and {m}.")

    if examples is None or loss_fn is None:
        per_example = peak = float("nan")
    else:
        per_example, peak = _probe_gradients(model, examples, loss_fn, row_bytes, **options, **batching)
    held, seconds = _probe_method(method, n, m, shapes, device, memory)
    result = 4 * m * sum(widths)
    scores_hold = 12 * m * n + min(BLOCK_BYTES, 4 * n * max(widths))
    if memory is not None:
        scores_hold = min(scores_hold, memory)
    stages = {
        "training gradients": (n * row_bytes, peak, n * per_example),
        "query gradients": (m * row_bytes, peak, m * per_example),
        f"ihvp, {name_of(method)}": (result, held, seconds["ihvp"]),
        "scores": (4 * m * n, scores_hold, seconds["scores"]),
    }
    return Estimate(pd.DataFrame.from_dict(stages, orient="index", columns=["kept_bytes", "peak_bytes", "seconds"]))


def _probe_gradients(
    model: nn.Module, examples: Sequence, loss_fn: LossFn, row_bytes: int, *, batch_size: int, **options
) -> tuple[float, int]:
    """Seconds of one example, and the most bytes held beside the gradients that are kept."""
    device = next(model.parameters()).device
    count = min(len(examples), PROBE_BATCHES * batch_size)
    # Evenly over the examples by length, so that short and long ones have their share.
    order = sorted(range(len(examples)), key=lambda index: length(examples[index]))
    chosen = [examples[order[index * len(order) // count]] for index in range(count)]

    longest = [examples[index] for index in order[-batch_size:]]

    def gradients(of: list) -> object:
        return per_sample_gradients(model, of, loss_fn, batch_size=batch_size, **options)

    peak = scaling.peak_bytes(lambda: gradients(longest), device)
    seconds, _ = scaling.cost(lambda: gradients(chosen), repeats=1, enough=float("inf"), device=device)
    return seconds / count, max(0, peak - len(longest) * row_bytes) if device.type == "cpu" else peak


def _probe_method(
    method: Method, n: int, m: int, shapes: Sequence[Shape], device: torch.device | str, memory: int | None
) -> tuple[int, dict[str, float]]:
    """The most bytes held for a layer, and the seconds of both halves over all layers."""
    seconds, held = {"ihvp": 0.0, "scores": 0.0}, 0
    for shape, times in Counter(shapes).items():
        d, narrow = math.prod(shape), min(*shape, PROBE_D**0.5)
        small = (min(n, PROBE_N), min(m, PROBE_M), tuple(int(min(side, PROBE_D / narrow)) for side in shape))
        G, V = (GradientStore({"": torch.randn(rows, *small[2], device=device)}) for rows in small[:2])
        options = {"factors": {"": tuple(torch.eye(side) for side in small[2])}}
        R = ihvp(G, V, method, **options)
        probes = {
            "ihvp": (lambda: ihvp(G, V, method, **options), ihvp_operations),  # noqa: B023
            "scores": (lambda: scores(G, R), scores_operations),  # noqa: B023
        }
        for half, (probe, operations) in probes.items():
            taken, _ = scaling.cost(probe, repeats=2, device=device)
            seconds[half] += times * taken * operations(method, n, m, shape) / operations(method, *small)
        needs = needs_of(method, n, d, itemsize=4, shape=shape if takes(method, "shape") else None)
        what = f"{name_of(method)} on a layer of {d} parameters"
        blocks = share_out(memory, what, needs, kept=4 * m * n, queries=m)
        block = max(needs.smallest_block, min(needs.layer, blocks.block_bytes))
        held = max(held, needs.fixed + blocks.queries * needs.per_query + block)
    return held, seconds


def ihvp_operations(method: Method, n: int, m: int, shape: Shape) -> float:
    """Floating-point operations of R for one layer; of a function that is not of `datainf.METHODS`, as DataInf's."""
    d, sides = math.prod(shape), sum(shape)
    product, small = 2 * m * n * d, min(n, d)
    iterations = getattr(method, "keywords", {}).get("iterations", 10)
    match name_of(method):
        case "hessian_free":
            return m * d
        case "exact":
            gram = small**2 * max(n, d)  # half of the full product
            return gram + small**3 / 3 + 2 * m * small**2 + (2 * product if d > n else 0)
        case "kronecker" | "ekfac":  # whose factors are another pass over the examples, and not counted here
            # Both means and the rotation of G; two eigendecompositions; the rotation of V, there and back.
            return 4 * n * d * sides + 9 * sum(side**3 for side in shape) + 4 * m * d * sides
        case "generalized_fisher":
            return 2 * n * d * sides + max(shape) ** 3 / 3 + 2 * m * d * max(shape)
        case "lissa" | "lissa_as_published":
            return 2 * iterations * product
        case "lissa_scaled":
            return 2 * iterations * product + 30 * 4 * n * d  # and the power iteration's
        case _:
            return 2 * product


def scores_operations(method: Method, n: int, m: int, shape: Shape) -> float:
    """Floating-point operations of R G^T for one layer, whatever the method."""
    return 2 * m * n * math.prod(shape)
