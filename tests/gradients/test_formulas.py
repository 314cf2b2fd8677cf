"""Layer saliency and gradient shap against their formulas, written out in oracles.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerGradientShap, LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from captum_llm_ext import LayerSaliency
from tests.models.families import CausalToy, LinearToy, layer_names, tiny_model
from tests.oracles.cases import (
    assert_close,
    modules,
    our_attribution,
    problem,
    prompt_input,
    target_ids,
)
from tests.oracles.gradients import (
    gradients,
    integrated_gradients,
)

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NORMS = {
    "l1": lambda gradient: gradient.abs().sum(-1),
    "l2": lambda gradient: gradient.pow(2).sum(-1).sqrt(),
    "linf": lambda gradient: gradient.abs().amax(-1),
}
METHODS: dict[str, Any] = {
    "integrated gradients": LayerIntegratedGradients,
    "gradient x activation": LayerGradientXActivation,
    "gradient shap": LayerGradientShap,
    "saliency": LayerSaliency,
}


# --- saliency ------------------------------------------------------------------------------------


def saliency(norm: str) -> Any:
    return lambda model, layer: LayerSaliency(model, layer, norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["embedding", "block", "mlp", "attention"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_saliency_is_the_norm_of_the_gradient(family: str, kind: str, norm: str) -> None:
    model, name = tiny_model(family), layer_names(family)[kind]
    inp = prompt_input("skip_tokens")
    rows = gradients(problem(model, name))[0]
    kept = [i for i, skipped in enumerate(~inp.itp_mask[0]) if not skipped]
    layer = model.get_submodule(name)
    result = our_attribution(saliency(norm), model, layer, inp, target=target_ids(3))

    assert_close(result.token_attr, NORMS[norm](rows)[:, kept])
    # a norm is not linear: the sequence row is the norm of the summed gradient, not a sum of norms
    assert_close(result.seq_attr, NORMS[norm](rows.sum(0))[kept])
    alone = our_attribution(
        saliency(norm), model, layer, inp, target=target_ids(3), include_per_token_attr=False
    )
    assert alone.token_attr is None
    assert_close(alone.seq_attr, result.seq_attr)


def test_saliency_default_norm_is_l1() -> None:
    model = tiny_model("llama")
    rows = gradients(problem(model, "model.embed_tokens"))[0]
    result = our_attribution(
        LayerSaliency, model, model.model.embed_tokens, prompt_input(), target=target_ids(3)
    )
    assert_close(result.token_attr, rows.abs().sum(-1)[:, :8])
    assert result.convergence_delta is None


def test_saliency_of_a_list_and_of_layer_inputs() -> None:
    model = tiny_model("qwen2")
    names = ["model.embed_tokens", "model.layers.1.mlp", "model.norm"]
    rows = gradients(problem(model, *names))  # one layer replaced by its own value changes nothing
    alone = [gradients(problem(model, name))[0] for name in names]
    result = our_attribution(
        LayerSaliency, model, modules(model, *names), prompt_input(), target=target_ids(3)
    )
    assert len(rows) == 3
    for number, gradient in enumerate(alone):
        assert_close(result.layer_token_attr[number], gradient.abs().sum(-1)[:, :8])
        assert_close(result.layer_seq_attr[number], gradient.sum(0).abs().sum(-1)[:8])
    inputs = gradients(problem(model, "model.layers.1", at_input=True))[0]
    result = our_attribution(
        LayerSaliency,
        model,
        model.model.layers[1],
        prompt_input(),
        target=target_ids(3),
        attribute_to_layer_input=True,
    )
    assert_close(result.token_attr, inputs.abs().sum(-1)[:, :8])


# --- gradient shap -------------------------------------------------------------------------------


def shap(model: nn.Module, layer: nn.Module, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return our_attribution(
        LayerGradientShap, model, layer, prompt_input(), target=target_ids(2), **kwargs
    )


def linear_rows(model: LinearToy, count: int = 2) -> Tensor:
    """weight(i - j) · (e_j - e_baseline) · u_target: the attributions of a linear score."""
    prompt, target = prompt_input().inp_tensor[0], target_ids(count)
    difference = (model.embedding.weight[prompt] - model.embedding.weight[0]).detach()
    directions = model.head.weight[target].detach()
    mixing = model.mixing(len(prompt) + count)
    rows = [
        mixing[len(prompt) - 1 + t, : len(prompt)] * (difference @ directions[t])
        for t in range(count)
    ]
    return torch.stack(rows)


def test_gradient_shap_of_a_linear_model_is_its_closed_form() -> None:
    model = LinearToy()
    for n_samples in (1, 5):
        result = shap(model, model.embedding, n_samples=n_samples, stdevs=0.0)
        assert_close(result.token_attr, linear_rows(model))


def test_gradient_shap_approaches_integrated_gradients() -> None:
    model, n_samples = CausalToy(), 600
    question = problem(model, "layer", count=2)
    exact = integrated_gradients(question, 40).attributions[0].sum(-1)[:, :8]
    spread = torch.stack(
        [shap(model, model.layer, seed, n_samples=1).token_attr for seed in range(40)]
    ).std(0)
    result = shap(model, model.layer, n_samples=n_samples)
    error = (result.token_attr - exact).abs()
    assert (error <= 5 * spread / n_samples**0.5 + 1e-5).all()
    assert spread.max() > 1e-2  # the draws do differ


def test_gradient_shap_repeats_with_the_seed() -> None:
    model = CausalToy()
    first, again, other = (
        shap(model, model.embedding, seed, n_samples=3, stdevs=0.1).token_attr for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3)


def test_gradient_shap_noise_has_the_size_asked_for() -> None:
    """With noise of standard deviation s, a linear attribution spreads by s · weight · |u|."""
    model, s, n_samples = LinearToy(), 0.2, 400
    weights = model.mixing(10)[[7, 8], :8]
    spread = s * weights * model.head.weight[target_ids(2)].detach().norm(dim=1)[:, None]
    draws = [
        shap(model, model.embedding, seed, n_samples=1, stdevs=s).token_attr for seed in range(30)
    ]
    errors = (torch.stack(draws) - linear_rows(model)) / spread
    assert 0.8 < errors.pow(2).mean().sqrt() < 1.2
    many = shap(model, model.embedding, n_samples=n_samples, stdevs=s).token_attr
    assert ((many - linear_rows(model)).abs() <= 5 * spread / n_samples**0.5).all()


def test_gradient_shap_of_a_list_is_each_layer_alone_when_linear() -> None:
    model = LinearToy()
    result = our_attribution(
        LayerGradientShap,
        model,
        [model.embedding, model.head],
        prompt_input(),
        target=target_ids(1),
        n_samples=2,
    )
    prompt = prompt_input().inp_tensor[0]
    start, end = (model(ids[None]).logits[0, -1] for ids in (torch.zeros_like(prompt), prompt))
    head = torch.zeros(8)
    head[-1] = (end - start)[target_ids(1)].detach()  # only the last position is read
    assert_close(result.layer_token_attr[0], linear_rows(model, 1))
    assert_close(result.layer_token_attr[1, 0], head)
