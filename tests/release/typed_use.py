"""A user's script, for the type checker: what the public names give is known, and none is Any.

`make lint` checks it here, `make dist` from the installed wheel; a test runs it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import assert_type

from captum_llm_ext import (
    FeatureAblation,
    LayerSaliency,
    LLMAttentionAttribution,
    LLMAttentionAttributionResult,
    LLMAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
    explain,
    find_layers,
    segment_input,
)


def use(model: nn.Module, tokenizer: Any) -> None:
    layers = assert_type(find_layers(model, "mlp"), dict[str, nn.Module])
    inp = TextTokenInput("Dave lives in Palm Coast", tokenizer)
    template = assert_type(segment_input("Dave plays golf", by="word"), TextTemplateInput)

    gradients = LLMGradientAttribution(LayerSaliency(model, list(layers.values())), tokenizer)
    result = assert_type(gradients.attribute(inp, target=" golf"), LLMAttributionResult)
    assert_type(result.seq_attr, Tensor)
    assert_type(result.token_attr, Tensor | None)
    assert_type(result.convergence_delta, Tensor | None)
    assert_type(result.to_text(color=False), str)
    assert_type(result.merge("word"), LLMAttributionResult)

    perturbation = LLMAttribution(FeatureAblation(model), tokenizer)
    assert_type(perturbation.attribute(template, target=" golf"), LLMAttributionResult)
    attention = LLMAttentionAttribution(model, tokenizer).attribute(inp, target=" golf")
    assert_type(attention, LLMAttentionAttributionResult)
    assert_type(attention.attention, Tensor)
    assert_type(explain(model, tokenizer, "Dave plays", " golf"), LLMAttributionResult)
