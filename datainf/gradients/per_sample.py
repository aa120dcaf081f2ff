"""Per-sample gradients of a model's trainable layers.

For a Linear layer y = x W^T the gradient of one example's loss with respect to W is the sum over its tokens of the
outer products (dloss/dy_t) x_t^T. One batched forward and one batched backward pass therefore hold everything
that is needed for every example of the batch: hooks keep x, receive dloss/dy, and contract the two over tokens.
A convolution is a Linear layer on the patches of its input. For weights that act otherwise the same two, what goes into
a module and the gradient of what comes out, are kept, and the module is differentiated by itself on each row.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate

from datainf import processes
from datainf.errors import InputError
from datainf.gradients.batches import Landing, batches, check_finite, halving
from datainf.gradients.identity import identity
from datainf.gradients.layers import Layers, trainable_layers
from datainf.gradients.recording import Recorder
from datainf.progress import bar, say_if_long
from datainf.storage.memory import in_words
from datainf.storage.shards import Shards
from datainf.storage.store import GradientStore

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
    """The gradient of every example's loss with respect to every trainable weight that is not a bias.

    Dropout is off. The base stays frozen and the backward pass stops at the lowest layer asked for. Examples of
    like length share a batch; the results are in the order of the dataset. A batch that does not fit in memory is
    halved. The model is left exactly as it was found.

    In several processes (``accelerate launch``) each takes some of the examples, and all return the same store.

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
        batch_tokens: instead of `batch_size`, as many examples as make up this many tokens, padding included: few long
            ones or many short ones, at about the same memory.
        rows_per_example: how many rows of the model's batch each example is, one after another: as many as there are
            timesteps in a denoising loss.
        concatenate: keep the gradients of an example's rows side by side instead of their sum. d_l is then
            rows_per_example times as large.
        layers: a regular expression searched for in the names, or the names themselves; by default all.
        dtype: in which the gradients are kept. Those of matrices are computed in float32 at least. bfloat16 takes half
            the room and rounds each number by up to 0.4 %.
        store: a folder to keep the gradients in. Extraction that was killed goes on where it stopped.
        shard_examples: examples in one file of the store, which is the most that a kill costs each process; by default
            as many as make up 256 MiB, and at least `batch_size`.

    Returns:
        GradientStore: layer name -> Tensor (n, d_l), d_l = the layer's weight.numel(), flattened row by row.

    Raises:
        ValueError: no examples, no such layers, a loss that is not one finite number per example, a layer that mixes
            examples or acts other than through its module, a `store` that holds gradients of something else, or too
            little room for the gradients on disk or in memory.
        OSError: a shard of the `store` is damaged or of another store.
    """
    n = len(dataset)
    if n == 0:
        raise ValueError("The dataset has no examples.")
    weights = trainable_layers(model, layers)
    parts = rows_per_example if concatenate else 1
    widths = {name: parts * weight.numel() for name, weight in weights.items()}
    collate_fn = collate_fn or default_collate
    batches_of = partial(batches, dataset, batch_size=batch_size, batch_tokens=batch_tokens)
    shards = None
    processes.begin("per_sample_gradients")
    if store is not None:
        about = identity(model, dataset, loss_fn)
        if concatenate:
            about["loss"] += f", {parts} rows side by side"
        sizes = {"shard_rows": shard_examples, "least_rows": batch_size}
        with processes.first_alone():
            shards = Shards.create(store, n, widths, dtype, identity=about, **sizes)
    check_room(n, widths, dtype, shards)
    work = _my_work(n, shards, batches_of)

    examples = sum(len(indices) for _, _, batches_here in work for indices in batches_here)
    kept = in_words(examples * sum(widths.values()) * dtype.itemsize)
    what = f"per-sample gradients of {examples} examples, {kept} {'in memory' if store is None else 'on disk'}"
    with (
        _recording(model, weights, rows_per_example, parts) as differentiate,
        bar(total=examples, desc="per-sample gradients", unit="example") as progress,
    ):
        began = time.monotonic()
        for start, stop, batches_here in work:
            gradients = {name: torch.zeros(stop - start, d, dtype=dtype) for name, d in widths.items()}
            with Landing(gradients, start) as landing:
                for indices in batches_here:
                    for part, (losses, values) in halving(indices, dataset, loss_fn, collate_fn, differentiate):
                        landing.put(part, losses, values)
                        if progress.n == 0:
                            say_if_long(what, len(part) / examples, time.monotonic() - began)
                        progress.update(len(part))
            if shards is not None:
                shards.write(start // shards.shard_rows, gradients)
    if shards is None:
        return GradientStore({name: processes.add_up(gradients.pop(name)) for name in widths})
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


def check_room(n: int, widths: Mapping[str, int], dtype: torch.dtype, shards: Shards | None) -> None:
    """Refuse what cannot be finished: missing shards on their disk, or n examples in the memory of each process.

    Raises:
        InputError: says how much is needed and how much there is.
    """
    if shards is None:
        free, where, instead = psutil.virtual_memory().available, "memory", "give a folder as store="
        n *= processes.rank_and_count()[1]
    else:
        free, where, instead = shutil.disk_usage(shards.folder).free, "the disk", "choose another disk"
        n = sum(stop - start for start, stop in map(shards.bounds, shards.missing()))
    needed = n * sum(widths.values()) * dtype.itemsize
    if needed > free:
        raise InputError(
            f"The gradients of {n} examples take {in_words(needed)}, but {where} has {in_words(free)} free: {instead}, "
            "keep them in bfloat16 (dtype=), or take fewer layers (layers=)."
        )


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
    """Yield ``differentiate(loss_fn, batch, examples) -> losses, {layer: (examples, d_l)}``; the model is restored on
    leaving.

    An example is `rows_per_example` rows of the model's batch; their gradients are summed (`parts` 1) or stand side by
    side (`parts` as many).

    Every parameter is frozen, so that autograd computes no weight gradient at all. The graph begins where the first
    recorded module's output is made to require a gradient; nothing below it is differentiated.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next(model.parameters()).device
    recorder = Recorder(model, weights, rows_per_example, parts)

    def differentiate(loss_fn: LossFn, batch: Mapping, examples: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        size = len(examples)
        with recorder.batch_of(size) as found:
            losses = loss_fn(model, send_to_device(batch, device))
            _check_shape(losses, size)
            losses.sum().backward()
        if doubtful := recorder.doubtful(found):
            check_finite(losses, examples)
            recorder.verify(doubtful, lambda: loss_fn(model, send_to_device(batch, device))[0])
        return losses.detach(), {
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


def _check_shape(losses: Tensor, size: int) -> None:
    """Refuse a loss that is not one number per example."""
    if losses.shape != (size,):
        raise ValueError(
            f"loss_fn must return one loss per example, shape ({size},), not {tuple(losses.shape)}: "
            "compute it with reduction='none'."
        )
    if not losses.requires_grad:
        raise ValueError(
            "The loss does not depend on any of the layers through their modules, or loss_fn computes it without "
            "gradients."
        )
