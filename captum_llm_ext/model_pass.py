"""One teacher-forced pass: prompt and target through the model together, scores out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.hooks import HeadInput, output_head, split_at_head
from captum_llm_ext.layers import Site
from captum_llm_ext.targets import Target

logger = logging.getLogger(__name__)

# What a pass costs besides its tokens, in tokens: every pass reads all the weights once.
PASS_OVERHEAD = 64


@dataclass(frozen=True)
class TargetSpan:
    """Target tokens start…stop-1, scored by one pass over the prompt and the target before them."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TeacherForcing:
    """A model, the ids of a prompt (1, n_prompt) and a target: all that fixes the scores."""

    model: nn.Module
    prompt_ids: Tensor
    target: Target

    @property
    def n_prompt(self) -> int:
        return self.prompt_ids.size(1)

    @cached_property
    def ids(self) -> Tensor:
        """Prompt and target but for its last token, (1, n_prompt + n_output - 1)."""
        return torch.cat([self.prompt_ids, self.target.ids[None, :-1]], dim=1)

    def length(self, span: TargetSpan) -> int:
        return self.n_prompt + span.stop - 1

    def run(self, ids: Tensor, span: TargetSpan, sites: Sequence[Site] = ()) -> Pass:
        """Run the model on rows of ids; the gradients of `sites` are to be taken, if any."""
        options = _forward_options(self.model, len(span))
        with split_at_head(self.model, keep_graph=_reach_head(self.model, sites)) as head:
            output = self.model(ids[:, : self.length(span)], **options)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"expected {type(self.model).__name__} to return an object with .logits, "
                f"got {type(output).__name__}"
            )
        if logits.dim() == 4:  # Llama4: (rows, 1, sequence, vocabulary)
            logits = logits[:, 0]
        return Pass(self.target, span, logits[:, -len(span) :], head)

    @torch.no_grad()
    def is_causal(self) -> bool:
        """Whether a later target token leaves all earlier scores alone, found by changing one."""
        if len(self.target) == 1:
            return True
        span = TargetSpan(0, len(self.target))
        changed = self.run(_with_last_id_changed(self.ids), span)
        scores = replace(changed, target=self.target.as_log_prob()).token_scores()
        difference = (scores[0] - scores[1])[:-1].abs().max()
        return bool(difference <= tolerance(changed.logits.dtype) * scores.abs().max().clamp(min=1))

    def spans(self, per_token: bool, rows: int, causal: bool) -> list[TargetSpan]:
        """How to divide the target among passes.

        One pass scores all of it. Its backward from an early token still walks over the later
        positions, so with many rows several shorter passes are cheaper. A model that is not
        causal needs one pass per token, as Captum does it.
        """
        n_output = len(self.target)
        if not causal:
            return _even_spans(n_output, n_output)
        if not per_token or not self.target.is_additive:
            return [TargetSpan(0, n_output)]
        counts = range(1, min(n_output, 8) + 1)
        return min((_even_spans(n_output, n) for n in counts), key=lambda s: self._cost(s, rows))

    def _cost(self, spans: list[TargetSpan], rows: int) -> int:
        """Tokens walked over by one forward and len(span) backwards for each span."""
        return sum((self.length(s) * rows + PASS_OVERHEAD) * (1 + len(s)) for s in spans)


@dataclass(frozen=True)
class Pass:
    """What one pass gave: logits (rows, len(span), vocabulary), to score and to differentiate."""

    target: Target
    span: TargetSpan
    logits: Tensor
    head: HeadInput

    def token_scores(self) -> Tensor:
        """Scores (rows, len(span)) of the span's tokens."""
        return self.target.token_scores(self.logits, self.span.start, self.span.stop)

    def sequence_score(self) -> Tensor:
        """Score (rows,) of the span's tokens together."""
        return self.target.sequence_score(self.logits, self.span.start, self.span.stop)

    def gradients(
        self, wrt: Sequence[Tensor], per_token: bool, **options: Any
    ) -> Iterator[tuple[int | None, tuple[Tensor, ...]]]:
        """(target index, gradients of its score summed over rows); index None is the sequence.

        The sequence comes last, and only where it is not the sum of the tokens asked for. The
        gradients are zero where nothing flows.
        """
        outputs = list(self._outputs(per_token))
        options = {**options, "allow_unused": True, "materialize_grads": True}
        for left, (index, output, seed) in zip(reversed(range(len(outputs))), outputs, strict=True):
            yield index, torch.autograd.grad(output, wrt, seed, retain_graph=left > 0, **options)

    def _outputs(self, per_token: bool) -> Iterator[tuple[int | None, Tensor, Tensor | None]]:
        """(target index, what to differentiate, gradient that comes from above)."""
        if per_token:
            yield from self._token_outputs(self.token_scores().sum(0))
        if not (per_token and self.target.is_additive):
            yield (None, *self._below_head(self.sequence_score().sum()))

    def _token_outputs(self, scores: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        output, seed = self._below_head(scores.sum())
        for i, score in enumerate(scores):
            index, place = self.span.start + i, i - len(scores)
            if seed is None:
                yield index, score, None
            else:
                own = torch.zeros_like(seed)
                own[:, place] = seed[:, place]
                yield index, output, own

    def _below_head(self, score: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's input and the score's gradient there, or the score where nothing was cut."""
        if self.head.below is None or self.head.above is None:
            return score, None
        return self.head.below, torch.autograd.grad(score, self.head.above, retain_graph=True)[0]


def _reach_head(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether a site is the output head or part of it."""
    head = output_head(model)
    return head is not None and any(s.module in set(head.modules()) for s in sites)


def _even_spans(n_output: int, count: int) -> list[TargetSpan]:
    edges = [round(n_output * i / count) for i in range(count + 1)]
    return [TargetSpan(start, stop) for start, stop in pairwise(edges)]


def _forward_options(model: nn.Module, n_scores: int) -> dict[str, Any]:
    """What the model's forward understands of: no cache, and logits at the last positions only."""
    wanted = {"use_cache": False, "logits_to_keep": n_scores}
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in accepted}


def _with_last_id_changed(ids: Tensor) -> Tensor:
    """Two rows: the ids, and the ids with another last token."""
    both = ids.repeat(2, 1)
    both[1, -1] = torch.where(both[1, -1] > 0, both[1, -1] - 1, both[1, -1] + 1)
    return both


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference of scores that the dtype alone explains."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
