"""Small HTML tables for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cbs_opt.view.text import Facts

_CELL = "text-align:left;vertical-align:top;padding:0.15em 0.8em"


def facts(title: str, rows: Facts) -> str:
    """A table of two columns, names and values, under a title."""
    lines = [
        f'<tr><th style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{_lines(value)}</td></tr>'
        for name, value in rows
    ]
    return _table(title, lines)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a header line, under a title."""
    lines = [_row("th", header), *(_row("td", row) for row in rows)]
    return _table(title, lines)


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{_CELL}">{_lines(cell)}</{tag}>' for cell in cells) + "</tr>"


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _table(title: str, lines: Sequence[str]) -> str:
    caption = f'<caption style="text-align:left;font-weight:bold">{escape(title)}</caption>' if title else ""
    return f"<table>{caption}{''.join(lines)}</table>"
