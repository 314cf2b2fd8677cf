"""What docs/moving/captum.md says that Captum 0.9.0 cannot do, run with Captum itself."""

from __future__ import annotations

from typing import Any

import captum.attr
import matplotlib
import matplotlib.pyplot
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTemplateInput,
)

from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import prompt_input, target_ids

ANY_ERROR = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def by_gradient(method: Any, layer: Any, inp: Any = None, **options: Any) -> Any:
    model = tiny_model("llama")
    layers = [model.get_submodule(name) for name in layer.split()]
    attribution = method(model, layers if len(layers) > 1 else layers[0])
    wrapper = captum.attr.LLMGradientAttribution(attribution, tiny_tokenizer())
    return wrapper.attribute(inp or prompt_input(), target=target_ids(2), **options)


@pytest.mark.parametrize(
    ("method", "layer", "options"),
    [
        (LayerGradientXActivation, "model.layers.0.mlp model.layers.1.mlp", {}),
        (LayerIntegratedGradients, "model.layers.1.self_attn", {"n_steps": 2}),
        (
            LayerIntegratedGradients,
            "model.embed_tokens",
            {"n_steps": 2, "return_convergence_delta": True},
        ),
        (
            LayerIntegratedGradients,
            "model.embed_tokens",
            {"n_steps": 2, "inp": TextTemplateInput("{} lives", ["Dave"])},
        ),
    ],
    ids=["several layers", "several outputs", "convergence delta", "template"],
)
def test_gradients(method: Any, layer: str, options: dict[str, Any]) -> None:
    with pytest.raises(ANY_ERROR):
        by_gradient(method, layer, **options)


def test_batches_of_perturbations() -> None:
    attribution = FeatureAblation(tiny_model("llama"))
    wrapper = captum.attr.LLMAttribution(attribution, tiny_tokenizer())
    with pytest.raises(ANY_ERROR):
        wrapper.attribute(prompt_input(), target=target_ids(2), perturbations_per_eval=3)


def test_width_of_a_plot_of_600_tokens() -> None:
    matplotlib.use("Agg")
    result = captum.attr.LLMAttributionResult(
        input_tokens=["a"] * 600,
        output_tokens=["b"],
        seq_attr=torch.ones(600),
        token_attr=torch.ones(1, 600),
    )
    figure, _ = result.plot_token_attr()
    assert figure.get_size_inches()[0] * 100 == pytest.approx(78_000)
    matplotlib.pyplot.close(figure)
