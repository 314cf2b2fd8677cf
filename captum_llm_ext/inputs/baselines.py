"""Baselines: what stands in place of an absent feature, as token ids or as embeddings.

A new baseline of embeddings is one function and one line in `EMBEDDING_BASELINES`; of tokens, a
case in `baseline_ids`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from captum_llm_ext.compat import CaptumTextTokenInput, InterpretableInput
from captum_llm_ext.model.layers import embedded, known_token_embedding, token_embedding

SPECIAL_BASELINES = ("pad", "eos", "unk")
NEAREST = "nearest"
TEXT = "text"
IDS_AT_ONCE = 8192  # of the vocabulary, to be embedded

BaselineSpec = int | str | tuple[str, Any] | Tensor | None


@dataclass(frozen=True)
class PathStart:
    """Where a path starts: ids (1, length), and embeddings where no token id stands for them.

    embeddings: (length, hidden) for the positions in `replaced` (length,), or None.
    """

    ids: Tensor
    replaced: Tensor
    embeddings: Tensor | None = None


def _zero(model: nn.Module) -> Tensor:
    return torch.zeros_like(embedded(torch.tensor(0), model))


def _mean(model: nn.Module) -> Tensor:
    """Over the vocabulary, as the model embeds it."""
    chunks = _vocabulary(model)
    total = torch.stack([embedded(chunk, model).sum(0) for chunk in chunks]).sum(0)
    return total / sum(map(len, chunks))


def _vocabulary(model: nn.Module) -> tuple[Tensor, ...]:
    """All token ids, so many at a time that their embeddings take little memory."""
    size = token_embedding(model).weight.size(0)  # type: ignore[operator]
    return torch.arange(size).split(IDS_AT_ONCE)


EMBEDDING_BASELINES: dict[str, Callable[[nn.Module], Tensor]] = {
    # name: the embedding (hidden,) that stands for every absent token
    "zero": _zero,
    "mean": _mean,
}


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
    baselines = own_baseline(inp) if baselines is None else baselines
    return _start_at(baselines, ids, replaced, getattr(inp, "tokenizer", None), model)


def _start_at(
    baselines: BaselineSpec, ids: Tensor, replaced: Tensor, tokenizer: Any, model: nn.Module
) -> PathStart:
    if not replaced.any():
        return PathStart(ids, replaced)
    if not _is_embedding(baselines):
        absent = baseline_ids(baselines, ids[0], replaced, tokenizer, model)
        return PathStart(torch.where(replaced, absent, ids), replaced)
    if isinstance(baselines, str):
        baselines = EMBEDDING_BASELINES[baselines](model)
    if not isinstance(baselines, Tensor):
        raise TypeError(f"expected a tensor of embeddings, got {type(baselines).__name__}")
    width = token_embedding(model).weight.size(1)  # type: ignore[operator]
    if baselines.size(-1) != width:
        raise ValueError(f"baseline embeddings must be {width} wide, got {tuple(baselines.shape)}")
    return PathStart(ids, replaced, _per_position(baselines.to(ids.device), replaced, 1))


def template_start(
    neutral: BaselineSpec,
    values: Sequence[Sequence[int]],
    value_at: Tensor,
    ids: Tensor,
    tokenizer: Any,
    model: nn.Module,
) -> PathStart:
    """The start of a template's path: each value's positions hold its baseline.

    Token by token where the counts agree; otherwise each position has the mean of the baseline's
    token embeddings; an empty baseline is the `neutral` one.

    values: the token ids of each value's baseline; value_at: (length,) the value of each position
    of `ids` (1, length), -1 for none. Positions of no value here, such as earlier target tokens
    that are features too, have the neutral baseline.

    Raises ValueError where a value has no position and its baseline has tokens.
    """
    absent = torch.zeros(len(values) + 1, dtype=torch.bool)
    absent[: len(values)] = torch.tensor([not value for value in values])
    is_neutral = (value_at >= len(values)) | _chosen(absent, value_at)
    start = _start_at(neutral, ids, is_neutral, tokenizer, model)
    new_ids, rows = start.ids.clone(), {}
    for i, value in enumerate(values):
        places = (value_at == i).nonzero().flatten()
        if value and not len(places):
            raise ValueError(
                f"value {i} of the template is empty and its baseline "
                f"{tokenizer.decode(value)!r} is not: a path has no place for it; give it an empty "
                "baseline too, or use a perturbation method (LLMAttribution)"
            )
        if value and len(value) == len(places):
            new_ids[0, places] = torch.tensor(value, device=ids.device)
        elif value:
            rows[i] = places, embedded(torch.tensor(value), model).mean(0)
    return _with_rows(replace(start, ids=new_ids), rows, model)


def baseline_ids(
    baselines: BaselineSpec, ids: Tensor, replaced: Tensor, tokenizer: Any, model: nn.Module
) -> Tensor:
    """The token id (length,) that stands for each of `ids` (length,) when it is absent.

    Only those in `replaced` (length,) count. Raises ValueError for a baseline that is no token.
    """
    if (nearest := _nearest_rank(baselines)) is not None:
        return nearest_ids(ids, nearest, model)
    if (text := _text(baselines)) is not None:
        return text_ids(text, ids, replaced, tokenizer)
    if isinstance(baselines, str) and baselines not in EMBEDDING_BASELINES:
        baselines = token_id(baselines, tokenizer)
    if isinstance(baselines, Integral):
        _check_id(int(baselines), model)
        return torch.full_like(ids, int(baselines))
    if isinstance(baselines, Tensor) and not baselines.is_floating_point():
        for token in baselines.flatten().tolist():
            _check_id(token, model)
        return _per_position(baselines.long().to(ids.device), replaced, 0)
    kind = ValueError if _is_embedding(baselines) or isinstance(baselines, list) else TypeError
    raise kind(
        "expected a baseline of tokens (an id, a token string, 'pad', 'eos', 'unk', 'nearest', "
        "('text', a text) or a tensor of ids); embeddings ('zero', 'mean' or a tensor), and "
        f"several in a list, are for methods with a path alone; got {_shown(baselines)}: pass "
        "baselines= with one of tokens"
    )


def text_ids(text: str, ids: Tensor, replaced: Tensor, tokenizer: Any) -> Tensor:
    """For the `replaced` (length,) of `ids` (length,) the tokens of a text in order, again from its
    start where it is shorter; special tokens stay."""
    given = tokenizer.encode(text, add_special_tokens=False)
    if not given:
        raise ValueError(f"a baseline of text must have a token, got {text!r}")
    special = torch.tensor(getattr(tokenizer, "all_special_ids", []), device=ids.device)
    places = (replaced & ~torch.isin(ids, special)).nonzero().flatten()
    found = ids.clone()
    found[places] = torch.tensor(given, device=ids.device).repeat(len(places))[: len(places)]
    return found


def nearest_ids(ids: Tensor, rank: int, model: nn.Module) -> Tensor:
    """For each of `ids` (length,) the `rank`-th nearest other token by cosine of the embeddings."""
    vocabulary = _vocabulary(model)
    size = sum(map(len, vocabulary))
    if not (isinstance(rank, Integral) and 1 <= rank < size):
        raise ValueError(f"the rank of 'nearest' must be in 1…{size - 1}, got {rank!r}")
    own = normalize(embedded(ids, model), dim=-1)
    cosines, nearest = own[:, :0], own[:, :0].long()
    for chunk in vocabulary:
        cosine = own @ normalize(embedded(chunk, model), dim=-1).T
        others = chunk.to(own.device).expand(cosine.shape)
        cosine[others == ids.to(own.device)[:, None]] = -torch.inf
        cosines, nearest = torch.cat([cosines, cosine], 1), torch.cat([nearest, others], 1)
        cosines, best = cosines.topk(min(rank, cosines.size(1)))
        nearest = nearest.gather(1, best)
    return nearest[:, -1].to(ids.device)


def _chosen(flags: Tensor, index: Tensor) -> Tensor:
    """flags[index], where an index out of range is False."""
    known = (index >= 0) & (index < len(flags))
    return known & flags.to(index.device)[index.clamp(0, len(flags) - 1)]


def _with_rows(
    start: PathStart, rows: dict[int, tuple[Tensor, Tensor]], model: nn.Module
) -> PathStart:
    """The start with embeddings put at some positions, each entry (positions, (hidden,))."""
    if not rows:
        return start
    replaced = start.replaced.clone() if start.embeddings is not None else start.replaced & False
    width = next(iter(rows.values()))[1].numel()
    values = start.embeddings
    values = torch.zeros(len(replaced), width) if values is None else values.float().clone()
    values = values.to(replaced.device)
    for places, row in rows.values():
        replaced[places] = True
        values[places] = row.to(values.device)
    return PathStart(start.ids, replaced, values)


def needs_prompt(baselines: BaselineSpec) -> bool:
    """Whether the baseline cannot be told from the tokenizer alone."""
    known = _nearest_rank(baselines) is None and _text(baselines) is None
    return _is_embedding(baselines) or not known


def own_baseline(inp: InterpretableInput) -> BaselineSpec:
    """The baseline that a token input was made, or attributed, with."""
    named = getattr(inp, "named_baseline", None)
    return getattr(inp, "baselines", 0) if named is None else named


def each_baseline(
    baselines: BaselineSpec | list[BaselineSpec], inp: InterpretableInput
) -> list[BaselineSpec]:
    """The baselines to average over: those given, or those that the input was attributed with."""
    given = getattr(inp, "named_baseline", None) if baselines is None else baselines
    return given if isinstance(given, list) else [given]


def attributed_with(
    inp: InterpretableInput, baselines: BaselineSpec | list[BaselineSpec]
) -> InterpretableInput:
    """The input of a result, which knows the baselines that it was attributed with."""
    if baselines is None or not isinstance(inp, CaptumTextTokenInput):
        return inp
    attributed: Any = copy(inp)
    attributed.named_baseline = baselines
    return attributed


def _shown(baselines: Any) -> str:
    if isinstance(baselines, Tensor):
        return f"a tensor {tuple(baselines.shape)} of {baselines.dtype}"
    return repr(baselines)


def _text(baselines: BaselineSpec) -> str | None:
    if isinstance(baselines, tuple) and len(baselines) == 2 and baselines[0] == TEXT:
        return str(baselines[1])
    return None


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
            f"baseline also one of {', '.join((*SPECIAL_BASELINES, *EMBEDDING_BASELINES))}"
        )
    return int(found)


def token_ids(tokens: Sequence[int] | Sequence[str] | None, tokenizer: Any) -> list[int]:
    """The ids of tokens given as ids or strings; none for None."""
    return [token_id(t, tokenizer) if isinstance(t, str) else t for t in tokens or ()]


def _check_id(token: int, model: nn.Module) -> None:
    size = getattr(known_token_embedding(model), "num_embeddings", None)
    if token < 0 or (size is not None and token >= size):
        raise ValueError(f"the baseline ids must be in the vocabulary of {size}, got {token}")


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
