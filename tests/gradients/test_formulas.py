"""Layer saliency and gradient shap against their formulas, written out in oracles.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerGradientShap, LayerIntegratedGradients
from torch import Tensor, nn

from captum_llm_ext import LayerSaliency, TextTokenInput, segment_input
from tests.models.families import (
    PROMPT,
    CausalToy,
    LinearToy,
    layer_names,
    tiny_model,
    tiny_tokenizer,
)
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


# --- rows of features that a baseline keeps, as Captum's LayerGradientShap takes them ------------

ROWS = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 1]])


@pytest.mark.parametrize("rows", [ROWS, ROWS.float(), torch.zeros(1, 8), ROWS.bool()])
def test_rows_of_a_linear_model_are_its_closed_form(rows: Tensor) -> None:
    """A feature that a row keeps does not move along that row's path."""
    model = LinearToy()
    result = shap(model, model.embedding, baselines=(rows,), n_samples=2)
    assert_close(result.token_attr, linear_rows(model) * (1 - rows.float()).mean(0))
    assert_close(result.seq_attr, result.token_attr.sum(0))


def by_formula(model: Any, starts: list[Tensor], n_samples: int) -> Tensor:
    """The mean over starts (8,) of token ids, and over points, of (e − e_start) · ∂log p/∂e."""
    prompt, target = prompt_input().inp_tensor[0], target_ids(2)
    embedding, total = model.embedding.weight.detach(), torch.zeros(2, 8)
    torch.manual_seed(0)
    for start in starts:
        points = torch.rand(n_samples)
        torch.randint(2**31, ())  # the seed of the noise, which is off
        difference = embedding[prompt] - embedding[start]
        for point in points.tolist():
            for t, token in enumerate(target.tolist()):
                fed = torch.cat([prompt, target[:t]])
                value = embedding[fed].clone()
                value[:8] = embedding[start] + point * difference
                value.requires_grad_()
                hook = model.embedding.register_forward_hook(lambda *_, v=value: v[None])
                score = model(fed[None]).logits[0, -1].log_softmax(-1)[token]
                hook.remove()
                gradient = torch.autograd.grad(score, value)[0][:8]
                total[t] += (difference * gradient).sum(-1) / n_samples / len(starts)
    return total


def test_rows_of_a_nonlinear_model_are_the_formula() -> None:
    model, prompt = CausalToy(), prompt_input().inp_tensor[0]
    result = shap(model, model.embedding, baselines=(ROWS,), n_samples=3)
    starts = [torch.where(row == 1, prompt, 0) for row in ROWS]
    assert_close(result.token_attr, by_formula(model, starts, 3))
    assert result.inp.baselines == 0  # the input keeps its own
    assert not shap(model, model.embedding, baselines=(torch.ones(1, 8),)).token_attr.any()


def test_rows_with_other_baselines_of_the_input() -> None:
    """Tokens of a text stand where they would stand with no feature kept; so do embeddings."""
    model, prompt = CausalToy(), prompt_input().inp_tensor[0]
    text = tiny_tokenizer().encode("golf hiking friends", add_special_tokens=False)
    absent = torch.tensor((text * 8)[:7])
    absent = torch.cat([prompt[:1], absent])  # <s> is special and stays
    for own, at in ((7, torch.full((8,), 7)), (("text", "golf hiking friends"), absent)):
        inp = TextTokenInput(PROMPT, tiny_tokenizer(), baselines=own)
        ids = [torch.where(row == 1, prompt, at) for row in ROWS]
        found, expected = (
            our_attribution(
                LayerIntegratedGradients, model, model.layer, inp, target=target_ids(2), baselines=b
            )
            for b in ((ROWS,), ids)
        )
        assert_close(found.token_attr, expected.token_attr)


def test_rows_of_a_template_and_with_generated_tokens() -> None:
    model = LinearToy()
    inp: Any = segment_input(PROMPT, "word")
    kept = torch.tensor([[1, 0, 1, 0, 0, 1]])
    how: dict[str, Any] = {"target": target_ids(3), "include_generated": True}
    plain, rows = (
        our_attribution(
            LayerIntegratedGradients, model, model.embedding, inp, **how, **more
        ).token_attr
        for more in ({}, {"baselines": (kept,)})
    )
    moves = torch.cat([1 - kept[0], torch.ones(3)])
    assert_close(rows, plain * moves)
    assert rows[:, 6:].abs().max() > 0


def test_what_rows_must_be() -> None:
    model = CausalToy()
    for wrong in (
        (torch.zeros(1, 7),),
        (torch.zeros(8),),
        (torch.full((1, 8), 2),),
        (torch.zeros(0, 8),),
        (torch.zeros(1, 8), torch.zeros(1, 8)),
    ):
        with pytest.raises(ValueError, match=r"one tensor \(n_rows, 8\) of 0 and 1"):
            shap(model, model.embedding, baselines=wrong)
    with pytest.raises(ValueError, match="LayerSaliency, which has no path"):
        our_attribution(
            LayerSaliency, model, model.embedding, prompt_input(), target="golf", baselines=(ROWS,)
        )
    with pytest.warns(UserWarning, match=r"pass the tuple \(tensor,\)"):
        shap(model, model.embedding, baselines=torch.zeros(1, 8).long())
