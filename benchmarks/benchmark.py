"""Four ratios of computing time, measured in one run on one machine: see ``benchmarks/README.md``.

python -m benchmarks.benchmark                                    # all four, several minutes
python -m benchmarks.benchmark --only exact --n 250 --d 1024      # one, in small
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.common import (
    BATCH_SIZE,
    Row,
    check_close,
    collate,
    positive,
    random_roberta,
    random_texts,
    relative_difference,
    row,
    seconds_of,
    show,
    take_turns,
    training_passes,
    write,
)
from datainf import per_sample_gradients, reference_gradients
from datainf.attribution.damping import layer_damping
from datainf.attribution.methods import datainf, exact
from datainf.models.in_training import INDEX, RecordGradients
from datainf.models.losses import classification

QUERIES, LAYERS = 100, 4
LOOPED_QUERIES, LOOPED_TEXTS = 10, 64  # the slow loops do this many, and their time is scaled up
HUNDRED_TIMES_FASTER, GRADIENTS_LIMIT = 1 / 100, 1.10  # the largest ratio_to_baseline allowed


# --- 1. The exact method against a general eigendecomposition -------------------------------------------------------


def decompose(G: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of H = G^T G / n + lam I, taken for a general matrix."""
    return torch.linalg.eig(G.T @ G / len(G) + lam * torch.eye(G.shape[1]))


def ihvp_of_eigenpairs(values: Tensor, vectors: Tensor, V: Tensor) -> Tensor:
    """V Q diag(1 / w) Q^T, with the real parts of w and Q, and Q taken for orthogonal."""
    return (V @ vectors.real / values.real) @ vectors.real.T


def residual(G: Tensor, V: Tensor, lam: float, R: Tensor) -> float:
    """||R H - V|| / ||V|| in float64: how far R is from solving its system."""
    G, V, R = G.double(), V.double(), R.double()
    return relative_difference((R @ G.T) @ G / len(G) + lam * R, V)


