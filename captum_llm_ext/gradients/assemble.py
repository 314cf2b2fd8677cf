"""From the attributions of layers at token positions to the result, one column per feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.gradients.methods import NORMS
from captum_llm_ext.gradients.quadrature import NEAR_START
from captum_llm_ext.gradients.totals import LayerTotal
from captum_llm_ext.inputs.features import Features
from captum_llm_ext.model.layers import Site
from captum_llm_ext.results import LLMAttributionResult, LLMLayerAttributionResult
from captum_llm_ext.warning import warn

ACCEPTED_DELTA = 0.10


@dataclass(frozen=True)
class LayerColumns:
    """A layer's attributions by feature.

    seq_attr: (n_input,); token_attr: (n_output, n_input) or None; hidden_attr: (n_output,
    n_input, hidden) or None; delta and difference: (n_output,), or (1,) of the sequence, or None;
    misses: see `PathFacts`; norm: of gradients of which the values are, None where they add up;
    score_path: (2, n_points), points of the path and the sequence score there, or None; leap: see
    `PathFacts`.
    """

    seq_attr: Tensor
    token_attr: Tensor | None
    hidden_attr: Tensor | None
    delta: Tensor | None
    difference: Tensor | None
    misses: Tensor | None
    n_evaluations: int | None
    converged: bool | None
    norm: str | None
    score_path: Tensor | None
    leap: float


def layer_columns(
    total: LayerTotal, features: Features, per_token: bool, keep_hidden: bool
) -> LayerColumns:
    """Positions summed (norms: combined) to features, and the sums against score differences."""
    column_of = features.column_at(total.cut + total.tokens.size(1))[total.cut :]

    def columns(values: Tensor) -> Tensor:
        return by_feature(values, features, total.norm, total.cut)

    hidden = total.hidden if per_token else total.sequence[None]
    difference, facts = total.score_difference, total.facts
    sums = None if difference is None else total.sums()[: len(difference)]
    return LayerColumns(
        seq_attr=columns(NORMS[total.norm](total.sequence)),
        token_attr=columns(total.tokens) if per_token else None,
        hidden_attr=_sum_hidden(hidden, column_of, features) if keep_hidden else None,
        delta=None if sums is None or difference is None else sums - difference,
        difference=difference,
        misses=facts.misses,
        n_evaluations=facts.n_evaluations or None,
        converged=facts.converged,
        norm=None if total.norm == "sum" else total.norm,
        score_path=_score_path(total),
        leap=facts.leap,
    )


def _score_path(total: LayerTotal) -> Tensor | None:
    known = total.is_integral and total.facts.scores
    return torch.tensor(sorted(total.facts.scores.items())).T if known else None


def single_result(
    columns: LayerColumns, features: Features, output_tokens: list[str], inp: InterpretableInput
) -> LLMAttributionResult:
    return LLMAttributionResult(
        input_tokens=features.names,
        output_tokens=output_tokens,
        seq_attr=columns.seq_attr,
        token_attr=columns.token_attr,
        convergence_delta=columns.delta,
        hidden_attr=columns.hidden_attr,
        n_evaluations=columns.n_evaluations,
        converged=columns.converged,
        score_path=columns.score_path,
        norm=columns.norm,
        inp=inp,
    )


def layered_result(
    by_site: Mapping[Site, LayerColumns],
    layer_mode: str,
    features: Features,
    output_tokens: list[str],
    inp: InterpretableInput,
) -> LLMLayerAttributionResult:
    layers = list(by_site.values())
    return LLMLayerAttributionResult(
        input_tokens=features.names,
        output_tokens=output_tokens,
        layer_names=[site.name for site in by_site],
        layer_seq_attr=torch.stack([layer.seq_attr for layer in layers]),
        layer_token_attr=_stack([layer.token_attr for layer in layers]),
        layer_mode=layer_mode,
        convergence_delta=_stack_deltas(layers, layer_mode),
        hidden_attr=_hidden_by_name(by_site),
        layer_n_evaluations=[layer.n_evaluations for layer in layers],
        layer_converged=[layer.converged for layer in layers],
        layer_score_paths=[layer.score_path for layer in layers],
        norm=layers[0].norm,
        inp=inp,
    )


def warn_unless_converged(
    layers: Sequence[LayerColumns], joint: bool, output_tokens: Sequence[str]
) -> None:
    """Warn once where attributions miss the score difference that they ought to sum to."""
    layers = layers[:1] if joint else layers
    relative = _stack([layer.misses for layer in layers])
    if relative is None:
        return
    # Of one target token the sequence is the token.
    relative = relative[:, :1] if len(output_tokens) == 1 else relative
    unmet = sum(layer.converged is False for layer in layers)
    if unmet or (relative > ACCEPTED_DELTA).any():
        warn(_not_converged(relative, unmet, output_tokens))


def warn_of_leaps(layers: Sequence[LayerColumns]) -> None:
    """Warn once where the path starts with a leap: no rule sees it, whatever the sums are."""
    leap = max((layer.leap for layer in layers if layer.difference is not None), default=0.0)
    if leap:
        warn(
            f"the path leaps at its baseline: {leap:.0%} of the score difference falls on its "
            f"first {NEAR_START:g}. There integrated gradients are not reliable, even where "
            'they add up. Choose another baseline ("mean", "pad" or a token; from "zero" models '
            "that normalise first do this)",
        )


def check_totals(by_site: Mapping[Site, LayerTotal]) -> None:
    """Refuse attributions that are no numbers: in float16 gradients can overflow."""
    for site, total in by_site.items():
        if not (total.tokens.isfinite().all() and total.sequence.isfinite().all()):
            raise ValueError(
                f"the attribution of {site.name!r} is not finite: gradients overflow in float16; "
                "load the model in bfloat16 or float32"
            )


def warn_of_zeros(by_site: Mapping[Site, LayerTotal]) -> None:
    """Warn where a layer that sees the tokens has no gradient at all: something cuts it off."""
    zero = [site.name for site, total in by_site.items() if total.is_cut_off]
    if zero:
        warn(
            f"no gradient reaches {', '.join(zero[:3])}{' …' if len(zero) > 3 else ''}: its "
            "attribution is zero everywhere. A layer after it cuts the gradient off, as quantised "
            "layers without a backward do (4-bit layers on a CPU after a pass without gradients)",
        )


def _not_converged(relative: Tensor, unmet: int, output_tokens: Sequence[str]) -> str:
    worst = int(relative.amax(0).argmax())
    per_token = relative.size(1) >= len(output_tokens)
    named = per_token and worst < len(output_tokens)
    what = repr(output_tokens[worst]) if named else "the sequence"
    if unmet:
        return (
            f"integrated gradients have not converged: max_rows was spent first on {unmet} of "
            f"{len(relative)} paths; the worst sum of attributions misses the score difference by "
            f"{float(relative.max()):.0%} (at {what}). Raise max_rows or tol, or choose another "
            "baseline"
        )
    return (
        f"integrated gradients have not converged: {int((relative > ACCEPTED_DELTA).sum())} of "
        f"{relative.numel()} sums of attributions miss the score difference by more than 10 %, "
        f"worst by {float(relative.max()):.0%} (at {what}). Raise n_steps, choose another "
        'baseline, or use method="adaptive" (quadrature="adaptive" in explain, --adaptive in the '
        "terminal)"
    )


def _joint_delta(layers: Sequence[LayerColumns]) -> Tensor:
    """Several layers on one path share one score difference, which every delta subtracts."""
    sums = torch.stack([x.delta + x.difference for x in layers]).sum(0)  # type: ignore[operator]
    return sums - layers[0].difference  # type: ignore[operator]


def _stack_deltas(layers: Sequence[LayerColumns], layer_mode: str) -> Tensor | None:
    deltas = _stack([layer.delta for layer in layers])
    return _joint_delta(layers) if deltas is not None and layer_mode == "joint" else deltas


def _hidden_by_name(by_site: Mapping[Site, LayerColumns]) -> dict[str, Tensor] | None:
    hidden = {s.name: x.hidden_attr for s, x in by_site.items() if x.hidden_attr is not None}
    return hidden or None


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present and len(present) == len(tensors) else None


def by_feature(values: Tensor, features: Features, norm: str = "sum", cut: int = 0) -> Tensor:
    """(…, length) per position from `cut` on to (…, n_input) per feature."""
    column_of = features.column_at(cut + values.size(-1))[cut:]
    return _by_column(values, column_of, features.n_columns, norm)[..., features.column_of]


def _by_column(values: Tensor, column_of: Tensor, n_columns: int, norm: str) -> Tensor:
    """(…, length) per position to (…, n_columns) per feature; column -1 is left out."""
    if norm == "linf":
        index = torch.where(column_of < 0, n_columns, column_of).expand_as(values)
        grouped = values.new_zeros(*values.shape[:-1], n_columns + 1)
        return grouped.scatter_reduce(-1, index, values, "amax")[..., :n_columns]
    values = values.square() if norm == "l2" else values
    kept = column_of >= 0
    grouped = values.new_zeros(*values.shape[:-1], n_columns)
    grouped.index_add_(-1, column_of[kept], values[..., kept])
    return grouped.sqrt() if norm == "l2" else grouped


def _sum_hidden(hidden: Tensor | None, column_of: Tensor, features: Features) -> Tensor | None:
    """(n_output, length, hidden) per position to (n_output, n_input, hidden) per feature."""
    if hidden is None:
        return None
    kept = column_of >= 0
    grouped = hidden.new_zeros(hidden.size(0), features.n_columns, hidden.size(2))
    grouped.index_add_(1, column_of[kept], hidden[:, kept])
    return grouped[:, features.column_of]
