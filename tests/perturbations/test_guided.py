"""Guided ablation: groups that share what was measured of them, never over budget."""

from __future__ import annotations

from contextlib import nullcontext as _nothing
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation
from torch import Tensor, nn

from captum_llm_ext import (
    GuidedAblation,
    LLMAttribution,
    LLMAttributionResult,
    TextTemplateInput,
    chat_input,
    explain,
    segment_input,
)
from captum_llm_ext.perturbations.game import Border, Game
from captum_llm_ext.perturbations.method import Outcome, Play
from captum_llm_ext.results.single import LLMAttributionResult as Result
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import PROMPT, CausalToy, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import INPUTS, rows, template_input

N_FEATURES = 30
# Two paragraphs of 18 and 12 features, in sentences of 6, in words of 2.
BORDERS = [
    Border.PARAGRAPH
    if i == 18
    else Border.SENTENCE
    if i % 6 == 0
    else Border.WORD
    if i % 2 == 0
    else Border.TOKEN
    for i in range(1, N_FEATURES)
]


def random_game(seed: int) -> tuple[Game, Any]:
    """A game with a guide, and its score of masks (n_rows, n_features) in three columns."""
    generator = torch.Generator().manual_seed(seed)
    names = [str(i) for i in range(N_FEATURES)]
    guide = torch.rand(N_FEATURES, generator=generator) ** 3
    linear = torch.randn(N_FEATURES, 3, generator=generator)
    pairs = torch.randn(N_FEATURES, N_FEATURES, 3, generator=generator) / 5

    def score(masks: Tensor) -> Tensor:
        return masks @ linear + torch.einsum("ri,rj,ijc->rc", masks, masks, pairs)

    return Game(names, BORDERS, guide), score


def played(game: Game, score: Any, **options: Any) -> tuple[Outcome, Tensor]:
    """What is found, and every mask that was asked for."""
    play = Play(GuidedAblation(None, **options), game)
    asked = []
    while play.is_waiting:
        asked.append(play.masks)
        play.send(score(play.masks))
    return play.outcome, torch.cat(asked)


@pytest.mark.parametrize("budget", [2, 3, 7, 16, 30, 31, 50])
def test_parts_carry_what_was_measured_of_them(budget: int) -> None:
    game, score = random_game(budget)
    found, masks = played(game, score, max_evaluations=budget)
    assert len(masks) <= budget
    assert len(masks) == len(masks.unique(dim=0))
    assert masks[0].all()
    whole, guide = score(game.whole())[0], game.guide
    assert guide is not None
    left: set[int] = set(range(N_FEATURES))
    while left:
        first = min(left)
        absent = [set((mask == 0).nonzero().flatten().tolist()) for mask in masks[1:]]
        part = sorted(min((p for p in absent if first in p), key=len))
        drop = whole - score(torch.ones(N_FEATURES).index_fill(0, torch.tensor(part), 0)[None])[0]
        assert_close(found.attributions[:, part].sum(1), drop)
        weights = guide[part] + 0.1 * guide[part].mean()
        assert_close(found.attributions[:, part], drop[:, None] * (weights / weights.sum()))
        assert found.measured is not None
        assert found.measured[part].tolist() == [len(part) == 1] * len(part)
        assert left.issuperset(part)
        left -= set(part)
    assert bool(found.measured.all()) == (budget > N_FEATURES)


def test_what_the_guide_names_is_left_out_alone() -> None:
    game, score = random_game(0)
    found, _ = played(game, score, max_evaluations=21)
    assert game.guide is not None
    assert found.measured is not None
    assert found.measured[game.guide.argsort(descending=True)[:5]].all()


def test_groups_begin_and_end_at_natural_borders() -> None:
    game = Game([str(i) for i in range(N_FEATURES)], BORDERS)

    def score(masks: Tensor) -> Tensor:  # all of it in features 20 and 21, a word of the second
        return masks[:, 20:22].sum(1)[:, None]

    _, masks = played(game, score, max_evaluations=5)
    absent = [(mask == 0).nonzero().flatten().tolist() for mask in masks[1:]]
    assert absent[:2] == [list(range(18)), list(range(18, 30))]
    assert absent[2:] == [list(range(18, 24)), list(range(24, 30))]


def test_features_that_are_alike_share_alike() -> None:
    game = Game([str(i) for i in range(N_FEATURES)], BORDERS, torch.zeros(N_FEATURES))
    found, _ = played(game, lambda masks: masks.sum(1)[:, None], max_evaluations=9)
    assert_close(found.attributions, torch.ones(1, N_FEATURES))


def attributed(model: nn.Module, inp: Any, attr_target: str = "log_prob", **options: Any) -> Any:
    method = GuidedAblation(model, **options)
    return LLMAttribution(method, tiny_tokenizer(), attr_target).attribute(inp, target_ids(2))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_one_evaluation_more_than_features_is_ablation(family: str, kind: str) -> None:
    if family == "bart" and kind == "image":
        pytest.skip("a picture has no encoder-decoder model here")
    model = tiny_seq2seq("bart") if family == "bart" else tiny_model("llama")
    inp = INPUTS[kind]()
    expected = LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(
        inp, target_ids(2)
    )
    found = attributed(model, inp, max_evaluations=inp.n_itp_features + 1)
    assert_close(rows(found), rows(expected))
    assert found.measured.tolist() == [True] * len(found.input_tokens)


