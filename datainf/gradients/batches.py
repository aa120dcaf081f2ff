"""Which examples share a batch, what becomes of one that does not fit in memory, and where its gradients go."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from datainf.errors import InputError


def as_sequence(dataset) -> Sequence:
    """A dataset as examples that are read by number: a table or a dict of columns as its rows, all else as it is.

    Raises:
        ValueError: it has no length or cannot be read by number, is a dict of splits, or has columns of different
            lengths.
    """
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # a DataFrame
        return dataset.to_dict("records")
    if isinstance(dataset, Mapping):
        lengths = {name: len(column) for name, column in dataset.items() if hasattr(column, "__len__")}
        if any(hasattr(column, "column_names") for column in dataset.values()):
            raise ValueError(f"The dataset is a dict of splits: give one of them, such as [{next(iter(dataset))!r}].")
        if len(lengths) != len(dataset) or len(set(lengths.values())) > 1:
            raise ValueError(f"The dataset is a dict whose columns are not of one length: {lengths}.")
        return [dict(zip(dataset, row, strict=True)) for row in zip(*dataset.values(), strict=True)]
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"Examples are read by number, and a {type(dataset).__name__} has no length or no numbers: give a list, or "
            "a dataset that holds them all, such as list(dataset)."
        )
    return dataset


def without_labels(dataset: Sequence, indices: Iterable[int]) -> list[int]:
    """The examples all of whose labels are masked (-100), of which a mean over tokens is 0 / 0."""

    def masked(example) -> bool:
        labels = example.get("labels") if isinstance(example, Mapping) else None
        labels = labels.tolist() if isinstance(labels, Tensor) else labels
        return isinstance(labels, list) and len(labels) > 0 and all(label == -100 for label in labels)

    return [index for index in indices if masked(dataset[index])]


class NotFiniteError(InputError):
    """The loss or a gradient of some `examples` is infinite or no number."""

    def __init__(self, examples: Sequence[int]):
        self.examples = sorted(set(examples))
        shown = ", ".join(map(str, self.examples[:10])) + (", ..." if len(self.examples) > 10 else "")
        several = f"s {shown} ({len(self.examples)} in all)" if len(self.examples) > 1 else f" {shown}"
        super().__init__(
            f"The loss of example{several} is not finite, or its gradient: look at the labels (are all of them "
            "masked?), or leave what has no loss out by on_bad='skip'."
        )


def batches(
    dataset: Sequence, start: int, stop: int, *, batch_size: int, batch_tokens: int | None, mixed: bool = False
) -> Iterator[list[int]]:
    """Batches of the examples start..stop-1: like lengths together, the longest first, where memory is shortest.

    Args:
        mixed: let the first batch of several examples end with a shorter one, by which is seen what padding does.
    """
    for name, size in {"batch_size": batch_size, "batch_tokens": batch_tokens}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}.")
    lengths = {index: length(dataset[index]) for index in range(start, stop)}
    indices = sorted(lengths, key=lambda index: -lengths[index])
    while indices:
        count = max(1, batch_tokens // max(1, lengths[indices[0]])) if batch_tokens else batch_size
        if mixed and count > 1:
            shorter = [place for place in range(count, len(indices)) if lengths[indices[place]] < lengths[indices[0]]]
            if shorter:
                indices.insert(count - 1, indices.pop(shorter[len(shorter) // 2]))
            mixed = False
        yield indices[:count]
        indices = indices[count:]


def length(example) -> int:
    """Tokens in an example; 0 for one that is not tokenized text, which leaves the order of the dataset."""
    return len(example["input_ids"]) if isinstance(example, Mapping) and "input_ids" in example else 0


def halving(indices: list[int], differentiate: Callable) -> Iterator[tuple[list[int], tuple]]:
    """Yield (indices, what `differentiate` makes of them) for the batch, in halves where it does not fit in memory."""
    try:
        result = differentiate(indices)
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
        yield from halving(half, differentiate)


def check_finite(losses: Tensor, examples: Sequence[int]) -> None:
    """Refuse losses that are infinite or no number.

    Raises:
        NotFiniteError: names the examples.
    """
    if bad := [examples[place] for place in (~torch.isfinite(losses)).nonzero().flatten().tolist()]:
        raise NotFiniteError(bad)


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
            landed = torch.empty(value.shape, dtype=dtype if dtype != torch.float16 else value.dtype, pin_memory=True)
            # What float16 may lose is looked at where it lands.
            return landed.copy_(value.to(landed.dtype), non_blocking=True)

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
            if value.dtype != torch.float16 and self.gradients[name].dtype == torch.float16:
                check_kept(name, value, indices)


def check_kept(name: str, value: Tensor, examples: Sequence[int]) -> None:
    """Refuse gradients that float16, which holds numbers from 6e-8 to 65,504, loses.

    Raises:
        InputError: names a layer and an example.
    """
    norms, kept = (torch.linalg.vector_norm(rows.float(), dim=1) for rows in (value, value.half()))
    if (lost := ~((norms - kept).abs() <= 0.05 * norms)).any():
        raise InputError(
            f"The gradient of example {examples[int(lost.nonzero()[0])]} in layer {name!r} is lost in float16, which "
            "holds numbers from 6e-8 to 65,504: keep gradients in bfloat16 or float32 (dtype=)."
        )
