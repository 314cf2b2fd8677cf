"""Extractive question answering: the answer is a span of the context, scored by its two ends.

The logits of start and end are over the positions of the prompt, which take the part of a
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.model.adapter import Adapter, Part
from captum_llm_ext.model.keywords import taken_by
from captum_llm_ext.model.layers import input_device


class QuestionAnswering(Adapter):
    """A question answering model on rows that all have the context at the same positions.

    context: its start and stop. forward(ids).logits: (rows, 2, length), of the answer's start and
    end at each position.
    """

    def __init__(self, model: nn.Module, context: Part) -> None:
        super().__init__(model)
        self.context_span = context
        ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        run = partial(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        self.takes_types = bool(taken_by(model, run, {"token_type_ids": ids}))

    def get_output_embeddings(self) -> None:
        return None  # the layer of the logits reads every position, not one for each target

    def forward(self, ids: Tensor) -> Logits:
        mask = torch.ones_like(ids)
        output = self.model(input_ids=ids, attention_mask=mask, **self._token_types(ids))
        if not hasattr(output, "start_logits"):  # as of tables, of pictures, or of beams of spans
            raise ValueError(
                f"{type(self.model).__name__} gives no start_logits and end_logits of an answer: "
                "expected a model of extractive question answering, such as of BERT or RoBERTa"
            )
        return Logits(torch.stack([output.start_logits, output.end_logits], dim=1))

    def logits_after(self, prompts: Sequence[Tensor], fed: Tensor) -> Tensor:
        return self(torch.stack(list(prompts))).logits

    def _token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """Types that are 1 from the context on, for models that tell question and context so."""
        n_types = getattr(self.config, "type_vocab_size", 0) or 0
        if n_types < 2 or not self.takes_types:
            return {}
        types = torch.arange(ids.size(1), device=ids.device) >= self.context_span[0]
        return {"token_type_ids": types.long().expand_as(ids)}


@dataclass(frozen=True)
class Logits:
    logits: Tensor


def find_context(ids: Tensor, tokenizer: Any) -> Part:
    """The span of the context in the ids (n_prompt,) of question, separator and context."""
    separators = {getattr(tokenizer, f"{name}_token_id", None) for name in ("sep", "eos")}
    is_separator = [int(i) in separators for i in ids]
    if True in is_separator[1:]:
        start = is_separator.index(True, 1)
        while start < len(ids) and is_separator[start]:
            start += 1
        stop = is_separator.index(True, start) if True in is_separator[start:] else len(ids)
        if start < stop:
            return start, stop
    raise ValueError(
        "expected a prompt of a question, a separator and a context: make it with "
        "qa_input(question, context, tokenizer), or in explain and the terminal give the context"
    )


def find_answer(ids: Tensor, context: Part, answer: str, tokenizer: Any) -> Tensor:
    """The positions (2,) of the answer's first and last token, where the context first holds it.

    Raises:
        ValueError: the answer's tokens are not in the context.
    """
    start, stop = context
    words, context_ids = answer.strip(), ids[start:stop].tolist()
    # A word may have another token after a space.
    for text in (words, f" {words}") if words else ():
        tokens = list(tokenizer.encode(text, add_special_tokens=False))
        for i in range(len(context_ids) - len(tokens) + 1):
            if tokens and context_ids[i : i + len(tokens)] == tokens:
                return torch.tensor([start + i, start + i + len(tokens) - 1], device=ids.device)
    raise ValueError(
        f"the answer {answer!r} is not in the context as whole tokens, which are "
        f"{tokenizer.decode(context_ids)!r}: give it as it stands there, or as (start, end) "
        "positions"
    )


@torch.no_grad()
def predict_answer(adapter: QuestionAnswering, ids: Tensor) -> Tensor:
    """The positions (2,) of the likeliest span of the context, by log p(start) + log p(end)."""
    start, stop = adapter.context_span
    log_p = adapter(ids[None]).logits[0].float()[:, start:stop]
    sums = log_p[0][:, None] + log_p[1][None]
    ends_before_start = torch.ones_like(sums).tril(-1).bool()
    likeliest = int(sums.masked_fill(ends_before_start, -torch.inf).argmax())
    width = stop - start
    return torch.tensor([start + likeliest // width, start + likeliest % width], device=ids.device)


def checked_positions(answer: Any, n_prompt: int) -> Tensor:
    """(start, end) of an answer, both included, as positions (2,) in a prompt."""
    positions = torch.as_tensor(answer)
    if positions.shape != (2,) or positions.is_floating_point():
        raise ValueError(
            "the target of a question answering model is an answer (a str), the positions "
            f"(start, end) of its tokens, or None for the predicted one; got {answer!r}"
        )
    start, end = positions.tolist()
    if not 0 <= start <= end < n_prompt:
        raise ValueError(
            f"the answer's positions must be 0 <= start <= end < {n_prompt}, the length of the "
            f"prompt; got {(start, end)}"
        )
    return positions.long()
