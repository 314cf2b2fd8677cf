"""Several methods on several prompts: which ones are faithful, and how sure that is."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from captum.attr import LLMAttributionResult as CaptumLLMAttributionResult
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_llm_ext.compat import CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.display import draw_measures
from captum_llm_ext.explaining import Prompt, explain
from captum_llm_ext.inputs.baselines import BaselineSpec
from captum_llm_ext.inputs.prompts import as_input
from captum_llm_ext.inputs.templates import with_drawn_baselines
from captum_llm_ext.metrics.curves import FRACTIONS, MEASURES
from captum_llm_ext.metrics.judging import Faithfulness, judgements
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
from captum_llm_ext.registry import METHODS
from captum_llm_ext.scoring.checks import check_counts
from captum_llm_ext.scoring.tasks import Request, gen_args_of_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Attribute: TypeAlias = Callable[
    [nn.Module, Any, InterpretableInput, Tensor], CaptumLLMAttributionResult
]
Method: TypeAlias = str | tuple[str, Mapping[str, Any]] | Attribute

REMOVED_BY: dict[str, BaselineSpec] = {
    # Each way of taking tokens out favours the methods that share it: judge by all three.
    "pad": "pad",
    "removal": "remove",
    "common words": "common",
}
PLAIN = (*(f"drop@{top}" for top in TOPS), "lds")  # not compared with random orders
DEFAULT_METHODS: tuple[Method, ...] = ("saliency", "gradxact", "ig", "ablation")


@dataclass(frozen=True)
class MethodComparison:
    """The faithfulness of several methods on several prompts.

    Attributes:
        prompts: a row per prompt and method (columns "prompt" and "method"): each measure's value
            and its "… over random" (see `Faithfulness.over_random`), in units of the score; the
            drop without the first features, "drop@1", "drop@3" and "drop@5"; "lds"; and the
            wall-clock "seconds" of the attribution. With `removed_by` a row for each of its ways,
            which "removed by" names.
        table: a row per method, the most faithful on deletion first; for each measure over random,
            each drop and "lds" the columns "mean", "low" and "high", the ends of the bootstrap
            confidence interval of the mean over prompts; and the mean "seconds". With `removed_by`
            the index has the way before the method, so that ``table.loc["removal"]`` is its table.
    """

    prompts: DataFrame
    table: DataFrame

    @classmethod
    def of(
        cls,
        prompts: DataFrame,
        n_bootstrap: int = 2000,
        confidence: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> MethodComparison:
        """The comparison of rows per prompt and method, also of several runs put together.

        Args:
            prompts: as the attribute; names in "prompt" tell the prompts apart.
            n_bootstrap, confidence, generator: as in `compare_methods`.

        Raises:
            ValueError: a prompt lacks a method, or has it twice.
        """
        from pandas import DataFrame, Series

        _check_bootstrap(n_bootstrap, confidence)
        keys = [key for key in ("removed by", "method") if key in prompts]
        n_prompts, n_methods = prompts["prompt"].nunique(), prompts["method"].nunique()
        n_rows = n_prompts * len(prompts[keys].drop_duplicates())
        if n_rows != len(prompts) or prompts.duplicated(["prompt", *keys]).any():
            raise ValueError(
                f"expected a row for each of {n_methods} methods on each of {n_prompts} prompts, "
                f"got {len(prompts)} rows"
            )
        generator = generator or torch.Generator().manual_seed(0)
        drawn = torch.randint(n_prompts, (n_bootstrap, n_prompts), generator=generator).numpy()
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        columns: dict[tuple[str, str], Any] = {}
        over_random = {f"{measure} over random": measure for measure in MEASURES}
        for column, measure in {**over_random, **dict(zip(PLAIN, PLAIN, strict=True))}.items():
            if column not in prompts:
                continue  # kept by an earlier version
            values = prompts.pivot(index="prompt", columns=keys, values=column)
            means = _means(values.to_numpy()[drawn])
            columns[measure, "mean"] = values.mean()
            columns[measure, "low"], columns[measure, "high"] = (
                Series(end, values.columns) for end in np.quantile(means, tails, axis=0)
            )
        columns["seconds", "mean"] = prompts.groupby(keys)["seconds"].mean()
        table = DataFrame(columns).sort_values(("deletion", "mean"), ascending=False)
        if len(keys) > 1:
            table = table.sort_index(level=0, sort_remaining=False, kind="stable")
        else:
            table.index.name = None
        return cls(prompts, table)

    def plot(
        self, measures: Sequence[str] = ("deletion", "insertion"), ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Bars with confidence intervals: what each method has over random order.

        Args:
            measures: any of "deletion", "insertion", "comprehensiveness" and "sufficiency".
            ax: axes to draw into; None (default) for a new figure.
        """
        if not measures or set(measures) - set(MEASURES):
            raise ValueError(f"measures must be among {', '.join(MEASURES)}; got {measures!r}")
        return draw_measures(
            [name if isinstance(name, str) else ": ".join(name) for name in self.table.index],
            {name: self.table[name, "mean"].to_numpy() for name in measures},
            {name: self.table[name][["low", "high"]].to_numpy() for name in measures},
            "over random order, in units of the score",
            ax,
        )


