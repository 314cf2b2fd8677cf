"""Characters of any script: in a font that has them, or as numbers with one warning."""

from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.font_manager import fontManager

from captum_llm_ext import LLMAttributionResult
from captum_llm_ext.display import draw_bars, fonts

TEXTS = ["日", "本語", "😀👍", "مرحبا", "שלום", "ẞ", "नमस्ते", "a\ufe0f"]


@pytest.fixture(autouse=True)
def nothing_said():
    fonts._said.cache_clear()
    yield
    fonts._said.cache_clear()


def test_a_plot_of_every_script_warns_once_for_each_font_and_never_for_each_character(tmp_path):
    tokens = [f"Ġ{text}" if text.isascii() else text for text in TEXTS] * 3
    result = LLMAttributionResult(
        input_tokens=tokens, output_tokens=["日本"], seq_attr=np.arange(len(tokens)) - 3.0
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for end in ("png", "pdf", "svg"):
            result.plot_seq_attr(title="日本")[0].savefig(tmp_path / f"plot.{end}")
        result.plot_seq_attr()[0].savefig(tmp_path / "again.png")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(set(messages))
    assert all("install a font such as" in message for message in messages)


def test_scripts_that_a_font_has_stay_as_they_are():
    texts = ["Ωmega", "жизнь", "é"]
    assert fonts.drawable(texts, ["DejaVu Sans"]) == texts


def test_a_character_that_no_font_has_becomes_its_number(monkeypatch):
    monkeypatch.setattr(fonts, "_installed", lambda: ())
    fonts._chosen.cache_clear()
    with pytest.warns(UserWarning, match=r"日 本.*Noto Sans CJK"):
        assert fonts.drawable(["日本 a", "b"], ["DejaVu Sans"]) == ["\\u65e5\\u672c a", "b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.drawable(["日"], ["DejaVu Sans"]) == ["\\u65e5"]
    fonts._chosen.cache_clear()


def test_a_font_is_chosen_for_what_the_first_lacks():
    """STIX has mathematical letters that DejaVu Sans Mono lacks."""
    if not any(font.name == "STIXGeneral" for font in fontManager.ttflist):
        pytest.skip("matplotlib without its STIX fonts")
    lacking = sorted(
        fonts._characters(dict(fonts._installed())["STIXGeneral"])
        - fonts._characters(dict(fonts._installed())["DejaVu Sans Mono"])
    )[-1]
    assert len(fonts.fonts_for([lacking], ["DejaVu Sans Mono"])) == 2


def test_pdf_has_its_fonts_in_it(tmp_path):
    figure, _ = draw_bars(np.ones(3, dtype=np.float32), ["a", "b", "c"], "x")
    with plt.rc_context({"pdf.compression": 0}):
        figure.savefig(tmp_path / "plot.pdf")
    assert b"/FontFile2" in (tmp_path / "plot.pdf").read_bytes() or (
        b"/Type3" in (tmp_path / "plot.pdf").read_bytes()
    )
