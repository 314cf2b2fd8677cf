"""Adaptive quadrature meets its tolerance, against a dense fixed rule, or says that it did not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from captum.attr import LayerIntegratedGradients

from captum_llm_ext import LLMGradientAttribution, chat_input, segment_input
from captum_llm_ext.gradients.totals import LayerTotal
from tests.inputs.template_cases import OTHER_LENGTH, chat_tokenizer, template_input
from tests.models.families import BidirectionalToy, CausalToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import prompt_input, target_ids


def integrated(model: Any, layer: Any, **options: Any) -> Any:
    method = LayerIntegratedGradients(model, layer)
    attribution = LLMGradientAttribution(method, tiny_tokenizer())
    return attribution.attribute(prompt_input(), **{"target": target_ids(3), **options})


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("layer", ["model.embed_tokens", "model.layers.1.mlp", "model.layers.2"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_agrees_with_a_dense_rule(family: str, layer: str, per_token: bool) -> None:
    model = tiny_model(family)
    options = {"include_per_token_attr": per_token}
    dense = integrated(model, layer, n_steps=600, **options)
    result = integrated(model, layer, method="adaptive", tol=0.01, **options)
    assert result.converged is True
    assert result.n_evaluations >= 24
    scale = dense.seq_attr.abs().max()
    assert (result.seq_attr - dense.seq_attr).abs().max() <= 0.03 * scale
    if per_token:
        assert (result.token_attr - dense.token_attr).abs().max() <= 0.03 * scale


@pytest.mark.parametrize("tol", [0.2, 0.05, 0.01])
def test_delta_is_within_the_tolerance(tol: float) -> None:
    model = tiny_model("llama")
    dense = integrated(model, "model.layers.2", n_steps=600)
    result = integrated(model, "model.layers.2", method="adaptive", tol=tol)
    # On a block's output the sums over all positions are the score differences themselves.
    difference = (result.token_attr.sum(1) - result.convergence_delta).sum()
    assert abs(float(result.convergence_delta.sum())) <= tol * abs(float(difference)) + 1e-5
    assert result.converged
    assert dense.converged is None


def test_a_budget_that_ends_first_is_said() -> None:
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="max_evaluations"):
        result = integrated(model, "model.embed_tokens", method="adaptive", tol=1e-9, max_rows=40)
    assert result.converged is False
    assert 24 <= result.n_evaluations <= 40


def test_tighter_tolerance_takes_more_points() -> None:
    model = tiny_model("llama")
    counts = [
        integrated(model, "model.embed_tokens", method="adaptive", tol=tol).n_evaluations
        for tol in (0.5, 0.001)
    ]
    assert counts[0] < counts[1]


def test_repeats_to_the_bit() -> None:
    model = tiny_model("llama")
    first, second = (
        integrated(model, "model.embed_tokens", method="adaptive", internal_batch_size=7)
        for _ in range(2)
    )
    assert torch.equal(first.token_attr, second.token_attr)


def test_each_layer_of_a_list_is_as_if_alone() -> None:
    model = tiny_model("llama")
    names = ["model.layers.0.mlp", "model.layers.2.self_attn.q_proj"]
    result = integrated(model, names, method="adaptive")
    for name in names:
        alone = integrated(model, name, method="adaptive")
        torch.testing.assert_close(result[name].token_attr, alone.token_attr)
        assert result[name].n_evaluations == alone.n_evaluations
        assert result[name].converged is True
    assert result.converged is True


def test_token_by_token_model_and_hidden_units() -> None:
    model = BidirectionalToy()
    dense = integrated(model, "layer", n_steps=400, include_hidden_attr=True)
    result = integrated(model, "layer", method="adaptive", tol=0.01, include_hidden_attr=True)
    assert result.hidden_attr.shape == dense.hidden_attr.shape
    scale = dense.hidden_attr.abs().max()
    assert (result.hidden_attr - dense.hidden_attr).abs().max() <= 0.05 * scale


def test_baseline_equal_to_the_input_is_zero_without_a_division() -> None:
    model, inp = tiny_model("llama"), prompt_input()
    result = integrated(model, "model.embed_tokens", method="adaptive", baselines=inp.inp_tensor[0])
    assert torch.equal(result.token_attr, torch.zeros_like(result.token_attr))
    assert result.converged is True


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tol": 0.0}, "tol"),
        ({"max_evaluations": 3}, "max_evaluations"),
        ({"max_rows": 3}, "max_evaluations"),
        ({"n_steps": 5}, "n_steps"),
        ({"method": "gausslegendre", "tol": 0.1}, "adaptive"),
    ],
)
def test_options_without_a_meaning(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        integrated(tiny_model("llama"), "model.embed_tokens", **{"method": "adaptive", **options})


def test_local_attribution_has_no_sums_to_check() -> None:
    model = tiny_model("llama")
    method = LayerIntegratedGradients(model, model.model.embed_tokens, multiply_by_inputs=False)
    with pytest.raises(ValueError, match="multiply_by_inputs"):
        LLMGradientAttribution(method, tiny_tokenizer()).attribute(
            prompt_input(), target=target_ids(2), method="adaptive"
        )


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_score_difference_of_zero_is_defined(count: int, per_token: bool) -> None:
    """A target contrasted with itself scores 0 everywhere: tolerance and delta have no scale."""
    result = integrated(
        tiny_model("llama"),
        "model.embed_tokens",
        method="adaptive",
        target=target_ids(count),
        contrast_target=target_ids(count),
        include_per_token_attr=per_token,
    )
    assert result.converged is True
    assert not result.seq_attr.any()
    assert not result.convergence_delta.any()


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_the_path_of_scores(kind: str) -> None:
    """Points in order, from baseline to input, with the scores of a model run there by hand."""
    model, inp, target = tiny_model("llama"), prompt_input(), target_ids(2)
    options = {"n_steps": 5} if kind == "fixed" else {"method": "adaptive"}
    path = integrated(model, "model.embed_tokens", target=target, **options).score_path
    assert path[0, 0] == 0
    assert path[0, -1] == 1
    assert (path[0].diff() > 0).all()
    ids = torch.cat([inp.inp_tensor[0], target[:1]])
    absent = ids.clone()
    absent[: inp.inp_tensor.size(1)] = inp.baselines
    embed = model.get_input_embeddings()
    for alpha, score in path.T[::7].tolist():
        mixed = (1 - alpha) * embed(absent) + alpha * embed(ids)
        logits = model(inputs_embeds=mixed[None]).logits[0, -2:].log_softmax(-1)
        assert abs(float(logits[[0, 1], target].detach().sum()) - score) < 1e-3


def test_a_picture_of_the_path() -> None:
    result = integrated(tiny_model("llama"), ["model.embed_tokens", "model.layers.1"], n_steps=4)
    with pytest.raises(ValueError, match="plot one"):
        result.plot_path()
    _, ax = result["model.layers.1"].plot_path()
    assert ax.get_xlabel().startswith("path")


def test_the_path_of_a_model_that_is_not_causal() -> None:
    """Each target has its own points there, and the score is the sum over targets."""
    model, inp, target = BidirectionalToy(), prompt_input(), target_ids(2)
    result = integrated(model, "embedding", target=target, method="adaptive", tol=0.001)
    path = result.score_path
    ids = torch.cat([inp.inp_tensor[0], target])
    absent = ids.clone()
    absent[: inp.inp_tensor.size(1)] = inp.baselines
    for place, at_end in ((0, absent), (-1, ids)):
        rows = [model(at_end[None, :stop]).logits[0, -1].log_softmax(-1) for stop in (-2, -1)]
        score = float(sum(row[token] for row, token in zip(rows, target, strict=True)))
        assert abs(float(path[1, place]) - score) < 1e-4


class NormalisingToy(CausalToy):
    """The lengths of vectors are undone, as by a norm, so that from zero all happens at once."""

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = super().mix(hidden)
        return mixed / (mixed.norm(dim=-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("options", [{"method": "adaptive"}, {"n_steps": 200}])
@pytest.mark.parametrize(
    ("model", "baseline", "leaps"),
    [
        (NormalisingToy(), "zero", True),
        (NormalisingToy(), "mean", False),
        (NormalisingToy(), 3, False),
        (CausalToy(), "zero", False),
    ],
)
def test_a_leap_at_the_baseline_is_said(
    model: Any, baseline: Any, leaps: bool, options: dict[str, Any]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = integrated(model, "embedding", baselines=baseline, **options)
    said = [str(w.message) for w in caught if "leaps at its baseline" in str(w.message)]
    assert len(said) == leaps
    assert (result.score_path[0] - 1e-4).abs().min() < 1e-9


def test_several_baselines_are_all_counted() -> None:
    options = {"method": "adaptive", "tol": 0.01}
    model, baselines = tiny_model("llama"), ["mean", 3]
    both = integrated(model, "model.embed_tokens", baselines=baselines, **options)
    each = [integrated(model, "model.embed_tokens", baselines=b, **options) for b in baselines]
    assert both.n_evaluations == sum(result.n_evaluations for result in each)
    assert both.converged is True
    with pytest.raises(ValueError, match="one baseline"):
        both.plot_path()


INPUTS: dict[str, Any] = {
    "template": lambda _: template_input(OTHER_LENGTH),
    "segments": lambda _: segment_input("The capital. Dave plays golf. He is", by="sentence"),
    "chat": lambda tokenizer: chat_input([{"role": "user", "content": "Dave plays"}], tokenizer),
    "skipped tokens": lambda _: prompt_input("skip_tokens"),
}


@pytest.mark.parametrize(
    ("layer", "more"),
    [
        ("model.embed_tokens", {}),
        ("model.layers.1", {}),
        ("model.embed_tokens", {"include_generated": True}),
        (["model.layers.1.mlp", "model.layers.2.self_attn"], {"layer_mode": "joint"}),
    ],
)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_input(kind: str, layer: Any, more: dict[str, Any]) -> None:
    """As a dense rule has it, whatever a feature is and whatever moves."""
    model = tiny_model("llama")
    tokenizer = chat_tokenizer() if kind == "chat" else tiny_tokenizer()
    inp = INPUTS[kind](tokenizer)
    attribution = LLMGradientAttribution(LayerIntegratedGradients(model, layer), tokenizer)
    options = {"target": target_ids(2), "baselines": "mean", **more}
    dense = attribution.attribute(inp, n_steps=600, **options)
    found = attribution.attribute(inp, method="adaptive", tol=0.005, **options)
    assert found.converged is True
    scale = dense.token_attr.abs().max()
    assert (found.token_attr - dense.token_attr).abs().max() <= 0.03 * scale


def test_hidden_units_are_not_held_for_each_interval() -> None:
    """Their sum over hidden units is the attribution, whatever is held on the way."""
    model, held = tiny_model("llama"), []
    empty = LayerTotal.empty

    def noted(total: LayerTotal, hidden: bool = True) -> LayerTotal:
        held.append(hidden)
        return empty(total, hidden)

    options = {"method": "adaptive", "tol": 0.01, "include_hidden_attr": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerTotal, "empty", noted)
        result = integrated(model, "model.layers.1", **options)
    assert held.count(False) > result.n_evaluations / 3 - 1
    torch.testing.assert_close(result.hidden_attr.sum(-1), result.token_attr, atol=1e-5, rtol=1e-4)
