"""The paper's largest sizes on this machine, with random gradients: see ``benchmarks/README.md``.

python -m benchmarks.scale --folder path/with/14/GB/free           # some ten minutes on 2 cores
python -m benchmarks.scale --tiny                                  # seconds: does it run?
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import RobertaConfig, RobertaForSequenceClassification

import datainf
from benchmarks.common import PAD, collate, matrix_product_rate, random_roberta, relative_difference, seconds_of, write
from datainf import progress
from datainf.models.lora import Recipe, attach_adapter
from datainf.models.losses import classification
from datainf.storage.shards import Shards
from datainf.storage.store import GradientStore

# n, m, L, d_l
LLAMA = (900, 100, 160, 40_960)  # Llama-2-13B, r = 8 on q_proj and v_proj
ROBERTA = (4500, 100, 48, 8192)  # RoBERTa-large, r = 8 on value; without the head
RATE_LIMIT, MEMORY, RESIDENT_LIMIT = 0.6, "1.5GB", 2e9
TINY = {"llama": (60, 8, 3, 512), "roberta": (90, 4, 2, 256)}


class Stretches(Mapping[str, Tensor]):
    """L layers of random gradients (n, d), each another stretch of one random tensor: as many numbers to read as L
    tensors have, in the memory of a few."""

    def __init__(self, n: int, L: int, d: int, seed: int):
        self.shape, self.L = (n, d), L
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(3 * n * d, generator=generator)
        self.starts = torch.randint(0, 2 * n * d, (L,), generator=generator).tolist()

    def __getitem__(self, name: str) -> Tensor:
        start, (n, d) = self.starts[int(name)], self.shape
        return self.pool[start : start + n * d].view(n, d)

    def __iter__(self) -> Iterator[str]:
        return (str(layer) for layer in range(self.L))

    def __len__(self) -> int:
        return self.L


def datainf_operations(n: int, m: int, L: int, d: int) -> int:
    """Of DataInf's three matrix products in every layer."""
    return 3 * 2 * n * m * L * d


def datainf_in_memory(sizes: tuple[int, ...], repeats: int = 3) -> dict:
    """DataInf at the size of Llama-2-13B."""
    n, m, L, d = sizes
    train, query = Stretches(n, L, d, seed=0), Stretches(m, L, d, seed=1)
    return {
        "benchmark": "datainf in memory",
        "computes": _of(sizes),
        "seconds": min(seconds_of(lambda: datainf.influence(train, query)) for _ in range(repeats)),
        "operations": datainf_operations(*sizes),
        "limit": RATE_LIMIT,
        "note": f"float32; the best of {repeats} runs",
    }


def make_store(folder: Path, n: int, L: int, d: int, seed: int) -> GradientStore:
    """Random gradients in bfloat16 on the disk."""
    generator = torch.Generator().manual_seed(seed)
    shards = Shards.create(folder, n, {str(layer): d for layer in range(L)}, torch.bfloat16)
    for index in tqdm(shards.missing(), desc=f"writing {folder.name}", leave=False):
        start, stop = shards.bounds(index)
        shards.write(index, {name: torch.randn(stop - start, d, generator=generator) for name in shards.widths})
    return GradientStore.load(folder)


def peak_resident() -> int:
    """The most bytes that this process has had resident; on Linux its own, as a rusage counts the parent's, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def score_stores(folder: Path) -> None:
    """In a process of its own: score the stores in `folder`, print seconds and resident bytes beyond the imports'."""
    before = psutil.Process().memory_info().rss
    train, query = (GradientStore.load(folder / side) for side in ("train", "query"))
    found = []
    seconds = seconds_of(lambda: found.append(datainf.influence(train, query, memory=MEMORY)))
    torch.save(found[0], folder / "scores.pt")
    print(json.dumps({"seconds": seconds, "resident_bytes": peak_resident() - before}))


