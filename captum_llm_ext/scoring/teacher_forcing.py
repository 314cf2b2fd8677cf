"""One teacher-forced pass: prompt and target through the model together, scores out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_llm_ext.model.check_cache import CheckCache
from captum_llm_ext.model.hooks import HeadInput, split_at_head
from captum_llm_ext.model.layers import Site
from captum_llm_ext.model.prefix_cache import PrefixCache
from captum_llm_ext.model.quantized import quantization_of
from captum_llm_ext.model.signatures import keywords
from captum_llm_ext.scoring.positions import Row, TargetSpan
from captum_llm_ext.scoring.target_scores import Target

# What a pass costs besides its tokens, in tokens: every pass reads all the weights once.
PASS_OVERHEAD = 40
# Tokens per pass past which a device gains nothing from larger batches.
TOKENS_PER_PASS = {"cpu": 512}
TOKENS_PER_PASS_ELSEWHERE = 2048


@dataclass(frozen=True)
class TeacherForcing:
    """A model, the ids of a prompt (1, n_prompt) and a target: all that the scores depend on.

    prefix: the cache that the first `n_cached` tokens of the prompt come from; dtype: what the
    passes are cast to, None for the model's own; keywords: the options that the model's forward
    takes, None for those that it names; checks: what the model was measured to be.
    """

    model: nn.Module
    prompt_ids: Tensor
    target: Target
    prefix: PrefixCache | None = None
    n_cached: int = 0
    dtype: torch.dtype | None = None
    keywords: frozenset[str] | None = None
    checks: CheckCache = field(default_factory=CheckCache)

    @cached_property
    def row(self) -> Row:
        return Row(self.prompt_ids.size(1), len(self.target.fed), self.n_cached)

    @cached_property
    def ids(self) -> Tensor:
        """The row: prompt and target but for its last token, (1, n_prompt + n_output - 1)."""
        return torch.cat([self.prompt_ids, self.target.fed[None]], dim=1)

    @property
    def whole(self) -> TargetSpan:
        return TargetSpan(0, len(self.target))

    @cached_property
    def precision(self) -> torch.dtype | None:
        """The dtype that products are computed in, where it is not the model's own."""
        return self.dtype or quantization_of(self.model).compute_dtype

    def fed(self, span: TargetSpan) -> Tensor:
        """The ids (1, n_fed) that the model is fed to score the span."""
        return self.row.fed(self.ids, span)

    def takes(self, option: str) -> bool:
        """Whether the model's forward has an option of this name."""
        return option in (keywords(self.model.forward) if self.keywords is None else self.keywords)

    def call(self, ids: Tensor, **options: Any) -> Any:
        """The model's output for ids (rows, n), with those of the options that it takes."""
        return self.model(ids, **{name: x for name, x in options.items() if self.takes(name)})

    def run(
        self,
        ids: Tensor,
        span: TargetSpan,
        sites: Sequence[Site] = (),
        use_cache: bool = False,
        **more: Any,
    ) -> Pass:
        """Run the model on rows of fed ids (rows, n_fed), to score the span.

        sites: the layers whose gradients are taken afterwards. more: further arguments of the
        model, left out where its forward does not have them.
        """
        # Logits over the vocabulary are dear, so only the scored positions get them.
        kept = last_positions(self.model, len(span))
        options = {"use_cache": use_cache, "logits_to_keep": kept, **more}
        if self.prefix is not None and self.n_cached:
            cache = self.prefix.at(self.n_cached, len(ids))
            options |= {"use_cache": True, "past_key_values": cache}
        cast = nullcontext()
        if self.dtype is not None:
            cast = torch.autocast(self.prompt_ids.device.type, self.dtype)  # type: ignore[assignment]
        with cast, split_at_head(self.model, sites) as head:
            output = self.call(ids, **options)
        cache = getattr(output, "past_key_values", None) if use_cache else None
        logits = read_logits(output)[:, -len(span) :]
        precision = lower(logits.dtype, self.precision)
        return Pass(self.target, span, logits, head, cache, precision)

    def answer(self, question: str, measure: Callable[[], bool]) -> bool:
        """What the model is, in these passes' precision; measured once for each model."""
        return self.checks.answer((question, self.dtype), measure)

    @torch.no_grad()
    def probe(self, use_cache: bool = False, of_prompt: bool = False) -> Pass:
        """Score the target as it is, in one pass of one row, since not every model takes two.

        of_prompt: whether the model must be asked if it is causal. Nothing follows a target of one
        token, so the last token of the prompt is one more then.
        """
        asks = of_prompt and not len(self.target.fed) and self.row.n_prompt > 1
        if not asks or ("causal", self.dtype) in self.checks:
            return self.run(self.ids, self.whole, use_cache=use_cache)
        ids = self.prompt_ids
        target = Target(torch.cat([ids[0, -1:], self.target.ids]))
        longer = replace(self, prompt_ids=ids[:, :-1], target=target)
        scored = longer.probe(use_cache)
        longer.is_causal(scored)
        return replace(scored, target=self.target, span=self.whole, logits=scored.logits[:, -1:])

    @torch.no_grad()
    def is_causal(self, scored: Pass) -> bool:
        """Whether earlier scores stay when the last token of the row changes.

        A target of one token has no earlier scores, and is scored in one pass in any case.

        scored: the pass over the row as it is.
        """
        if not len(self.target.fed):
            return self.checks.get(("causal", self.dtype), True)

        def measure() -> bool:
            return scored.agrees_with(self._changed(), but_last=1)

        # In 16 bits the comparison allows much, so each prompt is compared for itself.
        return self.answer("causal", measure) if scored.precision == torch.float32 else measure()

    def _changed(self) -> Pass:
        ids = self.ids.clone()
        ids[0, -1] += torch.where(ids[0, -1] > 0, -1, 1)
        return self.run(self.row.fed(ids, self.whole), self.whole)

    def spans(
        self, per_token: bool, rows: int, causal: bool, divide: bool = True
    ) -> list[TargetSpan]:
        """Divide the target among passes.

        One pass scores all of it. The backward from an early token still walks over the later
        positions, so with many rows several shorter passes are cheaper. A model that is not
        causal needs one pass per token, as Captum does it.
        """
        n_output = len(self.target)
        if not causal:
            return _even_spans(n_output, n_output)
        if not (per_token and divide and self.target.is_additive and len(self.target.fed)):
            return [TargetSpan(0, n_output)]
        counts = range(1, min(n_output, 8) + 1)
        divisions = (_even_spans(n_output, n) for n in counts)
        # Tokens that one forward and len(span) backwards of each span walk over.
        return min(
            divisions,
            key=lambda spans: sum(
                (self.row.n_fed(s) * rows + PASS_OVERHEAD) * (1 + len(s)) for s in spans
            ),
        )


