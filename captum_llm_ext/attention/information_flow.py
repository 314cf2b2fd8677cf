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

ELEMENTS = 2**22  # of a tensor of parts that is held at a time


@dataclass(frozen=True, eq=False)
class BlockFlow:
    """What flows into one block's state, at some rows.

    states: (n_rows, hidden) x_i; weights: (n_heads, n_rows, length) α_hij, times the scale of a
    norm at each row; carried: (n_heads, length, hidden) v_hj W_h, after the norm's linear map.
    """

    states: Tensor
    weights: Tensor
    carried: Tensor

    @property
    def whole(self) -> Tensor:
        """(n_rows, hidden) y_i."""
        return self.states + torch.einsum("hij,hjk->ik", self.weights, self.carried)

    def together(self) -> BlockFlow:
        """The rows as one span."""
        return BlockFlow(
            self.states.sum(0, keepdim=True), self.weights.sum(1, keepdim=True), self.carried
        )

    def shares(self, heads: list[int]) -> Tensor:
        """(n_rows, length) the share of each position, by these heads, in the state of each row."""
        whole = self.whole
        parts = torch.stack([self._closeness(whole, head) for head in range(len(self.weights))])
        residual = closeness(whole, self.states[:, None])
        total = parts.sum((0, 2))[:, None] + residual
        return parts[heads].sum(0) / total.clamp(min=torch.finfo(total.dtype).tiny)

    def residual_share(self) -> Tensor:
        """(n_rows,) the share of the state that enters the block."""
        whole = self.whole
        parts = sum(self._closeness(whole, head).sum(1) for head in range(len(self.weights)))
        residual = closeness(whole, self.states[:, None])[:, 0]
        return residual / (parts + residual)

    def transitions(self, heads: list[int]) -> Tensor:
        """(n_rows, length) of all positions as rows: shares of each j, the residual being i's.

        The heads' parts are summed first.
        """
        whole, rows = self.whole, []
        everything = torch.arange(len(whole))
        for i in everything:
            parts = torch.einsum("hj,hjk->hjk", self.weights[:, i], self.carried)
            summed = parts.sum(0)
            summed[i] += self.states[i]
            total = closeness(whole[i : i + 1], summed[None]).sum()
            chosen = parts[heads].sum(0)
            chosen[i] += self.states[i]
            rows.append(closeness(whole[i : i + 1], chosen[None])[0] / total.clamp(min=1e-30))
        return torch.stack(rows)

    def _closeness(self, whole: Tensor, head: int) -> Tensor:
        """(n_rows, length) of what one head carries from each position."""
        carried, weights = self.carried[head], self.weights[head]
        at_once = max(1, ELEMENTS // carried.numel())
        return torch.cat(
            [
                closeness(rows, w[..., None] * carried)
                for rows, w in zip(whole.split(at_once), weights.split(at_once), strict=True)
            ]
        )


def closeness(whole: Tensor, parts: Tensor) -> Tensor:
    """(n_rows, n_parts) of parts (n_rows, n_parts, hidden) to the wholes (n_rows, hidden)."""
    distance = torch.cdist(parts, whole[:, None], p=1)[..., 0]
    return (whole.abs().sum(-1, keepdim=True) - distance).clamp(min=0)
