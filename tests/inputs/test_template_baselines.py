"""The start of a template's path, and columns that account for the score difference."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerConductance, LayerGradientShap, LayerIntegratedGradients
from torch import nn

from captum_llm_ext import LLMGradientAttribution, ProductBaselines, TextTemplateInput
from tests.inputs.template_cases import (
    FORMS,
    FRAME,
    KEYS,
    OTHER_LENGTH,
    SAME_LENGTH,
    VALUES,
    columns,
    embedding_of,
    filled,
    keyed,
    mean_embedding,
    start_embeddings,
    template_input,
    template_of,
    unmerged,
)
from tests.models.families import CausalToy, layer_names, tiny_model, tiny_tokenizer
from tests.oracles.cases import STEPS, assert_close, in_pairs, our_attribution, target_ids
from tests.oracles.gradients import Problem, integrated_gradients
from tests.perturbations.cases import scores

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def attribute(inp: Any, family: str = "llama", kind: str = "embedding", **kwargs: Any) -> Any:
    kwargs.setdefault("target", target_ids(2))
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[kind])
    return our_attribution(LayerIntegratedGradients, model, layer, inp, **kwargs)


def from_embeddings(start: torch.Tensor, family: str = "llama", kind: str = "embedding") -> Any:
    """(2, n_values): the formula, from these embeddings (n, hidden) of the prompt."""
    prompt, value_of = unmerged(VALUES)
    model = tiny_model(family)
    problem = Problem(
        model,
        [model.get_submodule(layer_names(family)[kind])],
        prompt,
        target_ids(2),
        baseline=start,
        embedding=embedding_of(family),
    )
    rows = integrated_gradients(problem, STEPS).attributions[0].sum(-1)
    return columns(rows, value_of, len(VALUES))


def test_the_columns_of_one_template_sum_to_its_score_difference() -> None:
    model, target = tiny_model("llama"), target_ids(1)
    inp = TextTemplateInput("{} lives in{}", ["Dave", " Palm Coast"], ["The", " Tokyo"])
    result = attribute(inp, target=target, n_steps=200)
    ends = [tiny_tokenizer().encode(x) for x in ("Dave lives in Palm Coast", "The lives in Tokyo")]
    present, absent = (float(scores(model, ids, target)[0]) for ids in ends)
    assert result.input_tokens == ["Dave", " Palm Coast"]
    assert float(result.seq_attr.sum()) == pytest.approx(present - absent, abs=0.05)


@pytest.mark.parametrize("baselines", [["His", "golf"], ["", "golf"]])
@pytest.mark.parametrize("method", [LayerIntegratedGradients, LayerGradientShap, LayerConductance])
def test_an_empty_value_has_no_place_for_its_baseline(method: Any, baselines: list[str]) -> None:
    model, target = tiny_model("llama"), target_ids(2)
    wrapper = LLMGradientAttribution(method(model, model.model.embed_tokens), tiny_tokenizer())
    inp = TextTemplateInput("{} lives{} in", ["Dave", ""], baselines)
    with pytest.raises(ValueError, match=r"value 1 of .* is empty .* 'golf' is not"):
        wrapper.attribute(inp, target)


def test_an_empty_value_with_an_empty_baseline_changes_nothing() -> None:
    """The path from the whole baseline prompt to the prompt, whose ends are plain scores."""
    model, target = tiny_model("llama"), target_ids(2)
    layer = model.get_input_embeddings()
    inp = TextTemplateInput("{} lives{} in", ["Dave", ""], ["His", ""])
    result = our_attribution(
        LayerIntegratedGradients, model, layer, inp, target=target, n_steps=200
    )
    ends = [tiny_tokenizer().encode(f"{name} lives in") for name in ("Dave", "His")]
    whole, bare = (float(scores(model, ids, target)[0]) for ids in ends)
    assert result.seq_attr.tolist() == pytest.approx([whole - bare, 0], abs=0.05)


BASELINES = {
    "same length": SAME_LENGTH,
    "other length": OTHER_LENGTH,
    "longer, shorter, same": [" the capital of Japan", " golf", " cooking with"],
    "one empty": ["The", "", " is"],
    "none": None,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BASELINES)
def test_the_start_holds_the_baselines_embeddings(name: str, form: str) -> None:
    baselines = BASELINES[name]
    start = start_embeddings("llama", baselines or [""] * 3, mean_embedding("llama"))
    result = attribute(template_input(baselines and list(baselines), form))
    assert_close(result.token_attr, from_embeddings(start))


@pytest.mark.parametrize("kind", ["embedding", "block", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gemma3", "falcon"])
def test_the_start_in_other_families_and_inside_the_model(family: str, kind: str) -> None:
    start = start_embeddings(family, ["The", "", " is"], mean_embedding(family))
    result = attribute(template_input(["The", "", " is"]), family, kind)
    assert_close(result.token_attr, from_embeddings(start, family, kind))


NEUTRAL: dict[Any, Callable[[], torch.Tensor]] = {
    None: lambda: mean_embedding("llama"),
    "mean": lambda: mean_embedding("llama"),
    "zero": lambda: torch.zeros(32),
    17: lambda: embedding_of("llama").weight[17],
    "pad": lambda: embedding_of("llama").weight[tiny_tokenizer().pad_token_id],
    "Ġgolf": lambda: embedding_of("llama").weight[tiny_tokenizer().vocab["Ġgolf"]],
}


@pytest.mark.parametrize("baselines", [None, ["The", "", " is"]], ids=["none", "one empty"])
@pytest.mark.parametrize("neutral", NEUTRAL)
def test_an_empty_baseline_is_the_neutral_one(neutral: Any, baselines: Any) -> None:
    with torch.no_grad():
        start = start_embeddings("llama", baselines or [""] * 3, NEUTRAL[neutral]())
    result = attribute(template_input(baselines), baselines=neutral)
    assert_close(result.token_attr, from_embeddings(start))


@pytest.mark.parametrize("neutral", [5, "zero", "mean"])
def test_the_neutral_baseline_leaves_others_alone(neutral: Any) -> None:
    plain = attribute(template_input(list(SAME_LENGTH)))
    result = attribute(template_input(list(SAME_LENGTH)), baselines=neutral)
    assert torch.equal(plain.token_attr, result.token_attr)


# --- completeness ---------------------------------------------------------------------------------


def difference(model: nn.Module, target: torch.Tensor, baselines: Any = SAME_LENGTH) -> float:
    """Score of the template with the values less its score with the baselines."""
    present, absent = (
        scores(model, tiny_tokenizer().encode(filled(FRAME, texts)), target)[0]
        for texts in (VALUES, baselines)
    )
    return float(present - absent)


@in_pairs(name=["toy", "gpt_neox"], form=FORMS, mask=[None, [3, 8, 3]])
def test_columns_sum_to_the_score_difference(name: str, form: str, mask: list[int] | None) -> None:
    model = CausalToy() if name == "toy" else tiny_model(name)
    layer = model.embedding if name == "toy" else embedding_of(name)
    truth, errors = difference(model, target_ids(1)), []
    for n_steps in (2, 8, 100):
        inp = template_input(list(SAME_LENGTH), form, mask=mask)
        result = our_attribution(
            LayerIntegratedGradients, model, layer, inp, target=target_ids(1), n_steps=n_steps
        )
        row = result.token_attr[0]
        if mask:
            assert row[0] == row[2]
            row = row[:2]  # a group counts once
        errors.append(abs(float(row.sum()) - truth))
        assert float(result.convergence_delta[0]) == pytest.approx(
            float(row.sum()) - truth, abs=1e-4
        )
    assert errors[2] < 1e-3 * abs(truth)
    assert errors[2] < errors[0]


@pytest.mark.parametrize("mask", [None, [1, 1, 0]])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_adaptive_columns_meet_the_tolerance(family: str, mask: list[int] | None) -> None:
    inp = template_input(list(SAME_LENGTH), mask=mask)
    method = LayerIntegratedGradients(tiny_model(family), embedding_of(family))
    wrapper = LLMGradientAttribution(method, tiny_tokenizer())
    result = wrapper.attribute(inp, target=target_ids(1), method="adaptive", tol=0.02)
    row = result.token_attr[0]
    total = float(row.sum() if mask is None else row[0] + row[2])
    truth = difference(tiny_model(family), target_ids(1))
    assert result.converged
    assert abs(total - truth) <= 0.03 * abs(truth)


@pytest.mark.parametrize("baselines", [OTHER_LENGTH, None], ids=["other length", "none"])
def test_the_delta_is_that_of_the_path(baselines: Any) -> None:
    prompt, _ = unmerged(VALUES)
    start = start_embeddings("llama", baselines or [""] * 3, mean_embedding("llama"))
    model, embedding = tiny_model("llama"), embedding_of("llama")
    problem = Problem(
        model, [embedding], prompt, target_ids(2), baseline=start, embedding=embedding
    )
    result = attribute(template_input(baselines and list(baselines)))
    assert_close(result.convergence_delta, integrated_gradients(problem, STEPS).delta)


# --- masks ----------------------------------------------------------------------------------------


@in_pairs(
    kind=["embedding", "block"],
    form=FORMS,
    mask=[[0, 0, 0], [5, 2, 5], [1, 0, 0], [2, 1, 0]],
)
def test_values_of_a_group_have_the_sum_of_the_group(kind: str, form: str, mask: list[int]) -> None:
    single = attribute(template_input(list(SAME_LENGTH)), kind=kind).token_attr
    expected = torch.stack(
        [sum(single[:, i] for i in range(3) if mask[i] == group) for group in mask], dim=1
    )
    result = attribute(template_input(list(SAME_LENGTH), form, mask=mask), kind=kind)
    assert_close(result.token_attr, expected)
    assert_close(result.seq_attr, expected.sum(0), tolerance=1e-3)
    assert result.input_tokens == VALUES


# --- baselines that are drawn ---------------------------------------------------------------------

DRAWS = [SAME_LENGTH, OTHER_LENGTH, ["The", "", " is"]]


class Counter:
    """Draws one after another, and counts."""

    def __init__(self, as_dict: bool) -> None:
        self.as_dict, self.calls = as_dict, 0

    def __call__(self) -> Any:
        drawn = DRAWS[self.calls % len(DRAWS)]
        self.calls += 1
        return keyed(drawn) if self.as_dict else list(drawn)


@in_pairs(form=FORMS, mask=[None, [0, 1, 0]], num_trials=[1, 3])
def test_the_mean_of_trials_with_one_draw_each(
    form: str, mask: list[int] | None, num_trials: int
) -> None:
    counter = Counter(as_dict=form in ("dict", "callable_dict"))
    result = attribute(template_input(counter, form, mask=mask), num_trials=num_trials)
    assert counter.calls == num_trials
    single = [attribute(template_input(list(d), mask=mask)) for d in DRAWS[:num_trials]]
    assert_close(result.token_attr, torch.stack([r.token_attr for r in single]).mean(0))
    assert_close(result.seq_attr, torch.stack([r.seq_attr for r in single]).mean(0))


def test_trials_of_several_layers_share_the_draw() -> None:
    counter = Counter(as_dict=False)
    names = ["model.embed_tokens", "model.layers.1"]
    model, target = tiny_model("llama"), target_ids(2)
    result = our_attribution(
        LayerIntegratedGradients,
        model,
        names,
        template_input(counter),
        target=target,
        num_trials=2,
    )
    assert counter.calls == 2
    for i, kind in enumerate(["embedding", "block"]):
        single = [attribute(template_input(list(d)), kind=kind) for d in DRAWS[:2]]
        mean = torch.stack([r.token_attr for r in single]).mean(0)
        assert_close(result.layer_token_attr[i], mean)


PRODUCTS: dict[str, tuple[str, Any]] = {
    "list": ("list", [["The", "He"], [" Tokyo", " Paris"], [" cooking with", " is"]]),
    "dict": ("dict", {"name": ["The"], "place": [" Tokyo", " Paris"], "sport": [" is"]}),
    "dict of tuples": (
        "callable_dict",
        {("name", "place"): [("The", " Tokyo"), ("He", " Paris")], "sport": [" is", ""]},
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_baselines_are_drawn_by_the_seed(name: str) -> None:
    form, choices = PRODUCTS[name]
    random.seed(3)
    drawn = [ProductBaselines(choices)() for _ in range(4)]
    if isinstance(choices, dict):
        drawn = [[sample[key] for key in KEYS] for sample in drawn]
    assert len({tuple(sample) for sample in drawn}) > 1
    single = [attribute(template_input(list(sample))).token_attr for sample in drawn]

    def run() -> torch.Tensor:
        random.seed(3)
        return attribute(template_input(ProductBaselines(choices), form), num_trials=4).token_attr

    first = run()
    assert_close(first, torch.stack(single).mean(0))
    assert torch.equal(first, run())


def test_the_input_is_as_before() -> None:
    counter = Counter(as_dict=True)
    inp = TextTemplateInput(template_of(FRAME, KEYS), keyed(VALUES), counter, keyed([0, 1, 1]))
    before = dict(inp.__dict__)
    attribute(inp, num_trials=2)
    assert inp.__dict__ == before
    assert inp.values == VALUES
