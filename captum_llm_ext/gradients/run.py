"""One run of a gradient method: over parts of the target, over paths, into totals by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from captum_llm_ext.gradients.forward_mode import is_cheaper
from captum_llm_ext.gradients.method import DIFFERENCE, GradientMethod
from captum_llm_ext.gradients.totals import LayerTotal, Plan
from captum_llm_ext.gradients.trace import Trace
from captum_llm_ext.inputs.baselines import PathStart
from captum_llm_ext.inputs.features import Features
from captum_llm_ext.model.layers import Site
from captum_llm_ext.model.memory import free_bytes
from captum_llm_ext.scoring.checks import warn_of_low_precision
from captum_llm_ext.scoring.positions import TargetSpan
from captum_llm_ext.scoring.preparation import Prepared
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing, tokens_per_pass

SHARE_FOR_GRAPH = 0.5  # of what is free, for what autograd keeps of one pass


def mean_over_runs(
    prepared: Prepared,
    methods: Sequence[GradientMethod],
    sites: Sequence[Site],
    features: Features,
    starts: Sequence[PathStart | None],
    plan: Plan,
    show_progress: bool,
) -> dict[Site, LayerTotal]:
    """The attributions of every layer, averaged over runs, each with its method and path start.

    The pass at the input is the first of them all, and what the model is asked rides in it.
    """
    forcing, method = prepared.forcing, methods[0]
    forward = _may_go_forward(forcing, method, sites, features, plan)
    with method.surround(forcing.model), tqdm(disable=not show_progress) as bar:
        traced = method.sites(sites, forcing.model)
        trace, scored = Trace.of(forcing, forcing.whole, traced, features, method.has_path)
        plan = replace(
            plan,
            forward=forward,
            causal=prepared.is_causal(scored),
            rows=plan.rows or rows_per_pass(forcing, method, trace.saved_bytes),
            advance=bar.update,
        )
        if method.has_path:
            warn_of_low_precision(scored.precision, sites, forcing.model)
        del scored
        bar.total = sum(_n_rows(forcing, each, len(sites), plan) for each in methods)
        runs = [
            attribute_layers(trace, method, features, start, plan)
            for method, start in zip(methods, starts, strict=True)
        ]
    if len(runs) == 1:
        return runs[0]
    return {site: LayerTotal.mean([run[site] for run in runs]) for site in runs[0]}


def attribute_layers(
    whole: Trace, method: GradientMethod, features: Features, start: PathStart | None, plan: Plan
) -> dict[Site, LayerTotal]:
    """The attributions of every layer in one run.

    whole: the pass over the whole target; start: where paths start.
    """
    totals: dict[Site, LayerTotal] = {}
    forcing, sites = whole.forcing, list(whole.layers)
    for span in _spans(forcing, method, plan):
        trace = whole
        if span != whole.span:
            trace, _ = Trace.of(forcing, span, sites, features, method.has_path)
        for site, layer in trace.layers.items():
            new = LayerTotal(
                method,
                plan,
                trace.positions[site],
                layer.tensor,
                layer.depends_on_tokens,
                len(forcing.target),
                forcing.target.is_additive,
            )
            totals.setdefault(site, new)
        if trace.alive:
            for path in method.paths(trace, start, plan, totals):
                method.run(path)
    _judge(method, list(totals.values()), plan.joint)
    return totals


def _spans(forcing: TeacherForcing, method: GradientMethod, plan: Plan) -> list[TargetSpan]:
    """The parts of the target that the method attributes one after the other."""
    divide = method.divides and not plan.forward
    return forcing.spans(plan.per_token, plan.rows, plan.causal, divide)


def _n_rows(forcing: TeacherForcing, method: GradientMethod, n_layers: int, plan: Plan) -> int:
    """How many rows the method differentiates at most."""
    spans = _spans(forcing, method, plan)
    paths = n_layers if method.has_path and method.moves_layers and not plan.joint else 1
    return len(spans) * method.n_points * paths


def _may_go_forward(
    forcing: TeacherForcing,
    method: GradientMethod,
    sites: Sequence[Site],
    features: Features,
    plan: Plan,
) -> bool:
    """Whether forward mode gives the attributions, and may be cheaper.

    It gives sums over hidden units, of one layer at a time, for each target token.
    """
    possible = method.has_path and method.moves_layers and not method.changes_backward
    plain = method.norm == "sum" and not plan.keep_hidden
    together = plan.joint and len(sites) > 1
    if not (possible and plain and plan.per_token) or together:
        return False
    return is_cheaper(features.n_columns, len(forcing.target))


def rows_per_pass(forcing: TeacherForcing, method: GradientMethod, saved_bytes: int) -> int:
    """Path points per pass: for as many tokens as the device works on well, in free memory.

    saved_bytes: what autograd keeps of one row's pass.
    """
    if not method.has_path:
        return 1
    device = forcing.ids.device
    useful = max(1, tokens_per_pass(device) // forcing.row.n_fed(forcing.whole))
    useful = min(method.n_points, useful)
    free = free_bytes(device) if useful > 1 else None
    if free is None:
        return useful
    return max(1, min(useful, int(SHARE_FOR_GRAPH * free) // max(1, saved_bytes)))


def _judge(method: GradientMethod, totals: Sequence[LayerTotal], together: bool) -> None:
    """Compare sums with score differences: of each layer, or of all that moved together."""
    if method.sums_to != DIFFERENCE:
        return
    for group in [totals] if together else [[total] for total in totals]:
        sums = torch.stack([total.sums() for total in group]).sum(0)
        for total in group:
            total.record.judge(sums)
