"""Per-sample gradients of a model's trainable layers.

For a Linear layer y = x W^T the gradient of one example's loss with respect to W is the sum over its tokens of the
outer products (dloss/dy_t) x_t^T. One batched forward and one batched backward pass therefore hold everything
that is needed for every example of the batch: hooks keep x, receive dloss/dy, and contract the two over tokens.
A convolution is a Linear layer on the patches of its input. For weights that act otherwise the same two, what goes into
a module and the gradient of what comes out, are kept, and the module is differentiated by itself on each row.
"""

import shutil
import time
import warnings
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
from datainf.gradients.batches import Landing, NotFiniteError, as_sequence, batches, halving, length, without_labels
from datainf.gradients.checking import Differentiator, SeenOtherwise
from datainf.gradients.identity import identity
from datainf.gradients.layers import Layers, check_adapters, trainable_layers
from datainf.gradients.recording import Recorder
from datainf.progress import bar, say_if_long
from datainf.storage.memory import in_words
from datainf.storage.shards import Shards
from datainf.storage.store import GradientStore, matrix_shape

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
    on_bad: str = "raise",
) -> GradientStore:
    """The gradient of every example's loss with respect to every trainable weight that is not a bias.

    Dropout is off. The base stays frozen and the backward pass stops at the lowest layer asked for. Examples of
    like length share a batch; the results are in the order of the dataset. A batch that does not fit in memory is
    halved. The model is left exactly as it was found.

    In several processes (``accelerate launch``) each takes some of the examples, and all return the same store.

    A weight that is no plain matrix on tokens or patches (an embedding, IA3's or a normalization's scale, all of DoRA)
    costs a further run of its module, in the module's own precision. What cannot be told apart in a batch, such as a
    weight that something besides its module uses, is taken one example at a time, with a warning. Which is which is
    seen by comparing two examples with plain training in the first batch; see `gradients.checking`.

    Args:
        model: any torch module; of a PEFT model the adapter's weights and the saved modules.
        dataset: anything with ``len`` and integer indexing; a DataFrame or a dict of columns is taken by its rows.
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
        ValueError: no examples, no such layers, layers of an adapter that takes no part, a loss that is not one finite
            number per example or another in a batch than alone, a `store` that holds gradients of something else, or
            too little room for the gradients on disk or in memory.
        OSError: a shard of the `store` is damaged or of another store.
    """
    dataset = as_sequence(dataset)
    if len(dataset) == 0:
        raise ValueError("The dataset has no examples.")
    if on_bad not in ("raise", "skip"):
        raise InputError(f"on_bad must be 'raise' or 'skip', not {on_bad!r}.")
    weights = trainable_layers(model, layers)
    check_adapters(model, weights)
    check_at_hand(model)
    say_that_checkpointing_is_off(model)
    parts = rows_per_example if concatenate else 1
    widths = {name: parts * weight.numel() for name, weight in weights.items()}
    shapes = {name: matrix_shape(weight.shape, parts) for name, weight in weights.items()}
    collate_fn = collate_fn or default_collate
    batching = {"batch_size": batch_size, "batch_tokens": batch_tokens}
    batching["mixed"] = _go_together(dataset, collate_fn)
    processes.begin("per_sample_gradients")
    bad, skipped = without_labels(dataset, range(len(dataset))), []
    if on_bad == "skip":
        of_all = batches(dataset, 0, len(dataset), **batching)
        skipped = _without_loss(model, dataset, loss_fn, collate_fn, weights, of_all, set(bad))
        dataset = _Some(dataset, sorted(set(range(len(dataset))) - set(skipped)))
    elif bad:
        raise NotFiniteError(bad)
    n = len(dataset)
    if n == 0:
        raise InputError("No example of the dataset has a finite loss.")
    batches_of = partial(batches, dataset, **batching)
    shards = None
    if store is not None:
        about = identity(model, dataset, loss_fn, collate_fn) | {"skipped": ", ".join(map(str, skipped))}
        if concatenate:
            about["loss"] += f", {parts} rows side by side"
        sizes = {"shard_rows": shard_examples, "least_rows": batch_size}
        with processes.first_alone():
            shards = Shards.create(store, n, widths, dtype, identity=about, shapes=shapes, **sizes)
    check_room(n, widths, dtype, shards)
    work = _my_work(n, shards, batches_of)

    examples = sum(len(indices) for _, _, batches_here in work for indices in batches_here)
    kept = in_words(examples * sum(widths.values()) * dtype.itemsize)
    what = f"per-sample gradients of {examples} examples, {kept} {'in memory' if store is None else 'on disk'}"
    with (
        frozen(model) as as_found,
        Recorder(model, weights, rows_per_example, parts) as recorder,
        bar(total=examples, desc="per-sample gradients", unit="example") as progress,
    ):
        differentiate = Differentiator(model, dataset, loss_fn, collate_fn, weights, recorder, as_found)
        mine = [indices for _, _, batches_here in work for indices in batches_here]
        with _naming_all(differentiate, mine):
            while (gradients := _taken(differentiate, work, widths, dtype, shards, progress, what)) is None:
                progress.reset()
    if shards is None:
        return GradientStore({name: processes.add_up(gradients.pop(name)) for name in widths}, skipped, shapes)
    processes.wait()
    return GradientStore.load(store)


