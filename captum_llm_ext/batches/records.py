"""The record of a line: its result, or why it has none."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from captum_llm_ext.batches.journal import Record
from captum_llm_ext.batches.lines import Line, identity, read_prompt
from captum_llm_ext.explaining import Layers, explain
from captum_llm_ext.model.random_state import seeded
from captum_llm_ext.warning import warn


@dataclass(frozen=True)
class Explainer:
    """The model and what is asked of every line alike."""

    model: nn.Module
    tokenizer: Any
    method: str
    layers: Layers | None
    by: str
    roles: Sequence[str]
    target: str | None
    seed: int
    options: Mapping[str, Any]

    def record(self, line: Line) -> Record:
        """The record of a line: "status" "ok" with its result, or "error" with what went wrong.

        Raises:
            RuntimeError: the GPU is left unusable, so that no further line could be right.
        """
        head = {"line": line.number, "id": identity(line)}
        try:
            with seeded(self.seed, line.number):
                return head | {"status": "ok", "result": json.loads(self._result(line))}
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            about = {"type": type(error).__name__, "message": " ".join(str(error).split())}
            return head | {"status": "error", "error": about}

    def _result(self, line: Line) -> str:
        asked = read_prompt(line, self.tokenizer, self.by, self.roles, self.target)
        options = {**self.options, **asked.options}
        if asked.target is not None:
            options.pop("gen_args", None)
        result = explain(
            self.model,
            self.tokenizer,
            asked.inp,
            asked.target,
            self.method,
            self.layers,
            **options,
        )
        return result.to_json()


@dataclass
class Warner:
    """Passes warnings on, of each kind the first, with the line that it came from."""

    seen: set[str] = field(default_factory=set)

    @contextmanager
    def of_line(self, number: int) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            yield
        for warning in caught:
            kind = re.sub(r"[-+.\d]+|'.*?'", "", str(warning.message))
            if kind not in self.seen:
                self.seen.add(kind)
                warn(f"line {number}: {warning.message}", warning.category)
