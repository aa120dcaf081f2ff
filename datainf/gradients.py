"""Per-sample gradients of a model's trainable layers.

For a Linear layer y = x W^T the gradient of one example's loss with respect to W is the sum over its tokens of the
outer products (dloss/dy_t) x_t^T. One batched forward and one batched backward pass therefore hold everything
that is needed for every example of the batch: hooks keep x, receive dloss/dy, and contract the two over tokens.
A convolution is a Linear layer on the patches of its input. For weights that act otherwise the same two, what goes into
a module and the gradient of what comes out, are kept, and the module is differentiated by itself on each row.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import joblib
import torch
from accelerate.utils import recursively_apply, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import default_collate

from datainf.layers import Layers, trainable_layers
from datainf.progress import bar
from datainf.recording import Recorder
from datainf.store import SHARD_BYTES, GradientStore, Shards

LossFn = Callable[[nn.Module, Mapping], Tensor]
"""``loss_fn(model, batch) -> Tensor (batch,)``: one loss per example, each depending on its own example alone."""


def per_sample_gradients(
    model: nn.Module,
    dataset: Sequence,
    loss_fn: LossFn,
    *,
    collate_fn: Callable[[list], Mapping] | None = None,
    batch_size: int = 32,
    rows_per_example: int = 1,
    concatenate: bool = False,
    layers: Layers = None,
    dtype: torch.dtype = torch.float32,
    store: str | Path | None = None,
) -> GradientStore:
    """The gradient of every example's loss with respect to every trainable weight that is not a bias.

    Dropout is off. The base stays frozen and the backward pass stops at the lowest layer asked for. Examples of
    like length share a batch; the results are in the order of the dataset. A batch that does not fit in memory is
    halved. The model is left exactly as it was found.

    A weight that is no plain matrix on tokens or patches (an embedding, IA3's or a normalization's scale, all of DoRA)
    costs a further run of its module, in the module's own precision. The first batch is run once more to see that such
    weights act through their modules, on every row of the batch by itself, and that one of which nothing was recorded
    has no gradient.

    Args:
        model: any torch module; of a PEFT model the adapter's weights and the saved modules.
        dataset: anything with ``len`` and integer indexing.
        loss_fn: ``loss_fn(model, batch) -> Tensor (batch,)``.
        collate_fn: makes a batch of a list of examples; torch's default_collate where none is given.
        batch_size: examples in one forward and backward pass.
        rows_per_example: how many rows of the model's batch each example is, one after another: as many as there are
            timesteps in a denoising loss.
        concatenate: keep the gradients of an example's rows side by side instead of their sum. d_l is then
            rows_per_example times as large.
        layers: a regular expression searched for in the names, or the names themselves; by default all.
        dtype: in which the gradients are kept. Those of matrices are computed in float32 at least.
        store: a folder to keep the gradients in. Extraction that was killed goes on where it stopped.

    Returns:
        GradientStore: layer name -> Tensor (n, d_l), d_l = the layer's weight.numel(), flattened row by row.

    Raises:
        ValueError: no examples, no such layers, a loss that is not one finite number per example, a layer that mixes
            examples or acts other than through its module, or a `store` that holds gradients of something else.
    """
    n = len(dataset)
    if n == 0:
        raise ValueError("The dataset has no examples.")
    weights = trainable_layers(model, layers)
    parts = rows_per_example if concatenate else 1
    widths = {name: parts * weight.numel() for name, weight in weights.items()}
    collate_fn = collate_fn or default_collate

    if store is None:
        shards, ranges = None, [(0, n)]
        gradients = {name: torch.empty(n, d, dtype=dtype) for name, d in widths.items()}
    else:
        identity = _identity(model, dataset, loss_fn)
        if concatenate:
            identity["loss"] += f", {parts} rows side by side"
        shards = Shards.create(store, n, widths, dtype, shard_bytes=SHARD_BYTES, identity=identity)
        ranges = [shards.bounds(index) for index in shards.missing()]

    with (
        _recording(model, weights, rows_per_example, parts) as differentiate,
        bar(total=n, desc="per-sample gradients", unit="example") as progress,
    ):
        progress.update(n - sum(stop - start for start, stop in ranges))
        for start, stop in ranges:
            if shards is not None:
                gradients = {name: torch.empty(stop - start, d, dtype=dtype) for name, d in widths.items()}
            for indices in _batches(dataset, start, stop, batch_size):
                for part, batch_gradients in _halving(indices, dataset, loss_fn, collate_fn, differentiate):
                    rows = torch.tensor(part) - start
                    for name, values in batch_gradients.items():
                        gradients[name][rows] = values.to("cpu", dtype)
                    progress.update(len(part))
            if shards is not None:
                shards.write(start // shards.shard_rows, gradients)
    return GradientStore(gradients) if shards is None else GradientStore.load(store)


def reference_gradients(
    model: nn.Module,
    dataset: Sequence,
    loss_fn: LossFn,
    *,
    collate_fn: Callable[[list], Mapping] | None = None,
    layers: Layers = None,
) -> GradientStore:
    """The oracle: one example, one plain ``backward()``, read ``.grad``. As `per_sample_gradients`, but slow."""
    weights = trainable_layers(model, layers)
    collate_fn = collate_fn or default_collate
    device = next(model.parameters()).device
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    gradients = {name: [] for name in weights}
    with _evaluating(model), torch.enable_grad():
        for index in range(len(dataset)):
            for parameter in model.parameters():
                parameter.grad = None
            loss_fn(model, send_to_device(collate_fn([dataset[index]]), device)).sum().backward()
            for name, weight in weights.items():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                gradients[name].append(gradient.detach().flatten().cpu())
    for parameter, gradient in kept.items():
        parameter.grad = gradient
    return GradientStore({name: torch.stack(rows) for name, rows in gradients.items()})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and convolutions in TensorFloat-32, which has 10 bits, off, and back on where they were on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    cudnn = torch.backends.cudnn
    as_it_is = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    try:
        with cudnn.flags(**as_it_is, allow_tf32=False):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _recording(
    model: nn.Module, weights: Mapping[str, nn.Parameter], rows_per_example: int, parts: int
) -> Iterator[Callable]:
    """Yield ``differentiate(loss_fn, batch, examples) -> {layer: (examples, d_l)}``; the model is restored on leaving.

    An example is `rows_per_example` rows of the model's batch; their gradients are summed (`parts` 1) or stand side by
    side (`parts` as many).

    Every parameter is frozen, so that autograd computes no weight gradient at all. The graph begins where the first
    recorded module's output is made to require a gradient; nothing below it is differentiated.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next(model.parameters()).device
    recorder = Recorder(model, weights, rows_per_example, parts)

    def differentiate(loss_fn: LossFn, batch: Mapping, examples: Sequence[int]) -> dict[str, Tensor]:
        size = len(examples)
        with recorder.batch_of(size) as found:
            losses = loss_fn(model, send_to_device(batch, device))
            check_losses(losses, examples)
            losses.sum().backward()
        recorder.verify(found, lambda: loss_fn(model, send_to_device(batch, device))[0])
        return {
            name: found[name] if name in found else weight.new_zeros(size, parts * weight.numel())
            for name, weight in weights.items()
        }

    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with _evaluating(model), torch.enable_grad():
            yield differentiate
    finally:
        recorder.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_losses(losses: Tensor, examples: Sequence[int]) -> None:
    """Refuse a loss that is not one finite number per example."""
    if losses.shape != (len(examples),):
        raise ValueError(
            f"loss_fn must return one loss per example, shape ({len(examples)},), not {tuple(losses.shape)}: "
            "compute it with reduction='none'."
        )
    if not losses.requires_grad:
        raise ValueError(
            "The loss does not depend on any of the layers through their modules, or loss_fn computes it without "
            "gradients."
        )
    bad = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"The loss of example {examples[bad[0].item()]} is not finite.")


