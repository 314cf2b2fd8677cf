"""Tables of stored results, between two markers of a documentation page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *lines])


def markers(name: str) -> tuple[str, str]:
    return f"<!-- table: python -m tests.benchmarks.{name} -->", f"<!-- end of {name} -->"


def filled(page: Path, name: str) -> str:
    """What stands between the markers."""
    start, end = markers(name)
    return page.read_text().split(start)[1].split(end)[0].strip()


def fill(page: Path, name: str, text: str) -> Path:
    """Put the text between the markers."""
    start, end = markers(name)
    before, after = page.read_text().split(start)[0], page.read_text().split(end)[1]
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")
    return page
