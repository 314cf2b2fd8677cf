"""Sorted tables of a few rows, as text, as HTML and as a data frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from rich.cells import cell_len

from captum_llm_ext.results.frames import pandas_module
from captum_llm_ext.results.values import FloatArray

if TYPE_CHECKING:
    from pandas import DataFrame

_LONGEST_NAME = 48  # columns of a terminal


class TopRow(NamedTuple):
    """A feature: its label, its attribution, its share of all magnitudes, and its position."""

    name: str
    attribution: float
    share: float
    position: int


class Table(Sequence[Any]):
    """Rows with headings, which print as text, show as HTML and become a data frame.

    >>> Table(["name", "share"], [("cat", 0.75), ("the", 0.25)])
    name  share
    cat    0.75
    the    0.25
    """

    def __init__(self, headings: Sequence[str], rows: Sequence[Any]) -> None:
        self.headings, self.rows = list(headings), list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __str__(self) -> str:
        cells = [self.headings, *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
        numeric = [not isinstance(value, str) for value in self.rows[0]] if self.rows else []
        lines = []
        for row in cells:
            padded = [
                " " * (width - cell_len(text)) + text
                if number
                else text + " " * (width - cell_len(text))
                for text, width, number in zip(
                    row, widths, numeric or [False] * len(row), strict=True
                )
            ]
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.headings)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    to_html = _repr_html_

    def to_dataframe(self) -> DataFrame:
        """The rows as a pandas data frame (``captum-llm-ext[export]``)."""
        frame = pandas_module().DataFrame(list(map(tuple, self.rows)), columns=self.headings)
        return cast("DataFrame", frame)


def top_table(values: FloatArray, labels: Sequence[str], k: int | None) -> Table:
    """The k features of largest magnitude, the largest first, with their shares of all."""
    magnitudes = np.abs(np.nan_to_num(values.astype(np.float64)))
    total = float(magnitudes.sum()) or 1.0
    rows = [
        TopRow(labels[i], float(values[i]), float(magnitudes[i]) / total, int(i))
        for i in largest(values, k)
    ]
    return Table(["name", "attribution", "share", "position"], rows)


def largest(values: FloatArray, k: int | None) -> list[int]:
    """The indices of the k values of largest magnitude, the largest first; None: all.

    Raises:
        ValueError: k is not a whole number of at least 1.
    """
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"expected a whole number of at least 1, or None for all; got {k!r}")
    order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")
    return [int(i) for i in order[:k]]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"
    text = str(value)
    return text if cell_len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
