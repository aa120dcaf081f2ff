"""The gradients of a batch's examples: by the hooks where they are seen to be right, else one example at a time.

What the hooks record is compared with real training: the loss of one example alone, ``backward()``, ``.grad``. Before
the first batch this is done for every layer with a few examples of different lengths in one batch, and later for a
layer that appears, or stays away, for the first time. A layer that disagrees is taken one example at a time from then
on, which is slow and right. A loss that is another in a batch than alone is no example's own, and is refused.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from datainf.errors import InputError
from datainf.gradients.batches import check_finite
from datainf.gradients.recording import Recorder

Indices = Sequence[int]

TOLERANCE = {torch.float64: (1e-6, 1e-12), torch.float32: (1e-3, 1e-5)}
"""How far two computations may be apart by rounding: a part of the gradient, and of the largest layer's gradient."""
LOW = (0.05, 5e-4)
"""The same where something computes in half precision, in 8 or 4 bit, or in TensorFloat-32."""


TRIED = 8
"""So many examples are looked at for one that is unlike those at hand."""


class Differentiator:
    """``differentiate(indices) -> losses (k,), {layer: (k, d_l)}`` for the examples of a batch.

    Args:
        weights: layer name -> its weight.
        recorder: its hooks are on the model.
        as_found: every parameter of the model -> whether it requires a gradient. None does while hooks record.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Sequence,
        loss_fn: Callable[[nn.Module, Mapping], Tensor],
        collate_fn: Callable[[list], Mapping],
        weights: Mapping[str, nn.Parameter],
        recorder: Recorder,
        as_found: Mapping[nn.Parameter, bool],
    ):
        self.model, self.dataset, self.loss_fn, self.collate_fn = model, dataset, loss_fn, collate_fn
        self.weights, self.recorder = weights, recorder
        self.trainable = [parameter for parameter, required in as_found.items() if required]
        self.device = next(model.parameters()).device
        self.seen: set[str] = set()  # layers whose recorded gradients were compared and agree
        self.idle: set[str] = set(weights)  # of which no gradient was seen yet
        self.sometimes: set[str] = set()  # seen, and rightly without a gradient in some batch
        self.slow: dict[str, str] = {}  # layer -> why it is taken one example at a time

    def __call__(self, indices: Indices) -> tuple[Tensor, dict[str, Tensor]]:
        if self.slow.keys() == self.weights.keys():
            alone = [self._alone(index) for index in indices]
            losses, values = torch.stack([loss for loss, _ in alone]), self._stacked(alone, self.slow)
            return self._finite(losses, values), values
        losses, found, broken = self._recorded(indices)
        self._fall_back(broken)
        appear = [name for name in found.keys() & self.idle - self.slow.keys() if found[name].any()]
        stay_away = self.seen - found.keys() - self.sometimes - self.slow.keys()
        if appear or stay_away:
            check_finite(losses, indices)
            names = [*appear, *stay_away]
            places = self._telling(found, appear, len(indices))
            alone = {place: self._alone(indices[place]) for place in places}
            self._compare(indices, losses, found, names, alone)
            self.sometimes |= stay_away
        values = {name: found[name] if name in found else self._zeros(name, len(indices)) for name in self.weights}
        if self.slow:
            values |= self._stacked([self._alone(index) for index in indices], self.slow)
        return self._finite(losses, values), values

    def losses(self, indices: Indices) -> Tensor:
        """The losses alone, shape (k,)."""
        with torch.no_grad():
            return self._loss(indices).detach()

    def _finite(self, losses: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The losses, not a number where a gradient is none."""
        largest = torch.stack([gradients.abs().amax(dim=1).to(losses) for gradients in values.values()])
        return torch.where(largest.isfinite().all(dim=0), losses, torch.nan)

    def check(self, batches: Sequence[Indices]) -> None:
        """Compare every layer, before the work is begun, with examples of these batches.

        Raises:
            ValueError: the loss of an example is not its own, is not finite, or depends on no layer.
        """
        alone = self._few(batches)
        try:
            self._check(alone)
        except Exception as error:
            if len(alone) == 1 or not should_reduce_batch_size(error):
                raise
        else:
            return
        # Outside the except clause, where the failed pass's tensors are no longer held. The two shortest, then.
        clear_device_cache(garbage_collection=True)
        self._check({index: self._alone(index) for index in batches[-1][-2:]})

    def _check(self, alone: Mapping[int, tuple[Tensor, dict[str, Tensor]]]) -> None:
        few = list(alone)
        try:
            losses, found, broken = self._recorded(few)
            right = all(self._same(mine, true) for mine, (true, _) in zip(losses, alone.values(), strict=True))
        except (RuntimeError, ValueError, IndexError) as error:
            if not self.recorder.expanded or should_reduce_batch_size(error):
                raise
            right = False
        if self.recorder.expanded and not right:
            # The model wants what it computes once for all rows as it is; then it cannot be told apart by rows.
            self.recorder.expanded = set()
            self.recorder.only_these_expand = True
            losses, found, broken = self._recorded(few)
        self.recorder.only_these_expand = True
        check_finite(losses, few)
        self._fall_back(broken)
        names = [name for name in self.weights if name not in self.slow]
        self._compare(few, losses, found, names, dict(enumerate(alone.values())))

    def _few(self, batches: Sequence[Indices]) -> dict[int, tuple[Tensor, dict[str, Tensor]]]:
        """Examples as unlike as there are, and what `_alone` gives of them: the longest, which comes first, the
        shortest and one from the middle, with different losses; no more of them than the largest batch has."""
        in_order = [index for indices in batches for index in indices]
        chosen = {in_order[0]: self._alone(in_order[0])}
        most, middle = max(map(len, batches)), len(in_order) // 2
        if most == 1:
            return chosen
        for candidates in ([*in_order[:0:-1]], [*in_order[middle:], *in_order[middle - 1 : 0 : -1]])[: most - 1]:
            for index in [index for index in candidates if index not in chosen][:TRIED]:
                if self._collates([*chosen, index]):
                    alone = self._alone(index)
                    if all(alone[0] != loss for loss, _ in chosen.values()):
                        chosen[index] = alone
                        break
        if len(chosen) == 1:  # all are alike, or of lengths that do not go together
            chosen = {index: self._alone(index) for index in max(batches, key=len)[:2]}
        return chosen

    def _telling(self, found: Mapping[str, Tensor], names: Sequence[str], size: int) -> set[int]:
        """Two places in the batch of which these layers say much: with the largest gradients, and an end of it."""
        norms = sum(found[name].float().norm(dim=1) for name in names)
        most = int(torch.argmax(norms)) if names else 0
        return {most, 0 if most else size - 1}

    def _collates(self, few: Indices) -> bool:
        """Whether they can share a batch, which examples of different lengths without padding cannot."""
        try:
            self.collate_fn([self.dataset[index] for index in few])
        except (RuntimeError, ValueError, TypeError):
            return False
        return True

    def _loss(self, indices: Indices) -> Tensor:
        """The losses of some examples together, in a batch that nobody else holds."""
        batch = send_to_device(self.collate_fn([self.dataset[index] for index in indices]), self.device)
        losses = self.loss_fn(self.model, batch)
        if not isinstance(losses, Tensor) or losses.shape != (len(indices),):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss_fn must return one loss per example, shape ({len(indices)},), not {shape}: "
                "compute it with reduction='none'."
            )
        return losses

    def _recorded(self, indices: Indices) -> tuple[Tensor, dict[str, Tensor], dict[str, str]]:
        """The losses, what the hooks found, and what they could not tell apart."""
        with self.recorder.batch_of(len(indices)):
            losses = self._loss(indices)
            if losses.requires_grad:
                losses.sum().backward()
        self._leave_no_trace()
        return losses.detach(), self.recorder.found, self.recorder.broken

    def _alone(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An example's loss and gradients as in real training, by itself in a batch: the truth."""
        with self._as_in_training():
            losses = self._loss([index])
            if losses.requires_grad:
                losses.sum().backward()
            gradients = {name: weight.grad for name, weight in self.weights.items()}
        if not losses.requires_grad:
            raise ValueError("The loss does not depend on any of the layers, or loss_fn computes it without gradients.")
        return losses.detach()[0], {
            name: torch.zeros_like(self.weights[name]) if gradient is None else gradient.to_dense()
            for name, gradient in gradients.items()
        }

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """The parameters require gradients as they did when the model came."""
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            self._leave_no_trace()

    def _leave_no_trace(self) -> None:
        """No parameter requires a gradient or has one, whatever a loss may have switched on."""
        for parameter in self.trainable:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _zeros(self, name: str, rows: int) -> Tensor:
        return self.weights[name].new_zeros(rows, self.recorder.parts * self.weights[name].numel())

    def _stacked(self, alone: list[tuple[Tensor, dict[str, Tensor]]], names: Iterable[str]) -> dict[str, Tensor]:
        return {name: torch.stack([gradients[name].flatten() for _, gradients in alone]) for name in names}

    def _compare(
        self, indices: Indices, losses: Tensor, found: Mapping[str, Tensor], names: Sequence[str], alone: Mapping
    ) -> None:
        """Compare some layers' recorded gradients with the truth; those that disagree become slow.

        Args:
            alone: place in the batch -> what `_alone` gives of that example.

        Raises:
            ValueError: an example's loss is another alone than in the batch.
        """
        truths, draws = {place: truth for place, (_, truth) in alone.items()}, False
        for place, (loss, _) in alone.items():
            if not self._same(losses[place], loss):
                draws = draws or self._draws(indices[place], loss)
                if not draws:
                    raise InputError(
                        f"The loss of example {indices[place]} is {losses[place].item():.6g} in a batch of "
                        f"{len(indices)} and {loss.item():.6g} alone, so it is not its own: it depends on the other "
                        "examples or on padding. Mask the padding and take no statistics over the batch, or give "
                        "batch_size=1, if the loss alone is what you mean."
                    )
        wrong = {} if draws else self._disagreeing(found, truths, names)
        if draws or (wrong and self._tolerance() == LOW):
            # Two passes are not alike, by chance or by rounding: a single one, then, for each of the two.
            wrong = self._in_one_pass(indices, list(alone), names if draws else list(wrong))
        self._fall_back(wrong)
        for name in names:
            if name not in wrong and (draws or any(truth[name].any() for truth in truths.values())):
                self.seen.add(name)
                self.idle.discard(name)

    def _disagreeing(self, found: Mapping[str, Tensor], truths: Mapping[int, dict], names: Iterable[str]) -> dict:
        """Layer -> why, for those whose found rows are not the true gradients of these places in the batch."""
        part, floor = self._tolerance()
        wrong = {}
        for place, truth in truths.items():
            largest = max(gradient.norm().item() for gradient in truth.values())
            for name in names:
                own = truth[name].flatten()
                mine = found[name][place].view(self.recorder.parts, -1).sum(dim=0) if name in found else 0 * own
                if (mine.to(own) - own).norm().item() > part * own.norm().item() + floor * largest:
                    wrong[name] = "it acts other than through its module on every row of the batch by itself"
        return wrong

    def _in_one_pass(self, indices: Indices, places: Sequence[int], names: Sequence[str]) -> dict[str, str]:
        """As `_disagreeing`, of the gradients of single examples' losses in one and the same forward pass."""
        part, floor = LOW
        wrong = {}
        weights = [self.weights[name] for name in names]
        with self._as_in_training(), self.recorder.batch_of(len(indices)):
            losses = self._loss(indices)
            for place in places:
                self.recorder.start_anew()
                truth = torch.autograd.grad(losses[place], weights, retain_graph=True, materialize_grads=True)
                self.recorder.finish()
                wrong |= {name: why for name, why in self.recorder.broken.items() if name in names}
                largest = max(gradient.norm().item() for gradient in truth)
                for name, own in zip(names, truth, strict=True):
                    rows = self.recorder.found.get(name, self._zeros(name, len(indices)))
                    excess = rows.view(len(indices), self.recorder.parts, -1).sum(dim=1)
                    excess[place] -= own.flatten().to(excess)
                    if excess.norm().item() > part * own.norm().item() + floor * largest:
                        wrong[name] = "it acts other than through its module on every row of the batch by itself"
        return wrong

    def _tolerance(self) -> tuple[float, float]:
        types = {parameter.dtype for parameter in self.model.parameters()} | self.recorder.types
        floats = {kind for kind in types if kind.is_floating_point}
        whole = {kind for kind in types - floats if kind in (torch.int8, torch.uint8)}  # quantized weights
        tf32 = self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        if whole or tf32 or min(kind.itemsize for kind in floats) < 4:
            return LOW
        return TOLERANCE[min(floats, key=lambda kind: kind.itemsize)]

    def _same(self, one: Tensor, other: Tensor) -> bool:
        part = self._tolerance()[0]
        apart, largest = (one - other).abs().item(), max(one.abs().item(), other.abs().item())
        return not apart > part * largest + part / 100  # what is not finite is looked at elsewhere

    def _draws(self, index: int, loss: Tensor) -> bool:
        """Whether an example's loss is another when it is computed again: it draws numbers at random."""
        return self._alone(index)[0].item() != loss.item()

    def _fall_back(self, wrong: Mapping[str, str]) -> None:
        """Take these layers one example at a time from now on, and say so.

        Raises:
            ValueError: the gradients of an example's rows are to be told apart.
        """
        new = {name: why for name, why in wrong.items() if name in self.weights and name not in self.slow}
        if not new:
            return
        name, why = next(iter(new.items()))
        if self.recorder.parts > 1:
            raise ValueError(
                f"Of layer {name!r} the rows of an example cannot be told apart, since {why}: leave it out by layers=, "
                "or take the sum over the rows."
            )
        self.slow |= new
        warnings.warn(
            f"{len(new)} of {len(self.weights)} layers, such as {name!r}, are taken one example at a time, since {why}."
            " They are exact, and as slow as training with batches of one; layers= leaves them out.",
            stacklevel=2,
        )
