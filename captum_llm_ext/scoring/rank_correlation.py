"""Spearman's rank correlation, by which predicted scores are compared with true ones."""

from __future__ import annotations

from torch import Tensor


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
