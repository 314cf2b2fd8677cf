"""The same numbers as Captum 0.9.0 on its right road, and a record of its wrong one."""

from __future__ import annotations

import captum.attr
import pytest
import torch

from captum_llm_ext import LLMAttribution, LLMAttributionResult
from tests.models.families import FAMILIES, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, pairwise, target_ids
from tests.perturbations.cases import (
    INPUTS,
    METHODS,
    SEQUENCE_ALONE,
    VALUES,
    ablation,
    captums,
    filled_template,
    game,
    ours,
    rows,
    template_input,
)

# Captum warns about the sizes of what it is given, and Lime about few samples.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

GRID = list(
    pairwise(
        {
            "family": list(FAMILIES),
            "method": list(METHODS),
            "kind": list(INPUTS),
            "attr_target": ("log_prob", "prob"),
        }
    )
)


def test_ablation_of_one_template_equals_captums() -> None:
    model, inp = tiny_model("llama"), template_input("{} lives in {}", VALUES[:2])
    expected = captums("feature_ablation", model, inp, target=target_ids(2))
    assert_close(rows(ours("feature_ablation", model, inp, target=target_ids(2))), rows(expected))


def test_the_grid_holds_every_pair_of_values() -> None:
    assert len({(family, method) for family, method, *_ in GRID}) == len(FAMILIES) * len(METHODS)
    assert len({(family, kind) for family, _, kind, _ in GRID}) == len(FAMILIES) * len(INPUTS)
    assert len({(method, kind) for _, method, kind, _ in GRID}) == len(METHODS) * len(INPUTS)


@pytest.mark.parametrize(("family", "method", "kind", "attr_target"), GRID)
def test_equals_captum(family: str, method: str, kind: str, attr_target: str) -> None:
    model, inp = tiny_model(family), INPUTS[kind]()
    given = {"target": target_ids(3), "attr_target": attr_target}
    expected = captums(method, model, inp, **given)
    result = ours(method, model, INPUTS[kind](), **given)

    assert isinstance(result, LLMAttributionResult)
    assert result.input_tokens == list(inp.values)
    assert result.output_tokens == expected.output_tokens
    for row, reference in zip(rows(result), rows(expected), strict=True):
        largest = reference.abs().max()
        assert torch.isfinite(reference).all()
        assert (row - reference).abs().max() <= 1e-4 * largest
    if attr_target == "log_prob":
        assert_close(result.seq_attr, expected.seq_attr)  # the reference is not zero


@pytest.mark.parametrize("method", METHODS)
def test_token_rows_are_where_captum_has_them(method: str) -> None:
    result = ours(method, tiny_model("llama"), INPUTS["template_list"](), target=target_ids(2))
    assert result.seq_attr.shape == (4,)
    if method in SEQUENCE_ALONE:
        assert result.token_attr is None
    else:
        assert result.token_attr.shape == (2, 4)


@pytest.mark.parametrize("method", METHODS)
def test_trials_of_a_sampling_method_equal_captums(method: str) -> None:
    model, inp = tiny_model("qwen2"), INPUTS["template_list"]()
    given = {"target": target_ids(2), "num_trials": 2, "seed": 3}
    expected = captums(method, model, inp, **given)
    assert_close(rows(ours(method, model, inp, **given)), rows(expected))
    if method == "shapley_sampling":  # the seed is at work
        other = captums(method, model, inp, **{**given, "seed": 4})
        assert not torch.allclose(other.seq_attr, expected.seq_attr, rtol=1e-3)


@pytest.mark.parametrize("method", ["feature_ablation", "shapley_sampling", "kernel_shap"])
def test_feature_mask_of_the_method_itself(method: str) -> None:
    model, inp = tiny_model("llama"), INPUTS["template_baselines"]()
    given = {"target": target_ids(2), "feature_mask": torch.tensor([[0, 1, 0, 2]])}
    assert_close(
        rows(ours(method, model, inp, **given)), rows(captums(method, model, inp, **given))
    )


def test_arguments_in_captums_order() -> None:
    model, inp = tiny_model("llama"), INPUTS["template_list"]()
    arguments = (inp, " plays golf", 1, None, False, None, False)
    tokenizer = tiny_tokenizer()
    expected, result = (
        kind(captum.attr.FeatureAblation(model), tokenizer).attribute(*arguments)
        for kind in (captum.attr.LLMAttribution, LLMAttribution)
    )
    assert_close(result.token_attr, expected.token_attr)


def test_is_a_subclass_and_leaves_the_method_alone() -> None:
    model = tiny_model("llama")
    method = captum.attr.FeatureAblation(model)
    wrapper = LLMAttribution(method, tiny_tokenizer())
    wrapper.attribute(INPUTS["token"](), target=target_ids(1))
    assert isinstance(wrapper, captum.attr.LLMAttribution)
    assert method.forward_func is model


@pytest.mark.parametrize("kind", ["token", "template_dict"])
def test_target_that_the_model_generates(kind: str) -> None:
    model = tiny_model("llama")
    given = {"gen_args": {"max_new_tokens": 3, "do_sample": False}}
    expected = captums("feature_ablation", model, INPUTS[kind](), **given)
    result = ours("feature_ablation", model, INPUTS[kind](), **given)
    assert result.output_tokens == expected.output_tokens
    assert_close(result.token_attr, expected.token_attr)


def test_picture_can_be_drawn() -> None:
    inp = INPUTS["image"]()
    result = ours("feature_ablation", tiny_model("llama"), inp, target=target_ids(2))
    assert result.inp is inp
    figure, _ = result.plot_image_heatmap()
    assert figure is not None


# --- Captum's defaults ---------------------------------------------------------------------------


def test_captums_default_is_wrong_and_ours_is_right() -> None:
    """With transformers 5 Captum feeds the whole input again on top of its cache.

    The truth is [-0.71, -1.29, 2.07], and Captum says [-3.18, -4.61, -0.71].
    """
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    template, values, target = "{} lives in {} and {}", VALUES[:3], " golf, hiking"
    ids = torch.tensor(tokenizer.encode(target, add_special_tokens=False))
    truth = ablation(game(model, filled_template(template, values, [""] * 3), ids), 3)
    captum_default, our_default = (
        kind(captum.attr.FeatureAblation(model), tokenizer).attribute(
            template_input(template, list(values)), target=target
        )
        for kind in (captum.attr.LLMAttribution, LLMAttribution)
    )
    wrong = rows(captum_default) - truth
    assert wrong.abs().max() > 0.1 * truth.abs().max()
    assert captum_default.seq_attr[2] < 0 < truth[0, 2]
    assert_close(rows(our_default), truth)
