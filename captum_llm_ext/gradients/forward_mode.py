"""Forward mode: one directional derivative per feature instead of one backward per target token.

A feature's attribution at a path point is the derivative of the scores in the direction of its part
of the path, so one forward pass with tangents gives it for all target tokens at once. With fewer
features than target tokens that is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_llm_ext.scoring.teacher_forcing import Pass

COST = 2.5  # of a pass with tangents, in backward passes; measured on a processor


def is_cheaper(n_groups: int, n_output: int) -> bool:
    """Whether a pass with tangents for each group of positions costs less than the backwards."""
    return COST * n_groups < n_output


def position_groups(column_at: Tensor, moved: Tensor) -> list[Tensor]:
    """The positions of each feature, and last of those that move and belong to none.

    column_at: (length,) the feature of each position, -1 for none; moved: (length,) whether the
    path changes the layer there. Positions of no feature count for the convergence delta alone.
    """
    columns = column_at.where(moved, torch.full_like(column_at, -2))
    return [(columns == column).nonzero().flatten() for column in columns.unique() if column > -2]


def derivatives(
    run: Callable[[Tensor], Pass], values: Tensor, directions: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives (rows, n_output) of the token scores and (rows,) of the sequence score, and
    that score (rows,).

    In the directions (rows or 1, length, …) of the layer's values (rows, length, …), at some
    positions. Raises NotImplementedError or RuntimeError where the model has an operation that
    cannot do it; scaled dot product attention can in its plain form.
    """
    tangent = torch.zeros_like(values)
    tangent[:, positions] = directions.expand_as(values)[:, positions]
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        scored = run(forward_ad.make_dual(values, tangent))
        tokens = forward_ad.unpack_dual(scored.token_scores()).tangent
        score, sequence = forward_ad.unpack_dual(scored.sequence_score())
    zero = values.new_zeros(len(values), scored.logits.size(1))
    tokens = zero if tokens is None else tokens
    return tokens, zero[:, 0] if sequence is None else sequence, score
