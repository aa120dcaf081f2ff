"""Run records: one run writes one tidy CSV, one row per method, that says what made it.

The columns are described in ``results/README.md``.
"""

import gc
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import joblib
import pandas as pd
from matplotlib.figure import Figure

from datainf import scaling
from datainf.errors import InputError
from datainf.storage.files import fill_whole, write_whole
from datainf.study import sweep
from datainf.study.provenance import FINE_TUNING, code_hash, provenance, rooted

# What every record says of its run, in the order of the columns; more that identifies it, and metrics, follow.
RUN_COLUMNS = [
    "experiment",
    "model",
    "dataset",
    "rank",
    "seed",
    "method",
    "n_train",
    "epochs",
    "learning_rate",
    "batch_size",
    "damping",
    "layers",
]


@dataclass
class Stage:
    """What one stage of a run cost: wall-clock seconds and, beyond what was held before it, peak memory in MiB
    (of the GPU where there is one, else of the process)."""

    seconds: float = float("nan")
    peak_mib: float = float("nan")


@contextmanager
def stage(name: str, folder: str | Path | None = None) -> Iterator[Stage]:
    """Measure the body of a ``with`` statement.

    With a `folder` the figures are kept there when the body is done, and given back unchanged the next time, when
    the body finds its work already done: the cost is that of the call that did the work. Of work that was killed and
    taken up again the cost is not known: NaN.
    """
    _leave_imports_out_of_collections()
    measured = Stage()
    record = Path(folder) / f"{name}.json" if folder is not None else None
    kept = json.loads(record.read_text(encoding="utf8")) if record is not None and record.is_file() else None
    if record is not None and kept is None:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(asdict(measured)))  # found again if this call is killed
    try:
        with scaling.peak_mib() as peak:
            before = time.perf_counter()  # not before, since giving memory back takes a while
            yield measured
    except Exception:
        if record is not None and kept is None:
            record.unlink()  # refused or failed, not killed: the next call begins anew
        raise
    measured.seconds, measured.peak_mib = time.perf_counter() - before, peak()
    if kept is not None:
        vars(measured).update(kept)
    elif record is not None:
        write_whole(record, json.dumps(asdict(measured)))


@cache
def _leave_imports_out_of_collections() -> None:
    """What a notebook has imported by its first stage stays as long as its process. Every stage, and every training,
    begins with a collection of garbage, and a walk through all of that takes a third of a second."""
    gc.collect()
    gc.freeze()


def run_folder(cache: str | Path, **key) -> Path:
    """The folder for the work that runs share, such as a fine-tuned model: one for each `key` and state of the code.

    Its name reads as the key's short values and ends in a hash of the whole key, of the code that fine-tunes and
    takes gradients, and of the versions of the libraries that do.
    """
    readable = [Path(str(key[name])).name for name in ("model", "dataset", "task") if name in key]
    readable += [f"{name[0]}{key[name]}" for name in ("rank", "seed") if name in key]
    libraries = {
        name: value for name, value in provenance().items() if name in ("torch", "transformers", "peft", "diffusers")
    }
    digest = joblib.hash(
        [sorted((name, str(value)) for name, value in key.items()), code_hash(rooms=FINE_TUNING), libraries]
    )
    return rooted(cache) / re.sub(r"[^\w.=-]", "-", "-".join([*readable, digest[:10]]))


def save_run(path: str | Path, rows: pd.DataFrame, **facts) -> pd.DataFrame:
    """Write a run's record, whole or not at all: `facts` and provenance are repeated on every row.

    Raises:
        InputError: a column that identifies a run is missing.
    """
    record = rows.assign(**facts, **provenance())
    if missing := [column for column in RUN_COLUMNS if column not in record]:
        raise InputError(f"A run record needs the column {missing[0]!r}.")
    return _save(path, record[[*RUN_COLUMNS, *(column for column in record if column not in RUN_COLUMNS)]])


