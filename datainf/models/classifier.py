"""Fine-tune an encoder with a classification head on a task of one or two text columns (paper D.1)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from datainf.data.glue import NoisyTask
from datainf.models import lora
from datainf.models.lora import FineTuned, Recipe
from datainf.models.training import Training

MAX_LENGTH = 128


def fine_tune(base: str, task: NoisyTask, recipe: Recipe, *, folder: str | Path) -> FineTuned:
    """Fine-tune `base` on `task` with LoRA, or load what an earlier call with this `folder` has finished.

    Args:
        base: a hub id, a folder in the hub's format, or a built-in base (a key of `demo.BASES`).
        folder: keeps the adapter, the curve and the checkpoints; see `lora.fine_tune`.

    Raises:
        InputError: a base that cannot be loaded or has none of the recipe's modules.
    """
    tokenizer = lora.from_pretrained(AutoTokenizer, base)
    train, validation = (tokenize(split, tokenizer, task.columns) for split in (task.train, task.validation))
    collate = DataCollatorWithPadding(tokenizer)
    training = Training(
        lambda: load(base, seed=recipe.seed),
        train,
        validation,
        collate,
        recipe,
        task_type="SEQ_CLS",
        compute_metrics=_accuracy,
    )
    model, history, revision = lora.fine_tune(training, data_revision=task.revision, folder=folder)
    return FineTuned(model, tokenizer, train, validation, collate, history, revision, training)


def load(base: str, num_labels: int = 2, *, seed: int = 0) -> PreTrainedModel:
    """A pretrained encoder with a fresh classification head, drawn by `seed`, in float32."""
    set_seed(seed)
    return lora.from_pretrained(AutoModelForSequenceClassification, base, num_labels=num_labels, dtype=torch.float32)


def tokenize(split: Dataset, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str]) -> Dataset:
    """Columns input_ids, attention_mask (and token_type_ids where the model has them) and labels."""

    def encode(rows: dict) -> dict:
        tokens = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=MAX_LENGTH)
        return {**tokens, "labels": rows["label"]}

    return split.map(encode, batched=True, remove_columns=split.column_names, load_from_cache_file=False)


def _accuracy(result: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(result.predictions.argmax(-1) == result.label_ids))}
