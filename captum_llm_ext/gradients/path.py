"""The straight path from a layer's baseline to its value: scores and gradients along it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.gradients.adaptive import NEAR_START
from captum_llm_ext.gradients.forward_mode import ForwardMode
from captum_llm_ext.gradients.method import DIFFERENCE, GradientMethod
from captum_llm_ext.gradients.totals import LayerTotal, Plan, difference_floor
from captum_llm_ext.gradients.trace import Trace, all_scores
from captum_llm_ext.model.hooks import reading, replaying, writing
from captum_llm_ext.model.layers import Site
from captum_llm_ext.model.memory import Halving
from captum_llm_ext.scoring.teacher_forcing import Pass, tolerance

logger = logging.getLogger(__name__)

LEAP = 0.01  # share of the score difference that makes it one: 100 times the mean slope


@dataclass(frozen=True)
class Shared:
    """The totals that the rows of one batch belong to, and how many rows each has, in order."""

    totals: Sequence[Mapping[Site, LayerTotal]]
    counts: Sequence[int]

    def split(self, *values: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each total with its rows of the values."""
        parts = (value.split(list(self.counts)) for value in values)
        return zip(self.totals, *parts, strict=True)


@dataclass
class LayerPath:
    """The straight path of one layer, or of several together.

    moved: the layers that are put at the path's points; starts: their values at the baseline.
    """

    trace: Trace
    method: GradientMethod
    plan: Plan
    totals: Mapping[Site, LayerTotal]
    starts: Mapping[Site, Tensor]
    moved: Sequence[Site]

    def __post_init__(self) -> None:
        self.halving = Halving(self.plan.rows)
        self.seen: dict[float, float] = {}  # path point -> sequence score there
        self.replayed = self.trace.replayable(self.moved)
        adds_up = self.method.sums_to == DIFFERENCE
        scores = self._scored_ends([0.0, NEAR_START] if adds_up else [0.0])
        self.ends = scores[[0, -1]]
        self.leap = self._leap(scores[1]) if adds_up else 0.0
        self.forward_mode = ForwardMode(self) if self.plan.forward else None

    @property
    def read(self) -> Sequence[Site]:
        """The layers whose gradients are taken."""
        return self.moved

    @property
    def target_slice(self) -> slice:
        return slice(self.trace.span.start, self.trace.span.stop)

    def add_points(self, points: Sequence[float], weights: Sequence[float]) -> None:
        """Add the gradients at the points, with their weights."""
        n_chunks = math.ceil(len(points) / self.plan.rows)
        chunks = (torch.tensor(values).tensor_split(n_chunks) for values in (points, weights))
        for part, shares in zip(*chunks, strict=True):
            self._add_rows(part, shares, [self.totals])
        self.record(len(points))

    def add_intervals(
        self,
        points: Tensor,
        weights: Tensor,
        ends: Sequence[tuple[float, float]],
        totals: Sequence[Mapping[Site, LayerTotal]],
    ) -> None:
        """Add the gradients at the points of several intervals, as many to each one's totals."""
        self._add_rows(points, weights, totals)

    def _add_rows(
        self, points: Tensor, weights: Tensor, totals: Sequence[Mapping[Site, LayerTotal]]
    ) -> None:
        values, factors = {}, {}
        for site in self.read:
            difference = self.difference(site, len(points))
            values[site] = self.starts[site].float() + _over_rows(points, difference) * difference
            share = _over_rows(weights, difference)
            factors[site] = share * difference if self.method.multiplies else share
        per_total = len(points) // len(totals)

        def add(rows: slice) -> None:
            first, last = rows.start // per_total, -(-rows.stop // per_total)
            starts = range(first * per_total, last * per_total, per_total)
            counts = [min(rows.stop, s + per_total) - max(rows.start, s) for s in starts]
            shared = Shared(totals[first:last], counts)
            self._add_batch(points[rows], _part(values, rows), _part(factors, rows), shared)

        self.halving(add, len(points))
        self.plan.advance(len(points))

    def _add_batch(
        self,
        points: Tensor,
        values: Mapping[Site, Tensor],
        factors: Mapping[Site, Tensor],
        shared: Shared,
    ) -> None:
        """Add all of the rows' attributions or, where memory runs out on the way, none."""
        fresh = [{site: total[site].empty() for site in self.read} for total in shared.totals]
        parts = Shared(fresh, shared.counts)
        forward = self.forward_mode
        if forward is None or not forward.add(points, values, factors, parts):
            self._add_backward(points, values, factors, parts)
        for total, new in zip(shared.totals, fresh, strict=True):
            for site in self.read:
                total[site].add_total(new[site])

    def _add_backward(
        self,
        points: Tensor,
        values: Mapping[Site, Tensor],
        factors: Mapping[Site, Tensor],
        shared: Shared,
    ) -> None:
        """One backward pass per target token."""
        with writing(values), reading(self.read) as read:
            scored = self.score_rows(len(points), self.read)
        self.note(points, scored.sequence_score())
        wrt, options = [read[site] for site in self.read], self.plan.grad_kwargs
        for output, gradients in scored.gradients(wrt, self.plan.per_token, **options):
            for site, gradient in zip(self.read, gradients, strict=True):
                for total, part in shared.split(factors[site] * gradient.float()):
                    total[site].add(output, part.sum(0))

    def difference(self, site: Site, n_points: int) -> Tensor:
        """The layer's value less its baseline, (n_points or 1, …)."""
        return self.trace.layers[site].tensor.float() - self.starts[site].float()

    def moves(self, site: Site) -> Tensor:
        """(n_positions,) whether gradients count at each position of the layer."""
        moves = (LayerPath.difference(self, site, 1)[0] != 0).flatten(1).any(1)
        return moves if self.method.multiplies else torch.ones_like(moves)

    def scores(self, points: Tensor) -> Tensor:
        """Scores (n_points, n_checks): of the span's tokens and the sequence, or of that alone."""
        scores = self._scores_at(self.values_at(points))
        self.note(points, scores[:, -1])
        return self._checked(scores)

    @torch.no_grad()
    def _scores_at(self, values: Mapping[Site, Tensor]) -> Tensor:
        """(rows, len(span) + 1) with the layers at these values."""

        def score(rows: slice) -> Tensor:
            with writing(_part(values, rows)):
                scored = self.score_rows(rows.stop - rows.start)
            self.precision = scored.precision
            return all_scores(scored)

        return torch.cat(self.halving(score, len(next(iter(values.values())))))

    def values_at(self, points: Tensor) -> dict[Site, Tensor]:
        """The values (n_points, …) of the layers that move."""
        values = {}
        for site in self.moved:
            difference = self.difference(site, len(points))
            values[site] = self.starts[site].float() + _over_rows(points, difference) * difference
        return values

    def sums(self, totals: Mapping[Site, LayerTotal]) -> Tensor:
        """What ought to be the score differences, (layers or 1, n_checks)."""
        sums = [totals[site].sums(self.target_slice) for site in self.read]
        return torch.stack(sums).sum(0, keepdim=True)

    def _checked(self, scores: Tensor) -> Tensor:
        """(rows, n_checks) those of the scores that sums are compared with."""
        return scores if self.plan.per_token else scores[:, -1:]

    @property
    def scale(self) -> Tensor:
        """(n_checks,) the scale of a mismatch: the sequence's score difference, and for a token's
        probability the probability."""
        is_additive = self.trace.forcing.target.is_additive
        floor = difference_floor(self.ends, is_additive)
        sequence = (self.ends[1] - self.ends[0]).abs().clamp(min=floor)[-1:]
        if is_additive:
            return sequence.expand_as(floor)
        return torch.cat([self.ends.abs().amax(0)[:-1], sequence])

    def score_rows(self, rows: int, sites: Sequence[Site] = ()) -> Pass:
        """Run the model on so many rows; the first blocks, which do not change, are replayed."""
        trace = self.trace
        ids = trace.forcing.fed(trace.span).expand(rows, -1)
        state = trace.block_outputs[self.replayed - 1] if self.replayed else None
        with replaying(trace.blocks[: self.replayed], state, rows):
            return trace.forcing.run(ids, trace.span, sites)

    def _scored_ends(self, points: list[float]) -> Tensor:
        """The scores (n_points + 1, n_checks) at the points where the path begins, and at its end.

        The end's are those of the pass at the input. Where blocks are replayed they are computed
        again, and say whether that is right, beyond what the graph says: what a model passes from
        block to block may carry no gradients, and then the path does not end at the model's own
        scores, or blocks miss what they need.
        """
        beginning, layers = self.values_at(torch.tensor(points)), self.trace.layers
        whole = {s: torch.cat([x, layers[s].tensor.to(x)]) for s, x in beginning.items()}
        scores = self._replayed(whole) if self.replayed else None
        if scores is None:
            self.replayed, end = 0, self.trace.scores
            scores = torch.cat([self._scores_at(beginning), end])
        self.note(torch.tensor([*points, 1.0]), scores[:, -1])
        return self._checked(scores)

    def _replayed(self, values: Mapping[Site, Tensor]) -> Tensor | None:
        """The scores, or None where replayed blocks do not give the model's."""
        with suppress(AttributeError, IndexError, KeyError, TypeError):
            scores = self._scores_at(values)
            if self._reaches_input(scores[-1:]):
                return scores
        logger.info("blocks cannot be replayed in this model: running all of them")
        return None

    def _reaches_input(self, scores: Tensor) -> bool:
        """Whether the path's end has the scores of the model at the input itself."""
        expected = self.trace.scores[:, :-1]
        relative = 1e-3 if self.precision in (torch.float32, torch.float64) else 5e-2
        allowed = relative * expected.abs().clamp(min=1)
        return bool(((scores[:, :-1] - expected).abs() <= allowed).all())

    def note(self, points: Tensor, scores: Tensor) -> None:
        """Keep the sequence scores (rows,) at the points, for the picture of the path."""
        self.seen.update(zip(points.tolist(), scores.detach().tolist(), strict=True))

    def record(self, n_points: int, converged: bool | None = None) -> None:
        """Note on the totals how many gradients were taken, and whether they sufficed."""
        for site in self.read:
            record = self.totals[site].record
            record.n_evaluations = max(record.n_evaluations, n_points)
            if converged is not None:
                record.converged = converged and record.converged is not False

    def finish(self) -> None:
        """Note the scores on the totals, of layers that a joint path does not move too."""
        for site in self.totals if self.plan.joint else self.read:
            record = self.totals[site].record
            record.add(self.ends, self.seen, self.leap, self.target_slice)

    def _leap(self, near: Tensor) -> float:
        """The share of the score difference that falls next to the start, or 0.

        near: (n_checks,) the scores there.
        """
        start, end = self.ends[:, -1].tolist()
        leap, largest = abs(float(near[-1]) - start), max(abs(start), abs(end))
        is_probability = self.trace.forcing.target.attr_target == "prob"
        floor = largest if is_probability else max(1.0, largest)
        noise = tolerance(self.precision) * floor
        share = leap / max(abs(end - start), noise, torch.finfo(torch.float32).tiny)
        return share if leap > noise and share > LEAP else 0.0


def _part(values: Mapping[Site, Tensor], rows: slice) -> dict[Site, Tensor]:
    return {site: value[rows] for site, value in values.items()}


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))
