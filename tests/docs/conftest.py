"""The code blocks of a Markdown page, and how they are run."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

_FENCE = re.compile(r"^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title (a file name), its code, and the line on which the code begins."""

    language: str
    title: str | None
    code: str
    line: int


def blocks_of(page):
    """Every fenced block of a Markdown file that names its language, in order."""
    text = page.read_text(encoding="utf-8")
    out = []
    for match in _FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["options"])
        line = text.count("\n", 0, match.start("code")) + 1
        out.append(Block(match["language"], title and title[1], match["code"], line))
    return out


def run_python(page, names=None, blocks=None):
    """Run the Python blocks of a page one after the other in one namespace, which is returned.

    A block with a title is a file: it is written to the working directory, and not run.
    """
    names = {"__name__": "page"} if names is None else names
    for block in blocks_of(page) if blocks is None else blocks:
        if block.title is not None:
            with open(block.title, "w", encoding="utf-8") as file:  # noqa: PTH123
                file.write(block.code)
        elif block.language == "python":
            code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
            exec(compile(code, str(page), "exec"), names)
    return names


@pytest.fixture(scope="session")
def markdown():
    """`markdown.blocks(page)` and `markdown.run(page, names)`."""

    class Markdown:
        blocks = staticmethod(blocks_of)
        run = staticmethod(run_python)

    return Markdown