def datainf_from_disk(sizes: tuple[int, ...], folder: Path) -> dict:
    """DataInf on a store of 12 GB within 2 GB of memory, in a process of its own; and against the same in memory."""
    n, m, L, d = sizes
    train, query = make_store(folder / "train", n, L, d, seed=0), make_store(folder / "query", m, L, d, seed=1)
    child = [sys.executable, "-m", "benchmarks.scale", "--score", str(folder)]
    report = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(report.splitlines()[-1])
    # In memory for as many layers as there is room for; that all layers are added up alike is seen from the sum.
    in_memory = sum(datainf.influence({name: train[name]}, {name: query[name]}) for name in tqdm(train, leave=False))
    difference = relative_difference(torch.load(folder / "scores.pt"), in_memory)
    return {
        "benchmark": "datainf from disk",
        "computes": f"{_of(sizes)}, a store of {train.nbytes / 1e9:.1f} GB in bfloat16, memory={MEMORY}",
        "seconds": measured["seconds"],
        "operations": datainf_operations(*sizes),
        "resident_bytes": measured["resident_bytes"],
        "limit": RESIDENT_LIMIT,
        "note": "one run, just after the store was written, so partly from the system's cache; "
        f"relative difference from the same in memory, one layer at a time: {difference:.1e}",
    }


def exact_in_minutes(sizes: tuple[int, ...]) -> dict:
    """Exact at the rank that the paper gave up on, all its layers."""
    n, m, L, d = sizes
    train, query = Stretches(n, L, d, seed=0), Stretches(m, L, d, seed=1)
    seconds = seconds_of(lambda: datainf.influence(train, query, "exact"))
    return {
        "benchmark": "exact",
        "computes": _of(sizes),
        "seconds": seconds,
        "note": "float64 inside; gradients apart. The paper, on another machine: given up at rank 8 after 12 hours",
    }


def large_roberta() -> nn.Module:
    """RoBERTa-large's shape with random weights and LoRA of rank 8."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, pad_token_id=PAD, **sizes)
    return attach_adapter(RobertaForSequenceClassification(config), Recipe(rank=8, targets=("value",)), "SEQ_CLS")


def gradients_for_exact(n: int, examples: int, tiny: bool) -> dict:
    """The per-sample gradients that `exact_in_minutes` would read: of a few texts of 128 tokens, scaled up to n."""
    model, tokens = (random_roberta(), 64) if tiny else (large_roberta(), 128)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30_000, (examples, tokens), generator=generator)
    texts = [{"input_ids": row, "labels": 0} for row in ids]
    options = {"collate_fn": collate, "layers": "lora_"}
    datainf.per_sample_gradients(model, texts[:1], classification, **options)
    seconds = seconds_of(lambda: datainf.per_sample_gradients(model, texts, classification, **options))
    return {
        "benchmark": "gradients for exact",
        "computes": f"n = {n}, RoBERTa-large's shape, r = 8, 128 tokens",
        "seconds": seconds * n / examples,
        "note": f"{seconds:.3g} s of {examples} texts, scaled up",
    }


def _of(sizes: tuple[int, ...]) -> str:
    n, m, L, d = sizes
    return f"n = {n}, m = {m}, layers: {L}, d_l = {d}"


def main() -> None:
    """Run all parts, print and keep the record."""
    parser = argparse.ArgumentParser(description="The paper's largest sizes on this machine.")
    parser.add_argument("--folder", type=Path, help="where 14 GB are free (default: where temporary files go)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/scale.csv"), help="the record")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with progress.off():
        if options.score:
            score_stores(options.score)
            return
        llama, roberta = (TINY["llama"], TINY["roberta"]) if options.tiny else (LLAMA, ROBERTA)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            parts = {
                "DataInf in memory": lambda: datainf_in_memory(llama),
                "DataInf from disk": lambda: datainf_from_disk(llama, Path(folder)),
                "Exact": lambda: exact_in_minutes(roberta),
                "gradients": lambda: gradients_for_exact(roberta[0], 2 if options.tiny else 16, options.tiny),
            }
            size = 256 if options.tiny else 4096
            rows, rates = [], [matrix_product_rate(size)]
            for name, part in parts.items():
                print(f"{name}: {time.strftime('%H:%M:%S')} ...", flush=True)
                rows.append(part())
                rates.append(matrix_product_rate(size))
    record = pd.DataFrame(rows)
    record["share_of_rate"] = record["operations"] / record["seconds"] / max(rates)
    record["gflops_of_product"] = max(rates) / 1e9
    print(record.to_string(index=False, float_format="{:.4g}".format))
    write(record, options.output)


if __name__ == "__main__":
    main()
