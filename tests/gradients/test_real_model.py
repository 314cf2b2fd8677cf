"""The small real model: Captum's numbers, the obvious word, and the Llama-3 notebook's list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients, TextTokenInput

from captum_llm_ext import LayerSaliency
from tests.oracles.cases import assert_close, captum_attribution, our_attribution

pytestmark = pytest.mark.real_model

LAYERS = {
    "embeddings": "model.embed_tokens",
    "middle block": "model.layers.15",
    "mlp": "model.layers.15.mlp",
}
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " playing golf, hiking, and spending time with his family and friends."


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("method", [LayerIntegratedGradients, LayerGradientXActivation])
def test_equals_captum(demo_model: Any, method: Any, layer: str) -> None:
    model, tokenizer = demo_model
    inp = TextTokenInput(PROMPT, tokenizer)
    both = {"target": " playing golf,", "tokenizer": tokenizer}
    module = model.get_submodule(layer)
    expected = captum_attribution(method, model, module, inp, **both)
    result = our_attribution(method, model, module, inp, **both)
    assert result.output_tokens == expected.output_tokens
    assert_close(result.token_attr, expected.token_attr)
    assert_close(result.seq_attr, expected.seq_attr)


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


def test_integrated_gradients_of_a_few_layers_at_once(demo_model: Any) -> None:
    model, tokenizer = demo_model
    inp = TextTokenInput("The capital of France is", tokenizer)
    names = ["model.layers.3.mlp", "model.layers.25"]
    both = {"target": " Paris.", "tokenizer": tokenizer}
    result = our_attribution(LayerIntegratedGradients, model, names, inp, **both)
    for name in names:
        layer = model.get_submodule(name)
        expected = captum_attribution(LayerIntegratedGradients, model, layer, inp, **both)
        assert_close(result[name].token_attr, expected.token_attr)
