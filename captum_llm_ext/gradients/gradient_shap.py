"""Gradient SHAP: expected gradients at random points of a layer's path, with noise on its value."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import LayerGradientShap
from torch import Tensor

from captum_llm_ext.gradients.integrated_gradients import FixedQuadrature, PathMethod
from captum_llm_ext.gradients.path import LayerPath
from captum_llm_ext.model.layers import Site


class NoisyPath(LayerPath):
    """A path to the layer's value with Gaussian noise, drawn for each point."""

    method: GradientShap

    def __post_init__(self) -> None:
        seed = self.method.seed  # each layer draws its noise as if it were alone
        self.noise = {site: torch.Generator().manual_seed(seed) for site in self.moved}
        super().__post_init__()

    def difference(self, site: Site, n_points: int) -> Tensor:
        difference = super().difference(site, n_points)
        if not self.method.stdev:
            return difference
        shape = (n_points, *difference.shape[1:])
        noise = torch.randn(shape, generator=self.noise[site]).to(difference)
        return difference + self.method.stdev * noise

    def moves(self, site: Site) -> Tensor:
        moves = super().moves(site)
        return torch.ones_like(moves) if self.method.stdev else moves


class GradientShap(PathMethod):
    """Drives ``captum.attr.LayerGradientShap``.

    Expected gradients: Erion et al. 2021, https://arxiv.org/abs/1906.10670.
    """

    drives = LayerGradientShap
    options = ("n_samples", "stdevs")
    path_class = NoisyPath
    is_random = True

    def __init__(self, points: FixedQuadrature, multiplies: bool, stdev: float, seed: int) -> None:
        super().__init__(points, multiplies)
        self.stdev, self.seed = stdev, seed

    @classmethod
    def of(  # type: ignore[override]
        cls, attr_method: LayerGradientShap, n_samples: Any = 5, stdevs: Any = 0.0
    ) -> GradientShap:
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples must be an int >= 1, got {n_samples!r}")
        if isinstance(stdevs, bool) or not isinstance(stdevs, int | float) or stdevs < 0:
            raise ValueError(f"stdevs must be a number >= 0, one for all layers; got {stdevs!r}")
        points = FixedQuadrature(torch.rand(n_samples).tolist(), [1.0 / n_samples] * n_samples)
        seed = int(torch.randint(2**31, ()))
        return cls(points, attr_method.multiplies_by_inputs, float(stdevs), seed)
