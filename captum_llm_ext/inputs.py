"""Interpretable inputs: token ids, and which positions belong to which feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.baselines import (
    BaselineSpec,
    baseline_ids,
    needs_model,
    own_baseline,
    token_id,
)
from captum_llm_ext.compat import CaptumTextTokenInput, InterpretableInput, TextTemplateInput


class TextTokenInput(CaptumTextTokenInput):
    """Text whose interpretable features are its tokens; Captum's class, with checked names.

    Args:
        text: the prompt.
        tokenizer: the model's tokenizer.
        baselines: what stands for an absent token: a token id, a token string, "pad", "eos",
            "unk", "nearest" (each token's nearest other one by cosine of the embeddings) or
            ("nearest", n) for the n-th nearest; with gradients also "zero" and "mean". Default: 0.
        skip_tokens: ids or strings of tokens that are not features and are never replaced.

    Raises:
        ValueError: a token string is not in the vocabulary (Captum takes it for an unknown
            token without a word).

    Example::

        >>> inp = TextTokenInput("The capital of France is", tokenizer, baselines="pad")
        >>> inp.n_itp_features
        5
    """

    def __init__(
        self,
        text: str,
        tokenizer: Any,
        baselines: int | str | tuple[str, int] = 0,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
    ) -> None:
        self.named_baseline: BaselineSpec = None
        if not isinstance(baselines, int) and needs_model(baselines):
            self.named_baseline, baselines = baselines, 0
        baseline = token_id(baselines, tokenizer) if isinstance(baselines, str) else baselines
        skip = [token_id(t, tokenizer) if isinstance(t, str) else t for t in skip_tokens or ()]
        super().__init__(text, tokenizer, baseline, skip or None)


def chat_input(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    by: str = "token",
    roles: Sequence[str] = ("user",),
) -> TextTokenInput:
    """A chat whose features are the tokens of some messages, after the tokenizer's chat template.

    Args:
        messages: dicts with "role" and "content", as ``tokenizer.apply_chat_template`` takes them.
        tokenizer: a fast tokenizer with a chat template.
        by: what a feature is; "token".
        roles: whose messages hold the features. Tokens of the template and special tokens never
            are features and are never replaced.

    Returns:
        An input for `LLMGradientAttribution` and `LLMAttribution`.

    Raises:
        ValueError: no chat template, a role that no message has, a message that the template
            changes or leaves out, or nothing to attribute to.

    Example::

        >>> inp = chat_input([{"role": "user", "content": "Where is Paris?"}], tokenizer)
        >>> inp.values
        ['Where', 'Ġis', 'ĠParis', '?']
    """
    if by != "token":
        raise ValueError(f"by must be 'token', got {by!r}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: pass a plain string as the prompt")
    missing = sorted(set(roles) - {message["role"] for message in messages})
    if missing or not roles:
        raise ValueError(f"roles must be among those of the messages; no message has {missing}")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    spans = _content_spans(text, messages, roles)
    return _tokens_in_spans(text, spans, tokenizer)


def _content_spans(
    text: str, messages: Sequence[Mapping[str, str]], roles: Sequence[str]
) -> list[tuple[int, int]]:
    """Where in the rendered chat the messages of the given roles are, in characters."""
    spans, position = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, position)
        if start < 0:
            raise ValueError(f"the chat template changes or leaves out the message {content!r}")
        position = start + len(content)
        if message["role"] in roles:
            spans.append((start, position))
    return spans


def _tokens_in_spans(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> TextTokenInput:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    inside = [
        token not in special and any(a < stop and start < b for a, b in spans)
        for token, (start, stop) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]
    inp = TextTokenInput.__new__(TextTokenInput)
    inp.inp_tensor = torch.tensor([encoded["input_ids"]])
    inp.itp_mask = torch.tensor([inside])
    inp.itp_tensor = inp.inp_tensor[inp.itp_mask].unsqueeze(0)
    inp.skip_tokens, inp.tokenizer, inp.baselines, inp.named_baseline = None, tokenizer, 0, None
    inp.values = tokenizer.convert_ids_to_tokens(inp.itp_tensor[0].tolist())
    inp.n_itp_features = len(inp.values)
    return inp


class _ReplacedTokens(CaptumTextTokenInput):
    """A token input with a baseline id of its own for each feature."""

    baseline_ids: Tensor

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
    """The input with other baselines, or with its own where the model is needed to know them."""
    if not isinstance(inp, CaptumTextTokenInput):
        if baselines is not None:
            raise ValueError("the baselines of a template or an image belong to the input itself")
        return inp
    if baselines is None:
        baselines = own_baseline(inp)
    ids = inp.inp_tensor[0].long()
    features = torch.ones_like(ids).bool() if inp.itp_mask is None else inp.itp_mask[0]
    absent = baseline_ids(baselines, ids, features, inp.tokenizer, model)
    replaced = _ReplacedTokens.__new__(_ReplacedTokens)
    replaced.__dict__.update(inp.__dict__)
    replaced.baseline_ids = absent[features][None]
    return replaced


def drawn(inp: InterpretableInput) -> InterpretableInput:
    """The input with its callable baseline drawn once, so that all perturbations share it."""
    if not (isinstance(inp, TextTemplateInput) and callable(inp.baselines)):
        return inp
    fixed = copy(inp)
    baselines: Any = inp.baselines()
    if inp.dict_keys:
        _check_keys(baselines, inp.dict_keys, "baselines")
        baselines = [baselines[key] for key in inp.dict_keys]
    fixed.baselines = baselines
    _check_count(baselines, inp, "baselines")
    return fixed


def check_template(inp: TextTemplateInput) -> None:
    """Refuse baselines, a mask or a template that do not fit the values."""
    for i, value in enumerate(inp.values):
        if not isinstance(value, str):
            raise ValueError(f"value {i} of the template must be a str, got {value!r}")
    if not callable(inp.baselines):
        _check_count(inp.baselines, inp, "baselines")
    if inp.mask is not None:
        _check_count(inp.mask, inp, "mask")
    try:
        text = inp.to_model_input()
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"the template does not take the {len(inp.values)} values ({error!r}): it needs one "
            "{} or {name} for each, and literal braces doubled, {{ and }}"
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"the template must give a str, got {type(text).__name__}")


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


def _check_count(given: Any, inp: TextTemplateInput, what: str) -> None:
    if not isinstance(given, list) or len(given) != len(inp.values):
        count = len(given) if isinstance(given, list) else repr(given)
        raise ValueError(f"{what} must be a list of {len(inp.values)}, one per value; got {count}")


def _check_keys(given: Any, keys: Sequence[str], what: str) -> None:
    missing = [key for key in keys if not isinstance(given, Mapping) or key not in given]
    if missing:
        raise ValueError(f"{what} must be a dict with a value for each key; missing {missing}")


@dataclass(frozen=True)
class Features:
    """A prompt's ids (1, n_prompt), the feature of each position (-1: none), and their names."""

    prompt_ids: Tensor
    feature_of: Tensor
    names: list[str]

    def feature_at(self, length: int) -> Tensor:
        """The feature of each of `length` positions, target tokens that are none included."""
        padded = self.feature_of.new_full((length,), -1)
        known = self.feature_of[:length]
        padded[: len(known)] = known
        return padded

    def with_generated(self, tokens: list[str]) -> Features:
        """The same with each target token as a feature; the last one is never fed to the model."""
        added = torch.arange(len(tokens), device=self.feature_of.device) + len(self.names)
        return Features(
            self.prompt_ids, torch.cat([self.feature_of, added]), [*self.names, *tokens]
        )


def read_features(inp: InterpretableInput, device: torch.device) -> Features:
    """The features of a token input."""
    if not isinstance(inp, CaptumTextTokenInput):
        raise ValueError(f"expected a TextTokenInput, got {type(inp).__name__}")
    ids = inp.inp_tensor
    special = set(getattr(inp.tokenizer, "all_special_ids", ()))
    if not set(ids.flatten().tolist()) - special:
        raise ValueError("the prompt is empty: expected at least one token that is not special")
    mask = torch.ones_like(ids).bool() if inp.itp_mask is None else inp.itp_mask
    if not mask.any():
        raise ValueError("all tokens of the prompt are skipped: leave at least one as a feature")
    feature_of = torch.where(mask[0], mask[0].long().cumsum(0) - 1, -1)
    return Features(ids.long().to(device, copy=True), feature_of.to(device), list(inp.values))
