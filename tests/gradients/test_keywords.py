"""Our own keywords: other scores, contrast, generated tokens, hidden attributions."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from captum.attr import LayerGradientShap, LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor

from captum_llm_ext import LayerSaliency
from tests.models.families import BidirectionalToy, layer_names, tiny_model, tiny_tokenizer
from tests.oracles.cases import (
    STEPS,
    assert_close,
    modules,
    our_attribution,
    problem,
    prompt_input,
    target_ids,
)
from tests.oracles.gradients import (
    Problem,
    gradient_x_activation,
    gradients,
    integrated_gradients,
    sequence_gradient,
    sequence_integrated_gradients,
)

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

METHODS: dict[str, Any] = {
    "integrated gradients": LayerIntegratedGradients,
    "gradient x activation": LayerGradientXActivation,
    "gradient shap": LayerGradientShap,
    "saliency": LayerSaliency,
}


# --- what is explained ---------------------------------------------------------------------------


def explained(method: str, question: Problem) -> Tensor:
    if method == "integrated gradients":
        return integrated_gradients(question, STEPS).attributions[0].sum(-1)[:, :8]
    if method == "gradient x activation":
        return gradient_x_activation(question)[0].sum(-1)[:, :8]
    return gradients(question)[0].abs().sum(-1)[:, :8]


DIRECT = ["integrated gradients", "gradient x activation", "saliency"]


@pytest.mark.parametrize("kind", ["prob", "logit"])
@pytest.mark.parametrize("method", DIRECT)
def test_token_rows_of_other_scores(method: str, kind: str) -> None:
    model = tiny_model("llama")
    for name in ("model.embed_tokens", "model.layers.1"):
        expected = explained(method, problem(model, name, kind=kind))
        result = our_attribution(
            METHODS[method],
            model,
            model.get_submodule(name),
            prompt_input(),
            attr_target=kind,
            target=target_ids(3),
        )
        if kind == "prob":  # tiny numbers: p of a random model
            assert (result.token_attr - expected).abs().max() <= 1e-4 * expected.abs().max()
        else:
            assert_close(result.token_attr, expected)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("method", DIRECT)
def test_sequence_probability_is_the_product(method: str, per_token: bool) -> None:
    model = tiny_model("llama")
    question = problem(model, "model.layers.1", count=2, kind="prob")
    if method == "integrated gradients":
        expected = sequence_integrated_gradients(question, STEPS)[0].sum(-1)
    else:
        values = question.values(question.ids(1))
        gradient = sequence_gradient(question, values)[0]
        activation = question.pad(values[0]) if method != "saliency" else None
        expected = gradient.abs().sum(-1) if activation is None else (gradient * activation).sum(-1)
    result = our_attribution(
        METHODS[method],
        model,
        model.model.layers[1],
        prompt_input(),
        attr_target="prob",
        target=target_ids(2),
        include_per_token_attr=per_token,
    )
    assert expected.abs().max() > 0
    assert (result.seq_attr - expected[:8]).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("method", DIRECT)
def test_sequence_probability_needs_a_causal_model(method: str) -> None:
    """Each target token has a pass of its own there, and a product needs them all in one."""
    model = BidirectionalToy()
    with pytest.raises(ValueError, match="'prob' needs a causal model"):
        our_attribution(
            METHODS[method],
            model,
            model.layer,
            prompt_input(),
            attr_target="prob",
            target=target_ids(2),
        )


@pytest.mark.parametrize("kind", ["log_prob", "logit"])
@pytest.mark.parametrize("method", DIRECT)
def test_contrast_target(method: str, kind: str) -> None:
    model, layer = tiny_model("gpt_neox"), "gpt_neox.layers.1"
    several, one = torch.tensor([40, 50, 60]), torch.tensor([70])
    for contrast, tokens in ((several, several), (one, one.expand(3))):
        expected = explained(method, problem(model, layer, kind=kind, contrast=tokens))
        result = our_attribution(
            METHODS[method],
            model,
            model.get_submodule(layer),
            prompt_input(),
            attr_target=kind,
            target=target_ids(3),
            contrast_target=contrast,
        )
        assert_close(result.token_attr, expected)
        if method != "saliency":
            assert_close(result.seq_attr, expected.sum(0))


def test_contrast_target_may_be_text() -> None:
    model = tiny_model("llama")
    tokens = torch.tensor(tiny_tokenizer().encode(" golf", add_special_tokens=False))
    expected = explained("saliency", problem(model, "model.norm", contrast=tokens.expand(3)))
    result = our_attribution(
        LayerSaliency,
        model,
        model.model.norm,
        prompt_input(),
        target=target_ids(3),
        contrast_target=" golf",
    )
    assert len(tokens) == 1
    assert_close(result.token_attr, expected)


# --- generated tokens as features ----------------------------------------------------------------


@pytest.mark.parametrize("method", DIRECT)
@pytest.mark.parametrize("kind", ["embedding", "block", "final_norm"])
def test_earlier_generated_tokens_are_features(kind: str, method: str) -> None:
    model, name = tiny_model("llama"), layer_names("llama")[kind]
    question = problem(model, name, generated_baseline=0)
    if method == "integrated gradients":
        expected = integrated_gradients(question, STEPS).attributions[0].sum(-1)
    elif method == "gradient x activation":
        expected = gradient_x_activation(question)[0].sum(-1)
    else:
        expected = gradients(question)[0].abs().sum(-1)
    inp, target = prompt_input(), target_ids(3)
    result = our_attribution(
        METHODS[method],
        model,
        model.get_submodule(name),
        inp,
        target=target,
        include_generated=True,
    )
    assert result.token_attr.shape == (3, 8 + 3)
    assert len(result.input_tokens) == 8 + 3
    assert_close(result.token_attr, expected)
    for t in range(3):
        assert (result.token_attr[t, 8 + t :] == 0).all()


def test_generated_tokens_with_skipped_prompt_tokens() -> None:
    model, inp = tiny_model("llama"), prompt_input("skip_tokens")
    kept = [*inp.itp_mask[0].nonzero()[:, 0].tolist(), 8, 9, 10]
    expected = gradients(problem(model, "model.embed_tokens"))[0].abs().sum(-1)[:, kept]
    result = our_attribution(
        LayerSaliency,
        model,
        model.model.embed_tokens,
        inp,
        target=target_ids(3),
        include_generated=True,
    )
    assert_close(result.token_attr, expected)


# --- the unsummed attribution and layers without tokens ------------------------------------------


def test_hidden_attribution_is_kept_when_asked_for() -> None:
    model = tiny_model("llama")
    names = ["model.embed_tokens", "model.layers.1.self_attn.k_proj"]
    rows = [gradient_x_activation(problem(model, name))[0][:, :8] for name in names]
    request = {"target": target_ids(3), "include_hidden_attr": True}
    layers = modules(model, *names)
    method = LayerGradientXActivation
    single = our_attribution(method, model, layers[1], prompt_input(), **request)
    assert single.hidden_attr.shape == (3, 8, 16)
    assert_close(single.hidden_attr, rows[1])
    several = our_attribution(method, model, layers, prompt_input(), **request)
    assert set(several.hidden_attr) == set(names)
    for name, row in zip(names, rows, strict=True):
        assert_close(several.hidden_attr[name], row)
    plain = our_attribution(method, model, layers[0], prompt_input(), target=target_ids(3))
    assert plain.hidden_attr is None


@pytest.mark.parametrize(
    ("method", "extra"),
    [*((name, {}) for name in METHODS), ("integrated gradients", {"layer_mode": "joint"})],
)
def test_rotary_embedding_gets_zeros(method: str, extra: dict[str, str]) -> None:
    model = tiny_model("llama")
    result = our_attribution(
        METHODS[method],
        model,
        ["model.layers.1.mlp", "model.rotary_emb"],
        prompt_input(),
        target=target_ids(2),
        **extra,
    )
    assert result.layer_token_attr.shape == (2, 2, 8)
    assert (result.layer_token_attr[1] == 0).all()
    assert (result.layer_seq_attr[1] == 0).all()
    assert result.layer_token_attr[0].abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_rotary_embedding_alone(method: str) -> None:
    model = tiny_model("llama")
    result = our_attribution(
        METHODS[method], model, model.model.rotary_emb, prompt_input(), target=target_ids(2)
    )
    assert result.token_attr.shape == (2, 8)
    assert (result.token_attr == 0).all()


def test_method_classes_are_captums_own() -> None:
    import captum_llm_ext

    for name in ("LayerIntegratedGradients", "LayerGradientXActivation", "LayerGradientShap"):
        assert getattr(captum_llm_ext, name) is getattr(captum.attr, name)
