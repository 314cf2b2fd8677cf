"""One teacher-forced pass: prompt and target through the model together, scores out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

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

    def logits(self, ids: Tensor, span: TargetSpan) -> Tensor:
        """Logits (rows, len(span), vocabulary) at the positions that predict the span's tokens."""
        options = _forward_options(self.model, len(span))
        output = self.model(ids[:, : self.length(span)], **options)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"expected {type(self.model).__name__} to return an object with .logits, "
                f"got {type(output).__name__}"
            )
        if logits.dim() == 4:  # Llama4: (rows, 1, sequence, vocabulary)
            logits = logits[:, 0]
        return logits[:, -len(span) :]

    def token_scores(self, logits: Tensor, span: TargetSpan) -> Tensor:
        """Scores (rows, len(span)) of the span's tokens."""
        return self.target.token_scores(logits, span.start, span.stop)

    def outputs(
        self, logits: Tensor, span: TargetSpan, per_token: bool
    ) -> Iterator[tuple[int | None, Tensor]]:
        """(target index, score summed over rows) to differentiate; index None is the sequence."""
        if per_token:
            scores = self.token_scores(logits, span).sum(0)
            yield from ((span.start + i, score) for i, score in enumerate(scores))
        if not (per_token and self.target.is_additive):
            yield None, self.target.sequence_score(logits, span.start, span.stop).sum()

    @torch.no_grad()
    def is_causal(self) -> bool:
        """Whether a later target token leaves all earlier scores alone, found by changing one."""
        if len(self.target) == 1:
            return True
        span = TargetSpan(0, len(self.target))
        logits = self.logits(_with_last_id_changed(self.ids, self.model), span)
        scores = replace(self.target, attr_target="log_prob").token_scores(logits, 0, span.stop)
        difference = (scores[0] - scores[1])[:-1].abs().max()
        return bool(difference <= _tolerance(logits.dtype) * scores.abs().max().clamp(min=1))

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


def _even_spans(n_output: int, count: int) -> list[TargetSpan]:
    edges = [round(n_output * i / count) for i in range(count + 1)]
    return [TargetSpan(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def _forward_options(model: nn.Module, n_scores: int) -> dict[str, Any]:
    """What the model's forward understands of: no cache, and logits at the last positions only."""
    wanted = {"use_cache": False, "logits_to_keep": n_scores}
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in accepted}


def _with_last_id_changed(ids: Tensor, model: nn.Module) -> Tensor:
    """Two rows: the ids, and the ids with another last token."""
    both = ids.repeat(2, 1)
    both[1, -1] = torch.where(both[1, -1] > 0, both[1, -1] - 1, both[1, -1] + 1)
    return both


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
