"""Every warning points at the line that called the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from captum_llm_ext import (
    FeatureAblation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    explain,
)
from tests.models.families import BidirectionalToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import prompt_input, target_ids


def gradients(model: Any, layer: str, **options: Any) -> Any:
    method = LayerIntegratedGradients(model, model.get_submodule(layer))
    attribution = LLMGradientAttribution(method, tiny_tokenizer())
    return attribution.attribute(prompt_input(), target=target_ids(2), **options)


def ablation(model: Any) -> Any:
    attribution = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    return attribution.attribute(prompt_input(), target=target_ids(2))


def with_dropout() -> Any:
    model = tiny_model("gpt2", fresh=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


CASES: dict[str, Callable[[], Any]] = {
    "have not converged": lambda: gradients(tiny_model("llama"), "model.embed_tokens", n_steps=2),
    "max_evaluations": lambda: gradients(
        tiny_model("llama"), "model.embed_tokens", method="adaptive", tol=1e-9, max_rows=30
    ),
    "is not causal": lambda: ablation(BidirectionalToy()),
    "16|bfloat16": lambda: gradients(
        tiny_model("llama", fresh=True).bfloat16(), "model.embed_tokens", n_steps=2
    ),
    "training mode": lambda: ablation(with_dropout()),
    "sums of attributions": lambda: explain(
        tiny_model("llama"), tiny_tokenizer(), "The capital", target_ids(2), "ig", n_steps=2
    ),
}


@pytest.mark.parametrize("message", CASES)
def test_a_warning_names_the_line_of_the_caller(message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        CASES[message]()
    assert {warning.filename for warning in caught} == {__file__}
