"""Train what is trainable of a model by transformers' Trainer, in a way that any kill leaves resumable."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from datainf import progress
from datainf.errors import InputError
from datainf.gradients.per_sample import LossFn

Watch = Callable[[Trainer, dict, Any], None]

REPORTS = 5
"""How often a training that counts steps is evaluated and saved."""


@dataclass(frozen=True)
class Recipe:
    """An adapter's shape and how it is trained; the defaults are the paper's for RoBERTa (D.1).

    Attributes:
        alpha: LoRA's scaling numerator; 0 means `rank`, so that the adapter is not scaled.
        targets: names of the modules that get an adapter.
        accumulate: how many parts each batch is taken in, one after another, with the gradients added up: the same
            fine-tuning in less memory.
        steps: optimisation steps; 0 means as many as `epochs` take.
        adam_epsilon: Adam divides by a gradient's typical size plus this. Where it is larger, numbers whose gradient is
            near zero move less by chance, so that the result depends on an example's weight more smoothly.
        bf16: fine-tune in bfloat16 mixed precision where the machine has instructions for it (`in_bfloat16`); gradients
            are taken in float32 all the same.

    Raises:
        InputError: a value that no fine-tuning can work with.
    """

    rank: int = 4
    alpha: int = 0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("value",)
    learning_rate: float = 3e-4
    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1
    steps: int = 0
    adam_epsilon: float = 1e-8
    seed: int = 0
    bf16: bool = False

    def __post_init__(self):
        at_least = {"rank": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "alpha": 0, "steps": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate must divide batch_size, {self.batch_size}, which {self.accumulate} does not.")
        for name in ("learning_rate", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, not {getattr(self, name)!r}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be a share from 0 up to 1, not {self.dropout!r}.")

    def number_of_steps(self, n: int) -> int:
        """Optimisation steps on n examples."""
        return self.steps or self.epochs * math.ceil(n / self.batch_size)

    def total_learning_rate(self, n: int) -> float:
        """The sum of the learning rates of all steps, which fall from `learning_rate` linearly to 0."""
        return self.learning_rate * (self.number_of_steps(n) + 1) / 2

    @property
    def in_bfloat16(self) -> bool:
        """`bf16`, but for a CPU that would emulate it, and take many times as long as in float32."""
        return self.bf16 and (torch.accelerator.is_available() or _cpu_has_bfloat16())

    @property
    def part_size(self) -> int:
        """Examples in memory at a time."""
        return self.batch_size // self.accumulate


@dataclass(frozen=True)
class Training:
    """All that a fine-tuning is made of, so that it can be done again.

    Attributes:
        load: gives the base afresh, with the same weights each time.
        examples: what is trained on.
        query: the examples whose loss is followed.
        collate: makes a padded batch of a list of either.
        recipe: the adapter's shape and how it is trained.
        task_type: PEFT's: "SEQ_CLS", "CAUSAL_LM", or None.
        loss: one loss per example; by default the model's own.
        compute_metrics: of the queries, for the Trainer.
    """

    load: Callable[[], nn.Module]
    examples: Sequence
    query: Sequence
    collate: Callable[[list], dict]
    recipe: Recipe
    task_type: str | None
    loss: LossFn | None = None
    compute_metrics: Callable[[Any], dict[str, float]] | None = None


def train(
    model: PeftModel,
    training: Training,
    checkpoints: Path | None,
    watch: Watch | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> pd.DataFrame:
    """Train `model`, the base with its adapter, in place.

    Args:
        checkpoints: a folder to go on from the last checkpoint that is there, and to keep others in; None keeps none.
        watch: is shown the Trainer and each batch before it is trained on.
        callbacks: of the Trainer, beside its own.

    Returns:
        The curve, one row per epoch, or `REPORTS` in all where the recipe counts steps: see `lora.FineTuned`.
    """
    if training.recipe.bf16 and not training.recipe.in_bfloat16:
        warnings.warn("This processor has no instructions for bfloat16: fine-tuning in float32.", stacklevel=2)
    with TemporaryDirectory() as nowhere:
        trainer = _Trainer(
            model=model,
            args=_arguments(training, checkpoints or Path(nowhere), saves=checkpoints is not None),
            train_dataset=training.examples,
            eval_dataset=training.query,
            data_collator=training.collate,
            compute_metrics=training.compute_metrics,
            callbacks=list(callbacks),
        )
        trainer.loss, trainer.watch = training.loss, watch
        # Only a language model divides its loss by all the tokens of a batch in parts. Other losses are means, and
        # without this the Trainer would add them up.
        trainer.model_accepts_loss_kwargs = training.task_type == "CAUSAL_LM"
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress)
        trainer.train(resume_from_checkpoint=_last_whole(checkpoints) if checkpoints is not None else None)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its mixed precision stays around it otherwise
    log = pd.DataFrame(trainer.state.log_history)
    curves = {"loss": "loss", "eval_loss": "query_loss", "eval_accuracy": "accuracy"}
    found = {
        name: log.dropna(subset=logged).set_index(["step", "epoch"])[logged]
        for logged, name in curves.items()
        if logged in log
    }
    return pd.DataFrame(found).reset_index()


def _arguments(training: Training, folder: Path, *, saves: bool) -> TrainingArguments:
    recipe, tokenized = training.recipe, "input_ids" in training.examples[0]
    often = {"strategy": "steps", "steps": max(1, recipe.steps // REPORTS)} if recipe.steps else {"strategy": "epoch"}
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=recipe.learning_rate,
        adam_epsilon=recipe.adam_epsilon,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.steps or -1,
        per_device_train_batch_size=recipe.part_size,
        per_device_eval_batch_size=recipe.part_size,
        gradient_accumulation_steps=recipe.accumulate,
        **{f"{what}_{name}": value for what in ("eval", "save", "logging") for name, value in often.items()}
        | ({} if saves else {"save_strategy": "no"}),
        save_total_limit=1,
        # Like lengths share a batch: far less padding.
        train_sampling_strategy="group_by_length" if tokenized else "random",
        remove_unused_columns=False,  # there are none but those of the model, of a loss of one's own, or of a callback
        label_names=None if tokenized else ["target"],
        seed=recipe.seed,
        bf16=recipe.in_bfloat16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


class _Trainer(Trainer):
    """The Trainer, with a loss of one's own."""

    loss: LossFn | None = None
    watch: Watch | None = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.watch is not None:
            self.watch(self, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = self.loss(model, inputs)
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss


class _Progress(TrainerCallback):
    """One bar over all steps; it begins where a checkpoint left off."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress.bar(total=state.max_steps, initial=state.global_step, desc="fine-tuning")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _cpu_has_bfloat16() -> bool:
    """By oneDNN, whose products torch takes where it can; its own are plain loops."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _last_whole(checkpoints: Path) -> str | None:
    """The last checkpoint that was written to its end: trainer_state.json is the last of its files."""
    whole = [state.parent for state in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None