def benchmark_exact(n: int, d: int, repeats: int) -> list[Row]:
    """`exact` for one query and for many, against torch.linalg.eig, which is run once.

    The results are compared on a layer of n / 4 parameters. With more parameters than examples H has one eigenvalue
    many times over; a general decomposition's eigenvectors are then not orthogonal, and its ihvp is not H^-1 v. The
    residuals at full size are in the record.
    """
    G, V = torch.randn(n, d), torch.randn(QUERIES, d)
    lam = layer_damping(G)
    narrow = slice(max(1, min(d, n // 4)))
    by_eig = ihvp_of_eigenpairs(*decompose(G[:, narrow], lam), V[:, narrow])
    check_close("exact", exact(G[:, narrow], V[:, narrow], lam), by_eig)

    print(f"exact: one eigendecomposition of a {d} x {d} matrix, up to minutes ...", flush=True)
    before = time.perf_counter()
    eigenpairs = decompose(G, lam)
    decomposing = time.perf_counter() - before

    rows = []
    for v in (V[:1], V):
        computes = f"ihvp, queries: {len(v)}, n = {n}, d_l = {d}"
        theirs = [decomposing + seconds_of(lambda v=v: ihvp_of_eigenpairs(*eigenpairs, v))]
        ours = take_turns(repeats, exact=lambda v=v: exact(G, v, lam))["exact"]
        their_note, our_note = (
            f"relative residual {residual(G, v, lam, R):.1e}"
            for R in (ihvp_of_eigenpairs(*eigenpairs, v), exact(G, v, lam))
        )
        rows.append(row("torch.linalg.eig", computes, theirs, theirs, note=their_note))
        rows.append(row("exact", computes, ours, theirs, HUNDRED_TIMES_FASTER, our_note))
    return rows


# --- 2. DataInf against a loop over examples ------------------------------------------------------------------------


def loop_over_examples(G: Tensor, v: Tensor, lam: float) -> Tensor:
    """The paper's Algorithm 1 for one query and one layer, one training example at a time: r of shape (d,)."""
    r = torch.zeros_like(v)
    for g in G:
        c = (g @ v) / (lam + g @ g)
        r += (v - c * g) / (len(G) * lam)
    return r


def benchmark_datainf(n: int, d: int, repeats: int) -> list[Row]:
    """`datainf` for many queries and several layers, against a loop over queries, layers and examples."""
    matrices = [(torch.randn(n, d), torch.randn(QUERIES, d)) for _ in range(LAYERS)]
    layers = [(G, V, layer_damping(G)) for G, V in matrices]

    def ours() -> list[Tensor]:
        return [datainf(G, V, lam) for G, V, lam in layers]

    def loop() -> list[Tensor]:
        return [torch.stack([loop_over_examples(G, v, lam) for v in V[:LOOPED_QUERIES]]) for G, V, lam in layers]

    for R, looped in zip(ours(), loop(), strict=True):
        check_close("datainf", R[:LOOPED_QUERIES], looped)
    seconds = take_turns(repeats, loop=loop, ours=ours)
    scale = QUERIES / LOOPED_QUERIES
    theirs = [scale * value for value in seconds["loop"]]
    computes = f"ihvp, queries: {QUERIES}, layers: {LAYERS}, n = {n}, d_l = {d}"
    note = f"{scale:g} x the seconds of {LOOPED_QUERIES} queries"
    return [
        row("loop over examples", computes, theirs, theirs, note=note),
        row("datainf", computes, seconds["ours"], theirs, limit=HUNDRED_TIMES_FASTER),
    ]


# --- 3. Per-sample gradients against a training step's forward and backward -----------------------------------------


def benchmark_gradients(count: int, repeats: int) -> list[Row]:
    """`per_sample_gradients` against plain forward and backward; collating is timed in every variant."""
    model, texts = random_roberta(), random_texts(count)
    few = texts[:LOOPED_TEXTS]

    def ours(texts: Sequence[dict] = texts) -> Mapping[str, Tensor]:
        return per_sample_gradients(model, texts, classification, collate_fn=collate, batch_size=BATCH_SIZE)

    def one_by_one() -> Mapping[str, Tensor]:
        return reference_gradients(model, few, classification, collate_fn=collate)

    gradients, reference = ours(few), one_by_one()
    for name in reference:
        check_close(f"gradients of {name}", gradients[name], reference[name])
    training_passes(model, few)  # warm, as the others are by now
    seconds = take_turns(repeats, plain=lambda: training_passes(model, texts), ours=ours, one_by_one=one_by_one)

    plain, scale = seconds["plain"], count / len(few)
    looped = [scale * value for value in seconds["one_by_one"]]
    texts_of = f"of {count} texts of 10-60 tokens, batch"
    rows = [
        row("forward and backward", f"mean gradients {texts_of} {BATCH_SIZE}", plain, plain),
        row("per_sample_gradients", f"gradients {texts_of} {BATCH_SIZE}", seconds["ours"], plain, GRADIENTS_LIMIT),
        row("one at a time", f"gradients {texts_of} 1", looped, plain, note=f", {scale:g} x {len(few)} texts"),
    ]
    return [{**row, "note": f"{count / row['seconds_median']:.0f} examples/s{row['note']}"} for row in rows]


# --- 4. Gradients recorded while a model is fine-tuned, against fine-tuning alone -----------------------------------


def benchmark_recorded(count: int, repeats: int) -> list[Row]:
    """An epoch of training in which every example's gradients are recorded, against one in which none are."""
    model, texts = random_roberta(), random_texts(count)
    texts = [{**text, INDEX: index} for index, text in enumerate(texts)]

    def collated(examples: Sequence[dict]) -> dict[str, Tensor]:
        return {**collate(examples), INDEX: torch.tensor([example[INDEX] for example in examples])}

    def epoch(*callbacks: TrainerCallback) -> None:
        options = {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "save_strategy": "no"}
        options |= {"use_cpu": True, "learning_rate": 1e-6, "logging_strategy": "no"}  # the model stays as it is
        with tempfile.TemporaryDirectory() as folder:
            take = TrainingArguments(folder, num_train_epochs=1, per_device_train_batch_size=BATCH_SIZE, **options)
            loader = collated if callbacks else collate
            trainer = Trainer(model, take, loader, texts, callbacks=list(callbacks))
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    def recorded() -> RecordGradients:
        recording = RecordGradients(count)
        epoch(recording)
        return recording

    assert len(recorded().store) > 0  # and warm
    seconds = take_turns(repeats, plain=epoch, recorded=recorded)
    texts_of = f"an epoch of {count} texts of 10-60 tokens, batch {BATCH_SIZE}, by the Trainer"
    return [
        row("training", texts_of, seconds["plain"], seconds["plain"]),
        row("RecordGradients", texts_of, seconds["recorded"], seconds["plain"], GRADIENTS_LIMIT),
    ]


# --- The record and the command line --------------------------------------------------------------------------------


def main() -> None:
    """Run the benchmarks asked for, print their ratios and write the record."""
    parser = argparse.ArgumentParser(description="Measure four ratios of computing time, and hold them to limits.")
    parser.add_argument("--only", choices=("gradients", "datainf", "exact", "recorded"), help="run this one alone")
    parser.add_argument("--repeats", type=positive, default=25, help="rounds of each measurement (25)")
    parser.add_argument("--n", type=positive, default=1000, help="training examples in exact and datainf (1000)")
    parser.add_argument("--d", type=positive, default=4096, help="parameters of a layer in exact and datainf (4096)")
    parser.add_argument("--texts", type=positive, default=128, help="examples in gradients and recorded (128)")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/benchmark.csv"), help="the record")
    options = parser.parse_args()
    if options.output.is_dir():
        parser.error(f"argument --output: {options.output} is a folder, name a CSV file.")

    torch.manual_seed(0)
    benchmarks = {
        "gradients": lambda: benchmark_gradients(options.texts, options.repeats),
        "datainf": lambda: benchmark_datainf(options.n, options.d, options.repeats),
        "exact": lambda: benchmark_exact(options.n, options.d, options.repeats),
        "recorded": lambda: benchmark_recorded(options.texts, options.repeats),
    }
    rows = []
    for name in [options.only] if options.only else benchmarks:
        print(f"{name}: measuring with {torch.get_num_threads()} threads ...", flush=True)
        rows += [{"benchmark": name, **measured} for measured in benchmarks[name]()]
    record = pd.DataFrame(rows)
    show(record)
    write(record, options.output)


if __name__ == "__main__":
    main()
