"""Interpretable inputs: token ids, and which positions belong to which feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.baselines import BaselineSpec, needs_model, token_id
from captum_llm_ext.compat import CaptumTextTokenInput, InterpretableInput


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
