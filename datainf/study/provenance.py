"""Where a result comes from: commit, versions, device, model weights."""

import ast
import hashlib
import json
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "diffusers", "datasets")
ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, str]:
    """Commit, package versions and device, as columns of a result row."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": str(torch.get_num_threads()),
    }


@cache
def processor() -> str:
    """The CPU's type, and the instructions that torch uses on it, by which the rounding of its results differs."""
    try:  # Linux; `platform` knows no more than the architecture there
        described = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        described = ""
    facts = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", described, re.MULTILINE))
    name = facts.get("model name") or platform.processor() or "CPU"
    numbers = [
        f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts
    ]
    return f"{name} ({', '.join([platform.machine(), *numbers, torch.backends.cpu.get_cpu_capability()])})"


def rooted(path: str | Path) -> Path:
    """A path that a parameter gives: ``~`` is the home folder, and a relative one is of the repository."""
    return ROOT / Path(path).expanduser()


@cache
def commit() -> str:
    """The checkout's commit, with "+changes" where tracked code differs from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "datainf", "notebooks")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# The rooms that fine-tuned models and gradients depend on; all that a run's numbers depend on; those that draw.
FINE_TUNING = ("storage", "data", "demo", "gradients", "models")
NUMERIC = (*FINE_TUNING, "processes", "attribution", "evaluation")
DRAWING = ("evaluation", "study")


@cache
def code_hash(notebook: str | Path | None = None, rooms: tuple[str, ...] = NUMERIC) -> str:
    """A hash of the code that makes the numbers: some of the package's rooms and a notebook's code cells.

    Taken of syntax trees without docstrings, so that neither comments nor prose nor layout change it.
    """
    package = ROOT / "datainf"
    sources = [
        path.read_text(encoding="utf8")
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0].removesuffix(".py") in rooms
    ]
    if notebook is not None:
        cells = json.loads(Path(notebook).read_text(encoding="utf8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\n".join(_syntax(source) for source in sources).encode()).hexdigest()[:12]


def _syntax(source: str) -> str:
    """The syntax tree of some Python, docstrings left out, as text; IPython's % and ! lines are taken as comments."""
    tree = ast.parse("\n".join("#" + line if line.lstrip()[:1] in ("%", "!") else line for line in source.split("\n")))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and body
            and ast.get_docstring(node) is not None
        ):
            node.body = body[1:]
    return ast.dump(tree)
