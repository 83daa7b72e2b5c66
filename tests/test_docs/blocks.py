"""The code blocks of the documents, fenced or indented, as Markdown's own parser finds them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
#: What the site is made of is read, but for the pages that hold no text of their own.
MADE_FROM_ELSEWHERE = ("docs/api/", "docs/benchmarks.md", "docs/environment.md")


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        page: Its file, relative to the root of the repository.
        language: What stands behind the fence, or an empty text.
        text: Its lines.
        line: Where it begins.
    """

    page: str
    language: str
    text: str
    line: int

    @property
    def name(self) -> str:
        """Return what a test report calls it."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return every document whose blocks must have a treatment."""
    found = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    names = {path: path.relative_to(ROOT).as_posix() for path in found}
    return [path for path in found if not names[path].startswith(("docs/_", *MADE_FROM_ELSEWHERE))]


def blocks() -> list[Block]:
    """Return every code block of every page in order."""
    return [block for path in pages() for block in _blocks_of(path)]


def _blocks_of(path: Path) -> Iterator[Block]:
    page = path.relative_to(ROOT).as_posix()
    for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block") and not token.info.startswith("{"):
            assert token.map is not None
            yield Block(page, token.info.strip(), token.content, token.map[0] + 1)


def commands(text: str) -> list[list[str]]:
    """Return the command lines of a shell block in words, without comments; a backslash joins lines.

    Where some begin with ``$``, the others are what was printed.
    """
    lines = text.replace("\\\n", " ").splitlines()
    lines = [line[2:] for line in lines if line.startswith("$ ")] or lines
    return [words for line in lines if (words := shlex.split(line, comments=True))]
