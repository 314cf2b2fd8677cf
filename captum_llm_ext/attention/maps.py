"""Reduce the attention of all heads to one map per layer, target tokens by features.

A new reduction is one function here, and its name in `REDUCTIONS`, in `OVER_LAYERS` of
`results/attention.py`, and in `CHOICES` of `registry.py`. What it needs besides is a field of
`LayerAttention`, filled in `reading.py`.
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
    """The attention of the selected heads of one layer, and what a reduction needs besides.

    targets: (n_heads, n_output, length), the rows of the positions that predict the target tokens;
    prompt: (n_heads, n_prompt, n_prompt) or None; mean: (length, length), the mean over heads, for
    rollout; norms: (n_heads, length), the norms of the values, for value_norm; flow: (n_output,
    length) or None, and span_flow: (length,), the shares of each target row and of all of them
    together, for flow; transitions: (length, length), the shares in every position, for
    flow_rollout.
    """

    name: str
    targets: Tensor
    prompt: Tensor | None = None
    mean: Tensor | None = None
    norms: Tensor | None = None
    flow: Tensor | None = None
    span_flow: Tensor | None = None
    transitions: Tensor | None = None


Layers = Sequence[LayerAttention]


@dataclass(frozen=True)
class Reduction:
    """A rule that reduces the heads of each layer to one map.

    layer_maps: (n_output, n_input) for each layer, from what was read and a function that sums
    positions to features; needs: the fields of `LayerAttention` that it reads besides `targets`;
    span_maps: (n_input,) for each layer and the whole target, where that is not the mean over its
    tokens.
    """

    layer_maps: Callable[[Layers, ByFeature], list[Tensor]]
    needs: str | None = None
    span_maps: Callable[[Layers, ByFeature], list[Tensor]] | None = None


def _mean(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    return [by_feature(layer.targets).mean(0) for layer in layers]


def _max(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    return [by_feature(layer.targets).amax(0) for layer in layers]


def _value_norm(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    return [
        by_feature(layer.targets * layer.norms[:, None]).mean(0)
        for layer in layers
        if layer.norms is not None
    ]


def _rollout(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    means = [layer.mean for layer in layers if layer.mean is not None]
    n_output = layers[0].targets.size(1)
    return [by_feature(rolled[-n_output:]) for rolled in rollouts(means)]


def _flow(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    return [by_feature(layer.flow) for layer in layers if layer.flow is not None]


def _span_flow(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    return [by_feature(layer.span_flow) for layer in layers if layer.span_flow is not None]


def _flow_rollout(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    n_output = layers[0].targets.size(1)
    return [by_feature(rolled[-n_output:]) for rolled in _rolled(layers)]


def _span_flow_rollout(layers: Layers, by_feature: ByFeature) -> list[Tensor]:
    n_output = layers[0].targets.size(1)
    return [by_feature(rolled[-n_output:].mean(0)) for rolled in _rolled(layers)]


def _rolled(layers: Layers) -> list[Tensor]:
    """The transitions up to each layer, multiplied."""
    steps = [layer.transitions for layer in layers if layer.transitions is not None]
    return list(accumulate(steps, lambda below, step: step @ below))


REDUCTIONS: dict[str, Reduction] = {
    "mean": Reduction(_mean),
    "max": Reduction(_max),
    "rollout": Reduction(_rollout, "mean"),
    "value_norm": Reduction(_value_norm, "norms"),
    "flow": Reduction(_flow, "flow", _span_flow),
    "flow_rollout": Reduction(_flow_rollout, "transitions", _span_flow_rollout),
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
