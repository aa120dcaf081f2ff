"""Notebooks executed by papermill, as a user executes them."""

import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nbformat
import papermill
import yaml
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from datainf.study.provenance import ROOT

NOTEBOOKS = ROOT / "notebooks"


def execute(name: str, into: Path, **given) -> None:
    """Run a notebook with these parameters; the executed one is left in the folder `into`."""
    path = f"{name}.ipynb"
    papermill.execute_notebook(NOTEBOOKS / path, into / path, given, cwd=ROOT, progress_bar=False)


def run(name: str, **given) -> None:
    """As `execute`, without a kernel, which would import everything anew, and without the executed notebook."""
    shown = error_of(_code(name, given))
    assert not shown, shown


def execute_with_solutions(name: str, into: Path, **given) -> int:
    """Run a notebook and then, in the same kernel, the code of its exercises' folded solutions; how many there are."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    folded = "\n".join(re.findall(r"<details>.*?</details>", prose, re.DOTALL))
    solutions = re.findall(r"```python\n(.*?)```", folded, re.DOTALL)
    notebook.cells += [nbformat.v4.new_code_cell(solution) for solution in solutions]
    nbformat.write(notebook, into / "with_solutions.ipynb")
    papermill.execute_notebook(
        into / "with_solutions.ipynb", into / f"{name}.ipynb", given, cwd=ROOT, progress_bar=False
    )
    return len(solutions)


def assert_refused(sentence: str, name: str, into: Path, **given) -> None:
    """The notebook ends with one sentence, in which this one is, and no traceback around it."""
    if "cache" in papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb")):
        given |= {"cache": str(into / "cache")}
    shown = error_of(_code(name, given))
    assert sentence in shown and "\n" not in shown.strip()


def _code(name: str, given: Mapping[str, object]) -> list[str]:
    """A notebook's code, cell by cell, with these parameters."""
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb")), given)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def error_of(cells: Sequence[str]) -> str:
    """What a notebook shows of the error that its code ends with; nothing if there is none.

    A copy of a server runs it, which has imported everything already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["running", "datainf.study.ground_truth", "datainf.study.explorer"])
    with ProcessPoolExecutor(1, mp_context=context) as copy:
        return copy.submit(_error_here, cells).result()


def _error_here(cells: Sequence[str]) -> str:
    os.chdir(ROOT)
    shell, shown = InteractiveShell.instance(), []
    shell._showtraceback = lambda kind, error, lines: shown.append("\n".join(lines))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for cell in cells:
            shell.run_cell(cell, store_history=True)
            if shown:
                return shown[0]
    return ""


def of_scale(scale: str, section: str) -> dict[str, object]:
    """The parameters of the first run that config/SCALE.yaml plans in this section."""
    config = yaml.safe_load((ROOT / "config" / f"{scale}.yaml").read_text(encoding="utf8"))[section]
    grid = config["grid"][0] if isinstance(config["grid"], list) else config["grid"]
    first = {name: values[0] for name, values in grid.items()}
    return config["parameters"] | config.get("by_dataset", {}).get(first.get("task"), {}) | first
