"""Interpretable inputs: token ids, which positions belong to which feature, and the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.hooks import embeddings

SPECIAL_BASELINES = ("pad", "eos", "unk")
EMBEDDING_BASELINES = ("zero", "mean")

BaselineSpec = int | str | Tensor | None


class TextTokenInput(CaptumTextTokenInput):
    """Text whose interpretable features are its tokens; Captum's class, with checked names.

    Args:
        text: the prompt.
        tokenizer: the model's tokenizer.
        baselines: id of the token that stands for an absent one, a token string, or "pad", "eos"
            or "unk". Default: 0.
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
        baselines: int | str = 0,
        skip_tokens: Sequence[int] | Sequence[str] | None = None,
    ) -> None:
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
    inp.skip_tokens, inp.tokenizer, inp.baselines = None, tokenizer, 0
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


@dataclass(frozen=True)
class PathStart:
    """Where a path starts: ids (1, length), and embeddings where no token id stands for them.

    embeddings: (length, hidden) for the positions in `replaced` (length,), or None.
    """

    ids: Tensor
    replaced: Tensor
    embeddings: Tensor | None = None


def path_start(
    baselines: BaselineSpec,
    inp: InterpretableInput,
    ids: Tensor,
    replaced: Tensor,
    model: nn.Module,
) -> PathStart:
    """The start of the path, with the `replaced` positions (length,) of `ids` (1, length) absent.

    `baselines` None is the input's own baseline.
    """
    tokenizer = getattr(inp, "tokenizer", None)
    if baselines is None:
        baselines = getattr(inp, "baselines", 0)
    if isinstance(baselines, str) and baselines not in EMBEDDING_BASELINES:
        baselines = token_id(baselines, tokenizer)
    if isinstance(baselines, int):
        _check_id(baselines, model)
        return PathStart(torch.where(replaced, baselines, ids), replaced)
    if isinstance(baselines, Tensor) and not baselines.is_floating_point():
        values = _per_position(baselines.long().to(ids.device), replaced, 0)
        return PathStart(torch.where(replaced, values, ids), replaced)
    if isinstance(baselines, str):
        baselines = _named_embedding(baselines, model)
    if not isinstance(baselines, Tensor):
        raise TypeError(
            "baselines must be a token id, a token string, 'pad', 'eos', 'unk', 'zero', 'mean', "
            f"a tensor or None; got {type(baselines).__name__}"
        )
    return PathStart(ids, replaced, _per_position(baselines.to(ids.device), replaced, 1))


def token_id(name: str, tokenizer: Any) -> int:
    """The id of a token string, or of the special token that "pad", "eos" or "unk" names."""
    if name in SPECIAL_BASELINES:
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is None:
            raise ValueError(
                f"the tokenizer has no {name} token: set tokenizer.{name}_token or choose another"
            )
        return int(found)
    found = tokenizer.convert_tokens_to_ids([name])[0]
    unknown = getattr(tokenizer, "unk_token", None)
    if found is None or (found == getattr(tokenizer, "unk_token_id", None) and name != unknown):
        raise ValueError(
            f"{name!r} is not a token of the vocabulary: expected a token id or string, and as a "
            f"baseline also one of {', '.join(SPECIAL_BASELINES + EMBEDDING_BASELINES)}"
        )
    return int(found)


def _check_id(token: int, model: nn.Module) -> None:
    size = getattr(next(iter(embeddings(model)), None), "num_embeddings", None)
    if token < 0 or (size is not None and token >= size):
        raise ValueError(f"the baseline id must be in 0…{(size or 1) - 1}, got {token}")


def _named_embedding(name: str, model: nn.Module) -> Tensor:
    """The zero vector, or the mean of all token embeddings, (hidden,), as the model embeds them."""
    embedding = next(iter(embeddings(model)))
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    chunks = torch.arange(weight.size(0), device=weight.device).split(8192)
    with torch.no_grad():
        if name == "zero":
            return torch.zeros_like(embedding(chunks[0][:1])[0].float())
        total = torch.stack([embedding(chunk).float().sum(0) for chunk in chunks]).sum(0)
    return total / weight.size(0)


def _per_position(values: Tensor, replaced: Tensor, value_dims: int) -> Tensor:
    """Values for every position, from one for all, one per position or one per replaced one."""
    if values.dim() == value_dims + 2 and values.size(0) == 1:
        values = values[0]
    length, count = len(replaced), int(replaced.sum())
    if values.dim() == value_dims:
        return values.expand(length, *values.shape)
    if values.dim() == value_dims + 1 and len(values) == length:
        return values
    if values.dim() == value_dims + 1 and len(values) == count:
        full = values.new_zeros(length, *values.shape[1:])
        full[replaced] = values
        return full
    raise ValueError(
        f"a baseline tensor must hold one value, one per position ({length}) or one per feature "
        f"position ({count}); got shape {tuple(values.shape)}"
    )
