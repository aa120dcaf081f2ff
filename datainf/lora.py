"""Attach a LoRA adapter to a base, fine-tune it, load it again: what all families of models share."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from peft.utils import get_peft_model_state_dict
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from datainf import demo, progress
from datainf.errors import InputError
from datainf.files import write_whole
from datainf.provenance import weights_revision

ADAPTER, HISTORY, ORIGIN, CHECKPOINTS = "adapter", "history.csv", "origin.json", "checkpoints"


@dataclass(frozen=True)
class Recipe:
    """An adapter's shape and how it is trained; the defaults are the paper's for RoBERTa (D.1).

    Attributes:
        alpha: LoRA's scaling numerator; 0 means `rank`, so that the adapter is not scaled.
        targets: names of the modules that get an adapter.
        bf16: fine-tune in bfloat16 mixed precision; gradients are taken in float32 all the same.

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
    seed: int = 0
    bf16: bool = False

    def __post_init__(self):
        for name, least in (("rank", 1), ("epochs", 1), ("batch_size", 1), ("alpha", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive, not {self.learning_rate!r}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be a share from 0 up to 1, not {self.dropout!r}.")


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model with all that is needed to take its gradients.

    Attributes:
        model: the base with its adapter (and trained head, of a classifier), on the device it was trained on.
        tokenizer: the base's.
        train, query: tokenized datasets; the queries are the validation or test examples.
        collate: makes a padded batch of a list of their rows.
        history: one row per epoch: epoch, loss (mean training loss), query_loss, and accuracy of a classifier.
        revision: which base: the hub's commit, or a hash of the weights in its folder.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    query: Dataset
    collate: Callable[[list], dict]
    history: pd.DataFrame
    revision: str

    @property
    def accuracy(self) -> float:
        """A classifier's accuracy on the queries after the last epoch."""
        return float(self.history["accuracy"].iloc[-1])


def quiet() -> None:
    """Silence the libraries' own reports of progress, which fill a notebook; the study shows its own."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def from_pretrained(loader: Any, base: str, **options) -> Any:
    """``loader.from_pretrained`` of a hub id, a folder in the hub's format, or a built-in base (`demo.BASES`).

    Raises:
        InputError: there is nothing of that kind.
    """
    source = str(demo.BASES.get(base, base))
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise InputError(f"There is no folder {base}: give a model's folder, a hub id or {', '.join(demo.BASES)}.")
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"The model {base!r} can be loaded neither from a folder nor from the hub: {reason}"
        ) from error


def attach_adapter(model: PreTrainedModel, recipe: Recipe, task_type: str) -> PeftModel:
    """Freeze `model` and put a LoRA adapter on every module that the recipe's targets name.

    A classifier's head (`task_type` "SEQ_CLS") is left trainable.

    Raises:
        InputError: the model has no such modules.
    """
    config = LoraConfig(
        task_type=task_type,
        r=recipe.rank,
        lora_alpha=recipe.alpha or recipe.rank,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"{type(model).__name__} cannot carry a LoRA adapter on {', '.join(recipe.targets)}: choose targets among "
            "the names of its modules, such as value (BERT, RoBERTa) or q_proj and v_proj (Llama)."
        ) from error


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The base `model` with the adapter that was saved in `folder`, trainable.

    Raises:
        InputError: there is no adapter, or it was made for another base.
    """
    folder = str(folder)
    try:
        PeftConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"There is no adapter in {folder}: it needs adapter_config.json and its weights.") from error
    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except ValueError as error:
        raise InputError(_misfit(folder, model, "its target modules are not in it")) from error
    except RuntimeError as error:
        raise InputError(_misfit(folder, model, "its matrices have other shapes")) from error
    saved, expected = load_peft_weights(folder, device="cpu").keys(), get_peft_model_state_dict(adapted).keys()
    if saved != expected:  # which PEFT lets pass with a warning, or without
        raise InputError(_misfit(folder, model, f"only one of the two has {min(saved ^ expected)}"))
    return adapted


def _misfit(folder: str, model: PreTrainedModel, why: str) -> str:
    return f"The adapter in {folder} does not fit the base {model.name_or_path or type(model).__name__}: {why}."


def fine_tune(
    load: Callable[[], PreTrainedModel],
    train: Dataset,
    query: Dataset,
    collate: Callable[[list], dict],
    recipe: Recipe,
    *,
    task_type: str,
    data_revision: str,
    folder: str | Path,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
) -> tuple[PeftModel, pd.DataFrame, str]:
    """Fine-tune the base that `load` gives, or load what an earlier call with this `folder` has finished.

    A call that was killed goes on from its last whole epoch and ends with the same weights.

    Args:
        load: gives the base afresh, with the same weights each time.
        data_revision: which data; a folder made from other data is refused.
        folder: keeps the adapter, the curve and the checkpoints.

    Returns:
        The model with its adapter, the curve by epoch, and the base's revision: see `FineTuned`.

    Raises:
        InputError: the base has no such modules, or `folder` was made from another base, other data or by another
            recipe.
    """
    folder = Path(folder)
    model = load()
    revision = weights_revision(model)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # another run may be after the same model
        _check_origin(folder / ORIGIN, {"base": revision, "data": data_revision, "recipe": asdict(recipe)})
        if not (folder / HISTORY).is_file():
            adapted = attach_adapter(model, recipe, task_type)
            arguments = _arguments(recipe, folder / CHECKPOINTS)
            history = _train(adapted, arguments, train, query, collate, compute_metrics)
            adapted.save_pretrained(folder / ADAPTER)
            # Written last: its presence says that the adapter beside it is finished.
            write_whole(folder / HISTORY, history.to_csv(index=False))
            shutil.rmtree(folder / CHECKPOINTS)
            # Not the model that was trained: the Trainer leaves its mixed precision wrapped around that one's forward.
            del adapted, model
            model = load()
        adapted = load_adapter(model, folder / ADAPTER)
        history = pd.read_csv(folder / HISTORY)
    return on_device(adapted), history, revision


def on_device(model: PeftModel) -> PeftModel:
    """The model on the GPU where there is one; a quantized base is there already."""
    quantized = getattr(model.get_base_model(), "is_quantized", False)
    return model.cuda() if torch.cuda.is_available() and not quantized else model


def no_history() -> pd.DataFrame:
    """The curve of an adapter that came from elsewhere: no rows."""
    return pd.DataFrame(columns=["epoch", "loss", "query_loss"], dtype=float)


def _arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        train_sampling_strategy="group_by_length",  # like lengths share a batch: far less padding
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def _check_origin(path: Path, origin: Mapping[str, object]) -> None:
    """Refuse a folder in which something else was fine-tuned: another base, other data, by another recipe."""
    written = json.dumps(origin)
    if not path.is_file():
        write_whole(path, written)
        return
    wanted, found = json.loads(written), json.loads(path.read_text(encoding="utf8"))
    if found != wanted:
        differs = " and ".join(name for name in wanted if found.get(name) != wanted[name])
        raise InputError(
            f"{path.parent} holds a model fine-tuned from another {differs}: delete that folder, or give another."
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
    model: PeftModel, arguments: TrainingArguments, train: Dataset, query: Dataset, collate, compute_metrics
) -> pd.DataFrame:
    """Run the Trainer, from its last checkpoint where there is one, and return the curve by epoch."""
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=query,
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress)
    trainer.train(resume_from_checkpoint=_last_whole(Path(arguments.output_dir)))
    log = pd.DataFrame(trainer.state.log_history)
    curves = {"loss": "loss", "eval_loss": "query_loss", "eval_accuracy": "accuracy"}
    by_epoch = {
        name: log.dropna(subset=logged).set_index("epoch")[logged] for logged, name in curves.items() if logged in log
    }
    return pd.DataFrame(by_epoch).rename_axis("epoch").reset_index()


def _last_whole(checkpoints: Path) -> str | None:
    """The last checkpoint that was written to its end: trainer_state.json is the last of its files."""
    whole = [state.parent for state in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None
