"""`segment_input`: the text is never changed, and its segments are the features."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from captum_llm_ext import TextTemplateInput, segment_input
from tests.inputs.template_cases import by_gradient, by_majority, expected_by_gradient, wide_toy
from tests.models.families import LinearToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, our_attribution, target_ids
from tests.perturbations.cases import ablation, game, ours, rows

STORY = (
    "Dave lives in Palm Coast. He plays golf!  Does he like hiking?\n"
    "His family does.\n"
    "\n"
    "The capital of France is {Paris}.\n"
    "  It is {} and {0}.\n"
)
EXPECTED: dict[str, list[str]] = {
    "sentence": [
        "Dave lives in Palm Coast.",
        "He plays golf!",
        "Does he like hiking?",
        "His family does.",
        "The capital of France is {Paris}.",
        "It is {} and {0}.",
    ],
    "line": [
        "Dave lives in Palm Coast. He plays golf!  Does he like hiking?",
        "His family does.",
        "The capital of France is {Paris}.",
        "It is {} and {0}.",
    ],
    "paragraph": [
        "Dave lives in Palm Coast. He plays golf!  Does he like hiking?\nHis family does.",
        "The capital of France is {Paris}.\n  It is {} and {0}.",
    ],
    "[A-Z][a-z]+": [
        *("Dave", "Palm", "Coast", "He", "Does", "His", "The", "France", "Paris", "It"),
    ],
    r"\{.*?\}": ["{Paris}", "{}", "{0}"],
}


def plain(text: str) -> str:
    """A segment without its outer spaces, which may belong to it or to the template."""
    return text.strip()


def test_words() -> None:
    inp = segment_input("Dave  lives\nin\tPalm Coast", by="word")
    assert [plain(value) for value in inp.values] == ["Dave", "lives", "in", "Palm", "Coast"]
    assert inp.to_model_input() == "Dave  lives\nin\tPalm Coast"


@pytest.mark.parametrize("by", EXPECTED)
def test_the_segments_of_a_story(by: str) -> None:
    inp = segment_input(STORY, by=by)
    assert isinstance(inp, TextTemplateInput)
    assert inp.to_model_input() == STORY
    assert [plain(value) for value in inp.values] == EXPECTED[by]


def test_compiled_and_written_regex_are_the_same() -> None:
    written = segment_input(STORY, by=r"(?i)dave|golf")
    compiled = segment_input(STORY, by=re.compile("dave|golf", re.IGNORECASE))
    assert written.values == compiled.values == ["Dave", "golf"]
    assert compiled.to_model_input() == STORY


@pytest.mark.parametrize("spans", [[(0, 4), (14, 24)], [(14, 24), (0, 4)], [(0, 4), (4, 24)]])
def test_the_features_are_the_spans(spans: list[tuple[int, int]]) -> None:
    inp = segment_input(STORY, by=spans)
    assert sorted(inp.values) == sorted(STORY[a:b] for a, b in spans)
    assert inp.to_model_input() == STORY
    absent = inp.to_model_input(torch.zeros(1, 2))
    between = [c for i, c in enumerate(STORY) if not any(a <= i < b for a, b in spans)]
    assert absent == "".join(between)


def test_baselines_take_the_place_of_the_segments() -> None:
    inp = segment_input("Dave plays {golf}", by=r"\w+", baselines=["He", "is", "{}"])
    assert inp.to_model_input(torch.tensor([[0.0, 1.0, 1.0]])) == "He plays {golf}"
    assert inp.to_model_input(torch.zeros(1, 3)) == "He is {{}}"


@pytest.mark.parametrize("spans", [[(0, 4), (14, 24)], [(14, 24), (0, 4)]])
def test_a_baseline_goes_with_its_span(spans: list[tuple[int, int]]) -> None:
    baselines = {(0, 4): "He", (14, 24): "Tokyo"}
    inp = segment_input(STORY, by=spans, baselines=[baselines[span] for span in spans])
    assert inp.to_model_input(torch.zeros(1, 2)) == f"He lives in Tokyo{STORY[24:]}"


WAYS: list[Any] = ["word", "sentence", "line", "paragraph", "[a-c]+", re.compile(r"\{|\}| ")]
TEXTS = st.text(alphabet="abC {}0:!.?\n\r\t🙂é'\"\\%$", max_size=40) | st.text(max_size=40)


@pytest.mark.parametrize("by", WAYS, ids=str)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_text_is_never_changed(by: Any, text: str) -> None:
    try:
        inp = segment_input(text, by=by)
    except ValueError:
        occurs = re.search(by, text) if by not in WAYS[:4] else text.strip()
        assert not occurs, "there are segments, and they were refused"
        return
    assert inp.to_model_input() == text
    assert all(inp.values)
    position = 0
    for value in inp.values:
        position = text.index(value, position) + len(value)
    words = "".join(text.split())
    if by == "word" or by in ("sentence", "line", "paragraph"):  # nothing but spaces is left out
        assert "".join("".join(value.split()) for value in inp.values) == words
    check_absent(inp, text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(text=TEXTS, cuts=st.lists(st.integers(0, 40), min_size=2, max_size=8, unique=True))
def test_any_spans_keep_the_text(text: str, cuts: list[int]) -> None:
    cuts = sorted(cut for cut in cuts if cut <= len(text))
    assume(len(cuts) >= 2)
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    inp = segment_input(text, by=spans)
    assert inp.to_model_input() == text
    assert inp.values == [text[a:b] for a, b in spans]
    check_absent(inp, text)


def check_absent(inp: Any, text: str) -> None:
    """Without one segment the text has exactly that segment less."""
    count = len(inp.values)
    assert len(inp.to_model_input(torch.zeros(1, count))) == len(text) - len("".join(inp.values))
    for i, value in enumerate(inp.values):
        present = torch.ones(1, count)
        present[0, i] = 0
        less = inp.to_model_input(present)
        assert len(less) == len(text) - len(value)
        starts = [start for start in range(len(text)) if text.startswith(value, start)]
        assert less in [text[:start] + text[start + len(value) :] for start in starts]


# --- with both kinds of methods ------------------------------------------------------------------

SHORT = "Dave plays {golf}. He is in Palm Coast."


@pytest.mark.parametrize("by", ["word", "sentence", r"\w+", [(5, 10), (24, 38)]], ids=str)
def test_feature_ablation_removes_segments(by: Any) -> None:
    inp, target = segment_input(SHORT, by=by), target_ids(2)
    count = len(inp.values)

    def prompt_of(present: frozenset[int]) -> list[int]:
        mask = torch.tensor([[float(i in present) for i in range(count)]])
        return list(tiny_tokenizer().encode(inp.to_model_input(mask)))

    model = tiny_model("llama")
    expected = ablation(game(model, prompt_of, target), count)
    result = ours("feature_ablation", model, inp, target=target)
    assert_close(rows(result), expected)


@pytest.mark.parametrize("by", ["word", "sentence", r"\w+", [(5, 10), (24, 38)]], ids=str)
def test_gradients_are_summed_over_segments(by: Any) -> None:
    inp, target = segment_input(SHORT, by=by), target_ids(2)
    parts, position = [], 0
    for i, value in enumerate(inp.values):
        start = SHORT.index(value, position)
        parts += [(SHORT[position:start], -1), (value, i)]
        position = start + len(value)
    prompt, choices = by_majority([*parts, (SHORT[position:], -1)], tiny_tokenizer())
    (value_of,) = choices
    expected = expected_by_gradient(wide_toy(), prompt, value_of, target, len(inp.values))
    result = by_gradient(inp, tiny_tokenizer(), target)
    assert result.input_tokens == inp.values
    assert_close(result.token_attr, expected)


def test_integrated_gradients_with_baselines_equal_ablation_of_a_linear_model() -> None:
    model = LinearToy()
    inp = segment_input("golf and hiking and golf", by="and", baselines=["in"] * 2)
    ids = [tiny_tokenizer().encode(inp.to_model_input(m)) for m in (None, torch.zeros(1, 2))]
    assert len(ids[0]) == len(ids[1])
    expected = ours("feature_ablation", model, inp, target=target_ids(2))
    result = our_attribution(
        LayerIntegratedGradients, model, model.embedding, inp, target=target_ids(2), n_steps=1
    )
    assert_close(result.token_attr, expected.token_attr)
