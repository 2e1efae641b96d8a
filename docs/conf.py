"""Sphinx: these pages, and a reference made of the docstrings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cbs_opt.version import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "cbs-opt"
author = "The cbs-opt developers"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cbs-opt {version}"
html_static_path: list[str] = []

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the docstrings, with shapes
autoclass_content = "class"
napoleon_google_docstring = False
# Types are words with shapes, "float64 (n,)": shown as they stand, and no references to things called n.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./(?!docs/)[^)#]+)(?:#[^)]*)?\)")


def _escape_bars(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Absolute values are no substitutions of reStructuredText: |x| stays |x|."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = line.replace("|", r"\|")


def _name_outside_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files of the repository that are not in these pages become their names."""
    source[0] = _OUTSIDE.sub(lambda match: f"`{match[2].removeprefix('../')}`", source[0])


def setup(app: Sphinx) -> None:
    """Connect the hooks above."""
    app.connect("autodoc-process-docstring", _escape_bars)
    app.connect("source-read", _name_outside_files)
