"""The sentences of an answer, and the target tokens of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.inputs.segments import find_segments

BY_OUTPUT = ("token", "sentence")


@dataclass(frozen=True)
class Statements:
    """Target tokens, put together where a sentence of the answer ends.

    texts: of the statements, which together are the answer; statement_of: (n_output,) the statement
    of each target token.
    """

    texts: list[str]
    statement_of: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first token of each statement, and the one after its last."""
        counts = torch.bincount(self.statement_of, minlength=len(self)).cumsum(0).tolist()
        return list(pairwise([0, *counts]))

    def sums(self, values: Tensor, dim: int = 0) -> Tensor:
        """Values of the target tokens (along `dim`) summed over each statement."""
        shape = list(values.shape)
        shape[dim] = len(self)
        index = self.statement_of.to(values.device)
        return values.new_zeros(shape).index_add(dim, index, values)

    def means(self, values: Tensor, dim: int = 0) -> Tensor:
        """The same with the mean over each statement."""
        counts = torch.bincount(self.statement_of, minlength=len(self)).to(values)
        shape = [1] * values.dim()
        shape[dim] = len(self)
        return self.sums(values, dim) / counts.view(shape)


def check_by_output(by_output: str, per_token: bool, attr_target: str = "log_prob") -> None:
    """Refuse rows per sentence where there are none, or where scores do not add up.

    Raises:
        ValueError: the message says what to give instead.
    """
    if by_output not in BY_OUTPUT:
        raise ValueError(f"by_output must be one of {', '.join(BY_OUTPUT)}; got {by_output!r}")
    if by_output == "token":
        return
    if not per_token:
        raise ValueError(
            "by_output='sentence' needs rows per target token, which this method, or "
            "include_per_token_attr=False, leaves out"
        )
    if attr_target == "prob":
        raise ValueError(
            "by_output='sentence' sums the scores of a sentence's tokens, and probabilities do not "
            "add up: choose attr_target='log_prob'"
        )


def statements_of(ids: Tensor, tokenizer: Any) -> Statements:
    """The sentences, or lines, of the target `ids` (n_output,).

    A token belongs to the sentence in which its text ends. Numbers of a list go with what follows.
    """
    listed = ids.tolist()
    ends = [len(tokenizer.decode(listed[: i + 1])) for i in range(len(listed))]
    text = tokenizer.decode(listed)
    segments = find_segments(text, "sentence")
    lettered = [s for s in segments if any(c.isalpha() for c in text[slice(*s)])]
    stops = [stop for _, stop in lettered][:-1]
    statement_of = [sum(end > stop for stop in stops) for end in ends]
    present = sorted(set(statement_of))
    numbers = torch.tensor([present.index(i) for i in statement_of])
    return Statements(_texts(text, ends, numbers.tolist()), numbers)


def _texts(text: str, ends: Sequence[int], statement_of: Sequence[int]) -> list[str]:
    """The part of the text that the tokens of each statement write."""
    last = dict(zip(statement_of, ends, strict=True))
    edges = [0, *last.values()]
    edges[-1] = len(text)
    return [text[a:b] for a, b in pairwise(edges)]
