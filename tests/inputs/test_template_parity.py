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
    template_input,
    template_problem,
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
from tests.oracles.cases import STEPS, assert_close, in_pairs, our_attribution, target_ids
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


def test_one_template_equals_captums_from_baseline_ids_to_value_ids() -> None:
    model = tiny_model("llama")
    expected = captum_columns(model, model.model.embed_tokens, target_ids(2))
    inp = template_input(list(SAME_LENGTH))
    result = attribute(LayerIntegratedGradients, "llama", "embedding", inp, 2)
    assert_close(result.token_attr, expected)


@in_pairs(family=list(FAMILIES), kind=KINDS, count=[1, 3])
def test_integrated_gradients_equal_captums_on_the_two_id_tensors(
    family: str, kind: str, count: int
) -> None:
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    if (family, kind) in CAPTUM_FAILS:
        problem, value_of = template_problem(family, kind, count)
        rows = integrated_gradients(problem, STEPS).attributions[0].sum(-1)
        expected = columns(rows, value_of, len(VALUES))
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
    (prompt, value_of), (absent, _) = unmerged(VALUES), unmerged(SAME_LENGTH)
    problem = Problem(model, [model.embedding], prompt, target_ids(3), baseline=absent)
    rows = integrated_gradients(problem, STEPS).attributions[0].sum(-1)
    with torch.set_grad_enabled(not no_grad):
        result = our_attribution(
            LayerIntegratedGradients, model, model.embedding, inp, target=target_ids(3)
        )
    assert_close(result.token_attr, columns(rows, value_of, len(VALUES)))


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
    problem, value_of = template_problem(family, kind, 3)
    expected = columns(gradient_x_activation(problem)[0].sum(-1), value_of, len(VALUES))
    result = attribute(LayerGradientXActivation, family, kind, template_input(), 3)
    if expected.abs().max() < 1e-5:  # a norm follows directly
        assert result.token_attr.abs().max() < 1e-5
    else:
        assert_close(result.token_attr, expected)


ORDERS = {"l1": 1, "l2": 2, "linf": float("inf")}


@in_pairs(norm=list(ORDERS), kind=["embedding", "block"], mask=[None, [4, 9, 4]])
def test_saliency_is_the_norm_over_the_whole_span(
    norm: str, kind: str, mask: list[int] | None
) -> None:
    problem, value_of = template_problem("llama", kind, 3)
    groups = mask or [0, 1, 2]

    def norms(gradient: torch.Tensor) -> torch.Tensor:
        of_group = {
            g: torch.tensor([o >= 0 and groups[o] == g for o in value_of.tolist()]) for g in groups
        }
        prompt = gradient[: len(value_of)]
        return torch.stack([prompt[of_group[g]].flatten().norm(ORDERS[norm]) for g in groups])

    token_rows = torch.stack([norms(row) for row in gradients(problem)[0]])
    last = problem.values(problem.ids(2))
    sequence_row = norms(sequence_gradient(problem, last)[0])
    model = tiny_model("llama")
    method = LayerSaliency(model, problem.layers[0], norm=norm)
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
    """Its input has the name that Captum's perturbation wrapper uses."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SimpleNamespace:
        return super().forward(input_ids)


EXACT: dict[str, tuple[Any, dict[str, Any]]] = {
    "fixed": (LayerIntegratedGradients, {"n_steps": 2}),
    "adaptive": (LayerIntegratedGradients, {"method": "adaptive"}),
    "gradient_shap": (LayerGradientShap, {"n_samples": 2}),
}


@in_pairs(name=list(EXACT), form=FORMS, mask=[None, [1, 0, 1]])
def test_feature_ablation_of_a_linear_model(name: str, form: str, mask: list[int] | None) -> None:
    model, (method, options) = LinearLanguageModel(), EXACT[name]
    inp = template_input(list(SAME_LENGTH), form, mask=mask)
    expected = captums("feature_ablation", model, inp, target=target_ids(3))
    wrapper = LLMGradientAttribution(method(model, model.embedding), tiny_tokenizer())
    result = wrapper.attribute(inp, target=target_ids(3), **options)
    assert_close(result.token_attr, expected.token_attr)
    assert_close(result.seq_attr, expected.seq_attr)
    assert result.input_tokens == expected.input_tokens
