"""Repeat one published run: ``python -m datainf.study.replay RECORD`` (make replay RECORD=path).

A record's column `command` repeats its run; here that command is executed, with the folders that the variables MODEL,
DATA and so on name in the place of what was given then, and its record is compared with the first.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import yaml

from datainf.errors import InputError
from datainf.study import sweep
from datainf.study.provenance import ROOT
from datainf.study.verdict import LESSONS, METRICS

PLACE = ROOT / "results" / "replayed"


def replay(record: Path, into: Path = PLACE) -> tuple[Path, Path]:
    """Repeat the run of a record; the new record, and the executed notebook, are in `into`.

    Raises:
        InputError: it is no record, or the run failed.
    """
    rows = pd.read_csv(record)
    if "command" not in rows:
        raise InputError(f"{record} does not say what made it: give a record below results/, in a folder runs/.")
    program, notebook, *_, parameters = shlex.split(rows["command"].iloc[0])
    given = yaml.safe_load(parameters)
    if lesson := record.stem in sweep.LESSONS:  # its notebook may have had another name when the record was made
        notebook = f"notebooks/{sweep.LESSONS[record.stem]}.ipynb"
    executed = into / f"{record.stem}.ipynb"
    output = into / "runs" / record.name
    given |= {"folder": str(into)} if lesson else _in_folders(rows, given) | {"output": str(output)}
    into.mkdir(parents=True, exist_ok=True)
    command = [program, notebook, str(executed), "-y", sweep.one_line(given), "--cwd", "."]
    if subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode:
        raise InputError(f"The run failed; {executed} shows where.")
    return output, executed


def _in_folders(rows: pd.DataFrame, given: Mapping[str, object]) -> dict[str, str]:
    """The model and the dataset, from the folders that the environment names."""
    section = sweep.EXPERIMENTS[rows["experiment"].iloc[0]][1]
    name, found = sweep.DATASET[section], sweep.given(given.get("family", section))
    model = {"model": found["model"]} if "model" in found else {}
    return model | {name: sweep.dataset_in(found.get("data"), str(given[name]))}


def differences(first: Path, second: Path) -> pd.DataFrame:
    """The numbers of two records of one run that are not equal: row, metric and both values."""
    metrics = LESSONS[first.stem][1] if first.stem in LESSONS else METRICS
    one, other = (pd.read_csv(path) for path in (first, second))
    pair = {"first": one, "second": other}
    both = pd.concat({name: rows.filter(metrics).stack() for name, rows in pair.items()}, axis=1)
    both = both[~both.isna().all(axis=1)]
    return both[both["first"] != both["second"]].rename_axis(["row", "metric"]).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description="Repeat the run of a record and compare the two.")
    parser.add_argument("record", type=Path, help="a CSV in a folder runs/")
    record = parser.parse_args().record.expanduser()
    try:
        output, executed = replay(record)
    except (InputError, OSError) as error:
        sys.exit(str(error))
    differs = differences(record, output)
    print(f"Executed: {executed}\nRecord: {output}")
    print(
        "All numbers are equal."
        if differs.empty
        else f"{len(differs)} numbers differ:\n{differs.to_string(index=False)}"
    )


if __name__ == "__main__":
    main()
