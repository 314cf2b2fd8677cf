"""From a teacher-forced pass and a method's rule to the attributions of layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.baselines import PathStart
from captum_llm_ext.hooks import (
    LayerState,
    embedding_leaves,
    embeddings,
    reading,
    replaying,
    tracing,
    writing,
)
from captum_llm_ext.layers import Site, decoder_blocks
from captum_llm_ext.methods import NORMS, PathRule, PointRule, Rule
from captum_llm_ext.model_pass import Pass, TargetSpan, TeacherForcing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is asked for besides the method: the caller's options, read once."""

    per_token: bool = True
    joint: bool = False
    keep_hidden: bool = False
    rows: int = 1
    causal: bool = True
    grad_kwargs: Mapping[str, Any] = field(default_factory=dict)
    advance: Callable[[int], Any] = lambda rows: None  # told how many rows were differentiated


class LayerTotal:
    """A layer's attributions, summed over rows and passes.

    tokens: (n_output, length) per target token, combined over hidden units; sequence: (length,
    hidden) of the sequence score; hidden: (n_output, length, hidden) or None;
    score_difference: (n_output,) or (1,) between the ends of the path, or None.
    """

    def __init__(self, forcing: TeacherForcing, norm: str, plan: Plan, width: int) -> None:
        n_output, length = len(forcing.target), forcing.ids.size(1)
        device = forcing.ids.device
        self.norm = norm
        self.is_additive = forcing.target.is_additive
        self.tokens = torch.zeros(n_output, length, device=device)
        self.sequence = torch.zeros(length, width, device=device)
        keep = plan.keep_hidden and plan.per_token
        self.hidden = torch.zeros(n_output, length, width, device=device) if keep else None
        self.score_difference: Tensor | None = None

    @classmethod
    def mean(cls, totals: Sequence[LayerTotal]) -> LayerTotal:
        """The mean over trials."""
        mean = copy(totals[0])
        for name in ("tokens", "sequence", "hidden", "score_difference"):
            if getattr(mean, name) is not None:
                setattr(mean, name, torch.stack([getattr(t, name) for t in totals]).mean(0))
        return mean

    def add(self, output: int | None, part: Tensor) -> None:
        """Add (positions, …) of target token `output`, or of the sequence where that is None."""
        end = part.size(0)
        part = part.reshape(end, -1).to(self.tokens.device, torch.float32)
        if output is None or self.is_additive:
            self.sequence[:end] += part
        if output is None:
            return
        self.tokens[output, :end] += NORMS[self.norm](part)
        if self.hidden is not None:
            self.hidden[output, :end] += part


def attribute_layers(
    forcing: TeacherForcing, rule: Rule, sites: Sequence[Site], start: PathStart | None, plan: Plan
) -> dict[Site, LayerTotal]:
    """Attributions of every site, by the rule. `start` is needed by path rules only."""
    totals: dict[Site, LayerTotal] = {}
    for span in forcing.spans(plan.per_token, plan.rows, plan.causal):
        ids = forcing.ids[:, : forcing.length(span)]
        ends, blocks = _trace(forcing, span, sites, ids)
        for site in sites:
            width = ends[site].tensor[0, 0].numel() if ends[site].depends_on_tokens else 0
            totals.setdefault(site, LayerTotal(forcing, rule.norm, plan, width))
        alive = [site for site in sites if ends[site].depends_on_tokens]
        if not alive:
            continue
        if isinstance(rule, PointRule):
            _add_point(forcing, span, rule, alive, totals, plan)
        elif start is not None:
            starts = _start_states(forcing, span, alive, start)
            walk = _PathWalk(forcing, span, rule, plan, blocks, ends, starts)
            for chain in [alive] if plan.joint else [[site] for site in alive]:
                walk.add(chain, totals)
    return totals


def _trace(
    forcing: TeacherForcing, span: TargetSpan, sites: Sequence[Site], ids: Tensor
) -> tuple[dict[Site, LayerState], _Blocks]:
    """The layers' states, and all that replay needs, at the input itself."""
    blocks = decoder_blocks(forcing.model)
    with tracing(forcing.model, sites, blocks, ids) as (states, outputs):
        scores = forcing.run(ids, span, sites).token_scores()[0].detach()
    for site in sites:
        _check_state(site, states.get(site), ids)
    return states, _Blocks(blocks, outputs, scores)


@dataclass(frozen=True)
class _Blocks:
    """The model's blocks, what each returned at the input, and the scores (len(span),) there."""

    modules: list[nn.Module]
    outputs: list[Any]
    scores: Tensor


def _check_state(site: Site, state: LayerState | None, ids: Tensor) -> None:
    if state is None:
        raise ValueError(f"layer {site.name!r} does not run in the model's forward pass")
    if state.depends_on_tokens and state.tensor.shape[:2] != ids.shape:
        raise ValueError(
            f"expected layer {site.name!r} to hold a tensor (batch, sequence, …) with "
            f"{tuple(ids.shape)} first, got {tuple(state.tensor.shape)}; choose another layer"
        )


def _start_states(
    forcing: TeacherForcing, span: TargetSpan, sites: Sequence[Site], start: PathStart
) -> dict[Site, Tensor]:
    """The layers' values where the path starts: as they are when the embeddings are replaced."""
    ids = start.ids[:, : forcing.length(span)]
    with torch.no_grad(), ExitStack() as stack:
        if start.embeddings is not None:
            stack.enter_context(_replaced_embeddings(forcing.model, ids, start))
        states, _ = stack.enter_context(tracing(forcing.model, sites, [], ids))
        forcing.run(ids, span)
    return {site: states[site].tensor for site in sites}


