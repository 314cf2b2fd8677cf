"""What is asked for, and the attributions of a layer as they add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.gradients.methods import NORMS, PathRule, Rule
from captum_llm_ext.gradients.path_facts import PathFacts
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing

SUMS = ("tokens", "sequence", "hidden")


@dataclass(frozen=True)
class Plan:
    """What is asked for besides the method: the caller's options, read once."""

    per_token: bool = True
    joint: bool = False
    keep_hidden: bool = False
    rows: int = 1
    causal: bool = True
    column_at: Tensor | None = None  # (length,) the feature of each position, -1 for none
    forward_mode: bool | None = False  # None: where it is cheaper
    grad_kwargs: Mapping[str, Any] = field(default_factory=dict)
    advance: Callable[[int], Any] = lambda rows: None  # told how many rows were differentiated


class LayerTotal:
    """A layer's attributions, summed over rows and passes.

    cut: how many first positions are left out, being no features or none of the layer's; tokens:
    (n_output, length) per target token, combined over hidden units; sequence: (length, hidden) of
    the sequence score, or (length, 1) where only the sum over hidden units is needed; hidden:
    (n_output, length, hidden) or None; facts: what is known of the layer's path.
    """

    def __init__(
        self,
        forcing: TeacherForcing,
        rule: Rule,
        plan: Plan,
        value: Tensor,
        depends: bool,
        first: int = 0,
    ) -> None:
        self.depends = depends
        self.cut = forcing.cut + first
        n_output, length = len(forcing.target), forcing.ids.size(1) - self.cut
        device = forcing.ids.device
        norm = self.norm = rule.norm
        width = value[0, 0].numel() if value.dim() > 1 else 1
        self.keeps_hidden = plan.keep_hidden or norm != "sum"
        self.per_token = plan.per_token
        self.is_integral = isinstance(rule, PathRule) and rule.is_integral
        self.tokens = torch.zeros(n_output, length, device=device)
        self.sequence = torch.zeros(length, width if self.keeps_hidden else 1, device=device)
        keep = plan.keep_hidden and plan.per_token
        self.hidden = torch.zeros(n_output, length, width, device=device) if keep else None
        n_checks = n_output + 1 if plan.per_token else 1
        self.facts = PathFacts(torch.zeros(2, n_checks, device=device), forcing.target.is_additive)

    @classmethod
    def mean(cls, totals: Sequence[LayerTotal]) -> LayerTotal:
        """The mean over trials."""
        mean = copy(totals[0])
        for name in SUMS:
            if getattr(mean, name) is not None:
                setattr(mean, name, torch.stack([getattr(t, name) for t in totals]).mean(0))
        mean.facts = PathFacts.of_runs([total.facts for total in totals])
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

    def sums(self, targets: slice = slice(None)) -> Tensor:
        """What ought to be score differences: of `targets` and the sequence, or of it alone."""
        sequence = self.sequence.sum()[None]
        return torch.cat([self.tokens[targets].sum(1), sequence]) if self.per_token else sequence

    @property
    def score_difference(self) -> Tensor | None:
        """(n_output,) between the ends of the path, or (1,) of the sequence, or None."""
        if not self.is_integral:
            return None
        return self.facts.difference[: len(self.tokens) if self.per_token else 1]

    @property
    def is_cut_off(self) -> bool:
        """Whether nothing arrived although the layer sees the tokens and its path has a length."""
        difference = self.score_difference
        expected = self.depends and (difference is None or bool(difference.any()))
        return expected and not (self.tokens.any() or self.sequence.any())

    def add_at(self, position: Tensor, start: int, tokens: Tensor, sequence: Tensor) -> None:
        """Add what a feature has for target tokens from `start` on, and for the sequence."""
        stop = start + len(tokens)
        self.tokens[start:stop, position] += tokens.to(self.tokens)
        self.sequence[position, 0] += sequence.to(self.sequence)

    def add(self, output: int | None, part: Tensor) -> None:
        """Add (positions, …) of target token `output`, or of the sequence where that is None."""
        end = part.size(0)
        part = part.reshape(end, -1).to(self.tokens.device, torch.float32)
        part = part if self.keeps_hidden else part.sum(-1, keepdim=True)
        if output is None or self.facts.is_additive:
            self.sequence[:end] += part
        if output is None:
            return
        self.tokens[output, :end] += NORMS[self.norm](part)
        if self.hidden is not None:
            self.hidden[output, :end] += part


def judge(totals: Sequence[LayerTotal], together: bool) -> None:
    """Compare sums with score differences: of each layer, or of all that moved together."""
    if not all(total.is_integral for total in totals):
        return
    for group in [totals] if together else [[total] for total in totals]:
        sums = torch.stack([total.sums() for total in group]).sum(0)
        for total in group:
            total.facts.judge(sums)
