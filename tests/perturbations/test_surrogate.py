"""The linear surrogate: scikit-learn's Lasso, a ridge solved the other way round, its own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from captum_llm_ext import LLMAttribution, SparseSurrogate, explain
from captum_llm_ext.perturbations import surrogate
from captum_llm_ext.perturbations.game import Game
from captum_llm_ext.perturbations.method import Outcome, Play
from captum_llm_ext.perturbations.surrogate import NOISES, held_back_correlation, lasso, ridge
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.scoring.rank_correlation import rank_correlation
from tests.models.families import PROMPT, tiny_model, tiny_tokenizer
from tests.oracles.cases import target_ids
from tests.perturbations.cases import INPUTS


def regression(n_masks: int, n_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masks, and scores in two columns of which few features matter."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n_masks, n_features, generator=generator).round().double()
    effects = torch.randn(n_features, 2, generator=generator).double()
    effects[n_features // 4 :] = 0
    noise = torch.randn(n_masks, 2, generator=generator).double() / 10
    return masks, masks @ effects + noise


@pytest.mark.parametrize(("n_masks", "n_features"), [(64, 10), (32, 80)])
@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_the_lasso_is_scikit_learns(n_masks: int, n_features: int, penalty: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    masks, scores = regression(n_masks, n_features)
    masks[:, 3] = 1  # never absent, so nothing is known of it
    deviation = masks.std(0, correction=0)
    x = ((masks - masks.mean(0)) / deviation.clamp(min=1e-9)).numpy()
    found = lasso(masks, scores, penalty)
    for column, row in zip(scores.T, found, strict=True):
        fitted = linear.Lasso(alpha=penalty, max_iter=100_000, tol=1e-10).fit(x, column.numpy())
        expected = torch.from_numpy(fitted.coef_) / deviation.clamp(min=1e-9)
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-4)
        assert row[3] == 0


@pytest.mark.parametrize(("n_masks", "n_features"), [(24, 6), (12, 30)])
def test_the_ridge_is_the_posterior_mean_with_the_best_noise(n_masks: int, n_features: int) -> None:
    """Solved for features, not masks; the leave-one-out error by leaving each mask out."""
    masks, scores = regression(n_masks, n_features)
    variance = torch.rand(n_features, generator=torch.Generator().manual_seed(1)).double() + 0.1
    x, y = masks - masks.mean(0), scores - scores.mean(0)
    scale = (x**2 * variance).sum(1).mean()

    def solved(x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x + noise * torch.diag(1 / variance), x.T @ y)

    for column, row in zip(y.T, ridge(masks, scores, variance), strict=True):
        errors = []
        for noise in NOISES * scale:
            others = [torch.arange(n_masks) != i for i in range(n_masks)]
            missed = [column[~o] - x[~o] @ solved(x[o], column[o], noise) for o in others]
            errors.append(torch.cat(missed).square().mean())
        best = NOISES[torch.stack(errors).argmin()] * scale
        torch.testing.assert_close(row, solved(x, column, best))


def played(n_features: int, score: Any, guide: Tensor | None = None, **options: Any) -> Outcome:
    game = Game([""] * n_features, [], guide, seed=lambda: 3)
    play = Play(SparseSurrogate(None, **options), game)
    play.send(score(play.masks.double()))
    return play.outcome


EFFECTS = torch.linspace(-1, 2, 12).double()


def additive(masks: Tensor) -> Tensor:
    return torch.stack([masks @ EFFECTS, masks @ EFFECTS.flip(0)], dim=1) + 5


def parity(masks: Tensor) -> Tensor:
    return masks.sum(1, keepdim=True) % 2


def test_a_sum_has_its_terms() -> None:
    for guide in (None, EFFECTS):
        found = played(12, additive, guide)
        expected = torch.stack([EFFECTS, EFFECTS.flip(0)])
        torch.testing.assert_close(found.attributions, expected, rtol=0, atol=0.05)
        assert found.lds is not None
        assert found.lds > 0.95


@pytest.mark.filterwarnings("ignore:the surrogate predicts")  # without a guide it fails
def test_a_guide_makes_it_serve_more_features_than_masks() -> None:
    effects = torch.zeros(200).double()
    effects[::20] = 2.0
    guide = effects + torch.rand(200, generator=torch.Generator().manual_seed(0)) / 10

    def score(masks: Tensor) -> Tensor:
        return (masks @ effects)[:, None]

    blind, guided = (played(200, score, g, n_masks=40).lds for g in (None, guide))
    assert blind is not None
    assert guided is not None
    assert guided > max(0.95, blind)


def test_it_states_its_error_by_masks_that_it_did_not_see(monkeypatch: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0, 0.0]), torch.tensor([3.0, 1.0, 4.0, 4.0, -1.0])
    assert rank_correlation(a[None], b).item() == pytest.approx(stats.spearmanr(a, b).statistic)
    masks = torch.rand(20, 5).round()
    assert held_back_correlation(masks, torch.ones(20, 1), None) is None
    assert held_back_correlation(masks[:8], torch.arange(8.0)[:, None], None) is None  # two each
    with monkeypatch.context() as patch:
        patch.setattr(surrogate, "weights", lambda *rest: torch.zeros(1, 5).double())
        assert held_back_correlation(masks, torch.arange(20.0)[:, None], None) == 0
    with pytest.warns(UserWarning, match=r"rank correlation of -?0\.\d\d: give more n_masks"):
        found = played(12, parity)
    assert found.lds is not None
    assert found.lds < 0.5


def test_degenerate_games() -> None:
    masks: list[Tensor] = []

    def constant(rows: Tensor) -> Tensor:
        masks.append(rows)
        return torch.full((len(rows), 3), 2.0)

    found = played(3, constant)
    assert len(masks[0]) == len(masks[0].unique(dim=0)) == 8
    assert found.lds is None
    assert found.attributions.abs().max() == 0
    one = played(1, lambda rows: 4 * rows)
    assert one.attributions.tolist() == [[pytest.approx(4, abs=0.05)]]
    assert played(5, additive_of_five, torch.zeros(5)).attributions.isfinite().all()


def additive_of_five(masks: Tensor) -> Tensor:
    return masks.sum(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:the surrogate predicts")
@pytest.mark.parametrize("guide", [None, "flow"])
def test_prompts(guide: str | None) -> None:
    model, tokenizer, seen = tiny_model("llama"), tiny_tokenizer(), []
    method = SparseSurrogate(model, 20, guide)
    torch.manual_seed(0)
    result = LLMAttribution(method, tokenizer).attribute(
        INPUTS["template_list"](), target_ids(2), _inspect_forward=lambda *text: seen.append(text)
    )
    assert len(seen) == 16  # all masks of four features
    assert result.token_attr is not None
    assert result.token_attr.shape == (2, 4)
    assert LLMAttributionResult.from_json(result.to_json()) == result
    named = explain(model, tokenizer, PROMPT, target_ids(2), "surrogate", n_masks=9, guide=guide)
    assert named.lds is None  # a quarter of nine masks has two
    assert named.seq_attr.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_masks": 0}, "n_masks must be an int of at least 1"),
        ({"n_masks": 1}, "n_masks must be at least 2, got 1"),
        ({"guide": "nothing"}, "expected method to be one of"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseSurrogate(tiny_model("llama"), **options)
