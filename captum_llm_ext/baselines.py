"""Baselines: what stands in place of an absent feature, as token ids or as embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.hooks import known_token_embedding, token_embedding

SPECIAL_BASELINES = ("pad", "eos", "unk")
EMBEDDING_BASELINES = ("zero", "mean")

NEAREST = "nearest"

BaselineSpec = int | str | tuple[str, int] | Tensor | None


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
        baselines = own_baseline(inp)
    if not _is_embedding(baselines):
        absent = baseline_ids(baselines, ids[0], replaced, tokenizer, model)
        return PathStart(torch.where(replaced, absent, ids), replaced)
    if isinstance(baselines, str):
        baselines = _named_embedding(baselines, model)
    if not isinstance(baselines, Tensor):
        raise TypeError(f"expected a tensor of embeddings, got {type(baselines).__name__}")
    width = token_embedding(model).weight.size(1)  # type: ignore[operator]
    if baselines.size(-1) != width:
        raise ValueError(f"baseline embeddings must be {width} wide, got {tuple(baselines.shape)}")
    return PathStart(ids, replaced, _per_position(baselines.to(ids.device), replaced, 1))


def baseline_ids(
    baselines: BaselineSpec, ids: Tensor, replaced: Tensor, tokenizer: Any, model: nn.Module
) -> Tensor:
    """The token id (length,) that stands for each of `ids` (length,) when it is absent.

    Only those in `replaced` (length,) count. Raises ValueError for a baseline that is no token.
    """
    if (nearest := _nearest_rank(baselines)) is not None:
        return nearest_ids(ids, nearest, model)
    if isinstance(baselines, str) and baselines not in EMBEDDING_BASELINES:
        baselines = token_id(baselines, tokenizer)
    if isinstance(baselines, Integral):
        _check_id(int(baselines), model)
        return torch.full_like(ids, int(baselines))
    if isinstance(baselines, Tensor) and not baselines.is_floating_point():
        for token in baselines.flatten().tolist():
            _check_id(token, model)
        return _per_position(baselines.long().to(ids.device), replaced, 0)
    kind = ValueError if _is_embedding(baselines) else TypeError
    raise kind(
        "expected a baseline of tokens (an id, a token string, 'pad', 'eos', 'unk', 'nearest' or a "
        f"tensor of ids), or, for methods with gradients, of embeddings; got {baselines!r}"
    )


def nearest_ids(ids: Tensor, rank: int, model: nn.Module) -> Tensor:
    """For each of `ids` (length,) the `rank`-th nearest other token by cosine of the embeddings."""
    weight: Tensor = token_embedding(model).weight  # type: ignore[assignment]
    if not (isinstance(rank, int) and 1 <= rank < len(weight)):
        raise ValueError(f"the rank of 'nearest' must be in 1…{len(weight) - 1}, got {rank!r}")
    unit = torch.nn.functional.normalize(weight.detach().float(), dim=-1)
    index = ids.to(unit.device)
    cosine = unit[index] @ unit.T
    cosine.scatter_(1, index[:, None], -torch.inf)
    return cosine.topk(rank).indices[:, -1].to(ids.device)


def needs_model(baselines: BaselineSpec) -> bool:
    """Whether the model's embeddings are needed to know what the baseline is."""
    return _is_embedding(baselines) or _nearest_rank(baselines) is not None


def own_baseline(inp: InterpretableInput) -> BaselineSpec:
    """The baseline that a token input was made with."""
    named = getattr(inp, "named_baseline", None)
    return getattr(inp, "baselines", 0) if named is None else named


def _nearest_rank(baselines: BaselineSpec) -> int | None:
    if isinstance(baselines, tuple) and len(baselines) == 2 and baselines[0] == NEAREST:
        return baselines[1]
    return 1 if isinstance(baselines, str) and baselines == NEAREST else None


def _is_embedding(baselines: BaselineSpec) -> bool:
    if isinstance(baselines, Tensor):
        return baselines.is_floating_point()
    return isinstance(baselines, str) and baselines in EMBEDDING_BASELINES


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
    size = getattr(known_token_embedding(model), "num_embeddings", None)
    if token < 0 or (size is not None and token >= size):
        raise ValueError(f"the baseline ids must be in the vocabulary of {size}, got {token}")


def _named_embedding(name: str, model: nn.Module) -> Tensor:
    """The zero vector, or the mean of all token embeddings, (hidden,), as the model embeds them."""
    embedding = token_embedding(model)
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
    last = int(replaced.nonzero().max()) + 1  # of a prompt, whose target is not replaced
    if values.dim() == value_dims + 1 and last <= len(values) < length:
        values = torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
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
