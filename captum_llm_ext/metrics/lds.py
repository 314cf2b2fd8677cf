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
