"""Reduce the attention of all heads to one map per layer, target tokens by features.

A new reduction is one function here, and its name in `LAYER_MAPS`, in `OVER_LAYERS` of
`results/attention.py`, and in `CHOICES` of `registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

ByFeature = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """The attention of the selected heads of one layer.

    targets: (n_heads, n_output, length), the rows of the positions that predict the target tokens;
    prompt: (n_heads, n_prompt, n_prompt) or None; mean: (length, length), the mean over heads that
    rollout needs, or None; norms: (n_heads, length), the norms of the values that value_norm
    needs, or None.
    """

    name: str
    targets: Tensor
    prompt: Tensor | None = None
    mean: Tensor | None = None
    norms: Tensor | None = None


def _mean(layers: Sequence[LayerAttention], by_feature: ByFeature) -> list[Tensor]:
    return [by_feature(layer.targets).mean(0) for layer in layers]


def _max(layers: Sequence[LayerAttention], by_feature: ByFeature) -> list[Tensor]:
    return [by_feature(layer.targets).amax(0) for layer in layers]


def _value_norm(layers: Sequence[LayerAttention], by_feature: ByFeature) -> list[Tensor]:
    return [
        by_feature(layer.targets * layer.norms[:, None]).mean(0)
        for layer in layers
        if layer.norms is not None
    ]


def _rollout(layers: Sequence[LayerAttention], by_feature: ByFeature) -> list[Tensor]:
    means = [layer.mean for layer in layers if layer.mean is not None]
    n_output = layers[0].targets.size(1)
    return [by_feature(rolled[-n_output:]) for rolled in rollouts(means)]


LAYER_MAPS: dict[str, Callable[[Sequence[LayerAttention], ByFeature], list[Tensor]]] = {
    "mean": _mean,
    "max": _max,
    "rollout": _rollout,
    "value_norm": _value_norm,
}


def rollouts(means: Sequence[Tensor]) -> list[Tensor]:
    """Attention rollout up to each layer, from the weights W (length, length) of each layer.

    The residual connection counts as attention of a token to itself, and layers multiply:
    A = (W + 1) / 2 with its rows normalised, R_l = A_l R_{l-1}, R_0 = 1. Abnar & Zuidema 2020,
    https://arxiv.org/abs/2005.00928, equation 1.
    """
    steps = [(mean + torch.eye(len(mean), device=mean.device)) / 2 for mean in means]
    normalised = [step / step.sum(-1, keepdim=True) for step in steps]
    return list(accumulate(normalised, lambda below, step: step @ below))
