"""Attributions add up: closed forms, sums over all positions, and the convergence delta."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from tests.models.families import BidirectionalToy, CausalToy, LinearToy, layer_names, tiny_model
from tests.oracles.cases import (
    assert_close,
    modules,
    our_attribution,
    problem,
    prompt_input,
    target_ids,
)
from tests.oracles.gradients import Problem, integrated_gradients, sequence_integrated_gradients

BLOCK_FAMILIES = ["llama", "gpt2", "gemma3", "mistral", "falcon"]


def ours(model: nn.Module, layer: Any, n_steps: int, count: int = 3, **kwargs: Any) -> Any:
    return our_attribution(
        LayerIntegratedGradients,
        model,
        layer,
        prompt_input(),
        target=target_ids(count),
        n_steps=n_steps,
        **kwargs,
    )


# --- closed form ---------------------------------------------------------------------------------


def closed_form(model: LinearToy, count: int) -> Tensor:
    """weight(i - j) · (e_j - e_0) · u_target, over the prompt and the earlier target tokens."""
    ids = torch.cat([prompt_input().inp_tensor[0], target_ids(count)])
    moved = (model.embedding.weight[ids] - model.embedding.weight[0]).detach()
    directions = model.head.weight[target_ids(count)].detach()
    last = torch.arange(count) + len(ids) - count - 1
    return model.mixing(len(ids))[last] * (directions @ moved.T)


@pytest.mark.parametrize("attr_target", ["log_prob", "logit"])
@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_linear_model_has_its_closed_form(n_steps: int, attr_target: str) -> None:
    model = LinearToy()
    result = ours(model, model.embedding, n_steps, attr_target=attr_target)
    expected = closed_form(model, 3)
    assert_close(result.token_attr, expected[:, :8])
    assert_close(result.seq_attr, expected[:, :8].sum(0))
    assert result.convergence_delta.shape == (3,)
    assert result.convergence_delta.abs().max() < 1e-5


def test_linear_model_with_generated_tokens() -> None:
    model = LinearToy()
    result = ours(model, model.embedding, 2, include_generated=True)
    assert_close(result.token_attr, closed_form(model, 3))


def test_gradient_x_activation_of_a_linear_model() -> None:
    model = LinearToy()
    ids = prompt_input().inp_tensor[0]
    embeddings, direction = model.embedding.weight[ids], model.head.weight[target_ids(1)[0]]
    expected = model.mixing(8)[-1] * (embeddings @ direction)
    result = our_attribution(
        LayerGradientXActivation, model, "embedding", prompt_input(), target=target_ids(1)
    )
    assert_close(result.token_attr[0], expected.detach())


# --- sums over all positions ---------------------------------------------------------------------


def score_difference(model: nn.Module, start: Tensor, end: Tensor, token: int) -> float:
    with torch.no_grad():
        log_p = [model(ids[None]).logits[0, -1].log_softmax(-1)[token] for ids in (start, end)]
    return (log_p[1] - log_p[0]).item()


@pytest.mark.parametrize("family", BLOCK_FAMILIES)
def test_block_outputs_sum_to_the_score_difference(family: str) -> None:
    """The block's output is the whole state, so the path starts where the baseline prompt does."""
    model, prompt, token = tiny_model(family), prompt_input().inp_tensor[0], target_ids(1)
    exact = score_difference(model, torch.zeros_like(prompt), prompt, int(token))
    layer = model.get_submodule(layer_names(family)["block"])
    missing = {
        n_steps: abs(ours(model, layer, n_steps, 1).token_attr.sum().item() - exact)
        for n_steps in (1, 60)
    }
    assert abs(exact) > 0.1
    assert missing[60] < 0.01 * abs(exact)
    assert missing[60] < missing[1] / 5


@pytest.mark.parametrize("family", BLOCK_FAMILIES[:3])
def test_generated_columns_complete_the_sum(family: str) -> None:
    """With earlier generated tokens replaced too, every row sums to its own score difference."""
    model, prompt, target = tiny_model(family), prompt_input().inp_tensor[0], target_ids(3)
    layer = model.get_submodule(layer_names(family)["block"])
    result = ours(model, layer, 60, include_generated=True)
    for t in range(3):
        end = torch.cat([prompt, target[:t]])
        exact = score_difference(model, torch.zeros_like(end), end, int(target[t]))
        assert result.token_attr[t].sum().item() == pytest.approx(exact, rel=0.02, abs=0.02)
    assert result.convergence_delta.abs().max() < 0.05


