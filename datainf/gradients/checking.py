"""The gradients of a batch's examples: by the hooks where they are seen to be right, else one example at a time.

What the hooks record is compared with real training: the loss of one example alone, ``backward()``, ``.grad``. In the
first batch this is done for every layer, with two examples of different lengths, and later for a layer that appears, or
stays away, for the first time. A layer that disagrees is taken one example at a time from then on, which is slow and
right. A loss that is another in a batch than alone is no example's own, and is refused.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from datainf.errors import InputError
from datainf.gradients.batches import check_finite
from datainf.gradients.recording import Recorder, first_line

Indices = Sequence[int]

TOLERANCE = {torch.float64: (1e-6, 1e-12), torch.float32: (1e-3, 1e-5)}
"""How far two computations may be apart by rounding: a part of the gradient, and of the largest layer's gradient."""
LOW = (0.05, 5e-4)
"""The same where something computes in half precision, in 8 or 4 bit, or in TensorFloat-32."""


class SeenOtherwise(Exception):
    """A layer that was right in batches before cannot be told apart in another: those before may have been right by
    chance, and are to be done again."""


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
        self.types = {parameter.dtype for parameter in model.parameters()}
        self.seen: set[str] = set()  # layers whose recorded gradients were compared and agree
        self.idle: set[str] = set(weights)  # of which no gradient was seen yet
        self.sometimes: set[str] = set()  # seen, and rightly without a gradient in some batch
        self.slow: dict[str, str] = {}  # layer -> why it is taken one example at a time
        self.batches = 0  # so far
        self.compared = 0  # how many examples the largest batch had in which all layers were compared

    def __call__(self, indices: Indices) -> tuple[Tensor, dict[str, Tensor]]:
        """As above.

        Raises:
            ValueError: a loss is not an example's own or depends on no layer; the rows of an example are to be told
                apart in a layer that is slow.
            SeenOtherwise: start anew; what is to be slow is known now.
        """
        if self.slow.keys() == self.weights.keys():
            alone = [self._alone(index) for index in indices]
            losses, values = torch.stack([loss for loss, _ in alone]), self._stacked(alone, self.slow)
            return self._finite(losses, values), values
        losses, found, broken = self._recorded(indices)
        if names := self._to_compare(found, len(indices)):
            alone = {place: self._alone(indices[place]) for place in self._places(found, names, len(indices))}
            if self.recorder.expanded and not self.recorder.only_these_expand:
                if not all(self._same(losses[place], loss) for place, (loss, _) in alone.items()):
                    losses, found, broken = self._unexpanded(indices)
            check_finite(losses, indices)
            self._fall_back(broken)
            names = [name for name in names if name not in self.slow]
            self._compare(indices, losses, found, names, alone)
            self.sometimes |= self.seen & set(names) - found.keys()
        self.recorder.only_these_expand = True
        late = broken.keys() & self.seen - self.slow.keys()
        self._fall_back(broken)
        if late:
            raise SeenOtherwise
        values = {name: found[name] if name in found else self._zeros(name, len(indices)) for name in self.weights}
        if self.slow:
            values |= self._stacked([self._alone(index) for index in indices], self.slow)
        return self._finite(losses, values), values

    def _to_compare(self, found: Mapping[str, Tensor], size: int) -> list[str]:
        """All layers in the first batch, and in the first of several examples; later those that appear or stay away,
        and in the 2nd, 4th, 8th, ... batch those of which nothing was seen yet."""
        self.batches += 1
        if min(size, 2) > self.compared:
            self.compared = min(size, 2)
            return [name for name in self.weights if name not in self.slow]
        appear = [name for name in found.keys() & self.idle - self.slow.keys() if found[name].any()]
        stay_away = self.seen - found.keys() - self.sometimes - self.slow.keys()
        power_of_two = self.batches & (self.batches - 1) == 0
        unseen = self.idle - found.keys() - self.slow.keys() if power_of_two else set()
        return [*appear, *stay_away, *unseen]

    def _places(self, found: Mapping[str, Tensor], names: Sequence[str], size: int) -> list[int]:
        """Two places in the batch of which these layers say much: its ends, the longest example and a shorter one; of
        layers that come later, instead of the first that with the largest gradients."""
        norms = sum(found[name].float().norm(dim=1) for name in names if name in found)
        few = isinstance(norms, Tensor) and len(names) < len(self.weights)
        return sorted({int(torch.argmax(norms)) if few else 0, size - 1})

    def losses(self, indices: Indices) -> Tensor:
        """The losses alone, shape (k,)."""
        with torch.no_grad():
            return self._loss(indices).detach()

    def _finite(self, losses: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The losses, not a number where a gradient is none, or is so large that its norm is none: every method needs
        that. (The norm is one pass over the gradients, where a look at each number would make copies of them.)"""
        norms = []
        for gradients in values.values():
            at_least_float32 = torch.promote_types(gradients.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(gradients, dim=1, dtype=at_least_float32).isfinite())
        return torch.where(torch.stack(norms).all(dim=0), losses, torch.nan)

    def _loss(self, indices: Indices) -> Tensor:
        """The losses of some examples together, in a batch that nobody else holds."""
        losses = self.loss_fn(self.model, send_to_device(self._batch(indices), self.device))
        if not isinstance(losses, Tensor) or losses.shape != (len(indices),):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss_fn must return one loss per example, shape ({len(indices)},), not {shape}: "
                "compute it with reduction='none'."
            )
        return losses

    def _batch(self, indices: Indices) -> Mapping:
        examples = [self.dataset[index] for index in indices]
        try:
            return self.collate_fn(examples)
        except (RuntimeError, ValueError, TypeError) as error:
            first = examples[0] if isinstance(examples[0], Mapping) else {}
            texts = [name for name, value in first.items() if isinstance(value, str)]
            if not texts:
                raise
            raise InputError(
                f"collate_fn makes no batch of examples with text in {', '.join(map(repr, texts))} "
                f"({first_line(error)}): remove what is not meant for the model, as by dataset.remove_columns({texts})."
            ) from error

    def _recorded(self, indices: Indices) -> tuple[Tensor, dict[str, Tensor], dict[str, str]]:
        """The losses, what the hooks found, and what they could not tell apart."""
        try:
            with self.recorder.batch_of(len(indices)):
                losses = self._loss(indices)
                if losses.requires_grad:
                    weighted = self.recorder.weighted(losses)
                    losses.sum().backward()
                    self.recorder.find_misaligned(losses.detach(), weighted, self._tolerance())
        except (RuntimeError, ValueError, IndexError) as error:
            if not self.recorder.expanded or self.recorder.only_these_expand or should_reduce_batch_size(error):
                raise
            return self._unexpanded(indices)
        finally:
            self._leave_no_trace()
        if self.recorder.copy_what_was_lost():
            return self._recorded(indices)
        return losses.detach(), self.recorder.found, self.recorder.broken

    def _unexpanded(self, indices: Indices) -> tuple[Tensor, dict[str, Tensor], dict[str, str]]:
        """As `_recorded`, of a model that wants what it computes once for all rows as it is: that cannot be told apart
        by rows then."""
        self.recorder.expanded, self.recorder.only_these_expand = set(), True
        return self._recorded(indices)

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
        types = self.types | self.recorder.types
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
