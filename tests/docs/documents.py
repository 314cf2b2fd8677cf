"""README and the pages of docs/ as blocks of code, each with what its fence says of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title ("" for none) and its text.

    A title names what the block is written for: another package, or another machine. Such a block
    is compiled and not run.
    """

    language: str
    title: str
    text: str


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Blocks of a page in order, but for those in comments."""
    text = _COMMENT.sub("", page.read_text(encoding="utf-8"))
    return [_block(match["info"], match["text"]) for match in _FENCE.finditer(text)]


def steps(page: Path) -> list[tuple[Block, str | None]]:
    """Blocks of Python in order, each with the output that the block after it shows."""
    found = blocks(page)
    pairs = pairwise([*found, Block("", "", "")])
    return [
        (block, after.text if after.language == "output" else None)
        for block, after in pairs
        if block.language == "python"
    ]


def commands(page: Path) -> list[str]:
    """Lines of blocks without a language: what one types in a terminal."""
    lines = [x for b in blocks(page) if not b.language for x in b.text.splitlines()]
    return [line for line in lines if line.strip()]


def _block(info: str, text: str) -> Block:
    title = _TITLE.search(info)
    return Block(info.split(" ")[0], title[1] if title else "", text)
