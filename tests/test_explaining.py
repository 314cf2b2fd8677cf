"""`explain` picks the method, the layers and the input, and hands the rest on."""

from __future__ import annotations

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ShapleyValueSampling,
    TextTokenInput,
)
from captum.attr import LLMAttribution as CaptumLLMAttribution
from captum.attr import LLMGradientAttribution as CaptumLLMGradientAttribution

from captum_llm_ext import (
    LayerSaliency,
    LLMAttributionResult,
    LLMGradientAttribution,
    LLMLayerAttributionResult,
    explain,
)
from captum_llm_ext.registry import ATTENTION, METHODS
from tests.models.families import PROMPT, TARGET, CausalToy, tiny_model, tiny_tokenizer

BLOCKS = len(tiny_model("llama").model.layers)
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [("ig", LayerIntegratedGradients, {"n_steps": 3}), ("gradxact", LayerGradientXActivation, {})],
)
@pytest.mark.parametrize("layer", [None, "model.layers.1.mlp"])
def test_numbers_are_those_of_captum(model, tokenizer, method, kind, options, layer):
    result = explain(model, tokenizer, PROMPT, TARGET, method, layer, **options)
    module = model.get_submodule(layer or "model.embed_tokens")
    captum = CaptumLLMGradientAttribution(kind(model, module), tokenizer)
    expected = captum.attribute(TextTokenInput(PROMPT, tokenizer), target=TARGET, **options)
    torch.testing.assert_close(
        result.token_attr, expected.token_attr.float(), rtol=0, atol=_tolerance(expected)
    )
    assert result.input_tokens == expected.input_tokens
    assert result.output_tokens == expected.output_tokens


def _tolerance(expected) -> float:
    return 1e-4 * expected.token_attr.abs().max().item()


@pytest.mark.parametrize(
    ("method", "kind"), [("saliency", LayerSaliency), ("gradshap", LayerGradientShap)]
)
def test_other_methods_are_the_wrapper_with_the_named_method(model, tokenizer, method, kind):
    torch.manual_seed(0)
    result = explain(model, tokenizer, PROMPT, TARGET, method)
    torch.manual_seed(0)
    wrapper = LLMGradientAttribution(kind(model, model.model.embed_tokens), tokenizer)
    assert result == wrapper.attribute(TextTokenInput(PROMPT, tokenizer), target=TARGET)


@pytest.mark.parametrize(
    "layers",
    [
        "model.layers.*.mlp",
        ["model.layers.*.mlp"],
        [f"model.layers.{block}.mlp" for block in range(BLOCKS)],
    ],
)
@pytest.mark.parametrize("method", ["saliency", "ig"])
@pytest.mark.filterwarnings("error:Multiple layers")
def test_several_layers(model, tokenizer, layers, method):
    options = {"n_steps": 2} if method == "ig" else {}
    result = explain(model, tokenizer, PROMPT, TARGET, method, layers, **options)
    assert isinstance(result, LLMLayerAttributionResult)
    assert result.layer_names == [f"model.layers.{block}.mlp" for block in range(BLOCKS)]
    alone = explain(model, tokenizer, PROMPT, TARGET, method, "model.layers.1.mlp", **options)
    assert not isinstance(alone, LLMLayerAttributionResult)
    torch.testing.assert_close(result["model.layers.1.mlp"].token_attr, alone.token_attr)


def test_modules_serve_as_layers(model, tokenizer):
    modules = [model.model.layers[0], model.model.norm]
    result = explain(model, tokenizer, PROMPT, TARGET, layers=modules)
    assert isinstance(result, LLMLayerAttributionResult)
    assert result.layer_names == ["model.layers.0", "model.norm"]


def test_an_interpretable_input_is_taken_as_it_is(model, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer, skip_tokens=["<s>"])
    result = explain(model, tokenizer, inp, TARGET)
    assert result.inp is inp
    assert "<s>" not in result.input_tokens


@pytest.mark.parametrize("baselines", [9, "no such", ["pad", "unk"]])
@pytest.mark.parametrize("method", [n for n, row in METHODS.items() if not row.takes_baselines])
def test_methods_without_a_path_refuse_baselines(model, tokenizer, method, baselines):
    reads = METHODS[method].wrapper == ATTENTION
    kind, match = (TypeError, "baselines") if reads else (ValueError, "no path")
    with pytest.raises(kind, match=match):
        explain(model, tokenizer, PROMPT, TARGET, method, baselines=baselines)


@pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
@pytest.mark.parametrize("method", [n for n, row in METHODS.items() if row.takes_baselines])
def test_all_other_methods_take_them(model, tokenizer, method):
    few = {"ig": "n_steps", "conductance": "n_steps"}.get(method, "n_samples")
    without = ("ablation", "two_stage", "shapley", "guided", "surrogate")
    options = {} if method in without else {few: 10}
    layers = "model.layers.1" if method == "conductance" else None
    seen = []
    for baseline in (9, 17):
        torch.manual_seed(0)
        given = {"baselines": baseline, **options}
        found = explain(model, tokenizer, "Dave", TARGET, method, layers, **given)
        seen.append(found.seq_attr)
    assert not torch.allclose(*seen)


def test_messages_go_through_the_chat_template(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "Palm Coast"}]
    result = explain(model, tokenizer, messages, TARGET)
    assert tokenizer.convert_tokens_to_string(result.input_tokens) == "Palm Coast"


def test_keywords_reach_attribute(model, tokenizer):
    result = explain(
        model,
        tokenizer,
        PROMPT,
        gen_args={"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False},
        include_per_token_attr=False,
    )
    assert len(result.output_tokens) == 2
    assert result.token_attr is None


def test_a_target_of_ids(model, tokenizer):
    ids = tokenizer.encode(TARGET, add_special_tokens=False, return_tensors="pt")[0]
    assert explain(model, tokenizer, PROMPT, ids) == explain(model, tokenizer, PROMPT, TARGET)


def test_a_plain_module_needs_its_layer_named(tokenizer):
    toy = CausalToy()
    with pytest.raises(ValueError, match="cannot tell which layer of CausalToy"):
        explain(toy, tokenizer, PROMPT, TARGET)
    result = explain(toy, tokenizer, PROMPT, TARGET, layers="embedding")
    assert isinstance(result, LLMAttributionResult)


@pytest.mark.parametrize("method", ["", "IG", "shap"])
def test_unknown_method_names_those_there_are(model, tokenizer, method):
    with pytest.raises(ValueError, match=r"saliency, ig, .*, attention, flow, flow_rollout; got"):
        explain(model, tokenizer, PROMPT, TARGET, method)


@pytest.mark.parametrize("prompt", [7, None, b"bytes", ["a", "b"], [[1, 2]]])
def test_a_prompt_of_another_kind(model, tokenizer, prompt):
    with pytest.raises(TypeError, match="expected the prompt to be a string"):
        explain(model, tokenizer, prompt, TARGET)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt(model, tokenizer, prompt):
    with pytest.raises(ValueError):  # noqa: PT011 - the wording belongs to the inputs
        explain(model, tokenizer, prompt, TARGET)


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("ablation", FeatureAblation, {}),
        ("shapley_sampling", ShapleyValueSampling, {"n_samples": 2}),
        ("lime", Lime, {"n_samples": 5}),
        ("kernelshap", KernelShap, {"n_samples": 5}),
    ],
)
def test_perturbation_methods_are_captums(model, tokenizer, method, kind, options):
    torch.manual_seed(0)
    result = explain(model, tokenizer, PROMPT, TARGET, method, baselines=0, **options)
    torch.manual_seed(0)
    expected = CaptumLLMAttribution(kind(model), tokenizer).attribute(
        TextTokenInput(PROMPT, tokenizer),
        target=TARGET,
        forward_in_tokens=False,
        use_cached_outputs=False,
        **options,
    )
    difference = (result.seq_attr - expected.seq_attr).abs().max()
    assert difference <= 1e-4 * expected.seq_attr.abs().max()


def test_perturbation_methods_have_no_layers(model, tokenizer):
    with pytest.raises(ValueError, match=r"ablation .* has no layers"):
        explain(model, tokenizer, PROMPT, TARGET, "ablation", layers="q_proj")


def test_adaptive_quadrature_by_name(model, tokenizer):
    result = explain(model, tokenizer, PROMPT, TARGET, "ig", quadrature="adaptive")
    assert result.converged is True
    with pytest.raises(ValueError, match="belongs to 'ig'"):
        explain(model, tokenizer, PROMPT, TARGET, quadrature="adaptive")
