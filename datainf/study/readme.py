"""Put the published results into the README: ``python -m datainf.study.readme``.

Between the markers ``<!-- results: SCALE -->`` and ``<!-- end -->`` stands the table that notebook 90 wrote for that
scale, so that no number in the README is typed by hand.
"""

import re
from pathlib import Path

from datainf.study.provenance import ROOT

SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str, published: Path) -> str:
    """The README's text with every section's table replaced by the one in `published`/SCALE/tables."""

    def table(match: re.Match) -> str:
        path = published / match[2] / "tables" / "ours_beside_paper.md"
        return match[1] + "\n" + path.read_text(encoding="utf8") + "\n" + match[3]

    return SECTION.sub(table, text)


def update() -> None:
    """Rewrite the README with what is published now."""
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf8"), ROOT / "results" / "published"), encoding="utf8")


if __name__ == "__main__":
    update()
