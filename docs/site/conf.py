"""The site, for Sphinx: README, the pages, the notebooks as they were executed, and the API from docstrings.

`make site` builds it. Nothing is executed and nothing fetched: the site shows what is committed, and opens from disk.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

project, author, copyright = "The DataInf study", "The DataInf study authors", "The DataInf study authors"
extensions = [
    "myst_nb",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
# The sources are where they are in the repository, so that a link that works there works here.
root_doc = "README"
include_patterns = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/site/api/*.rst", "notebooks/*.ipynb"),
    *("results/README.md", "results/published/*/notebooks/*.ipynb", "results/published/*/tables/*.md"),
    *("benchmarks/README.md", "datainf/**/README.md"),
]
exclude_patterns = ["**/.*", "cache/**"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # which would come from elsewhere; a widget shows as its text
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4
suppress_warnings = [
    "mystnb.unknown_mime_type",  # a widget
    "myst.header",  # a notebook may begin its headings anew
    "toc.not_included",  # a table is found by its links
    "ref.python",  # GradientStore is in two places
]

apidoc_modules = [
    {
        "path": str(ROOT / "datainf"),
        "destination": "docs/site/api",
        "exclude_patterns": [str(ROOT / "datainf/demo/train_*"), str(ROOT / "datainf/data/built_in/*")],
        "separate_modules": False,
        "module_first": True,
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True  # else what a dataclass holds would be described twice
default_role = "literal"  # `this` in a docstring is code

html_theme = "sphinx_book_theme"
html_title = project
html_extra_path = ["start"]  # index.html, which leads to the README
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "use_download_button": True}

CONTENTS = """

```{toctree}
:caption: The study
:hidden:
docs/findings
docs/paper
docs/running
docs/your_own
docs/teaching
results/README
benchmarks/README
```

```{toctree}
:caption: Notebooks
:hidden:
:glob:
notebooks/*
```

```{toctree}
:caption: Notebooks on real data
:hidden:
REAL_DATA
```

```{toctree}
:caption: Reference
:hidden:
docs/site/api/modules
datainf/gradients/README
datainf/demo/base/README
datainf/demo/llama/README
datainf/demo/diffusion/README
CONTRIBUTING
CHANGELOG
```
"""


def read(app, docname: str, source: list[str]) -> None:
    """Add the contents to the first page, and lead links to a folder to the README that describes it."""
    page = ROOT / app.env.doc2path(docname, base=False)

    def leads_on(link: re.Match) -> str:
        folder = (page.parent / link["target"]).resolve()
        described = [place for place in (folder, folder.parent) if (place / "README.md").is_file() and place != ROOT]
        if not folder.is_dir():
            return link[0]
        if not described:
            return link["text"]
        return f"[{link['text']}](/{(described[0] / 'README.md').relative_to(ROOT)})"

    if page.suffix == ".md":
        source[0] = re.sub(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#:\s]+/)\)", leads_on, source[0])
    if docname == root_doc:
        published = [path.relative_to(ROOT) for path in sorted(ROOT.glob("results/published/*/notebooks/*.ipynb"))]
        titles = [f"{path.stem.replace('_', ' ')} <{path.with_suffix('')}>" for path in published]
        source[0] += CONTENTS.replace("REAL_DATA", "\n".join(titles))


def plainly(app, what, name, obj, options, lines: list[str]) -> None:
    """A docstring's bars and stars mean themselves: |score|, *args."""
    lines[:] = [re.sub(r"(`[^`]*`)|([|*])", lambda found: found[1] or "\\" + found[2], line) for line in lines]


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plainly, priority=400)  # before napoleon
