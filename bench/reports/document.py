"""A document of headings, paragraphs, tables and pictures, written as Markdown and as one HTML page.

Text is plain: markup in a label or a message is shown literally. Only `code` between backquotes
and **bold** are marked.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first `left` columns stand left, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Picture:
    """An SVG picture with a caption; `name` is its file's, without an ending, in Markdown."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Folded:
    """Blocks under a line that opens and closes them; in Markdown under a heading of level 3."""

    title: str
    blocks: Sequence[Block]
    opened: bool = False


Block = Heading | Paragraph | Points | Table | Picture | Folded

INK = "#1b1b1b"
"""Colour of text and axes in pictures; on the page it becomes that of the page's text."""


@dataclass
class Document:
    """A title and what follows."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        """Append blocks."""
        self.blocks.extend(blocks)

    @property
    def pictures(self) -> list[Picture]:
        """Every picture in it."""
        return list(_pictures(self.blocks))

    def markdown(self, folder: str) -> str:
        """The document as Markdown, its pictures as files in `folder`."""
        return "\n\n".join([f"# {_escaped(self.title)}", *_markdown(self.blocks, folder)]) + "\n"

    def page(self) -> str:
        """The document as one HTML page that needs no other file."""
        style = resources.files("cbs_opt.bench.reports").joinpath("report.css").read_text(encoding="utf-8")
        headings = [block for block in self.blocks if isinstance(block, Heading) and block.level == 2]
        links = " ".join(f'<a href="#{_anchor(block.text)}">{_inline(block.text)}</a>' for block in headings)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{_inline(self.title)}</h1>\n<nav>{links}</nav>\n"
            + "\n".join(_html(self.blocks))
            + "\n</main>\n</body>\n</html>\n"
        )


def _pictures(blocks: Iterable[Block]) -> Iterable[Picture]:
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Folded):
            yield from _pictures(block.blocks)


def _markdown(blocks: Iterable[Block], folder: str) -> Iterable[str]:
    for block in blocks:
        match block:
            case Heading(text, level):
                yield f"{'#' * level} {_escaped(text)}"
            case Paragraph(text):
                yield _escaped(text)
            case Points(items):
                yield "\n".join(f"- {_escaped(item)}" for item in items)
            case Table(header, rows, left):
                rule = ["---"] * left + ["---:"] * (len(header) - left)
                yield "\n".join(_row(cells) for cells in ([*map(_escaped, header)], rule, *_cells(rows)))
            case Picture(name, _, caption):
                yield f"![{_escaped(caption)}]({folder}/{name}.svg)\n\n*{_escaped(caption)}*"
            case Folded(title, inner, _):
                yield f"### {_escaped(title)}"
                yield from _markdown(inner, folder)


def _cells(rows: Iterable[Sequence[str]]) -> Iterable[list[str]]:
    return ([_escaped(cell) for cell in row] for row in rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text whose characters mean nothing to Markdown, but for `code` and **bold**."""
    pieces = re.split(r"(`[^`]*`|\*\*)", " ".join(text.split()))
    for k in range(0, len(pieces), 2):
        pieces[k] = re.sub(r"([\\*_\[\]<>#~])", r"\\\1", pieces[k])
    return "".join(pieces).replace("|", r"\|")


def _html(blocks: Iterable[Block]) -> Iterable[str]:
    for block in blocks:
        match block:
            case Heading(text, level):
                yield f'<h{level} id="{_anchor(text)}">{_inline(text)}</h{level}>'
            case Paragraph(text):
                yield f"<p>{_inline(text)}</p>"
            case Points(items):
                yield "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
            case Table(header, rows, left):
                head = "".join(
                    f"<th{_side(k, left)}>{_unbroken(_inline(cell))}</th>" for k, cell in enumerate(header)
                )
                body = "\n".join(
                    "<tr>"
                    + "".join(f"<td{_side(k, left)}>{_inline(cell)}</td>" for k, cell in enumerate(row))
                    + "</tr>"
                    for row in rows
                )
                yield f'<div class="table"><table><thead><tr>{head}</tr></thead>'
                yield f"<tbody>\n{body}</tbody></table></div>"
            case Picture(_, svg, caption):
                picture = svg[svg.index("<svg") :].replace(INK, "currentColor")
                picture = picture.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
                yield f"<figure>{picture}<figcaption>{_inline(caption)}</figcaption></figure>"
            case Folded(title, inner, opened):
                yield f"<details{' open' if opened else ''}><summary>{_inline(title)}</summary>"
                yield from _html(inner)
                yield "</details>"


def _side(column: int, left: int) -> str:
    return ' class="left"' if column < left else ""


def _inline(text: str) -> str:
    """Escaped text with `code` and **bold** marked."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]*)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)


def _unbroken(text: str) -> str:
    """Text whose exponents stay on one line."""
    return re.sub(r"(\de)-(\d)", "\\1\u2011\\2", text)


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