def _taken(
    differentiate: Differentiator,
    work: list,
    widths: Mapping[str, int],
    dtype: torch.dtype,
    shards,
    progress,
    what: str,
) -> dict[str, Tensor] | None:
    """Layer -> the gradients of the work's last stretch, which without shards is all of it; None where it is to be done
    again, since a layer cannot be told apart as it seemed."""
    began, written, gradients = time.monotonic(), [], {}
    # The rows of other processes are to be zero; where there are none, every row is written.
    new = torch.zeros if processes.rank_and_count()[1] > 1 else torch.empty
    for start, stop, batches_here in work:
        gradients = {name: new(stop - start, d, dtype=dtype) for name, d in widths.items()}
        try:
            with Landing(gradients, start) as landing:
                for indices in batches_here:
                    for part, (losses, values) in halving(indices, differentiate):
                        landing.put(part, losses, values)
                        if progress.n == 0:
                            say_if_long(what, len(part) / progress.total, time.monotonic() - began)
                        progress.update(len(part))
        except SeenOtherwise:
            for index in written:
                shards.path(index).unlink()
            return None
        if shards is not None:
            shards.write(start // shards.shard_rows, gradients)
            written.append(start // shards.shard_rows)
    return gradients


def _go_together(dataset: Sequence, collate_fn: Callable) -> bool:
    """Whether examples of different lengths can share a batch, as those that are padded can."""
    order = sorted(range(len(dataset)), key=lambda index: length(dataset[index]))
    if length(dataset[order[0]]) == length(dataset[order[-1]]):
        return False
    try:
        collate_fn([dataset[order[-1]], dataset[order[0]]])
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


class _Some(Sequence):
    """Some examples of a dataset, by their numbers."""

    def __init__(self, dataset: Sequence, numbers: list[int]):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int):
        return self.dataset[self.numbers[index]]


def _without_loss(model, dataset, loss_fn, collate_fn, weights, of_all, known: set[int]) -> list[int]:
    """The examples whose loss is not finite, the `known` ones among them, by a forward pass over all others."""
    rank, count = processes.rank_and_count()
    with frozen(model) as as_found, Recorder(model, {}, 1, 1) as recorder:
        differentiate = Differentiator(model, dataset, loss_fn, collate_fn, weights, recorder, as_found)
        others = [[index for index in indices if index not in known] for indices in of_all]
        mine = list(filter(None, others))[rank::count]
        return sorted({*known, *processes.collect(_not_finite(differentiate, mine))})


def _not_finite(differentiate: Differentiator, indices_of_batches: Sequence[Sequence[int]]) -> list[int]:
    found = []
    for indices in bar(indices_of_batches, desc="losses", unit="batch"):
        bad = (~torch.isfinite(differentiate.losses(indices))).nonzero().flatten().tolist()
        found += [indices[place] for place in bad]
    return found


@contextmanager
def _naming_all(differentiate: Differentiator, indices_of_batches: Sequence[Sequence[int]]) -> Iterator[None]:
    """Where an example has no finite loss, look at those of all others before it is refused, to name all at once."""
    try:
        yield
    except NotFiniteError as error:
        found = error.examples
    else:
        return
    raise NotFiniteError([*found, *_not_finite(differentiate, indices_of_batches)]) from None


def check_at_hand(model: nn.Module) -> None:
    """Refuse a model whose weights are elsewhere until its modules are called.

    Raises:
        InputError: names such a weight.
    """
    if away := next((name for name, parameter in model.named_parameters() if parameter.is_meta), None):
        raise InputError(f"The weight {away!r} is offloaded: load the model whole, on one device, for its gradients.")


def say_that_checkpointing_is_off(model: nn.Module) -> None:
    """Warn of gradient checkpointing that is switched on: modules do it in training alone."""
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        warnings.warn(
            "Gradient checkpointing is switched on, but models do it in training alone, and gradients are taken in "
            "evaluation, without it: where memory is short give a smaller batch_size or batch_tokens.",
            stacklevel=3,
        )


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
    dataset = as_sequence(dataset)
    weights = trainable_layers(model, layers)
    check_adapters(model, weights)
    check_at_hand(model)
    collate_fn = collate_fn or default_collate
    device = next(model.parameters()).device
    gradients = {name: [] for name in weights}
    with frozen(model) as as_found:
        for parameter, required in as_found.items():
            parameter.requires_grad_(required)
        for index in range(len(dataset)):
            for parameter in as_found:
                parameter.grad = None
            loss_fn(model, send_to_device(collate_fn([dataset[index]]), device)).sum().backward()
            for name, weight in weights.items():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad.to_dense()
                gradients[name].append(gradient.detach().flatten().cpu())
    shapes = {name: matrix_shape(weight.shape) for name, weight in weights.items()}
    return GradientStore({name: torch.stack(rows) for name, rows in gradients.items()}, shapes=shapes)


@contextmanager
def frozen(model: nn.Module) -> Iterator[dict[nn.Parameter, bool]]:
    """Within, no parameter requires a gradient, so that autograd computes none of a weight, and the model is
    evaluated. Yields what each parameter required; all of that, and ``.grad``, is as before on leaving."""
    parameters = list(model.parameters())
    as_found = {parameter: parameter.requires_grad for parameter in parameters}
    kept = {parameter: parameter.grad for parameter in parameters}
    try:
        for parameter in as_found:
            parameter.requires_grad_(False)
            parameter.grad = None
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield as_found
    finally:
        for parameter, required in as_found.items():
            parameter.requires_grad_(required)
            parameter.grad = kept[parameter]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off, and back on where they were on: dropout; convolutions in TensorFloat-32, which has 10 bits; and
    torch's fused attention for inference, which goes around the modules and so around their adapters."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    cudnn, fused = torch.backends.cudnn, torch.backends.mha.get_fastpath_enabled()
    as_it_is = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with cudnn.flags(**as_it_is, allow_tf32=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, was in training.items():
            module.training = was
