"""The model, the random numbers and the memory come back as they were found."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor

from captum_llm_ext import LLMAttribution
from tests.model.test_restore import Failing, _tensors, prepared, state
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    INPUTS,
    METHODS,
    VALUES,
    captums,
    ours,
    rows,
    template_input,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def attribute(inp: Any = None, method: str = "feature_ablation", /, **kwargs: Any) -> Any:
    kwargs.setdefault("target", target_ids(2))
    model = kwargs.pop("model", None) or tiny_model("llama")
    return ours(method, model, inp or INPUTS["template_list"](), **kwargs)


def test_the_model_comes_back_as_it_was() -> None:
    model = prepared()
    before = state(model)
    attribute(model=model)
    assert state(model) == before


@pytest.mark.parametrize("kind", ["token", "template_list", "image"])
@pytest.mark.parametrize("method", METHODS)
def test_state_after_success(method: str, kind: str) -> None:
    model = prepared()
    before = state(model)
    attribute(INPUTS[kind](), method, model=model)
    assert state(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_state_after_an_exception(call: int, error: type[BaseException]) -> None:
    model = prepared()
    last = model.model.layers[3].mlp
    last.forward = Failing(last, call, error)
    before = state(model)
    with pytest.raises(error, match="stopped by the test"):
        attribute(model=model, internal_batch_size=1, reuse_prefix=False)
    assert state(model) == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_state_after_an_exception_with_the_prefix_cached(call: int) -> None:
    model = prepared()
    last = model.model.layers[3].mlp
    last.forward = Failing(last, call, KeyboardInterrupt)
    before = state(model)
    inp = template_input("He is Dave and lives in Palm Coast with {} and {}", VALUES[:2])
    with pytest.raises(KeyboardInterrupt):
        attribute(inp, model=model, internal_batch_size=1)
    assert state(model) == before


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", METHODS)
def test_works_whatever_becomes_of_gradients(method: str, guard: Any) -> None:
    expected = captums(method, tiny_model("llama"), INPUTS["template_list"](), target=target_ids(2))
    with guard():
        enabled = torch.is_grad_enabled()
        result = attribute(None, method)
        assert torch.is_grad_enabled() == enabled
    assert_close(rows(result), rows(expected))
    assert not rows(result).requires_grad
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_result_made_in_inference_mode_can_be_used_afterwards() -> None:
    with torch.inference_mode():
        result = attribute()
    weight = torch.ones(4, requires_grad=True)
    (result.seq_attr * weight).sum().backward()
    assert torch.equal(weight.grad, result.seq_attr)


@pytest.mark.parametrize("method", METHODS)
def test_random_numbers_go_on_as_after_captums_call(method: str) -> None:
    def following(attributed: Any) -> list[float]:
        attributed(method, tiny_model("llama"), INPUTS["template_list"](), target=target_ids(1))
        return [float(torch.rand(1)), float(np.random.rand()), random.random()]

    assert following(ours) == following(captums)


def test_the_targets_tensor_is_not_changed() -> None:
    target = target_ids(3)
    kept = target.clone()
    attribute(target=target)
    assert torch.equal(target, kept)


@pytest.mark.parametrize("kind", ["token", "template_list", "image"])
@pytest.mark.parametrize("method", METHODS)
def test_repeated_calls_keep_no_tensors(method: str, kind: str) -> None:
    attribute(INPUTS[kind](), method)
    before = _tensors()
    for _ in range(3):
        attribute(INPUTS[kind](), method)
    assert _tensors() <= before


def test_one_wrapper_keeps_nothing_between_calls() -> None:
    wrapper = LLMAttribution(
        captum.attr.ShapleyValueSampling(tiny_model("llama")), tiny_tokenizer()
    )
    inp = INPUTS["template_list"]()

    def held() -> int:
        wrapper.attribute(inp, target=target_ids(2), n_samples=2)
        return _tensors()

    held()
    assert held() >= held()


def test_a_model_can_be_freed_after_use() -> None:
    model = tiny_model("qwen2", fresh=True)
    result = attribute(model=model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert isinstance(result.seq_attr, Tensor)
