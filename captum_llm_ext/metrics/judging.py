"""The faithfulness of one attribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import LLMAttributionResult as CaptumLLMAttributionResult
from torch import Tensor, nn

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.display import draw_removal_curves
from captum_llm_ext.inputs.baselines import BaselineSpec
from captum_llm_ext.metrics.curves import FRACTIONS, MEASURES, RemovalCurves
from captum_llm_ext.metrics.removal import (
    MOST_STEPS,
    N_MASKS,
    TOPS,
    Removal,
    feature_attr,
    open_prompts,
)
from captum_llm_ext.model.lock import only_one_call
from captum_llm_ext.model.suitability import check_pair
from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.scoring.tasks import Request, gen_args_of_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Faithfulness:
    """How the score falls and rises along an attribution's order, and along random orders.

    Attributes:
        curves: of the attribution's order (n_orders = 1).
        random: of the random orders (n_orders = n_random).
        drops: drop of the score without the first 1, 3 and 5 features, or all where there are
            fewer; larger is better.
        lds: linear datamodeling score, in -1…1 and larger is better: over prompts with a random
            half of the features, the rank correlation of the score with the sum of the
            attributions of the features that are there. NaN where all sums or all scores are
            equal, as with one feature.
    """

    curves: RemovalCurves
    random: RemovalCurves
    drops: dict[int, float] = field(default_factory=dict)
    lds: float = math.nan

    @property
    def deletion_area(self) -> float:
        """Mean drop of the score while the most important features go first; larger is better."""
        return float(self.curves.deletion_area)

    @property
    def insertion_area(self) -> float:
        """Mean gain of the score while the most important features come first; larger is better."""
        return float(self.curves.insertion_area)

    @property
    def comprehensiveness(self) -> float:
        """Mean drop without the most important features; larger is better."""
        return float(self.curves.comprehensiveness)

    @property
    def sufficiency(self) -> float:
        """Mean drop with the most important features alone; smaller is better."""
        return float(self.curves.sufficiency)

    @property
    def score_difference(self) -> float:
        """Score of the whole prompt less that of the prompt without features."""
        return float(self.curves.deletion[0, 0] - self.curves.insertion[0, 0])

    def over_random(self) -> dict[str, float]:
        """What each measure has over random order's mean, in units of the score.

        0 is no better than random order; above 0 is better, for sufficiency too, whose sign is
        turned.
        """
        values, random = self.curves.measures(), self.random.measures()
        signs = {"sufficiency": -1.0}
        return {
            name: signs.get(name, 1.0) * float(values[name] - random[name].mean())
            for name in MEASURES
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """Measure → "value", "random" (mean over the random orders) and "spread" (their standard
        deviation, 0 for one), in units of the score."""
        values, random = self.curves.measures(), self.random.measures()
        return {
            name: {
                "value": float(values[name]),
                "random": float(random[name].mean()),
                "spread": float(random[name].std(correction=min(1, len(self.random) - 1))),
            }
            for name in MEASURES
        }

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot both curves over the share of features, and random order's mean and spread.

        Args:
            ax: axes to draw into; None (default) for a new figure.
        """
        curves, random = self.curves, self.random
        return draw_removal_curves(
            (curves.counts / curves.counts[-1]).numpy(),
            {"deletion": curves.deletion[0].numpy(), "insertion": curves.insertion[0].numpy()},
            {"deletion": random.deletion.numpy(), "insertion": random.insertion.numpy()},
            ax,
        )


