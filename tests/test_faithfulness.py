"""Deletion and insertion curves against plain forwards, all orders, and what linearity implies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import captum.attr
import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext import (
    FeatureAblation,
    LayerSaliency,
    LLMAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
    chat_input,
    segment_input,
)
from captum_llm_ext.metrics import Faithfulness, RemovalCurves, faithfulness
from tests.cases import target_ids
from tests.families import FAMILIES, CausalToy, LinearToy, tiny_model, tiny_tokenizer
from tests.perturbation_cases import (
    KEYED_TEMPLATE,
    OTHERS,
    SHORT,
    TEMPLATE,
    VALUES,
    Game,
    filled_template,
    game,
    keyed,
    replaced_tokens,
)
from tests.template_cases import chat_tokenizer

SIX = "Dave lives in Palm Coast"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Dave lives"}]
ATTRIBUTIONS = [0.5, -2.0, 3.0, 0.1, -0.3, 1.0]
ORDERS = {False: [2, 5, 0, 3, 4, 1], True: [2, 1, 5, 0, 4, 3]}  # of all six, by value or size


def result_of(inp: Any, attr: Sequence[float], target: Tensor, **more: Any) -> LLMAttributionResult:
    tokenizer = more.pop("tokenizer", tiny_tokenizer())
    return LLMAttributionResult(
        input_tokens=list(inp.values),
        output_tokens=tokenizer.convert_ids_to_tokens(target.tolist()),
        seq_attr=attr,
        inp=inp,
    )


def judged(model: nn.Module, inp: Any, attr: Sequence[float], **more: Any) -> Faithfulness:
    target = more.pop("target", target_ids(2))
    tokenizer = more.pop("tokenizer", tiny_tokenizer())
    result = result_of(inp, attr, target, tokenizer=tokenizer)
    return faithfulness(model, tokenizer, result, target, **{"n_random": 2, **more})


def curves_by_hand(value: Game, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Deletion and insertion, (1 + n_features,) each, a plain forward for every point."""
    points = range(len(order) + 1)
    deletion = [value(frozenset(order[k:]))[0] for k in points]
    insertion = [value(frozenset(order[:k]))[0] for k in points]
    return torch.stack(deletion), torch.stack(insertion)


def assert_curves(found: Faithfulness, value: Game, order: Sequence[int]) -> None:
    deletion, insertion = curves_by_hand(value, order)
    assert deletion.std() > 0.05
    torch.testing.assert_close(found.curves.deletion[0], deletion, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.curves.insertion[0], insertion, atol=2e-4, rtol=1e-4)
    assert found.curves.counts.tolist() == list(range(len(order) + 1))


# --- every kind of input -------------------------------------------------------------------------


def _tokens() -> tuple[Any, Callable, Any]:
    ids = tiny_tokenizer().encode(SHORT)
    return TextTokenInput(SHORT, tiny_tokenizer(), baselines=7), replaced_tokens(ids, 7), None


def _tokens_with_skipped() -> tuple[Any, Callable, Any]:
    ids = tiny_tokenizer().encode(SHORT)
    inp = TextTokenInput(SHORT, tiny_tokenizer(), baselines=7, skip_tokens=["<s>"])
    whole = replaced_tokens(ids, 7)
    return inp, lambda present: whole(frozenset({0} | {i + 1 for i in present})), None


def _template() -> tuple[Any, Callable, Any]:
    inp = TextTemplateInput(TEMPLATE, list(VALUES), list(OTHERS))
    return inp, filled_template(TEMPLATE, VALUES, OTHERS), None


def _captums_template() -> tuple[Any, Callable, Any]:
    inp = captum.attr.TextTemplateInput(KEYED_TEMPLATE, keyed(VALUES))
    return inp, filled_template(TEMPLATE, VALUES, [""] * 4), None


def _segments() -> tuple[Any, Callable, Any]:
    text = "Dave lives. In Palm Coast! Hiking golf."
    parts = ["Dave lives.", "In Palm Coast!", "Hiking golf."]
    return segment_input(text), filled_template("{} {} {}", parts, [""] * 3), None