def _replaced_embeddings(model: nn.Module, ids: Tensor, start: PathStart) -> Any:
    site = Site("input embedding", embeddings(model)[0])
    with torch.no_grad():
        embedded = site.module(ids)
    mask = start.replaced[: ids.size(1), None].to(embedded.device)
    values = start.embeddings[: ids.size(1)].to(embedded)  # type: ignore[index]
    return writing({site: torch.where(mask, values, embedded)})


def _add_point(
    forcing: TeacherForcing,
    span: TargetSpan,
    rule: PointRule,
    sites: Sequence[Site],
    totals: Mapping[Site, LayerTotal],
    plan: Plan,
) -> None:
    """Gradients at the input, of all sites from one pass."""
    ids = forcing.ids[:, : forcing.length(span)]
    with embedding_leaves(forcing.model, ids), reading(sites) as read:
        scored = forcing.run(ids, span, sites)
    wrt = [read[site] for site in sites]
    for output, gradients in scored.gradients(wrt, plan.per_token, **plan.grad_kwargs):
        for site, gradient in zip(sites, gradients, strict=True):
            part = gradient * read[site].detach() if rule.multiply else gradient
            totals[site].add(output, part[0])
    plan.advance(1)


@dataclass
class _PathWalk:
    """The straight path of one or several layers together, at the rule's points."""

    forcing: TeacherForcing
    span: TargetSpan
    rule: PathRule
    plan: Plan
    blocks: _Blocks
    ends: Mapping[Site, LayerState]
    starts: Mapping[Site, Tensor]

    def add(self, chain: Sequence[Site], totals: Mapping[Site, LayerTotal]) -> None:
        """Walk the path of `chain` and add its attributions to the totals."""
        replayed, scored = self._scored_ends(chain)
        chunks = math.ceil(len(self.rule.points) / self.plan.rows)
        points = torch.tensor(self.rule.points).tensor_split(chunks)
        weights = torch.tensor(self.rule.weights).tensor_split(chunks)
        for alphas, shares in zip(points, weights, strict=True):
            self._add_rows(chain, alphas, shares, replayed, totals)
            self.plan.advance(len(alphas))
        if self.rule.is_integral:
            for site in chain:
                self._add_difference(totals[site], scored)

    def _add_rows(
        self,
        chain: Sequence[Site],
        alphas: Tensor,
        shares: Tensor,
        replayed: int,
        totals: Mapping[Site, LayerTotal],
    ) -> None:
        values, factors = {}, {}
        for site in chain:
            values[site], difference = self._values(site, alphas)
            share = _over_rows(shares, difference)
            factors[site] = share * difference if self.rule.multiply else share
        with writing(values), reading(chain) as read:
            scored = self._run(len(alphas), replayed, chain)
        wrt = [read[site] for site in chain]
        for output, gradients in scored.gradients(
            wrt, self.plan.per_token, **self.plan.grad_kwargs
        ):
            for site, gradient in zip(chain, gradients, strict=True):
                totals[site].add(output, (factors[site] * gradient.float()).sum(0))

    def _values(self, site: Site, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's values (rows, …) at the points, and their difference (rows or 1, …)."""
        start = self.starts[site].float()
        difference = self.ends[site].tensor.float() - start
        if self.rule.stdev:
            noise = torch.randn(len(alphas), *difference.shape[1:]).to(difference)
            difference = difference + self.rule.stdev * noise
        return start + _over_rows(alphas, difference) * difference, difference

    def _run(self, rows: int, replayed: int, chain: Sequence[Site] = ()) -> Pass:
        ids = self.forcing.ids[:, : self.forcing.length(self.span)].expand(rows, -1)
        state = self.blocks.outputs[replayed - 1] if replayed else None
        with replaying(self.blocks.modules[:replayed], state, rows):
            return self.forcing.run(ids, self.span, chain)

    @torch.no_grad()
    def _scored_ends(self, chain: Sequence[Site]) -> tuple[int, Pass]:
        """How many blocks can be replayed, and the pass over the path's start and end.

        Replay is right where the path's end has the model's own scores, and else left out: some
        models pass more from block to block than a block's output.
        """
        ends = {s: torch.cat([self.starts[s], self.ends[s].tensor]) for s in chain}
        replayed = min(self.ends[site].blocks_before for site in chain)
        with writing(ends):
            scored = self._run(2, replayed)
            if replayed and not self._is_models_own(scored):
                logger.info("blocks cannot be replayed in this model: running all of them")
                replayed, scored = 0, self._run(2, 0)
        return replayed, scored

    def _is_models_own(self, scored: Pass) -> bool:
        scores = scored.token_scores()[1]
        tolerance = 1e-3 if scored.logits.dtype in (torch.float32, torch.float64) else 5e-2
        allowed = tolerance * self.blocks.scores.abs().clamp(min=1)
        return bool(((scores - self.blocks.scores).abs() <= allowed).all())

    def _add_difference(self, total: LayerTotal, scored: Pass) -> None:
        """Add score(end) − score(start) of the span's tokens, or of the sequence alone."""
        per_token = self.plan.per_token
        scores = scored.token_scores() if per_token else scored.sequence_score()[:, None]
        place = slice(self.span.start, self.span.stop) if per_token else slice(0, 1)
        if total.score_difference is None:
            n_output = len(self.forcing.target) if per_token else 1
            total.score_difference = torch.zeros(n_output, device=total.tokens.device)
        total.score_difference[place] += (scores[1] - scores[0]).to(total.tokens.device)


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))
