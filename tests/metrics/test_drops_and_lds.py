"""Drops without the first features, the datamodeling score, and several ways of taking out."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch

from captum_llm_ext import FeatureAblation, LLMAttribution, TextTemplateInput, TextTokenInput
from captum_llm_ext.metrics import compare_methods, faithfulness
from captum_llm_ext.metrics.lds import half_masks
from captum_llm_ext.scoring.rank_correlation import rank_correlation
from tests.metrics.cases import ATTRIBUTIONS, KINDS, SIX, curves_by_hand, judged, result_of, tokens
from tests.models.families import LinearToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import target_ids
from tests.perturbations.cases import SHORT, game


@pytest.mark.parametrize("kind", KINDS)
def test_drops_and_lds_by_plain_forwards(kind: str) -> None:
    inp, prompt_of, tokenizer = KINDS[kind]()
    n_features = inp.n_itp_features
    model, attr = tiny_model("llama"), ATTRIBUTIONS[:n_features]
    value = game(model, prompt_of, target_ids(2))
    generator = torch.Generator().manual_seed(5)
    options: Any = {"generator": generator, "n_masks": 12}
    found = judged(model, inp, attr, tokenizer=tokenizer or tiny_tokenizer(), **options)
    order = sorted(range(n_features), key=lambda i: -attr[i])
    whole = value(frozenset(order))[0]
    for top in (1, 3, 5):
        assert found.drops[top] == pytest.approx(
            float(whole - value(frozenset(order[top:]))[0]), abs=1e-3
        )
    masks = half_masks(12, n_features, torch.Generator().manual_seed(5)).bool().tolist()
    present = [frozenset(i for i in range(n_features) if row[i]) for row in masks]
    sums = [round(sum(attr[i] for i in one), 6) for one in present]
    truth = scipy.stats.spearmanr(sums, [float(value(one)[0]) for one in present]).statistic
    assert found.lds == pytest.approx(truth, abs=1e-6)


def test_lds_of_a_linear_model_is_one_for_what_it_adds_up() -> None:
    model, inp = LinearToy(), TextTokenInput(SIX, tiny_tokenizer(), baselines=7)
    result = LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(inp, target_ids(2))
    assert faithfulness(model, tiny_tokenizer(), result, target_ids(2)).lds > 0.999
    turned = result_of(inp, (-result.seq_attr).tolist(), target_ids(2))
    assert faithfulness(model, tiny_tokenizer(), turned, target_ids(2)).lds < -0.999


@pytest.mark.parametrize("n_features", [1, 2, 7])
def test_masks_have_exactly_half_of_the_features(n_features: int) -> None:
    masks = half_masks(200, n_features, torch.Generator().manual_seed(0))
    assert masks.shape == (200, n_features)
    assert (masks.sum(1) == n_features // 2).all()
    share = n_features // 2 / n_features
    assert (masks.mean(0) - share).abs().max() < 4 * (share * (1 - share) / 200) ** 0.5 + 1e-9


def test_rank_correlation_is_scipys() -> None:
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randint(4, (5, 30), generator=generator).double()  # with ties
    scores = torch.randint(9, (30,), generator=generator).double()
    expected = [scipy.stats.spearmanr(row, scores).statistic for row in predicted]
    assert rank_correlation(predicted, scores).tolist() == pytest.approx(expected)
    assert rank_correlation(predicted[:1] * 0, scores).isnan().all()


def test_one_feature_has_no_lds_and_all_drops_are_its_own() -> None:
    inp = TextTemplateInput("Dave lives in {}", ["Palm Coast"], ["Tokyo"])
    found = judged(tiny_model("llama"), inp, [1.0])
    assert found.lds != found.lds
    assert list(found.drops.values()) == pytest.approx([found.score_difference] * 3)


def test_methods_compared_in_several_ways_of_taking_out() -> None:
    """Each way's table is what plain forwards give for its prompts."""
    model, inp, ids = tiny_model("llama"), tokens()[0], tiny_tokenizer().encode(SHORT)
    methods = {
        name: lambda model, tokenizer, inp, target, attr=attr: result_of(inp, attr, target)
        for name, attr in (("a", ATTRIBUTIONS[:5]), ("b", ATTRIBUTIONS[4::-1]))
    }
    ways: dict[str, Any] = {"seven": 7, "gone": "remove"}
    prompts_of = {
        "seven": lambda there: [t if i in there else 7 for i, t in enumerate(ids)],
        "gone": lambda there: [t for i, t in enumerate(ids) if i in there] or ids[-1:],
    }
    given: dict[str, Any] = {"targets": [target_ids(2)] * 2, "n_random": 3, "removed_by": ways}
    found = compare_methods(model, tiny_tokenizer(), [inp, inp], methods, **given)
    assert found.table.index.names == ["removed by", "method"]
    for way, prompt_of in prompts_of.items():
        value = game(model, prompt_of, target_ids(2))
        for name, attr in (("a", ATTRIBUTIONS[:5]), ("b", ATTRIBUTIONS[4::-1])):
            order = sorted(range(5), key=lambda i: -attr[i])
            deletion, _ = curves_by_hand(value, order)
            area = float(deletion[0] - torch.trapezoid(deletion) / 5)
            rows = found.prompts
            row = rows[(rows["removed by"] == way) & (rows["method"] == name)].iloc[0]
            assert row["deletion"] == pytest.approx(area, abs=1e-3)
            assert row["drop@3"] == pytest.approx(float(deletion[0] - deletion[3]), abs=1e-3)
            assert found.table.loc[(way, name), ("drop@3", "mean")] == pytest.approx(
                rows[(rows["removed by"] == way) & (rows["method"] == name)]["drop@3"].mean()
            )
    alone = compare_methods(
        model,
        tiny_tokenizer(),
        [inp, inp],
        methods,
        baselines="remove",
        **{**given, "removed_by": None},
    )
    assert (
        alone.prompts["lds"].tolist()
        == found.prompts["lds"][found.prompts["removed by"] == "gone"].tolist()
    )
    labels = [label.get_text() for label in found.plot()[1].get_yticklabels()]
    assert sorted(labels) == ["gone: a", "gone: b", "seven: a", "seven: b"]
    with pytest.raises(ValueError, match="removed_by to be a dict of names and baselines"):
        compare_methods(model, tiny_tokenizer(), [inp], methods, removed_by="pad")
