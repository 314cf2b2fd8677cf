"""From attributions to the prompts without their most important features, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import LLMAttributionResult as CaptumLLMAttributionResult
from torch import Tensor, nn

from captum_llm_ext.compat import CaptumTextTemplateInput, CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.inputs.baselines import BaselineSpec
from captum_llm_ext.inputs.targets import PERTURBATION_TARGETS, captums_labels, check_attr_target
from captum_llm_ext.inputs.templates import check_template, drawn
from captum_llm_ext.inputs.tokens import with_baselines
from captum_llm_ext.metrics.curves import FRACTIONS, RemovalCurves, removal_counts, removal_rows
from captum_llm_ext.perturbations.masked_prompts import Coalitions, prompt_scorer, teacher_forcing
from captum_llm_ext.scoring.checks import check_counts, warn_of_dropout
from captum_llm_ext.scoring.tasks import Request, task_of

MOST_STEPS = 50


@dataclass(frozen=True)
class Removal:
    """How features are removed: in which steps, and beside how many random orders."""

    absolute: bool = False
    fractions: Sequence[float] = FRACTIONS
    n_steps: int = MOST_STEPS
    n_random: int = 10

    def __post_init__(self) -> None:
        check_counts(n_steps=self.n_steps, n_random=self.n_random)
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(
                f"fractions must be numbers above 0 and up to 1, got {list(self.fractions)}"
            )

    def curves(
        self,
        asked: Coalitions,
        attributions: Sequence[Tensor],
        generator: torch.Generator,
    ) -> tuple[RemovalCurves, RemovalCurves]:
        """The curves of attributions, each (n_features,), and those of random orders."""
        own = torch.stack([order_of(attr, self.absolute) for attr in attributions])
        n_features = own.size(1)
        orders = torch.cat([own, random_orders(self.n_random, n_features, generator)])
        counts = removal_counts(n_features, self.n_steps, self.fractions)
        rows = removal_rows(orders, counts)
        with no_gradients():
            scores = scored(asked, rows.flatten(0, 2))
        deletion, insertion = scores.view(rows.shape[:3])
        both = RemovalCurves(counts, deletion, insertion, tuple(self.fractions))
        return both[: len(own)], both[len(own) :]


def order_of(attr: Tensor, absolute: bool = False) -> Tensor:
    """(n_features,) features from the most important on; of equal ones the earlier comes first."""
    return (attr.abs() if absolute else attr).argsort(descending=True, stable=True)


def random_orders(n_orders: int, n_features: int, generator: torch.Generator) -> Tensor:
    """(n_orders, n_features) in pairs, an order and its reverse.

    What the deletion curve of the one asks for, the insertion curve of the other asks for too.
    """
    pairs = (n_orders + 1) // 2
    drawn = [torch.randperm(n_features, generator=generator) for _ in range(pairs)]
    both = torch.stack([torch.stack([order, order.flip(0)]) for order in drawn])
    return both.flatten(0, 1)[:n_orders]


def open_coalitions(
    model: nn.Module,
    tokenizer: Any,
    inp: InterpretableInput | None,
    target: str | Tensor | None,
    baselines: BaselineSpec = None,
    reuse_prefix: bool = True,
    rows: int | None = None,
    show_progress: bool = False,
    **asked_for: Any,
) -> Coalitions:
    """What scores the input with any of its features absent; a callable baseline is drawn once.

    `asked_for`: the other fields of a `Request`.
    """
    request = Request(target, **asked_for)
    check_attr_target(request.attr_target, PERTURBATION_TARGETS)
    check_counts(internal_batch_size=rows)
    _check_input(inp)
    with no_gradients():
        fixed = task_of(model).perturbed(drawn(with_baselines(inp, baselines, model)), tokenizer)
        forcing = teacher_forcing(model, tokenizer, fixed, request)
        warn_of_dropout(forcing)
        scorer = prompt_scorer(forcing, reuse_prefix, rows)
        return Coalitions(fixed, tokenizer, scorer, show_progress=show_progress)


def feature_attr(result: CaptumLLMAttributionResult, asked: Coalitions) -> Tensor:
    """(n_features,) the sequence attribution; of values in one mask, which share it, the first.

    Raises ValueError where the result is not of this input and target.
    """
    _check_target(result, asked)
    n_features = asked.inp.n_itp_features
    masked = getattr(asked.inp, "mask", None) is not None
    columns = list(asked.inp.formatted_mask if masked else range(n_features))
    attr = torch.as_tensor(result.seq_attr).detach().double().cpu()
    if attr.shape != (len(columns),):
        raise ValueError(
            f"the input has {len(columns)} features, and the result attributes to {attr.numel()}: "
            "pass the input that was attributed, and no attribution to generated tokens"
        )
    if not attr.isfinite().all():
        raise ValueError("the attribution has values that are not finite, which have no rank")
    return attr[[columns.index(feature) for feature in range(n_features)]]


@contextmanager
def no_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def scored(asked: Coalitions, rows: Tensor) -> Tensor:
    """(n_rows,) sequence scores, every distinct prompt scored once."""
    asked.add(rows)
    asked.score()
    return torch.stack([asked.found(row)[0, 0].cpu() for row in rows]).double()


def _check_input(inp: InterpretableInput | None) -> None:
    if inp is None:
        raise ValueError("the result does not know its input (result.inp is None): pass inp=")
    if not isinstance(inp, CaptumTextTokenInput | CaptumTextTemplateInput):
        raise TypeError(f"expected a TextTokenInput or TextTemplateInput, got {type(inp).__name__}")
    if inp.n_itp_features == 0:
        raise ValueError("the input has no features: all its tokens are skipped")
    if isinstance(inp, CaptumTextTemplateInput):
        check_template(inp)


def _check_target(result: CaptumLLMAttributionResult, asked: Coalitions) -> None:
    ids, shown = asked.scorer.target.ids.cpu(), list(result.output_tokens)
    names = [str(token) for token in asked.tokenizer.convert_ids_to_tokens(ids.tolist())]
    forcing, captums = asked.scorer.forcing, captums_labels(ids, asked.tokenizer)
    if shown not in (names, captums, task_of(forcing.model).names(forcing, asked.tokenizer)):
        raise ValueError(
            f"the result attributes {shown}, and the target is {names}: pass the target that was "
            "attributed"
        )