def compare_methods(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    methods: Sequence[Method] | Mapping[str, Method] = DEFAULT_METHODS,
    targets: Sequence[str | Tensor | None] | None = None,
    *,
    gen_args: dict[str, Any] | None = None,
    baselines: BaselineSpec = None,
    attr_target: str = "log_prob",
    absolute: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    n_steps: int = MOST_STEPS,
    n_random: int = 10,
    n_masks: int = N_MASKS,
    removed_by: Mapping[str, BaselineSpec] | None = None,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    internal_batch_size: int | None = None,
    show_progress: bool = False,
) -> MethodComparison:
    """Compare attribution methods by what the score loses or gains without and with features.

    The measures are deletion, insertion, comprehensiveness and sufficiency over random order, the
    drop without the first 1, 3 and 5 features, and the linear datamodeling score (`faithfulness`).
    Every method explains every prompt for the same target, and is judged against the same random
    orders; each distinct prompt is scored once for all methods. Means over prompts are of values
    in units of the score, so give the targets about the same length.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        prompts: strings, lists of messages or interpretable inputs, as `explain` takes them.
        methods: names that `explain` knows, pairs of a name and its options such as
            ``("ig", {"n_steps": 20})``, or functions ``(model, tokenizer, inp, target_ids)`` that
            return a result; a mapping gives them names of your own. Gradient methods attribute
            the sequence alone, unless their options say otherwise.
        targets: of each prompt; None, in the list or for all, is what the model generates.
        gen_args: arguments of ``model.generate``. Default: greedy, 25 new tokens. What an
            encoder-decoder model's decoder begins with holds for given targets too.
        baselines: of token inputs, in the methods (unless their options name one) and when
            features are removed. Default: each input's own, of which a callable one is drawn once.
        attr_target: as in `faithfulness`. The methods always attribute log p.
        absolute: as in `faithfulness`.
        fractions: as in `faithfulness`.
        n_steps: as in `faithfulness`.
        n_random: as in `faithfulness`.
        n_masks: as in `faithfulness`.
        removed_by: name → baseline, the ways in which tokens are taken out to judge, each of them
            for all methods. A judge favours methods that share its way, so judge by several, as
            ``captum_llm_ext.metrics.REMOVED_BY`` has them: "pad", removal, and common words drawn
            for each token. A template has its own baselines always. Default: `baselines` alone.
        internal_batch_size: as in `faithfulness`.
        n_bootstrap: resamples of the prompts, the same for all methods.
        confidence: of the intervals.
        generator: draws random orders and resamples. Default: one with seed 0.
        show_progress: show a progress bar.

    Returns:
        A `MethodComparison` with two tables and a plot.

    Raises:
        ImportError: pandas is missing (the extra ``export``).
        ValueError: no prompts or methods, an unknown method, numbers without a meaning, or a model
            without a language-model head.
        TypeError: no model, or no tokenizer.

    Example:
        >>> prompts, targets = ["The capital of France is", "Two plus two is"], [" Paris", " four"]
        >>> compared = compare_methods(
        ...     model, tokenizer, prompts, ["saliency", "ablation"], targets, n_random=4
        ... )
        >>> list(compared.table.columns.get_level_values(0).unique())[:2]
        ['deletion', 'insertion']

    Source: Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421; DeYoung et al. 2020,
    https://arxiv.org/abs/1911.03429; Park et al. 2023, https://arxiv.org/abs/2303.14186.
    """
    check_pair(model, tokenizer)
    _check_for_pandas()
    _check_bootstrap(n_bootstrap, confidence)
    beginning = gen_args_of_target(model, gen_args)
    named = _named(methods, baselines, beginning)
    ways = [({}, baselines)] if removed_by is None else _ways(removed_by)
    removal = Removal(absolute, fractions, n_steps, n_random, n_masks)
    generator = generator or torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    pairs = list(zip(prompts, _targets(prompts, targets), strict=True))
    with only_one_call(model):
        for number, (prompt, target) in enumerate(tqdm(pairs, disable=not show_progress)):
            inp = with_drawn_baselines(as_input(prompt, tokenizer))
            request = Request(
                target, beginning if target is not None else gen_args, attr_target=attr_target
            )
            judges = []
            for way, baseline in ways:
                if not isinstance(inp, CaptumTextTokenInput):
                    baseline = None
                options = (baseline, True, internal_batch_size)
                masked = open_prompts(model, tokenizer, inp, request, *options)
                judges.append((way, masked))
                request = replace(request, target=masked.scorer.target.ids, gen_args=beginning)
            judged = _judged(model, tokenizer, inp, judges, named, removal, generator)
            rows += [{"prompt": number, **row} for row in judged]
    import pandas

    return MethodComparison.of(pandas.DataFrame(rows), n_bootstrap, confidence, generator)