@pytest.mark.parametrize("attr_target", ["log_prob", "prob", "logit", "rank"])
def test_two_evaluations_share_what_the_whole_prompt_is_worth(attr_target: str) -> None:
    model, inp = tiny_model("gpt2"), INPUTS["template_list"]()
    found = attributed(model, inp, attr_target, max_evaluations=2)
    together = template_input(
        "{}", ["Dave lives in Palm Coast and plays golf"], [" lives in  and  "]
    )
    expected = LLMAttribution(FeatureAblation(model), tiny_tokenizer(), attr_target).attribute(
        together, target_ids(2)
    )
    torch.testing.assert_close(rows(found).sum(1), rows(expected)[:, 0], rtol=1e-4, atol=1e-4)
    assert not found.measured.any()


def test_the_budget_counts_prompts() -> None:
    seen: list[str] = []
    inp = segment_input(PROMPT, by="word")
    for budget in range(1, inp.n_itp_features + 3):
        seen.clear()
        method = GuidedAblation(tiny_model("llama"), budget, guide=None)
        with pytest.warns() if budget == 1 else _nothing():
            LLMAttribution(method, tiny_tokenizer()).attribute(
                inp, target_ids(1), _inspect_forward=lambda *text: seen.append(text[0])
            )
        assert 0 < len(seen) <= budget


BARE = " lives in  and  "
MESSAGES = [{"role": "user", "content": "Dave lives in Palm Coast. Where does he live?"}]
PROMPTS: dict[str, Any] = {
    "tokens": lambda tokenizer: PROMPT,
    "words": lambda tokenizer: segment_input(PROMPT, by="word"),
    "chat": lambda tokenizer: chat_input(MESSAGES, tokenizer),
    "groups": lambda tokenizer: template_input(
        "{} {} {} {}", ["Dave", "lives", "in", "Palm"], mask=[0, 1, 0, 2]
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_guides_of_every_kind_of_method(kind: str) -> None:
    """A guide only says where to look: the parts of the whole sum to the same."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    inp = PROMPTS[kind](tokenizer)
    sums = [
        explain(
            model, tokenizer, inp, target_ids(2), "guided", max_evaluations=2, guide=guide
        ).seq_attr
        for guide in ("flow", "saliency", "gradxact", "ablation", None)
    ]
    totals = torch.stack([s[[0, 1, 3]].sum() if kind == "groups" else s.sum() for s in sums])
    assert_close(totals, totals[:1].expand(5))
    assert not torch.equal(sums[0], sums[4])


@pytest.mark.parametrize(
    ("model", "instead"), [(tiny_seq2seq("t5"), "saliency"), (CausalToy(), None)], ids=["t5", "toy"]
)
def test_what_guides_where_attention_cannot_be_read(model: nn.Module, instead: Any) -> None:
    """An encoder-decoder model has no flow, and a plain module no input embeddings either."""
    found = [
        attributed(model, segment_input(PROMPT, by="word"), max_evaluations=6, guide=guide)
        for guide in ("flow", instead)
    ]
    assert_close(rows(found[0]), rows(found[1]))


def test_degenerate_games() -> None:
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="one evaluation leaves nothing to measure"):
        nothing = attributed(model, INPUTS["template_list"](), max_evaluations=1)
    assert nothing.seq_attr.tolist() == [0.0] * 4
    assert nothing.token_attr.shape == (2, 4)
    one = TextTemplateInput("Dave plays {}", ["golf"], baselines=["chess"])
    assert attributed(model, one, max_evaluations=2).measured.tolist() == [True]
    alike = TextTemplateInput("{} and {} and {} and {}", ["golf"] * 4, baselines=["golf"] * 4)
    assert attributed(model, alike, max_evaluations=3).seq_attr.abs().max() <= 1e-4


def test_what_was_measured_is_stored_and_merged() -> None:
    found = explain(
        tiny_model("llama"), tiny_tokenizer(), PROMPT, " golf", "guided", max_evaluations=8
    )
    assert found.measured is not None
    assert 0 < int(found.measured.sum()) < len(found.input_tokens)
    assert Result.from_json(found.to_json()) == found
    merged = found.merge([(0, len(found.input_tokens))])
    assert merged.measured is not None
    assert merged.measured.tolist() == [False]
    with pytest.raises(ValueError, match=r"measured: expected bool of shape \(n_input,\) = \(1,\)"):
        LLMAttributionResult(
            input_tokens=["a"], output_tokens=["b"], seq_attr=[1.0], measured=torch.tensor([1, 0])
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_evaluations": 0}, "max_evaluations must be an int of at least 1, got 0"),
        ({"max_evaluations": 2.5}, "max_evaluations must be an int"),
        ({"guide": "flowing"}, "expected method to be one of saliency"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedAblation(tiny_model("llama"), **options)
