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
from captum_llm_ext.inputs.targets import PERTURBATION_TARGETS, captum_labels, check_attr_target
from captum_llm_ext.metrics.curves import (
    FRACTIONS,
    RemovalCurves,
    removal_counts,
    removal_rows,
)
from captum_llm_ext.metrics.lds import half_masks
from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.scoring.checks import check_counts
from captum_llm_ext.scoring.rank_correlation import rank_correlation
from captum_llm_ext.scoring.tasks import Request

MOST_STEPS = 50
N_MASKS = 64
TOPS = (1, 3, 5)  # features, without which the drop of the score is read


@dataclass(frozen=True)
class Removal:
    """The settings of a judge: steps of removal, random orders and random halves."""

    absolute: bool = False
    fractions: Sequence[float] = FRACTIONS
    n_steps: int = MOST_STEPS
    n_random: int = 10
    n_masks: int = N_MASKS

    def __post_init__(self) -> None:
        check_counts(n_steps=self.n_steps, n_random=self.n_random, n_masks=self.n_masks)
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(
                f"fractions must be numbers above 0 and up to 1, got {list(self.fractions)}"
            )

    def scored(
        self,
        prompts: MaskedPrompts,
        attributions: Sequence[Tensor],
        generator: torch.Generator,
    ) -> tuple[RemovalCurves, RemovalCurves, Tensor, Tensor]:
        """Judge attributions, each (n_features,).

        Returns their curves, the curves of random orders, the drops without the first features
        (n_attributions, 3), and the linear datamodeling scores (n_attributions,).

        The generator's seed alone draws the halves, so that its orders stay what they are.
        """
        values = torch.stack(list(attributions))
        n_own, n_features = values.shape
        orders = torch.stack([order_of(attr, self.absolute) for attr in values])
        orders = torch.cat([orders, random_orders(self.n_random, n_features, generator)])
        counts = removal_counts(n_features, self.n_steps, self.fractions)
        along = removal_rows(orders, counts)
        without = removal_rows(orders[:n_own], torch.tensor(TOPS))[0]
        own = torch.Generator().manual_seed(generator.initial_seed())
        halves = half_masks(self.n_masks, n_features, own)
        parts = [along.flatten(0, 2), without.flatten(0, 1), halves]
        with no_gradients():
            scores = sequence_scores(prompts, torch.cat(parts)).split([len(part) for part in parts])
        deletion, insertion = scores[0].view(along.shape[:3])
        curves = RemovalCurves(counts, deletion, insertion, tuple(self.fractions))
        drops = deletion[:n_own, :1] - scores[1].view(n_own, len(TOPS))
        lds = rank_correlation(values @ halves.T.double(), scores[2])
        return curves[:n_own], curves[n_own:], drops, lds


def order_of(attr: Tensor, absolute: bool = False) -> Tensor:
    """(n_features,) features from the most important on; of equal ones the earlier comes first."""
    return (attr.abs() if absolute else attr).argsort(descending=True, stable=True)


def random_orders(n_orders: int, n_features: int, generator: torch.Generator) -> Tensor:
    """(n_orders, n_features) in pairs, an order and its reverse.

    The deletion curve of the one needs the prompts that the insertion curve of the other needs.
    """
    pairs = (n_orders + 1) // 2
    firsts = [torch.randperm(n_features, generator=generator) for _ in range(pairs)]
    both = torch.stack([torch.stack([order, order.flip(0)]) for order in firsts])
    return both.flatten(0, 1)[:n_orders]


def open_prompts(
    model: nn.Module,
    tokenizer: Any,
    inp: InterpretableInput | None,
    request: Request,
    baselines: BaselineSpec = None,
    reuse_prefix: bool = True,
    rows: int | None = None,
    show_progress: bool = False,
) -> MaskedPrompts:
    """The prompts of the input with any of its features absent, whose callable baseline is drawn
    once; rows: prompts per pass."""
    check_attr_target(request.attr_target, PERTURBATION_TARGETS)
    check_counts(internal_batch_size=rows)
    if inp is None:
        raise ValueError("the result does not know its input (result.inp is None): pass inp=")
    if not isinstance(inp, CaptumTextTokenInput | CaptumTextTemplateInput):
        raise TypeError(f"expected a TextTokenInput or TextTemplateInput, got {type(inp).__name__}")
    if inp.n_itp_features == 0:
        raise ValueError("the input has no features: all its tokens are skipped")
    options = (reuse_prefix, rows, show_progress)
    with no_gradients():
        return MaskedPrompts.of(model, tokenizer, inp, request, baselines, *options).drawn()


def feature_attr(result: CaptumLLMAttributionResult, prompts: MaskedPrompts) -> Tensor:
    """(n_features,) the sequence attribution; of values in one mask, which share it, the first.

    Raises ValueError where the result is not of this input and target.
    """
    _check_target(result, prompts)
    inp = prompts.inp
    masked = getattr(inp, "mask", None) is not None
    columns = list(inp.formatted_mask if masked else range(inp.n_itp_features))
    attr = torch.as_tensor(result.seq_attr).detach().double().cpu()
    if attr.shape != (len(columns),):
        raise ValueError(
            f"the input has {len(columns)} features, and the result attributes to {attr.numel()}: "
            "pass the input that was attributed, and no attribution to generated tokens"
        )
    if not attr.isfinite().all():
        raise ValueError("the attribution has values that are not finite, which have no rank")
    return attr[[columns.index(feature) for feature in range(inp.n_itp_features)]]


@contextmanager
def no_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def sequence_scores(prompts: MaskedPrompts, masks: Tensor) -> Tensor:
    """(n_rows,) of masks (n_rows, n_features)."""
    return prompts.scores(masks)[:, 0].cpu().double()


def _check_target(result: CaptumLLMAttributionResult, prompts: MaskedPrompts) -> None:
    ids, shown = prompts.scorer.target.ids.cpu(), list(result.output_tokens)
    names = [str(token) for token in prompts.tokenizer.convert_ids_to_tokens(ids.tolist())]
    if shown not in (names, captum_labels(ids, prompts.tokenizer), prompts.output_tokens):
        raise ValueError(
            f"the result attributes {shown}, and the target is {names}: pass the target that was "
            "attributed"
        )
