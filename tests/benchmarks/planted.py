"""Facts planted in a text: the sentence that an answer needs is known, so which is named first?

planted.json has the facts, and the sentences that stand around them. A text has twelve sentences,
its features; the question after them is none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import TextTemplateInput, segment_input

FILE = Path(__file__).parent / "planted.json"
N_SENTENCES = 12


@dataclass(frozen=True)
class Fact:
    """A fact at its place among the sentences of a text, a question and its answer."""

    name: str
    sentences: tuple[str, ...]
    place: int
    question: str
    answer: str

    def inp(self) -> TextTemplateInput:
        spans, end = [], 0
        for sentence in self.sentences:
            spans.append((end, end + len(sentence)))
            end += len(sentence) + 1
        return segment_input(f"{' '.join(self.sentences)}\n\n{self.question}", by=spans)

    def target(self, tokenizer: Any) -> Tensor:
        return torch.tensor(tokenizer.encode(self.answer, add_special_tokens=False))


def facts(prompts: str) -> list[Fact]:
    """The facts for "choosing" or "held-out", each at another place among other sentences."""
    read = json.loads(FILE.read_text())
    others, found = read["others"], []
    for i, entry in enumerate(read[prompts]):
        around = [others[(11 * i + j) % len(others)] for j in range(N_SENTENCES - 1)]
        place = (5 * i + 3) % N_SENTENCES
        sentences = (*around[:place], entry["fact"], *around[place:])
        found.append(Fact(entry["name"], sentences, place, entry["question"], entry["answer"]))
    return found
