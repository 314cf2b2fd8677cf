"""Conductance: the embeddings walk their path, and layers are read on the way.

A layer's conductance is the sum over the path of ∂score/∂layer times the layer's change, for any
number of layers from one walk. Where the layer's output is the whole state of the model (the
embeddings, a decoder block) it adds up to the difference of scores. Dhamdhere et al. 2018, How
Important Is a Neuron?, https://arxiv.org/abs/1805.12233.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import LayerConductance
from torch import Tensor, nn

from captum_llm_ext.gradients.adaptive import POINTS
from captum_llm_ext.gradients.integrated_gradients import PathMethod, quadrature
from captum_llm_ext.gradients.method import DIFFERENCE
from captum_llm_ext.gradients.path import LayerPath
from captum_llm_ext.gradients.totals import LayerTotal, Plan
from captum_llm_ext.gradients.trace import Trace
from captum_llm_ext.inputs.baselines import PathStart
from captum_llm_ext.model.adapter import layout_of
from captum_llm_ext.model.hooks import reading, writing
from captum_llm_ext.model.layers import Site, token_embedding


@dataclass
class EmbeddingPath(LayerPath):
    """The path of the embeddings, which alone are moved; all layers of the totals are read.

    A fixed quadrature takes Captum's sum: the gradient at each point times the change until the
    next one, so it has one point more than steps. whole: the layers that hold the whole state.
    """

    whole: Sequence[Site] = ()

    @property
    def read(self) -> Sequence[Site]:
        return self.trace.alive

    def add_points(self, points: Sequence[float], weights: Sequence[float]) -> None:
        def add(steps: slice) -> None:
            part = torch.tensor(points)[steps.start : steps.stop + 1]
            forward = torch.eye(len(part)).roll(1, dims=1) - torch.eye(len(part))
            forward[-1] = 0  # the last point only ends the step before it
            self._add_changes(part, forward[None], None, [self.totals])

        self.halving(add, len(points) - 1)
        self.record(len(points))

    def add_intervals(
        self,
        points: Tensor,
        weights: Tensor,
        ends: Sequence[tuple[float, float]],
        totals: Sequence[Mapping[Site, LayerTotal]],
    ) -> None:
        """The change at each point is the slope there of the polynomial through points and ends."""

        def add(part: slice) -> None:
            rows = slice(part.start * POINTS, part.stop * POINTS)
            edges = torch.tensor(ends[part])
            nodes = torch.cat([points[rows].reshape(-1, POINTS), edges], dim=1)
            slopes = torch.stack([_slopes(n, POINTS) for n in nodes])
            changes = weights[rows].reshape(-1, POINTS, 1) * slopes
            self._add_changes(points[rows], changes, edges.flatten(), totals[part])

        self.halving(add, len(ends))

    def sums(self, totals: Mapping[Site, LayerTotal]) -> Tensor:
        return torch.stack([totals[site].sums(self.target_slice) for site in self.whole])

    def _add_changes(
        self,
        points: Tensor,
        changes: Tensor,
        ends: Tensor | None,
        totals: Sequence[Mapping[Site, LayerTotal]],
    ) -> None:
        """Add the gradients at `points` times the layers' changes there, as many to each total.

        changes: (units, points, points + ends), the changes of a unit as sums of its layers' values
        at its points and, behind them, its ends.
        """
        fresh = [{site: total[site].empty() for site in self.read} for total in totals]
        at_ends = {} if ends is None else self._read_at(ends)
        with writing(self.values_at(points)), reading(self.read) as values:
            scored = self.score_rows(len(points), self.read)
        self.note(points, scored.sequence_score())
        factors = {s: _changed(changes, values[s].detach(), at_ends.get(s)) for s in self.read}
        wrt, options = [values[site] for site in self.read], self.plan.grad_kwargs
        for output, gradients in scored.gradients(wrt, self.plan.per_token, **options):
            for site, gradient in zip(self.read, gradients, strict=True):
                products = factors[site] * gradient.float()
                for total, part in zip(fresh, products.chunk(len(fresh)), strict=True):
                    total[site].add(output, part.sum(0))
        for into, new in zip(totals, fresh, strict=True):
            for site in self.read:
                into[site].add_total(new[site])
        self.plan.advance(len(points))

    @torch.no_grad()
    def _read_at(self, points: Tensor) -> dict[Site, Tensor]:
        with writing(self.values_at(points)), reading(self.read) as values:
            self.score_rows(len(points))
        return {site: value.detach() for site, value in values.items()}


class Conductance(PathMethod):
    """Drives ``captum.attr.LayerConductance``."""

    drives = LayerConductance
    options = ("n_steps", "method", "tol", "max_evaluations", "max_rows")
    sums_to = DIFFERENCE
    moves_layers = False

    @classmethod
    def of(cls, attr_method: LayerConductance, **options: Any) -> Conductance:
        return cls(quadrature(**options, more_points=1))

    def sites(self, sites: Sequence[Site], model: nn.Module) -> Sequence[Site]:
        """The sites with that of the token embeddings, whose path it is, in front."""
        embedding = token_embedding(model)
        first = [s for s in sites if s.module is embedding and not s.at_input]
        first = first or [Site("token embeddings", embedding)]
        return [*first, *(site for site in sites if site not in first)]

    def paths(
        self,
        trace: Trace,
        start: PathStart | None,
        plan: Plan,
        totals: Mapping[Site, LayerTotal],
    ) -> Iterator[LayerPath]:
        whole = self.checked(trace.alive, trace.forcing.model)
        moved = whole[:1]
        starts = trace.values_at(start, moved)
        yield EmbeddingPath(trace, self, plan, totals, starts, moved, whole)

    def checked(self, sites: Iterable[Site], model: nn.Module) -> list[Site]:
        """The embeddings and blocks: everything the scores depend on passes them."""
        whole = [token_embedding(model), *layout_of(model).whole_blocks(model)]
        return [site for site in sites if site.module in whole]


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
