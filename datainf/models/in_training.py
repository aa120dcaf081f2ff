"""Gradients recorded while a model is fine-tuned, so that no pass over the data comes after it.

What the hooks of `gradients.recording` see of a training step is what they see of a pass that is made for them: the
gradients of every example of the batch. They are those of the weights at that step, with dropout on; of one epoch no
two batches' are of the same weights. What that does to scores is to be asked of retraining.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from datainf.errors import InputError
from datainf.gradients.layers import Layers, check_adapters, trainable_layers
from datainf.gradients.recording import Recorder
from datainf.models.losses import IGNORED
from datainf.storage.store import GradientStore, matrix_shape

INDEX = "index"
"""The column of an example's number, which the batches of a training bring along."""


class RecordGradients(TrainerCallback):
    """Records every training example's gradients in one epoch of transformers' Trainer, or of one that is made of it.

    The training examples have a column `INDEX` with their numbers from 0 on, which the collator keeps and
    ``remove_unused_columns=False`` lets through; the model does not see it. The loss is the model's own: of a
    classifier the mean over the batch, of a language model over the batch's tokens. What is recorded is of each
    example's own, as `losses.classification` and `losses.completion` have it.

    Args:
        n: how many training examples there are.
        epoch: which epoch, counted from 1; 0 is the last.
        layers, dtype: as of `per_sample_gradients`.

    Raises:
        InputError: during training: there is no such epoch, the model checkpoints its activations, its loss is not its
            own, or a layer's gradients cannot be told apart in a batch.
    """

    def __init__(self, n: int, *, epoch: int = 0, layers: Layers = None, dtype: torch.dtype = torch.float32):
        self.n, self.epoch, self.layers, self.dtype = n, epoch, layers, dtype
        self._seen = torch.zeros(n, dtype=torch.bool)
        self._hooks, self._batch = ExitStack(), ExitStack()
        self._now, self._indices, self._mean = False, None, None

    @property
    def store(self) -> GradientStore:
        """The gradients, in the order of the examples' numbers.

        Raises:
            InputError: of some examples there are none, since the epoch left them out.
        """
        if missing := (~self._seen).sum().item():
            raise InputError(f"The epoch left out {missing} of {self.n} examples, of which no gradient was recorded.")
        return GradientStore(self._gradients, shapes=self._shapes)

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        if self.epoch > state.num_train_epochs:
            raise InputError(f"There is no epoch {self.epoch} to record: the training has {state.num_train_epochs}.")
        if getattr(model, "is_gradient_checkpointing", False):
            raise InputError("Gradients cannot be recorded where activations are checkpointed: switch that off.")
        weights = trainable_layers(model, self.layers)
        check_adapters(model, weights)
        self._shapes = {name: matrix_shape(weight.shape) for name, weight in weights.items()}
        self._gradients = {name: torch.zeros(self.n, w.numel(), dtype=self.dtype) for name, w in weights.items()}
        self._recorder = self._hooks.enter_context(Recorder(model, weights, rows_per_example=1, parts=1))
        for handle in (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._watch_loss, with_kwargs=True),
        ):
            self._hooks.callback(handle.remove)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._now = round(state.epoch or 0) + 1 == (self.epoch or state.num_train_epochs)

    def on_substep_end(self, args, state, control, **kwargs):
        self._finish()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._finish()

    def on_train_end(self, args, state, control, **kwargs):
        self._hooks.close()

    @contextmanager
    def _or_off(self) -> Iterator[None]:
        """Take the hooks off the model where the training ends with an error, since the Trainer tells nobody."""
        try:
            yield
        except InputError:
            self._hooks.close()
            raise

    def _begin(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Tensor]) -> tuple[tuple, dict]:
        """Take the examples' numbers out of the batch, and record what the model does with the rest."""
        rest = {name: value for name, value in kwargs.items() if name != INDEX}
        if self._now and INDEX in kwargs and torch.is_grad_enabled():
            self._indices = kwargs[INDEX].cpu()
            self._batch.enter_context(self._recorder.batch_of(len(self._indices)))
        return args, rest

    def _watch_loss(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Tensor], output: Mapping) -> None:
        """Learn what the batch's loss is made of, and how the Trainer scales it, which its gradient says."""
        if self._indices is None:
            return
        labels, items = kwargs["labels"], kwargs.get("num_items_in_batch")
        with self._or_off():
            self._mean = self._mean or _Mean.of(output, labels, items)
        self._own_over_batch = self._mean.own_over_batch(labels, items)
        output["loss"].register_hook(lambda gradient: setattr(self, "_scale", gradient.detach()))

    def _finish(self) -> None:
        """After the backward pass: each example's gradients into its rows."""
        if self._indices is None:
            return
        indices, self._indices = self._indices, None
        self._batch.close()
        broken = dict(self._recorder.broken)
        if self._recorder.copy_what_was_lost():
            broken |= {"": "what a module gives is written over"}
        with self._or_off():
            for name, why in broken.items():
                raise InputError(f"Gradients of layer {name!r} cannot be recorded in training ({why}): leave it out.")
        factor = (self._own_over_batch / self._scale).unsqueeze(1)
        for name, values in self._recorder.found.items():
            self._gradients[name][indices] = (values * factor.to(values)).to("cpu", self.dtype)
        self._seen[indices] = True


@dataclass(frozen=True)
class _Mean:
    """Of what a batch's loss is the mean: of its labels, or of its tokens, each predicted `ahead` of its place; over
    those of this batch, or of all `items` that the Trainer counts."""

    ahead: int
    items: bool

    def counted(self, labels: Tensor) -> Tensor:
        """How many of each example."""
        return (labels[:, self.ahead :] if self.ahead else labels.view(len(labels), -1)).ne(IGNORED).sum(dim=1)

    def own_over_batch(self, labels: Tensor, items: Tensor | None) -> Float[Tensor, " batch"]:
        """What an example's part of the batch's loss is to be multiplied by to be the mean loss of its own."""
        counted = self.counted(labels)
        return (items if self.items else counted.sum()) / counted.clamp(min=1)

    @classmethod
    def of(cls, output: Mapping[str, Tensor], labels: Tensor, items: Tensor | None) -> "_Mean":
        """The one that makes up the loss that the model gives.

        Raises:
            InputError: there is none.
        """
        kinds = [
            cls(ahead, by) for ahead in ((0,) if labels.dim() < 2 else (1, 0)) for by in (False, items is not None)
        ]
        with torch.no_grad():
            given = output["loss"].float()
            for kind in kinds if not labels.is_floating_point() else []:
                logits = output["logits"].float()
                pair = (logits[:, :-1], labels[:, 1:]) if kind.ahead else (logits, labels)
                losses = nn.functional.cross_entropy(pair[0].flatten(0, -2), pair[1].flatten(), reduction="sum")
                of_all = items if kind.items else kind.counted(labels).sum()
                if torch.isclose(losses / of_all, given, rtol=1e-2, atol=1e-4):
                    return kind
        raise InputError(
            "Gradients are recorded of a loss that is the mean over the batch's labels or tokens, as the model gives "
            "it, and this training's is another: take them afterwards, by per_sample_gradients."
        )
