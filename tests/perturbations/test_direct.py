"""The same numbers as log p computed by the model itself: scores, Shapley values, baselines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext import TextTokenInput
from captum_llm_ext.inputs import baselines
from tests.models.families import (
    FAMILIES,
    tiny_model,
    tiny_tokenizer,
)
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    ENTRIES,
    METHODS,
    SHORT,
    ablation,
    game,
    nearest_by_hand,
    ours,
    replaced_tokens,
    rows,
    shapley,
    token_input,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SCORES = ("log_prob", "prob", "logit")


def assert_rows_close(result: Any, expected: Tensor, tolerance: float = 1e-4) -> None:
    """The sequence and the tokens each on their own scale: p of a sequence is tiny."""
    found = rows(result)
    assert found.shape == expected.shape
    for part in (slice(0, 1), slice(1, None)):
        largest = expected[part].abs().max()
        assert largest > 0
        assert (found[part] - expected[part]).abs().max() <= tolerance * largest


def test_ablation_is_what_log_p_loses() -> None:
    model, (make, count) = tiny_model("llama"), ENTRIES["token"]
    value = truth("token", model, target_ids(1))
    whole = frozenset(range(count))
    expected = [float(value(whole)[0] - value(whole - {i})[0]) for i in range(count)]
    result = ours("feature_ablation", model, make(), target=target_ids(1))
    assert result.seq_attr.tolist() == pytest.approx(expected, abs=1e-4)


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attr_target", SCORES)
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_of_every_score(family: str, kind: str, attr_target: str) -> None:
    make, count = ENTRIES[kind]
    model, target = tiny_model(family), target_ids(3)
    expected = ablation(truth(kind, model, target, kind=attr_target), count)
    given = {"target": target, "attr_target": attr_target}
    assert_rows_close(ours("feature_ablation", model, make(), **given), expected)


@pytest.mark.parametrize("attr_target", SCORES)
@pytest.mark.parametrize("contrast", ["many", "one", "text"])
@pytest.mark.parametrize("kind", ["token", "emptied template"])
def test_contrast_with_another_target(kind: str, contrast: str, attr_target: str) -> None:
    make, count = ENTRIES[kind]
    model, target = tiny_model("llama"), target_ids(3)
    others = torch.tensor({"many": [280, 17, 300], "one": [280] * 3, "text": [0]}[contrast])
    given: Any = others[:1] if contrast == "one" else others
    if contrast == "text":
        given = " golf"
        others = torch.tensor(tiny_tokenizer().encode(given, add_special_tokens=False)).expand(3)
    value = truth(kind, model, target, kind=attr_target, contrast=others)
    result = ours(
        "feature_ablation",
        model,
        make(),
        target=target,
        attr_target=attr_target,
        contrast_target=given,
    )
    assert_rows_close(result, ablation(value, count))


def test_sequence_row_of_prob_is_of_the_whole_sequence() -> None:
    """exp(Σ log p), not the sum of the tokens' probabilities."""
    model, target = tiny_model("llama"), target_ids(2)
    value = truth("token", model, target, kind="prob")
    everything = value(frozenset(range(5)))
    assert everything[0] == pytest.approx(float(everything[1] * everything[2]))
    result = ours(
        "feature_ablation", model, ENTRIES["token"][0](), target=target, attr_target="prob"
    )
    assert_rows_close(result, ablation(value, 5))
    assert not torch.allclose(result.seq_attr, result.token_attr.sum(0), rtol=0.1)


# --- Shapley values ------------------------------------------------------------------------------


