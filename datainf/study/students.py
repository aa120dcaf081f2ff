"""An edition for students, ``make students``: notebooks without outputs, with a cell to write in for each solution."""

import re
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor
from nbformat import NotebookNode

from datainf.study.provenance import ROOT

SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>", re.DOTALL)
STUB = 'raise NotImplementedError("Exercise {0}: write your answer in this cell, in place of this line, and run it.")'


def edition(notebook: NotebookNode) -> NotebookNode:
    """The notebook as a student gets it. Executed as it is, it ends at the first exercise, which says so."""
    notebook, _ = ClearOutputPreprocessor().preprocess(notebook, {})
    cells, exercises = [], 0
    for cell in notebook.cells:
        before, *after = SOLUTION.split(cell.source) if cell.cell_type == "markdown" else [cell.source]
        cells.append(cell | {"source": before.strip()})
        for text in after:
            exercises += 1
            cells.append(nbformat.v4.new_code_cell(STUB.format(exercises)))
            cells += [nbformat.v4.new_markdown_cell(text.strip())] if text.strip() else []
    return nbformat.from_dict(notebook | {"cells": cells})


def main(into: Path = ROOT / "students") -> None:
    """Write the edition of every notebook that has solutions."""
    into.mkdir(exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, 4)
        if any(SOLUTION.search(cell.source) for cell in notebook.cells):
            nbformat.write(edition(notebook), into / path.name)
            print(into / path.name)


if __name__ == "__main__":
    main()
