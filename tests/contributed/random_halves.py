"""A perturbation method of Captum's kind, which draws masks from a generator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.compat import PerturbationAttribution

N_MASKS = 12


class RandomHalves(PerturbationAttribution):
    """The mean score with each feature less that without it, over distinct random masks."""

    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func)
        self.generator = torch.Generator().manual_seed(0)

    def attribute(self, inputs: Tensor, perturbations_per_eval: int = 1) -> Tensor:
        n_features = inputs.size(1)
        order = torch.randperm(2**n_features, generator=self.generator)[:N_MASKS]
        masks = ((order[:, None] >> torch.arange(n_features)) & 1).float()
        scores = torch.cat([self.forward_func(mask[None]) for mask in masks])
        with_feature = (masks.T @ scores) / masks.sum(0)[:, None]
        without = ((1 - masks).T @ scores) / (1 - masks).sum(0)[:, None]
        return (with_feature - without).T
