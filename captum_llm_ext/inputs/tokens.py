"""Text whose features are tokens, and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.inputs.baselines import (
    REMOVE,
    AbsentTokens,
    Baseline,
    BaselineSpec,
    baseline_ids,
    baseline_of_input,
    no_tokens,
    token_ids,
)
from captum_llm_ext.model.suitability import check_tokenizer
from captum_llm_ext.warning import warn


class TextTokenInput(CaptumTextTokenInput):
    """Text whose interpretable features are its tokens; Captum's class, with checked names.

    Args:
        text: the prompt.
        tokenizer: the model's tokenizer.
        baselines: what stands for an absent token: a token id, a token string, "pad", "eos",
            "unk", "nearest" (each token's nearest other one by cosine of the embeddings),
            ("nearest", n) for the n-th nearest, "common" (a common English word drawn for each
            token), ("common", seed) for other draws, or ("text", a text) for the tokens of another
            text in order; by perturbation also "remove", which drops the token; with gradients also
            "zero" and "mean". Default: 0, as in Captum. In many vocabularies that is a special
            token, which may hide everything before it.
        skip_tokens: ids or strings of tokens that are not features and are never replaced.

    Raises:
        ValueError: a token string is not in the vocabulary (Captum silently takes the unknown
            token for it).
        TypeError: a baseline of another kind, or a string as `skip_tokens`.

    Example:
        >>> inp = TextTokenInput("The capital of France is", tokenizer, baselines="pad")
        >>> inp.n_itp_features
        5
    """

    # Whether each method takes the baseline that suits it, where the caller names none.
    baseline_by_method = False

    def __init__(
        self,
        text: str,
        tokenizer: Any,
        baselines: int | str | tuple[str, int] = 0,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        kind, value = Baseline.parse(baselines, tokenizer)
        if kind == "unknown":
            raise no_tokens(Baseline(kind, value))
        self.named_baseline: BaselineSpec = None
        if kind != "ids":  # `attribute` looks it up, with the model
            self.named_baseline, value = baselines, 0
        super().__init__(text, tokenizer, value, token_ids(skip_tokens, tokenizer) or None)


def tokens_in_spans(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> TextTokenInput:
    """A text whose features are the tokens in spans of characters; special tokens are none."""
    encoded = encode_with_offsets(text, tokenizer, add_special_tokens=False)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    inside = [
        token not in special and any(a < stop and start < b for a, b in spans)
        for token, (start, stop) in encoded
    ]
    inp = token_input([token for token, _ in encoded], inside, tokenizer)
    inp.baseline_by_method = True
    return inp


def token_input(ids: Sequence[int], inside: Sequence[bool], tokenizer: Any) -> TextTokenInput:
    """A prompt of ids (n_prompt,); the tokens with a True in `inside` are its features."""
    inp = TextTokenInput.__new__(TextTokenInput)
    inp.inp_tensor = torch.tensor([list(ids)])
    inp.itp_mask = torch.tensor([list(inside)])
    inp.itp_tensor = inp.inp_tensor[inp.itp_mask].unsqueeze(0)
    inp.skip_tokens, inp.tokenizer, inp.baselines, inp.named_baseline = None, tokenizer, 0, None
    inp.values = tokenizer.convert_ids_to_tokens(inp.itp_tensor[0].tolist())
    inp.n_itp_features = len(inp.values)
    return inp


def encode_with_offsets(
    text: str, tokenizer: Any, add_special_tokens: bool = True
) -> list[tuple[int, tuple[int, int]]]:
    """Token ids of a text, each with its start and stop in characters."""
    try:
        encoded = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell where tokens are in the text: load the fast "
            "tokenizer (use_fast=True)"
        ) from error
    offsets = [(int(start), int(stop)) for start, stop in encoded["offset_mapping"]]
    return list(zip([int(i) for i in encoded["input_ids"]], offsets, strict=True))


class _WithoutAbsentTokens(CaptumTextTokenInput):
    """A token input whose absent tokens are dropped; where nothing is left the last one stays."""

    named_baseline: BaselineSpec

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Tensor:
        if perturbed_tensor is None:
            return self.inp_tensor
        ids = self.inp_tensor[0]
        is_feature = torch.ones_like(ids).bool() if self.itp_mask is None else self.itp_mask[0]
        kept = ~is_feature
        kept[is_feature] = perturbed_tensor[0].cpu() == 1
        return ids[kept][None] if kept.any() else ids[None, -1:]


class _WithBaselineIds(CaptumTextTokenInput):
    """A token input with a baseline id for each feature."""

    baseline_ids: Tensor
    named_baseline: BaselineSpec

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Tensor:
        if perturbed_tensor is None:
            return self.inp_tensor
        absent = perturbed_tensor.cpu() != 1
        tokens = torch.where(absent, self.baseline_ids, self.itp_tensor)
        if self.itp_mask is None:
            return tokens
        ids = self.inp_tensor.repeat(len(tokens), 1)
        ids[self.itp_mask.expand_as(ids)] = tokens.flatten()
        return ids


def with_baselines(
    inp: InterpretableInput, baselines: BaselineSpec, model: nn.Module
) -> InterpretableInput:
    """A token input with ids for the caller's baselines, or where these are None for its own."""
    if not isinstance(inp, CaptumTextTokenInput):
        if baselines is not None:
            raise ValueError(
                "the baselines of a template or an image belong to the input itself (an empty one "
                "removes its value)"
            )
        return inp
    if baselines is None:
        by_method = getattr(inp, "baseline_by_method", False) and inp.named_baseline is None
        baselines = REMOVE if by_method else baseline_of_input(inp)
    ids = inp.inp_tensor[0].long()
    is_feature = torch.ones_like(ids).bool() if inp.itp_mask is None else inp.itp_mask[0]
    baseline = Baseline.parse(baselines, inp.tokenizer)
    if baseline.kind == REMOVE:
        if len(ids) == 1:
            warn(
                "the prompt is a single token, which stays when it is left out, so its attribution "
                "is 0 whatever it does: name a token that stands for it, such as baselines='pad'"
            )
        shorter = _WithoutAbsentTokens.__new__(_WithoutAbsentTokens)
        shorter.__dict__.update(inp.__dict__)
        shorter.named_baseline = REMOVE
        return shorter
    absent = AbsentTokens(ids, is_feature, inp.tokenizer, model)
    replaced = _WithBaselineIds.__new__(_WithBaselineIds)
    replaced.__dict__.update(inp.__dict__)
    replaced.baseline_ids = baseline_ids(baseline, absent)[is_feature][None]
    replaced.named_baseline = baselines
    return replaced