def _chat() -> tuple[Any, Callable, Any]:
    tokenizer = chat_tokenizer()
    inp = chat_input(MESSAGES, tokenizer)
    ids: list[int] = inp.inp_tensor[0].tolist()
    places = [i for i, inside in enumerate(inp.itp_mask[0].tolist()) if inside]
    assert tokenizer.decode([ids[i] for i in places]) == "Dave lives"

    def prompt_of(present: frozenset[int]) -> list[int]:
        absent = {place for i, place in enumerate(places) if i not in present}
        return [0 if i in absent else token for i, token in enumerate(ids)]

    return inp, prompt_of, tokenizer


KINDS = {
    "tokens": _tokens,
    "skipped tokens": _tokens_with_skipped,
    "template": _template,
    "Captum's template": _captums_template,
    "segments": _segments,
    "chat": _chat,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon"])
def test_curves_by_plain_forwards(family: str, kind: str) -> None:
    inp, prompt_of, tokenizer = KINDS[kind]()
    n_features = inp.n_itp_features
    model, attr = tiny_model(family), ATTRIBUTIONS[:n_features]
    order = [i for i in ORDERS[False] if i < n_features]
    found = judged(model, inp, attr, tokenizer=tokenizer or tiny_tokenizer())
    assert_curves(found, game(model, prompt_of, target_ids(2)), order)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_are_the_whole_and_the_bare_prompt(family: str) -> None:
    model, (inp, prompt_of, _) = tiny_model(family), _tokens()
    value = game(model, prompt_of, target_ids(3))
    found = judged(model, inp, ATTRIBUTIONS[:5], target=target_ids(3), n_random=3)
    whole, bare = float(value(frozenset(range(5)))[0]), float(value(frozenset())[0])
    for curves in (found.curves, found.random):
        first = torch.cat([curves.deletion[:, 0], curves.insertion[:, -1]])
        last = torch.cat([curves.deletion[:, -1], curves.insertion[:, 0]])
        assert ((first - whole).abs() < 2e-4).all()
        assert ((last - bare).abs() < 2e-4).all()
    assert found.score_difference == pytest.approx(whole - bare, abs=4e-4)


@pytest.mark.parametrize("attr_target", ["log_prob", "prob", "logit"])
@pytest.mark.parametrize("contrast", [None, [280, 17]])
def test_curves_of_every_score(attr_target: str, contrast: list[int] | None) -> None:
    model, (inp, prompt_of, _) = tiny_model("llama"), _tokens()
    other = None if contrast is None else torch.tensor(contrast)
    value = game(model, prompt_of, target_ids(2), kind=attr_target, contrast=other)
    found = judged(
        model, inp, ATTRIBUTIONS[:5], attr_target=attr_target, contrast_target=other, n_random=1
    )
    deletion, insertion = curves_by_hand(value, [2, 0, 3, 4, 1])
    torch.testing.assert_close(found.curves.deletion[0], deletion, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.curves.insertion[0], insertion, atol=1e-5, rtol=1e-3)


def test_values_of_one_mask_go_together() -> None:
    model, mask = tiny_model("llama"), [7, 3, 7, 1]
    inp = TextTemplateInput(TEMPLATE, list(VALUES), list(OTHERS), mask=mask)
    result = LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(inp, target_ids(2))
    groups = [[0, 2], [1], [3]]
    size = [float(result.seq_attr[group[0]]) for group in groups]
    order = sorted(range(3), key=lambda i: -size[i])
    fill = filled_template(TEMPLATE, VALUES, OTHERS)
    prompt_of = lambda present: fill(frozenset(v for g in present for v in groups[g]))  # noqa: E731
    found = faithfulness(model, tiny_tokenizer(), result, target_ids(2))
    assert_curves(found, game(model, prompt_of, target_ids(2)), order)


@pytest.mark.parametrize("absolute", [False, True])
def test_ranked_by_value_or_by_size(absolute: bool) -> None:
    model, ids = tiny_model("llama"), tiny_tokenizer().encode(SIX)[:6]
    inp = TextTokenInput(tiny_tokenizer().decode(ids[1:]), tiny_tokenizer(), baselines=7)
    assert inp.n_itp_features == 6
    value = game(model, replaced_tokens(inp.inp_tensor[0].tolist(), 7), target_ids(2))
    found = judged(model, inp, ATTRIBUTIONS, absolute=absolute)
    assert_curves(found, value, ORDERS[absolute])


def test_equal_attributions_keep_the_order_of_the_prompt() -> None:
    model, (inp, prompt_of, _) = tiny_model("llama"), _tokens()
    found = judged(model, inp, [1.0, 2.0, 1.0, 2.0, 1.0])
    assert_curves(found, game(model, prompt_of, target_ids(2)), [1, 3, 0, 2, 4])


# --- baselines -----------------------------------------------------------------------------------


def test_baselines_by_keyword_and_those_of_the_attribution() -> None:
    model, target = tiny_model("llama"), target_ids(2)
    inp = TextTokenInput(SHORT, tiny_tokenizer(), baselines=7)
    value = game(model, replaced_tokens(tiny_tokenizer().encode(SHORT), 3), target)
    assert_curves(judged(model, inp, ATTRIBUTIONS[:5], baselines="pad"), value, [2, 0, 3, 4, 1])
    attribution = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    result = attribution.attribute(inp, target, baselines="pad")
    order = sorted(range(5), key=lambda i: -float(result.seq_attr[i]))
    assert_curves(faithfulness(model, tiny_tokenizer(), result, target), value, order)


def test_a_callable_baseline_is_drawn_once() -> None:
    drawn: list[int] = []

    def draw() -> list[str]:
        drawn.append(1)
        return list(OTHERS) if len(drawn) == 1 else ["wrong"] * 4

    inp = TextTemplateInput(TEMPLATE, list(VALUES), draw)
    value = game(tiny_model("llama"), filled_template(TEMPLATE, VALUES, OTHERS), target_ids(2))
    assert_curves(judged(tiny_model("llama"), inp, ATTRIBUTIONS[:4]), value, [2, 0, 3, 1])


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
    model, (inp, prompt_of, _) = tiny_model("gpt2"), _tokens()
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


def test_over_random_is_a_share_of_the_difference() -> None:
    found = judged(tiny_model("llama"), _tokens()[0], ATTRIBUTIONS[:5], n_random=3)
    span = abs(found.score_difference)
    expected = found.deletion_area - float(found.random.deletion_area.mean())
    assert found.over_random()["deletion"] == pytest.approx(expected / span)
    expected = float(found.random.sufficiency.mean()) - found.sufficiency
    assert found.over_random()["sufficiency"] == pytest.approx(expected / span)
    spread = float(found.random.insertion_area.std())
    assert found.summary()["insertion"]["spread"] == pytest.approx(spread)


def test_no_difference_between_whole_and_bare_is_no_division_by_zero() -> None:
    tokens = tiny_tokenizer().encode(SHORT)
    inp = TextTokenInput(SHORT, tiny_tokenizer())
    found = judged(tiny_model("llama"), inp, ATTRIBUTIONS[:5], baselines=torch.tensor(tokens))
    assert found.score_difference == pytest.approx(0.0, abs=1e-4)
    assert all(abs(value) < 0.2 for value in found.over_random().values())


def test_one_feature_and_one_random_order() -> None:
    inp = TextTemplateInput("Dave lives in {}", ["Palm Coast"], ["Tokyo"])
    found = judged(tiny_model("llama"), inp, [1.0], n_random=1)
    assert found.curves.counts.tolist() == [0, 1]
    assert found.deletion_area == pytest.approx(found.score_difference / 2)
    assert found.summary()["deletion"]["spread"] == 0.0


# --- cost and randomness -------------------------------------------------------------------------


class Counting(CausalToy):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Any:
        self.rows += [tuple(row) for row in ids.tolist()]
        return super().forward(ids)


def test_each_distinct_prompt_is_scored_once() -> None:
    model, inp = Counting(), _tokens()[0]
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
    inp = _tokens()[0]
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


# --- results of all kinds ------------------------------------------------------------------------


def test_results_of_both_wrappers_and_of_captum() -> None:
    model, inp, target = tiny_model("llama"), _tokens()[0], target_ids(2)
    gradient = LLMGradientAttribution(LayerSaliency(model, "model.layers.*.mlp"), tiny_tokenizer())
    layered = gradient.attribute(inp, target)
    whole = faithfulness(model, tiny_tokenizer(), layered, target)
    one = faithfulness(model, tiny_tokenizer(), layered["model.layers.0.mlp"], target, inp=inp)
    assert torch.equal(whole.random.deletion, one.random.deletion)
    theirs = captum.attr.LLMAttributionResult(
        input_tokens=layered.input_tokens,
        output_tokens=layered.output_tokens,
        seq_attr=layered.seq_attr,
        inp=inp,
    )
    found = faithfulness(model, tiny_tokenizer(), theirs, target)
    torch.testing.assert_close(found.curves.deletion, whole.curves.deletion)


@pytest.mark.real_model
def test_ablation_beats_random_order_on_the_real_model(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    inp = TextTokenInput("The capital of France is", tokenizer, baselines="pad")
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, " Paris")
    found = faithfulness(model, tokenizer, result, " Paris")
    assert min(found.over_random().values()) > 0.05


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_plot_shows_both_curves_and_random_order(given: bool) -> None:
    found = judged(tiny_model("llama"), _tokens()[0], ATTRIBUTIONS[:5], n_random=3)
    axes = plt.subplots()[1] if given else None
    figure, ax = found.plot(axes)
    assert axes is None or ax is axes
    lines = {line.get_label(): torch.tensor(line.get_ydata()) for line in ax.get_lines()}
    torch.testing.assert_close(lines["deletion"], found.curves.deletion[0])
    torch.testing.assert_close(lines["insertion, random order"], found.random.insertion.mean(0))
    plt.close(figure)


# --- errors --------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target": ({"target": torch.tensor([9, 9])}, ValueError, "pass the target that was"),
    "shorter target": ({"target": target_ids(1)}, ValueError, "pass the target that was"),
    "input": ({"inp": TextTokenInput("Dave", tiny_tokenizer())}, ValueError, "2 features"),
    "kind of input": ({"inp": "Dave lives in"}, TypeError, "got str"),
    "no random": ({"n_random": 0}, ValueError, "n_random must be an int of at least 1"),
    "no steps": ({"n_steps": 0}, ValueError, "n_steps must be"),
    "no rows": ({"internal_batch_size": 0}, ValueError, "internal_batch_size must be"),
    "no fractions": ({"fractions": ()}, ValueError, "fractions must be"),
    "fraction": ({"fractions": (0.5, 1.5)}, ValueError, "fractions must be"),
    "score": ({"attr_target": "odds"}, ValueError, "attr_target must be one of"),
    "embedding baseline": ({"baselines": "mean"}, ValueError, "expected a baseline of tokens"),
    "contrast": ({"contrast_target": torch.tensor([1, 2, 3])}, ValueError, "contrast_target"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_what_was_expected(wrong: str) -> None:
    options, kind, message = WRONG[wrong]
    target = target_ids(2)
    result = result_of(_tokens()[0], ATTRIBUTIONS[:5], target)
    given = {"target": target, **options}
    with pytest.raises(kind, match=message):
        faithfulness(tiny_model("llama"), tiny_tokenizer(), result, **given)


def test_a_result_must_know_its_input_and_have_numbers() -> None:
    model, target = tiny_model("llama"), target_ids(2)
    result = result_of(_tokens()[0], [float("nan")] * 5, target)
    with pytest.raises(ValueError, match="not finite"):
        faithfulness(model, tiny_tokenizer(), result, target)
    result.inp = None
    with pytest.raises(ValueError, match="pass inp="):
        faithfulness(model, tiny_tokenizer(), result, target)


def test_generated_tokens_are_no_features() -> None:
    model, inp, target = tiny_model("llama"), _tokens()[0], target_ids(2)
    method = LayerSaliency(model, model.get_input_embeddings())
    attribution = LLMGradientAttribution(method, tiny_tokenizer())
    result = attribution.attribute(inp, target, include_generated=True)
    with pytest.raises(ValueError, match="no attribution to generated tokens"):
        faithfulness(model, tiny_tokenizer(), result, target)
