"""Two-stage ablation: leave each feature out of the whole, and out of what matters of it."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from captum_llm_ext.perturbations.game import Game
from captum_llm_ext.perturbations.method import PerturbationMethod

SET_ASIDE = 4  # one feature in so many, rounded down, is absent in the second stage


class TwoStageAblation(PerturbationMethod):
    """Feature ablation, and once more without the least important quarter of the features.

    The first stage leaves each feature out of the whole input, as ``captum.attr.FeatureAblation``
    does. The second takes the quarter with the smallest attributions out (rounded down) and
    measures in what is left what each feature changes: what is there by leaving it out, what was
    taken out by putting it back. The attribution is the mean of both, so that a feature counts
    that others make up for in the whole input. The sum over outputs tells which features matter
    least. It costs twice what `FeatureAblation` costs, 2 K + 2 evaluations for K features, and
    equals it for fewer than four.

    Args:
        forward_func: the model, or any function of the inputs.

    Raises:
        ValueError: baselines or masks given to `attribute` do not fit the inputs.

    Inputs are (batch, n_features) for the features that `LLMAttribution` switches on and off. What
    the method comes from was measured in docs/faithfulness.md. Feature ablation of language models:
    Miglani et al. 2023, https://arxiv.org/abs/2312.05491.

    Example:
        >>> import torch
        >>> method = TwoStageAblation(lambda x: x.prod(1) + x[:, 0])
        >>> method.attribute(torch.tensor([[1.0, 2.0, 3.0, 0.5]]))
        tensor([[2.5000, 1.5000, 1.5000, 3.0000]])
    """

    def run(self, game: Game) -> Generator[Tensor, Tensor, Tensor]:
        """Two stages of masks: all but one of the whole, then of what was kept."""
        scores = yield torch.cat([game.whole(), game.leave_one_out()])
        drops = scores[:1] - scores[1:]  # (n_features, 1 + n_output)

        order = drops.sum(1).argsort(descending=True, stable=True)
        kept = torch.ones(game.n_features)
        kept[order[game.n_features - game.n_features // SET_ASIDE :]] = 0
        scores = yield torch.cat([kept[None], (kept - torch.eye(game.n_features)).abs()])
        changes = scores[:1] - scores[1:]  # of what was put back, the other way round
        changes = torch.where(kept[:, None] == 1, changes, -changes)

        return ((drops + changes) / 2).T
