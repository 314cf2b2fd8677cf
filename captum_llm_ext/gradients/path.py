"""The straight path from a layer's baseline to its value: scores and gradients along it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.gradients.forward_mode import derivatives, is_cheaper, position_groups
from captum_llm_ext.gradients.methods import PathRule
from captum_llm_ext.gradients.path_facts import PathFacts, difference_floor
from captum_llm_ext.gradients.quadrature import LEAP, NEAR_START
from captum_llm_ext.gradients.totals import LayerTotal, Plan
from captum_llm_ext.model.hooks import LayerState, reading, replaying, writing
from captum_llm_ext.model.layers import Site
from captum_llm_ext.model.memory import Halving
from captum_llm_ext.scoring.teacher_forcing import Pass, TargetSpan, TeacherForcing, tolerance

logger = logging.getLogger(__name__)

# Totals of one batch, and how many of its rows each of them gets, in order.
Shared = Sequence[tuple[Mapping[Site, LayerTotal], int]]


@dataclass(frozen=True)
class Blocks:
    """The model's blocks, what each returned at the input, and the scores (len(span),) there."""

    modules: list[nn.Module]
    outputs: list[Any]
    scores: Tensor


@dataclass
class PathWalk:
    """The straight path of one or several layers together, at the rule's points.

    moved: the layers that are put at the path's points; chain: those whose gradients are taken.
    """

    forcing: TeacherForcing
    span: TargetSpan
    rule: PathRule
    plan: Plan
    blocks: Blocks
    ends: Mapping[Site, LayerState]
    starts: Mapping[Site, Tensor]
    moved: Sequence[Site]

    @property
    def chain(self) -> Sequence[Site]:
        return self.moved

    def __post_init__(self) -> None:
        self.halving = Halving(self.plan.rows)
        self.seen: dict[float, float] = {}  # path point -> sequence score there
        self.replayed, self.at_ends = self._scored_ends()
        # Each layer draws its noise as if it were alone.
        self.noise = {s: torch.Generator().manual_seed(self.rule.seed) for s in self.moved}
        self.leap = self._leap() if self.rule.is_integral else 0.0
        self.groups = self._groups() if self._may_go_forward() else []
        self.checked = False  # whether forward mode was found to agree with backward

    def walk(self, totals: Mapping[Site, LayerTotal]) -> None:
        """Add the attributions at the rule's points to the totals."""
        chunks = math.ceil(len(self.rule.points) / self.plan.rows)
        points = torch.tensor(self.rule.points).tensor_split(chunks)
        weights = torch.tensor(self.rule.weights).tensor_split(chunks)
        for alphas, shares in zip(points, weights, strict=True):
            self.add_rows(alphas, shares, [totals])
        self.count(totals, len(self.rule.points))

    def count(self, totals: Mapping[Site, LayerTotal], n_points: int) -> None:
        """Note how many points of the path had their gradient taken."""
        for site in self.chain:
            facts = totals[site].facts
            facts.n_evaluations = max(facts.n_evaluations, n_points)

    def add_intervals(
        self,
        points: Tensor,
        shares: Tensor,
        ends: Sequence[tuple[float, float]],
        totals: Sequence[Mapping[Site, LayerTotal]],
    ) -> None:
        """Add gradients at `points` with weights `shares`, as many to each interval's totals."""
        self.add_rows(points, shares, totals)

    def add_rows(
        self, alphas: Tensor, shares: Tensor, totals: Sequence[Mapping[Site, LayerTotal]]
    ) -> None:
        """Add gradients at `alphas` with weights `shares`, as many rows to each of the totals."""
        values, factors = {}, {}
        for site in self.chain:
            values[site], difference = self._values(site, alphas)
            share = _over_rows(shares, difference)
            factors[site] = share * difference if self.rule.multiply else share
        per_total = len(alphas) // len(totals)

        def add(rows: slice) -> None:
            own = slice(rows.start // per_total, -(-rows.stop // per_total))
            starts = range(own.start * per_total, own.stop * per_total, per_total)
            counts = [min(rows.stop, s + per_total) - max(rows.start, s) for s in starts]
            parts = alphas[rows], _part(values, rows), _part(factors, rows)
            self._add_whole(*parts, list(zip(totals[own], counts, strict=True)))

        self.halving(add, len(alphas))
        self.plan.advance(len(alphas))

    def _add_whole(
        self,
        alphas: Tensor,
        values: Mapping[Site, Tensor],
        factors: Mapping[Site, Tensor],
        totals: Shared,
    ) -> None:
        """Add all of the rows' attributions or, where memory runs out on the way, none."""
        fresh = [
            ({site: total[site].empty() for site in self.chain}, rows) for total, rows in totals
        ]
        if not self._add_forward(alphas, values, factors, fresh):
            self._add_backward(alphas, values, factors, fresh)
        for (total, _), (new, _) in zip(totals, fresh, strict=True):
            for site in self.chain:
                total[site].add_total(new[site])

    def _add_backward(
        self,
        alphas: Tensor,
        values: Mapping[Site, Tensor],
        factors: Mapping[Site, Tensor],
        totals: Shared,
    ) -> None:
        """One backward pass per target token."""
        with writing(values), reading(self.chain) as read:
            scored = self._run(len(alphas), self.replayed, self.chain)
        self.note(alphas, scored.sequence_score())
        wrt = [read[site] for site in self.chain]
        for output, gradients in scored.gradients(
            wrt, self.plan.per_token, **self.plan.grad_kwargs
        ):
            for site, gradient in zip(self.chain, gradients, strict=True):
                products = factors[site] * gradient.float()
                for total, part in _shares(totals, products):
                    total[site].add(output, part.sum(0))

    def _add_forward(
        self,
        alphas: Tensor,
        values: Mapping[Site, Tensor],
        factors: Mapping[Site, Tensor],
        totals: Shared,
    ) -> bool:
        """One pass with tangents per feature, whose attribution goes to its first position.

        False, and nothing is added, where that is not wanted or the model cannot do it.
        """
        if not self.groups:
            return False
        site = self.chain[0]

        def run(dual: Tensor) -> Pass:
            with writing({site: dual}):
                return self._run(len(dual), self.replayed)

        try:
            found = [derivatives(run, values[site], factors[site], g) for g in self.groups]
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error):
                raise
            return self._go_backward(error)
        if not self.checked and not self._agrees(values, factors, found):
            return self._go_backward("its derivatives are not those of a backward pass")
        self.checked = True
        for group, (tokens, sequence, scores) in zip(self.groups, found, strict=True):
            self.note(alphas, scores)
            for total, token_part, part in _shares(totals, tokens, sequence):
                total[site].add_at(group[0], self.span.start, token_part.sum(0), part.sum(0))
        return True

    def _go_backward(self, reason: object) -> bool:
        if self.plan.forward_mode:
            raise ValueError(f"this model cannot do forward_mode=True: {reason}")
        logger.info("no forward mode in this model (%s): going backward", reason)
        self.groups = []
        return False

    def _agrees(
        self,
        values: Mapping[Site, Tensor],
        factors: Mapping[Site, Tensor],
        found: Sequence[tuple[Tensor, ...]],
    ) -> bool:
        """Whether the first row's derivatives add up to those of a backward pass: some operations
        lose tangents without a word."""
        site = self.chain[0]
        with writing(_part(values, slice(0, 1))), reading(self.chain) as read:
            scored = self._run(1, self.replayed, self.chain)
        _, (gradient,) = next(scored.gradients([read[site]], per_token=False))
        products = factors[site][:1] * gradient.float()
        products = products.reshape(*products.shape[:2], -1).sum(-1)
        forward = sum(float(sequence[0]) for _, sequence, _ in found)
        allowed = 10 * tolerance(scored.precision) * float(products.abs().sum())
        return abs(forward - float(products.sum())) <= allowed

    def _may_go_forward(self) -> bool:
        """Whether the attributions are sums of hidden units, of one layer, for each token."""
        if self.plan.forward_mode is False or self.plan.column_at is None:
            return False
        if self.rule.is_conductance:
            return False
        plain = self.rule.norm == "sum" and not self.plan.keep_hidden
        return plain and self.plan.per_token and len(self.chain) == 1

    def _groups(self) -> list[Tensor]:
        """The positions of each feature, if forward mode is wanted."""
        site, column_at = self.chain[0], self.plan.column_at
        if column_at is None:
            return []
        difference = self.ends[site].tensor - self.starts[site]
        moved = (difference[0] != 0).flatten(1).any(1).to(column_at.device)
        if not self.rule.multiply or self.rule.stdev:
            moved = torch.ones_like(moved)
        first = self.ends[site].first
        groups = position_groups(column_at[first : first + len(moved)], moved)
        wanted = self.plan.forward_mode or is_cheaper(len(groups), len(self.span))
        return groups if wanted else []

    @torch.no_grad()
    def scores(self, alphas: Tensor) -> Tensor:
        """Scores (rows, n_checks) at the points: of the span's tokens and the sequence of them, or
        of that alone."""
        values = {site: self._values(site, alphas)[0] for site in self.moved}

        def score(rows: slice) -> Tensor:
            with writing(_part(values, rows)):
                scored = self._run(rows.stop - rows.start, self.replayed)
            self.note(alphas[rows], scored.sequence_score())
            return self.asked_scores(scored)

        return torch.cat(self.halving(score, len(alphas)))

    def sums(self, totals: Mapping[Site, LayerTotal]) -> Tensor:
        """What ought to be the score differences, (layers or 1, n_checks)."""
        return torch.stack([self.summed(totals[site]) for site in self.chain]).sum(0, keepdim=True)

    def summed(self, total: LayerTotal) -> Tensor:
        return total.sums(slice(self.span.start, self.span.stop))

    def asked_scores(self, scored: Pass) -> Tensor:
        sequence = scored.sequence_score()[:, None]
        return torch.cat([scored.token_scores(), sequence], 1) if self.plan.per_token else sequence

    @property
    def scale(self) -> Tensor:
        """(n_checks,) what a mismatch is relative to: the difference of the sequence score; of a
        token's probability the probability."""
        floor = difference_floor(self.at_ends, self.forcing.target.is_additive)
        sequence = (self.at_ends[1] - self.at_ends[0]).abs().clamp(min=floor)[-1:]
        if self.forcing.target.is_additive:
            return sequence.expand_as(floor)
        return torch.cat([self.at_ends.abs().amax(0)[:-1], sequence])

    def _values(self, site: Site, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's values (rows, …) at the points, and their difference (rows or 1, …)."""
        start = self.starts[site].float()
        difference = self.ends[site].tensor.float() - start
        if self.rule.stdev:
            shape = (len(alphas), *difference.shape[1:])
            noise = torch.randn(shape, generator=self.noise[site]).to(difference)
            difference = difference + self.rule.stdev * noise
        return start + _over_rows(alphas, difference) * difference, difference

    def _run(self, rows: int, replayed: int, chain: Sequence[Site] = ()) -> Pass:
        ids = self.forcing.fed(self.forcing.ids, self.span).expand(rows, -1)
        state = self.blocks.outputs[replayed - 1] if replayed else None
        with replaying(self.blocks.modules[:replayed], state, rows):
            return self.forcing.run(ids, self.span, chain)

    @torch.no_grad()
    def _scored_ends(self) -> tuple[int, Tensor]:
        """How many blocks can be replayed, and the scores (2, n_checks) at the start and end.

        Replay is right where the path's end has the model's own scores, and else left out: some
        models pass more from block to block than a block's output.
        """
        ends = {s: torch.cat([self.starts[s], self.ends[s].tensor]) for s in self.moved}
        replayed = min(self.ends[site].blocks_before for site in self.moved)
        with writing(ends):
            scored = self._run(2, replayed)
            if replayed and not self._is_models_own(scored):
                logger.info("blocks cannot be replayed in this model: running all of them")
                replayed, scored = 0, self._run(2, 0)
        self.precision = scored.precision
        self.note(torch.tensor([0.0, 1.0]), scored.sequence_score())
        return replayed, self.asked_scores(scored)

    def note(self, alphas: Tensor, scores: Tensor) -> None:
        """Keep the sequence scores (rows,) at the points, for the picture of the path."""
        self.seen.update(zip(alphas.tolist(), scores.detach().tolist(), strict=True))

    def _leap(self) -> float:
        """The share of the score difference that falls next to the start, or 0."""
        (start, end), near = self.at_ends[:, -1].tolist(), self.scores(torch.tensor([NEAR_START]))
        leap, largest = abs(float(near[0, -1]) - start), max(abs(start), abs(end))
        floor = largest if self.forcing.target.attr_target == "prob" else max(1.0, largest)
        noise = tolerance(self.precision) * floor
        share = leap / max(abs(end - start), noise, torch.finfo(torch.float32).tiny)
        return share if leap > noise and share > LEAP else 0.0

    def _is_models_own(self, scored: Pass) -> bool:
        scores = scored.token_scores()[1]
        relative = 1e-3 if scored.precision in (torch.float32, torch.float64) else 5e-2
        allowed = relative * self.blocks.scores.abs().clamp(min=1)
        return bool(((scores - self.blocks.scores).abs() <= allowed).all())

    def add_facts(self, facts: PathFacts) -> None:
        """Add what is known of the path, of a layer on it."""
        facts.add_ends(self.at_ends, self.span.start, self.span.stop)
        facts.add_scores(self.seen)
        facts.leap = max(facts.leap, self.leap)


def _shares(totals: Shared, *values: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each total with its rows of the values."""
    counts = [rows for _, rows in totals]
    owners = [total for total, _ in totals]
    return zip(owners, *(value.split(counts) for value in values), strict=True)


def _part(values: Mapping[Site, Tensor], rows: slice) -> dict[Site, Tensor]:
    return {site: value[rows] for site, value in values.items()}


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))
