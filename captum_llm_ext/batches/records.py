"""The record of a line: its result, or the error that it ended in."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from captum_llm_ext.batches.journal import Record
from captum_llm_ext.batches.lines import Line, identity, read_prompt
from captum_llm_ext.explaining import Layers, explain
from captum_llm_ext.model.random_state import seeded
from captum_llm_ext.scoring.tasks import gen_args_of_target
from captum_llm_ext.warning import warn


@dataclass(frozen=True)
class Explainer:
    """The model, and the part of the request that all lines share."""

    model: nn.Module
    tokenizer: Any
    method: str | None
    layers: Layers | None
    by: str
    roles: Sequence[str]
    target: str | None
    seed: int
    options: Mapping[str, Any]

    def record(self, line: Line) -> Record:
        """The record of a line: "status" "ok" with the result, or "error" with the error.

        Raises:
            RuntimeError: the GPU is broken, so that every further line would fail.
        """
        head = {"line": line.number, "id": identity(line)}
        try:
            with seeded(self.seed, line.number):
                return head | {"status": "ok", "result": json.loads(self._result(line))}
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            message = " ".join(str(error).split())
            return head | {
                "status": "error",
                "error": {"type": type(error).__name__, "message": message},
            }

    def _result(self, line: Line) -> str:
        request = read_prompt(line, self.tokenizer, self.by, self.roles, self.target)
        options = {**self.options, **request.options}
        if request.target is not None:
            options["gen_args"] = gen_args_of_target(self.model, options.get("gen_args"))
        result = explain(
            self.model,
            self.tokenizer,
            request.inp,
            request.target,
            self.method,
            self.layers,
            **options,
        )
        if result.provenance is not None:  # the file is the same whenever it was stopped
            result.provenance = replace(result.provenance, seconds=None)
        return result.to_json()


@dataclass
class Warner:
    """Passes on the first warning of each kind, with the number of its line."""

    kinds: set[str] = field(default_factory=set)

    @contextmanager
    def of_line(self, number: int) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            yield
        for warning in caught:
            kind = re.sub(r"[-+.\d]+|'.*?'", "", str(warning.message))
            if kind not in self.kinds:
                self.kinds.add(kind)
                warn(f"line {number}: {warning.message}", warning.category)
