"""Which examples share a batch, what becomes of one that does not fit in memory, and where its gradients go."""

from collections.abc import Iterator, Mapping, Sequence

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


def halving(indices: list[int], dataset, loss_fn, collate_fn, differentiate) -> Iterator[tuple[list[int], dict]]:
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
        yield from halving(half, dataset, loss_fn, collate_fn, differentiate)


class Landing:
    """Puts the gradients of a batch into their rows; from a GPU, while the next batch is under way there."""

    def __init__(self, gradients: Mapping[str, Tensor], start: int):
        self.gradients, self.start = gradients, start
        self._stream: torch.cuda.Stream | None = None
        self._under_way: tuple[list[int], dict[str, Tensor]] | None = None

    def __enter__(self) -> "Landing":
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
