"""The code that the README and docs/ show, run as a reader would."""

import os
import re
import subprocess
import sys

from datainf.study.provenance import ROOT


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf8"), re.DOTALL)


def test_what_the_readme_and_the_page_for_your_own_model_show_runs(tmp_path):
    """One block after the other; what the page calls yours is what the README made."""
    (suspects,) = blocks("README.md", "text")
    first = blocks("README.md", "python")[0]
    yours = "model, train_set, validation_set, collate = tuned.model, tuned.train, tuned.query, tuned.collate"
    code = "\n".join([first, yours, *blocks("docs/your_own.md", "python")])
    for folder in ("results", "notebooks"):  # which are in the folder that a reader is in
        (tmp_path / folder).symlink_to(ROOT / folder)
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    shown, found = ([line.split("  ")[1:] for line in text.splitlines()[:5]] for text in (suspects, process.stdout))
    assert sum(line in shown for line in found) >= 4  # on another processor two neighbours may change places
    assert "DataInf" in process.stdout or "datainf" in process.stdout  # the estimate
