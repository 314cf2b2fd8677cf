"""The small real model: Captum's numbers, the obvious word, and the Llama-3 notebook's list."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients, TextTokenInput
from torch import Tensor, nn

from captum_llm_ext import LayerSaliency
from tests.oracles.cases import STEPS, assert_close, captum_attribution, our_attribution
from tests.oracles.gradients import Problem, gradient_x_activation, integrated_gradients

pytestmark = pytest.mark.real_model

LAYERS = {
    "embeddings": "model.embed_tokens",
    "middle block": "model.layers.15",
    "mlp": "model.layers.15.mlp",
}
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " playing golf, hiking, and spending time with his family and friends."
GOLF = " playing golf,"
# Float32 errors relative to the summed terms. A path is steep at its start and multiplies rounding.
ROUNDING = {LayerIntegratedGradients: 2e-4, LayerGradientXActivation: 1e-5}

each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
each_method = pytest.mark.parametrize("method", ROUNDING)


@pytest.fixture(scope="module")
def wide_model(demo_model: tuple[Any, Any]) -> tuple[Any, Any]:
    """The small real model in float64; its norms too, which transformers computes in float32."""
    model = deepcopy(demo_model[0]).double()
    norms = {name: part for name, part in model.named_modules() if name.endswith("norm")}
    for name, norm in norms.items():
        wide = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
        wide.weight = norm.weight
        model.set_submodule(name, wide)
    return model, demo_model[1]


@each_layer
@each_method
def test_equals_captum(wide_model: tuple[Any, Any], method: Any, layer: str) -> None:
    """In float64, where rounding is too small to count even if a sum cancels."""
    result, expected = ours_and_captums(method, wide_model, layer)
    assert result.output_tokens == expected.output_tokens
    assert_close(result.token_attr, expected.token_attr, 1e-5)
    assert_close(result.seq_attr, expected.seq_attr, 1e-5)


@each_layer
@each_method
def test_equals_captum_in_float32(demo_model: Any, method: Any, layer: str) -> None:
    """Rounding is relative to the terms of a sum: it can be large against a sum that cancels."""
    result, expected = ours_and_captums(method, demo_model, layer)
    allowed = ROUNDING[method] * summed_terms(method, demo_model, layer)
    assert result.output_tokens == expected.output_tokens
    assert (result.token_attr - expected.token_attr).abs().max() <= allowed.max()
    assert (result.seq_attr - expected.seq_attr).abs().max() <= allowed.sum(0).max()


def ours_and_captums(method: Any, demo: tuple[Any, Any], layer: str) -> tuple[Any, Any]:
    model, tokenizer = demo
    inp = TextTokenInput(PROMPT, tokenizer)
    both = {"target": GOLF, "tokenizer": tokenizer}
    module = model.get_submodule(layer)
    expected = captum_attribution(method, model, module, inp, **both)
    return our_attribution(method, model, module, inp, **both), expected


def summed_terms(method: Any, demo: tuple[Any, Any], layer: str) -> Tensor:
    """Σ over hidden units of |attribution| (n_output, n_input), from the formulas."""
    model, tokenizer = demo
    inp = TextTokenInput(PROMPT, tokenizer)
    prompt = inp.inp_tensor[0]
    target = torch.tensor(tokenizer.encode(GOLF, add_special_tokens=False))
    baseline = torch.full_like(prompt, inp.baselines)
    asked = Problem(model, [model.get_submodule(layer)], prompt, target, baseline)
    if method is LayerIntegratedGradients:
        rows = integrated_gradients(asked, STEPS).attributions[0]
    else:
        rows = gradient_x_activation(asked)[0]
    return rows.abs().sum(-1)[:, : len(prompt)]


@pytest.mark.parametrize(("country", "capital"), [("France", " Paris"), ("Japan", " Tokyo")])
def test_saliency_finds_the_country(demo_model: Any, country: str, capital: str) -> None:
    model, tokenizer = demo_model
    inp = TextTokenInput(f"The capital of {country} is", tokenizer)
    result = our_attribution(
        LayerSaliency, model, "model.embed_tokens", inp, target=capital, tokenizer=tokenizer
    )
    # the first token is the attention sink of a model without a start token
    order = result.seq_attr[1:].argsort(descending=True) + 1
    highest = [result.input_tokens[i].strip("Ġ ▁") for i in order[:2].tolist()]
    assert country in highest


def test_list_of_the_llama_3_notebook(demo_model: Any) -> None:
    model, tokenizer = demo_model
    inp = TextTokenInput(PROMPT, tokenizer)
    parts = ("q_proj", "k_proj", "v_proj", "mlp")
    layers = ["model.embed_tokens", *parts, "model.rotary_emb"]
    result = our_attribution(
        LayerGradientXActivation, model, layers, inp, target=TARGET, tokenizer=tokenizer
    )
    blocks = model.config.num_hidden_layers
    count = inp.inp_tensor.shape[1]
    assert len(result.layer_names) == 4 * blocks + 2
    assert result.layer_token_attr.shape == (4 * blocks + 2, 14, count)
    assert torch.isfinite(result.layer_token_attr).all()
    names = list(result.layer_names)
    assert (result.layer_seq_attr[names.index("model.rotary_emb")] == 0).all()
    alone = our_attribution(
        LayerGradientXActivation,
        model,
        "model.layers.20.self_attn.v_proj",
        inp,
        target=TARGET,
        tokenizer=tokenizer,
    )
    assert_close(result["model.layers.20.self_attn.v_proj"].token_attr, alone.token_attr)


def test_integrated_gradients_of_a_few_layers_at_once(wide_model: tuple[Any, Any]) -> None:
    model, tokenizer = wide_model
    inp = TextTokenInput("The capital of France is", tokenizer)
    names = ["model.layers.3.mlp", "model.layers.25"]
    both = {"target": " Paris.", "tokenizer": tokenizer}
    result = our_attribution(LayerIntegratedGradients, model, names, inp, **both)
    for name in names:
        layer = model.get_submodule(name)
        expected = captum_attribution(LayerIntegratedGradients, model, layer, inp, **both)
        assert_close(result[name].token_attr, expected.token_attr, 1e-5)
