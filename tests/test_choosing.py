"""Where no method is named: "flow" where it can be, "saliency" for every other call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from captum_llm_ext import (
    LayerSaliency,
    LLMAttentionAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
    explain,
    segment_input,
)
from captum_llm_ext.choosing import automatic_methods, first_that_reads
from captum_llm_ext.explaining import check_options
from captum_llm_ext.model.suitability import UnreadableAttentionError
from captum_llm_ext.registry import WITHOUT_EFFECT
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import PROMPT, TARGET, CausalToy, tiny_model, tiny_tokenizer
from tests.models.question_answering import qa_tokenizer, tiny_qa
from tests.oracles.attention import family_model
from tests.oracles.cases import target_ids

TEMPLATE = TextTemplateInput("{} lives in {}", ["Dave", "Palm Coast"])


def saliency(model: Any, inp: Any, layer: nn.Module | None = None, **options: Any) -> Any:
    """By the wrapper, and not by `explain`."""
    layer = model.get_input_embeddings() if layer is None else layer
    wrapper = LLMGradientAttribution(LayerSaliency(model, layer), tiny_tokenizer())
    return wrapper.attribute(inp, TARGET, **options)


@pytest.mark.parametrize("options", [{}, {"include_per_token_attr": False}])
@pytest.mark.parametrize(
    "inp", [TextTokenInput(PROMPT, tiny_tokenizer()), TEMPLATE, segment_input(PROMPT, by="word")]
)
def test_flow_is_the_default(inp: Any, options: dict[str, Any]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = explain(model, tokenizer, inp, TARGET, **options)
    expected = LLMAttentionAttribution(model, tokenizer, reduction="flow").attribute(
        inp, TARGET, **options
    )
    assert type(result) is LLMAttributionResult  # as small as that of any other method
    assert result.method == "flow"
    assert torch.equal(result.seq_attr, expected.seq_attr)
    assert (result.token_attr is None) == bool(options)
    if result.token_attr is not None:
        assert torch.equal(result.token_attr, expected.token_attr)


def test_the_result_says_which_method_it_has() -> None:
    result = explain(tiny_model("llama"), tiny_tokenizer(), "Palm Coast", " golf")
    assert "output token, flow, " in repr(result)
    assert result.to_text(color=False).splitlines()[0].endswith("output token, flow")
    assert LLMAttributionResult.from_json(result.to_json()).method == "flow"
    assert result.merge("word").method == "flow"
    named = explain(tiny_model("llama"), tiny_tokenizer(), "Palm Coast", " golf", "gradxact")
    assert named.method == "gradxact"


@pytest.mark.parametrize(
    "options",
    [
        {"contrast_target": torch.tensor([7])},
        {"attr_target": "logit"},
        {"norm": "l2"},
    ],
)
def test_an_option_that_flow_lacks(options: dict[str, Any]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = explain(model, tokenizer, PROMPT, TARGET, **options)
    assert result.method == "saliency"
    assert result == explain(model, tokenizer, PROMPT, TARGET, "saliency", **options)
    assert automatic_methods(model, options=dict.fromkeys(options)) == ("flow", "saliency")


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_an_option_that_changes_no_result_changes_no_method(name: str) -> None:
    model, tokenizer, options = tiny_model("llama"), tiny_tokenizer(), {name: 1}
    check_options(model, tokenizer, None, None, options)
    assert explain(model, tokenizer, PROMPT, TARGET, **options).method == "flow"


def test_layers_have_saliency() -> None:
    model: Any = tiny_model("llama")
    inp, mlp = TextTokenInput(PROMPT, tiny_tokenizer()), model.model.layers[1].mlp
    expected = saliency(model, inp, mlp)
    assert explain(model, tiny_tokenizer(), inp, TARGET, layers="model.layers.1.mlp") == expected
    layered: Any = explain(model, tiny_tokenizer(), inp, TARGET, layers=["model.layers.?", "mlp"])
    assert layered.method == layered["model.layers.1.mlp"].method == "saliency"
    assert torch.equal(layered["model.layers.1.mlp"].seq_attr, expected.seq_attr)


@pytest.mark.parametrize("options", [{"n_steps": 3}, {"heads": [0]}, {"reduction": "max"}])
def test_what_no_method_of_the_rule_takes_is_refused_as_before(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="|".join(options)):
        explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, TARGET, **options)


def two_attentions_of_one_block() -> nn.Module:
    """A block runs twice, which shows only when the model runs."""
    model: Any = tiny_model("llama", fresh=True)
    model.model.layers[1] = model.model.layers[0]
    return model


@pytest.mark.filterwarnings("ignore:the tokenizer begins a target")
@pytest.mark.parametrize(
    ("build", "methods"),
    [
        (lambda: family_model("mamba"), ("saliency",)),
        (lambda: tiny_seq2seq("t5"), ("saliency",)),
        (two_attentions_of_one_block, ("flow", "saliency")),
    ],
)
def test_a_model_whose_attention_cannot_be_read(build: Any, methods: tuple[str, ...]) -> None:
    model, inp = build(), TextTokenInput(PROMPT, tiny_tokenizer())
    assert automatic_methods(model) == methods
    result = explain(model, tiny_tokenizer(), inp, TARGET)
    assert result.method == "saliency"
    assert result == saliency(model, inp)


def test_question_answering_and_plain_modules() -> None:
    questions, toy = tiny_qa("bert"), CausalToy()
    assert automatic_methods(questions) == automatic_methods(toy) == ("saliency",)
    answer = explain(questions, qa_tokenizer("bert"), "Who plays?", "Dave", context="Dave plays")
    assert answer.method == "saliency"
    result = explain(toy, tiny_tokenizer(), PROMPT, target_ids(2), layers="embedding")
    assert result.method == "saliency"


def test_an_error_of_the_request_is_no_reason_for_another_method() -> None:
    tried = []

    def run(name: str) -> None:
        tried.append(name)
        raise ValueError("no target")

    with pytest.raises(ValueError, match="no target"):
        first_that_reads(("flow", "saliency"), run)
    assert tried == ["flow"]


@pytest.mark.filterwarnings("ignore:the tokenizer begins a target")
@pytest.mark.parametrize(
    "build",
    [
        CausalToy,
        lambda: tiny_qa("bert"),
        lambda: family_model("mamba"),
        lambda: tiny_seq2seq("t5"),
        two_attentions_of_one_block,
    ],
)
def test_flow_says_what_to_use_instead(build: Any) -> None:
    inp = TextTokenInput(PROMPT, tiny_tokenizer())
    with pytest.raises(UnreadableAttentionError, match=r"gradients .* and by perturbation .* need"):
        LLMAttentionAttribution(build(), tiny_tokenizer(), reduction="flow").attribute(inp, TARGET)
