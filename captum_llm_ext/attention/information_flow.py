"""Information flow routes: how much of a block's state each position and head brings there.

Ferrando and Voita 2024, Information Flow Routes, https://arxiv.org/abs/2403.00824. A block adds to
the state x_i that enters it at position i what its heads carry from positions j,
c_hij = α_hij · (v_hj W_h), so that the state after attention is y_i = x_i + Σ_hj c_hij; biases and
the mlp are left out. The closeness of a part p to the whole is max(0, ‖whole‖₁ − ‖whole − p‖₁), and
its share is its closeness over that of all parts and the residual x_i. For a span of rows, whole
and parts are summed over its rows first.

A norm on the attention's output is the linear map that it is at i: it subtracts the mean if it
does so, its denominator counts as a constant, and its bias is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.inputs.statements import Statements

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class BlockFlow:
    """The terms that sum to one block's state after attention, at some rows.

    states: (n_rows, hidden) x_i; weights: (n_heads, n_rows, length) α_hij, times the scale of a
    norm at each row; carried: (n_heads, length, hidden) v_hj W_h, after the norm's linear map.
    """

    states: Tensor
    weights: Tensor
    carried: Tensor

    @property
    def whole(self) -> Tensor:
        """(n_rows, hidden) y_i."""
        by_row = self.weights.transpose(0, 1).flatten(1)
        return self.states + by_row @ self.carried.flatten(0, 1)

    def together(self) -> BlockFlow:
        """The rows as one span."""
        return BlockFlow(
            self.states.sum(0, keepdim=True), self.weights.sum(1, keepdim=True), self.carried
        )

    def over(self, statements: Statements) -> BlockFlow:
        """The rows of each statement as one span."""
        states, weights = statements.sums(self.states), statements.sums(self.weights, dim=1)
        return BlockFlow(states, weights, self.carried)

    def shares(self, heads: list[int]) -> Tensor:
        """(n_rows, length) the share of each position, by these heads, in the state of each row."""
        parts, residual = self._closenesses()
        total = parts.sum((1, 2)) + residual
        return parts[:, heads].sum(1) / total.clamp(min=TINY)[:, None]

    def residual_share(self) -> Tensor:
        """(n_rows,) the share of the state that enters the block."""
        parts, residual = self._closenesses()
        return residual / (parts.sum((1, 2)) + residual).clamp(min=TINY)

    def transitions(self, heads: list[int]) -> Tensor:
        """(n_rows, length) the share of each position in each row's state; the rows are all
        positions.

        The heads' parts are summed first, and a row's own state is part of its own position.
        """
        rows = []
        for i, (whole, state) in enumerate(zip(self.whole, self.states, strict=True)):
            every, chosen = (
                torch.einsum("hj,hjk->jk", self.weights[which, i], self.carried[which])
                for which in (slice(None), heads)
            )
            for parts in (every, chosen):
                parts[i] += state
            total = closeness(whole[None], every[None]).sum()
            rows.append(closeness(whole[None], chosen[None])[0] / total.clamp(min=TINY))
        return torch.stack(rows)

    def _closenesses(self) -> tuple[Tensor, Tensor]:
        """(n_rows, n_heads, length) of what heads carry, and (n_rows,) of the residual."""
        whole, carried = self.whole, self.carried.flatten(0, 1)
        by_row = self.weights.transpose(0, 1).flatten(1)
        distances, rest = torch.empty_like(by_row), torch.empty_like(carried)
        for row, weights, distance in zip(whole, by_row[..., None], distances, strict=True):
            torch.addcmul(row, weights, carried, value=-1, out=rest)  # one row's parts at a time
            torch.sum(rest.abs_(), -1, out=distance)
        parts = (whole.abs().sum(-1, keepdim=True) - distances).clamp(min=0)
        residual = closeness(whole, self.states[:, None])[:, 0]
        return parts.unflatten(1, self.carried.shape[:2]), residual


def closeness(whole: Tensor, parts: Tensor) -> Tensor:
    """(n_rows, n_parts) of parts (n_rows, n_parts, hidden) to the wholes (n_rows, hidden)."""
    distance = torch.cdist(parts, whole[:, None], p=1)[..., 0]
    return (whole.abs().sum(-1, keepdim=True) - distance).clamp(min=0)
