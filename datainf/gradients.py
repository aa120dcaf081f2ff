"""Per-sample gradients of a model's trainable layers.

For a Linear layer y = x W^T the gradient of one example's loss with respect to W is the sum over its tokens of the
outer products (dloss/dy_t) x_t^T. One batched forward and one batched backward pass therefore hold everything
that is needed for every example of the batch: hooks keep x, receive dloss/dy, and contract the two over tokens.
A convolution is a Linear layer on the patches of its input.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import joblib
import psutil
import torch
from accelerate.utils import recursively_apply, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import default_collate

from datainf import processes
from datainf.errors import InputError
from datainf.layers import Layers, row_gradients, trainable_layers
from datainf.memory import in_words
from datainf.progress import bar, say_if_long
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
    batch_tokens: int | None = None,
    rows_per_example: int = 1,
    concatenate: bool = False,
    layers: Layers = None,
    dtype: torch.dtype = torch.float32,
    store: str | Path | None = None,
    shard_examples: int | None = None,
) -> GradientStore:
    """The gradient of every example's loss with respect to every trainable Linear or Conv2d weight.

    Dropout is off. The base stays frozen and the backward pass stops at the lowest layer asked for. Examples of
    like length share a batch; the results are in the order of the dataset. A batch that does not fit in memory is
    halved. The model is left exactly as it was found.

    In several processes (``accelerate launch``) each takes some of the examples, and all return the same store.

    Args:
        model: any torch module; of a PEFT model the adapter's matrices and the saved head.
        dataset: anything with ``len`` and integer indexing.
        loss_fn: ``loss_fn(model, batch) -> Tensor (batch,)``.
        collate_fn: makes a batch of a list of examples; torch's default_collate where none is given.
        batch_size: examples in one forward and backward pass.
        batch_tokens: instead of `batch_size`, as many examples as make up this many tokens, padding included: few long
            ones or many short ones, at about the same memory.
        rows_per_example: how many rows of the model's batch each example is, one after another: as many as there are
            timesteps in a denoising loss.
        concatenate: keep the gradients of an example's rows side by side instead of their sum. d_l is then
            rows_per_example times as large.
        layers: a regular expression searched for in the names, or the names themselves; by default all.
        dtype: in which the gradients are kept. They are computed in float32 at least. bfloat16 takes half the room and
            rounds each number by up to 0.4 %.
        store: a folder to keep the gradients in. Extraction that was killed goes on where it stopped.
        shard_examples: examples in one file of the store, which is the most that a kill costs; by default as many as
            make up 256 MiB, and at least one batch.

    Returns:
        GradientStore: layer name -> Tensor (n, d_l), d_l = the layer's weight.numel(), flattened row by row.

    Raises:
        ValueError: no examples, no such layers, an unsupported adapter (DoRA), a loss that is not one finite number
            per example, a layer that mixes examples, a `store` that holds gradients of something else, or too little
            room for the gradients on disk or in memory.
        OSError: a shard of the `store` is damaged or of another store.
    """
    n = len(dataset)
    if n == 0:
        raise ValueError("The dataset has no examples.")
    modules = trainable_layers(model, layers)
    parts = rows_per_example if concatenate else 1
    widths = {name: parts * module.weight.numel() for name, module in modules.items()}
    collate_fn = collate_fn or default_collate
    batches_of = partial(_batches, dataset, batch_size=batch_size, batch_tokens=batch_tokens)
    shards = None
    if store is not None:
        identity = _identity(model, dataset, loss_fn)
        if concatenate:
            identity["loss"] += f", {parts} rows side by side"
        if shard_examples is None:
            shard_examples = max(batch_size, SHARD_BYTES // (sum(widths.values()) * dtype.itemsize))
        shards = Shards.create(store, n, widths, dtype, shard_rows=shard_examples, identity=identity)
    work = _my_work(n, shards, batches_of)
    check_room(widths, dtype, sum(stop - start for start, stop, _ in work), store)

    examples = sum(len(batch) for _, _, batches in work for batch in batches)
    with (
        _recording(model, modules, rows_per_example, parts) as differentiate,
        bar(total=examples, desc="per-sample gradients", unit="example") as progress,
    ):
        began = time.monotonic()
        for start, stop, batches in work:
            gradients = {name: torch.zeros(stop - start, d, dtype=dtype) for name, d in widths.items()}
            with _Landing(gradients, start) as landing:
                for indices in batches:
                    for part, values in _halving(
                        indices, dataset, loss_fn, collate_fn or default_collate, differentiate
                    ):
                        landing.put(part, values)
                        if progress.n == 0:
                            say_if_long("per-sample gradients", len(part) / examples, time.monotonic() - began)
                        progress.update(len(part))
            if shards is not None:
                shards.write(start // shards.shard_rows, gradients)
    if shards is None:
        return GradientStore({name: processes.add_up(G) for name, G in gradients.items()})
    processes.wait()
    return GradientStore.load(store)


def _my_work(n: int, shards: Shards | None, batches_of: Callable) -> list[tuple[int, int, list[list[int]]]]:
    """What falls to this process, as (first example, the one after the last, batches): of a store, whole shards that
    are yet to be written; in memory, some batches of all examples, whose gradients are added up later."""
    rank, count = processes.rank_and_count()
    if shards is None:
        return [(0, n, list(batches_of(0, n))[rank::count])]
    missing = shards.missing()
    for index in sorted(set(range(len(shards))) - set(missing))[rank::count]:
        shards.check(index, every_byte=True)
    processes.wait()  # so that all have seen the same shards missing before the first is written
    return [(*shards.bounds(index), list(batches_of(*shards.bounds(index)))) for index in missing[rank::count]]


def check_room(widths: Mapping[str, int], dtype: torch.dtype, n: int, store: str | Path | None) -> None:
    """Refuse to begin what cannot be finished: the gradients of n examples on the disk of `store`, or in memory.

    Raises:
        InputError: says how much is needed and how much there is.
    """
    needed = n * sum(widths.values()) * dtype.itemsize
    free = psutil.virtual_memory().available if store is None else shutil.disk_usage(store).free
    if needed > free:
        where, instead = ("memory", "give a folder as store=") if store is None else ("the disk", "choose another disk")
        raise InputError(
            f"The gradients of {n} examples take {in_words(needed)}, but {where} has {in_words(free)} free: {instead}, "
            "keep them in bfloat16 (dtype=), or take fewer layers (layers=)."
        )


class _Landing:
    """Puts the gradients of a batch into their rows; from a GPU, while the next batch is under way there."""

    def __init__(self, gradients: Mapping[str, Tensor], start: int):
        self.gradients, self.start = gradients, start
        self._stream: torch.cuda.Stream | None = None
        self._under_way: tuple[list[int], dict[str, Tensor]] | None = None

    def __enter__(self) -> "_Landing":
        return self

    def __exit__(self, *error) -> None:
        self._finish()

    def put(self, indices: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Take the gradients of these examples off the device."""
        self._finish()
        device = next(iter(values.values())).device
        if device.type == "cuda":
            values = self._copy(values, device)
        self._under_way = (indices, values)
        if device.type != "cuda":
            self._finish()

    def _copy(self, values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Begin the copies to page-locked memory, beside the computation."""
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        copies = {}
        with torch.cuda.stream(self._stream):
            for name, value in values.items():
                value.record_stream(self._stream)
                value = value.to(self.gradients[name].dtype)
                copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                copies[name].copy_(value, non_blocking=True)
        return copies

    def _finish(self) -> None:
        if self._under_way is None:
            return
        indices, values = self._under_way
        if self._stream is not None:
            self._stream.synchronize()
        rows = torch.tensor(indices) - self.start
        for name, value in values.items():
            self.gradients[name][rows] = value.to(self.gradients[name].dtype)
        self._under_way = None


def reference_gradients(
    model: nn.Module,
    dataset: Sequence,
    loss_fn: LossFn,
    *,
    collate_fn: Callable[[list], Mapping] | None = None,
    layers: Layers = None,
) -> GradientStore:
    """The oracle: one example, one plain ``backward()``, read ``.grad``. As `per_sample_gradients`, but slow."""
    modules = trainable_layers(model, layers)
    collate_fn = collate_fn or default_collate
    device = next(model.parameters()).device
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    gradients = {name: [] for name in modules}
    with _evaluating(model), torch.enable_grad():
        for index in range(len(dataset)):
            for parameter in model.parameters():
                parameter.grad = None
            loss_fn(model, send_to_device(collate_fn([dataset[index]]), device)).sum().backward()
            for name, module in modules.items():
                gradient = module.weight.grad
                gradients[name].append(
                    (torch.zeros_like(module.weight) if gradient is None else gradient).flatten().cpu()
                )
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
    model: nn.Module, modules: Mapping[str, nn.Module], rows_per_example: int, parts: int
) -> Iterator[Callable]:
    """Yield ``differentiate(loss_fn, batch, examples) -> {layer: (examples, d_l)}``; the model is restored on leaving.

    An example is `rows_per_example` rows of the model's batch; their gradients are summed (`parts` 1) or stand side by
    side (`parts` as many).

    Every parameter is frozen, so that autograd computes no weight gradient at all. The graph begins where the first
    recorded layer's output is made to require a gradient; nothing below it is differentiated.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next(model.parameters()).device
    current: dict[str, Tensor] = {}
    size = 0

    def record(name: str, inputs: Tensor, output_gradient: Tensor) -> None:
        if len(inputs) != size * rows_per_example:
            raise ValueError(
                f"Layer {name!r} sees {len(inputs)} rows for a batch of {size} examples of {rows_per_example} each: "
                "it mixes examples, so its per-sample gradient cannot be told apart."
            )
        values = row_gradients(modules[name], inputs, output_gradient, size * parts).view(size, -1)
        # A module used twice in one forward pass contributes the sum of its uses.
        current[name] = current[name] + values if name in current else values

    def forward_hook(name: str):
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs = args[0].detach()
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(lambda gradient: record(name, inputs, gradient))

        return hook

    def differentiate(loss_fn: LossFn, batch: Mapping, examples: Sequence[int]) -> dict[str, Tensor]:
        nonlocal size
        size = len(examples)
        current.clear()
        losses = loss_fn(model, send_to_device(batch, device))
        check_losses(losses, examples)
        losses.sum().backward()
        return {
            name: current[name] if name in current else module.weight.new_zeros(size, parts * module.weight.numel())
            for name, module in modules.items()
        }

    handles = [module.register_forward_hook(forward_hook(name)) for name, module in modules.items()]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with _evaluating(model), torch.enable_grad():
            yield differentiate
    finally:
        for handle in handles:
            handle.remove()
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
        raise ValueError("The loss does not depend on any of the layers, or loss_fn computes it without gradients.")
    bad = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"The loss of example {examples[bad[0].item()]} is not finite.")


def _batches(
    dataset: Sequence, start: int, stop: int, *, batch_size: int, batch_tokens: int | None
) -> Iterator[list[int]]:
    """Batches of the examples start..stop-1: like lengths together, the longest first, where memory is shortest."""
    for name, size in {"batch_size": batch_size, "batch_tokens": batch_tokens}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}.")
    lengths = {index: _length(dataset[index]) for index in range(start, stop)}
    indices = sorted(lengths, key=lambda index: -lengths[index])
    while indices:
        count = max(1, batch_tokens // max(1, lengths[indices[0]])) if batch_tokens else batch_size
        yield indices[:count]
        indices = indices[count:]


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
