"""From any interpretable input to token ids and the feature of each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from captum_llm_ext.compat import CaptumTextTemplateInput, CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.inputs.baselines import token_id
from captum_llm_ext.inputs.templates import (
    check_template,
    render_template,
    value_spans,
    with_drawn_baselines,
)
from captum_llm_ext.inputs.tokens import encode_with_offsets


@dataclass(frozen=True)
class Features:
    """A prompt's ids (1, n_prompt) and the feature of each position.

    value_of: (n_prompt,) the value (or token) that each position is part of, -1 for none;
    column_of: (n_values,) the column of attributions that each value has, which values of one
    mask share; names: of the values.
    """

    prompt_ids: Tensor
    value_of: Tensor
    column_of: Tensor
    names: list[str]

    @property
    def n_columns(self) -> int:
        return int(self.column_of.max()) + 1

    @property
    def first(self) -> int:
        """The first position that belongs to a feature."""
        positions = (self.value_of >= 0).nonzero()
        if not len(positions):
            raise ValueError("the values of the input are all empty: there is nothing to attribute")
        return int(positions.min())

    def value_at(self, length: int) -> Tensor:
        """The value of each of `length` positions."""
        return pad(self.value_of, (0, length - len(self.value_of)), value=-1)

    def column_at(self, length: int) -> Tensor:
        """The column of each of `length` positions; target tokens that are no feature have none."""
        values = self.value_at(length)
        return torch.where(values < 0, -1, self.column_of[values.clamp(min=0)])

    def with_generated(self, ids: Tensor, tokenizer: Any, n_prompt: int) -> Features:
        """The same with each target token as a feature, from position `n_prompt` on.

        The model is never fed the last one. Names are the vocabulary's, like those of the prompt,
        so that they show where words begin.
        """
        tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
        added = torch.arange(len(tokens), device=self.value_of.device)
        return replace(
            self,
            value_of=torch.cat([self.value_at(n_prompt), added + len(self.names)]),
            column_of=torch.cat([self.column_of, added + self.n_columns]),
            names=[*self.names, *tokens],
        )


def read_features(inp: InterpretableInput, tokenizer: Any, device: torch.device) -> Features:
    """The features of a token or template input."""
    if isinstance(inp, CaptumTextTokenInput):
        return _of_tokens(inp, device)
    if isinstance(inp, CaptumTextTemplateInput):
        return _of_template(inp, tokenizer, device)
    raise ValueError(f"expected a TextTokenInput or TextTemplateInput, got {type(inp).__name__}")


def prompt_ids(
    inp: InterpretableInput, present: Tensor | None, tokenizer: Any, device: Any
) -> Tensor:
    """Token ids (n_prompt,) of the input with the features present in `present` (1, n_features)."""
    model_input = inp.to_model_input(present)
    if isinstance(model_input, str):
        model_input = tokenizer.encode(model_input, return_tensors="pt")
    ids = model_input[0].long().to(device, copy=True)
    if ids.numel() == 0:
        masked = "" if present is None else " once its features are replaced by their baselines"
        raise ValueError(
            f"the prompt is empty{masked}: keep some text in the template, give baselines that are "
            "not empty, or use a tokenizer with a beginning-of-sequence token"
        )
    return ids


def ends_by_itself(inp: InterpretableInput, tokenizer: Any, end: int) -> bool:
    """Whether the tokenizer adds the id `end` after the text of this input."""
    text = inp.to_model_input()
    if not isinstance(text, str):
        # Chats by token hold ids without special tokens: they mask features and skip no tokens.
        without_special = inp.itp_mask is not None and not inp.skip_tokens
        text = "" if without_special else "a"
    return bool(text) and _n_last(tokenizer, text, end, True) > _n_last(tokenizer, text, end, False)


def _n_last(tokenizer: Any, text: str, token: int, add_special_tokens: bool) -> int:
    """How many times a token stands at the end of an encoded text."""
    ids = list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    return next((i for i, last in enumerate(reversed(ids)) if last != token), len(ids))


# --- tokens --------------------------------------------------------------------------------------


def _of_tokens(inp: CaptumTextTokenInput, device: torch.device) -> Features:
    ids = inp.inp_tensor
    special = set(getattr(inp.tokenizer, "all_special_ids", ()))
    if not set(ids.flatten().tolist()) - special:
        raise ValueError("the prompt is empty: expected at least one token that is not special")
    mask = torch.ones_like(ids).bool() if inp.itp_mask is None else inp.itp_mask
    if not mask.any():
        raise ValueError("all tokens of the prompt are skipped: leave at least one as a feature")
    value_of = torch.where(mask[0], mask[0].long().cumsum(0) - 1, -1)
    columns = torch.arange(len(inp.values), device=device)
    ids = ids.long().to(device, copy=True)
    return Features(ids, value_of.to(device), columns, list(inp.values))


# --- templates -----------------------------------------------------------------------------------


def _of_template(inp: CaptumTextTemplateInput, tokenizer: Any, device: torch.device) -> Features:
    check_template(inp)
    if not inp.values:
        raise ValueError("the template has no values: expected at least one")
    ids, values = template_tokens(inp, inp.values, tokenizer)
    if not ids:
        raise ValueError("the prompt is empty: expected at least one token")
    columns = inp.formatted_mask if inp.mask else range(len(inp.values))
    return Features(
        torch.tensor([ids], device=device),
        torch.tensor(values, device=device),
        torch.tensor(list(columns), device=device),
        list(inp.values),
    )


def template_tokens(
    inp: CaptumTextTemplateInput, values: Sequence[str], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Token ids of the template with these values, and the value that each token belongs to.

    A token that straddles a border belongs to the value, or the template, that it mostly covers.
    A value that would have no token then takes the template's token that covers most of it.
    """
    text, spans = value_spans(render_template(inp), values)
    encoded = encode_with_offsets(text, tokenizer)
    value_of = [_value_of_token(offsets, spans) for _, offsets in encoded]
    for i in {i for i, value in enumerate(values) if value} - set(value_of):
        overlaps = [_overlap(offsets, spans[i]) for _, offsets in encoded]
        best = max(range(len(overlaps)), key=overlaps.__getitem__)
        if not overlaps[best] or value_of[best] != -1:
            raise ValueError(
                f"value {i}, {values[i]!r}, has no token of its own: the tokenizer merges it with "
                "what stands beside it; make one value of both"
            )
        value_of[best] = i
    return [token for token, _ in encoded], value_of


