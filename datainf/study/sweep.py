"""What the sweep runs: experiments and lessons, their notebooks, and the folders that stand in for hub ids.

The Snakefile plans runs by these names, records say by them which command repeats them, and `replay` executes it.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from datainf.errors import InputError

EXPERIMENTS = {
    "approximation_error": ("10_approximation_error", "classification"),
    "mislabeled_detection": ("20_mislabeled_detection", "classification"),
    "text_identification": ("30_text_identification", "text"),
    "image_identification": ("40_image_identification", "images"),
    "ground_truth": ("70_ground_truth", "ground_truth"),
    "which_hessian": ("71_which_hessian", "ground_truth"),
    "data_selection": ("75_data_selection", "data_selection"),
}
"""Experiment -> its notebook, and the section of a configuration that has its parameters and its grid. Of a section's
parameters a notebook is given those that it has."""

AFTER = {"mislabeled_detection": "approximation_error", "which_hessian": "ground_truth"}
"""Experiment -> that whose work on the same run it takes up."""

LESSONS = {
    "leave_one_out": "01_curvature_and_damping",
    "theorem1": "02_datainf_derivation",
    "table1_complexity": "50_complexity",
    "memory_budget": "60_speed_and_scale",
    "your_adapter": "80_your_adapter",
}
"""The record of a teaching notebook -> the notebook."""

DATASET = {
    "classification": "dataset",
    "text": "task",
    "images": "task",
    "ground_truth": "dataset",
    "data_selection": "dataset",
}
"""What the notebooks of a section call their dataset, which records call dataset."""

GIVEN = {"classification": ("MODEL", "DATA"), "text": ("TEXT_MODEL", None), "images": ("IMAGE_MODEL", "IMAGES")}
"""The variables that name a family's model and the folder of its datasets, to take instead of the configuration's. A
section is of the family of its name, but for those whose parameter `family` says it."""

OUTPUTS = {"cache", "output", "figures", "folder", "bank", "report"}
"""Parameters that say where things go, or lie: they are no part of what a run is."""


def given(family: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``model`` and ``data`` of a family, where the variables of `GIVEN` name them.

    Raises:
        InputError: a folder that is not there.
    """
    if family not in GIVEN:
        raise InputError(f"A section must name its family: {', '.join(GIVEN)}, not {family!r}.")
    names = GIVEN[family]
    model, data = (environment.get(name or "", "") for name in names)
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise InputError(f"There is no folder {model}, which {names[0]} names: give the folder of a model.")
    if data and not Path(data).expanduser().is_dir():
        raise InputError(f"There is no folder {data}, which {names[1]} names: give the datasets' folder.")
    return {name: value for name, value in (("model", model), ("data", data)) if value}


def dataset_in(folder: str | None, name: str) -> str:
    """The dataset as a notebook takes it: the folder of that name, or where there is no `folder`, the name itself.

    Raises:
        InputError: the folder has no such dataset.
    """
    if not folder:
        return name
    if not (Path(folder).expanduser() / name).is_dir():
        raise InputError(f"The folder {folder} holds no dataset {name}: it must be a folder of that name in it.")
    return str(Path(folder) / name)


def command(notebook: str, parameters: Mapping[str, object]) -> str:
    """The command that repeats a run, from the repository's root: papermill with all parameters but the places where
    results go. A model or a dataset in a folder is named by its last part, so that no record names anyone's disk."""

    def portable(value: object) -> object:
        return Path(value).name if isinstance(value, str) and value and Path(value).expanduser().is_dir() else value

    values = {name: portable(value) for name, value in parameters.items() if name not in OUTPUTS}
    return shlex.join(["papermill", f"notebooks/{notebook}.ipynb", "replayed.ipynb", "-y", one_line(values)])


class _Quoting(yaml.SafeDumper):
    """YAML with every string in double quotes, which a shell's single quotes leave as they are."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def one_line(parameters: Mapping[str, object]) -> str:
    """Parameters as a line of YAML, for papermill's -y: a string stays one whatever it says ("no", "1e-3", "")."""
    style = {"default_flow_style": True, "width": float("inf"), "sort_keys": False, "allow_unicode": True}
    return yaml.dump(dict(parameters), Dumper=_Quoting, **style).strip()
