"""README and docs/api.md show every method of the registry."""

from __future__ import annotations

from pathlib import Path

import pytest

import captum_llm_ext
from captum_llm_ext.registry import METHODS
from tests.docs.documents import page_name
from tests.docs.method_table import END, PAGES, START, table


def test_a_row() -> None:
    row = '| "two_stage" | `TwoStageAblation` | `LLMAttribution` | '
    assert row + METHODS["two_stage"].help in table()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_page_shows_the_registry(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0].strip() == table()


def test_every_class_is_a_public_name() -> None:
    classes = [line.split("`")[3] for line in table().splitlines()[2:]]
    assert set(classes) <= set(captum_llm_ext.__all__)