@pytest.mark.parametrize("family", BLOCK_FAMILIES)
def test_delta_shrinks_as_steps_grow(family: str) -> None:
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)["block"])
    few, many = (ours(model, layer, n).convergence_delta.abs() for n in (1, 60))
    assert few.max() > 0.05
    assert many.max() < 0.2 * few.max()


# --- the delta, by its definition ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "at_input"),
    [
        ("embedding", False),
        ("block", False),
        ("mlp", False),
        ("attention_projection", False),
        ("attention", False),
        ("block", True),
        ("mlp", True),
        ("attention_projection", True),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_delta_is_its_definition(family: str, kind: str, at_input: bool) -> None:
    model, name = tiny_model(family), layer_names(family)[kind]
    path = integrated_gradients(problem(model, name, at_input=at_input), 2)
    result = ours(model, model.get_submodule(name), 2, attribute_to_layer_input=at_input)
    assert result.convergence_delta.shape == (3,)
    scale = path.difference.abs().max().item()
    assert path.delta.abs().max() > 1e-3 * scale  # two steps are too few: something to compare
    assert (result.convergence_delta - path.delta).abs().max() <= 1e-4 * scale


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("toy", [CausalToy, BidirectionalToy])
def test_delta_of_plain_modules(toy: type[CausalToy]) -> None:
    model = toy()
    path = integrated_gradients(problem(model, "embedding"), 2)
    result = ours(model, model.embedding, 2)
    assert (result.convergence_delta - path.delta).abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_delta_of_several_layers() -> None:
    model, names = tiny_model("llama"), ["model.embed_tokens", "model.layers.2.mlp"]
    alone = [integrated_gradients(problem(model, name), 2).delta for name in names]
    layers = modules(model, *names)
    independent = ours(model, layers, 2)
    assert_close(independent.convergence_delta, torch.stack(alone), 1e-3)
    joint = ours(model, layers, 2, layer_mode="joint")
    together = integrated_gradients(problem(model, *names), 2)
    assert joint.convergence_delta.shape == (3,)
    assert_close(joint.convergence_delta, together.delta, 1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
def test_delta_of_the_sequence_alone(attr_target: str) -> None:
    model, name = tiny_model("llama"), "model.layers.1"
    question = problem(model, name, kind=attr_target)
    total = sequence_integrated_gradients(question, 2)[0].sum()

    def score(values: list[Tensor]) -> Tensor:
        scores = [
            Problem(model, question.layers, question.prompt, question.target).gradient(
                t, [value[:, : 8 + t] for value in values]
            )[1]
            for t in range(3)
        ]
        log_p = torch.stack(scores).sum()
        return log_p.exp() if attr_target == "prob" else log_p

    end = question.values(question.ids(2))
    expected = total - (score(end) - score(question.start_values(2)))
    result = ours(model, name, 2, include_per_token_attr=False, attr_target=attr_target)
    assert result.convergence_delta.shape == (1,)
    assert result.convergence_delta.item() == pytest.approx(expected.item(), rel=1e-3)


def test_no_path_no_delta() -> None:
    model = tiny_model("llama")
    result = our_attribution(
        LayerGradientXActivation, model, "model.norm", prompt_input(), target=target_ids(2)
    )
    assert result.convergence_delta is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("value", [True, False])
def test_return_convergence_delta_is_accepted(value: bool) -> None:
    model = tiny_model("llama")
    result = ours(model, "model.norm", 2, return_convergence_delta=value)
    assert result.convergence_delta.shape == (3,)


# --- the warning ---------------------------------------------------------------------------------


def test_warns_where_the_sum_is_far_off() -> None:
    model = tiny_model("llama")
    path = integrated_gradients(problem(model, "model.embed_tokens", count=1), 1)
    assert (path.delta.abs() > 0.1 * path.difference.abs()).all()
    with pytest.warns(UserWarning, match='method="adaptive"'):
        ours(model, model.model.embed_tokens, 1, 1)


def test_does_not_warn_where_it_converged() -> None:
    model = CausalToy()
    path = integrated_gradients(problem(model, "embedding"), 50)
    assert (path.delta.abs() < 0.05 * path.difference.abs()).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(model, model.embedding, 50)
