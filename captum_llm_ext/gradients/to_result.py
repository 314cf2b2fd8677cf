"""From the totals of layers at token positions to the result, one column per feature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.gradients.adaptive import NEAR_START
from captum_llm_ext.gradients.method import NORMS
from captum_llm_ext.gradients.totals import LayerTotal
from captum_llm_ext.inputs.statements import Statements
from captum_llm_ext.model.layers import Site
from captum_llm_ext.results.layered import LLMLayerAttributionResult
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.warning import warn

ACCEPTED_DELTA = 0.10


def to_result(
    totals: Mapping[Site, LayerTotal],
    several: bool,
    layer_mode: str,
    keep_hidden: bool,
    output_tokens: list[str],
    output_labels: list[str] | None,
    inp: InterpretableInput,
    provenance: Provenance,
    statements: Statements | None = None,
) -> LLMAttributionResult:
    """The result of one layer, or of several; of statements, a row for each instead of tokens."""
    attributions = [_by_feature(total, keep_hidden, statements) for total in totals.values()]
    if statements is not None:
        output_tokens, output_labels = statements.texts, None
    names = next(iter(totals.values())).positions.features.names
    shared: dict[str, Any] = {
        "input_tokens": names,
        "output_tokens": output_tokens,
        "output_labels": output_labels,
        "norm": attributions[0].norm,
        "inp": inp,
        "provenance": provenance,
    }
    if not several:
        one = attributions[0]
        return LLMAttributionResult(
            **shared,
            seq_attr=one.seq_attr,
            token_attr=one.token_attr,
            convergence_delta=one.delta,
            hidden_attr=one.hidden_attr,
            n_evaluations=one.n_evaluations,
            converged=one.converged,
            score_path=one.score_path,
        )
    layer_names = [site.name for site in totals]
    hidden = dict(zip(layer_names, (a.hidden_attr for a in attributions), strict=True))
    return LLMLayerAttributionResult(
        **shared,
        layer_names=layer_names,
        layer_seq_attr=torch.stack([a.seq_attr for a in attributions]),
        layer_token_attr=_stack(a.token_attr for a in attributions),
        layer_mode=layer_mode,
        convergence_delta=_deltas(attributions, layer_mode),
        hidden_attr={name: h for name, h in hidden.items() if h is not None} or None,
        layer_n_evaluations=[a.n_evaluations for a in attributions],
        layer_converged=[a.converged for a in attributions],
        layer_score_paths=[a.score_path for a in attributions],
    )


@dataclass(frozen=True)
class _LayerAttribution:
    """A layer's attributions by feature, and what the result says of its path.

    seq_attr: (n_input,); token_attr: (n_output, n_input) or None; hidden_attr: (n_output, n_input,
    hidden) or None; delta and difference: (n_output,), or (1,) of the sequence, or None; norm: the
    norm of gradients that the values are, None where they add up; score_path: (2, n_points), points
    of the path and the sequence score there, or None.
    """

    seq_attr: Tensor
    token_attr: Tensor | None
    hidden_attr: Tensor | None
    delta: Tensor | None
    difference: Tensor | None
    n_evaluations: int | None
    converged: bool | None
    norm: str | None
    score_path: Tensor | None


def _by_feature(
    total: LayerTotal, keep_hidden: bool, statements: Statements | None
) -> _LayerAttribution:
    """Positions summed (norms: combined) to features, and the sums against score differences."""
    positions, record, norm = total.positions, total.record, total.norm
    difference = total.score_difference
    delta = None if difference is None else total.sums()[: len(difference)] - difference
    hidden = total.hidden if total.per_token else total.sequence[None]
    tokens = total.tokens
    if statements is not None:
        hidden = None if hidden is None else statements.sums(hidden)
        # The norm of a sum is not the sum of norms.
        tokens = statements.sums(tokens) if norm == "sum" else NORMS[norm](hidden)  # type: ignore[arg-type]
        delta, difference = (
            None if values is None else statements.sums(values) for values in (delta, difference)
        )
    scores = sorted(record.scores.items()) if total.sums_to_difference else []
    return _LayerAttribution(
        seq_attr=positions.by_feature(NORMS[norm](total.sequence), norm),
        token_attr=positions.by_feature(tokens, norm) if total.per_token else None,
        hidden_attr=(
            positions.hidden_by_feature(hidden) if keep_hidden and hidden is not None else None
        ),
        delta=delta,
        difference=difference,
        n_evaluations=record.n_evaluations or None,
        converged=record.converged,
        norm=None if norm == "sum" else norm,
        score_path=torch.tensor(scores).T if scores else None,
    )


def _deltas(layers: Sequence[_LayerAttribution], layer_mode: str) -> Tensor | None:
    """Each layer's delta; layers on one path share one score difference, and so one delta."""
    deltas = _stack(layer.delta for layer in layers)
    if deltas is None or layer_mode != "joint":
        return deltas
    shared = layers[0].difference
    return (deltas + _stack(layer.difference for layer in layers)).sum(0) - shared  # type: ignore[operator]


