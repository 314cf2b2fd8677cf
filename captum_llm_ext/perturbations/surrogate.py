"""A linear surrogate of the score, learned from random masks (ContextCite)."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from captum_llm_ext.perturbations.game import Game
from captum_llm_ext.perturbations.guides import checked_guide
from captum_llm_ext.perturbations.method import Outcome, PerturbationMethod, Run
from captum_llm_ext.scoring.checks import check_counts
from captum_llm_ext.scoring.rank_correlation import rank_correlation
from captum_llm_ext.warning import warn

PENALTY = 0.01  # of the Lasso, ContextCite's
FLOOR = 0.1  # of the guide's mean magnitude, added to each feature's
NOISES = torch.logspace(-3, 1, 9, dtype=torch.double)  # tried by the ridge, by its prior's variance
FOLDS = 4  # of the masks, each held back once
LEAST_LDS = 0.5
MOST_STEPS, TOLERANCE = 20_000, 1e-7  # of the Lasso's descent


class SparseSurrogate(PerturbationMethod):
    """The weights of a linear model that predicts the score from the features that are present.

    Masks have each feature with probability 1/2; fewer than 2^K of them for K features, or all.
    Without a guide the weights are a Lasso's, as in ContextCite: columns are standardised, and the
    penalty is 0.01. With a guide they are a ridge's, in which the prior variance of a feature is
    the guide's magnitude plus a tenth of its mean, and the noise is the one whose leave-one-out
    error is least; so it serves more features than masks. Each target token has weights of its own,
    from the same evaluations.

    The result's `lds` states how well that works: the rank correlation of the score with what the
    weights predict on a quarter of the masks that was held back, the mean over the four quarters.
    It is None where a quarter has fewer than three masks or one score alone.

    Args:
        forward_func: the model, or any function of the inputs.
        n_masks: how many random masks are scored, 2 or more.
        guide: the name of the method whose attributions are the guide, with its defaults; None
            (default) for none. Pictures and plain tensors have none.

    Raises:
        ValueError: `n_masks` is not an int of at least 2, or the guide is not a method's name;
            baselines or masks given to `attribute` do not fit the inputs.

    Warns:
        when the rank correlation is below 0.5.

    Inputs are (batch, n_features) for the features that `LLMAttribution` switches on and off.
    Cohen-Wang et al. 2024, "ContextCite: Attributing Model Generation to Context",
    https://arxiv.org/abs/2409.00729.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> method = SparseSurrogate(lambda x: 10 * x[:, 0] - 5 * x[:, 2], n_masks=64)
        >>> method.attribute(torch.ones(1, 3)).round(decimals=1)
        tensor([[10., 0., -5.]])
    """

    def __init__(self, forward_func: object, n_masks: int = 64, guide: str | None = None) -> None:
        super().__init__(forward_func)
        check_counts(n_masks=n_masks)
        if n_masks < 2:
            raise ValueError(
                f"n_masks must be at least 2, got {n_masks}: one mask compares nothing"
            )
        self.n_masks, self.guide = n_masks, checked_guide(guide)

    def run(self, game: Game) -> Run:
        """Random masks, and a regression of their scores."""
        masks = random_masks(game, self.n_masks)
        scores = yield masks
        weighted = weights(masks, scores, game.guide)
        lds = held_back_correlation(masks, scores, game.guide)
        if lds is not None and lds < LEAST_LDS:
            guided = "" if self.guide else ', or guide="flow"'
            warn(
                "the surrogate predicts scores of masks that it has not seen with a rank "
                f"correlation of {lds:.2f}: give more n_masks than {self.n_masks}, or fewer and "
                f"larger features{guided}"
            )
        return Outcome(weighted.to(scores.dtype), lds=lds)


def random_masks(game: Game, n_masks: int) -> Tensor:
    """(n_masks, n_features) each feature present with probability 1/2; all if those are fewer."""
    if 2**game.n_features <= n_masks:
        return torch.tensor(list(product((0.0, 1.0), repeat=game.n_features)))
    return torch.rand(n_masks, game.n_features, generator=game.generator).round()


def weights(masks: Tensor, scores: Tensor, guide: Tensor | None) -> Tensor:
    """(1 + n_output, n_features) of a linear model with an intercept."""
    present, values = masks.double(), scores.double()
    if guide is None:
        return lasso(present, values, PENALTY)
    magnitude = guide.double().abs()
    if not magnitude.any():
        magnitude = magnitude + 1
    return ridge(present, values, magnitude + FLOOR * magnitude.mean())


def lasso(present: Tensor, values: Tensor, penalty: float) -> Tensor:
    """(n_columns, n_features) that minimise ‖y − Xw‖² / 2n + penalty ‖w‖₁, X standardised.

    By accelerated proximal gradients (FISTA; Beck & Teboulle 2009), which begin anew where they
    overshoot.
    """
    deviation = present.std(0, correction=0)
    x = (present - present.mean(0)) / torch.where(deviation > 0, deviation, torch.inf)
    y = values - values.mean(0)
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    step = 1 / max(float(torch.linalg.matrix_norm(gram, 2)), 1e-12)
    w = ahead = torch.zeros_like(moment)
    momentum = 1.0
    for _ in range(MOST_STEPS):
        moved = ahead - step * (gram @ ahead - moment)
        new = moved.sign() * (moved.abs() - step * penalty).clamp(min=0)
        if (new - w).abs().max() <= TOLERANCE * max(float(new.abs().max()), 1e-12):
            break
        overshoots = ((ahead - new) * (new - w)).sum() > 0
        faster = 1.0 if overshoots else (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (0.0 if overshoots else (momentum - 1) / faster) * (new - w)
        w, momentum = new, faster
    return (w / torch.where(deviation > 0, deviation, torch.inf)[:, None]).T


def ridge(present: Tensor, values: Tensor, variance: Tensor) -> Tensor:
    """(n_columns, n_features) posterior means under a prior of the variance (n_features,).

    Of the noises tried, each column has the one with the least leave-one-out error.
    """
    x, y = present - present.mean(0), values - values.mean(0)
    kernel = (x * variance) @ x.T
    scale, eye = kernel.diagonal().mean().clamp(min=1e-12), torch.eye(len(x), dtype=x.dtype)
    errors, solutions = [], []
    for noise in NOISES:
        inverse = torch.linalg.inv(kernel + noise * scale * eye)
        solutions.append(inverse @ y)
        errors.append((solutions[-1] / inverse.diagonal()[:, None]).square().mean(0))
    best = torch.stack(errors).argmin(0)
    chosen = torch.stack(solutions)[best, :, torch.arange(y.size(1))]  # (n_columns, n_masks)
    return (chosen @ x) * variance


def held_back_correlation(masks: Tensor, scores: Tensor, guide: Tensor | None) -> float | None:
    """The rank correlation on each quarter of the masks, by the weights of the others; the mean."""
    correlations = []
    for i in range(FOLDS):
        held_back = torch.arange(len(masks)) % FOLDS == i
        learned = weights(masks[~held_back], scores[~held_back, :1], guide)[0]
        predicted, true = masks[held_back].double() @ learned, scores[held_back, 0]
        if len(true) < 3 or (true == true[0]).all():
            return None
        # A constant prediction says nothing of the scores: 0.
        correlations.append(float(rank_correlation(predicted[None], true)[0].nan_to_num()))
    return sum(correlations) / FOLDS
