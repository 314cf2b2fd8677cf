"""Forward mode and backward passes give the same attributions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTemplateInput,
)

from captum_llm_ext import LLMGradientAttribution
from captum_llm_ext.gradients import forward_mode
from captum_llm_ext.gradients.forward_mode import derivatives, is_cheaper
from tests.models.families import (
    FAMILIES,
    BidirectionalToy,
    layer_names,
    tiny_model,
    tiny_tokenizer,
)
from tests.oracles.cases import assert_close, differentiating, target_ids

FORWARD = [family for family in FAMILIES if family != "mixtral"]  # its experts' product cannot
VALUES = ["Dave", "Palm Coast"]


def attribute(
    model: Any,
    layer: Any,
    kind: Any = LayerIntegratedGradients,
    mode: bool | None = None,
    **options: Any,
) -> Any:
    """Forward (True), backward (False) or as the package chooses (None)."""
    inp = options.pop("inp", None) or TextTemplateInput("{} lives in {} and", VALUES)
    options = {"target": target_ids(6), **options}
    scored = {"attr_target": options.pop("attr_target", "log_prob")}
    if kind is LayerIntegratedGradients and "method" not in options:
        options["n_steps"] = 4
    wrapper = LLMGradientAttribution(kind(model, layer), tiny_tokenizer(), **scored)
    with nullcontext() if mode is None else differentiating(mode):
        return wrapper.attribute(inp, **options)


def test_one_case() -> None:
    """Two values and six target tokens: forward mode gives what backward passes give."""
    model = tiny_model("llama")
    forward, backward = (
        attribute(model, "model.embed_tokens", mode=mode) for mode in (True, False)
    )
    assert_close(forward.token_attr, backward.token_attr)


@pytest.mark.parametrize("kind", ["embedding", "block", "mlp", "attention_projection"])
@pytest.mark.parametrize("family", FORWARD)
def test_equals_backward(family: str, kind: str) -> None:
    model, layer = tiny_model(family), layer_names(family)[kind]
    forward, backward = (attribute(model, layer, mode=mode) for mode in (True, False))
    assert_close(forward.token_attr, backward.token_attr)
    assert_close(forward.seq_attr, backward.seq_attr)
    scale = backward.token_attr.abs().sum()
    difference = forward.convergence_delta - backward.convergence_delta
    assert difference.abs().max() <= 1e-4 * scale


@pytest.mark.parametrize(
    "options",
    [
        {"method": "adaptive"},
        {"inp": TextTemplateInput("{} lives in {} and", VALUES, mask=[3, 3])},
        {"internal_batch_size": 1},
        {"attribute_to_layer_input": True},
        {"reuse_prefix": False, "baselines": "pad"},
    ],
)
def test_equals_backward_with(options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    forward, backward = (
        attribute(model, "model.layers.1", mode=mode, **options) for mode in (True, False)
    )
    assert_close(forward.token_attr, backward.token_attr)
    assert_close(forward.seq_attr, backward.seq_attr)


@pytest.mark.parametrize("attr_target", ["prob", "logit"])
def test_other_scores(attr_target: str) -> None:
    model = tiny_model("llama")
    options = {"target": target_ids(3), "attr_target": attr_target}
    forward, backward = (
        attribute(model, "model.layers.1.mlp", mode=mode, **options) for mode in (True, False)
    )
    assert (forward.token_attr - backward.token_attr).abs().max() <= 1e-4 * (
        backward.token_attr.abs().max()
    )
    assert (forward.seq_attr - backward.seq_attr).abs().max() <= 1e-4 * (
        backward.seq_attr.abs().max()
    )


def test_noise_is_the_same() -> None:
    results = []
    for mode in (True, False):
        torch.manual_seed(0)
        options = {"stdevs": 0.1, "n_samples": 3, "mode": mode}
        results.append(
            attribute(tiny_model("llama"), "model.layers.1", LayerGradientShap, **options)
        )
    assert_close(results[0].token_attr, results[1].token_attr)


def test_a_model_that_is_not_causal() -> None:
    model = BidirectionalToy()
    forward, backward = (attribute(model, "layer", mode=mode) for mode in (True, False))
    assert_close(forward.token_attr, backward.token_attr)


def test_chosen_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return derivatives(*arguments)

    monkeypatch.setattr(forward_mode, "derivatives", counted)
    model = tiny_model("llama")
    attribute(model, "model.embed_tokens")
    assert len(calls) == len(VALUES)
    calls.clear()
    attribute(model, "model.embed_tokens", target=target_ids(2))
    assert not calls
    assert is_cheaper(5, 64)
    assert not is_cheaper(17, 14)


def test_a_model_that_cannot_goes_backward() -> None:
    model = tiny_model("mixtral")
    forward, backward = (
        attribute(model, "model.embed_tokens", mode=mode) for mode in (True, False)
    )
    assert_close(forward.token_attr, backward.token_attr)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LayerGradientXActivation, {}),
        (LayerIntegratedGradients, {"include_per_token_attr": False}),
        (LayerIntegratedGradients, {"include_hidden_attr": True}),
    ],
)
def test_never_where_it_does_not_give_the_attributions(
    monkeypatch: pytest.MonkeyPatch, method: Any, options: dict[str, Any]
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("forward mode was taken")

    monkeypatch.setattr(forward_mode, "derivatives", never)
    attribute(tiny_model("llama"), "model.layers.1", method, mode=True, **options)


@pytest.mark.parametrize("keyword", [True, False, None])
def test_the_keyword_is_accepted_and_changes_nothing(keyword: bool | None) -> None:
    model = tiny_model("llama")
    chosen = attribute(model, "model.embed_tokens", forward_mode=keyword)
    assert torch.equal(chosen.token_attr, attribute(model, "model.embed_tokens").token_attr)


def test_derivatives_that_are_wrong_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some operations lose tangents: then the sum of the forward derivatives is another one."""
    model = tiny_model("llama", fresh=True)
    backward = attribute(model, "model.embed_tokens", mode=False)

    def lossy(*arguments: Any) -> tuple[torch.Tensor, ...]:
        tokens, sequence, score = derivatives(*arguments)
        return tokens / 2, sequence / 2, score

    monkeypatch.setattr(forward_mode, "derivatives", lossy)
    chosen = attribute(model, "model.embed_tokens")
    assert_close(chosen.token_attr, backward.token_attr)
