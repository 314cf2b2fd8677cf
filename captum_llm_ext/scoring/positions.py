"""Where things stand: in a row of ids, in what the model is fed, and in what a layer holds.

A row is the prompt and the target but for its last token, which no score looks back at. An
example: a prompt with a prefix of 3 tokens that comes from the cache, 3 feature tokens and 2 of
the template, and a target of 3 tokens, of which 2 are fed.

    row position   0   1   2 | 3   4   5 | 6   7 | 8   9
                   prefix    | features  | templ.| target
    fed position               0   1   2   3   4   5   6      = row position - n_cached
    layer position             0   1   2   3   4   5   6      = fed position - the layer's first
    feature       -1  -1  -1   0   0   1  -1  -1  -1  -1      two features, the first of 2 tokens

A layer of a causal model holds every fed position, so its first is 0. A layer of an
encoder-decoder model holds the encoder's positions or the decoder's. A pass may score a part of the
target alone, a `TargetSpan`, and is then fed less of the row.

`Row` counts row positions, `Positions` those of one layer. Nothing else slices either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from captum_llm_ext.inputs.features import Features


@dataclass(frozen=True)
class TargetSpan:
    """Target tokens start…stop-1, which one pass scores."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Row:
    """How many ids of a row are the prompt's, the target's, and in the prefix cache."""

    n_prompt: int
    n_target: int
    n_cached: int = 0

    @property
    def length(self) -> int:
        return self.n_prompt + self.n_target

    def stop(self, span: TargetSpan) -> int:
        """The row position after the last one that the span's pass is fed."""
        return self.n_prompt + min(span.stop - 1, self.n_target)

    def n_fed(self, span: TargetSpan) -> int:
        return self.stop(span) - self.n_cached

    def fed(self, values: Tensor, span: TargetSpan, dim: int = -1) -> Tensor:
        """The part of values, one for each row position, that the span's pass is fed."""
        return values.narrow(dim, self.n_cached, self.n_fed(span))


@dataclass(frozen=True)
class Positions:
    """The positions of one layer, from row position `start` to the row's end, and their features.

    A pass over a part of the target fills fewer of them.
    """

    start: int
    length: int
    features: Features

    @classmethod
    def of_layer(cls, row: Row, first: int, features: Features) -> Positions:
        """Those of a layer whose first position is fed position `first`."""
        start = row.n_cached + first
        return cls(start, row.length - start, features)

    @cached_property
    def column_of(self) -> Tensor:
        """(length,) the column of each position's feature, -1 for none."""
        return self.features.column_at(self.start + self.length)[self.start :]

    def by_feature(self, values: Tensor, norm: str = "sum") -> Tensor:
        """Values (…, n_positions) as (…, n_input): sums over each feature, or norms."""
        column_of, n_columns = self.column_of[: values.size(-1)], self.features.n_columns
        if norm == "linf":
            index = torch.where(column_of < 0, n_columns, column_of).expand_as(values)
            grouped = values.new_zeros(*values.shape[:-1], n_columns + 1)
            grouped = grouped.scatter_reduce(-1, index, values, "amax")[..., :n_columns]
        else:
            kept = column_of >= 0
            values = values.square() if norm == "l2" else values
            grouped = values.new_zeros(*values.shape[:-1], n_columns)
            grouped.index_add_(-1, column_of[kept], values[..., kept])
            grouped = grouped.sqrt() if norm == "l2" else grouped
        return grouped[..., self.features.column_of]

    def hidden_by_feature(self, values: Tensor) -> Tensor:
        """Values (n_output, n_positions, hidden) as (n_output, n_input, hidden)."""
        return self.by_feature(values.transpose(1, 2)).transpose(1, 2).contiguous()

    def groups(self, moves: Tensor) -> list[Tensor]:
        """The positions that move, feature by feature; those of no feature are a group too.

        moves: (n_positions,) whether the path changes the layer there.
        """
        column_of = self.column_of[: len(moves)]
        columns = column_of.where(moves.to(column_of.device), torch.full_like(column_of, -2))
        return [(columns == one).nonzero().flatten() for one in columns.unique() if one > -2]
