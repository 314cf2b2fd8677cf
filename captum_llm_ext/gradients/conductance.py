"""Conductance: the embeddings walk their path, and layers are read on the way.

A layer's conductance is the sum over the path of ∂score/∂layer times how the layer changes, of any
number of layers from one walk. Where the layer's output is the whole state of the model (the
embeddings, a decoder block) it adds up to the difference of scores. Dhamdhere et al. 2018, How
Important Is a Neuron?, https://arxiv.org/abs/1805.12233.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captum_llm_ext.gradients.path import PathWalk
from captum_llm_ext.gradients.quadrature import POINTS
from captum_llm_ext.gradients.totals import LayerTotal
from captum_llm_ext.model.hooks import reading, writing
from captum_llm_ext.model.layers import Site


@dataclass
class ConductanceWalk(PathWalk):
    """The path of the embeddings (`moved`), with the layers that are `read` on the way.

    whole: those among them whose attributions are to add up to the difference of scores.
    """

    read: Sequence[Site] = ()
    whole: Sequence[Site] = ()

    @property
    def chain(self) -> Sequence[Site]:
        return self.read

    def walk(self, totals: Mapping[Site, LayerTotal]) -> None:
        """By Captum's sum: the gradient at each point times the change until the next one."""
        alphas = torch.tensor(self.rule.points)

        def add(steps: slice) -> None:
            points = alphas[steps.start : steps.stop + 1]
            forward = torch.eye(len(points)).roll(1, dims=1) - torch.eye(len(points))
            forward[-1] = 0  # the last point only ends the step before it
            self._add(points, forward[None], None, [totals])

        self.halving(add, len(alphas) - 1)
        self.count(totals, len(alphas))

    def add_intervals(
        self,
        points: Tensor,
        shares: Tensor,
        ends: Sequence[tuple[float, float]],
        totals: Sequence[Mapping[Site, LayerTotal]],
    ) -> None:
        """The change at each point is the slope there of the polynomial through points and ends."""

        def add(part: slice) -> None:
            rows = slice(part.start * POINTS, part.stop * POINTS)
            own = torch.tensor(ends[part])
            nodes = torch.cat([points[rows].reshape(-1, POINTS), own], dim=1)
            slopes = torch.stack([_slopes(n, POINTS) for n in nodes])
            changes = shares[rows].reshape(-1, POINTS, 1) * slopes
            self._add(points[rows], changes, own.flatten(), totals[part])

        self.halving(add, len(ends))

    def sums(self, totals: Mapping[Site, LayerTotal]) -> Tensor:
        return torch.stack([self.summed(totals[site]) for site in self.whole])

    def _add(
        self,
        points: Tensor,
        changes: Tensor,
        ends: Tensor | None,
        totals: Sequence[Mapping[Site, LayerTotal]],
    ) -> None:
        """Add the gradients at `points` times the layers' changes there, as many to each total.

        changes: (units, points, points + ends), how the changes of a unit come from its layers'
        values at its points and, behind them, its ends.
        """
        fresh = [{site: total[site].empty() for site in self.chain} for total in totals]
        at_ends = {} if ends is None else self._read_at(ends)
        with writing(self._values_at(points)), reading(self.chain) as read:
            scored = self._run(len(points), self.replayed, self.chain)
        self.note(points, scored.sequence_score())
        factors = {s: _changed(changes, read[s].detach(), at_ends.get(s)) for s in self.chain}
        wrt = [read[site] for site in self.chain]
        for output, gradients in scored.gradients(
            wrt, self.plan.per_token, **self.plan.grad_kwargs
        ):
            for site, gradient in zip(self.chain, gradients, strict=True):
                products = factors[site] * gradient.float()
                for total, part in zip(fresh, products.chunk(len(fresh)), strict=True):
                    total[site].add(output, part.sum(0))
        for into, new in zip(totals, fresh, strict=True):
            for site in self.chain:
                into[site].add_total(new[site])
        self.plan.advance(len(points))

    @torch.no_grad()
    def _read_at(self, alphas: Tensor) -> dict[Site, Tensor]:
        with writing(self._values_at(alphas)), reading(self.chain) as read:
            self._run(len(alphas), self.replayed)
        return {site: value.detach() for site, value in read.items()}

    def _values_at(self, alphas: Tensor) -> dict[Site, Tensor]:
        return {site: self._values(site, alphas)[0] for site in self.moved}


def _changed(changes: Tensor, at_points: Tensor, at_ends: Tensor | None) -> Tensor:
    """The layer's change (rows, …) at each point, in float32."""
    units = len(changes)
    values = at_points.float().unflatten(0, (units, -1))
    if at_ends is not None:
        values = torch.cat([values, at_ends.float().unflatten(0, (units, -1))], dim=1)
    return torch.einsum("uij,uj...->ui...", changes.to(values), values).flatten(0, 1)


def _slopes(nodes: Tensor, count: int) -> Tensor:
    """(count, nodes): what gives a polynomial's slope at the first nodes from its values at all."""
    x = nodes.double().numpy()
    scale = x.max() - x.min()
    powers = np.vander((x - x.mean()) / scale, increasing=True)
    derived = np.zeros((count, len(x)))
    for k in range(1, len(x)):
        derived[:, k] = k * powers[:count, k - 1]
    return torch.from_numpy(np.linalg.solve(powers.T, derived.T).T / scale).float()
