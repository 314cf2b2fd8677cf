"""The model is as before: after success, an exception, and Ctrl-C."""

from __future__ import annotations

import gc
import weakref
from itertools import count
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientShap, LayerGradientXActivation, LayerIntegratedGradients
from torch import nn

from captum_llm_ext import LayerRelevance, LayerSaliency
from tests.models.families import BidirectionalToy, tiny_model
from tests.oracles.cases import (
    assert_close,
    captum_attribution,
    in_pairs,
    our_attribution,
    prompt_input,
    target_ids,
)

METHODS = [
    LayerIntegratedGradients,
    LayerGradientXActivation,
    LayerGradientShap,
    LayerSaliency,
    LayerRelevance,
]
LAYERS = {
    "embedding": "model.embed_tokens",
    "high block": "model.layers.2",  # the blocks under it are replayed
    "list": ["model.embed_tokens", "model.layers.1.mlp", "model.layers.2.self_attn.q_proj"],
}
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about the model that an attribution touches on its way."""
    parts: dict[Any, Any] = {"grad enabled": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        parts[name, "training"] = module.training
        parts[name, "forward"] = module.__dict__.get("forward")
        for hooks in HOOKS:
            parts[name, hooks] = dict(getattr(module, hooks, {}))
    for name, parameter in model.named_parameters():
        parts[name] = (parameter.requires_grad, parameter.grad is None, parameter._version)
    return parts


def prepared() -> nn.Module:
    """A model that its owner has set up, with flags, a hook and a wrapped forward."""
    model = tiny_model("llama", fresh=True)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    block = model.model.layers[1]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    model.model.layers[2].train()
    return model


def attribute(model: nn.Module, method: Any, layer: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("target", target_ids(2))
    return our_attribution(method, model, layer, prompt_input(), **kwargs)


def test_saliency_leaves_the_model_as_before() -> None:
    model = tiny_model("llama", fresh=True)
    before = state(model)
    attribute(model, LayerSaliency, "model.embed_tokens")
    assert state(model) == before


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_after_success(method: Any, layer: Any) -> None:
    model = prepared()
    before = state(model)
    attribute(model, method, layer)
    assert state(model) == before


class Failing:
    """A forward that fails the n-th time it is called."""

    def __init__(self, module: nn.Module, call: int, error: type[BaseException]) -> None:
        self.inner, self.call, self.error = module.forward, call, error
        self.calls = count(1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if next(self.calls) == self.call:
            raise self.error("stopped by the test")
        return self.inner(*args, **kwargs)


@in_pairs(layer=list(LAYERS), call=[1, 2, 3, 4], error=[RuntimeError, KeyboardInterrupt])
def test_after_an_exception_in_the_model(layer: str, call: int, error: type[BaseException]) -> None:
    model = prepared()
    last = model.model.layers[3].mlp
    last.forward = Failing(last, call, error)
    before = state(model)
    with pytest.raises(error, match="stopped by the test"):
        attribute(model, LayerIntegratedGradients, LAYERS[layer], n_steps=6, internal_batch_size=1)
    assert state(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS)
def test_after_an_exception_in_the_backward(method: Any, error: type[BaseException]) -> None:
    model = prepared()

    def stop(_: torch.Tensor) -> None:
        raise error("stopped by the test")

    def attach(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(stop)

    model.model.norm.register_forward_hook(attach)
    before = state(model)
    with pytest.raises(error, match="stopped by the test"):
        attribute(model, method, "model.layers.0")
    assert state(model) == before


def test_the_call_after_a_failure_is_right() -> None:
    model = tiny_model("llama", fresh=True)
    layer = model.model.layers[2]
    model.lm_head.forward = Failing(model.lm_head, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        attribute(model, LayerIntegratedGradients, layer, internal_batch_size=1)
    del model.lm_head.forward
    expected = captum_attribution(
        LayerIntegratedGradients, model, layer, prompt_input(), target=target_ids(2)
    )
    assert_close(attribute(model, LayerIntegratedGradients, layer).token_attr, expected.token_attr)


def test_token_by_token_path_restores_too() -> None:
    model = BidirectionalToy()
    before = state(model)
    our_attribution(
        LayerIntegratedGradients, model, model.layer, prompt_input(), target=target_ids(2)
    )
    assert state(model) == before


def _tensors() -> int:
    gc.collect()
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_repeated_calls_keep_no_tensors(method: Any, layer: Any) -> None:
    model = tiny_model("llama")
    attribute(model, method, layer)
    before = _tensors()
    for _ in range(3):
        attribute(model, method, layer)
    assert _tensors() <= before


def test_a_model_can_be_freed_after_use() -> None:
    model = tiny_model("qwen2", fresh=True)
    attribute(model, LayerIntegratedGradients, "model.layers.2")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
