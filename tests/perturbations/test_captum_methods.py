"""A user's own subclasses of Captum's base and of its methods, scored as they ask."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext import LLMAttribution
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    ENTRIES,
    INPUTS,
    CountingToy,
    ablation,
    captums,
    ours,
    rows,
    token_input,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TEXT = "Dave lives in Palm Coast and"


class RandomHalves(PerturbationAttribution):
    """Mean score with each feature less that without it, over masks of a generator of its own."""

    def __init__(self, forward_func: Any, seed: int = 0) -> None:
        super().__init__(forward_func)
        self.generator = torch.Generator().manual_seed(seed)
        self.masks = torch.zeros(0)

    def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        draws = torch.rand(12, inputs.size(1), generator=self.generator)
        masks = (draws.argsort(1) < inputs.size(1) // 2).float()
        scores = self.forward_func(masks)
        with_it, without = masks / masks.sum(0), (1 - masks) / (1 - masks).sum(0)
        return ((with_it - without).T @ scores).T


class OneAtATime(PerturbationAttribution):
    """Ablation by hand, one forward for each mask."""

    def attribute(self, inputs: Tensor, perturbations_per_eval: int = 1) -> Tensor:
        whole = self.forward_func(inputs)
        masks = inputs - torch.eye(inputs.size(1))
        return torch.cat([whole - self.forward_func(mask[None]) for mask in masks]).T


class DeclaredOneAtATime(OneAtATime):
    repeatable_masks = True


class SequenceAlone(PerturbationAttribution):
    """Knows one score for each mask."""

    token_rows = False

    def attribute(self, inputs: Tensor) -> Tensor:
        masks = torch.cat([inputs, inputs - torch.eye(inputs.size(1))])
        scores = self.forward_func(masks)
        assert scores.shape == (len(masks),)
        return scores[:1] - scores[1:]


class FirstOnly(OneAtATime):
    """Asked for rows of tokens, returns the sequence's."""

    def attribute(self, inputs: Tensor, perturbations_per_eval: int = 1) -> Tensor:
        return super().attribute(inputs)[0]


class Greedy(PerturbationAttribution):
    """Takes features away, each time the one that costs most: masks depend on scores."""

    def attribute(self, inputs: Tensor) -> Tensor:
        left, before = inputs.clone(), self.forward_func(inputs)
        attr = torch.zeros(before.size(1), inputs.size(1))
        while left.any():
            places = left[0].nonzero().flatten()
            scores = self.forward_func(left - torch.eye(inputs.size(1))[places])
            worst = int(scores[:, 0].argmin())
            attr[:, places[worst]] = before[0] - scores[worst]
            left[0, places[worst]], before = 0, scores[worst][None]
        return attr


class NamedAblation(captum.attr.FeatureAblation):
    """A user's subclass of a method of Captum's."""


class AblationThatDraws(captum.attr.FeatureAblation):
    """Random halves of its own generator, with the score of the whole."""

    repeatable_masks = False
    _halves = RandomHalves.attribute

    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func)
        self.generator = torch.Generator().manual_seed(0)

    def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        return self._halves(inputs)


class Crooked(PerturbationAttribution):
    def attribute(self, inputs: Tensor) -> Tensor:
        return self.forward_func(inputs)[:, :2].expand(2, -1)


def attributed(method: Any, inp: Any, n_output: int = 2, **options: Any) -> Any:
    return LLMAttribution(method, tiny_tokenizer()).attribute(inp, target_ids(n_output), **options)


@pytest.mark.parametrize("kind", [RandomHalves, AblationThatDraws])
def test_a_generator_of_its_own_has_twelve_prompts_scored_for_twelve_masks(kind: Any) -> None:
    model, inp = CountingToy(), token_input(TEXT, baselines=7)
    result = attributed(kind(model), inp, 1)
    ids = inp.inp_tensor[0]
    draws = torch.rand(12, len(ids), generator=torch.Generator().manual_seed(0))
    masks = draws.argsort(1) < len(ids) // 2
    expected = [tuple(torch.where(mask, ids, 7).tolist()) for mask in masks]
    assert len(set(expected)) == 12
    assert sorted(row for row in model.rows if row.count(7) > 1) == sorted(expected)
    assert result.token_attr.shape == (1, len(ids))
    assert_close(result.token_attr[0], result.seq_attr)


# --- what is scored ------------------------------------------------------------------------------


def test_masks_that_do_not_depend_on_scores_are_scored_together() -> None:
    """Ablation one mask at a time: in a pass each, or in one where that is declared."""
    model, calls, results = CountingToy(), [], []
    for kind in (OneAtATime, DeclaredOneAtATime):
        model.calls = 0
        results.append(attributed(kind(model), token_input(TEXT, baselines=7)))
        calls.append(model.calls)
    n_features = results[0].seq_attr.numel()
    assert calls[0] > n_features > calls[1]
    assert_close(rows(results[0]), rows(results[1]))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", [OneAtATime, DeclaredOneAtATime, NamedAblation])
