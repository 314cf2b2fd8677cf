"""Forward mode: one directional derivative per feature instead of one backward per target token.

A feature's attribution at a path point is the derivative of the scores in the direction of its part
of the path, so one forward pass with tangents gives it for all target tokens at once. With fewer
features than target tokens that is cheaper. The package chooses it by itself; the attributions are
those of backward passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_llm_ext.model.hooks import reading, writing
from captum_llm_ext.model.layers import Site
from captum_llm_ext.scoring.teacher_forcing import Pass, tolerance

if TYPE_CHECKING:
    from captum_llm_ext.gradients.path import LayerPath, Shared

logger = logging.getLogger(__name__)

COST = 2.5  # of a pass with tangents, in backward passes; measured on a processor


def is_cheaper(n_groups: int, n_output: int) -> bool:
    """Whether a pass with tangents for each group of positions costs less than the backwards."""
    return COST * n_groups < n_output


class ForwardMode:
    """Forward mode for one path of one layer, until the model turns out not to have it.

    groups: the positions of each feature that the path moves. Whether the model has it is
    remembered for each layer.
    """

    def __init__(self, path: LayerPath) -> None:
        self.path, self.site = path, path.moved[0]
        forcing = path.trace.forcing
        self.checks = forcing.checks
        self.question = "forward mode", self.site.name, self.site.at_input, forcing.dtype
        groups = path.trace.positions[self.site].groups(path.moves(self.site))
        cheaper = is_cheaper(len(groups), len(path.trace.span))
        self.groups = groups if cheaper and self.checks.get(self.question, True) else []

    def add(
        self,
        points: Tensor,
        values: Mapping[Site, Tensor],
        factors: Mapping[Site, Tensor],
        totals: Shared,
    ) -> bool:
        """Add each feature's attribution at its first position; False where nothing was added."""
        if not self.groups:
            return False
        at, directions = values[self.site], factors[self.site]
        try:
            derived = [derivatives(self._run, at, directions, group) for group in self.groups]
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error):
                raise
            return self._give_up(error)
        if not self.checks.answer(self.question, lambda: self._agrees(at, directions, derived)):
            return self._give_up("its derivatives are not those of a backward pass")
        span = self.path.target_slice
        for group, (tokens, sequence, scores) in zip(self.groups, derived, strict=True):
            self.path.note(points, scores)
            for total, token_part, part in totals.split(tokens, sequence):
                total[self.site].add_at(group[0], span, token_part.sum(0), part.sum(0))
        return True

    def _run(self, values: Tensor) -> Pass:
        with writing({self.site: values}):
            return self.path.score_rows(len(values))

    def _give_up(self, reason: object) -> bool:
        logger.info("no forward mode in this model (%s): going backward", reason)
        self.groups, self.checks[self.question] = [], False
        return False

    def _agrees(
        self, values: Tensor, directions: Tensor, derived: Sequence[tuple[Tensor, ...]]
    ) -> bool:
        """Whether the first row's derivatives add up to those of a backward pass: some operations
        lose tangents without a word."""
        with writing({self.site: values[:1]}), reading([self.site]) as read:
            scored = self.path.score_rows(1, [self.site])
        _, (gradient,) = next(scored.gradients([read[self.site]], per_token=False))
        products = directions[:1] * gradient.float()
        products = products.reshape(*products.shape[:2], -1).sum(-1)
        forward = sum(float(sequence[0]) for _, sequence, _ in derived)
        allowed = 10 * tolerance(scored.precision) * float(products.abs().sum())
        return abs(forward - float(products.sum())) <= allowed


def derivatives(
    run: Callable[[Tensor], Pass], values: Tensor, directions: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives (rows, n_output) of the token scores and (rows,) of the sequence score, and
    that score (rows,).

    They are taken in the directions (rows or 1, length, …) of the layer's values (rows, length, …),
    at some positions. Raises NotImplementedError or RuntimeError where an operation of the model
    has no forward mode; scaled dot product attention has it in its plain form.
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
