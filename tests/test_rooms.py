"""The rooms of the house: each uses only rooms below it, and CONTRIBUTING.md shows them as they are."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from datainf.study.provenance import ROOT

SMALL_THINGS = {"errors", "processes", "progress", "scaling"}


def lint_imports(folder: Path) -> tuple[int, str]:
    """Exit status and what import-linter prints of the package in `folder`."""
    command = [Path(sys.executable).with_name("lint-imports"), "--config", folder / "pyproject.toml", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_every_room_uses_only_rooms_below_it():
    status, printed = lint_imports(ROOT)
    assert status == 0, printed


@pytest.mark.parametrize(
    ("module", "upwards"),
    [
        ("storage/rows.py", "from datainf.gradients import layers"),
        ("data/glue.py", "from datainf import demo"),
        ("models/losses.py", "import datainf.attribution.influence"),
        ("attic.py", "import json"),  # a module without a place
    ],
)
def test_an_import_turned_round_is_found(module, upwards, tmp_path):
    without = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json")
    shutil.copytree(ROOT / "datainf", tmp_path / "datainf", ignore=without)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "datainf" / module, "a", encoding="utf8") as file:
        file.write(f"\n{upwards}\n")
    status, printed = lint_imports(tmp_path)
    assert status == 1, printed


def test_the_table_of_rooms_says_who_imports_whom():
    graph = grimp.build_graph("datainf", cache_dir=None)
    inner = [module for module in graph.modules if module.count(".")]
    pairs = {
        (module.split(".")[1], imported.split(".")[1])
        for module in inner
        for imported in graph.find_modules_directly_imported_by(module)
        if imported.count(".")
    }
    between = {(room, other) for room, other in pairs if room != other and not {room, other} & SMALL_THINGS}
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text("utf8"), re.MULTILINE)
    assert {(room, other) for room, uses in rows for other in re.findall(r"`(\w+)`", uses)} == between


def test_the_map_in_contributing_names_files_that_are_there():
    table = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf8")
        .split("| you look for | it is in `datainf/` |")[1]
        .split("\n\n")[0]
    )
    named = re.findall(r"`(\w+/[\w/]+(?:\.py)?)/?`", table)
    assert len(named) > 10 and not [name for name in named if not (ROOT / "datainf" / name).exists()]
