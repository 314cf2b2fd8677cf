"""Where a result may be cut: at the first token of a prompt, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import captum.attr
import matplotlib.pyplot as plt
import pytest

from captum_llm_ext import TextTokenInput, chat_input, segment_input
from captum_llm_ext.inputs.templates import TextTemplateInput
from captum_llm_ext.results import LLMAttributionResult, LLMLayerAttributionResult
from tests.models.families import tiny_tokenizer

VALUES = [120.5, 1.0, 2.0, 3.0]
PROMPT = "Dave lives in Palm Coast"


def result(inp: Any, values: list[float] | None = None, **more: Any) -> LLMAttributionResult:
    tokens = inp.values if inp else ["Dave", "Ġlives", "Ġin", "ĠPalm"]
    row = (values or VALUES) + [0.5] * (len(tokens) - 4)
    return LLMAttributionResult(
        input_tokens=tokens, output_tokens=["x"], seq_attr=row, token_attr=[row], inp=inp, **more
    )


def is_cut(shown: LLMAttributionResult, **options: Any) -> list[bool]:
    """Of every way to show a result: bars, heat map, page, table of a long prompt."""
    bars, heat = shown.plot_seq_attr(**options), shown.plot_token_attr(**options)
    label = heat[0].axes[-1].get_ylabel()
    page = shown.to_html(**options)
    cut = [bool(bars[1].lines[1:]), "colours stop at" in label, 'class="beyond"' in page]
    plt.close("all")
    return cut


def test_a_sink_at_the_first_token_is_cut() -> None:
    shown = result(TextTokenInput(PROMPT, tiny_tokenizer()))
    assert shown.starts_prompt
    assert is_cut(shown) == [True] * 3


MESSAGES = [{"role": "user", "content": PROMPT}]


def with_chats(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


@pytest.mark.parametrize(
    ("inp", "starts"),
    [
        (lambda t: captum.attr.TextTokenInput(PROMPT, t), True),
        (lambda t: TextTokenInput(PROMPT, t, skip_tokens=[t.encode(PROMPT)[1]]), True),
        (lambda t: TextTokenInput(PROMPT, t, skip_tokens=[t.encode(PROMPT)[0]]), False),
        (lambda t: chat_input(MESSAGES, with_chats(t)), False),
        (lambda t: chat_input(MESSAGES, with_chats(t), by="word"), False),
        (lambda t: segment_input(PROMPT, by="word"), False),
        (lambda t: TextTemplateInput("{} {} {} {}", PROMPT.split()[:4]), False),
        (lambda t: None, False),
    ],
)
def test_no_other_feature_is_cut(inp: Any, starts: bool) -> None:
    shown = result(inp(tiny_tokenizer()))
    assert shown.starts_prompt is starts
    assert is_cut(shown) == [starts] * 3
    largest_in_the_middle = result(inp(tiny_tokenizer()), [1.0, 2.0, 120.5, 3.0])
    assert is_cut(largest_in_the_middle) == [False] * 3


def test_what_is_stored_or_merged_is_shown_alike() -> None:
    shown = result(TextTokenInput(PROMPT, tiny_tokenizer()))
    read = LLMAttributionResult.from_json(shown.to_json())
    assert read == shown
    for same in (read, shown.merge([(2, 4)]), shown.merge("word")):
        assert is_cut(same) == is_cut(shown, merge=[(2, 4)]) == [True] * 3


def test_each_layer_is_cut_where_the_whole_is() -> None:
    layers = LLMLayerAttributionResult(
        input_tokens=["Dave", "Ġlives", "Ġin", "ĠPalm"],
        output_tokens=["x"],
        layer_names=["a", "b"],
        layer_seq_attr=[VALUES, VALUES],
        layer_token_attr=[[VALUES], [VALUES]],
        starts_prompt=True,
    )
    assert is_cut(layers["b"]) == [True] * 3
    for normalize in (True, False):
        figure, _ = layers.plot_layer_attr(normalize=normalize)  # type: ignore[misc]
        assert "the first token reaches" in figure.axes[-1].get_ylabel()
    layers.starts_prompt = False
    figure, _ = layers.plot_layer_attr()  # type: ignore[misc]
    assert "reaches" not in figure.axes[-1].get_ylabel()
    plt.close("all")


def test_the_text_of_a_long_prompt_says_what_its_first_token_has() -> None:
    long = LLMAttributionResult(
        input_tokens=["Ġword"] * 80, output_tokens=["x"], seq_attr=[120.5] + [1.0] * 79
    )
    assert "the first token" not in long.to_text(color=False, width=200)
    long.starts_prompt = True
    text = long.to_text(color=False, width=200)
    assert "(colours stop at 1.00; the first token reaches 120.50)" in text


def test_labels_must_be_one_for_each_output_token() -> None:
    with pytest.raises(ValueError, match="output_labels: expected one for each of 1 output token"):
        result(None, output_labels=["a", "b"])