def _batches(dataset: Sequence, start: int, stop: int, batch_size: int) -> Iterator[list[int]]:
    """Batches of the examples start..stop-1: like lengths together, the longest first, where memory is shortest."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    indices = sorted(range(start, stop), key=lambda index: -_length(dataset[index]))
    for first in range(0, len(indices), batch_size):
        yield indices[first : first + batch_size]


def _length(example) -> int:
    """Tokens in an example; 0 for one that is not tokenized text, which leaves the order of the dataset."""
    return len(example["input_ids"]) if isinstance(example, Mapping) and "input_ids" in example else 0


def _halving(indices: list[int], dataset, loss_fn, collate_fn, differentiate) -> Iterator[tuple[list[int], dict]]:
    """Yield (indices, their gradients) for the batch, in halves where the whole does not fit in memory."""
    try:
        result = differentiate(loss_fn, collate_fn([dataset[index] for index in indices]), indices)
    except Exception as error:
        if len(indices) == 1 or not should_reduce_batch_size(error):
            raise
        result = None
    if result is not None:
        yield indices, result
        return
    # Outside the except clause, where the failed pass's tensors are no longer held by its traceback.
    clear_device_cache(garbage_collection=True)
    middle = len(indices) // 2
    for half in (indices[:middle], indices[middle:]):
        yield from _halving(half, dataset, loss_fn, collate_fn, differentiate)


def _identity(model: nn.Module, dataset: Sequence, loss_fn: LossFn) -> dict[str, str]:
    """Short fingerprints of what the gradients are of: trainable weights, base, examples in their order, loss."""
    weights, base, examples = (hashlib.sha256() for _ in range(3))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights.update(name.encode())
            weights.update(joblib.hash(parameter.detach().cpu().float().numpy()).encode())
        else:
            # The frozen base may be huge: its names, shapes and one sum per matrix tell two bases apart.
            base.update(
                f"{name} {tuple(parameter.shape)} {parameter.detach().sum(dtype=torch.float64).item():.6e}".encode()
            )
    for index in range(len(dataset)):
        # As arrays: a tensor's pickle depends on where in memory it is.
        example = recursively_apply(lambda tensor: tensor.cpu().numpy(), dataset[index])
        examples.update(joblib.hash(example).encode())
    return {
        "weights": weights.hexdigest()[:16],
        "base": base.hexdigest()[:16],
        "examples": examples.hexdigest()[:16],
        "loss": _name_of(loss_fn),
    }


def _name_of(function: Callable) -> str:
    """A function's name, with the arguments that functools.partial has bound to it."""
    if isinstance(function, partial):
        bound = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in sorted(function.keywords.items()))]
        return f"{_name_of(function.func)}({', '.join(bound)})"
    return getattr(function, "__qualname__", repr(function))
