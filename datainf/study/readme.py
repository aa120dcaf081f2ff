"""Put the published tables into the pages that show them: ``python -m datainf.study.readme``.

What stands between the markers ``<!-- published: PATH -->`` and ``<!-- end -->`` of the README and of docs/ is the file
of that path in results/published/, as notebook 90 wrote it, so that no number of a table is typed by hand.
"""

import re
from pathlib import Path

from datainf.study.provenance import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTION = re.compile(r"( *)(<!-- published: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str, published: Path) -> str:
    """A page's text with every section's table replaced by the file that it names, as far in as its marker."""

    def table(match: re.Match) -> str:
        inside = "\n" + (published / match[3]).read_text(encoding="utf8") + "\n" + match[4]
        return match[1] + match[2] + re.sub(r"(?m)^(?=.)", match[1], inside)

    return SECTION.sub(table, text)


def update() -> None:
    """Rewrite the pages with what is published now."""
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        page.write_text(updated(text, ROOT / "results" / "published"), encoding="utf8")


if __name__ == "__main__":
    update()
