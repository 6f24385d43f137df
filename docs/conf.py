"""How Sphinx builds the site: `make docs`. Pages are Markdown, the reference is from docstrings."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import nrm  # noqa: E402

project = "nrm"
author = "the founders of nrm"
project_copyright = "2026, the founders of nrm"
version = release = nrm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "notebooks/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"nrm {release}"
html_static_path: list[str] = []

# -- Markdown and notebooks ------------------------------------------------------------------------

myst_heading_anchors = 4
myst_links_external_new_tab = True
# Notebooks are kept with what they print; the tests run them (tests/test_notebooks.py).
nb_execution_mode = "off"

# -- Docstrings ------------------------------------------------------------------------------------

# Docstrings put code into single backticks, as Markdown does.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and types are in the sentences
autodoc_preserve_defaults = True


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Take bars and stars of docstrings (Σ|R|) as themselves: only backticks mean something."""
    for place, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("`")
            parts[::2] = [part.replace("|", r"\|").replace("*", r"\*") for part in parts[::2]]
            lines[place] = "`".join(parts)


def setup(app: Any) -> None:
    """Called by Sphinx; Napoleon, with priority 500, comes after."""
    app.connect("autodoc-process-docstring", plain, priority=400)
