"""Which examples share a batch, what becomes of one that does not fit in memory, and where its gradients go."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor


def batches(
    dataset: Sequence, start: int, stop: int, *, batch_size: int, batch_tokens: int | None
) -> Iterator[list[int]]:
    """Batches of the examples start..stop-1: like lengths together, the longest first, where memory is shortest."""
    for name, size in {"batch_size": batch_size, "batch_tokens": batch_tokens}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}.")
    lengths = {index: length(dataset[index]) for index in range(start, stop)}
    indices = sorted(lengths, key=lambda index: -lengths[index])
    while indices:
        count = max(1, batch_tokens // max(1, lengths[indices[0]])) if batch_tokens else batch_size
        yield indices[:count]
        indices = indices[count:]


def length(example) -> int:
    """Tokens in an example; 0 for one that is not tokenized text, which leaves the order of the dataset."""
    return len(example["input_ids"]) if isinstance(example, Mapping) and "input_ids" in example else 0


def halving(indices: list[int], dataset, loss_fn, collate_fn, differentiate) -> Iterator[tuple[list[int], tuple]]:
    """Yield (indices, what `differentiate` makes of them) for the batch, in halves where it does not fit in memory."""
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
        yield from halving(half, dataset, loss_fn, collate_fn, differentiate)


def check_finite(losses: Tensor, examples: Sequence[int]) -> None:
    """Refuse a loss that is infinite or no number, naming the first such example."""
    bad = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"The loss of example {examples[bad[0].item()]} is not finite.")


class Landing:
    """Puts the gradients of a batch into their rows; from a GPU, by a thread of its own while the next batches are
    under way there.

    Whether the losses are finite is looked at then, too, since looking waits for the GPU.
    """

    def __init__(self, gradients: Mapping[str, Tensor], start: int):
        self.gradients, self.start = gradients, start
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._stream: torch.cuda.Stream | None = None
        self._under_way: Future | None = None

    def __enter__(self) -> "Landing":
        return self

    def __exit__(self, failed: type | None, *error) -> None:
        with self._worker:  # which waits for it
            if failed is None:
                self._finish()

    def put(self, indices: Sequence[int], losses: Tensor, values: Mapping[str, Tensor]) -> None:
        """Take the losses and gradients of these examples off the device.

        Raises:
            ValueError: a loss, of these examples or of those before, is not finite.
        """
        if losses.is_cuda:
            # Begun before the one under way is waited for, so that the device has work meanwhile.
            copies = self._copy(losses, values)
            self._finish()
            self._under_way = self._worker.submit(self._land, indices, *copies)
        else:
            self._land(indices, losses, values)

    def _copy(self, losses: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], torch.cuda.Event]:
        """Begin the copies to page-locked memory, beside the computation; the event is when they are done."""
        self._stream = self._stream or torch.cuda.Stream(losses.device)
        self._stream.wait_stream(torch.cuda.current_stream(losses.device))

        def copy(value: Tensor, dtype: torch.dtype) -> Tensor:
            value.record_stream(self._stream)
            landed = torch.empty(value.shape, dtype=dtype, pin_memory=True)
            return landed.copy_(value.to(dtype), non_blocking=True)

        with torch.cuda.stream(self._stream):
            copies = {name: copy(value, self.gradients[name].dtype) for name, value in values.items()}
            losses = copy(losses, losses.dtype)
            done = torch.cuda.Event()
            done.record(self._stream)
        return losses, copies, done

    def _finish(self) -> None:
        """Wait for the batch under way; raise what was wrong with it."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def _land(
        self, indices: Sequence[int], losses: Tensor, values: Mapping[str, Tensor], done: torch.cuda.Event | None = None
    ) -> None:
        if done is not None:
            done.synchronize()
        check_finite(losses, indices)
        rows = torch.tensor(indices) - self.start
        for name, value in values.items():
            self.gradients[name][rows] = value.to(self.gradients[name].dtype)
