"""The attributions of a layer as they add up, and the record of its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.gradients.method import DIFFERENCE, NORMS, GradientMethod
from captum_llm_ext.scoring.positions import Positions

SUMS = ("tokens", "sequence", "hidden")
LEAST_DIFFERENCE = 1e-3  # a smaller score difference counts as this one


@dataclass(frozen=True)
class Plan:
    """The caller's options besides the method, and what follows from the model.

    rows: path points per pass, 0 until it is chosen; forward: whether forward mode may be cheaper;
    advance: told how many rows were differentiated.
    """

    per_token: bool = True
    joint: bool = False
    keep_hidden: bool = False
    rows: int = 0
    causal: bool = True
    forward: bool = False
    grad_kwargs: Mapping[str, Any] = field(default_factory=dict)
    advance: Callable[[int], Any] = lambda rows: None


@dataclass
class PathRecord:
    """The scores, cost and convergence of a path, over all parts of the target together.

    ends: (2, n_checks) the scores at its start and end: of each target token and, last, of the
    sequence, or of the sequence alone; is_additive: whether the sequence's is the others' sum;
    misses: (n_checks,) the relative error of the attributions' sums; n_evaluations: points whose
    gradient was taken, the most for any part; converged: whether adaptive quadrature met its
    tolerance, or None; scores: the sequence score at points of the path; leap: the share of the
    score difference that falls next to the start, where the score leaps there.
    """

    ends: Tensor
    is_additive: bool = True
    misses: Tensor | None = None
    n_evaluations: int = 0
    converged: bool | None = None
    scores: Mapping[float, float] = field(default_factory=dict)
    leap: float = 0.0

    @property
    def difference(self) -> Tensor:
        """(n_checks,) between the ends."""
        return self.ends[1] - self.ends[0]

    def add(self, ends: Tensor, scores: Mapping[float, float], leap: float, span: slice) -> None:
        """Add the path of target tokens `span`: its ends, and scores where all parts have one."""
        if ends.size(1) > 1:
            self.ends[:, span] += ends[:, :-1].to(self.ends)
        self.ends[:, -1] += ends[:, -1].to(self.ends)
        if self.scores:
            scores = {a: self.scores[a] + b for a, b in scores.items() if a in self.scores}
        self.scores = dict(scores)
        self.leap = max(self.leap, leap)

    def judge(self, sums: Tensor) -> None:
        """Compare the sums (n_checks,) of the attributions with the differences."""
        difference = self.difference
        floor = difference_floor(self.ends, self.is_additive)
        self.misses = (sums.to(difference) - difference).abs() / difference.abs().clamp(min=floor)

    @classmethod
    def mean(cls, records: Sequence[PathRecord]) -> PathRecord:
        """The record of several runs whose attributions are averaged; each is judged by itself."""
        misses = [record.misses for record in records if record.misses is not None]
        converged = [record.converged for record in records]
        return cls(
            torch.stack([record.ends for record in records]).mean(0),
            records[0].is_additive,
            torch.stack(misses).amax(0) if misses else None,
            sum(record.n_evaluations for record in records),
            None if None in converged else all(converged),
            records[0].scores if len(records) == 1 else {},
            max(record.leap for record in records),
        )


def difference_floor(ends: Tensor, is_additive: bool) -> Tensor:
    """(n_checks,) the least score difference that counts; for probabilities a share of them."""
    largest = ends.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
    return LEAST_DIFFERENCE * (torch.ones_like(largest) if is_additive else largest)


class LayerTotal:
    """A layer's attributions at its positions, summed over rows and passes.

    tokens: (n_output, n_positions) per target token, combined over hidden units; sequence:
    (n_positions, hidden) of the sequence score, or (n_positions, 1) where only the sum over hidden
    units is needed; hidden: (n_output, n_positions, hidden) or None; record: of the layer's path.
    """

    def __init__(
        self,
        method: GradientMethod,
        plan: Plan,
        positions: Positions,
        value: Tensor,
        depends: bool,
        n_output: int,
        is_additive: bool,
    ) -> None:
        self.positions, self.depends = positions, depends
        self.norm, self.per_token = method.norm, plan.per_token
        self.sums_to_difference = method.sums_to == DIFFERENCE
        self.keeps_hidden = plan.keep_hidden or self.norm != "sum"
        length, device = positions.length, positions.features.prompt_ids.device
        width = value[0, 0].numel() if value.dim() > 1 else 1
        self.tokens = torch.zeros(n_output, length, device=device)
        self.sequence = torch.zeros(length, width if self.keeps_hidden else 1, device=device)
        keep = plan.keep_hidden and plan.per_token
        self.hidden = torch.zeros(n_output, length, width, device=device) if keep else None
        n_checks = n_output + 1 if plan.per_token else 1
        self.record = PathRecord(torch.zeros(2, n_checks, device=device), is_additive)

    @classmethod
    def mean(cls, totals: Sequence[LayerTotal]) -> LayerTotal:
        """The mean over trials."""
        mean = copy(totals[0])
        for name in SUMS:
            if getattr(mean, name) is not None:
                setattr(mean, name, torch.stack([getattr(t, name) for t in totals]).mean(0))
        mean.record = PathRecord.mean([total.record for total in totals])
        return mean

    def empty(self, hidden: bool = True) -> LayerTotal:
        """A total of the same layer with nothing added yet, with or without hidden units."""
        new = copy(self)
        new.hidden = new.hidden if hidden else None
        for name in SUMS:
            if getattr(new, name) is not None:
                setattr(new, name, torch.zeros_like(getattr(new, name)))
        return new

    def add_total(self, other: LayerTotal) -> None:
        """Add the attributions of another total of the same layer."""
        for name in SUMS:
            if getattr(other, name) is not None:
                getattr(self, name).add_(getattr(other, name))

    def add_at(self, position: Tensor, span: slice, tokens: Tensor, sequence: Tensor) -> None:
        """Add the attributions of one position: for target tokens `span`, and for the sequence."""
        self.tokens[span, position] += tokens.to(self.tokens)
        self.sequence[position, 0] += sequence.to(self.sequence)

    def add(self, output: int | None, part: Tensor) -> None:
        """Add (n_positions, …) of target token `output`, or of the sequence where that is None."""
        end = part.size(0)
        part = part.reshape(end, -1).to(self.tokens.device, torch.float32)
        part = part if self.keeps_hidden else part.sum(-1, keepdim=True)
        if output is None or self.record.is_additive:
            self.sequence[:end] += part
        if output is None:
            return
        self.tokens[output, :end] += NORMS[self.norm](part)
        if self.hidden is not None:
            self.hidden[output, :end] += part

    def sums(self, span: slice = slice(None)) -> Tensor:
        """The sums of target tokens `span` and of the sequence, or of that alone."""
        sequence = self.sequence.sum()[None]
        return torch.cat([self.tokens[span].sum(1), sequence]) if self.per_token else sequence

    @property
    def score_difference(self) -> Tensor | None:
        """(n_output,) between the ends of the path, or (1,) of the sequence, or None."""
        if not self.sums_to_difference:
            return None
        return self.record.difference[: len(self.tokens) if self.per_token else 1]

    @property
    def is_cut_off(self) -> bool:
        """Whether nothing arrived although the layer sees the tokens and its path has a length."""
        difference = self.score_difference
        expected = self.depends and (difference is None or bool(difference.any()))
        return expected and not (self.tokens.any() or self.sequence.any())
