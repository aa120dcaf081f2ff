"""Attach a LoRA adapter to a base, fine-tune it, load it again: what all families of models share."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from filelock import FileLock
from jaxtyping import Bool, Float
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from datainf import demo, progress
from datainf.errors import InputError
from datainf.models import losses
from datainf.models.training import Recipe, Training, Watch, train
from datainf.storage.files import write_whole

ADAPTER, HISTORY, ORIGIN, CHECKPOINTS = "adapter", "history.csv", "origin.json", "checkpoints"

__all__ = [
    "FineTuned",
    "Recipe",
    "attach_adapter",
    "check_shape",
    "fine_tune",
    "from_pretrained",
    "load_adapter",
    "no_history",
    "on_device",
    "quiet",
    "retrain",
    "weights_revision",
]


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model with all that is needed to take its gradients.

    Attributes:
        model: the base with its adapter (and trained head, of a classifier), on the device it was trained on.
        tokenizer: the base's.
        train, query: tokenized datasets; the queries are the validation or test examples.
        collate: makes a padded batch of a list of their rows.
        history: a row per epoch, or five in all where the recipe counts steps: step, epoch, loss (mean training loss),
            query_loss, and accuracy of a classifier.
        revision: which base: the hub's commit, or a hash of the weights in its folder.
        training: what it was made by, for `retrain`; None of an adapter that came from elsewhere.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    query: Dataset
    collate: Callable[[list], dict]
    history: pd.DataFrame
    revision: str
    training: Training | None

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
    source = os.path.expanduser(demo.BASES.get(base, base))
    if source.startswith((".", os.sep, "~")) and not Path(source).is_dir():
        raise InputError(f"There is no folder {base}: give a model's folder, a hub id or {', '.join(demo.BASES)}.")
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"The model {base!r} can be loaded neither from a folder nor from the hub: {reason}"
        ) from error


def attach_adapter(model: nn.Module, recipe: Recipe, task_type: str | None) -> PeftModel:
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
            "the names of its modules, such as value (BERT, RoBERTa), q_proj and v_proj (Llama) or to_q, to_k and to_v "
            "(the UNet of Stable Diffusion)."
        ) from error


def load_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """The base `model` with the adapter that was saved in `folder`, trainable.

    Raises:
        InputError: there is no adapter, or it was made for another base.
    """
    folder = os.path.expanduser(folder)
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


def check_shape(model: PeftModel, recipe: Recipe, adapter: str) -> None:
    """Refuse an adapter of another shape than the recipe says, which is what the record of a run will say.

    Raises:
        InputError: its rank, alpha or targets are others.
    """
    config = model.active_peft_config
    found = {"rank": config.r, "alpha": config.lora_alpha, "targets": sorted(config.target_modules)}
    said = {"rank": recipe.rank, "alpha": recipe.alpha or recipe.rank, "targets": sorted(recipe.targets)}
    for name, value in found.items():
        if value != said[name]:
            raise InputError(f"The adapter in {adapter} has {name} {value}, not {said[name]}: set {name} to {value}.")


def _misfit(folder: str, model: nn.Module, why: str) -> str:
    base = getattr(model, "name_or_path", "") or type(model).__name__
    return f"The adapter in {folder} does not fit the base {base}: {why}."


def fine_tune(
    training: Training, *, data_revision: str, revision: str = "", folder: str | Path
) -> tuple[PeftModel, pd.DataFrame, str]:
    """Fine-tune a base, or load what an earlier call with this `folder` has finished.

    A call that was killed goes on from its last checkpoint and ends with the same weights.

    Args:
        data_revision: which data; a folder made from other data is refused.
        revision: which base, where that is more than the model that ``training.load`` gives.
        folder: keeps the adapter, the curve and the checkpoints.

    Returns:
        The model with its adapter, the curve by epoch, and the base's revision: see `FineTuned`.

    Raises:
        InputError: the base has no such modules, or `folder` was made from another base, other data or by another
            recipe.
    """
    folder = Path(folder).expanduser()
    model = training.load()
    revision = revision or weights_revision(model)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # another run may be after the same model
        _check_origin(folder / ORIGIN, {"base": revision, "data": data_revision, "recipe": asdict(training.recipe)})
        if not (folder / HISTORY).is_file():
            adapted = attach_adapter(model, training.recipe, training.task_type)
            history = train(adapted, training, folder / CHECKPOINTS)
            adapted.save_pretrained(folder / ADAPTER)
            # Written last: its presence says that the adapter beside it is finished.
            write_whole(folder / HISTORY, history.to_csv(index=False))
            shutil.rmtree(folder / CHECKPOINTS)
            del adapted, model
            clear_device_cache(garbage_collection=True)  # a large base does not fit twice
            model = training.load()
        adapted = load_adapter(model, folder / ADAPTER)
        history = pd.read_csv(folder / HISTORY)
    return on_device(adapted), history, revision


def retrain(
    training: Training,
    kept: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"],
    *,
    same_batches: bool = False,
    order: int | None = None,
    watch: Watch | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PeftModel:
    """Fine-tune anew as `fine_tune` did, but without some of the training examples; nothing is written.

    With all kept, in the same order, the weights are those of `fine_tune`, to the bit. The base and the adapter's first
    weights are always the same.

    Args:
        kept: which examples are trained on; in the same batches also the weight of each, which is 1 as a rule.
        same_batches: leave the others where they are in the batches, with weight 0, so that nothing else changes. By
            default the batches are of the kept examples alone, drawn anew.
        order: the seed of the order of examples and of dropout; by default the recipe's.
        watch, callbacks: see `training.train`.

    Raises:
        InputError: no example is kept.
    """
    if not kept.any():
        raise InputError("No example is kept to train on.")
    examples, loss = training.examples, training.loss
    if same_batches:
        examples = with_column(examples, losses.WEIGHT, kept.astype("float32").tolist())
        loss = losses.weighted(loss or losses.OF_TRAINING[training.task_type])
    elif not kept.all():
        examples = _some(examples, np.flatnonzero(kept))
    recipe = training.recipe if order is None else replace(training.recipe, seed=order)
    # The loss of one query is followed, since an evaluation draws a random number, after which dropout goes on.
    again = replace(
        training, examples=examples, query=_some(training.query, [0]), loss=loss, recipe=recipe, compute_metrics=None
    )
    adapted = attach_adapter(training.load(), training.recipe, training.task_type)
    with progress.off():
        train(adapted, again, None, watch, callbacks)
    return on_device(adapted.eval())


def _some(examples: Sequence, places: Sequence[int]) -> Sequence:
    return examples.select(places) if isinstance(examples, Dataset) else [examples[place] for place in places]


def with_column(examples: Sequence, name: str, values: list) -> Sequence:
    """The examples, each with one thing more."""
    if isinstance(examples, Dataset):
        return examples.add_column(name, values)
    return [example | {name: value} for example, value in zip(examples, values, strict=True)]


def on_device(model: PeftModel) -> PeftModel:
    """The model on the GPU where there is one; a quantized base is there already."""
    quantized = getattr(model.get_base_model(), "is_quantized", False)
    return model.cuda() if torch.cuda.is_available() and not quantized else model


def weights_revision(model: nn.Module) -> str:
    """The hub's commit of a pretrained model, or a hash of its base weights where it came from a folder."""
    if revision := getattr(getattr(model, "config", None), "_commit_hash", None):
        return revision[:12]
    digest = hashlib.sha256()
    base = getattr(model, "base_model", model)  # of a transformer without its head
    for name, parameter in base.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()[:12]}"


def no_history() -> pd.DataFrame:
    """The curve of an adapter that came from elsewhere: no rows."""
    return pd.DataFrame(columns=["step", "epoch", "loss", "query_loss"], dtype=float)


def _check_origin(path: Path, origin: Mapping[str, object]) -> None:
    """Refuse a folder in which something else was fine-tuned: another base, other data, by another recipe."""
    written = json.dumps(origin)
    if not path.is_file():
        write_whole(path, written)
        return
    wanted, found = json.loads(written), json.loads(path.read_text(encoding="utf8"))
    # A part of a recipe that an earlier version of this package did not know was as it is by default.
    found["recipe"] = json.loads(json.dumps(asdict(Recipe()))) | found.get("recipe", {})
    if found != wanted:
        differs = " and ".join(name for name in wanted if found.get(name) != wanted[name])
        raise InputError(
            f"{path.parent} holds a model fine-tuned from another {differs}: delete that folder, or give another."
        )
