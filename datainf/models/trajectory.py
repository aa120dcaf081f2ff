"""A fine-tuning as what it is: a sequence of states, each the optimizer's function of the one before and of a batch.

`record` watches the Trainer and keeps the states; `Trajectory` can take each step again, and be differentiated.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer

from datainf.errors import InputError
from datainf.models import lora, losses
from datainf.models.training import Training

NUMBER = "number"
"""The column by which it is known which examples a batch has."""

State = tuple[Float[Tensor, " D"], Float[Tensor, " D"], Float[Tensor, " D"]]
"""All trainable numbers, and Adam's means of their gradients and of the gradients' squares."""

SMALLEST = 1e-30
"""Added below Adam's root, whose derivative at 0 is infinite: it changes nothing beside epsilon."""


@dataclass(frozen=True, eq=False)
class Step:
    """One of T steps.

    Attributes:
        number: from 1.
        examples: which training examples the batch has, shape (b,).
        batch: what the model is given.
        divisor: what the sum of the examples' losses is divided by.
        state: before the step.
        random: the state of torch's random numbers, on the CPU and on the model's device.
        learning_rate: of this step.
    """

    number: int
    examples: Sequence[int]
    batch: Mapping[str, Any]
    divisor: float
    state: State
    random: tuple[Tensor, Tensor | None]
    learning_rate: float


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A recorded fine-tuning of n examples by AdamW.

    Attributes:
        model: as it was left at the end; while a step is taken again its weights are those of then.
        parameters: those that were trained, biases too.
        loss: ``(model, batch) -> (batch,)``, each example's loss times its weight.
        final: the state at the end.
        optimizer: the settings of AdamW: betas, eps, weight_decay (a number for each parameter), and max_norm, to
            which the gradient is clipped.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[nn.Module, Mapping], Tensor]
    n: int
    steps: Sequence[Step]
    final: State
    optimizer: Mapping[str, Any]

    def put(self, weights: Float[Tensor, " D"]) -> None:
        """Give the model these weights."""
        with torch.no_grad():
            for parameter, values in zip(
                self.parameters.values(),
                weights.split([parameter.numel() for parameter in self.parameters.values()]),
                strict=True,
            ):
                parameter.copy_(values.view_as(parameter))

    def gradient(self, step: Step, weights: Float[Tensor, " b"]) -> Float[Tensor, " D"]:
        """The gradient of a step's loss, its examples weighted, as a function of `parameters` and of `weights`."""
        self.put(step.state[0])
        self.model.train()
        device = next(iter(self.parameters.values())).device
        torch.set_rng_state(step.random[0])
        if step.random[1] is not None:
            torch.cuda.set_rng_state(step.random[1], device)
        batch = send_to_device(dict(step.batch), device) | {losses.WEIGHT: weights}
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # the others have no second derivative
            loss = self.loss(self.model, batch).sum() / step.divisor
            return flat(torch.autograd.grad(loss, list(self.parameters.values()), create_graph=True))

    def after(self, step: Step, state: State, gradient: Float[Tensor, " D"]) -> State:
        """What AdamW makes of a state and a gradient."""
        (beta1, beta2), eps, max_norm = (self.optimizer[name] for name in ("betas", "eps", "max_norm"))
        theta, mean, square = state
        if max_norm:
            gradient = gradient * (max_norm / (gradient.norm() + 1e-6)).clamp(max=1)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient.square()
        root = (square / (1 - beta2**step.number) + SMALLEST).sqrt()
        theta = theta * (1 - step.learning_rate * self.optimizer["weight_decay"])
        return theta - step.learning_rate * mean / (1 - beta1**step.number) / (root + eps), mean, square


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " D"]:
    """All numbers, one after another."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def record(training: Training, *, order: int | None = None) -> Trajectory:
    """Fine-tune as `lora.retrain` does with all examples kept in the same batches, and keep every step.

    It holds 3 D numbers a step, where D are trained: 25 MB for 76 steps of a small BERT's adapter of rank 4.

    Args:
        order: the seed of the batches and of dropout; by default the recipe's.

    Raises:
        InputError: the recipe accumulates gradients or uses bfloat16, so that a step is more than this takes it for.
    """
    if training.recipe.accumulate > 1 or training.recipe.bf16:
        raise InputError("A trajectory is of whole batches in the model's own precision: set accumulate=1, bf16=False.")
    n, watcher = len(training.examples), _Watcher(training.collate)
    examples = lora.with_column(training.examples, NUMBER, list(range(n)))
    numbered = replace(training, examples=examples, collate=watcher.collate)
    model = lora.retrain(numbered, np.ones(n, dtype=bool), same_batches=True, order=order, watch=watcher.watch)
    loss = losses.weighted(training.loss or losses.OF_TRAINING[training.task_type])
    return Trajectory(model, watcher.parameters, loss, n, watcher.steps, watcher.state(), watcher.settings())


class _Watcher:
    """Sees which examples make a batch, and then the state in which the Trainer takes a step with it."""

    def __init__(self, collate: Callable[[list], dict]):
        self.collate_examples, self.numbers, self.steps = collate, deque(), []
        self.trainer: Trainer | None = None

    def collate(self, examples: list) -> dict:
        """The batch, as without numbers; what is made here is trained on in this order. (Queries have no numbers.)"""
        if NUMBER in examples[0]:
            self.numbers.append([int(example[NUMBER]) for example in examples])
        return self.collate_examples(
            [{name: example[name] for name in example if name != NUMBER} for example in examples]
        )

    def watch(self, trainer: Trainer, batch: Mapping[str, Any], items: Any) -> None:
        """Keep a step, before it is taken."""
        self.trainer, examples = trainer, self.numbers.popleft()
        self.steps.append(
            Step(
                number=len(self.steps) + 1,
                examples=examples,
                batch={name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()},
                divisor=float(len(examples) if items is None else items),
                state=self.state(),
                random=self._random(),
                learning_rate=self._groups[0]["lr"],
            )
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: each for name, each in self.trainer.model.named_parameters() if each.requires_grad}

    @property
    def _groups(self) -> list[dict]:
        return self.trainer.optimizer.param_groups

    def state(self) -> State:
        """Copies of the weights and of what Adam knows of them."""
        kept = self.trainer.optimizer.optimizer.state
        weights = self.parameters.values()
        means, squares = (
            flat([kept[each][name] if each in kept else torch.zeros_like(each) for each in weights])
            for name in ("exp_avg", "exp_avg_sq")
        )
        return flat([each.detach() for each in weights]), means.clone(), squares.clone()

    def _random(self) -> tuple[Tensor, Tensor | None]:
        device = next(iter(self.parameters.values())).device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def settings(self) -> dict[str, Any]:
        """Of AdamW: the same in all groups of parameters but for the decay."""
        decay = {each: group["weight_decay"] for group in self._groups for each in group["params"]}
        first = self._groups[0]
        return {
            "betas": tuple(map(float, first["betas"])),
            "eps": float(first["eps"]),
            "weight_decay": flat([torch.full_like(each, decay[each]) for each in self.parameters.values()]).detach(),
            "max_norm": float(self.trainer.args.max_grad_norm or 0),
        }
