"""What a forward and a backward pass tell of every example's gradients: the hooks, and a check of what they miss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_map_only

from datainf.gradients.functional import functional_gradients, tensors_in
from datainf.gradients.layers import is_matrix, owners, row_gradients

TOLERANCE = 0.05
"""The part of a gradient by which rounding, in bfloat16 at worst, may set two computations of it apart."""


class Recorder:
    """Hooks on the modules through which the layers act, and what they have recorded.

    A batch is `size` examples, each of `rows_per_example` rows of the model's batch. An example's gradients are summed
    over its rows (`parts` 1) or stand side by side (`parts` as many).
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], rows_per_example: int, parts: int):
        self.weights, self.rows_per_example, self.parts = weights, rows_per_example, parts
        self.listening, self.size = False, 0
        self.found: dict[str, Tensor] = {}
        self.pending: list[Callable[[], dict[str, Tensor]]] = []
        self.unverified: set[str] = set()
        self.unused: set[str] = set()
        self.handles = []
        for owner, names in owners(model, weights).items():
            if is_matrix(owner, names):
                hook = partial(self._matrix_hook, names["weight"])
            else:
                hook = partial(self._functional_hook, names)
                self.unverified.update(names.values())
            self.handles.append(owner.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def batch_of(self, size: int) -> Iterator[dict[str, Tensor]]:
        """A forward and a backward pass within give, on leaving, layer -> (size, d_l) for every layer they reached."""
        self.listening, self.size = True, size
        self.found, self.pending = {}, []
        try:
            yield self.found
            self.listening = False  # Modules that run again are not to be recorded again.
            while self.pending:
                for name, gradients in self.pending.pop()().items():
                    self._add(name, gradients)
        finally:
            self.listening, self.pending = False, []

    def doubtful(self, found: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """The layers yet to be compared with plain autograd: those that are no plain matrices, and those of which a
        batch has found nothing."""
        missing = self.weights.keys() - found.keys() - self.unused
        return {name: weight for name, weight in self.weights.items() if name in self.unverified | missing}

    def verify(self, doubtful: Mapping[str, nn.Parameter], first_loss: Callable[[], Tensor]) -> None:
        """Compare doubtful layers with plain autograd, once.

        Of a layer that acts on the batch through its own module alone, the gradient of the first example's loss is
        found in the first row, and nothing in the others.

        Args:
            first_loss: the loss of the batch's first example, in a forward pass of the whole batch.

        Raises:
            ValueError: a layer does not.
        """
        try:
            for weight in doubtful.values():
                weight.requires_grad_(True)
            with self.batch_of(self.size) as found:
                truth = torch.autograd.grad(first_loss(), list(doubtful.values()), allow_unused=True)
        finally:
            for weight in doubtful.values():
                weight.requires_grad_(False)
        largest = max((gradient.norm().item() for gradient in truth if gradient is not None), default=0)
        for name, gradient in zip(doubtful, truth, strict=True):
            if not self._agrees(found.get(name), gradient, floor=1e-4 * largest):
                raise ValueError(
                    f"Layer {name!r} acts other than through its module on every row of the batch by itself, so its "
                    "per-sample gradient cannot be told apart: leave it out by `layers`."
                )
        self.unused |= doubtful.keys() - found.keys()
        self.unverified = set()

    def _agrees(self, found: Tensor | None, truth: Tensor | None, floor: float) -> bool:
        """Whether what is found of a layer is the first example's true gradient, None if the layer is not used."""
        if found is None:
            return truth is None
        excess = found.view(self.size, self.parts, -1).sum(dim=1)
        if truth is not None:
            excess[0] -= truth.flatten()
            floor += TOLERANCE * truth.norm().item()
        return excess.norm().item() <= floor

    def _add(self, name: str, gradients: Tensor) -> None:
        """Gradients (size * parts, d); a weight used twice in a forward pass contributes the sum of its uses."""
        values = gradients.view(self.size, -1)
        self.found[name] = self.found[name] + values if name in self.found else values

    def _check_rows(self, name: str, rows: int) -> None:
        if rows != self.size * self.rows_per_example:
            raise ValueError(
                f"Layer {name!r} sees {rows} rows for a batch of {self.size} examples of {self.rows_per_example} each: "
                "it mixes examples, so its per-sample gradient cannot be told apart."
            )

    def _matrix_hook(self, name: str, module: nn.Module, args: tuple[Tensor], kwargs: dict, output: Tensor) -> None:
        """Keep the input; when the output's gradient comes, contract the two."""
        if not self.listening:
            return
        inputs = args[0].detach()

        def receive(gradient: Tensor) -> None:
            self._check_rows(name, len(inputs))
            self._add(name, row_gradients(module, inputs, gradient, self.size * self.parts))

        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(receive)

    def _functional_hook(self, names: Mapping[str, str], module: nn.Module, args: tuple, kwargs: dict, output):
        """Keep the arguments; when the output's gradients have come, leave the module to be run again on each row."""
        if not self.listening:
            return None
        arguments = tree_map_only(Tensor, Tensor.detach, (args, kwargs))

        def receive(gradients: Sequence[Tensor | None]) -> None:
            for gradient in gradients:
                if gradient is not None:
                    self._check_rows(next(iter(names.values())), len(gradient))
            parts = self.size * self.parts
            self.pending.append(partial(functional_gradients, module, names, self.weights, arguments, gradients, parts))

        output = tree_map_only(Tensor, self._of_every_row, output)
        register_multi_grad_hook(tensors_in(output), receive)
        return output

    def _of_every_row(self, output: Tensor) -> Tensor:
        """The output, requiring a gradient, which is to come back for every row by itself."""
        if not output.is_floating_point():
            return output
        if output.shape[:1] == (1,):  # Of position embeddings, say: computed once for all rows.
            output = output.expand(self.size * self.rows_per_example, *output.shape[1:])
        return output if output.requires_grad else output.detach().requires_grad_()
