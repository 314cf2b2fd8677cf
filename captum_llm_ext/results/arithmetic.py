"""Results as values: sums, differences, multiples, means and shares.

Every operation here is a weighted sum of results, field by field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.values import equal

if TYPE_CHECKING:
    from typing_extensions import Self

_Result = TypeVar("_Result", bound="ArithmeticMixin")

# What a weighted sum of results has the weighted sum of, and what it has where all have the same.
_SUMMED = (
    "seq_attr",
    "token_attr",
    "layer_seq_attr",
    "layer_token_attr",
    "hidden_attr",
    "convergence_delta",
)
_SHARED = (
    "input_tokens",
    "output_tokens",
    "output_labels",
    "layer_names",
    "layer_mode",
    "output_probs",
    "starts_prompt",
    "inp",
)
# Results are of the same input where these agree.
_SAME = {
    "input_tokens": "input token",
    "output_tokens": "output token",
    "layer_names": "layer",
    "layer_mode": "mode",
}


class ArithmeticMixin:
    """Sums, differences, multiples, means and shares of results of the same input and target."""

    input_tokens: list[str]
    output_tokens: list[str]
    provenance: Provenance | None
    _of_sums: ClassVar[type | None] = None  # class of sums; None: the same

    if TYPE_CHECKING:

        @property
        def seq_attr(self) -> Tensor: ...

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, ArithmeticMixin):
            return NotImplemented
        return weighted_sum([self, other], [1.0, 1.0], "+")

    def __sub__(self, other: Self) -> Self:
        if not isinstance(other, ArithmeticMixin):
            return NotImplemented
        return weighted_sum([self, other], [1.0, -1.0], "-")

    def __mul__(self, factor: float) -> Self:
        if not isinstance(factor, Real):
            return NotImplemented
        return weighted_sum([self], [float(factor)])

    def __rmul__(self, factor: float) -> Self:
        return self * factor

    def normalise(self) -> Self:
        """The result divided by the sum of the magnitudes of `seq_attr`, so that these sum to 1.

        Rows of tokens and layers are divided by the same number. A result of zeros stays as it is.

        Example:
            >>> result = LLMAttributionResult(
            ...     input_tokens=["a", "b"], output_tokens=["c"], seq_attr=[3.0, -1.0]
            ... )
            >>> result.normalise().seq_attr
            tensor([ 0.7500, -0.2500])
        """
        total = float(self.seq_attr.abs().sum())
        shares = weighted_sum([self], [1.0 / total if total else 1.0])
        shares.norm = None  # type: ignore[attr-defined]  # shares have no unit
        return shares

    @classmethod
    def mean(cls, results: Sequence[Self]) -> Self:
        """The mean of results of one input, of several models, methods or random draws.

        Args:
            results: one or more, of the same input and target.

        Returns:
            A result whose `spread` (n_input,) is the standard deviation of `seq_attr` over the
            results (with n - 1; None for a single one). Its bar plot has it as intervals.

        Raises:
            ValueError: there is none, or they differ in their input or target; the message says
                where.
        """
        listed = list(results)
        if not listed:
            raise ValueError("mean: expected at least one result, got none")
        mean = weighted_sum(listed, [1.0 / len(listed)] * len(listed), "mean")
        if len(listed) > 1:
            mean.spread = torch.stack([r.seq_attr.cpu() for r in listed]).std(0)  # type: ignore[attr-defined]
        return mean


def weighted_sum(results: Sequence[_Result], weights: Sequence[float], sign: str = "") -> _Result:
    """Σ weight · result. Attention results give a result without layers and weights.

    sign: between the names of the methods, in the provenance.

    Raises:
        ValueError: the results are not of one input and target.
    """
    first = results[0]
    for other in results[1:]:
        check_same(first, other)
    fields = {name: _summed(results, weights, name) for name in _SUMMED if hasattr(first, name)}
    for name in _SHARED:
        if hasattr(first, name):
            value = getattr(first, name)
            same = all(equal(value, getattr(r, name)) for r in results) if name != "inp" else True
            fields[name] = value if same else None
    if len(results) == 1 and weights[0] >= 0:
        fields["norm"] = getattr(first, "norm", None)
    kind: Any = first._of_sums or type(first)
    if kind is first._of_sums:
        layered = ("layer_names", "layer_mode", "layer_seq_attr", "layer_token_attr")
        fields = {name: value for name, value in fields.items() if name not in layered}
    elif hasattr(first, "layer_names"):  # these follow from those of the layers
        fields = {n: v for n, v in fields.items() if n not in ("seq_attr", "token_attr")}
    result: _Result = kind(**fields, provenance=_common([r.provenance for r in results], sign))
    return result


def check_same(one: Any, other: Any) -> None:
    """Refuse results that are not of one input and target.

    Raises:
        ValueError: the message says where they differ.
    """
    if type(one) is not type(other):
        raise ValueError(
            f"expected results of one kind, got {type(one).__name__} and {type(other).__name__}"
        )
    for name, noun in _SAME.items():
        ours, theirs = getattr(one, name, None), getattr(other, name, None)
        if ours != theirs:
            raise ValueError(
                f"expected results of the same input: {_difference(ours, theirs, noun)}"
            )
    if one.norm != other.norm:
        raise ValueError(
            f"expected values of one kind, got norm={one.norm!r} and norm={other.norm!r}: norms of "
            "gradients and attributions have different units, so normalise() each result first"
        )
    for name in ("token_attr", "layer_token_attr"):
        if (getattr(one, name, None) is None) != (getattr(other, name, None) is None):
            raise ValueError(
                f"expected results with the same rows: only one of them has {name}; attribute "
                "both with or without include_per_token_attr"
            )


def _difference(ours: Any, theirs: Any, noun: str) -> str:
    """Where two lists differ first."""
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return f"their {noun} is {ours!r} and {theirs!r}"
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return f"{noun} {i} is {mine!r} in one and {other!r} in the other"
    return f"one has {len(ours)} {noun}s, the other {len(theirs)}"


def _summed(results: Sequence[Any], weights: Sequence[float], name: str) -> Any:
    values = [getattr(result, name) for result in results]
    if any(value is None for value in values) or len({_shape(value) for value in values}) > 1:
        return None
    if isinstance(values[0], dict):
        keys = [key for key in values[0] if all(value.get(key) is not None for value in values)]
        return {key: _weighted([value[key] for value in values], weights) for key in keys} or None
    return _weighted(values, weights)


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    device = values[0].device
    parts = [weight * value.to(device) for value, weight in zip(values, weights, strict=True)]
    return torch.stack(parts).sum(0)


def _common(known: Sequence[Provenance | None], sign: str) -> Provenance | None:
    """What all results say alike; methods, models and evaluations that differ are combined."""
    listed = [one for one in known if one is not None]
    if len(listed) < len(known):
        return None
    if len(listed) == 1:
        return listed[0]
    first = listed[0]
    same = {
        name: value if all(getattr(one, name) == value for one in listed) else None
        for name, value in vars(first).items()
    }
    joined = {
        name: _joined([getattr(one, name) for one in listed], sign) for name in ("method", "model")
    }
    evaluations = [one.evaluations for one in listed if one.evaluations is not None]
    seconds = [one.seconds for one in listed if one.seconds is not None]
    empty: dict[str, Any] = {name: {} for name in ("options", "versions") if same[name] is None}
    return replace(
        Provenance(**{**same, **empty}),
        **joined,  # type: ignore[arg-type]
        evaluations=sum(evaluations) if evaluations else None,
        seconds=sum(seconds) if seconds else None,
    )


def _joined(names: Sequence[str | None], sign: str) -> str | None:
    distinct = list(dict.fromkeys(name or "unknown" for name in names))
    if len(distinct) == 1:
        return names[0]
    return f"mean of {', '.join(distinct)}" if sign == "mean" else f" {sign} ".join(distinct)
