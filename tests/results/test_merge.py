"""Sub-words merged to words: their tokens and their values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_llm_ext import (
    LayerGradientXActivation,
    LayerSaliency,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
    chat_input,
    segment_input,
)
from captum_llm_ext.inputs.token_text import token_texts
from captum_llm_ext.results import LLMAttributionResult, LLMLayerAttributionResult
from tests.models.families import tiny_model, tiny_tokenizer

PROMPT = "Dave lived inside Palmyra and cooked golden Francs"


def saliency(inp, norm=None, layers=None, **options):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    layers = layers or model.get_input_embeddings()
    method = LayerSaliency(model, layers, norm) if norm else LayerGradientXActivation(model, layers)
    return LLMGradientAttribution(method, tokenizer).attribute(inp, target=" plays", **options)


def result(**changes) -> LLMAttributionResult:
    fields = {
        "input_tokens": ["Ġun", "believ", "able", "Ġnews"],
        "output_tokens": ["!", "?"],
        "seq_attr": [1.0, -2.0, 2.0, 4.0],
        "token_attr": [[1.0, -2.0, 2.0, 4.0], [0.0, 3.0, 4.0, -1.0]],
    }
    return LLMAttributionResult(**(fields | changes))


def test_attributions_of_a_word_are_the_sum_of_its_tokens():
    merged = result().merge("word")
    assert merged.input_tokens == [" unbelievable", " news"]
    assert merged.seq_attr.tolist() == [1.0, 4.0]
    assert merged.token_attr.tolist() == [[1.0, 4.0], [7.0, -1.0]]
    assert merged.output_tokens == result().output_tokens


@given(st.lists(st.text(max_size=4) | st.sampled_from(["ðŁ", "ĺ", "Ģ", "Ġa", "'"]), min_size=1))
def test_merging_keeps_the_text_and_the_sums(tokens):
    values = torch.arange(1.0, len(tokens) + 1)
    merged = LLMAttributionResult(
        input_tokens=["Ġ", *tokens], output_tokens=["b"], seq_attr=torch.cat([values[:1], values])
    ).merge()
    assert "".join(merged.input_tokens) == "".join(token_texts(["Ġ", *tokens]))
    assert merged.seq_attr.sum() == 1 + values.sum()
    assert all(merged.input_tokens)


@pytest.mark.parametrize(("norm", "value"), [("l1", 7.0), ("l2", 5.0), ("linf", 4.0)])
def test_norms_combine_as_norms_do(norm, value):
    merged = result(seq_attr=[0.0, 3.0, 4.0, 1.0], token_attr=None, norm=norm).merge()
    assert merged.seq_attr.tolist() == [value, 1.0]
    assert merged.norm == norm


@pytest.mark.parametrize("norm", [None, "l1", "l2", "linf"])
@pytest.mark.parametrize("layers", [None, ["model.embed_tokens", "model.layers.1.mlp"]])
def test_merged_tokens_equal_an_attribution_whose_features_are_the_words(norm, layers):
    """`segment_input` attributes by the whole gradient of each word, not by values of tokens."""
    inp = TextTokenInput(PROMPT, tiny_tokenizer(), skip_tokens=["<s>"])
    merged = saliency(inp, norm, layers).merge("word")
    by_word = saliency(segment_input(PROMPT, by="word"), norm, layers)
    assert len(inp.values) > 2.5 * len(merged.input_tokens)
    assert [token.strip() for token in merged.input_tokens] == list(by_word.input_tokens)
    torch.testing.assert_close(merged.seq_attr, by_word.seq_attr)
    torch.testing.assert_close(merged.token_attr, by_word.token_attr)
    if layers:
        torch.testing.assert_close(merged.layer_token_attr, by_word.layer_token_attr)


def test_everything_else_is_kept():
    more = {
        "output_probs": [-1.0, -2.0],
        "convergence_delta": torch.tensor([0.5, 0.25]),
        "n_evaluations": 7,
        "converged": False,
    }
    merged = result(**more, hidden_attr=torch.ones(2, 4, 3)).merge()
    for name, value in more.items():
        assert torch.equal(torch.as_tensor(getattr(merged, name)), torch.as_tensor(value))
    assert merged.hidden_attr.tolist() == [[[3.0] * 3, [1.0] * 3]] * 2


def test_each_layer_is_merged():
    values = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    layered = LLMLayerAttributionResult(
        input_tokens=["Ġa", "b"],
        output_tokens=["c"],
        layer_names=["x", "y"],
        layer_seq_attr=values,
        hidden_attr={"y": torch.ones(1, 2, 3)},
        norm="l2",
    )
    merged = layered.merge()
    assert merged.layer_seq_attr.tolist() == [[5.0], [2.0]]
    assert merged.seq_attr.tolist() == [3.5]  # the mean of the merged layers
    assert merged["y"] == layered["y"].merge()
    assert LLMAttributionResult.from_json(merged.to_json()) == merged


def test_spans():
    merged = result().merge([(2, 4), (0, 1)])
    assert merged.input_tokens == [" un", "believ", "able news"]
    assert merged.seq_attr.tolist() == [1.0, -2.0, 6.0]
    assert result().merge([]).seq_attr.tolist() == result().seq_attr.tolist()


@pytest.mark.parametrize(
    "spans",
    [
        "words",
        [(0, 2), (1, 3)],
        [(0, 5)],
        [(4, 5)],
        [(2, 2)],
        [(3, 1)],
        [(-1, 2)],
        [(0.5, 2)],
        [3],
        3,
    ],
)
def test_spans_that_cannot_be_merged_are_refused(spans):
    with pytest.raises(ValueError, match="merge: expected"):
        result().merge(spans)


def test_words_are_merged_once():
    once = result().merge()
    assert once.merge() == once


def test_values_of_a_template_are_words_already():
    inp = TextTemplateInput("{} lives in {}{} and", ["Dave", "Palm", "Coast"])
    by_value = saliency(inp)
    assert by_value.merge().input_tokens == by_value.input_tokens
    assert LLMAttributionResult.from_json(by_value.to_json()).merge() == by_value
    assert by_value.merge([(1, 3)]).input_tokens == ["Dave", "Palm Coast"]
    grouped = TextTemplateInput("{} lives in {}", ["Dave", "Palm"], mask=[0, 0])
    with pytest.raises(ValueError, match="mask"):
        saliency(grouped).merge([(0, 2)])


def test_messages_of_a_chat_do_not_run_together():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}-{% endfor %}"
    messages = [{"role": "user", "content": "lives"}, {"role": "user", "content": "in"}]
    inp = chat_input(messages, tokenizer)
    assert saliency(inp).merge().input_tokens == ["lives", "in"]


def test_plots_and_tables_of_words():
    table = result().to_text(color=False, width=80, merge="word")
    assert "unbelievable" in table
    labels = result().plot_token_attr(merge="word")[1].get_xticklabels()
    assert [label.get_text() for label in labels] == ["unbelievable", "news"]
    labels = result().plot_seq_attr(merge=[(0, 2)])[1].get_xticklabels()
    assert [label.get_text() for label in labels] == ["unbeliev", "able", "news"]
