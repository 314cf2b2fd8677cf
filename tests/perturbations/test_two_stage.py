"""Two-stage ablation: by its definition on functions and on models, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation
from torch import Tensor, nn

from captum_llm_ext import LLMAttribution, TextTemplateInput, TwoStageAblation, explain
from tests.models.families import LinearToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    ENTRIES,
    Coalition,
    CountingToy,
    Game,
    game,
    image_input,
    rows,
    token_input,
    truth,
)

TEXT = "Dave lives in Palm Coast and"


def by_definition(value: Game, n_features: int) -> Tensor:
    """(1 + n_output, n_features): coalition by coalition; the sequence row ranks the features."""
    everything = frozenset(range(n_features))
    first = [value(everything) - value(everything - {i}) for i in everything]
    order = sorted(everything, key=lambda i: -float(first[i].sum()))
    kept: Coalition = frozenset(order[: n_features - n_features // 4])
    second = [value(kept | {i}) - value(kept - {i}) for i in everything]
    return ((torch.stack(first, 1) + torch.stack(second, 1)) / 2).float()


def game_of(function: Callable[[Tensor], Tensor], x: Tensor, absent: Tensor) -> Game:
    """The game of one example (n_features,), whose features become `absent`."""

    def value(present: Coalition) -> Tensor:
        there = torch.tensor([i in present for i in range(len(x))])
        return function(torch.where(there, x, absent)[None])[0].reshape(-1).double()

    return value


def some_function(x: Tensor) -> Tensor:
    """Products and a maximum, so that contexts differ."""
    return x[:, 0] * x[:, 1] + torch.maximum(x[:, 2], x[:, 3]) + 0.5 * x.prod(1) - x[:, -1]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_a_second_that_makes_up_for_the_first_is_seen() -> None:
    """Either of two features suffices: ablation gives both nothing, here the first one counts."""
    either = lambda x: torch.maximum(x[:, 0], x[:, 7]) + 0.1 * x[:, 1:7].sum(1)  # noqa: E731
    x = torch.ones(1, 8)
    assert FeatureAblation(either).attribute(x)[0, [0, 7]].abs().max() == 0
    found: Any = TwoStageAblation(either).attribute(x)
    assert found[0, 0] == pytest.approx(0.5)


# --- the method as one of Captum's ---------------------------------------------------------------


@pytest.mark.parametrize("per_eval", [1, 3, 100])
@pytest.mark.parametrize("n_features", [4, 5, 8, 9])
def test_by_definition_for_each_example(n_features: int, per_eval: int) -> None:
    x, absent = numbers(3, n_features), numbers(3, n_features, seed=1)
    found = TwoStageAblation(some_function).attribute(x, absent, perturbations_per_eval=per_eval)
    expected = [
        by_definition(game_of(some_function, *pair), n_features)[0]
        for pair in zip(x, absent, strict=True)
    ]
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found.float(), torch.stack(expected))
    plain = FeatureAblation(some_function).attribute(x, absent)
    assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("baselines", [None, 0.5, torch.tensor([[0.5] * 5]).double()])
def test_baselines_as_captum_takes_them(baselines: Any) -> None:
    x = numbers(2, 5)
    absent = torch.full((5,), 0.5 if baselines is not None else 0.0).double()
    found = TwoStageAblation(some_function).attribute(x, baselines)
    expected = [by_definition(game_of(some_function, row, absent), 5)[0] for row in x]
    torch.testing.assert_close(found.float(), torch.stack(expected))


def test_several_outputs_and_a_target() -> None:
    def outputs(x: Tensor) -> Tensor:
        return torch.stack([some_function(x), x[:, 1] * x[:, 2] * x[:, 3]], dim=1)

    x, absent = numbers(1, 6), torch.zeros(6).double()
    both = TwoStageAblation(outputs).attribute(x)
    torch.testing.assert_close(both.float(), by_definition(game_of(outputs, x[0], absent), 6))
    one = TwoStageAblation(outputs).attribute(x, target=0)
    torch.testing.assert_close(one, TwoStageAblation(some_function).attribute(x))


def test_features_of_a_mask_go_together() -> None:
    x, mask = numbers(1, 10), torch.tensor([[3, 0, 1, 1, 2, 2, 7, 8, 3, 3]])
    ids = mask[0].unique().tolist()

    def value(present: Coalition) -> Tensor:
        there = torch.isin(mask, torch.tensor([ids[i] for i in present]))
        return some_function(torch.where(there, x, 0.0)).double()

    expected = by_definition(value, len(ids))[0]
    found = TwoStageAblation(some_function).attribute(x, feature_mask=mask)
    places = [ids.index(feature) for feature in mask[0].tolist()]
    torch.testing.assert_close(found[0].float(), expected[places])


def test_inputs_that_are_a_tuple_are_one_set_of_features() -> None:
    x = numbers(2, 7)

    def split(a: Tensor, b: Tensor) -> Tensor:
        return some_function(torch.cat([a.flatten(1), b], dim=1))

    parts = (x[:, :4].reshape(2, 2, 2), x[:, 4:])
    first, second = TwoStageAblation(split).attribute(parts, (0.0, 0.0))
    whole = TwoStageAblation(some_function).attribute(x)
    torch.testing.assert_close(torch.cat([first.flatten(1), second], dim=1), whole)


def test_one_output_for_all_examples() -> None:
    x = numbers(2, 5)
    found = TwoStageAblation(lambda rows: some_function(rows).sum()).attribute(x)
    plain = FeatureAblation(lambda rows: some_function(rows).sum()).attribute(x)
    assert found.shape == plain.shape == (1, 5)


@pytest.mark.parametrize("n_features", [1, 2, 3])
def test_of_fewer_than_four_features_it_is_ablation(n_features: int) -> None:
    x = numbers(1, n_features)
    torch.testing.assert_close(
        TwoStageAblation(lambda rows: rows.prod(1)).attribute(x),
        FeatureAblation(lambda rows: rows.prod(1)).attribute(x),
    )


@pytest.mark.parametrize("n_features", [4, 7, 12])
def test_it_costs_twice_what_ablation_costs(n_features: int) -> None:
    asked = {"ablation": 0, "two_stage": 0}

    def counting(name: str) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            asked[name] += len(x)
            return some_function(x)

        return function

    x = numbers(1, n_features)
    FeatureAblation(counting("ablation")).attribute(x)
    TwoStageAblation(counting("two_stage")).attribute(x)
    assert asked["ablation"] == n_features + 1
    assert asked["two_stage"] == 2 * asked["ablation"]


# --- through LLMAttribution ----------------------------------------------------------------------


@pytest.mark.parametrize("attr_target", ["log_prob", "prob", "logit"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon", "mixtral"])
def test_of_language_models_by_definition(family: str, entry: str, attr_target: str) -> None:
    make, count = ENTRIES[entry]
    model, target = tiny_model(family), target_ids(3)
    attribution = LLMAttribution(TwoStageAblation(model), tiny_tokenizer(), attr_target)
    expected = by_definition(truth(entry, model, target, kind=attr_target), count)
    found = rows(attribution.attribute(make(), target))
    for part in (slice(0, 1), slice(1, None)):
        largest = expected[part].abs().max()
        assert largest > 0
        assert (found[part] - expected[part]).abs().max() <= 2e-4 * largest


def test_each_stage_is_one_batch_and_no_prompt_is_scored_twice() -> None:
    model, inp = CountingToy(), token_input(TEXT, baselines=7)
    count = inp.n_itp_features
    assert count == 8
    LLMAttribution(TwoStageAblation(model), tiny_tokenizer()).attribute(inp, target_ids(1))
    prompts = [row for row in model.rows if len(row) == count]
    known = {tuple(inp.inp_tensor[0].tolist())}  # goes along in every batch, to check it
    assert len([row for row in prompts if row not in known]) == len(set(prompts) - known)
    assert len(set(prompts)) <= 2 * count + 2
    assert model.calls <= 12


def test_through_the_wrapper_it_costs_twice_what_ablation_costs() -> None:
    costs = {}
    for kind in (FeatureAblation, TwoStageAblation):
        model, inp = tiny_model("llama", fresh=True), token_input(TEXT)
        rows: list[int] = []
        model.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
        wrapper = LLMAttribution(kind(model), tiny_tokenizer())
        wrapper.attribute(inp, target_ids(2), baselines="remove")
        costs[kind] = sum(rows)
    assert costs[FeatureAblation] == 2 + 1 + 8  # the probe has two rows
    assert costs[TwoStageAblation] <= 2 * costs[FeatureAblation]


def test_values_of_a_mask_and_contrast() -> None:
    model = tiny_model("llama")
    template, values = "{} lives in {} and {} {}", ["Dave", "Palm Coast", "plays", "golf"]
    masked = TextTemplateInput(template, values, mask=[0, 1, 0, 2])
    attribution = LLMAttribution(TwoStageAblation(model), tiny_tokenizer())
    result = attribution.attribute(masked, target_ids(2))
    assert result.seq_attr[0] == result.seq_attr[2]
    plain = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    torch.testing.assert_close(
        result.seq_attr, plain.attribute(masked, target_ids(2)).seq_attr, atol=1e-4, rtol=0
    )
    other = TextTemplateInput(template, values)
    contrasted = attribution.attribute(other, target_ids(2), contrast_target=target_ids(2))
    assert float(contrasted.seq_attr.abs().max()) == 0.0


@pytest.mark.parametrize("wrapper", ["explain", "class"])
def test_on_a_linear_model_both_stages_agree(wrapper: str) -> None:
    model, inp = LinearToy(), token_input(TEXT, baselines=7)
    ablated = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    if wrapper == "explain":
        found = explain(model, tiny_tokenizer(), inp, target_ids(2), "two_stage")
    else:
        found = LLMAttribution(TwoStageAblation(model), tiny_tokenizer()).attribute(
            inp, target_ids(2)
        )
    assert_close(found.seq_attr, ablated.attribute(inp, target_ids(2)).seq_attr, 1e-4)


def test_its_own_words_for_what_it_does_not_take() -> None:
    attribution = LLMAttribution(TwoStageAblation(tiny_model("llama")), tiny_tokenizer())
    with pytest.raises(TypeError, match="TwoStageAblation does not take n_samples"):
        attribution.attribute(token_input(TEXT), target_ids(1), n_samples=4)
    with pytest.raises(ValueError, match="TwoStageAblation"):
        LLMAttribution(nn.Identity(), tiny_tokenizer())


def test_of_a_picture_by_definition() -> None:
    """Captum's own path: one pass for each perturbation, of inputs that are more than ids."""
    model, inp = tiny_model("llama"), image_input()
    columns, absent = [40, 80, 120, 160, 200], 9
    segments = [[0, 1], [2], [3, 4]]

    def prompt_of(present: Coalition) -> list[int]:
        there = {column for i in present for column in segments[i]}
        return [token if i in there else absent for i, token in enumerate(columns)]

    expected = by_definition(game(model, prompt_of, target_ids(2)), 3)
    result = LLMAttribution(TwoStageAblation(model), tiny_tokenizer()).attribute(inp, target_ids(2))
    assert_close(rows(result), expected, 2e-4)


def test_every_prompt_can_be_inspected() -> None:
    seen: list[str] = []
    attribution = LLMAttribution(TwoStageAblation(tiny_model("llama")), tiny_tokenizer())
    inp = token_input("Dave lives in", baselines=7)
    attribution.attribute(
        inp, target_ids(1), _inspect_forward=lambda prompt, target, probs: seen.append(prompt)
    )
    assert len(seen) == 2 * inp.n_itp_features + 2
