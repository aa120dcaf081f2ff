"""Notebooks executed by papermill, as a user executes them."""

from pathlib import Path

import papermill
import pytest
import yaml
from papermill.exceptions import PapermillExecutionError

from datainf.provenance import ROOT

NOTEBOOKS = ROOT / "notebooks"


def execute(name: str, into: Path, **given) -> None:
    """Run a notebook with these parameters; the executed one is left in the folder `into`."""
    path = f"{name}.ipynb"
    papermill.execute_notebook(NOTEBOOKS / path, into / path, given, cwd=ROOT, progress_bar=False)


def assert_refused(sentence: str, name: str, into: Path, **given) -> None:
    """The notebook ends with one sentence, in which this one is, and no traceback around it."""
    with pytest.raises(PapermillExecutionError) as caught:
        execute(name, into, cache=str(into / "cache"), **given)
    shown = "\n".join(caught.value.traceback)
    assert sentence in shown and "\n" not in shown.strip()


def of_scale(scale: str, section: str) -> dict[str, object]:
    """The parameters of the first run that config/SCALE.yaml plans in this section."""
    config = yaml.safe_load((ROOT / "config" / f"{scale}.yaml").read_text(encoding="utf8"))[section]
    grid = config["grid"][0] if isinstance(config["grid"], list) else config["grid"]
    first = {name: values[0] for name, values in grid.items()}
    return config["parameters"] | config.get("by_dataset", {}).get(first.get("task"), {}) | first
