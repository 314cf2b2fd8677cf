"""Scores of one target after many prompts: in batches, with the common prefix computed once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from captum_llm_ext.hooks import HeadInput, output_head
from captum_llm_ext.model_pass import Pass, TargetSpan, TeacherForcing, tolerance
from captum_llm_ext.targets import Target

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 512
FEWEST_REUSED = 8  # a shorter prefix costs more to keep than to compute again


@dataclass
class PromptScorer:
    """Scores of a target after many prompts that resemble a reference prompt.

    model: a causal model, or one that is scored token by token; reference: (n_prompt,) ids;
    target: what is scored; causal: whether one pass scores all target tokens; rows: prompts per
    pass, or None for as many as the device works on well; reuse_prefix: take what a prompt shares
    with the reference from the key/value cache; advance: told how many prompts were scored.
    """

    model: nn.Module
    reference: Tensor
    target: Target
    causal: bool = True
    rows: int | None = None
    reuse_prefix: bool = True
    advance: Callable[[int], Any] = lambda prompts: None
    _cache: Any = field(default=None, init=False)
    _cached: int = field(default=0, init=False)
    _tolerance: float = field(default=0.0, init=False)

    def scores(self, prompts: Sequence[Tensor]) -> Tensor:
        """(n_prompts, 2, 1 + n_output): the scores asked for, and the log probabilities; of the
        sequence first, then of each target token.

        The reference is scored by itself first. Where a batch gives it another score, the model
        does not batch (or reuse its cache) rightly and the prompts are scored in a plainer way.
        """
        truth = self._alone(self.reference)
        for score in self._ways():
            found = score([*prompts, self.reference])
            if self._agree(found[-1, 1], truth[1]):
                return found[:-1]
            logger.warning("the model's batches or cache change its scores: taking a slower way")
        return torch.stack([self._alone(prompt) for prompt in prompts])

    def _ways(self) -> Iterator[Callable[[Sequence[Tensor]], Tensor]]:
        if not self.causal:
            return
        if self.reuse_prefix and _keeps_cache(self.model):
            yield partial(self._in_batches, reuse=True)
        yield partial(self._in_batches, reuse=False)

    def _alone(self, prompt: Tensor) -> Tensor:
        """(2, 1 + n_output) after one prompt, in one pass, or token by token."""
        forcing = TeacherForcing(self.model, prompt[None], self.target)
        passes = [forcing.run(forcing.ids, s) for s in forcing.spans(False, 1, self.causal)]
        logits = torch.cat([p.logits for p in passes], dim=1)
        self._tolerance = 10 * tolerance(logits.dtype)
        return _read(replace(passes[0], span=self._span, logits=logits))[0]

    def _agree(self, found: Tensor, truth: Tensor) -> bool:
        difference = (found - truth).abs().max()
        return bool(difference <= self._tolerance * truth.abs().max().clamp(min=1))

    @property
    def _span(self) -> TargetSpan:
        return TargetSpan(0, len(self.target))

    def _in_batches(self, prompts: Sequence[Tensor], reuse: bool) -> Tensor:
        shared = [_shared(prompt, self.reference) if reuse else 0 for prompt in prompts]
        scores: dict[int, Tensor] = {}
        self._cache, self._cached = None, 0
        for batch in self._batches(prompts, shared):
            cut = min(shared[i] for i in batch)
            cut = cut if cut >= FEWEST_REUSED else 0
            found = self._halving([prompts[i] for i in batch], cut)
            scores.update(zip(batch, found, strict=True))
            self.advance(len(batch))
        self._cache = None
        return torch.stack([scores[i] for i in range(len(prompts))])

    def _batches(self, prompts: Sequence[Tensor], shared: Sequence[int]) -> Iterator[list[int]]:
        """Prompts by shared prefix, shortest first, as many at once as suit a pass."""
        order = sorted(range(len(prompts)), key=lambda i: (shared[i], len(prompts[i])))
        batch: list[int] = []
        for i in order:
            if batch and not self._fits([*batch, i], prompts, shared):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _fits(self, batch: list[int], prompts: Sequence[Tensor], shared: Sequence[int]) -> bool:
        if self.rows is not None:
            return len(batch) <= self.rows
        length = max(len(prompts[i]) for i in batch) - min(shared[i] for i in batch)
        return len(batch) * (length + len(self.target)) <= TOKENS_PER_PASS

    def _halving(self, prompts: list[Tensor], cut: int) -> Tensor:
        """The batch's scores; by halves when it does not fit into memory."""
        try:
            return self._batch(prompts, cut)
        except RuntimeError as error:
            if len(prompts) == 1 or not _is_out_of_memory(error):
                raise
        logger.info("out of memory with %d prompts in a pass: halving them", len(prompts))
        half = len(prompts) // 2
        return torch.cat([self._halving(prompts[:half], cut), self._halving(prompts[half:], cut)])

    def _batch(self, prompts: list[Tensor], cut: int) -> Tensor:
        """(rows, 2, 1 + n_output), the prompts padded on the right, where no token looks."""
        continued = self.target.ids[:-1]
        ids = pad_sequence([torch.cat([p[cut:], continued]) for p in prompts], batch_first=True)
        last = torch.tensor([len(p) - cut - 1 for p in prompts], device=ids.device)
        places = last[:, None] + torch.arange(len(self.target), device=ids.device)
        options = self._cache_options(cut, len(prompts))
        with _head_reads_only(self.model, places):
            logits = self.model(ids, **options).logits
        if logits.size(1) != places.size(1):
            logits = _take(logits, places)
        return _read(Pass(self.target, self._span, logits, HeadInput()))

    def _cache_options(self, cut: int, rows: int) -> dict[str, Any]:
        if not cut:
            return {"use_cache": False} if _accepts(self.model, "use_cache") else {}
        if self._cached < cut:  # go on from the shorter prefix: sliding caches cannot be cut back
            ids = self.reference[None, self._cached : cut]
            options = {"past_key_values": self._cache, "use_cache": True}
            self._cache = self.model(ids, **options).past_key_values
            self._cached = cut
        cache = deepcopy(self._cache)  # a forward appends to its cache
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return {"past_key_values": cache, "use_cache": True}


def _read(scored: Pass) -> Tensor:
    """(rows, 2, 1 + n_output): the scores asked for and the log probabilities, sequence first."""
    log_p = replace(scored, target=scored.target.as_log_prob())
    return torch.stack(
        [
            torch.cat([p.sequence_score()[:, None], p.token_scores()], dim=1)
            for p in (scored, log_p)
        ],
        dim=1,
    )


@contextmanager
def _head_reads_only(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Compute logits at `places` (rows, n) only: over a vocabulary they are dear."""
    head = output_head(model)
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (_take(args[0], places), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _take(values: Tensor, places: Tensor) -> Tensor:
    """values (rows, length, …) at places (rows, n)."""
    index = places.to(values.device)[..., None].expand(-1, -1, values.size(-1))
    return values.gather(1, index)


def _shared(prompt: Tensor, reference: Tensor) -> int:
    """How many tokens a prompt shares with the reference, short of its last one."""
    length = min(len(prompt) - 1, len(reference))
    same = prompt[:length] == reference[:length]
    return int(same.long().cumprod(0).sum())


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _keeps_cache(model: nn.Module) -> bool:
    return _accepts(model, "past_key_values") and _accepts(model, "use_cache")


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