@pytest.mark.parametrize("attr_target", SCORES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon"])
def test_shapley_values_by_their_definition(family: str, attr_target: str) -> None:
    model, target = tiny_model(family), target_ids(2)
    expected = shapley(truth("template", model, target, kind=attr_target), 4)
    given = {"target": target, "attr_target": attr_target}
    assert_rows_close(ours("shapley", model, ENTRIES["template"][0](), **given), expected)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("method", ["shapley", "shapley_sampling"])
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_shapley_values_add_up(family: str, method: str, kind: str) -> None:
    make, count = ENTRIES[kind]
    if method == "shapley" and count > 4:
        make, count = (lambda: token_input(SHORT, baselines=5, skip_tokens=["<s>"])), 4
    model, target = tiny_model(family), target_ids(3)
    value = truth(kind, model, target)
    absent = frozenset({0}) if kind == "token" and count == 4 else frozenset()
    difference = value(frozenset(range(5))) - value(absent)
    result = ours(method, model, make(), target=target)
    found = rows(result).sum(1)
    assert ((found - difference).abs() <= 1e-4 * difference.abs().clamp(min=1)).all()
    assert difference[0].abs() > 0.5


# --- baselines of tokens -------------------------------------------------------------------------


NAMED: dict[str, tuple[Any, int]] = {
    "id": (17, 17),
    "token": ("Ġgolf", -1),
    "pad": ("pad", 3),
    "eos": ("eos", 2),
    "unk": ("unk", 0),
}


def absent_ids(given: Any, number: int, model: nn.Module, ids: list[int]) -> list[int]:
    if number == -1:
        number = tiny_tokenizer().vocab[given]
    return [number] * len(ids)


@pytest.mark.parametrize("where", ["input", "keyword", "keyword over input"])
@pytest.mark.parametrize("name", NAMED)
def test_named_baselines(name: str, where: str) -> None:
    given, number = NAMED[name]
    model, target, ids = tiny_model("llama"), target_ids(2), tiny_tokenizer().encode(SHORT)
    own = {"input": {"baselines": given}, "keyword": {}}.get(where, {"baselines": "eos"})
    if name == "eos" and where == "keyword over input":
        own = {"baselines": 9}
    keyword = {} if where == "input" else {"baselines": given}
    inp = TextTokenInput(SHORT, tiny_tokenizer(), **own)
    absent = absent_ids(given, number, model, ids)
    expected = ablation(game(model, replaced_tokens(ids, absent), target), len(ids))
    assert_close(rows(ours("feature_ablation", model, inp, target=target, **keyword)), expected)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("where", ["input", "keyword"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_nearest_tokens_as_baselines(family: str, where: str, rank: int) -> None:
    model, target, ids = tiny_model(family), target_ids(2), tiny_tokenizer().encode(SHORT)
    given: Any = "nearest" if rank == 1 else ("nearest", rank)
    inp: Any = (
        TextTokenInput(SHORT, tiny_tokenizer(), baselines=given)
        if where == "input"
        else token_input(SHORT)
    )
    keyword = {} if where == "input" else {"baselines": given}
    absent = nearest_by_hand(model, ids, rank)
    assert absent != ids
    value = game(model, replaced_tokens(ids, absent), target)
    result = ours("feature_ablation", model, inp, target=target, **keyword)
    assert_close(rows(result), ablation(value, len(ids)))


@pytest.mark.parametrize("rank", [1, 5, 60, 351])
@pytest.mark.parametrize("at_once", [7, 50, 351, 352])
def test_nearest_tokens_of_a_vocabulary_in_parts(
    at_once: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "IDS_AT_ONCE", at_once)
    model, ids = tiny_model("llama"), tiny_tokenizer().encode(SHORT)
    embedded: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: embedded.append(args[0].numel())
    )
    absent = torch.ones(len(ids)).bool()
    tokens = baselines.AbsentTokens(torch.tensor(ids), absent, tiny_tokenizer(), model)
    nearest = baselines.nearest_ids(rank, tokens)
    hook.remove()
    assert nearest.tolist() == nearest_by_hand(model, ids, rank)
    assert max(embedded) == at_once


def test_nearest_tokens_leave_skipped_ones_and_the_input_alone() -> None:
    model, target, ids = tiny_model("llama"), target_ids(2), tiny_tokenizer().encode(SHORT)
    inp = TextTokenInput(SHORT, tiny_tokenizer(), baselines="nearest", skip_tokens=["<s>", "Ġin"])
    before = {name: str(value) for name, value in vars(inp).items()}
    value = game(model, replaced_tokens(ids, nearest_by_hand(model, ids, 1)), target)
    kept = [
        i
        for i, token in enumerate(tiny_tokenizer().convert_ids_to_tokens(ids))
        if token not in ("<s>", "Ġin")
    ]
    expected = ablation(value, len(ids))[:, kept]
    assert_close(rows(ours("feature_ablation", model, inp, target=target)), expected)
    assert {name: str(value) for name, value in vars(inp).items()} == before


@pytest.mark.parametrize("method", METHODS)
def test_keyword_equals_the_inputs_own_baseline(method: str) -> None:
    model, given = tiny_model("llama"), {"target": target_ids(2)}
    own = ours(method, model, token_input("Dave lives", baselines=17), **given)
    keyword = ours(method, model, token_input("Dave lives", baselines=3), baselines=17, **given)
    assert_close(rows(keyword), rows(own), 1e-5)
