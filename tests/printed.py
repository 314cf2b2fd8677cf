"""Printed text compared to the letter, but for the rounding of measured figures.

Each processor sums in its own order, so a value near the middle between two last digits prints as
either of them. A measured figure may be off by one in its last digit. Nothing else may differ.
A measured figure has decimals, an exponent or a percent sign. Whole numbers count things, so they
are exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import zip_longest

_FIGURE = re.compile(
    r"(?P<blanks> *)(?<![\w.])"
    r"(?P<figure>-?\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+|(?=%)))(?!\w|\.\d)"
)
# Python drops a last zero in these: [0.1, 0.25] are two figures with two decimals.
_BRACKETS = re.compile(r"\[[^][]*]|\{[^{}]*}|\([^()]*\)")


def assert_printed_alike(found: str, expected: str) -> None:
    """Same lines, words, layout and number of figures; each figure within one in its last digit."""
    pairs = zip_longest(_lines(found), _lines(expected), fillvalue="")
    wrong = [pair for pair in pairs if not _alike(*pair)]
    assert not wrong, "\n".join(f"found    {ours}\nexpected {theirs}" for ours, theirs in wrong)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.split("\n") if line.strip()]


def _alike(found: str, expected: str) -> bool:
    if _without_figures(found) != _without_figures(expected):
        return False
    pairs = zip(_FIGURE.finditer(found), _FIGURE.finditer(expected), strict=True)
    units = zip(_units(found), _units(expected), strict=True)
    return all(
        _same_place(*pair) and _difference(*pair) <= min(unit)
        for pair, unit in zip(pairs, units, strict=True)
    )


def _without_figures(line: str) -> str:
    return _FIGURE.sub("\0", line)


def _same_place(found: re.Match[str], expected: re.Match[str]) -> bool:
    """The same blanks before both; or the same end, as in a column that aligns to the right."""
    return found["blanks"] == expected["blanks"] or len(found[0]) == len(expected[0])


def _difference(found: re.Match[str], expected: re.Match[str]) -> Decimal:
    return abs(Decimal(found["figure"]) - Decimal(expected["figure"]))


def _units(line: str) -> Iterator[Decimal]:
    """The value of each figure's last digit; in brackets, of the one with the most decimals."""
    brackets = [match.span() for match in _BRACKETS.finditer(line)]
    figures = list(_FIGURE.finditer(line))
    for figure in figures:
        start, end = next((b for b in brackets if b[0] < figure.start() < b[1]), figure.span())
        yield min(_last_digit(x) for x in figures if start <= x.start() < end)


def _last_digit(figure: re.Match[str]) -> Decimal:
    return Decimal(1).scaleb(int(Decimal(figure["figure"]).as_tuple().exponent))