def faithfulness(
    model: nn.Module,
    tokenizer: Any,
    result: CaptumLLMAttributionResult,
    target: str | Tensor,
    *,
    inp: InterpretableInput | None = None,
    baselines: BaselineSpec = None,
    gen_args: dict[str, Any] | None = None,
    attr_target: str = "log_prob",
    contrast_target: str | Tensor | None = None,
    absolute: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    n_steps: int = MOST_STEPS,
    n_random: int = 10,
    n_masks: int = N_MASKS,
    generator: torch.Generator | None = None,
    internal_batch_size: int | None = None,
    reuse_prefix: bool = True,
    show_progress: bool = False,
) -> Faithfulness:
    """Judge an attribution by what the model does without the features that it calls important.

    Deletion removes the features one after the other, the most important first, and insertion puts
    them into a prompt that has none (Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421).
    Comprehensiveness is the drop of the score without the most important ones, sufficiency the drop
    with them alone (DeYoung et al. 2020, https://arxiv.org/abs/1911.03429). Random orders are the
    yardstick; they come in pairs, an order and its reverse, which need the same prompts. The linear
    datamodeling score asks for more than an order: do sums of attributions rank prompts with a
    half of the features as their scores do (Park et al. 2023, https://arxiv.org/abs/2303.14186;
    Cohen-Wang et al. 2024, https://arxiv.org/abs/2409.00729)?

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        result: an attribution of any method, whose `seq_attr` ranks the features: from the largest
            value to the smallest, so that what lowers the score comes last; of equal ones the
            earlier comes first.
        target: what was attributed: a string or ids (n_output,), as given to `attribute`.
        inp: the input that was attributed. Default: the result's own.
        baselines: of a token input, what stands for an absent token: an id, a token string, "pad",
            "eos", "unk", "nearest", "common" (words), ("text", a text), "remove" (dropped) or ids.
            Default: that of the attribution, or the input's own; for embeddings and lists of
            baselines there is none. A template has its own always, and a callable one is drawn
            once.
        gen_args: as given to `attribute` with an encoder-decoder model: of these
            `forced_bos_token_id` and what else its decoder begins with count.
        attr_target: the score: "log_prob" (the default), "prob" (as in both papers), "logit" or
            "rank"; of the sequence, the sum over target tokens, for "prob" their product.
        contrast_target: score(target) − score(contrast) instead, as given to `attribute`.
        absolute: rank by absolute value.
        fractions: of the features (rounded up), for comprehensiveness and sufficiency. Default:
            those of DeYoung et al.
        n_steps: how many steps all features are removed in at most; they are even.
        n_random: random orders.
        n_masks: random halves of the features, for `lds`.
        generator: draws the random orders, and its seed the halves. Default: one with seed 0.
        internal_batch_size: prompts per pass. Default: chosen by their length.
        reuse_prefix: take what a prompt shares with the whole one from the key/value cache.
        show_progress: show a progress bar.

    Returns:
        A `Faithfulness`: `deletion_area`, `insertion_area`, `comprehensiveness`, `sufficiency`,
        `drops`, `lds`, `over_random()`, `summary()`, `plot()` and the curves themselves, in units
        of the score.

    Raises:
        ValueError: the target is not the result's, the attribution does not fit the input or has
            values that are no numbers, its baseline is not of tokens and `baselines` is not given,
            or an argument has no meaning.
        TypeError: the input is neither of tokens nor a template, or no model or tokenizer came.

    Example:
        >>> result = explain(model, tokenizer, "The capital of France is", " Paris", "ablation")
        >>> judged = faithfulness(model, tokenizer, result, " Paris")
        >>> judged.over_random()["deletion"] > 0
        True
    """
    check_pair(model, tokenizer)
    removal = Removal(absolute, fractions, n_steps, n_random, n_masks)
    with only_one_call(model):
        prompts = open_prompts(
            model,
            tokenizer,
            result.inp if inp is None else inp,
            Request(target, gen_args_of_target(model, gen_args), contrast_target, attr_target),
            baselines,
            reuse_prefix,
            internal_batch_size,
            show_progress,
        )
        generator = generator or torch.Generator().manual_seed(0)
        attr = feature_attr(result, prompts)
        return judgements(removal, prompts, [attr], generator)[0]


def judgements(
    removal: Removal,
    prompts: MaskedPrompts,
    attributions: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Faithfulness]:
    """The faithfulness of each attribution (n_features,), beside the same random orders."""
    curves, random, drops, lds = removal.scored(prompts, attributions, generator)
    return [
        Faithfulness(curves[i : i + 1], random, dict(zip(TOPS, drop, strict=True)), own)
        for i, (drop, own) in enumerate(zip(drops.tolist(), lds.tolist(), strict=True))
    ]