def baseline_tokens(inp: CaptumTextTemplateInput, tokenizer: Any) -> list[list[int]]:
    """The token ids of each value's baseline, from the template with all baselines in it."""
    baselines = with_drawn_baselines(inp).baselines
    ids, value_of = template_tokens(inp, baselines, tokenizer)
    pairs = list(zip(ids, value_of, strict=True))
    return [[token for token, i in pairs if i == value] for value in range(len(inp.values))]


def _value_of_token(token: tuple[int, int], spans: Sequence[tuple[int, int]]) -> int:
    """The value that holds most of a token's characters, -1 for the template; ties to the value."""
    overlaps = [_overlap(token, span) for span in spans]
    best = max(range(len(spans)), key=overlaps.__getitem__, default=-1)
    if best < 0 or not overlaps[best]:
        return -1
    outside = token[1] - token[0] - sum(overlaps)
    return best if overlaps[best] >= outside else -1


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


# --- templates whose positions are scored --------------------------------------------------------


class _FixedPositions(CaptumTextTemplateInput):
    """A template whose absent values keep their positions, with other ids there."""

    ids: Tensor
    absent_ids: Tensor
    column_at: Tensor

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Tensor:
        if perturbed_tensor is None:
            return self.ids
        present = torch.cat([perturbed_tensor[0].cpu() == 1, torch.tensor([True])])
        return torch.where(present[self.column_at], self.ids, self.absent_ids)


def with_fixed_positions(inp: InterpretableInput, tokenizer: Any) -> InterpretableInput:
    """The input for models that score positions of the prompt, which must not shift.

    The positions of a template's absent value hold the tokens of its baseline where there are as
    many, and otherwise mask tokens, or pad tokens where the tokenizer has no mask.
    """
    if not isinstance(inp, CaptumTextTemplateInput):
        return inp
    features = _of_template(inp, tokenizer, torch.device("cpu"))
    neutral = getattr(tokenizer, "mask_token_id", None)
    neutral = token_id("pad", tokenizer) if neutral is None else neutral
    absent_ids = features.prompt_ids.clone()
    for i, tokens in enumerate(baseline_tokens(inp, tokenizer)):
        positions = (features.value_of == i).nonzero().flatten()
        as_many = len(tokens) == len(positions)
        absent_ids[0, positions] = torch.tensor(tokens if as_many else [neutral] * len(positions))
    fixed = _FixedPositions.__new__(_FixedPositions)
    fixed.__dict__.update(inp.__dict__)
    fixed.ids, fixed.absent_ids = features.prompt_ids, absent_ids
    fixed.column_at = features.column_at(features.prompt_ids.size(1))
    return fixed
