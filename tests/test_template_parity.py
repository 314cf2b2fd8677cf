"""Gradient methods over the values of a template: the same numbers as Captum and the formulas."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)

from captum_llm_ext import LayerSaliency, LLMAttributionResult, LLMGradientAttribution
from tests.cases import STEPS, assert_close, our_attribution, target_ids
from tests.families import FAMILIES, LinearToy, layer_names, tiny_model, tiny_tokenizer
from tests.oracles import (
    Problem,
    gradient_x_activation,
    gradients,
    integrated_gradients,
    sequence_gradient,
)
from tests.perturbation_cases import captums
from tests.template_cases import (
    FORMS,
    SAME_LENGTH,
    VALUES,
    captum_columns,
    columns,
    template_input,
    unmerged,
)

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CAPTUM_FAILS = {("falcon", "block"), ("falcon", "mlp")}
KINDS = ("embedding", "block", "mlp")


def question(family: str, kind: str, count: int, **more: Any) -> tuple[Problem, torch.Tensor]:
    """The prompt with the values, its baseline with SAME_LENGTH, and the value of each position."""
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    prompt, owners = unmerged(VALUES)
    absent, _ = unmerged(SAME_LENGTH)
    return Problem(model, [layer], prompt, target_ids(count), baseline=absent, **more), owners


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


# --- a model that is linear in its embeddings: perturbation and gradients agree --------------------


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
    model = LinearToy()
    inp = template_input(list(SAME_LENGTH), form, mask=mask)
    expected = captums("feature_ablation", model, inp, target=target_ids(3))
    result = our_attribution(method, model, model.embedding, inp, target=target_ids(3), **options)
    assert_close(result.token_attr, expected.token_attr)
    assert_close(result.seq_attr, expected.seq_attr)
    assert result.input_tokens == expected.input_tokens


# --- several layers, and what else may be asked for ------------------------------------------------

SEVERAL = ["model.embed_tokens", "model.layers.1", "model.layers.2.mlp"]


@pytest.mark.parametrize("mask", [None, [0, 1, 1]])
@pytest.mark.parametrize(
    "method", [LayerIntegratedGradients, LayerGradientXActivation, LayerSaliency]
)
def test_several_layers_equal_each_alone(method: Any, mask: list[int] | None) -> None:
    model, inp = tiny_model("llama"), template_input(list(SAME_LENGTH), mask=mask)
    together = our_attribution(method, model, SEVERAL, inp, target=target_ids(2))
    assert list(together.layer_names) == SEVERAL
    assert together.layer_token_attr.shape == (3, 2, 3)
    for i, name in enumerate(SEVERAL):
        alone = our_attribution(method, model, name, inp, target=target_ids(2))
        assert_close(together.layer_token_attr[i], alone.token_attr)
        assert_close(together.layer_seq_attr[i], alone.seq_attr)


def test_joint_layers_equal_the_formula() -> None:
    model, names = tiny_model("llama"), ["model.layers.0.mlp", "model.layers.2"]
    (prompt, owners), (absent, _) = unmerged(VALUES), unmerged(SAME_LENGTH)
    layers = [model.get_submodule(name) for name in names]
    asked = Problem(model, layers, prompt, target_ids(2), baseline=absent)
    found = integrated_gradients(asked, STEPS).attributions
    result = our_attribution(
        LayerIntegratedGradients,
        model,
        names,
        template_input(list(SAME_LENGTH)),
        target=target_ids(2),
        layer_mode="joint",
    )
    for i, rows in enumerate(found):
        assert_close(result.layer_token_attr[i], columns(rows.sum(-1), owners, len(VALUES)))


@pytest.mark.parametrize("kind", ["embedding", "block"])
def test_hidden_attributions_sum_to_the_columns(kind: str) -> None:
    asked, owners = question("llama", kind, 2)
    positions = integrated_gradients(asked, STEPS).attributions[0]
    result = attribute(
        LayerIntegratedGradients,
        "llama",
        kind,
        template_input(list(SAME_LENGTH)),
        2,
        include_hidden_attr=True,
    )
    assert result.hidden_attr.shape == (2, len(VALUES), 32)
    for unit in (0, 17, 31):
        assert_close(
            result.hidden_attr[..., unit], columns(positions[..., unit], owners, len(VALUES))
        )
    assert_close(result.hidden_attr.sum(-1), result.token_attr)


@pytest.mark.parametrize("mask", [None, [5, 2, 5]])
@pytest.mark.parametrize("method", ["gradient_x_activation", "integrated_gradients"])
def test_generated_tokens_are_further_columns(method: str, mask: list[int] | None) -> None:
    asked, owners = question("llama", "embedding", 3, generated_baseline=5)
    if method == "integrated_gradients":
        kind, options = LayerIntegratedGradients, {"baselines": 5}
        positions = integrated_gradients(asked, STEPS).attributions[0].sum(-1)
    else:
        kind, options = LayerGradientXActivation, {}
        positions = gradient_x_activation(asked)[0].sum(-1)
    values = columns(positions, owners, len(VALUES))
    if mask:
        values[:, 0] = values[:, 2] = values[:, 0] + values[:, 2]
    expected = torch.cat([values, positions[:, len(owners) :]], dim=1)
    inp = template_input(list(SAME_LENGTH), mask=mask)
    result = attribute(kind, "llama", "embedding", inp, 3, include_generated=True, **options)
    tokens = tiny_tokenizer().convert_ids_to_tokens(target_ids(3).tolist())
    assert result.token_attr.shape == (3, len(VALUES) + 3)
    assert result.input_tokens == [*VALUES, *tokens]
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("attr_target", ["prob", "logit"])
def test_other_scores(attr_target: str) -> None:
    asked, owners = question("llama", "embedding", 2, kind=attr_target)
    rows = integrated_gradients(asked, STEPS).attributions[0].sum(-1)
    result = attribute(
        LayerIntegratedGradients,
        "llama",
        "embedding",
        template_input(list(SAME_LENGTH)),
        2,
        attr_target=attr_target,
    )
    assert_close(result.token_attr, columns(rows, owners, len(VALUES)))


def test_contrast_target() -> None:
    contrast = target_ids(5)[3:]
    asked, owners = question("llama", "embedding", 2, contrast=contrast)
    rows = integrated_gradients(asked, STEPS).attributions[0].sum(-1)
    inp = template_input(list(SAME_LENGTH))
    result = attribute(
        LayerIntegratedGradients, "llama", "embedding", inp, 2, contrast_target=contrast
    )
    assert_close(result.token_attr, columns(rows, owners, len(VALUES)))


def test_the_target_may_be_generated_and_the_result_plotted() -> None:
    inp = template_input(list(SAME_LENGTH))
    model = tiny_model("llama")
    result = our_attribution(
        LayerIntegratedGradients,
        model,
        model.model.embed_tokens,
        inp,
        gen_args={"max_new_tokens": 3, "do_sample": False},
    )
    prompt, _ = unmerged(VALUES)
    generated = model.generate(prompt[None], max_new_tokens=3, do_sample=False)[0, len(prompt) :]
    assert result.token_attr.shape == (len(generated), len(VALUES))
    assert result.output_tokens == tiny_tokenizer().convert_ids_to_tokens(generated.tolist())
    figure, _ = result.plot_token_attr(show=False)
    plt.close(figure)
