"""Rows by sentence of the answer, their citations, and zooming into a feature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from captum_llm_ext import (
    LLMAttributionResult,
    TextTemplateInput,
    chat_input,
    cite,
    explain,
    segment_input,
    zoom,
)
from captum_llm_ext.inputs.statements import statements_of
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import PROMPT, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close

ANSWER = " Dave plays golf. His family includes friends."


def ids_of(text: str) -> Tensor:
    return torch.tensor(tiny_tokenizer().encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ANSWER, [" Dave plays golf.", " His family includes friends."]),
        ("golf", ["golf"]),
        ("...", ["..."]),
        ("1. golf\n2. hiking", ["1. golf", "\n2. hiking"]),
    ],
)
def test_sentences_of_an_answer(text: str, expected: list[str]) -> None:
    found = statements_of(ids_of(text), tiny_tokenizer())
    assert [t.strip() for t in found.texts] == [t.strip() for t in expected]
    assert "".join(found.texts) == text
    values = torch.arange(2.0 * len(found.statement_of)).view(-1, 2)
    parts = [values[a:b] for a, b in found.spans]
    assert_close(found.sums(values), torch.stack([part.sum(0) for part in parts]))
    assert_close(found.means(values.T, dim=1), torch.stack([p.mean(0) for p in parts], dim=1))


METHODS: dict[str, dict[str, Any]] = {
    "saliency": {"norm": "l2"},
    "gradxact": {},
    "ig": {"n_steps": 3},
    "ablation": {},
    "guided": {"max_evaluations": 6, "guide": None},
    "attention": {"reduction": "value_norm"},
    "flow": {},
}


@pytest.mark.filterwarnings("ignore:integrated gradients")  # three steps
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_for_each_statement(method: str, layered: bool) -> None:
    """The first is what the first sentence alone has; all in one, what the whole answer has."""
    options: dict[str, Any] = {"method": method, "by_output": "sentence", **METHODS[method]}
    if layered:
        if method in ("ablation", "guided"):
            pytest.skip("has no layers")
        options["layers"] = ["model.layers.1", "model.layers.2"]
    # A template, whose values span several tokens.
    inp = segment_input("Dave lives in Palm Coast and plays golf", by=r"\w+ \w+")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def found(target: Tensor) -> LLMAttributionResult:
        return explain(model, tokenizer, inp, target, **options)

    ids = ids_of(ANSWER)
    result = found(ids)
    (start, stop), _ = statements_of(ids, tokenizer).spans
    first = found(ids[start:stop])
    assert len(result.output_tokens) == 2
    assert result.output_tokens[0] == tokenizer.decode(ids[start:stop])
    assert result.token_attr is not None
    assert first.token_attr is not None
    if method != "guided":  # whose groups follow from the whole answer
        assert_close(result.token_attr[0], first.token_attr[0])
    assert_close(first.token_attr[0], first.seq_attr)
    assert LLMAttributionResult.from_json(result.to_json()) == result


@pytest.mark.filterwarnings("ignore:the tokenizer begins a target")
def test_translations_have_statements_too() -> None:
    model, tokenizer = tiny_seq2seq("t5"), tiny_tokenizer()
    tokens = explain(model, tokenizer, PROMPT, ANSWER, "ablation")
    result = explain(model, tokenizer, PROMPT, ANSWER, "ablation", by_output="sentence")
    assert tokens.token_attr is not None
    assert result.token_attr is not None
    assert result.token_attr.shape == (2, len(result.input_tokens))
    assert_close(result.token_attr.sum(0), tokens.token_attr.sum(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by_output": "word"}, "by_output must be one of token, sentence; got 'word'"),
        ({"include_per_token_attr": False}, "needs rows per target token"),
        ({"method": "kernelshap", "n_samples": 5}, "needs rows per target token"),
        ({"attr_target": "prob"}, "probabilities do not add up"),
        ({"method": "flow", "include_generated": True}, "no columns of generated tokens"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    options = {"method": "saliency", "by_output": "sentence", **options}
    with pytest.raises(ValueError, match=message):
        explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, ANSWER, **options)


CITED = LLMAttributionResult(
    input_tokens=["One.", "Two.", "Three."],
    output_tokens=[" First.", " Second."],
    seq_attr=[0.0, 0.0, 0.0],
    token_attr=[[0.5, -1.0, 2.0], [-1.0, -2.0, 0.0]],
)


def test_citations() -> None:
    first, second = cite(CITED)
    assert first.passages == [(2, "Three.", 2.0), (0, "One.", 0.5)]
    assert str(first) == "First.\n  2.00  [2] Three.\n  0.50  [0] One."
    assert (second.statement, second.passages) == (" Second.", [])
    assert cite(CITED, k=1)[0].passages == [(2, "Three.", 2.0)]
    with pytest.raises(ValueError, match="k must be an int of at least 1, got 0"):
        cite(CITED, k=0)
    rowless = LLMAttributionResult(input_tokens=["a"], output_tokens=["b"], seq_attr=[1.0])
    with pytest.raises(ValueError, match="no rows to cite for"):
        cite(rowless)


TEXT = "In Palm Coast. Dave plays golf.\n\nWhere? He"
SHORT = " plays golf. His family"


@pytest.mark.parametrize("feature", [0, -2, "In Palm Coast. Dave plays golf."])
@pytest.mark.parametrize("by_output", ["token", "sentence"])
def test_zoom_is_ablation_inside_the_feature(feature: int | str, by_output: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    inp = segment_input(TEXT, by="paragraph")
    passages = explain(model, tokenizer, inp, SHORT, "ablation", by_output=by_output)
    found = zoom(model, tokenizer, passages, feature)
    sentences = TextTemplateInput(
        "{} {}" + TEXT[TEXT.index("\n") :],
        ["In Palm Coast.", "Dave plays golf."],
    )
    expected = explain(model, tokenizer, sentences, SHORT, "ablation")
    assert found.input_tokens == expected.input_tokens
    assert_close(found.seq_attr, expected.seq_attr)
    words = zoom(model, tokenizer, found, 1, by="word", max_evaluations=3)
    assert words.input_tokens == ["Dave", "plays", "golf."]


def test_zoom_into_a_chat() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    inp = chat_input([{"role": "user", "content": TEXT}], tokenizer, by="message")
    result = explain(model, tokenizer, inp, SHORT, "ablation")
    assert len(zoom(model, tokenizer, result, 0).input_tokens) == 4


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"feature": 2}, IndexError, "has 2 features, and none with number 2"),
        ({"feature": "Anna"}, ValueError, "no feature is 'Anna'"),
        ({"by": r"\d"}, ValueError, r"has no part by"),
        ({"by": "("}, ValueError, "by must be one of word"),
        ({"method": "nothing"}, ValueError, "expected method to be one of"),
        ({"result": CITED}, ValueError, "this result has no input"),
        ({"result": "stored"}, ValueError, "does not know its target"),
        ({"result": "tokens"}, ValueError, "this result has TextTokenInput"),
    ],
)
def test_zoom_says_what_it_cannot_do(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = explain(model, tokenizer, segment_input(TEXT, by="paragraph"), " golf", "ablation")
    if change.get("result") == "stored":
        stored = LLMAttributionResult.from_json(result.to_json())
        stored.inp, stored.provenance = result.inp, None
        change = {"result": stored}
    if change.get("result") == "tokens":
        change = {"result": explain(model, tokenizer, PROMPT, " golf", "saliency")}
    with pytest.raises(kind, match=message):
        zoom(model, tokenizer, **{"result": result, "feature": 0, **change})
