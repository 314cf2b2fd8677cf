"""Gradient methods over the values of a template: the same numbers as Captum and the formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)

from captum_llm_ext import LayerSaliency, LLMAttributionResult, LLMGradientAttribution
from tests.inputs.template_cases import (
    FORMS,
    SAME_LENGTH,
    VALUES,
    captum_columns,
    columns,
    question,
    template_input,
    unmerged,
)
from tests.models.families import (
    FAMILIES,
    BidirectionalToy,
    CausalToy,
    LinearToy,
    layer_names,
    tiny_model,
    tiny_tokenizer,
)
from tests.oracles.cases import STEPS, assert_close, our_attribution, target_ids
from tests.oracles.gradients import (
    Problem,
    gradient_x_activation,
    gradients,
    integrated_gradients,
    sequence_gradient,
)
from tests.perturbations.cases import captums

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CAPTUM_FAILS = {("falcon", "block"), ("falcon", "mlp")}
KINDS = ("embedding", "block", "mlp")


def attribute(method: Any, family: str, kind: str, inp: Any, count: int, **kwargs: Any) -> Any:
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    return our_attribution(method, model, layer, inp, target=target_ids(count), **kwargs)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_equal_captums_on_the_two_id_tensors(
    family: str, kind: str, count: int
) -> None:
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    if (family, kind) in CAPTUM_FAILS:
        asked, owners = question(family, kind, count)
        rows = integrated_gradients(asked, STEPS).attributions[0].sum(-1)
        expected = columns(rows, owners, len(VALUES))
    else:
        expected = captum_columns(model, layer, target_ids(count))
    inp = template_input(list(SAME_LENGTH))
    result = attribute(LayerIntegratedGradients, family, kind, inp, count)
    assert isinstance(result, LLMAttributionResult)
    assert result.input_tokens == VALUES
    assert_close(result.token_attr, expected)
    assert_close(result.seq_attr, expected.sum(0), tolerance=1e-3)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("toy", [CausalToy, BidirectionalToy])
def test_plain_modules_causal_or_not(toy: type[CausalToy], no_grad: bool) -> None:
    model, inp = toy(), template_input(list(SAME_LENGTH))
    (prompt, owners), (absent, _) = unmerged(VALUES), unmerged(SAME_LENGTH)
    asked = Problem(model, [model.embedding], prompt, target_ids(3), baseline=absent)
    rows = integrated_gradients(asked, STEPS).attributions[0].sum(-1)
    with torch.set_grad_enabled(not no_grad):
        result = our_attribution(
            LayerIntegratedGradients, model, model.embedding, inp, target=target_ids(3)
        )
    assert_close(result.token_attr, columns(rows, owners, len(VALUES)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["embedding", "block"])
def test_every_form_of_a_template_gives_the_same(form: str, kind: str) -> None:
    layer = tiny_model("llama").get_submodule(layer_names("llama")[kind])
    expected = captum_columns(tiny_model("llama"), layer, target_ids(2))
    inp = template_input(list(SAME_LENGTH), form)
    result = attribute(LayerIntegratedGradients, "llama", kind, inp, 2)
    assert result.input_tokens == VALUES
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("kind", ["embedding", "block", "attention", "final_norm"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon"])
def test_gradient_x_activation_is_summed_over_spans(family: str, kind: str) -> None:
    asked, owners = question(family, kind, 3)
    expected = columns(gradient_x_activation(asked)[0].sum(-1), owners, len(VALUES))
    result = attribute(LayerGradientXActivation, family, kind, template_input(), 3)
    if expected.abs().max() < 1e-5:  # a norm follows directly
        assert result.token_attr.abs().max() < 1e-5
    else:
        assert_close(result.token_attr, expected)


@pytest.mark.parametrize("mask", [None, [4, 9, 4]])
@pytest.mark.parametrize("kind", ["embedding", "block"])
@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2), ("linf", float("inf"))])
def test_saliency_is_the_norm_over_the_whole_span(
    norm: str, order: float, kind: str, mask: list[int] | None
) -> None:
    asked, owners = question("llama", kind, 3)
    groups = mask or [0, 1, 2]

    def norms(gradient: torch.Tensor) -> torch.Tensor:
        of_group = {
            g: torch.tensor([o >= 0 and groups[o] == g for o in owners.tolist()]) for g in groups
        }
        prompt = gradient[: len(owners)]
        return torch.stack([prompt[of_group[g]].flatten().norm(order) for g in groups])

    token_rows = torch.stack([norms(row) for row in gradients(asked)[0]])
    last = asked.values(asked.ids(2))
    sequence_row = norms(sequence_gradient(asked, last)[0])
    model = tiny_model("llama")
    method = LayerSaliency(model, asked.layers[0], norm=norm)
    wrapper = LLMGradientAttribution(method, tiny_tokenizer())
    result = wrapper.attribute(template_input(mask=mask), target=target_ids(3))
    assert_close(result.token_attr, token_rows)
    assert_close(result.seq_attr, sequence_row)
    alone = wrapper.attribute(
        template_input(mask=mask), target=target_ids(3), include_per_token_attr=False
    )
    assert alone.token_attr is None
    assert_close(alone.seq_attr, sequence_row)


# --- a model that is linear in its embeddings: perturbation and gradients agree ------------------


class LinearLanguageModel(LinearToy):
    """With the name of its input that Captum's perturbation wrapper calls it by."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SimpleNamespace:
        return super().forward(input_ids)


@pytest.mark.parametrize("mask", [None, [1, 0, 1]])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LayerIntegratedGradients, {"n_steps": 2}),
        (LayerIntegratedGradients, {"method": "adaptive"}),
        (LayerGradientShap, {"n_samples": 2}),
    ],
    ids=["fixed", "adaptive", "gradient_shap"],
)
def test_feature_ablation_of_a_linear_model(
    method: Any, options: dict[str, Any], form: str, mask: list[int] | None
) -> None:
    model = LinearLanguageModel()
    inp = template_input(list(SAME_LENGTH), form, mask=mask)
    expected = captums("feature_ablation", model, inp, target=target_ids(3))
    wrapper = LLMGradientAttribution(method(model, model.embedding), tiny_tokenizer())
    result = wrapper.attribute(inp, target=target_ids(3), **options)
    assert_close(result.token_attr, expected.token_attr)
    assert_close(result.seq_attr, expected.seq_attr)
    assert result.input_tokens == expected.input_tokens
