"""Scores of one target after many prompts: in batches, with the common prefix computed once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from captum_llm_ext.model.adapter import Adapter, layout_of
from captum_llm_ext.model.layers import output_head
from captum_llm_ext.model.memory import Halving, free_bytes
from captum_llm_ext.model.prefix_cache import PrefixCache, can_be_cropped
from captum_llm_ext.model.quantized import quantization_of
from captum_llm_ext.scoring.context import check_context
from captum_llm_ext.scoring.preparation import FEWEST_REUSED, Prepared
from captum_llm_ext.scoring.target_scores import Target
from captum_llm_ext.scoring.teacher_forcing import (
    PASS_OVERHEAD,
    Pass,
    TeacherForcing,
    read_logits,
    tokens_per_pass,
    tolerance,
)

logger = logging.getLogger(__name__)

MOST_ROWS = 256  # per pass, however short the prompts are

Prompt: TypeAlias = tuple[int, ...]  # token ids


@dataclass
class PromptScorer:
    """Scores of a target after prompts that resemble a reference prompt, each scored once.

    prepared: the reference prompt with the target, probed, with the cache if prefixes are to be
    reused; rows: prompts per pass, or None for as many as the device works on well.
    """

    prepared: Prepared
    rows: int | None = None
    show_progress: bool = False
    _scores: dict[Prompt, Tensor] = field(default_factory=dict, init=False)
    _halving: Halving = field(default_factory=Halving, init=False)

    @property
    def forcing(self) -> TeacherForcing:
        return self.prepared.forcing

    @property
    def probe(self) -> Pass:
        assert self.prepared.probe is not None
        return self.prepared.probe

    @property
    def model(self) -> nn.Module:
        return self.forcing.model

    @property
    def target(self) -> Target:
        return self.forcing.target

    @property
    def n_evaluations(self) -> int:
        return len(self._scores)

    @property
    def reference(self) -> Tensor:
        return self.forcing.prompt_ids[0]

    def scores(self, prompts: Sequence[Prompt]) -> Tensor:
        """(n_prompts, 2, 1 + n_output): the scores of the request, and the log probabilities; of
        the sequence first, then of each target token."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._scores]
        if new:
            layout, device = layout_of(self.model), self.reference.device
            rows = [layout.prompt(torch.tensor(prompt, device=device)) for prompt in new]
            longest = max(rows, key=len)
            if len(longest) > len(self.reference):
                check_context(
                    replace(self.forcing, prompt_ids=longest[None]),
                    partial(self._alone, longest, lambda n: None),
                )
            with tqdm(total=len(new), disable=not self.show_progress, desc="prompts") as bar:
                self._scores.update(zip(new, self._score(rows, bar.update), strict=True))
        return torch.stack([self._scores[prompt] for prompt in prompts])

    def _score(self, prompts: list[Tensor], advance: Callable[[int], Any]) -> Tensor:
        """(n_prompts, 2, 1 + n_output).

        The reference goes along in the batches. Where it gets another score there than by
        itself, the model does not batch or reuse its cache rightly, and a plainer way is taken.
        """
        together, reference = _with_reference(prompts, self.reference)
        for score in self._ways():
            scores = score(together, advance)
            if self._agrees(scores[reference, 1]):
                return scores[: len(prompts)]
            logger.warning("the model's batches or cache change its scores: taking a slower way")
        return torch.stack([self._alone(prompt, advance) for prompt in prompts])

    def _ways(self) -> Iterator[Callable[..., Tensor]]:
        if (
            not self.prepared.causal
            or not self._takes_rows()
            or quantization_of(self.model).rounds_inputs
        ):
            return
        if can_be_cropped(self.probe.cache):
            length = self.forcing.row.length
            cache = PrefixCache(self.forcing.call, self.reference, self.probe.cache, length)
            yield partial(self._in_batches, cache=cache)
        yield self._in_batches

    def _takes_rows(self) -> bool:
        """Whether the model takes several rows; one that is not of transformers is tried."""
        if isinstance(self.model, PreTrainedModel | Adapter):
            return True
        return self.forcing.answer("rows", self._took_two_rows)

    def _took_two_rows(self) -> bool:
        try:
            self.model(self.reference[None, :2].repeat(2, 1))
        except Exception as error:  # whatever a model does with rows that it cannot take
            logger.warning("the model takes one row at a time: %s", error)
            return False
        return True

    def _agrees(self, log_probs: Tensor) -> bool:
        expected = read_scores(self.probe)[0, 1]
        allowed = tolerance(self.probe.precision) * expected.abs().max().clamp(min=1)
        return bool((log_probs - expected).abs().max() <= allowed)

    def _alone(self, prompt: Tensor, advance: Callable[[int], Any]) -> Tensor:
        """(2, 1 + n_output) after one prompt, in one pass, or token by token."""
        advance(1)
        if isinstance(self.model, Adapter):
            return self._batch([prompt], 0, None, slice(0, 1))[0]
        forcing = replace(self.forcing, prompt_ids=prompt[None])
        spans = forcing.spans(False, 1, self.prepared.causal)
        logits = torch.cat([forcing.run(forcing.fed(s), s).logits for s in spans], dim=1)
        return read_scores(replace(self.probe, logits=logits))[0]

    def _in_batches(
        self,
        prompts: Sequence[Tensor],
        advance: Callable[[int], Any],
        cache: PrefixCache | None = None,
    ) -> Tensor:
        shared = [_shared(p, self.reference) if cache else 0 for p in prompts]
        lengths = [len(prompt) for prompt in prompts]
        limit = tokens_per_pass(self.reference.device)
        scores: dict[int, Tensor] = {}
        most = self._most_rows()
        for batch in batches(lengths, shared, len(self.target), limit, self.rows, most):
            n_cached = min(shared[i] for i in batch)
            n_cached = n_cached if n_cached >= FEWEST_REUSED else 0
            score = partial(self._batch, [prompts[i] for i in batch], n_cached, cache)
            rows = torch.cat(self._halving(score, len(batch)))
            scores.update(zip(batch, rows, strict=True))
            advance(len(batch))
        return torch.stack([scores[i] for i in range(len(prompts))])

    def _most_rows(self) -> int:
        """Rows whose scores fit into free memory: logits, their float32, and as much again."""
        free = free_bytes(self.probe.logits.device)
        row = 16 * len(self.target) * self.probe.logits.size(-1)
        return MOST_ROWS if free is None else max(1, min(MOST_ROWS, free // 2 // row))

    def _batch(
        self, batch: list[Tensor], n_cached: int, cache: PrefixCache | None, part: slice
    ) -> Tensor:
        """(rows, 2, 1 + n_output) after a part of the prompts."""
        if isinstance(self.model, Adapter):
            logits = self.model.logits_after(batch[part], self.target.fed)
        else:
            logits = self._continued(batch[part], n_cached, cache)
        return read_scores(Pass(self.target, self.forcing.whole, logits))

    def _continued(self, prompts: list[Tensor], n_cached: int, cache: PrefixCache | None) -> Tensor:
        """Logits (rows, n_output, vocabulary), the prompts padded on the right, where no token
        looks."""
        rows = [torch.cat([prompt[n_cached:], self.target.fed]) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True)
        last = torch.tensor([len(p) - n_cached - 1 for p in prompts], device=ids.device)
        positions = last[:, None] + torch.arange(len(self.target), device=ids.device)
        options: dict[str, Any] = {"use_cache": False}
        if n_cached and cache is not None:
            options = {"use_cache": True, "past_key_values": cache.at(n_cached, len(prompts))}
        with _head_reads_only(self.model, positions):
            logits = read_logits(self.forcing.call(ids, **options))
        return logits if logits.size(1) == positions.size(1) else _take(logits, positions)


def read_scores(scored: Pass) -> Tensor:
    """(rows, 2, 1 + n_output): the target's scores and log probabilities, the sequence first."""
    kinds = (scored, replace(scored, target=scored.target.as_log_prob()))
    parts = [torch.cat([p.sequence_score()[:, None], p.token_scores()], dim=1) for p in kinds]
    return torch.stack(parts, dim=1)


def batches(
    lengths: Sequence[int],
    shared: Sequence[int],
    n_output: int,
    limit: int,
    rows: int | None,
    most: int = MOST_ROWS,
) -> list[list[int]]:
    """Divide prompts among passes at the least cost in tokens.

    lengths: tokens of each prompt; shared: how many of them come from the cache; limit: tokens
    per pass; rows: prompts per pass, instead of the limit; most: prompts per pass at all. A pass
    takes from the cache what all its prompts share, and fills all up to its longest. By dynamic
    programming over the prompts in the order of what they share.
    """
    order = sorted(range(len(lengths)), key=lambda i: (shared[i], lengths[i]))
    best, first = [0.0], [0]
    for end in range(1, len(order) + 1):
        options, longest = [], 0
        for start in range(end - 1, -1, -1):
            longest, count = max(longest, lengths[order[start]]), end - start
            width = longest - shared[order[start]] + n_output - 1
            too_large = count > rows if rows else count * width > limit
            if count > 1 and (too_large or count > most):
                break
            options.append((best[start] + count * width + PASS_OVERHEAD, start))
        cost, start = min(options)
        best.append(cost)
        first.append(start)
    # The last batch of the prompts before `end` begins at first[end].
    parts, end = [], len(order)
    while end:
        parts.append(order[first[end] : end])
        end = first[end]
    return parts[::-1]


@contextmanager
def _head_reads_only(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Compute logits at `positions` (rows, n) only: over a vocabulary they are dear."""
    head = output_head(model)
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (_take(args[0], positions), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """values (rows, length, …) at positions (rows, n)."""
    index = positions.to(values.device)[..., None].expand(-1, -1, values.size(-1))
    return values.gather(1, index)


def _with_reference(prompts: Sequence[Tensor], reference: Tensor) -> tuple[list[Tensor], int]:
    """The prompts and where the reference is among them: at the end where it was not."""
    for i, prompt in enumerate(prompts):
        if torch.equal(prompt, reference):
            return list(prompts), i
    return [*prompts, reference], len(prompts)


def _shared(prompt: Tensor, reference: Tensor) -> int:
    """How many tokens a prompt shares with the reference, short of its last one."""
    length = min(len(prompt) - 1, len(reference))
    same = prompt[:length] == reference[:length]
    return int(same.long().cumprod(0).sum())
