"""Where a result comes from: its method, model, target and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LONGEST = 160  # characters of a value in the foot of a page


@dataclass(frozen=True)
class Provenance:
    """What made a result: enough to make it again, and to tell it from another.

    Results by the wrappers, `explain` and `batch` have it as `provenance`. It does not count when
    results are compared, and `seconds` does not count when two of these are.

    Args:
        method: the name that `explain` has for the method; of another class its name.
        options: what the caller chose, as JSON values: settings of the method, its layers, and
            arguments of `attribute` that are not the default. Arguments that change no value, such
            as `internal_batch_size`, are left out.
        baseline: what stood for absent features, as a JSON value; None for methods without one.
        score: what is attributed: "log_prob", "prob", "logit" or "rank"; None for attention.
        model: name of the model, or of its folder.
        model_class: name of its class.
        dtype: dtype of its weights, such as "float32".
        quantization: "nf4", "int8" or another kind; None for weights that are not quantised.
        tokenizer: name of the tokenizer, or of its folder.
        target_ids: ids of the target, (n_output,); of a question answering model its positions.
        versions: package → version, of this package, captum, torch and transformers.
        evaluations: gradients that were taken along the path, or prompts that were scored; 1 for
            methods of one pass.
        seconds: wall time of the call, with generation. None in the records of `batch`.

    Raises:
        TypeError: a value is not of its kind.
        ValueError: options or baseline are not JSON values.

    Example:
        >>> Provenance(method="saliency", score="log_prob", model="SmolLM2").summary()
        'log_prob of SmolLM2'
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    baseline: Any = None
    score: str | None = None
    model: str | None = None
    model_class: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    tokenizer: str | None = None
    target_ids: Sequence[int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluations: int | None = None
    seconds: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in _TEXTS:
            _check(name, getattr(self, name), str)
        _check("evaluations", self.evaluations, int)
        _check("seconds", self.seconds, int, float)
        _check("target_ids", self.target_ids, tuple, list)
        _check("options", self.options, dict)
        _check("versions", self.versions, dict)
        if self.target_ids is not None:
            object.__setattr__(self, "target_ids", tuple(self.target_ids))
        for number in self.target_ids or ():
            _check("target_ids", number, int)
        for text in (*self.options, *self.versions, *self.versions.values()):
            _check("options and versions", text, str)
        try:
            json.dumps([self.options, self.baseline, self.seconds], allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"options, baseline: expected JSON values; {error}") from None

    def summary(self) -> str:
        """What is said beside the method: the score and the model."""
        return " of ".join(filter(None, [self.score, self.model or self.model_class]))

    def lines(self) -> list[str]:
        """What is known, in four short lines: method, model, target and work, versions."""
        options = {"baseline": self.baseline, **self.options}
        chosen = [f"{name} {_short(value)}" for name, value in options.items() if value is not None]
        what = " of ".join(filter(None, [self.method, self.score]))
        kind = [self.model_class, self.dtype, self.quantization]
        tokenizer = None if self.tokenizer == self.model else self.tokenizer
        work = [
            None if self.target_ids is None else f"target ids {_short(list(self.target_ids))}",
            None if self.evaluations is None else f"evaluations {self.evaluations}",
            None if self.seconds is None else f"seconds {self.seconds:.3g}",
        ]
        groups: list[list[str | None]] = [
            [what, *chosen],
            [self.model, *kind, tokenizer and f"tokenizer {tokenizer}"],
            work,
            [f"{name} {version}" for name, version in self.versions.items()],
        ]
        return [", ".join(filter(None, group)) for group in groups if any(group)]


_TEXTS = ("method", "score", "model", "model_class", "dtype", "quantization", "tokenizer")


def _check(name: str, value: Any, *kinds: type) -> None:
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: expected {expected}, got {value!r}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
