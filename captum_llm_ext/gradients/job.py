"""What `LLMGradientAttribution` runs: its choices checked, how many rows at once, every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.gradients.differentiate import (
    attribute_layers,
    divides,
    is_conductance,
    with_embeddings,
)
from captum_llm_ext.gradients.methods import PathRule, Rule
from captum_llm_ext.gradients.totals import LayerTotal, Plan
from captum_llm_ext.inputs.baselines import PathStart
from captum_llm_ext.model.layers import Site
from captum_llm_ext.model.memory import free_bytes
from captum_llm_ext.scoring.checks import check_counts
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing, tokens_per_pass

SHARE_FOR_GRAPH = 0.5  # of what is free, for what autograd keeps of one pass
LAYER_MODES = ("independent", "joint")


@dataclass(frozen=True)
class Job:
    """Everything that one run of a rule needs, but for the rule."""

    forcing: TeacherForcing
    sites: Sequence[Site]
    plan: Plan

    def run(
        self, rules: Sequence[Rule], starts: Sequence[PathStart | None], show_progress: bool
    ) -> Mapping[Site, LayerTotal]:
        """Attributions by site, averaged over trials, each with its rule and its path's start."""
        walked = is_conductance(rules[0])
        sites = with_embeddings(self.sites, self.forcing.model) if walked else self.sites
        with tqdm(total=sum(map(self._rows, rules)), disable=not show_progress) as bar:
            plan = replace(self.plan, advance=bar.update)
            runs = [
                attribute_layers(self.forcing, rule, sites, start, plan)
                for rule, start in zip(rules, starts, strict=True)
            ]
        return {site: LayerTotal.mean([run[site] for run in runs]) for site in runs[0]}

    def _rows(self, rule: Rule) -> int:
        """Rows that the rule will differentiate."""
        plan = self.plan
        spans = self.forcing.spans(plan.per_token, plan.rows, plan.causal, divides(rule, plan))
        if not isinstance(rule, PathRule):
            return len(spans)
        paths = 1 if plan.joint or rule.is_conductance else len(self.sites)
        points = len(rule.points) if rule.tolerance is None else rule.max_rows
        return len(spans) * points * paths


def forward_mode_of(asked: bool | None, rule: Rule, possible: bool, cheap: bool) -> bool | None:
    """Whether to go forward; None is decided for each layer, when it is known what moves there."""
    possible = possible and isinstance(rule, PathRule)
    if asked and not possible:
        raise ValueError(
            "forward_mode=True is for methods with a path (such as integrated gradients), with "
            "include_per_token_attr=True, without include_hidden_attr and joint layers"
        )
    return None if asked is None and possible and cheap else bool(asked)


def draws(rule: PathRule, inp: InterpretableInput) -> bool:
    """Whether another trial would give another result."""
    return rule.is_random or callable(getattr(inp, "baselines", None))


def check_choices(
    layer_mode: str,
    num_trials: int,
    internal_batch_size: int | None,
    grad_kwargs: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> None:
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}")
    reserved = {"retain_graph", "grad_outputs", "outputs", "inputs"} & set(grad_kwargs or {})
    if reserved:
        raise ValueError(f"grad_kwargs cannot set {', '.join(sorted(reserved))}")
    if layer_mode not in LAYER_MODES:
        raise ValueError(f"layer_mode must be one of {', '.join(LAYER_MODES)}; got {layer_mode!r}")
    check_counts(num_trials=num_trials, internal_batch_size=internal_batch_size)


def rows_per_pass(forcing: TeacherForcing, rule: Rule) -> int:
    """Path points per pass: for as many tokens as the device works on well, in free memory."""
    if not isinstance(rule, PathRule):
        return 1
    fed = forcing.ids.size(1) - forcing.cut
    useful = max(1, tokens_per_pass(forcing.ids.device) // fed)
    useful = min(len(rule.points), useful) if rule.points else useful
    free = free_bytes(forcing.ids.device) if useful > 1 else None
    if free is None:
        return useful
    return max(1, min(useful, int(SHARE_FOR_GRAPH * free) // max(1, forcing.saved_bytes())))
