"""What is seen of each perturbation, and baselines drawn once per trial."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch

from captum_llm_ext import LLMAttribution
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    INPUTS,
    METHODS,
    OTHERS,
    SAMPLES,
    TEMPLATE,
    VALUES,
    captums,
    ours,
    rows,
    seed_everything,
    template_input,
    token_input,
)

# Captum warns about the sizes of what it is given, and Lime about few samples.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


Call = tuple[str, str, list[float]]


def inspected(wrapper: Any, method: str, inp: Any, **kwargs: Any) -> list[Call]:
    calls: list[Call] = []
    target = target_ids(2)
    wrapper(
        method,
        tiny_model("llama"),
        inp,
        target=target,
        _inspect_forward=lambda *call: calls.append(call),
        **kwargs,
    )
    return calls


def test_one_line_for_each_prompt_of_an_ablation() -> None:
    calls = inspected(ours, "feature_ablation", template_input("{} lives", ["Dave"], ["He"]))
    assert [call[0] for call in calls] == ["<s>Dave lives", "<s>He lives"]


@pytest.mark.parametrize("perturbations_per_eval", [1, 3, 100])
@pytest.mark.parametrize("method", ["feature_ablation", "shapley_sampling", "shapley"])
@pytest.mark.parametrize("kind", ["token", "template_list"])
def test_inspection_sees_every_perturbation(
    kind: str, method: str, perturbations_per_eval: int
) -> None:
    slow = {"forward_in_tokens": True, "use_cached_outputs": False}
    expected = inspected(captums, method, INPUTS[kind](), **slow)
    calls = inspected(
        ours,
        method,
        INPUTS[kind](),
        perturbations_per_eval=perturbations_per_eval,
    )
    assert [call[:2] for call in calls] == [call[:2] for call in expected]
    for call, reference in zip(calls, expected, strict=True):
        assert isinstance(call[2], list)
        assert call[2] == pytest.approx(reference[2], rel=1e-4, abs=0)


@pytest.mark.parametrize("method", ["feature_ablation", "shapley"])
def test_inspection_sees_every_picture(method: str) -> None:
    slow = {"forward_in_tokens": True, "use_cached_outputs": False}
    expected = inspected(captums, method, INPUTS["image"](), **slow)
    calls = inspected(ours, method, INPUTS["image"]())
    assert [call[:2] for call in calls] == [call[:2] for call in expected]
    for call, reference in zip(calls, expected, strict=True):
        assert call[2] == pytest.approx(reference[2], rel=1e-4, abs=0)


@pytest.mark.parametrize("attr_target", ["prob", "logit"])
def test_inspection_is_told_probabilities_whatever_is_attributed(attr_target: str) -> None:
    expected = inspected(ours, "feature_ablation", INPUTS["token"]())
    calls = inspected(ours, "feature_ablation", INPUTS["token"](), attr_target=attr_target)
    assert len(calls) == len(expected) > 1
    for call, reference in zip(calls, expected, strict=True):
        assert call[2] == pytest.approx(reference[2], rel=1e-4, abs=0)


def test_inspection_works_without_forward_in_tokens() -> None:
    """Captum never calls it then."""
    inp = INPUTS["template_list"]()
    assert inspected(captums, "feature_ablation", inp) == []
    assert len(inspected(ours, "feature_ablation", inp, forward_in_tokens=False)) == 5


# --- baselines that are drawn --------------------------------------------------------------------


class Drawn:
    """Gives one set of baselines after the other, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> list[str]:
        self.count += 1
        return list(SAMPLES[(self.count - 1) % len(SAMPLES)])


@pytest.mark.parametrize("perturbations_per_eval", [1, 3])
@pytest.mark.parametrize("num_trials", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_callable_baselines_are_drawn_once_per_trial(
    method: str, num_trials: int, perturbations_per_eval: int
) -> None:
    draw = Drawn()
    inp = template_input(TEMPLATE, list(VALUES), draw)
    ours(
        method,
        tiny_model("llama"),
        inp,
        target=target_ids(1),
        num_trials=num_trials,
        perturbations_per_eval=perturbations_per_eval,
    )
    assert draw.count == num_trials


@pytest.mark.parametrize("method", ["feature_ablation", "shapley"])
def test_trials_are_averaged_over_the_draws(method: str) -> None:
    """What is remembered of one draw must not serve the next."""
    model, given = tiny_model("llama"), {"target": target_ids(2)}
    apart = [
        rows(captums(method, model, template_input(TEMPLATE, list(VALUES), list(sample)), **given))
        for sample in SAMPLES
    ]
    inp = template_input(TEMPLATE, list(VALUES), Drawn())
    result = ours(method, model, inp, num_trials=2, **given)
    assert_close(rows(result), torch.stack(apart).mean(0))


def test_product_baselines_repeat_with_a_seed() -> None:
    product = captum.attr.ProductBaselines([[sample[i] for sample in SAMPLES] for i in range(4)])
    model, given = tiny_model("llama"), {"target": target_ids(2)}

    def run(seed: int) -> torch.Tensor:
        inp = template_input(TEMPLATE, list(VALUES), product)
        return rows(ours("shapley_sampling", model, inp, seed=seed, num_trials=2, **given))

    assert torch.equal(run(0), run(0))
    assert any(not torch.allclose(run(0), run(seed), rtol=1e-3) for seed in (1, 2, 3))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_product_baselines_are_one_draw_of_the_product(seed: int) -> None:
    product = captum.attr.ProductBaselines([[sample[i] for sample in SAMPLES] for i in range(4)])
    seed_everything(seed)
    drawn = product()
    model, given = tiny_model("llama"), {"target": target_ids(2)}
    fixed = template_input(TEMPLATE, list(VALUES), drawn)
    expected = captums("feature_ablation", model, fixed, **given)
    result = ours(
        "feature_ablation",
        model,
        template_input(TEMPLATE, list(VALUES), product),
        seed=seed,
        **given,
    )
    assert_close(rows(result), rows(expected))


def test_one_trial_after_another_with_one_wrapper() -> None:
    """Nothing of one call is left in the next: another input, other baselines, another target."""
    wrapper = LLMAttribution(captum.attr.FeatureAblation(tiny_model("llama")), tiny_tokenizer())
    inputs = [
        template_input(TEMPLATE, list(VALUES)),
        template_input(TEMPLATE, list(VALUES), list(OTHERS)),
        token_input("Dave lives", baselines=9),
        token_input("Dave lives", baselines=11),
    ]
    for inp in inputs:
        for count in (1, 3):
            expected = captums("feature_ablation", wrapper.model, inp, target=target_ids(count))
            result = wrapper.attribute(inp, target=target_ids(count))
            assert_close(result.token_attr, expected.token_attr)
