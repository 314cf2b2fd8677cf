"""The input of a result carries the baseline of its attribution to later uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from captum_llm_ext import FeatureAblation, LLMAttribution, TextTokenInput, explain
from captum_llm_ext.metrics import faithfulness
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import SHORT, game, nearest_by_hand, replaced_tokens

# A few steps, which do not converge, are enough to compare.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = tiny_tokenizer().encode(SHORT)
TOKENS: dict[str, Any] = {
    "name": ("pad", [3] * len(IDS)),
    "id": (9, [9] * len(IDS)),
    "tensor": (torch.arange(4, 4 + len(IDS)), list(range(4, 4 + len(IDS)))),
    "nearest": ("nearest", None),
}
METHODS = ["ig", "ablation"]
NOT_TOKENS: dict[str, Any] = {
    "zero": "zero",
    "mean": "mean",
    "embedding": torch.full((32,), 0.1),
    "several": ["pad", "eos"],
}


def attributed(method: str, baselines: Any, inp: Any = SHORT) -> Any:
    steps = {"n_steps": 3} if method == "ig" else {}
    options = {} if baselines is None else {"baselines": baselines}
    model = tiny_model("llama")
    return explain(model, tiny_tokenizer(), inp, target_ids(2), method, **steps, **options)


def difference(absent: list[int] | None) -> float:
    """Score of the whole prompt minus that of the baseline prompt, by plain forwards."""
    model = tiny_model("llama")
    absent = nearest_by_hand(model, IDS, 1) if absent is None else absent
    value = game(model, replaced_tokens(IDS, absent), target_ids(2))
    return float(value(frozenset(range(len(IDS))))[0] - value(frozenset())[0])


def test_an_ablation_by_pad_is_repeated_with_pad() -> None:
    result = attributed("ablation", "pad")
    again = attributed("ablation", None, result.inp)
    assert_close(again.seq_attr, result.seq_attr)
    assert not torch.allclose(again.seq_attr, attributed("ablation", None).seq_attr)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("method", METHODS)
def test_a_result_is_judged_against_its_baseline(method: str, name: str) -> None:
    baselines, absent = TOKENS[name]
    result, expected = attributed(method, baselines), difference(absent)
    assert abs(expected - difference([0] * len(IDS))) > 0.1
    judged = faithfulness(tiny_model("llama"), tiny_tokenizer(), result, target_ids(2), n_random=1)
    assert judged.score_difference == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("second", "first", "name"),
    [
        *(("ig", "ablation", name) for name in TOKENS),
        *(("ablation", "ig", name) for name in TOKENS),
        *((method, method, "nearest") for method in METHODS),
    ],
)
def test_the_input_of_a_result_keeps_its_baseline(second: str, first: str, name: str) -> None:
    baselines, absent = TOKENS[name]
    again = attributed(second, None, attributed(first, baselines).inp)
    assert_close(again.seq_attr, attributed(second, baselines).seq_attr)
    ids = nearest_by_hand(tiny_model("llama"), IDS, 1) if absent is None else absent
    assert_close(again.seq_attr, attributed(second, torch.tensor(ids)).seq_attr)
    other = attributed(second, 0, again.inp)
    assert_close(other.seq_attr, attributed(second, 0).seq_attr)


@pytest.mark.parametrize("name", NOT_TOKENS)
@pytest.mark.parametrize("before", [None, "pad"])
def test_a_baseline_that_no_prompt_can_hold(name: str, before: str | None) -> None:
    inp = SHORT if before is None else attributed("ablation", before).inp
    result = attributed("ig", NOT_TOKENS[name], inp)
    again = attributed("ig", None, result.inp)
    assert_close(again.seq_attr, result.seq_attr)
    model, target = tiny_model("llama"), target_ids(2)
    with pytest.raises(ValueError, match="pass baselines= with one of tokens"):
        faithfulness(model, tiny_tokenizer(), result, target)
    judged = faithfulness(model, tiny_tokenizer(), result, target, baselines=9, n_random=1)
    assert judged.score_difference == pytest.approx(difference(TOKENS["id"][1]), abs=1e-3)


def test_the_input_of_the_caller_does_not_change() -> None:
    inp = TextTokenInput(SHORT, tiny_tokenizer(), baselines=7)
    before = {name: str(value) for name, value in vars(inp).items()}
    for method in ("ig", "ablation"):
        attributed(method, "pad", inp)
    assert {name: str(value) for name, value in vars(inp).items()} == before


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), np.uint16(3)])
def test_numbers_of_numpy(number: Any) -> None:
    inp = TextTokenInput(SHORT, tiny_tokenizer(), baselines=number)
    assert type(inp.baselines) is int
    ablation = LLMAttribution(FeatureAblation(tiny_model("llama")), tiny_tokenizer())
    value = game(tiny_model("llama"), replaced_tokens(IDS, 3), target_ids(2))
    whole = frozenset(range(len(IDS)))
    expected = torch.stack([value(whole)[0] - value(whole - {i})[0] for i in sorted(whole)])
    assert_close(ablation.attribute(inp, target_ids(2)).seq_attr, expected)
    ranked = attributed("ablation", ("nearest", np.int64(2)))
    assert_close(ranked.seq_attr, attributed("ablation", ("nearest", 2)).seq_attr)