def _stack(tensors: Iterable[Tensor | None]) -> Tensor | None:
    tensors = list(tensors)
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present and len(present) == len(tensors) else None


def check_totals(
    totals: Mapping[Site, LayerTotal],
    checked: Sequence[Site],
    joint: bool,
    output_tokens: Sequence[str],
) -> None:
    """Refuse attributions that are not finite, and warn of what they cannot be relied on for.

    checked: the layers whose attributions ought to sum to a score difference.
    """
    for site, total in totals.items():
        if not (total.tokens.isfinite().all() and total.sequence.isfinite().all()):
            raise ValueError(
                f"the attribution of {site.name!r} is not finite: gradients overflow in float16; "
                "load the model in bfloat16 or float32"
            )
    cut_off = [site.name for site, total in totals.items() if total.is_cut_off]
    if cut_off:
        warn(
            f"no gradient reaches {', '.join(cut_off[:3])}{' …' if len(cut_off) > 3 else ''}: its "
            "attribution is zero everywhere. A layer after it cuts the gradient off, as quantised "
            "layers without a backward do (4-bit layers on a CPU after a pass without gradients); "
            "and attention does under the rules 'cp' of relevance, for queries and keys",
        )
    on_path = [totals[site] for site in checked if totals[site].sums_to_difference]
    _warn_of_leaps(on_path)
    _warn_unless_converged(on_path[:1] if joint else on_path, output_tokens)


def _warn_of_leaps(layers: Sequence[LayerTotal]) -> None:
    """Warn once where a path starts with a leap: no rule sees it, whatever the sums are."""
    leap = max((layer.record.leap for layer in layers), default=0.0)
    if leap:
        warn(
            f"the path leaps at its baseline: {leap:.0%} of the score difference falls on its "
            f"first {NEAR_START:g}. There integrated gradients are not reliable, even where "
            'they add up. Choose another baseline ("mean", "pad" or a token; from "zero" models '
            "that normalise first do this)",
        )


def _warn_unless_converged(layers: Sequence[LayerTotal], output_tokens: Sequence[str]) -> None:
    """Warn once where attributions miss the score difference that they ought to sum to."""
    misses = _stack(layer.record.misses for layer in layers)
    if misses is None:
        return
    if len(output_tokens) == 1:  # the sequence is the token
        misses = misses[:, :1]
    unmet = sum(layer.record.converged is False for layer in layers)
    if unmet or (misses > ACCEPTED_DELTA).any():
        warn(_not_converged(misses, unmet, output_tokens))


def _not_converged(misses: Tensor, unmet: int, output_tokens: Sequence[str]) -> str:
    worst, largest = int(misses.amax(0).argmax()), float(misses.max())
    per_token = misses.size(1) >= len(output_tokens)
    is_token = per_token and worst < len(output_tokens)
    where = repr(output_tokens[worst]) if is_token else "the sequence"
    if unmet:
        return (
            f"integrated gradients have not converged: max_evaluations was spent first on {unmet} "
            f"of {len(misses)} paths; the worst sum of attributions misses the score difference by "
            f"{largest:.0%} (at {where}). Raise max_evaluations or tol, or choose another baseline"
        )
    return (
        f"integrated gradients have not converged: {int((misses > ACCEPTED_DELTA).sum())} of "
        f"{misses.numel()} sums of attributions miss the score difference by more than 10 %, "
        f"worst by {largest:.0%} (at {where}). Raise n_steps, choose another "
        'baseline, or use method="adaptive" (quadrature="adaptive" in explain, --adaptive in the '
        "terminal)"
    )
