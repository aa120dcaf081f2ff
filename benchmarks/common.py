"""What the benchmarks share: taking turns, ratios of seconds, random models and texts, and the record."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import trange
from transformers import RobertaConfig, RobertaForSequenceClassification

from datainf import progress, scaling
from datainf.models.lora import Recipe, attach_adapter
from datainf.models.losses import classification
from datainf.study.provenance import provenance

VOCABULARY, PAD, BATCH_SIZE = 30522, 1, 32
TOLERANCE = 1e-3  # the largest relative difference, ||a - b|| / ||b||, between two float32 ways to one result

Row = dict[str, object]


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


class Stages:
    """What each stage of one way to a result takes: ``with stages("gradients"): ...``.

    Args:
        count_bytes: count each stage's peak bytes of tensors instead of its seconds, which counting would lengthen.
    """

    def __init__(self, count_bytes: bool = False, device: torch.device | str = "cpu"):
        self.count_bytes, self.device = count_bytes, device
        self.taken: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.count_bytes:
            with scaling.watched_bytes(self.device) as peak:
                yield
            self.taken[name] = max(self.taken.get(name, 0), peak[0])
            return
        before = time.perf_counter()
        yield
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels are still running when the block's last line has been
        self.taken[name] = self.taken.get(name, 0) + time.perf_counter() - before


def take_turns(repeats: int, **functions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of every function, called in turn (A B A B ...), so that a noisy machine is as noisy for each."""
    seconds = {name: [] for name in functions}
    for _ in trange(repeats, unit="round", leave=False):
        for name, function in functions.items():
            with progress.off():
                seconds[name].append(seconds_of(function))
    return seconds


def row(
    variant: str,
    computes: str,
    seconds: Sequence[float],
    baseline: Sequence[float],
    limit: float = float("nan"),
    note: str = "",
) -> Row:
    """One row of the record; its ratio is the median, over rounds, of its seconds over the baseline's."""
    return {
        "variant": variant,
        "computes": computes,
        "repeats": len(seconds),
        "seconds_median": median(seconds),
        "seconds_min": min(seconds),
        "ratio_to_baseline": median(own / other for own, other in zip(seconds, cycle(baseline), strict=False)),
        "limit": limit,
        "note": note,
    }


def relative_difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm()).item()


def check_close(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Refuse to compare the speed of two computations that differ in their result."""
    if not (difference := relative_difference(ours, theirs)) <= TOLERANCE:
        raise SystemExit(f"{what}: the results differ by {difference:.1e}, more than the tolerance of {TOLERANCE:g}.")


def random_roberta() -> nn.Module:
    """A small RoBERTa with random weights and a random LoRA adapter, in eval mode, so that dropout is off."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, pad_token_id=PAD, **sizes)
    recipe = Recipe(rank=4, targets=("value",))
    model = attach_adapter(RobertaForSequenceClassification(config), recipe, "SEQ_CLS")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which leaves lora_A without a gradient
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def random_texts(count: int) -> list[dict]:
    """Random tokens, 10 to 60 of them, with a label."""
    lengths = torch.randint(10, 61, (count,)).tolist()
    return [{"input_ids": torch.randint(5, VOCABULARY, (k,)), "labels": i % 2} for i, k in enumerate(lengths)]


def collate(examples: Sequence[dict]) -> dict[str, Tensor]:
    """Pad to the longest of the batch."""
    tokens = pad_sequence([example["input_ids"] for example in examples], batch_first=True, padding_value=PAD)
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": labels}


def training_passes(model: nn.Module, texts: Sequence[dict], batch_size: int = BATCH_SIZE) -> None:
    """Forward and backward of one epoch without an optimizer, in the batches that `per_sample_gradients` makes."""
    longest_first = sorted(texts, key=lambda text: -len(text["input_ids"]))
    for start in range(0, len(texts), batch_size):
        model.zero_grad(set_to_none=True)
        classification(model, collate(longest_first[start : start + batch_size])).mean().backward()


def matrix_product_rate(
    size: int = 4096, repeats: int = 3, device: torch.device | str = "cpu", dtype=torch.float32
) -> float:
    """Floating-point operations per second of a product of two square matrices, the best of a few."""
    A, B = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        A @ B
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    product()
    return 2 * size**3 / min(seconds_of(product) for _ in range(repeats))


def show(record: pd.DataFrame) -> None:
    """Print every measured thing with its ratio and the limit that it is held against."""
    table = record[["benchmark", "variant", "computes", "seconds_median"]].copy()
    table["ratio"] = record["ratio_to_baseline"].map(_in_words)
    held = zip(record["ratio_to_baseline"], record["limit"], strict=True)
    table["limit"] = [f"{_in_words(b)}: {'met' if a <= b else 'NOT MET'}" if pd.notna(b) else "" for a, b in held]
    table["note"] = record["note"]
    print("\n" + table.to_string(index=False, float_format="{:.4f}".format))


def _in_words(ratio: float) -> str:
    return f"{1 / ratio:.4g}x faster" if ratio <= 0.5 else f"{ratio:.3f}x the time"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}.")
    return int(text)


def write(record: pd.DataFrame, path: Path) -> None:
    """Keep the record as CSV, with the columns that say what made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record.assign(**provenance()).to_csv(path, index=False, float_format="%.6g")
    print(f"\nwritten: {path}")
