"""What a forward and a backward pass tell of every example's gradients: the hooks."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from datainf.gradients.functional import functional_gradients, tensors_in
from datainf.gradients.layers import is_matrix, owners, row_gradients


class Recorder:
    """Hooks on the modules through which the layers act, and what they have recorded.

    A batch is `size` examples, each of `rows_per_example` rows of the model's batch. An example's gradients are summed
    over its rows (`parts` 1) or stand side by side (`parts` as many). Recording changes nothing of what the model
    computes: where a graph is to begin, the module's output is a copy of the graph's first leaf, which may be written
    to in place.

    Attributes:
        found: layer -> (size, d_l), for every layer that the last batch's passes reached.
        broken: layer -> why the last batch's passes cannot tell its gradients apart.
        expanded: the modules of which what they compute once for all rows, such as the embeddings of positions, was
            handed on once for each row.
        only_these_expand: whether no others will be.
        types: the types of numbers that went through the modules.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], rows_per_example: int, parts: int):
        self.model, self.weights, self.rows_per_example, self.parts = model, weights, rows_per_example, parts
        self.listening, self.size, self.only_these_expand = False, 0, False
        self.found: dict[str, Tensor] = {}
        self.broken: dict[str, str] = {}
        self.expanded: set[nn.Module] = set()
        self.types: set[torch.dtype] = set()
        self._pending: list[tuple[list[str], Callable[[], dict[str, Tensor]]]] = []
        self._muted, self._batches = False, 0
        self._begun: list[tuple[list[str], Tensor, list[Tensor]]] = []
        self._waiting: Counter[nn.Module] = Counter()
        self._copied: set[nn.Module] = set()
        self._not_cut: set[tuple[nn.Module, int]] = set()
        self._handles: list = []

    def __enter__(self) -> "Recorder":
        try:
            for owner, names in owners(self.model, self.weights).items():
                if is_matrix(owner, names):
                    hook = partial(self._matrix_hook, names["weight"])
                else:
                    hook = partial(self._functional_hook, names)
                self._handles.append(owner.register_forward_hook(hook, with_kwargs=True))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def batch_of(self, size: int) -> Iterator[None]:
        """Record a forward and a backward pass within; on leaving, `found` and `broken` are of this batch."""
        self.listening, self.size = True, size
        self.start_anew()
        try:
            yield
            self.finish()
        finally:
            self.listening, self._pending, self._begun = False, [], []

    def start_anew(self) -> None:
        """Forget what was found, before another backward pass."""
        self.found, self.broken, self._pending = {}, {}, []
        self._waiting.clear()
        self._begun = []

    def weighted(self, losses: Tensor) -> list[Tensor | None]:
        """Before the backward pass: the gradients, at modules whose output has no other dimension than rows and width,
        of the losses weighted by `_weights`. The way to them is short where they are a classifier's head. On a GPU, for
        which a look at them would wait, only in the 1st, 2nd, 4th, 8th, ... batch."""
        self._batches += 1
        passes = losses.is_cuda and self._batches & (self._batches - 1)
        if not self._begun or self._rows == 1 or passes:
            return []
        self._muted = True
        try:
            outputs = [begin for _, begin, _ in self._begun]
            return torch.autograd.grad(
                (self._weights(losses) * losses).sum(), outputs, allow_unused=True, retain_graph=True
            )
        except RuntimeError as error:  # reentrant checkpointing, for one
            if should_reduce_batch_size(error):
                raise
            return []
        finally:
            self._muted = False

    def find_misaligned(
        self, losses: Tensor, weighted: Sequence[Tensor | None], tolerance: tuple[float, float]
    ) -> None:
        """After it: break layers whose module sees as many rows as there are examples by chance, such as an expert to
        which as many tokens fall. Where its rows are the examples, each row's gradient has its example's weight, but
        for a `tolerance`: a part of that row, and of the largest."""
        part, floor = tolerance
        by = self._weights(losses).repeat_interleave(self.rows_per_example)
        for (names, _, seen), again in zip(self._begun, weighted, strict=bool(weighted)):
            for plain in seen:
                if len(plain) == len(by):
                    expected = plain * by.view(-1, *[1] * (plain.dim() - 1))
                    size = expected.reshape(len(by), -1).norm(dim=1)
                    apart = size if again is None else (again - expected).reshape(len(by), -1).norm(dim=1)
                    if (apart > part * size + floor * size.max()).any():
                        self._break(names, "its module sees as many rows as there are examples, but not one of each")

    def _weights(self, losses: Tensor) -> Tensor:
        """From 0.5 to 1.5, by the golden ratio: far apart for neighbours, whose rows are the first to be mistaken."""
        places = torch.arange(self.size, device=losses.device, dtype=torch.float64)
        return (0.5 + (places * 0.6180339887498949).frac()).to(losses.dtype)

    def copy_what_was_lost(self) -> bool:
        """Whether a module's output came to nothing in the backward pass. It may have been written over in place, which
        takes the hook off where the output is a view; from now on a copy of it is handed on."""
        lost = {module for module, calls in self._waiting.items() if calls > 0} - self._copied
        self._copied |= lost
        return bool(lost)

    def finish(self) -> None:
        """Run the modules again that are to be run on each row, after the backward pass."""
        self.listening = False  # Modules that run again are not to be recorded again.
        while self._pending:
            names, gradients_of = self._pending.pop()
            try:
                found = gradients_of()
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                if should_reduce_batch_size(error):
                    raise
                self._break(names, f"its module does not run on one row alone ({first_line(error)})")
                continue
            for name, gradients in found.items():
                self._add(name, gradients)
        self.listening = True

    def _add(self, name: str, gradients: Tensor) -> None:
        """Gradients (size * parts, d); a weight used twice in a forward pass contributes the sum of its uses."""
        values = gradients.view(self.size, -1)
        self.found[name] = self.found[name] + values if name in self.found else values

    def _take(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """What went into a matrix, and what came back."""
        self._add(name, row_gradients(module, inputs, gradient, self.size * self.parts))

    def _break(self, names, why: str) -> None:
        self.broken |= dict.fromkeys(names, why)

    @property
    def _rows(self) -> int:
        return self.size * self.rows_per_example

    def _sees_other_rows(self, names, rows: int) -> bool:
        """Whether a module sees another number of rows than the batch has; if so, the layers are broken."""
        if rows == self._rows:
            return False
        each = "" if self.rows_per_example == 1 else f" of {self.rows_per_example} rows each"
        self._break(names, f"its module sees {rows} rows for a batch of {self.size} examples{each}")
        return True

    def _matrix_hook(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """Keep the input; when the output's gradient comes, contract the two."""
        if not self.listening:
            return None
        (inputs,) = (tensor.detach() for tensor in (*args, *kwargs.values()))
        version = inputs._version
        self.types.update((inputs.dtype, output.dtype))

        def receive(gradient: Tensor) -> None:
            if self._muted:
                return
            self._waiting[module] -= 1
            seen.append(gradient)
            if inputs._version != version:
                self._break([name], "what goes into its module is changed in place afterwards")
            elif not self._sees_other_rows([name], len(inputs) if inputs.dim() > 1 else 0):
                self._take(name, module, inputs, gradient)

        self._waiting[module] += 1
        begins, output = self._handed_on(module, output)
        begins.register_hook(receive)
        seen = self._seen_of([name], begins)
        return output

    def _seen_of(self, names: list[str], begins: Tensor) -> list[Tensor]:
        """Where a gradient is put for `find_misaligned`."""
        if begins.dim() > 2:
            return _Nowhere()
        self._begun.append((names, begins, []))
        return self._begun[-1][2]

    def _handed_on(self, module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor whose gradient is to be seen, and what the model gets, which it may write to."""
        begins = output if output.requires_grad else output.detach().requires_grad_()
        if not output.requires_grad and torch.is_grad_enabled():  # else it runs again in the backward pass
            begins = begins.clone()
        return begins, begins.clone() if module in self._copied or begins.dim() <= 2 else begins

    def _functional_hook(self, names: Mapping[str, str], module: nn.Module, args: tuple, kwargs: dict, output):
        """Keep the arguments; when the output's gradients have come, leave the module to be run again on each row."""
        if not self.listening:
            return None
        arguments = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        leaves = tree_leaves(arguments)
        of_rows = [isinstance(leaf, Tensor) and leaf.shape[:1] == (self._rows,) for leaf in leaves]
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.shape[:1] not in ((self._rows,), (1,)):
                self._not_cut.add((module, place))  # Its first dimension is not the batch, whatever it once equals.
        is_cut = [rows and (module, place) not in self._not_cut for place, rows in enumerate(of_rows)]
        versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves]
        self.types.update(leaf.dtype for leaf in (*leaves, *tensors_in(output)) if isinstance(leaf, Tensor))
        cast = _autocast_as_it_is(next(iter(module.parameters())).device.type)

        def receive(gradients: Sequence[Tensor | None]) -> None:
            if self._muted:
                return
            self._waiting[module] -= 1
            for place, gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    place.append(gradient)
            if [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves] != versions:
                self._break(names.values(), "what goes into its module is changed in place afterwards")
                return
            if any(
                g is not None and self._sees_other_rows(names.values(), len(g) if g.dim() else 0) for g in gradients
            ):
                return
            parts = self.size * self.parts
            arguments_of = (module, names, self.weights, arguments, is_cut, gradients, parts)

            def again() -> dict[str, Tensor]:
                with cast():
                    return functional_gradients(*arguments_of)

            self._pending.append((list(names.values()), again))

        begins: list[Tensor] = []

        def of_every_row(tensor: Tensor) -> Tensor:
            """The output, requiring a gradient, which is to come back for every row by itself."""
            if not tensor.is_floating_point():
                return tensor
            may_expand = module in self.expanded or not self.only_these_expand
            if may_expand and tensor.shape[:1] == (1,) and self._rows > 1 and not any(of_rows):
                self.expanded.add(module)
                tensor = tensor.expand(self._rows, *tensor.shape[1:])
            begin, tensor = self._handed_on(module, tensor)
            begins.append(begin)
            return tensor

        output = tree_map_only(Tensor, of_every_row, output)
        if begins:
            self._waiting[module] += 1
            register_multi_grad_hook(begins, receive)
            seen = [self._seen_of(list(names.values()), begin) for begin in begins]
        return output


class _Nowhere(list):
    """A list that keeps nothing."""

    def append(self, item: object) -> None:
        pass


def _autocast_as_it_is(device_type: str) -> Callable:
    """Makes the context in which lower precision is on or off as it is now."""
    state = {"enabled": torch.is_autocast_enabled(device_type), "dtype": torch.get_autocast_dtype(device_type)}
    return partial(torch.autocast, device_type, **state)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
