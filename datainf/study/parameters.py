"""The parameters of a run: declared with types in one notebook cell, overridden by papermill in the next.

papermill lets any name through with no more than a warning, and any value. `check` is called in the cell after: it
compares what was injected with what was declared and says in one sentence what does not fit, before work begins.
"""

import ast
import difflib
import json
from collections.abc import Mapping
from pathlib import Path

from datainf.errors import InputError

DECLARED, INJECTED = "# The parameters of a run", "# Parameters"
_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list}


def check(namespace: Mapping) -> dict[str, object]:
    """The parameters of this run, name -> value, in the order of their declaration.

    Args:
        namespace: the notebook's ``globals()``. Its parameters cell begins with the line `DECLARED` and declares
            each one as ``name: type = value``, the types being int, float, str, bool or list.

    Raises:
        InputError: a name that is not declared, or a value of another type than declared.
    """
    cells = list(namespace["In"])
    last = max(index for index, source in enumerate(cells) if source.startswith(DECLARED))
    types = {
        node.target.id: ast.unparse(node.annotation)
        for node in ast.parse(cells[last]).body
        if isinstance(node, ast.AnnAssign)
    }
    injected = [
        node.targets[0].id
        for source in cells[last + 1 :]
        if source.startswith(INJECTED)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
    ]
    for name in injected:
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(types)}."
            raise InputError(f"This notebook has no parameter {name!r}; {hint}")
    values = {name: namespace[name] for name in types}
    for name, value in values.items():
        if not _is_of(value, types[name]):
            raise InputError(f"The parameter {name!r} must be {types[name]}, not {value!r}.")
    return values


def defaults(notebook: str | Path) -> dict[str, object]:
    """The parameters that a notebook declares, name -> value, in the order of their declaration."""
    cells = json.loads(Path(notebook).read_text(encoding="utf8"))["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    declared = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.literal_eval(node.value) for node in declared}


def between(**limits: tuple[float, float, float]) -> None:
    """Refuse a parameter outside its limits: ``between(noise=(noise, 0, 0.5))`` is name=(value, lowest, highest).

    Raises:
        InputError: names the first such parameter.
    """
    for name, (value, lowest, highest) in limits.items():
        if not lowest <= value <= highest:
            raise InputError(f"{name} must be from {lowest:g} to {highest:g}, not {value:g}.")


def _is_of(value: object, annotation: str) -> bool:
    """Whether a value is of the declared type; True and False are no numbers here."""
    return annotation == "bool" if isinstance(value, bool) else isinstance(value, _TYPES[annotation])
