"""Put the tracked results into the README: ``python -m datainf.study.readme``.

Between the markers ``<!-- results: SCALE -->`` and ``<!-- end -->`` stands the table that notebook 90 wrote for that
scale, so that no number in the README is typed by hand.
"""

import re
from pathlib import Path

from datainf.study.provenance import ROOT

SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str, results: Path) -> str:
    """The README's text with every section's table replaced by the one in `results`/SCALE/tables."""

    def table(match: re.Match) -> str:
        path = results / match[2] / "tables" / "ours_beside_paper.md"
        return match[1] + "\n" + path.read_text(encoding="utf8") + "\n" + match[3]

    return SECTION.sub(table, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf8"), ROOT / "results"), encoding="utf8")
    print(f"{readme.name} now shows the tables in results/.")
