"""What a perturbation method knows of the features that it switches on and off."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from captum_llm_ext.compat import CaptumTextTemplateInput, CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.display.words import word_texts
from captum_llm_ext.inputs.templates import render_template, value_spans

Span = tuple[int, int]


class Border(IntEnum):
    """What ends between two neighbouring features; the larger, the more natural a cut is there."""

    TOKEN = 0
    WORD = 1
    SENTENCE = 2
    PARAGRAPH = 3


def new_seed() -> Callable[[], int]:
    """A seed that torch's global generator draws when it is first asked for."""
    return cache(lambda: int(torch.randint(2**62, ())))


@dataclass(frozen=True)
class Game:
    """The features of one input; masks of them have scores.

    All tensors of a game are on the CPU.

    names: of the features.
    borders: (n_features - 1) entries, what ends between each feature and the next: the text
        between them has an empty line (PARAGRAPH), the end of a line or of a sentence (SENTENCE),
        a space (WORD) or none of these (TOKEN). The border of a feature of several values lies
        before its first one. Values whose places the template hides are words; pictures and plain
        tensors have TOKEN alone.
    guide: (n_features,) attributions of a cheaper method, or None.
    seed: of `generator`, which torch's global one draws: `torch.manual_seed` makes it repeatable.
    """

    names: Sequence[str]
    borders: Sequence[Border]
    guide: Tensor | None = None
    seed: Callable[[], int] = field(default_factory=new_seed)

    @property
    def n_features(self) -> int:
        return len(self.names)

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed())

    def whole(self) -> Tensor:
        """(1, n_features) the mask that has every feature."""
        return torch.ones(1, self.n_features)

    def leave_one_out(self) -> Tensor:
        """(n_features, n_features) masks that lack one feature each."""
        return 1 - torch.eye(self.n_features)

    @classmethod
    def of_input(cls, inp: InterpretableInput, group_of: Tensor) -> Game:
        """The game of an input whose interpretable features are put into groups.

        group_of: (n_itp_features,) the group of each, counted from 0.
        """
        mask = getattr(inp, "mask", None)
        columns = inp.formatted_mask if isinstance(mask, list) and mask else None
        columns = list(range(len(inp.values))) if columns is None else columns
        features = group_of[torch.as_tensor(columns)].tolist()
        before = [Border.PARAGRAPH, *_borders(inp)]
        numbers = range(max(features) + 1)
        names = [
            " ".join(v for v, f in zip(inp.values, features, strict=True) if f == i)
            for i in numbers
        ]
        return cls(names, [before[features.index(i)] for i in numbers[1:]])

    @classmethod
    def of_numbers(cls, n_features: int, seed: Callable[[], int]) -> Game:
        """The game of features that are no text."""
        names = [str(i) for i in range(n_features)]
        return cls(names, [Border.TOKEN] * (n_features - 1), seed=seed)


def _borders(inp: InterpretableInput) -> list[Border]:
    """What ends between each value of the input and the next."""
    if isinstance(inp, CaptumTextTokenInput):
        ids = inp.inp_tensor[0]
        texts = word_texts([str(t) for t in inp.tokenizer.convert_ids_to_tokens(ids.tolist())])
        inside = torch.ones_like(ids).bool() if inp.itp_mask is None else inp.itp_mask[0]
        spans = list(pairwise(accumulate(map(len, texts), initial=0)))
        features = [span for span, feature in zip(spans, inside.tolist(), strict=True) if feature]
        return [_border("".join(texts), *pair) for pair in pairwise(features)]
    if isinstance(inp, CaptumTextTemplateInput):
        try:
            text, spans = value_spans(render_template(inp), inp.values)
        except ValueError:  # a template may use a value twice, or change it
            return [Border.WORD] * (len(inp.values) - 1)
        return [max(Border.WORD, _border(text, *pair)) for pair in pairwise(spans)]
    return [Border.TOKEN] * (len(inp.values) - 1)


def _border(text: str, first: Span, second: Span) -> Border:
    """What ends between two spans of a text."""
    before, after = text[slice(*first)], text[slice(*second)]
    space_after = after[: len(after) - len(after.lstrip())]
    last_mark = re.search(r"[.!?\"')\]]*\s*$", before)
    seam = (last_mark.group() if last_mark else "") + text[first[1] : second[0]] + space_after
    if re.search(r"\n[^\S\n]*\n", seam):
        return Border.PARAGRAPH
    if "\n" in seam or re.search(r"[.!?][\"')\]]*\s", seam):
        return Border.SENTENCE
    return Border.WORD if re.search(r"\s", seam) else Border.TOKEN
