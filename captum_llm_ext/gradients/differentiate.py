"""From a teacher-forced pass and a method's rule to the attributions of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.gradients.adaptive import walk_adaptively
from captum_llm_ext.gradients.conductance import ConductanceWalk
from captum_llm_ext.gradients.methods import PathRule, PointRule, Rule
from captum_llm_ext.gradients.path import Blocks, PathWalk
from captum_llm_ext.gradients.totals import LayerTotal, Plan, judge
from captum_llm_ext.inputs.baselines import PathStart
from captum_llm_ext.model.adapter import whole_blocks
from captum_llm_ext.model.hooks import LayerState, embedding_leaves, reading, tracing, writing
from captum_llm_ext.model.layers import Site, decoder_blocks
from captum_llm_ext.model.parts import token_embedding
from captum_llm_ext.scoring.positions import place_states
from captum_llm_ext.scoring.teacher_forcing import TargetSpan, TeacherForcing


def attribute_layers(
    forcing: TeacherForcing, rule: Rule, sites: Sequence[Site], start: PathStart | None, plan: Plan
) -> dict[Site, LayerTotal]:
    """Attributions of every site, by the rule. `start` is needed by path rules only.

    Of conductance the sites hold the token embeddings, whose path it is: see `with_embeddings`.
    """
    totals: dict[Site, LayerTotal] = {}
    for span in forcing.spans(plan.per_token, plan.rows, plan.causal, divides(rule, plan)):
        ends, blocks = _trace(forcing, span, sites, plan)
        for site in sites:
            end = ends[site]
            new = LayerTotal(forcing, rule, plan, end.tensor, end.depends_on_tokens, end.first)
            totals.setdefault(site, new)
        alive = [site for site in sites if ends[site].depends_on_tokens]
        if not alive:
            continue
        if isinstance(rule, PointRule):
            _add_point(forcing, span, rule, alive, totals, plan)
        elif start is not None:
            starts = _start_states(forcing, span, alive, start)
            known = (forcing, span, rule, plan, blocks, ends, starts)
            if rule.is_conductance:
                whole = [site for site in alive if holds_whole_state(site, forcing.model)]
                _add_path(ConductanceWalk(*known, whole[:1], alive, whole), totals)
                continue
            for chain in [alive] if plan.joint else [[site] for site in alive]:
                path = PathWalk(*known, chain)
                _add_path(path, totals)
            for site in set(sites) - set(alive) if plan.joint else ():
                path.add_facts(totals[site].facts)
    judge(list(totals.values()), plan.joint)
    return totals


def is_conductance(rule: Rule) -> bool:
    return isinstance(rule, PathRule) and rule.is_conductance


def with_embeddings(sites: Sequence[Site], model: nn.Module) -> list[Site]:
    """The sites with that of the token embeddings, whose path it is, in front."""
    embedding = token_embedding(model)
    found = [s for s in sites if s.module is embedding and not s.at_input]
    own = found or [Site("token embeddings", embedding)]
    return [*own, *(site for site in sites if site not in own)]


def holds_whole_state(site: Site, model: nn.Module) -> bool:
    """Whether all that the scores depend on passes the site: the embeddings, or a block."""
    return site.module in [token_embedding(model), *whole_blocks(model)]


def divides(rule: Rule, plan: Plan) -> bool:
    """Whether several shorter passes can be cheaper: not where all targets are needed at once."""
    adaptive = isinstance(rule, PathRule) and rule.tolerance is not None
    return not adaptive and plan.forward_mode is False


def _trace(
    forcing: TeacherForcing, span: TargetSpan, sites: Sequence[Site], plan: Plan
) -> tuple[dict[Site, LayerState], Blocks]:
    """The layers' states, and all that replay needs, at the input itself."""
    ids = forcing.fed(forcing.ids, span)
    blocks = decoder_blocks(forcing.model)
    with tracing(forcing.model, sites, blocks, ids) as (states, outputs):
        scores = forcing.run(ids, span, sites).token_scores()[0].detach()
    place_states(forcing, span, states, sites, plan.column_at)
    return states, Blocks(blocks, outputs, scores)


def _start_states(
    forcing: TeacherForcing, span: TargetSpan, sites: Sequence[Site], start: PathStart
) -> dict[Site, Tensor]:
    """The layers' values where the path starts: as they are when the embeddings are replaced."""
    ids = forcing.fed(start.ids, span)
    with torch.no_grad(), ExitStack() as stack:
        if start.embeddings is not None:
            stack.enter_context(_replaced_embeddings(forcing, ids, start))
        states, _ = stack.enter_context(tracing(forcing.model, sites, [], ids))
        forcing.run(ids, span)
    return {site: states[site].tensor for site in sites}


def _replaced_embeddings(forcing: TeacherForcing, ids: Tensor, start: PathStart) -> Any:
    site = Site("input embedding", token_embedding(forcing.model))
    fed = slice(forcing.cut, forcing.cut + ids.size(1))
    with torch.no_grad():
        embedded = site.module(ids)
    mask = start.replaced[fed, None].to(embedded.device)
    values = start.embeddings[fed].to(embedded)  # type: ignore[index]
    return writing({site: torch.where(mask, values, embedded)})


def _add_path(path: PathWalk, totals: Mapping[Site, LayerTotal]) -> None:
    """The path of one layer, or of several together."""
    if path.rule.tolerance is None:
        path.walk(totals)
    else:
        walk_adaptively(path, totals)
    for site in path.chain:
        path.add_facts(totals[site].facts)


def _add_point(
    forcing: TeacherForcing,
    span: TargetSpan,
    rule: PointRule,
    sites: Sequence[Site],
    totals: Mapping[Site, LayerTotal],
    plan: Plan,
) -> None:
    """Gradients at the input, of all sites from one pass."""
    ids = forcing.fed(forcing.ids, span)
    with embedding_leaves(forcing.model, ids), reading(sites) as read:
        scored = forcing.run(ids, span, sites)
    wrt = [read[site] for site in sites]
    for output, gradients in scored.gradients(wrt, plan.per_token, **plan.grad_kwargs):
        for site, gradient in zip(sites, gradients, strict=True):
            part = gradient.float()
            part = part * read[site].detach().float() if rule.multiply else part
            totals[site].add(output, part[0])
    plan.advance(1)
