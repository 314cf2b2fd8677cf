"""Several layers, hidden units, generated tokens and other scores over the values of a template."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from captum.attr import (
    LayerGradientXActivation,
    LayerIntegratedGradients,
)

from captum_llm_ext import LayerSaliency
from tests.inputs.template_cases import (
    SAME_LENGTH,
    VALUES,
    columns,
    template_input,
    template_problem,
    unmerged,
)
from tests.models.families import (
    layer_names,
    tiny_model,
    tiny_tokenizer,
)
from tests.oracles.cases import STEPS, assert_close, our_attribution, target_ids
from tests.oracles.gradients import (
    Problem,
    gradient_x_activation,
    integrated_gradients,
)

# Few steps are enough to compare; that they do not converge is another file's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def attribute(method: Any, family: str, kind: str, inp: Any, count: int, **kwargs: Any) -> Any:
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    return our_attribution(method, model, layer, inp, target=target_ids(count), **kwargs)


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
    assert len(result.output_tokens) == len(generated)
    figure, _ = result.plot_token_attr(show=False)
    plt.close(figure)


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
    model, names = tiny_model("llama"), ["model.layers.1.self_attn", "model.layers.1.mlp"]
    (prompt, value_of), (absent, _) = unmerged(VALUES), unmerged(SAME_LENGTH)
    layers = [model.get_submodule(name) for name in names]
    problem = Problem(model, layers, prompt, target_ids(2), baseline=absent)
    layer_rows = integrated_gradients(problem, STEPS).attributions
    result = our_attribution(
        LayerIntegratedGradients,
        model,
        names,
        template_input(list(SAME_LENGTH)),
        target=target_ids(2),
        layer_mode="joint",
    )
    for i, rows in enumerate(layer_rows):
        assert_close(result.layer_token_attr[i], columns(rows.sum(-1), value_of, len(VALUES)))


@pytest.mark.parametrize("kind", ["embedding", "block"])
def test_hidden_attributions_sum_to_the_columns(kind: str) -> None:
    problem, value_of = template_problem("llama", kind, 2)
    positions = integrated_gradients(problem, STEPS).attributions[0]
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
            result.hidden_attr[..., unit], columns(positions[..., unit], value_of, len(VALUES))
        )
    assert_close(result.hidden_attr.sum(-1), result.token_attr)


@pytest.mark.parametrize("mask", [None, [5, 2, 5]])
@pytest.mark.parametrize("method", ["gradient_x_activation", "integrated_gradients"])
def test_generated_tokens_are_further_columns(method: str, mask: list[int] | None) -> None:
    problem, value_of = template_problem("llama", "embedding", 3, generated_baseline=5)
    if method == "integrated_gradients":
        kind, options = LayerIntegratedGradients, {"baselines": 5}
        positions = integrated_gradients(problem, STEPS).attributions[0].sum(-1)
    else:
        kind, options = LayerGradientXActivation, {}
        positions = gradient_x_activation(problem)[0].sum(-1)
    values = columns(positions, value_of, len(VALUES))
    if mask:
        values[:, 0] = values[:, 2] = values[:, 0] + values[:, 2]
    expected = torch.cat([values, positions[:, len(value_of) :]], dim=1)
    inp = template_input(list(SAME_LENGTH), mask=mask)
    result = attribute(kind, "llama", "embedding", inp, 3, include_generated=True, **options)
    assert result.token_attr.shape == (3, len(VALUES) + 3)
    generated = tiny_tokenizer().convert_ids_to_tokens(target_ids(3))
    assert result.input_tokens == [*VALUES, *generated]
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("attr_target", ["prob", "logit"])
def test_other_scores(attr_target: str) -> None:
    problem, value_of = template_problem("llama", "embedding", 2, kind=attr_target)
    rows = integrated_gradients(problem, STEPS).attributions[0].sum(-1)
    result = attribute(
        LayerIntegratedGradients,
        "llama",
        "embedding",
        template_input(list(SAME_LENGTH)),
        2,
        attr_target=attr_target,
    )
    assert_close(result.token_attr, columns(rows, value_of, len(VALUES)))


def test_contrast_target() -> None:
    contrast = target_ids(5)[3:]
    problem, value_of = template_problem("llama", "embedding", 2, contrast=contrast)
    rows = integrated_gradients(problem, STEPS).attributions[0].sum(-1)
    inp = template_input(list(SAME_LENGTH))
    result = attribute(
        LayerIntegratedGradients, "llama", "embedding", inp, 2, contrast_target=contrast
    )
    assert_close(result.token_attr, columns(rows, value_of, len(VALUES)))
