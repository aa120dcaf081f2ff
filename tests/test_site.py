"""The site: every page, and no link that leads nowhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from datainf.study.provenance import ROOT


class Links(HTMLParser):
    """What a page links to, and the names that links can lead to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets, self.names = [], set()
        self.feed(page.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        self.targets += [given[name] for name in ("href", "src") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("myst_nb", reason="what builds the site is not installed: make site installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--fresh-env"]
    built = subprocess.run([*command, "--conf-dir", "docs/site", ".", folder], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_no_link_is_broken_and_nothing_comes_from_elsewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html") if "_static" not in page.parts}
    assert len(pages) > 40
    for page, links in pages.items():
        for link in links.targets:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].names, f"{page.relative_to(site)}: {link}"
        scripts = re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"(https?:[^\"]+)\"", page.read_text(encoding="utf8"))
        assert not scripts, page


def test_every_notebook_and_every_public_name_has_its_place(site):
    for notebook in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("results/published/*/notebooks/*.ipynb")]:
        assert (site / notebook.relative_to(ROOT).with_suffix(".html")).is_file()
    api = (site / "docs" / "site" / "api" / "datainf.attribution.html").read_text(encoding="utf8")
    assert "datainf.attribution.influence.influence" in api and "Raises" in api
    assert "README.html" in (site / "index.html").read_text(encoding="utf8") and (site / "searchindex.js").is_file()


@pytest.mark.parametrize("name", ["tests.yml", "site.yml"])
def test_workflows_are_valid_and_call_targets_that_are_there(name):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf8"))
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)
    assert runs and all(run.removeprefix("make ") in targets for run in runs)
