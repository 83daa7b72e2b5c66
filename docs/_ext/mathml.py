"""Formulas as MathML, which browsers draw themselves: Sphinx' MathJax would be fetched from another server by readers.

The translation is that of docutils; what it cannot read ends the build with the formula.
"""

from __future__ import annotations

from typing import Any, NoReturn

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


def _formula(text: str, *, as_block: bool) -> str:
    try:
        return str(tex2mathml(text, as_block=as_block))
    except MathError as error:
        raise ExtensionError(f"formula {text!r}: {error}. Write it in what docutils knows of LaTeX.") from error


def _inline(translator: Any, node: nodes.math) -> NoReturn:
    translator.body.append(_formula(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> NoReturn:
    translator.body.append(f'<div class="math">{_formula(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
