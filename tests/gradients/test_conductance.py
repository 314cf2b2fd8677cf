"""Conductance: Captum's own class on a plain forward function, completeness, and its limits."""

from __future__ import annotations

import warnings
from typing import Any

import captum.attr
import pytest
import torch
from captum.attr import LayerConductance, LayerIntegratedGradients
from torch import Tensor, nn

from captum_llm_ext import LLMGradientAttribution, TextTemplateInput, explain
from captum_llm_ext.gradients.conductance import _slopes
from captum_llm_ext.model.layers import decoder_blocks
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, our_attribution, prompt_input, target_ids

FAMILIES = ["llama", "gpt2", "gemma3", "qwen3", "mistral", "gpt_neox"]


def conductance(model: nn.Module, layers: Any, count: int = 3, **kwargs: Any) -> Any:
    inp = kwargs.pop("inp", prompt_input())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return our_attribution(
            LayerConductance, model, layers, inp, target=target_ids(count), **kwargs
        )


def captum_rows(model: Any, layer: nn.Module, count: int, **kwargs: Any) -> Tensor:
    """(count, n_prompt): each target token by itself, through the embeddings of its prefix."""
    inp, rows = prompt_input(), []
    prompt, embed = inp.inp_tensor[0], model.get_input_embeddings()
    for t in range(count):
        ids = torch.cat([prompt, target_ids(count)[:t]])[None]
        absent = ids.clone()
        absent[0, : len(prompt)] = inp.baselines

        def score(embeddings: Tensor, t: int = t) -> Tensor:
            logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
            return logits.log_softmax(-1)[:, target_ids(count)[t]]

        found = captum.attr.LayerConductance(score, layer).attribute(
            embed(ids).detach(), embed(absent).detach(), **kwargs
        )
        found = found[0] if isinstance(found, tuple) else found
        rows.append(found[0].sum(-1)[: len(prompt)].detach())
    return torch.stack(rows)


def blocks(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in decoder_blocks(model)]


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_trapezoid", "riemann_left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_captum(family: str, method: str) -> None:
    model = tiny_model(family)
    names = [blocks(model)[i] for i in (0, -1)]
    result = conductance(model, names, n_steps=4, method=method)
    for name in names:
        expected = captum_rows(model, model.get_submodule(name), 3, n_steps=4, method=method)
        assert_close(result[name].token_attr, expected)
        assert_close(result[name].seq_attr, expected.sum(0))


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_rows_per_pass_do_not_matter(rows: int) -> None:
    model = tiny_model("llama")
    whole = conductance(model, "model.layers.1", n_steps=7)
    parts = conductance(model, "model.layers.1", n_steps=7, internal_batch_size=rows)
    assert_close(parts.token_attr, whole.token_attr)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_adds_up_to_the_score_difference(family: str, per_token: bool) -> None:
    model = tiny_model(family)
    options = {"method": "adaptive", "tol": 0.02, "include_per_token_attr": per_token}
    result = conductance(model, blocks(model), include_generated=True, **options)
    assert result.converged
    sums = result.layer_token_attr.sum(-1) if per_token else result.layer_seq_attr.sum(-1)[:, None]
    differences = sums - result.convergence_delta
    assert differences.std(0).max() < 1e-4 * differences.abs().max()
    sequence = result.convergence_delta.sum(1).abs()
    assert (sequence <= 0.02 * differences[0].sum().abs() + 1e-4).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_at_the_embeddings_it_is_integrated_gradients(family: str) -> None:
    model = tiny_model(family)
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    expected = LLMGradientAttribution(method, tiny_tokenizer()).attribute(
        prompt_input(), target=target_ids(3), method="adaptive", tol=0.01
    )
    result = conductance(model, model.get_input_embeddings(), method="adaptive", tol=0.01)
    assert_close(result.token_attr, expected.token_attr)
    assert result.n_evaluations == expected.n_evaluations


def test_adaptive_meets_a_dense_fixed_rule() -> None:
    model = tiny_model("llama")
    names = [*blocks(model), "model.layers.1.mlp"]
    dense = conductance(model, names, n_steps=3000, method="riemann_trapezoid")
    result = conductance(model, names, method="adaptive", tol=0.01)
    for name in names:
        assert_close(result[name].seq_attr, dense[name].seq_attr, tolerance=0.03)


def test_a_part_of_a_block_does_not_warn_of_what_passes_it_by() -> None:
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = our_attribution(
            LayerConductance,
            model,
            "model.layers.1.mlp",
            prompt_input(),
            target=target_ids(2),
            method="adaptive",
            tol=0.02,
        )
    assert result.converged
    assert result.convergence_delta.abs().max() > 0.01


def test_template_values() -> None:
    model = tiny_model("llama")
    inp = TextTemplateInput("{} plays {}", ["Dave lives", "golf"], baselines=["Anna", "golf"])
    result = conductance(model, blocks(model), method="adaptive", tol=0.02, inp=inp)
    assert result.seq_attr.shape == (2,)
    # the second value is its own baseline, so the embeddings do not move there
    first = conductance(model, model.get_input_embeddings(), n_steps=50, inp=inp)
    assert first.seq_attr[1] == 0


def test_explain_knows_it() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = explain(
        model,
        tokenizer,
        "Dave lives in",
        " golf",
        "conductance",
        layers="model.layers.*",
        quadrature="adaptive",
    )
    assert result.converged


def test_layers_cannot_move_jointly() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="LayerConductance reads its layers"):
        conductance(model, blocks(model), layer_mode="joint")


def test_options_are_checked() -> None:
    model = tiny_model("llama")
    for options in ({"n_steps": 0}, {"method": "simpson"}, {"tol": 0.1}):
        with pytest.raises(ValueError, match=r"n_steps must be|method must be|belong to"):
            conductance(model, "model.layers.0", **options)


@pytest.mark.parametrize("degree", range(5))
def test_slopes_are_exact_for_polynomials(degree: int) -> None:
    nodes = torch.tensor([0.31, 0.35, 0.38, 0.3, 0.4], dtype=torch.float64)
    found = _slopes(nodes, 3).double() @ nodes**degree
    expected = degree * nodes[:3] ** max(degree - 1, 0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
