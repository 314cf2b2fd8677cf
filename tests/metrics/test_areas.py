"""Areas by hand and over all orders, what linearity implies, and what the curves cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch

from captum_llm_ext import (
    FeatureAblation,
    LLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from captum_llm_ext.metrics import RemovalCurves, faithfulness
from tests.metrics.cases import (
    ATTRIBUTIONS,
    SIX,
    curves_by_hand,
    judged,
    tokens,
)
from tests.models.families import LinearToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import target_ids
from tests.perturbations.cases import (
    SHORT,
    CountingToy,
    filled_template,
    game,
    replaced_tokens,
)

# --- areas ---------------------------------------------------------------------------------------


def test_areas_and_shares_by_hand() -> None:
    curves = RemovalCurves(
        counts=torch.tensor([0, 1, 2, 4]),
        deletion=torch.tensor([[0.0, -4.0, -6.0, -10.0]]),
        insertion=torch.tensor([[-10.0, -2.0, -1.0, 0.0]]),
        fractions=(0.1, 0.5),
    )
    # Trapezoids of width 1/4, 1/4 and 1/2.
    assert float(curves.deletion_area) == pytest.approx(2 / 4 + 5 / 4 + 8 / 2)
    assert float(curves.insertion_area) == pytest.approx(4 / 4 + 8.5 / 4 + 9.5 / 2)
    # 10 % of four features is one of them, 50 % are two.
    assert float(curves.comprehensiveness) == pytest.approx((4 + 6) / 2)
    assert float(curves.sufficiency) == pytest.approx((2 + 1) / 2)


def test_comprehensiveness_and_sufficiency_by_plain_forwards() -> None:
    model, (inp, prompt_of, _) = tiny_model("gpt2"), tokens()
    value = game(model, prompt_of, target_ids(2))
    found = judged(model, inp, ATTRIBUTIONS[:5], fractions=(0.2, 0.5))
    whole = value(frozenset(range(5)))[0]
    without = [value(frozenset({0, 1, 3, 4}))[0], value(frozenset({1, 4}))[0]]
    alone = [value(frozenset({2}))[0], value(frozenset({0, 2, 3}))[0]]
    assert found.comprehensiveness == pytest.approx(float(whole - sum(without) / 2), abs=1e-3)
    assert found.sufficiency == pytest.approx(float(whole - sum(alone) / 2), abs=1e-3)


@pytest.mark.parametrize("area", ["deletion_area", "insertion_area"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_no_order_of_six_features_beats_the_oracle(family: str, area: str) -> None:
    """The best of all 720 orders, found with plain forwards, has the largest area."""
    model, ids = tiny_model(family), tiny_tokenizer().encode(SIX)[:6]
    inp = TextTokenInput(tiny_tokenizer().decode(ids[1:]), tiny_tokenizer(), baselines=7)
    value = game(model, replaced_tokens(inp.inp_tensor[0].tolist(), 7), target_ids(2))

    def by_hand(order: Sequence[int]) -> float:
        deletion, insertion = curves_by_hand(value, order)
        drop, gain = deletion[0] - deletion, insertion - insertion[0]
        rise = drop if area == "deletion_area" else gain
        return float((rise[1:] + rise[:-1]).sum() / 12)

    areas = {order: by_hand(order) for order in permutations(range(6))}
    best, worst = max(areas, key=areas.__getitem__), min(areas, key=areas.__getitem__)
    found = {
        order: getattr(judged(model, inp, [-order.index(i) for i in range(6)]), area)
        for order in (best, worst, *list(areas)[::60])
    }
    for order, value_found in found.items():
        assert value_found == pytest.approx(areas[order], abs=1e-3)
    assert max(found.values()) == found[best]
    assert found[best] > found[worst] + 0.5


# --- a linear model ------------------------------------------------------------------------------


def linear() -> tuple[LinearToy, TextTokenInput]:
    return LinearToy(), TextTokenInput(SIX, tiny_tokenizer(), baselines=7)


def test_random_order_has_half_of_the_difference_on_a_linear_model() -> None:
    """On average the features that are gone have their share of the difference."""
    model, inp = linear()
    n_features = inp.n_itp_features
    found = judged(model, inp, list(range(n_features)), n_random=400)
    half, difference = found.score_difference / 2, abs(found.score_difference)
    assert difference > 0.1
    summary = found.summary()
    assert summary["deletion"]["random"] == pytest.approx(half, abs=1e-4)
    assert summary["insertion"]["random"] == pytest.approx(half, abs=1e-4)
    # The first of each pair alone: nothing cancels, and the mean is within its standard error.
    for areas in (found.random.deletion_area[::2], found.random.insertion_area[::2]):
        assert areas.std() > 0.01
        assert abs(float(areas.mean()) - half) < 4 * float(areas.std()) / 200**0.5


def test_ablation_has_the_best_order_on_a_linear_model() -> None:
    model, inp = linear()
    result = LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(inp, target_ids(2))
    found = faithfulness(model, tiny_tokenizer(), result, target_ids(2))
    attr = result.seq_attr.double().sort(descending=True).values
    n_features = len(attr)
    gone = torch.cat([torch.zeros(1).double(), attr.cumsum(0)])
    best = float((gone[1:] + gone[:-1]).sum() / 2 / n_features)
    assert found.deletion_area == pytest.approx(best, abs=1e-4)
    assert found.insertion_area == pytest.approx(best, abs=1e-4)
    assert found.deletion_area > found.random.deletion_area.max()
    assert min(found.over_random().values()) > 0


def test_over_random_is_measured_from_the_mean_of_random_orders() -> None:
    found = judged(tiny_model("llama"), tokens()[0], ATTRIBUTIONS[:5], n_random=3)
    expected = found.deletion_area - float(found.random.deletion_area.mean())
    assert found.over_random()["deletion"] == pytest.approx(expected)
    expected = float(found.random.sufficiency.mean()) - found.sufficiency
    assert found.over_random()["sufficiency"] == pytest.approx(expected)
    spread = float(found.random.insertion_area.std())
    assert found.summary()["insertion"]["spread"] == pytest.approx(spread)


def test_a_baseline_equal_to_the_input_leaves_nothing_to_tell() -> None:
    ids = tiny_tokenizer().encode(SHORT)
    inp = TextTokenInput(SHORT, tiny_tokenizer())
    found = judged(tiny_model("llama"), inp, ATTRIBUTIONS[:5], baselines=torch.tensor(ids))
    assert found.score_difference == pytest.approx(0.0, abs=1e-4)
    assert found.over_random() == pytest.approx(dict.fromkeys(found.over_random(), 0.0), abs=1e-4)


def test_one_feature_and_one_random_order() -> None:
    inp = TextTemplateInput("Dave lives in {}", ["Palm Coast"], ["Tokyo"])
    found = judged(tiny_model("llama"), inp, [1.0], n_random=1)
    assert found.curves.counts.tolist() == [0, 1]
    assert found.deletion_area == pytest.approx(found.score_difference / 2)
    assert found.summary()["deletion"]["spread"] == 0.0


# --- cost and randomness -------------------------------------------------------------------------


def test_each_distinct_prompt_is_scored_once() -> None:
    model, inp = CountingToy(), tokens()[0]
    found = judged(model, inp, ATTRIBUTIONS[:5], n_random=6, target=target_ids(1))
    prompts = [row for row in model.rows if len(row) == 5]
    assert len(found.random) == 6
    assert len(prompts) == len(set(prompts)) + 1  # the probe runs the whole prompt too
    # Both ends, the own order's two curves, and one curve for each random order.
    assert len(set(prompts)) <= 2 + 2 * 4 + 6 * 4


@pytest.mark.parametrize("options", [{"internal_batch_size": 2}, {"reuse_prefix": False}])
def test_the_batches_change_nothing(options: dict[str, Any]) -> None:
    text = "The capital of France is Paris and the capital of Japan is Tokyo"
    inp = TextTokenInput(text, tiny_tokenizer(), baselines=7)
    attr = torch.randn(inp.n_itp_features, generator=torch.Generator().manual_seed(1)).tolist()
    found = judged(tiny_model("llama"), inp, attr)
    other = judged(tiny_model("llama"), inp, attr, **options)
    torch.testing.assert_close(found.curves.deletion, other.curves.deletion, atol=2e-4, rtol=0)
    torch.testing.assert_close(found.random.insertion, other.random.insertion, atol=2e-4, rtol=0)


def test_random_orders_come_from_the_generator() -> None:
    inp = tokens()[0]
    state = torch.random.get_rng_state()

    def areas(generator: torch.Generator | None = None) -> list[float]:
        found = judged(tiny_model("llama"), inp, ATTRIBUTIONS[:5], n_random=4, generator=generator)
        areas: list[float] = found.random.deletion_area.tolist()
        return areas

    assert areas() == areas() == areas(torch.Generator().manual_seed(0))
    assert areas() != areas(torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_many_features_go_in_even_steps() -> None:
    template = " ".join(["{}"] * 30)
    inp = TextTemplateInput(template, ["a"] * 30, ["b"] * 30)
    found = judged(tiny_model("llama"), inp, list(range(30)), n_steps=5, fractions=(0.01, 0.5))
    assert found.curves.counts.tolist() == [0, 1, 6, 12, 15, 18, 24, 30]
    value = game(
        tiny_model("llama"), filled_template(template, ["a"] * 30, ["b"] * 30), target_ids(2)
    )
    drops = [value(frozenset(range(30)))[0] - value(frozenset(range(30 - k)))[0] for k in (1, 15)]
    assert found.comprehensiveness == pytest.approx(float(sum(drops)) / 2, abs=1e-3)
