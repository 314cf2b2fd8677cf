"""From any interpretable input to token ids and the feature of each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.compat import CaptumTextTemplateInput, CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.inputs.baselines import token_id
from captum_llm_ext.inputs.templates import check_template, drawn, render_template, value_spans
from captum_llm_ext.inputs.tokens import encode_with_offsets


@dataclass(frozen=True)
class Features:
    """A prompt's ids (1, n_prompt) and what each position belongs to.

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
        places = (self.value_of >= 0).nonzero()
        if not len(places):
            raise ValueError("the values of the input are all empty: there is nothing to attribute")
        return int(places.min())

    def of_prompt(self, prompt_ids: Tensor) -> Features:
        """The same for a prompt (1, n) that goes on with ids that belong to no feature."""
        return replace(self, prompt_ids=prompt_ids, value_of=self.value_at(prompt_ids.size(1)))

    def value_at(self, length: int) -> Tensor:
        """The value of each of `length` positions."""
        padded = self.value_of.new_full((length,), -1)
        known = self.value_of[:length]
        padded[: len(known)] = known
        return padded

    def column_at(self, length: int) -> Tensor:
        """The column of each of `length` positions, target tokens that are none included."""
        values = self.value_at(length)
        return torch.where(values < 0, -1, self.column_of[values.clamp(min=0)])

    def with_generated(self, ids: Tensor, tokenizer: Any) -> Features:
        """The same with each target token as a feature; the last one is never fed to the model.

        Named as the vocabulary has them, like the prompt's, so that words can be told apart.
        """
        tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
        added = torch.arange(len(tokens), device=self.value_of.device)
        return replace(
            self,
            value_of=torch.cat([self.value_of, added + len(self.names)]),
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
        gone = "" if present is None else " once its features are replaced by their baselines"
        raise ValueError(
            f"the prompt is empty{gone}: keep some text in the template, give baselines that are "
            "not empty, or use a tokenizer with a beginning-of-sequence token"
        )
    return ids


def template_tokens(
    inp: CaptumTextTemplateInput, values: Sequence[str], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Token ids of the template with these values, and the value that each token belongs to.

    A token that straddles a border belongs to the value, or the template, that it mostly covers;
    a value that would have no token then has the template's token that covers most of it.
    """
    text, spans = value_spans(render_template(inp), values)
    encoded = encode_with_offsets(text, tokenizer)
    owners = [_owner(offsets, spans) for _, offsets in encoded]
    for i in {i for i, value in enumerate(values) if value} - set(owners):
        shares = [_overlap(offsets, spans[i]) for _, offsets in encoded]
        best = max(range(len(shares)), key=shares.__getitem__)
        if not shares[best] or owners[best] != -1:
            raise ValueError(
                f"value {i}, {values[i]!r}, has no token of its own: the tokenizer merges it with "
                "what stands beside it; make one value of both"
            )
        owners[best] = i
    return [token for token, _ in encoded], owners


def baseline_tokens(inp: CaptumTextTemplateInput, tokenizer: Any) -> list[list[int]]:
    """The token ids of each value's baseline, as it is tokenised with all of them in place."""
    fixed = drawn(inp)
    ids, owners = template_tokens(inp, fixed.baselines, tokenizer)
    pairs = list(zip(ids, owners, strict=True))
    return [[token for token, i in pairs if i == value] for value in range(len(inp.values))]


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


def _of_template(inp: CaptumTextTemplateInput, tokenizer: Any, device: torch.device) -> Features:
    check_template(inp)
    if not inp.values:
        raise ValueError("the template has no values: expected at least one")
    ids, owners = template_tokens(inp, inp.values, tokenizer)
    if not ids:
        raise ValueError("the prompt is empty: expected at least one token")
    columns = inp.formatted_mask if inp.mask else range(len(inp.values))
    return Features(
        torch.tensor([ids], device=device),
        torch.tensor(owners, device=device),
        torch.tensor(list(columns), device=device),
        list(inp.values),
    )


def _owner(token: tuple[int, int], spans: Sequence[tuple[int, int]]) -> int:
    """The value that a token's characters mostly lie in, -1 for the template; ties to the value."""
    shares = [_overlap(token, span) for span in spans]
    best = max(range(len(spans)), key=shares.__getitem__, default=-1)
    if best < 0 or not shares[best]:
        return -1
    outside = token[1] - token[0] - sum(shares)
    return best if shares[best] >= outside else -1


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


class _PlacesKept(CaptumTextTemplateInput):
    """A template whose absent values leave their places, with other ids in them."""

    ids: Tensor
    absent_ids: Tensor
    column_at: Tensor

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Tensor:
        if perturbed_tensor is None:
            return self.ids
        present = torch.cat([perturbed_tensor[0].cpu() == 1, torch.tensor([True])])
        return torch.where(present[self.column_at], self.ids, self.absent_ids)


def places_kept(inp: InterpretableInput, tokenizer: Any) -> InterpretableInput:
    """The input, where the positions of a prompt are scored and must not shift.

    An absent value of a template has its baseline's tokens in its places where they are as many,
    and otherwise mask tokens, or pad tokens where the tokenizer has no mask.
    """
    if not isinstance(inp, CaptumTextTemplateInput):
        return inp
    features = _of_template(inp, tokenizer, torch.device("cpu"))
    neutral = getattr(tokenizer, "mask_token_id", None)
    neutral = token_id("pad", tokenizer) if neutral is None else neutral
    absent = features.prompt_ids.clone()
    for i, tokens in enumerate(baseline_tokens(inp, tokenizer)):
        places = (features.value_of == i).nonzero().flatten()
        as_many = len(tokens) == len(places)
        absent[0, places] = torch.tensor(tokens if as_many else [neutral] * len(places))
    kept = _PlacesKept.__new__(_PlacesKept)
    kept.__dict__.update(inp.__dict__)
    kept.ids, kept.absent_ids = features.prompt_ids, absent
    kept.column_at = features.column_at(features.prompt_ids.size(1))
    return kept
