"""The linear datamodeling score: do sums of attributions rank prompts as their scores do?

Park et al. 2023, https://arxiv.org/abs/2303.14186; for the parts of a prompt, Cohen-Wang et
al. 2024, https://arxiv.org/abs/2409.00729.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_masks(n_masks: int, n_features: int, generator: torch.Generator) -> Tensor:
    """(n_masks, n_features) 1 for exactly half of the features, rounded down, drawn for each."""
    drawn = torch.rand(n_masks, n_features, generator=generator)
    return (drawn.argsort(1).argsort(1) < n_features // 2).float()


def rank_correlation(predicted: Tensor, scores: Tensor) -> Tensor:
    """(n,) Spearman correlation of each row of (n, n_masks) with scores (n_masks,).

    Equal values share their mean rank; NaN where all of a side are equal.
    """
    a, b = (_ranks(values.double()) for values in (predicted, scores))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean()
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum()).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """The mean rank of each value along the last dimension, over the values that equal it."""
    below = values[..., None, :] < values[..., :, None]
    same = values[..., None, :] == values[..., :, None]
    return below.sum(-1) + (same.sum(-1) - 1) / 2