def save_draws(path: str | Path, draws: Mapping[str, pd.DataFrame], **cell) -> None:
    """Write what `counterfactual.lds_table` drew, by design, of the run whose record goes to `path`: to draws/ beside
    its folder. `cell` are its dataset, rank and seed."""
    path = _beside(path, "draws")
    frame = pd.concat(draws, names=["design", "draw"]).astype("float32").reset_index().assign(**cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    fill_whole(path, lambda aside: frame.to_parquet(aside, index=False, compression="zstd"))


def load_draws(folder: str | Path) -> pd.DataFrame:
    """All draws in `folder`: columns dataset, rank, seed, design, draw, and a column per method with its LDS.

    Raises:
        InputError: there are none.
    """
    files = sorted(rooted(folder).glob("*.parquet"))
    if not files:
        raise InputError(f"{folder} holds no draws of the ground truth: run its notebook, 70, again.")
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def bank_of(path: str | Path) -> Path:
    """Where the bank goes of the run whose record goes to `path`."""
    return _beside(path, "banks")


def _beside(path: str | Path, folder: str) -> Path:
    record = rooted(path)
    return record.parents[1] / folder / f"{record.stem}.parquet"


def save_lesson(folder: str | Path, name: str, rows: pd.DataFrame, run: Mapping[str, object], **facts) -> None:
    """Write what a teaching notebook measured to `folder`/tables/NAME.csv, and to runs/NAME.csv, its record.

    The record is written last: where it is, the notebook is done. `run` are the notebook's parameters.
    """
    record = rows.assign(**facts, command=sweep.command(sweep.LESSONS[name], run), **provenance())
    for place in ("tables", "runs"):
        _save(Path(folder) / place / f"{name}.csv", record)


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """Write a figure to `folder`/figures/NAME.png."""
    path = rooted(folder) / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _save(path: str | Path, record: pd.DataFrame) -> pd.DataFrame:
    path = rooted(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, record.to_csv(index=False, float_format="%.6g"))
    return record


def load_runs(folder: str | Path, experiment: str) -> pd.DataFrame:
    """All run records of one experiment below `folder`, one row per run and method. Where there are none it has no
    row, and the columns that every record has."""
    files = sorted(rooted(folder).glob(f"{experiment}-*.csv"))
    if not files:
        return pd.DataFrame(columns=RUN_COLUMNS)
    return pd.concat([pd.read_csv(file) for file in files], ignore_index=True)


def load_all(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The run records below `folder` of every experiment, as `load_runs` reads them.

    Raises:
        InputError: there are none of any.
    """
    found = {experiment: load_runs(folder, experiment) for experiment in sweep.EXPERIMENTS}
    if all(records.empty for records in found.values()):
        raise InputError(f"{folder} holds no records: run the sweep first (make reproduce).")
    return found


def paper_reported(folder: str | Path) -> pd.DataFrame:
    """The numbers that the paper's text reports: item, dataset, rank, method, metric, value, where."""
    return pd.read_csv(Path(folder) / "paper_reported.csv")


# The parameters of a run that concern what is done with its fine-tuned model, not what it is.
AFTERWARDS = {
    *("methods", "loss", "other_losses", "preamble", "reduction", "damping", "cache", "output", "figures"),
    *("timesteps", "draws", "stability", "inference_steps", "guidance", "inception"),
    *("halves", "removals", "halves_in_same", "removals_in_same", "repeats", "top_shares", "members", "folds", "bank"),
    *("dampings", "unrolled_queries", "weighted_examples", "smoother", "removals_smoother"),
    *("shares", "relabel_shares", "baselines"),
}
# Those that a record has in other columns, or has no use for; a task is the column dataset.
UNRECORDED = {
    *("task", "methods", "loss", "other_losses", "preamble", "cache", "output", "figures", "stability", "inception"),
    "accumulate",
    *("halves", "removals", "halves_in_same", "removals_in_same", "repeats", "top_shares", "members", "folds", "bank"),
    *("dampings", "unrolled_queries", "weighted_examples", "smoother", "removals_smoother"),
    *("shares", "relabel_shares", "baselines"),
}


def fine_tuning_key(run: Mapping[str, object]) -> dict[str, object]:
    """The part of a run's parameters that its fine-tuned model depends on, for `run_folder`."""
    return {name: value for name, value in run.items() if name not in AFTERWARDS}


def cost_columns(**stages: Stage) -> dict[str, float]:
    """Columns seconds_NAME and peak_mib_NAME for every stage."""
    return {f"{field}_{name}": value for name, stage in stages.items() for field, value in asdict(stage).items()}


def run_facts(run: Mapping[str, object], experiment: str, *, task, tuned, n_layers: int, **more) -> dict[str, object]:
    """What a record says about its run: parameters as they were used, the data and the base.

    Folders and hub ids are given by their last part, so that a record names no one's disk.
    """
    known = {name: value for name, value in run.items() if name not in UNRECORDED}
    lists = {name: "+".join(map(str, value)) for name, value in known.items() if isinstance(value, list)}
    folders = {name: Path(known[name]).name for name in ("model", "adapter") if name in known}
    if known.get("adapter"):  # it was not made here
        known |= dict.fromkeys({"epochs", "steps", "learning_rate", "bf16"} & known.keys(), float("nan"))
    elif "bf16" in known:
        known["bf16"] = tuned.training.recipe.in_bfloat16
    return {
        **known,
        **lists,
        **folders,
        "experiment": experiment,
        "dataset": task.name,
        "n_train": len(tuned.train),
        "layers": run.get("layers") or "all",
        "n_layers": n_layers,
        "model_revision": tuned.revision,
        "data_revision": task.revision,
        **more,
        "command": sweep.command(sweep.EXPERIMENTS[experiment][0], run),
    }
