"""From the attention of every head to one map per layer, target tokens by features.

A new reduction is one function and one line in `LAYER_MAPS`.
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
    """What is kept of a layer's attention, of the chosen heads.

    targets: (n_heads, n_output, length), of the positions that predict the target tokens;
    prompt: (n_heads, n_prompt, n_prompt) or None; mean: (length, length) over heads, for rollout,
    or None; norms: (n_heads, length), of the values carried, for value_norm, or None.
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
    """Attention rollout up to each layer, from the weights (length, length) of each.

    The residual connection counts as attention to oneself, and layers multiply:
    A = (W + 1) / 2 with its rows normalised, R_l = A_l R_{l-1}, R_0 = 1. Abnar & Zuidema 2020,
    https://arxiv.org/abs/2005.00928, equation 1.
    """
    steps = [(mean + torch.eye(len(mean), device=mean.device)) / 2 for mean in means]
    normalised = [step / step.sum(-1, keepdim=True) for step in steps]
    return list(accumulate(normalised, lambda below, step: step @ below))
