"""Deletion and insertion curves of every kind of input and score, against plain forwards."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch

from captum_llm_ext import (
    FeatureAblation,
    LayerSaliency,
    LLMAttribution,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from captum_llm_ext.metrics import faithfulness
from tests.metrics.cases import (
    ATTRIBUTIONS,
    KINDS,
    ORDERS,
    SIX,
    assert_curves,
    curves_by_hand,
    judged,
    tokens,
)
from tests.models.families import FAMILIES, tiny_model, tiny_tokenizer
from tests.oracles.cases import target_ids
from tests.perturbations.cases import (
    OTHERS,
    SHORT,
    TEMPLATE,
    VALUES,
    filled_template,
    game,
    replaced_tokens,
)


def test_deletion_and_insertion_of_one_prompt() -> None:
    model, (inp, prompt_of, _) = tiny_model("llama"), tokens()
    found = judged(model, inp, [3.0, 1.0, 2.0, 5.0, 4.0])
    assert_curves(found, game(model, prompt_of, target_ids(2)), [3, 4, 0, 2, 1])


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
    model, (inp, prompt_of, _) = tiny_model(family), tokens()
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
    model, (inp, prompt_of, _) = tiny_model("llama"), tokens()
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
    model, (inp, prompt_of, _) = tiny_model("llama"), tokens()
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


# --- results of all kinds ------------------------------------------------------------------------


def test_results_of_both_wrappers_and_of_captum() -> None:
    model, inp, target = tiny_model("llama"), tokens()[0], target_ids(2)
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
