"""Pieces of the demo page as HTML; every text is escaped here."""

from __future__ import annotations

import base64
from html import escape

from mmvmamba.analysis.images import encode_png
from mmvmamba.analysis.predictions import Image
from mmvmamba.apis.app import Table
from mmvmamba.apis.app_scans import ScanView

CSS = """
.gradio-container { max-width: 1240px !important; padding-top: 0 !important; }
.gradio-container h1 { font-size: 24px !important; margin-bottom: 4px !important; }
#samples { display: grid; grid-template-columns: repeat(4, 1fr); gap: 6px; }
#samples button { flex-direction: column; gap: 2px; padding: 4px; min-width: 0; font-weight: 400; }
#samples button img { width: 100%; height: 52px; object-fit: cover; margin: 0; border-radius: 3px; }
#task label { padding: 6px 8px; gap: 4px; }
#task .wrap { gap: 6px; }
#message { padding: 0; }
#model input, #layer input { padding-right: 28px; text-overflow: ellipsis; }
.notice { padding: 8px 12px; border-left: 4px solid var(--color-accent); background: var(--block-background-fill);
  color: var(--body-text-color); overflow-wrap: anywhere; }
.notice.error { border-color: #c62828; max-height: 160px; overflow: auto; }
#table { max-height: 280px; overflow: auto; }
.answer-table { width: 100%; border-collapse: collapse; border: 0 !important; color: var(--body-text-color); }
.answer-table tr { border: 0 !important; }
.answer-table caption { text-align: left; font-weight: 600; padding: 4px 0; }
.answer-table th, .answer-table td { text-align: left !important; padding: 3px 10px 3px 0 !important;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
.answer-table td + td { font-variant-numeric: tabular-nums; }
.scan-maps { display: grid; grid-template-columns: 2fr 1fr 1fr; gap: 8px; }
.scan-maps figure { margin: 0; min-width: 0; }
.scan-maps figure:first-child { grid-row: span 2; }
.scan-maps img { max-width: 100%; height: auto; display: block; }
@media (min-width: 641px) {
  .scan-maps img { max-height: 130px; }
  .scan-maps figure:first-child img { max-height: 285px; }
}
.scan-maps figcaption, .scan-note { color: var(--body-text-color); font-size: 13px; }
@media (max-width: 640px) {
  .scan-maps { grid-template-columns: 1fr 1fr; }
  .scan-maps figure:first-child { grid-column: span 2; grid-row: auto; }
}
"""


def status_html(text: str) -> str:
    """Return a message that screen readers read when they are idle."""
    return f'<div class="notice" role="status">{escape(text)}</div>'


def error_html(text: str) -> str:
    """Return a message that screen readers read at once."""
    return f'<div class="notice error" role="alert">{escape(text)}</div>'


def table_html(table: Table) -> str:
    """Return a table with a caption; the first column heads the rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    return (
        f'<table class="answer-table"><caption>{escape(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def scan_html(view: ScanView) -> str:
    """Return the scan maps, the merged one first and largest."""
    figures = [_figure("all directions", view.merged)]
    figures += [_figure(name, image) for name, image in view.directions]
    return f'<div class="scan-maps">{"".join(figures)}</div><p class="scan-note">{escape(view.caption)}</p>'


def _figure(name: str, image: Image) -> str:
    data = base64.b64encode(encode_png(image)).decode("ascii")
    return (
        f'<figure><img alt="Scan map, {escape(name, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )
