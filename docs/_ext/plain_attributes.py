"""Docstrings of attributes and properties as they stand.

Napoleon takes what comes before a colon in their first line for a type: "Left to right, row after row: pixel t" became
an attribute of the type "Left to right, row after row".
"""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.ext.napoleon import docstring


def _as_they_stand(self: docstring.GoogleDocstring) -> list[str]:
    return list(self._consume_to_end())


def setup(app: Sphinx) -> dict[str, bool]:
    """Replace the method in question."""
    app.setup_extension("sphinx.ext.napoleon")
    docstring.GoogleDocstring._parse_attribute_docstring = _as_they_stand  # type: ignore[method-assign]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
