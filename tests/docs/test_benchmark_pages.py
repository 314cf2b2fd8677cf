"""The tables of the pages are those of the stored results, to the letter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import (
    convergence,
    faithfulness,
    integrals,
    quadrature,
    stand_ins,
    tables,
    two_stage,
)
from tests.benchmarks.measure import RESULTS
from tests.benchmarks.pages import filled, markdown

TABLES: list[tuple[str, Path, str, Callable[[Any], str]]] = [
    ("convergence", convergence.PAGE, "convergence", convergence.page_text),
    ("quadrature", quadrature.PAGE, "quadrature", quadrature.page_text),
    ("two_stage", faithfulness.PAGE, "two_stage", two_stage.page_text),
    ("stand_ins", stand_ins.PAGE, "stand_ins", stand_ins.page_text),
]
SUMMARIES = sorted(RESULTS.glob("faithfulness_*_held-out.json"))


@pytest.mark.parametrize(("stored", "page", "name", "text"), TABLES)
def test_the_page_shows_the_stored_results(
    stored: str, page: Path, name: str, text: Callable[[Any], str]
) -> None:
    rows = json.loads((RESULTS / f"{stored}.json").read_text())["rows"]
    assert filled(page, name) == text(rows)


@pytest.mark.parametrize("stored", SUMMARIES, ids=lambda stored: stored.stem)
def test_the_page_shows_the_referees_summary(stored: Path) -> None:
    summary, model = json.loads(stored.read_text()), stored.stem.split("_")[1]
    assert filled(faithfulness.PAGE, f"faithfulness --model {model}") == tables.page_text(summary)


def test_every_case_has_a_reference_that_two_rules_agree_on() -> None:
    for name, baseline in integrals.pairs():
        kept = json.loads(integrals.reference_file(name, baseline).read_text())
        assert kept["relative_difference"] <= 0.03
        assert abs(kept["adaptive_delta"]) <= 0.01 * abs(kept["score_difference"])


def test_a_table() -> None:
    assert markdown(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
