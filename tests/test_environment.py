"""environment.yml, pyproject.toml and requirements.lock describe one environment: the one running."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = {
    canonicalize_name(requirement.name): requirement
    for requirement in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
}
LOCK_TEXT = (ROOT / "requirements.lock").read_text()
LINES = [line for line in LOCK_TEXT.splitlines() if line and not line.startswith("#")]
LOCK = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in LINES)}
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
CONDA_PIP = next(entry["pip"] for entry in CONDA if isinstance(entry, dict))


def test_every_line_of_the_lock_is_a_plain_pin():
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), line  # no URL, hash, option or +local
        Version(line.partition("==")[2])


def test_the_lock_is_sorted_and_names_each_package_once():
    names = [canonicalize_name(line.partition("==")[0]) for line in LINES]
    assert names == sorted(set(names))


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_a_direct_dependency_is_pinned_within_its_bounds_and_installed_so(name):
    assert name in LOCK, f"{name} is in pyproject.toml but not in requirements.lock"
    assert DIRECT[name].specifier.contains(LOCK[name], prereleases=True)
    assert Version(version(name)).public == Version(LOCK[name]).public  # 2.13.0+cpu is 2.13.0


def test_torch_is_pinned_exactly_and_alike_everywhere():
    assert str(DIRECT["torch"].specifier) == f"=={LOCK['torch']}"
    assert not [entry for entry in CONDA if isinstance(entry, str) and re.match(r"(py)?torch\b", entry)]


def test_conda_takes_its_python_packages_from_the_lock():
    assert CONDA_PIP == ["-r requirements.lock", "-e .[dev]"]  # and no second set of versions


def test_conda_python_is_one_the_project_supports():
    (python,) = (entry for entry in CONDA if isinstance(entry, str) and entry.split()[0] == "python")
    (pinned,) = re.findall(r"\d+\.\d+", python)
    assert SpecifierSet(PROJECT["requires-python"]).contains(pinned)
