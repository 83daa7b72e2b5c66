"""Sphinx' settings: ``sphinx-build -W --keep-going -n docs docs/_build``.

Nothing is fetched, neither now nor by readers.

Pages that scripts/make_docs.py writes (environment, model zoo, benchmarks, API) are in the repository like all others;
``python scripts/make_docs.py --check`` says whether they are up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from mmvmamba.version import __version__  # noqa: E402 (the package of this checkout, which the line above finds)

project = "mmvmamba"
author = "the authors of mmvmamba"
copyright = "the authors of mmvmamba, Apache-2.0"  # noqa: A001 (Sphinx' name)
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "plain_attributes"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext", "_static"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4  # GitHub makes such anchors too, so that one link serves both
myst_dmath_double_inline = True

html_theme = "furo"
html_title = f"mmvmamba {release}"
html_static_path = ["_static"]
html_css_files = ["mmvmamba.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False

# Signatures are short, and what an argument is stands in the text of its docstring.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    # Classes in signatures, bases and attributes: those of torch and mm* are in other projects, whose lists of names
    # are on the network, and classes that are not public have no page. No docstring of ours refers to a class by hand,
    # and pages that do so use {py:obj}, which is checked.
    (r"py:class", r".*"),
]


def _own_tables(_app: Sphinx, _docname: str, source: list[str]) -> None:
    """Lead links to configs/README.md, which readers on a code host need, to the page made of it."""
    source[0] = source[0].replace("](../configs/README.md", "](model_zoo.md")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _own_tables)
