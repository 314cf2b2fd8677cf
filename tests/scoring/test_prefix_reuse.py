"""What precedes all features comes from the key/value cache: the same numbers, fewer tokens run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTemplateInput,
)

from captum_llm_ext import LayerSaliency, LLMAttribution, LLMGradientAttribution
from captum_llm_ext.compat import DynamicLayer
from tests.models.families import (
    FAMILIES,
    BidirectionalToy,
    layer_names,
    tiny_model,
    tiny_tokenizer,
)
from tests.oracles.cases import target_ids

VALUES = (" golf", " golf hiking and golf")
PREFIX = "The capital of France is Paris and the capital of Japan is Tokyo. "
METHODS = (LayerIntegratedGradients, LayerGradientXActivation, LayerSaliency)


def attribute(method: Any, model: Any, layer: Any, **options: Any) -> Any:
    inp = TextTemplateInput(PREFIX + "{} lives in {} and", ["Dave", "Palm Coast"])
    wrapper = LLMGradientAttribution(method(model, layer), tiny_tokenizer())
    if method is LayerIntegratedGradients:
        options = {"n_steps": 4, **options}
    return wrapper.attribute(inp, target_ids(3), **options)


@pytest.mark.parametrize("kind", ["embedding", "block", "attention_projection"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers(family: str, method: Any, kind: str) -> None:
    model, layer = tiny_model(family), layer_names(family)[kind]
    with_cache = attribute(method, model, layer)
    without = attribute(method, model, layer, reuse_prefix=False)
    # Gradient x activation before a norm is zero but for rounding.
    allowed = max(1e-4 * without.token_attr.abs().max().item(), 1e-5)
    assert (with_cache.token_attr - without.token_attr).abs().max() <= allowed
    assert (with_cache.seq_attr - without.seq_attr).abs().max() <= allowed
    if without.convergence_delta is not None:
        scale = 1e-4 * without.token_attr.abs().sum().clamp(min=1)
        assert (with_cache.convergence_delta - without.convergence_delta).abs().max() <= scale


@pytest.mark.parametrize("options", [{"include_hidden_attr": True}, {"include_generated": True}])
def test_same_shapes_and_numbers_with(options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with_cache, without = (
        attribute(LayerIntegratedGradients, model, "model.layers.1", reuse_prefix=reuse, **options)
        for reuse in (True, False)
    )
    torch.testing.assert_close(with_cache.token_attr, without.token_attr, atol=1e-5, rtol=1e-4)
    if with_cache.hidden_attr is not None:
        torch.testing.assert_close(
            with_cache.hidden_attr, without.hidden_attr, atol=1e-5, rtol=1e-4
        )


def test_fewer_tokens_are_run() -> None:
    model, counts = tiny_model("llama"), []
    for reuse in (True, False):
        seen: list[int] = []
        counter = model.model.layers[0].register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].shape[0] * args[0].shape[1])
        )
        try:
            attribute(LayerIntegratedGradients, model, "model.embed_tokens", reuse_prefix=reuse)
        finally:
            counter.remove()
        counts.append(sum(seen))
    assert counts[0] < 0.7 * counts[1]


def test_a_model_without_a_cache_or_not_causal_is_served_too() -> None:
    model = BidirectionalToy()
    with_cache, without = (
        attribute(LayerIntegratedGradients, model, "layer", reuse_prefix=reuse)
        for reuse in (True, False)
    )
    assert torch.equal(with_cache.token_attr, without.token_attr)


def test_a_prefix_as_long_as_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline's prompt goes on behind the whole prompt; older versions crop to 0 tokens."""
    crop = DynamicLayer.crop

    def to_nothing(layer: DynamicLayer, max_length: int) -> None:
        if max_length == 0:
            layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
        else:
            crop(layer, max_length)

    monkeypatch.setattr(DynamicLayer, "crop", to_nothing)
    model, target = tiny_model("llama"), target_ids(1)
    inp = TextTemplateInput("Dave lives in Palm Coast and plays{}", [VALUES[0]], [VALUES[1]])
    attribution = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    found = attribution.attribute(inp, target=target, internal_batch_size=1)
    prompts = [tiny_tokenizer()(f"Dave lives in Palm Coast and plays{v}") for v in VALUES]
    ids = [torch.tensor([prompt.input_ids]) for prompt in prompts]
    scores = [model(i).logits[0, -1].log_softmax(-1)[target] for i in ids]
    torch.testing.assert_close(found.seq_attr, (scores[0] - scores[1]).detach())
