"""Make reproduced results the published ones: ``python -m datainf.study.publish SCALE`` (make publish SCALE=...).

`results/published/SCALE` becomes a copy of `results/SCALE`: records, tables, figures, banks and draws, and the executed
notebooks that the configuration names under `publish`. It is what the README, docs/ and the tests speak of.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
import pandas as pd
import yaml

from datainf.errors import InputError
from datainf.study import readme
from datainf.study.provenance import ROOT

PARTS = ("runs", "tables", "figures", "banks", "draws")


def publish(ours: Path, published: Path, notebooks: list[str]) -> None:
    """Replace the folder `published` by what is in `ours`, and by the executed notebooks of these names.

    Raises:
        InputError: the sweep in `ours` is not finished, or a record does not say by which committed code it was made.
    """
    if not (ours / "tables" / "ours_beside_paper.md").is_file():
        raise InputError(f"{ours} holds no finished sweep: run make reproduce first.")
    if missing := [name for name in notebooks if not (ours / "logs" / f"{name}.ipynb").is_file()]:
        raise InputError(f"{ours / 'logs'} holds no executed notebook {missing[0]}, which the configuration publishes.")
    for path in sorted((ours / "runs").glob("*.csv")):
        (commit,) = pd.read_csv(path)["commit"].astype(str).unique()
        if commit == "unknown" or commit.endswith("+changes"):
            raise InputError(f"{path.name} was made by code that is not committed: commit it and run the sweep again.")
    shutil.rmtree(published, ignore_errors=True)
    for part in filter(lambda part: (ours / part).is_dir(), PARTS):
        shutil.copytree(ours / part, published / part)
    for name in notebooks:
        (published / "notebooks").mkdir(exist_ok=True)
        executed = nbformat.read(ours / "logs" / f"{name}.ipynb", 4)
        nbformat.write(shown(executed), published / "notebooks" / f"{name}.ipynb")


LINK = re.compile(r"\]\((?!\w+:|#|/|\.\./\.\./)([^)\s]+)\)")
"""In Markdown, to a file, as it stands in notebooks/."""


def shown(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook as strangers may see it, four folders down: no folder of the machine that ran it, no times
    of its cells, and links that lead where they led from notebooks/."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {}).values()
    folders = {value: Path(value).name for value in given if isinstance(value, str) and Path(value).is_absolute()}
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata = {"tags": tags} if (tags := cell.metadata.get("tags")) else {}
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(
                lambda link: f"](../../../../{os.path.normpath('notebooks/' + link[1])})", cell.source
            )
    return nbformat.from_dict(json.loads(_replaced(json.dumps(notebook), folders | {str(ROOT): "."})))


def _replaced(text: str, pairs: Mapping[str, str]) -> str:
    for old in sorted(pairs, key=len, reverse=True):
        text = text.replace(json.dumps(old)[1:-1], json.dumps(pairs[old])[1:-1])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Make reproduced results the published ones.")
    parser.add_argument("scale", help="demo, laptop, paper: whose results")
    scale = parser.parse_args().scale
    config = yaml.safe_load((ROOT / "config" / f"{scale}.yaml").read_text(encoding="utf8"))
    try:
        publish(ROOT / "results" / scale, ROOT / "results" / "published" / scale, config.get("publish", []))
    except InputError as error:
        sys.exit(str(error))
    readme.update()
    print(
        f"results/published/{scale} is what results/{scale} was; the README and docs/ show it. Look at it, then commit."
    )


if __name__ == "__main__":
    main()