@dataclass(frozen=True)
class Pass:
    """One pass: its logits (rows, len(span), vocabulary), to score and to differentiate."""

    target: Target
    span: TargetSpan
    logits: Tensor
    head: HeadInput = field(default_factory=HeadInput)
    cache: Any = None
    precision: torch.dtype = torch.float32

    def token_scores(self) -> Tensor:
        """Scores (rows, len(span)) of the span's tokens."""
        return self.target.token_scores(self.logits, self.span.start, self.span.stop)

    def sequence_score(self) -> Tensor:
        """Score (rows,) of the span's tokens together."""
        return self.target.sequence_score(self.logits, self.span.start, self.span.stop)

    def detached(self) -> Pass:
        """The same without its graph."""
        return Pass(self.target, self.span, self.logits.detach(), precision=self.precision)

    def agrees_with(self, other: Pass, but_last: int = 0) -> bool:
        """Whether the first rows have the same log probabilities, up to the precision.

        but_last: so many target tokens may differ.
        """
        scores = torch.stack(
            [replace(p, target=p.target.as_log_prob()).token_scores()[0] for p in (self, other)]
        )
        allowed = tolerance(self.precision) * scores.abs().max().clamp(min=1)
        compared = scores[:, : scores.size(1) - but_last]
        return bool((compared[0] - compared[1]).abs().max() <= allowed)

    def gradients(
        self, wrt: Sequence[Tensor], per_token: bool, **options: Any
    ) -> Iterator[tuple[int | None, tuple[Tensor, ...]]]:
        """(target index, gradients of its score summed over rows); index None is the sequence.

        The sequence comes last, and only where it is not the sum of the tokens before it. The
        gradients are zero where nothing flows.
        """
        outputs = list(self._outputs(per_token))
        options = {**options, "allow_unused": True, "materialize_grads": True}
        for left, (index, output, seed) in zip(reversed(range(len(outputs))), outputs, strict=True):
            yield index, torch.autograd.grad(output, wrt, seed, retain_graph=left > 0, **options)

    def _outputs(self, per_token: bool) -> Iterator[tuple[int | None, Tensor, Tensor | None]]:
        """(target index, the tensor to differentiate, the gradient that arrives there)."""
        if per_token:
            scores = self.token_scores().sum(0)
            output, seed = self._below_head(scores.sum())
            for i, score in enumerate(scores):
                index, position = self.span.start + i, i - len(scores)
                if seed is None:
                    yield index, score, None
                else:
                    of_token = torch.zeros_like(seed)
                    of_token[:, position] = seed[:, position]
                    yield index, output, of_token
        if not (per_token and self.target.is_additive):
            yield (None, *self._below_head(self.sequence_score().sum()))

    def _below_head(self, score: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's input and the score's gradient there, or the score where nothing was cut."""
        if self.head.below is None or self.head.above is None:
            return score, None
        return self.head.below, torch.autograd.grad(score, self.head.above, retain_graph=True)[0]


def last_positions(model: nn.Module, n: int) -> int | Tensor:
    """The last `n` positions, as an argument of the model.

    A number lets Gemma 4 shorten its last layers, so models of transformers get a tensor: it says
    where logits are needed, and nothing else. On the CPU it indexes states on every device.
    """
    outermost = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    of_transformers = type(outermost).__module__.startswith("transformers.")
    return torch.arange(-n, 0) if of_transformers else n


def _even_spans(n_output: int, count: int) -> list[TargetSpan]:
    edges = [round(n_output * i / count) for i in range(count + 1)]
    return [TargetSpan(start, stop) for start, stop in pairwise(edges)]


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference of scores that the dtype alone explains."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)


def lower(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    """The less precise of two dtypes."""
    return dtype if other is None else max(dtype, other, key=lambda d: torch.finfo(d).eps)


def read_logits(output: Any) -> Tensor:
    """The logits (rows, length, vocabulary) of a model's output."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"expected the model to return an object with .logits, got {type(output).__name__}"
        )
    logits = logits[:, 0] if logits.dim() == 4 else logits  # Llama4: (rows, 1, length, vocabulary)
    if logits.dim() != 3:
        raise ValueError(
            "expected logits (rows, length, vocabulary), as of a causal or an encoder-decoder "
            f"language model; got the shape {tuple(logits.shape)}"
        )
    return logits


def tokens_per_pass(device: torch.device) -> int:
    return TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS_ELSEWHERE)