def _judged(
    model: nn.Module,
    tokenizer: Any,
    inp: InterpretableInput,
    judges: Sequence[tuple[dict[str, str], MaskedPrompts]],
    methods: Mapping[str, Attribute],
    removal: Removal,
    generator: torch.Generator,
) -> Iterator[dict[str, Any]]:
    """A row of each way and method: its measures and its seconds; all ways have the same orders."""
    masked = judges[0][1]
    attributions, seconds = [], []
    for method in methods.values():
        start = time.perf_counter()
        result = method(model, tokenizer, inp, masked.scorer.target.ids.clone())
        seconds.append(time.perf_counter() - start)
        attributions.append(feature_attr(result, masked))
    state = generator.get_state()
    for way, masked in judges:
        generator.set_state(state)
        judged = judgements(removal, masked, attributions, generator)
        for name, one, taken in zip(methods, judged, seconds, strict=True):
            yield {**way, "method": name, **_row(one), "seconds": taken}


def _ways(removed_by: Mapping[str, BaselineSpec]) -> list[tuple[dict[str, str], BaselineSpec]]:
    """The columns that name a way, and its baseline."""
    if not isinstance(removed_by, Mapping) or not removed_by:
        raise ValueError(
            "expected removed_by to be a dict of names and baselines, such as "
            f"{{'pad': 'pad', 'removal': 'remove'}}; got {removed_by!r}"
        )
    return [({"removed by": str(name)}, baseline) for name, baseline in removed_by.items()]


def _named(
    methods: Sequence[Method] | Mapping[str, Method],
    baselines: BaselineSpec,
    gen_args: dict[str, Any] | None,
) -> dict[str, Attribute]:
    """Name → function; without names of the caller's own, the method's with its options."""
    if not isinstance(methods, Mapping):
        names = [_name(method) for method in methods]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"methods must differ, got {', '.join(repeated)} more than once")
        methods = dict(zip(names, methods, strict=True))
    if not methods:
        raise ValueError("expected at least one method, got none")
    return {name: _as_function(method, baselines, gen_args) for name, method in methods.items()}


def _name(method: Method) -> str:
    if isinstance(method, str):
        return method
    if callable(method):
        return str(getattr(method, "__name__", type(method).__name__))
    name, options = method
    return " ".join([name, *(f"{key}={value}" for key, value in options.items())])


def _as_function(
    method: Method, baselines: BaselineSpec, gen_args: dict[str, Any] | None
) -> Attribute:
    if callable(method):
        return method
    name, options = (method, {}) if isinstance(method, str) else method
    if name not in METHODS:
        raise ValueError(f"expected a method among {', '.join(METHODS)}; got {name!r}")
    row = METHODS[name]

    def attribute(
        model: nn.Module, tokenizer: Any, inp: InterpretableInput, target: Tensor
    ) -> CaptumLLMAttributionResult:
        defaults = {"gen_args": gen_args, **row.wrapped_by.sequence_only}
        if baselines is not None and row.takes_baselines and isinstance(inp, CaptumTextTokenInput):
            defaults["baselines"] = baselines
        return explain(model, tokenizer, inp, target, name, **{**defaults, **options})

    return attribute


def _targets(
    prompts: Sequence[Prompt], targets: Sequence[str | Tensor | None] | None
) -> Sequence[str | Tensor | None]:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
    if targets is None:
        return [None] * len(prompts)
    if isinstance(targets, str) or len(targets) != len(prompts):
        raise ValueError(f"expected a target for each of {len(prompts)} prompts, got {targets!r}")
    return targets


def _row(judged: Faithfulness) -> dict[str, float]:
    over = {f"{name} over random": value for name, value in judged.over_random().items()}
    plain = dict(zip(PLAIN, [*judged.drops.values(), judged.lds], strict=True))
    return {name: one["value"] for name, one in judged.summary().items()} | over | plain


def _means(drawn: np.ndarray) -> np.ndarray:
    """(n_bootstrap, n_methods) means over resampled prompts; NaN marks a prompt without a value."""
    known = ~np.isnan(drawn)
    counts = known.sum(1)
    return np.where(counts > 0, np.where(known, drawn, 0).sum(1), np.nan) / np.maximum(counts, 1)


def _check_for_pandas() -> None:
    if importlib.util.find_spec("pandas") is None:
        raise ImportError(
            "compare_methods needs pandas: pip install 'captum-llm-ext[export]'", name="pandas"
        )


def _check_bootstrap(n_bootstrap: int, confidence: float) -> None:
    check_counts(n_bootstrap=n_bootstrap)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
