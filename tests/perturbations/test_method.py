"""Perturbation methods as generators of masks: on tensors as on prompts, each mask scored once."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import captum.attr
import pytest
import torch
from captum.attr import FeatureAblation
from torch import Tensor

from captum_llm_ext import LLMAttribution
from captum_llm_ext.perturbations.game import Game
from captum_llm_ext.perturbations.method import PerturbationMethod
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    ENTRIES,
    INPUTS,
    CountingToy,
    captums,
    rows,
    template_input,
    token_input,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Run = Generator[Tensor, Tensor, Tensor]


class LeaveOneOut(PerturbationMethod):
    def run(self, game: Game) -> Run:
        scores = yield torch.cat([game.whole(), game.leave_one_out()])
        return (scores[:1] - scores[1:]).T


class Removal(PerturbationMethod):
    """Takes away, one after the other, what lowers the first score most: masks depend on scores."""

    def run(self, game: Game) -> Run:
        left, before = game.whole(), (yield game.whole())
        attr = torch.zeros(before.size(1), game.n_features, dtype=before.dtype)
        while left.any():
            places = left[0].nonzero().flatten()
            scores = yield left - torch.eye(game.n_features)[places]
            worst = int(scores[:, 0].argmin())
            attr[:, places[worst]] = before[0] - scores[worst]
            left, before = left.clone(), scores[worst][None]
            left[0, places[worst]] = 0
        return attr


class RandomMasks(PerturbationMethod):
    """Of the sequence alone: the mean score with each feature, over random masks."""

    def run(self, game: Game) -> Run:
        masks = (torch.rand(6, game.n_features, generator=game.generator) < 0.5).float()
        self.scores = yield masks
        self.masks = masks.to(self.scores.dtype)
        return (self.masks.T @ self.scores[:, 0]) / len(masks)


def attributed(method: Any, inp: Any, **options: Any) -> Any:
    options.setdefault("target", target_ids(2))
    return LLMAttribution(method, tiny_tokenizer()).attribute(inp, **options)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def product(x: Tensor) -> Tensor:
    return x.prod(1) + 0.5 * x[:, 0]


def test_leave_one_out_is_ablation() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert LeaveOneOut(lambda x: x.prod(1)).attribute(x).tolist() == [[6.0, 6.0, 6.0]]
    torch.testing.assert_close(
        LeaveOneOut(product).attribute(x), FeatureAblation(product).attribute(x)
    )


# --- on prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUTS)
def test_leave_one_out_of_prompts_and_pictures_is_captums_ablation(kind: str) -> None:
    model = tiny_model("llama")
    expected = captums("feature_ablation", model, INPUTS[kind](), target=target_ids(2))
    result = attributed(LeaveOneOut(model), INPUTS[kind]())
    assert result.token_attr.shape == (2, len(result.input_tokens))
    assert_close(rows(result), rows(expected))


def test_each_mask_is_scored_once() -> None:
    model, inp = CountingToy(), token_input("Dave lives in Palm Coast", baselines=7)
    attributed(LeaveOneOut(model), inp, target=target_ids(1))
    whole = inp.inp_tensor[0].tolist()
    without = [tuple(7 if i == j else t for j, t in enumerate(whole)) for i in range(len(whole))]
    assert [model.rows.count(row) for row in without] == [1] * len(whole)
    assert model.rows.count(tuple(whole)) == 2  # in the probe too
    prompts = [row for row in model.rows if len(row) == len(whole)]
    assert len(prompts) == len(whole) + 3  # and the probe's row with another last token


@pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
def test_later_masks_depend_on_scores(attr_target: str) -> None:
    model, (make, n_features) = tiny_model("gpt2"), ENTRIES["template"]
    value = truth("template", model, target_ids(2), kind=attr_target)
    left, expected = frozenset(range(n_features)), torch.zeros(3, n_features)
    while left:
        worst = min(sorted(left), key=lambda i: float(value(left - {i})[0]))
        expected[:, worst] = (value(left) - value(left - {worst})).float()
        left -= {worst}
    wrapper = LLMAttribution(Removal(model), tiny_tokenizer(), attr_target)
    assert_close(rows(wrapper.attribute(make(), target_ids(2))), expected)


@pytest.mark.parametrize("kind", ["token", "template_list", "image"])
def test_attributions_of_the_sequence_alone(kind: str) -> None:
    method, inp = RandomMasks(tiny_model("llama")), INPUTS[kind]()
    result = attributed(method, inp)
    assert result.token_attr is None
    assert result.seq_attr.shape == (inp.n_itp_features,)


def test_scores_are_of_the_sequence_and_of_each_token() -> None:
    model, scores = tiny_model("llama"), []

    class Watching(PerturbationMethod):
        def run(self, game: Game) -> Run:
            scores.append((yield torch.cat([game.whole(), 1 - game.whole()])))
            return scores[0][0][:, None] * game.whole()

    attributed(Watching(model), ENTRIES["template"][0](), target=target_ids(3))
    value = truth("template", model, target_ids(3))
    expected = torch.stack([value(frozenset(range(4))), value(frozenset())]).float()
    assert scores[0].shape == (2, 4)
    assert_close(scores[0], expected)


def test_the_generator_is_seeded_by_torchs() -> None:
    model = tiny_model("llama")

    def attr(seed: int, num_trials: int = 1) -> list[float]:
        torch.manual_seed(seed)
        result = attributed(RandomMasks(model), INPUTS["template_list"](), num_trials=num_trials)
        values: list[float] = result.seq_attr.tolist()
        return values

    assert attr(0) == attr(0) != attr(1)
    assert attr(0, num_trials=2) != attr(0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    attributed(LeaveOneOut(model), INPUTS["template_list"]())
    assert torch.equal(torch.get_rng_state(), state)  # no seed was drawn


@pytest.mark.parametrize("kind", ["template_baselines", "mask_list", "token"])
def test_groups_of_features(kind: str) -> None:
    model, inp = tiny_model("llama"), INPUTS[kind]()
    groups = {"feature_mask": (torch.arange(inp.n_itp_features) // 2)[None] + 3}
    expected = attributed(FeatureAblation(model), inp, **groups)
    assert_close(rows(attributed(LeaveOneOut(model), inp, **groups)), rows(expected))
    with pytest.raises(ValueError, match=r"expected a feature_mask \(1, "):
        attributed(LeaveOneOut(model), inp, feature_mask=torch.zeros(1, 9))


def test_names_and_borders_are_of_the_text() -> None:
    games: list[Game] = []

    class Watching(LeaveOneOut):
        def run(self, game: Game) -> Run:
            games.append(game)
            return (yield from super().run(game))

    inp = template_input("{} lives. {} plays {}", ["Dave", "He", "golf"], mask=[0, 1, 1])
    attributed(Watching(tiny_model("llama")), inp)
    assert games[0].names == ["Dave", "He golf"]
    assert [border.name for border in games[0].borders] == ["SENTENCE"]
    assert games[0].guide is None


# --- on tensors ----------------------------------------------------------------------------------


def two_outputs(x: Tensor, scale: Any = 1.0) -> Tensor:
    return torch.stack([product(x), (x * scale).sum(1) ** 2], dim=1)


def of_two_inputs(a: Tensor, b: Tensor) -> Tensor:
    return product(torch.cat([a.flatten(1), b], dim=1))


TENSORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "one example": (product, (numbers(1, 5),), {}),
    "several examples": (product, (numbers(3, 5), numbers(3, 5, seed=1)), {}),
    "a number as baseline": (product, (numbers(2, 4), 0.5), {}),
    "mask": (product, (numbers(2, 4),), {"feature_mask": torch.tensor([[4, 0, 4, 2]])}),
    "tuple": (of_two_inputs, ((numbers(2, 2, 2), numbers(2, 3)), (0.1, 0.2)), {}),
    "mask across inputs": (
        of_two_inputs,
        ((numbers(2, 2, 2), numbers(2, 3)),),
        {"feature_mask": (torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[2, 0, 3]]))},
    ),
    "several outputs": (two_outputs, (numbers(1, 5),), {}),
    "one output in all": (lambda x: product(x).sum(), (numbers(3, 4),), {}),
    "a plain number": (lambda x: float(product(x).sum()), (numbers(2, 4),), {}),
    "target": (two_outputs, (numbers(2, 4),), {"target": 1}),
    "a target for each": (two_outputs, (numbers(2, 4),), {"target": [1, 0]}),
    "more arguments": (
        two_outputs,
        (numbers(2, 4),),
        {"target": 1, "additional_forward_args": (numbers(2, 1, seed=3),)},
    ),
}


@pytest.mark.parametrize("per_eval", [1, 3, 100])
@pytest.mark.parametrize("name", TENSORS)
def test_leave_one_out_of_tensors_is_captums_ablation(name: str, per_eval: int) -> None:
    function, arguments, options = TENSORS[name]
    if name in ("one output in all", "a plain number"):
        per_eval = 1
    expected = FeatureAblation(function).attribute(*arguments, **options)
    options = {**options, "perturbations_per_eval": per_eval}
    attr = LeaveOneOut(function).attribute(*arguments, **options)
    assert isinstance(attr, tuple) == isinstance(arguments[0], tuple)
    pairs = (
        [(attr, expected)] if isinstance(attr, Tensor) else list(zip(attr, expected, strict=True))
    )
    for found, reference in pairs:
        torch.testing.assert_close(found, reference.to(found.dtype))


def test_each_example_is_a_game_that_ends_when_it_does() -> None:
    """Games of 2, 4 and 3 features, whose masks depend on scores."""
    x, mask = numbers(3, 4), torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [5, 5, 6, 7]])
    together = Removal(product).attribute(x, feature_mask=mask)
    alone = [
        Removal(product).attribute(row[None], feature_mask=m[None])
        for row, m in zip(x, mask, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_sequence_alone_is_the_first_output() -> None:
    torch.manual_seed(0)
    method = RandomMasks(two_outputs)
    attr = method.attribute(numbers(1, 5))
    assert attr.shape == (1, 5)
    assert method.scores.shape == (6, 2)
    torch.testing.assert_close(attr[0], (method.masks.T @ method.scores[:, 0]) / 6)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    LeaveOneOut(product).attribute(numbers(1, 4))
    assert capsys.readouterr().err == ""
    LeaveOneOut(product).attribute(numbers(1, 4), show_progress=True)
    assert "LeaveOneOut" in capsys.readouterr().err


# --- errors --------------------------------------------------------------------------------------


class Wrong(PerturbationMethod):
    def __init__(self, forward: Any, masks: Tensor, attr: Any) -> None:
        super().__init__(forward)
        self.masks, self.attr = masks, attr

    def run(self, game: Game) -> Run:
        yield self.masks
        return self.attr


class NoGenerator(PerturbationMethod):
    def run(self, game: Game) -> Any:
        return game.whole()


ONES = torch.ones(1, 4)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "masks of other features": (
        lambda: Wrong(product, torch.ones(1, 3), ONES).attribute(ONES),
        ValueError,
        r"Wrong.run must yield masks \(n_rows, 4\).*got \(1, 3\)",
    ),
    "one mask without rows": (
        lambda: Wrong(product, torch.ones(4), ONES).attribute(ONES),
        ValueError,
        r"got \(4,\)",
    ),
    "no mask": (
        lambda: Wrong(product, torch.ones(0, 4), ONES).attribute(ONES),
        ValueError,
        "at least one row",
    ),
    "attributions of other features": (
        lambda: Wrong(product, ONES, torch.ones(3)).attribute(ONES),
        ValueError,
        r"Wrong must return attributions \(1, 4\).*got \(3,\)",
    ),
    "no attributions": (
        lambda: Wrong(product, ONES, None).attribute(ONES),
        ValueError,
        "got NoneType",
    ),
    "no generator": (lambda: NoGenerator(product).attribute(ONES), TypeError, "a generator"),
    "no run": (lambda: PerturbationMethod(product).attribute(ONES), NotImplementedError, "run"),
    "one output in all": (
        lambda: LeaveOneOut(lambda x: x.sum()).attribute(ONES, perturbations_per_eval=2),
        ValueError,
        "leave perturbations_per_eval at 1",
    ),
    "nothing at once": (
        lambda: LeaveOneOut(product).attribute(ONES, perturbations_per_eval=0),
        ValueError,
        "perturbations_per_eval must be an int of at least 1",
    ),
    "baselines": (
        lambda: LeaveOneOut(product).attribute(ONES, torch.ones(3)[None]),
        ValueError,
        r"expected baselines that fit an input \(1, 4\), got \(1, 3\)",
    ),
    "mask": (
        lambda: LeaveOneOut(product).attribute(ONES, feature_mask=torch.ones(1, 2)),
        ValueError,
        "expected feature_mask that fit",
    ),
    "rows of tokens": (
        lambda: attributed(Wrong(tiny_model("llama"), ONES, torch.ones(2, 4)), four_values()),
        ValueError,
        r"attributions \(3, 4\), a row for each output, or \(4,\)",
    ),
}


def four_values() -> Any:
    return INPUTS["template_list"]()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    call, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        call()


def test_an_error_of_a_baseline_is_no_end_of_the_run() -> None:
    """StopIteration from inside a score is not taken for the method's result."""

    def nothing(x: Tensor) -> Tensor:
        return next(iter([]))

    with pytest.raises(StopIteration):
        LeaveOneOut(nothing).attribute(ONES)


def test_methods_of_captum_and_ours_side_by_side() -> None:
    kinds = LLMAttribution.SUPPORTED_METHODS
    assert issubclass(LeaveOneOut, kinds)
    assert all(kind in kinds for kind in captum.attr.LLMAttribution.SUPPORTED_METHODS)
    with pytest.raises(ValueError, match="PerturbationMethod"):
        LLMAttribution(captum.attr.Saliency(tiny_model("llama")), tiny_tokenizer())