def test_ablation_of_the_users_own_by_definition(kind: Any, entry: str) -> None:
    model, (make, n_features) = tiny_model("llama"), ENTRIES[entry]
    expected = ablation(truth(entry, model, target_ids(2)), n_features)
    assert_close(rows(attributed(kind(model), make())), expected)


def test_later_masks_depend_on_scores() -> None:
    model, (make, n_features) = tiny_model("gpt2"), ENTRIES["template"]
    value = truth("template", model, target_ids(2))
    left, expected = frozenset(range(n_features)), torch.zeros(3, n_features)
    while left:
        worst = min(sorted(left), key=lambda i: float(value(left - {i})[0]))
        expected[:, worst] = (value(left) - value(left - {worst})).float()
        left -= {worst}
    assert_close(rows(attributed(Greedy(model), make())), expected)


def test_the_generator_goes_on_from_call_to_call() -> None:
    """Nothing is drawn that the method does not ask for."""
    model, inp = tiny_model("llama"), token_input(TEXT, baselines=7)
    wrapper = LLMAttribution(RandomHalves(model), tiny_tokenizer())
    first, second = (wrapper.attribute(inp, target_ids(1)).seq_attr for _ in range(2))
    assert not torch.allclose(first, second)
    twice = attributed(RandomHalves(model), inp, 1, num_trials=2).seq_attr
    assert_close(twice, (first + second) / 2)


def test_every_prompt_can_be_inspected() -> None:
    seen: list[tuple[str, str, list[float]]] = []
    inp = token_input(TEXT, baselines=7)
    for kind in (OneAtATime, DeclaredOneAtATime, NamedAblation):
        method = kind(tiny_model("llama"))
        attributed(method, inp, _inspect_forward=lambda *call: seen.append(call))
    assert len(seen) == 3 * (inp.n_itp_features + 1)
    assert all(len(call[2]) == 3 for call in seen)


# --- rows of target tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["token", "template_list", "mask_list", "image"])
@pytest.mark.parametrize("method", [OneAtATime, NamedAblation])
def test_rows_of_tokens(method: Any, kind: str) -> None:
    expected = captums(
        "feature_ablation", tiny_model("llama"), INPUTS[kind](), target=target_ids(2)
    )
    result = attributed(method(tiny_model("llama")), INPUTS[kind]())
    assert_close(rows(result), rows(expected))


@pytest.mark.parametrize("kind", ["token", "image"])
@pytest.mark.parametrize("method", [SequenceAlone, FirstOnly])
def test_the_sequence_alone(method: Any, kind: str) -> None:
    expected = ours("feature_ablation", tiny_model("llama"), INPUTS[kind](), target=target_ids(2))
    result = attributed(method(tiny_model("llama")), INPUTS[kind]())
    assert result.token_attr is None
    assert_close(result.seq_attr, expected.seq_attr)


def test_attributions_that_fit_nothing_are_refused() -> None:
    message = r"Crooked must return attributions \(3, 5\).*got \(2, 2\)"
    with pytest.raises(ValueError, match=message):
        attributed(Crooked(tiny_model("llama")), ENTRIES["token"][0]())


# --- the wrapper of a method by its name ---------------------------------------------------------


def test_of_method() -> None:
    settings = {"attr_target": "prob"}
    wrapper = LLMAttribution.of_method(
        "shapley_sampling", tiny_model("llama"), tiny_tokenizer(), None, settings
    )
    assert isinstance(wrapper.attr_method, captum.attr.ShapleyValueSampling)
    assert wrapper.attr_target == "prob"
    assert wrapper.method_options() == {"feature_mask", "n_samples"}
    wrapper.check_options({"n_samples": 3, "baselines": 7, "internal_batch_size": 2})
    with pytest.raises(TypeError, match=r"ShapleyValueSampling does not take n_steps.*n_samples"):
        wrapper.check_options({"n_steps": 3})


def test_layers_and_names_that_it_does_not_have() -> None:
    arguments = (tiny_model("llama"), tiny_tokenizer())
    message = "ablation perturbs the prompt and has no layers: .*saliency.*attention"
    with pytest.raises(ValueError, match=message):
        LLMAttribution.of_method("ablation", *arguments, "lm_head", {})
    with pytest.raises(ValueError, match="expected method to be one of"):
        LLMAttribution.of_method("magic", *arguments, None, {})


def test_options_of_a_users_method_are_those_of_its_signature() -> None:
    model = tiny_model("llama")
    assert LLMAttribution(OneAtATime(model), tiny_tokenizer()).method_options() == set()
    with pytest.raises(TypeError, match="OneAtATime does not take n_samples"):
        attributed(OneAtATime(model), ENTRIES["token"][0](), n_samples=3)
