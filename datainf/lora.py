"""Load a base, attach a LoRA adapter, fine-tune it; hyperparameters default to the paper's (D.1)."""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from datainf import demo, progress
from datainf.data.glue import NoisyTask
from datainf.errors import InputError
from datainf.files import write_whole
from datainf.provenance import weights_revision

MAX_LENGTH = 128
ADAPTER, HISTORY, ORIGIN, CHECKPOINTS = "adapter", "history.csv", "origin.json", "checkpoints"


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned classifier with all that is needed to take its gradients.

    Attributes:
        model: the base with its adapter and trained head, on the device it was trained on.
        train, validation: tokenized datasets (input_ids, attention_mask, labels).
        collate: makes a padded batch of a list of their rows.
        history: one row per epoch: epoch, loss (mean training loss), accuracy (on the validation set).
        revision: which base: the hub's commit, or a hash of the weights in its folder.
    """

    model: PeftModel
    train: Dataset
    validation: Dataset
    collate: Callable[[list], dict]
    history: pd.DataFrame
    revision: str

    @property
    def accuracy(self) -> float:
        """Validation accuracy after the last epoch."""
        return float(self.history["accuracy"].iloc[-1])


def fine_tune_classifier(
    base: str,
    task: NoisyTask,
    *,
    rank: int = 4,
    alpha: int | None = None,
    dropout: float = 0.05,
    targets: Sequence[str] = ("value",),
    learning_rate: float = 3e-4,
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
    bf16: bool = False,
    folder: str | Path,
) -> FineTuned:
    """Fine-tune `base` on `task` with LoRA, or load what an earlier call with this `folder` has finished.

    A call that was killed goes on from its last whole epoch and ends with the same weights.

    Args:
        base: a hub id, a folder in the hub's format, or a built-in base (a key of `demo.BASES`).
        alpha: LoRA's scaling numerator; `rank` by default, as in the paper.
        targets: names of the modules that get an adapter: the value matrix of every attention layer.
        bf16: fine-tune in bfloat16 mixed precision; gradients are taken in float32 all the same.
        folder: keeps the adapter, the curve and the checkpoints.

    Raises:
        InputError: a hyperparameter out of range, a base that cannot be loaded or has no such modules.
    """
    check_hyperparameters(rank=rank, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    folder = Path(folder)
    model, tokenizer = load_classifier(base, seed=seed)
    train, validation = (tokenize(split, tokenizer, task.columns) for split in (task.train, task.validation))
    collate = DataCollatorWithPadding(tokenizer)
    revision = weights_revision(model)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # another run may be after the same model
        _check_origin(folder / ORIGIN, {"base": revision, "data": task.revision})
        if not (folder / HISTORY).is_file():
            adapted = attach_adapter(model, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
            arguments = TrainingArguments(
                output_dir=str(folder / CHECKPOINTS),
                learning_rate=learning_rate,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
                eval_strategy="epoch",
                save_strategy="epoch",
                logging_strategy="epoch",
                save_total_limit=1,
                train_sampling_strategy="group_by_length",  # like lengths share a batch: far less padding
                seed=seed,
                bf16=bf16,
                use_cpu=not torch.accelerator.is_available(),
                dataloader_pin_memory=torch.accelerator.is_available(),
                report_to="none",
                disable_tqdm=True,
            )
            history = _train(adapted, arguments, train, validation, collate)
            adapted.save_pretrained(folder / ADAPTER)
            # Written last: its presence says that the adapter beside it is finished.
            write_whole(folder / HISTORY, history.to_csv(index=False))
            shutil.rmtree(folder / CHECKPOINTS)
            # Not the model that was trained: the Trainer leaves its mixed precision wrapped around that one's forward.
            model, _ = load_classifier(base, seed=seed)
        model = PeftModel.from_pretrained(model, folder / ADAPTER, is_trainable=True)
        history = pd.read_csv(folder / HISTORY)
    if torch.cuda.is_available():
        model = model.cuda()
    return FineTuned(model, train, validation, collate, history, revision)


def quiet() -> None:
    """Silence the libraries' own reports of progress, which fill a notebook; the study shows its own."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def check_hyperparameters(*, rank: int, epochs: int, batch_size: int, learning_rate: float) -> None:
    """Refuse values that no fine-tuning can work with, before anything is loaded."""
    for name, value in (("rank", rank), ("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if not learning_rate > 0:
        raise InputError(f"learning_rate must be positive, not {learning_rate!r}.")


def load_classifier(
    base: str, num_labels: int = 2, *, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained encoder with a fresh classification head, drawn by `seed`, in float32, and its tokenizer."""
    set_seed(seed)
    source = str(demo.BASES.get(base, base))
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise InputError(f"There is no folder {base}: give a model's folder, a hub id or {', '.join(demo.BASES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=num_labels, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"The model {base!r} can be loaded neither from a folder nor from the hub: {reason}"
        ) from error
    return model, tokenizer


def attach_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.05,
    targets: Sequence[str] = ("value",),
) -> PeftModel:
    """Freeze `model`, put a LoRA adapter on every module that `targets` names, and leave the head trainable."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=alpha or rank,
        lora_dropout=dropout,
        target_modules=list(targets),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"{type(model).__name__} cannot carry a LoRA adapter on {', '.join(targets)}: choose targets among the "
            "names of its modules, such as value (BERT, RoBERTa) or v_proj (Llama)."
        ) from error


def tokenize(split: Dataset, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str]) -> Dataset:
    """Columns input_ids, attention_mask (and token_type_ids where the model has them) and labels."""

    def encode(rows: dict) -> dict:
        tokens = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=MAX_LENGTH)
        return {**tokens, "labels": rows["label"]}

    return split.map(encode, batched=True, remove_columns=split.column_names, load_from_cache_file=False)


def _check_origin(path: Path, origin: dict[str, str]) -> None:
    """Refuse a folder in which another base or other data was fine-tuned under the same names."""
    if not path.is_file():
        write_whole(path, json.dumps(origin))
    elif (found := json.loads(path.read_text(encoding="utf8"))) != origin:
        differs = " and ".join(name for name in origin if found.get(name) != origin[name])
        raise InputError(
            f"{path.parent} holds a model fine-tuned from another {differs} of this name: delete that folder."
        )


class _Progress(TrainerCallback):
    """One bar over all steps; it begins where a checkpoint left off."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress.bar(total=state.max_steps, initial=state.global_step, desc="fine-tuning")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _train(
    model: PeftModel, arguments: TrainingArguments, train: Dataset, validation: Dataset, collate
) -> pd.DataFrame:
    """Run the Trainer, from its last checkpoint where there is one, and return the curve by epoch."""
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=lambda result: {"accuracy": float(np.mean(result.predictions.argmax(-1) == result.label_ids))},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress)
    trainer.train(resume_from_checkpoint=_last_whole(Path(arguments.output_dir)))
    log = pd.DataFrame(trainer.state.log_history)
    loss = log.dropna(subset="loss").set_index("epoch")["loss"]
    accuracy = log.dropna(subset="eval_accuracy").set_index("epoch")["eval_accuracy"]
    return pd.DataFrame({"loss": loss, "accuracy": accuracy}).rename_axis("epoch").reset_index()


def _last_whole(checkpoints: Path) -> str | None:
    """The last checkpoint that was written to its end: trainer_state.json is the last of its files."""
    whole = [state.parent for state in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None
