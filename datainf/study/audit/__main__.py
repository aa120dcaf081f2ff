"""``make audit``: notebook 80 with what the environment names, and its page beside what it writes."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from datainf.errors import InputError
from datainf.study.provenance import ROOT


def main() -> None:
    """``make audit``: notebook 80 with what the environment names, and the page of it beside what it writes."""
    names = {name.lower(): os.environ.get(name, "") for name in ("ADAPTER", "TRAIN", "QUERIES")}
    out = Path(os.environ.get("OUT") or "audit")
    try:
        if missing := [name.upper() for name, value in names.items() if not value]:
            raise InputError(
                f"Name {' and '.join(missing)}: make audit ADAPTER=folder TRAIN=file QUERIES=file OUT=folder"
            )
        more = yaml.safe_load(os.environ.get("AUDIT") or "{}")
        given = {**names, "report": str(out.absolute()), **more}
        notebook = ROOT / "notebooks" / "80_your_adapter.ipynb"
        known = papermill.inspect_notebook(str(notebook))
        if unknown := given.keys() - known.keys():
            raise InputError(f"AUDIT names {min(unknown)!r}, which is no parameter of notebook 80.")
        for name, value in more.items():
            if known[name]["inferred_type_name"] == "float" and isinstance(value, str):
                with suppress(ValueError):  # which the notebook says better
                    given[name] = float(value)  # 2e-4 is a text to YAML
        out.mkdir(parents=True, exist_ok=True)
        for name in (
            "ranked.csv",
            "scores.npy",
            "suspects.jsonl",
            "filtered.jsonl",
            "retrained.csv",
            "report.html",
            "notebook.html",
        ):
            (out / name).unlink(missing_ok=True)  # an earlier audit's
        made = str(out / "notebook.ipynb")
        print(f"Auditing {names['adapter']}; the notebook as it runs is {made}.")
        # What cells print is shown too, such as what it will cost.
        papermill.execute_notebook(str(notebook), made, given, progress_bar=True, stdout_file=sys.stdout)
    except DeadKernelError:
        sys.exit(
            "The notebook's process was ended from outside, perhaps for want of memory. Start the same command again: "
            "gradients and retrained models that are done are in cache/."
        )
    except PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}" if error.ename == InputError.__name__ else str(error))
    except InputError as error:
        sys.exit(str(error))
    page, _ = HTMLExporter(exclude_input=True).from_filename(made)
    (out / "notebook.html").write_text(page, encoding="utf8")
    print(
        f"Done: {out}/ has {', '.join(sorted(path.name for path in out.iterdir()))}. Look at report.html first, "
        "and read suspects.jsonl before you train on filtered.jsonl."
    )
    for cell in nbformat.read(made, 4).cells:
        for shown in cell.get("outputs", ()):
            if (said := shown.get("data", {}).get("text/markdown", "")).startswith("**Warning.**"):
                print(f"WARNING: {said.removeprefix('**Warning.**').strip()}")


if __name__ == "__main__":
    main()
