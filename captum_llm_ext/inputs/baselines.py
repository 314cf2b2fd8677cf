"""Baselines: what stands in place of an absent feature, as token ids or as embeddings.

A new baseline of embeddings is one function and one line in `EMBEDDING_BASELINES`; one of token
ids, which a user writes as a pair (name, value), is one function and one line in
`TOKEN_BASELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from captum_llm_ext.compat import (
    CaptumTextTemplateInput,
    CaptumTextTokenInput,
    InterpretableInput,
)
from captum_llm_ext.model.layers import embed, find_token_embedding, token_embedding

SPECIAL_BASELINES = ("pad", "eos", "unk")
REMOVE = "remove"  # drops absent tokens, so that the others close up; for perturbation alone
IDS_AT_ONCE = 8192  # of the vocabulary, for their embeddings
COMMON_WORDS = """
    the of and to in a is that for it was on are as with his they at be this have from or one
    had by but not what all were we when your can said there use an each which she do how their if
    will up other about out many then them these so some her would make like him into time has
    look two more go see no way could people my than first been call who its now find long
    down day did get come made may part
"""

BaselineSpec = int | str | tuple[str, Any] | Tensor | None


# --- embeddings ----------------------------------------------------------------------------------


def _zero(model: nn.Module) -> Tensor:
    return torch.zeros_like(embed(torch.tensor(0), model))


def _mean(model: nn.Module) -> Tensor:
    """The mean over the vocabulary."""
    chunks = _vocabulary(model)
    total = torch.stack([embed(chunk, model).sum(0) for chunk in chunks]).sum(0)
    return total / sum(map(len, chunks))


EMBEDDING_BASELINES: dict[str, Callable[[nn.Module], Tensor]] = {
    # name: the embedding (hidden,) that stands for every absent token
    "zero": _zero,
    "mean": _mean,
}


# --- token ids -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AbsentTokens:
    """The absent tokens of a prompt: `replaced` (length,) of `ids` (length,)."""

    ids: Tensor
    replaced: Tensor
    tokenizer: Any
    model: nn.Module


def text_ids(text: str, absent: AbsentTokens) -> Tensor:
    """The tokens of a text in order, again from its start where it is shorter.

    Special tokens of the prompt stay.
    """
    ids, tokenizer = absent.ids, absent.tokenizer
    tokens = tokenizer.encode(str(text), add_special_tokens=False)
    if not tokens:
        raise ValueError(f"a baseline of text must have a token, got {text!r}")
    special = torch.tensor(getattr(tokenizer, "all_special_ids", []), device=ids.device)
    positions = (absent.replaced & ~torch.isin(ids, special)).nonzero().flatten()
    cycled = torch.tensor(tokens, device=ids.device).repeat(len(positions))[: len(positions)]
    return ids.index_put((positions,), cycled)


def nearest_ids(rank: int, absent: AbsentTokens) -> Tensor:
    """For each token the `rank`-th nearest other token, by cosine of the embeddings."""
    ids, model = absent.ids, absent.model
    vocabulary = _vocabulary(model)
    size = sum(map(len, vocabulary))
    if not (isinstance(rank, Integral) and 1 <= rank < size):
        raise ValueError(f"the rank of 'nearest' must be in 1…{size - 1}, got {rank!r}")
    embeddings = normalize(embed(ids, model), dim=-1)
    cosines, nearest = embeddings[:, :0], embeddings[:, :0].long()
    for chunk in vocabulary:
        cosine = embeddings @ normalize(embed(chunk, model), dim=-1).T
        others = chunk.to(cosine.device).expand(cosine.shape)
        cosine[others == ids.to(cosine.device)[:, None]] = -torch.inf
        cosines, nearest = torch.cat([cosines, cosine], 1), torch.cat([nearest, others], 1)
        cosines, best = cosines.topk(min(rank, cosines.size(1)))
        nearest = nearest.gather(1, best)
    return nearest[:, -1].to(ids.device)


def common_ids(seed: int, absent: AbsentTokens) -> Tensor:
    """For each token a common English word, drawn anew for each; the same for the same seed.

    Special tokens of the prompt stay.
    """
    if not isinstance(seed, Integral):
        raise ValueError(f"the number beside 'common' seeds the words, got {seed!r}")
    tokenizer, ids = absent.tokenizer, absent.ids
    encoded = [
        tokenizer.encode(before + word, add_special_tokens=False)
        for before in (" ", "")
        for word in COMMON_WORDS.split()
    ]
    words = sorted({tokens[0] for tokens in encoded if len(tokens) == 1})
    if not words:
        raise ValueError(
            "the baseline 'common' needs English words, and the tokenizer has none as one token: "
            "give ('text', a text) of the model's language"
        )
    generator = torch.Generator().manual_seed(int(seed))
    drawn = torch.tensor(words)[torch.randint(len(words), (len(ids),), generator=generator)]
    special = torch.tensor(getattr(tokenizer, "all_special_ids", []), device=ids.device)
    return torch.where(torch.isin(ids, special), ids, drawn.to(ids.device))


TOKEN_BASELINES: dict[str, Callable[[Any, AbsentTokens], Tensor]] = {
    # name: from the value beside the name to the ids (length,) in place of the absent tokens
    "nearest": nearest_ids,
    "common": common_ids,
    "text": text_ids,
}
ALONE = {"nearest": 1, "common": 0}  # the value of a name that a user writes alone


def _vocabulary(model: nn.Module) -> tuple[Tensor, ...]:
    """All token ids, in chunks whose embeddings take little memory."""
    size = token_embedding(model).weight.size(0)  # type: ignore[operator]
    return torch.arange(size).split(IDS_AT_ONCE)


# --- from what a user writes to ids and embeddings -----------------------------------------------


class Baseline(NamedTuple):
    """A baseline as a user wrote it, parsed.

    kind: "ids" (value: an id or a tensor of ids), a key of `TOKEN_BASELINES` (value: what stands
    beside the name), "embeddings" (value: a key of `EMBEDDING_BASELINES` or a tensor), "remove"
    (absent tokens are dropped), or "unknown" (value: as it was written).
    """

    kind: str
    value: Any

    @classmethod
    def parse(cls, spec: Any, tokenizer: Any) -> Baseline:
        """The baseline that `spec` means. Raises ValueError for a str that names none."""
        if isinstance(spec, Tensor) and spec.dtype != torch.bool:
            return cls("embeddings" if spec.is_floating_point() else "ids", spec)
        if isinstance(spec, Integral) and not isinstance(spec, bool):
            return cls("ids", int(spec))
        is_pair = isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str)
        if is_pair and spec[0] in TOKEN_BASELINES:
            return cls(*spec)
        if not isinstance(spec, str):
            return cls("unknown", spec)
        if spec in ALONE:
            return cls(spec, ALONE[spec])
        if spec == REMOVE:
            return cls(REMOVE, REMOVE)
        if spec in EMBEDDING_BASELINES:
            return cls("embeddings", spec)
        return cls("ids", token_id(spec, tokenizer))


def baseline_ids(baseline: Baseline, absent: AbsentTokens) -> Tensor:
    """The token ids (length,) that stand for the tokens where they are absent.

    Raises ValueError or TypeError for a baseline that is no token.
    """
    kind, value = baseline
    if kind in TOKEN_BASELINES:
        return TOKEN_BASELINES[kind](value, absent)
    if kind == "ids":
        size = getattr(find_token_embedding(absent.model), "num_embeddings", None)
        for token in value.flatten().tolist() if isinstance(value, Tensor) else [value]:
            if token < 0 or (size is not None and token >= size):
                raise ValueError(
                    f"the baseline ids must be in the vocabulary of {size}, got {token}"
                )
        ids = torch.as_tensor(value, dtype=torch.long, device=absent.ids.device)
        return _per_position(ids, absent.replaced, 0)
    raise no_tokens(baseline)


def no_tokens(baseline: Baseline) -> ValueError | TypeError:
    """The error of a baseline that is no token."""
    kind, value = baseline
    if kind == REMOVE:
        return ValueError(
            "baselines='remove' drops absent tokens, which only perturbation of token inputs can "
            "do: a path, and an answer's positions, need a token or an embedding in their place; "
            "give another baseline"
        )
    error = ValueError if kind == "embeddings" or isinstance(value, list) else TypeError
    tensor = isinstance(value, Tensor)
    shown = f"a tensor {tuple(value.shape)} of {value.dtype}" if tensor else repr(value)
    return error(
        "expected a baseline of tokens (an id, a token string, 'pad', 'eos', 'unk', 'nearest', "
        "'common', ('text', a text) or a tensor of ids); embeddings ('zero', 'mean' or a tensor), "
        f"and several in a list, are for methods with a path alone; got {shown}: pass "
        "baselines= with one of tokens"
    )


def _per_position(values: Tensor, replaced: Tensor, value_dims: int) -> Tensor:
    """Values for every position, from one for all, one per position or one per replaced one."""
    if values.dim() == value_dims:
        return values.expand(len(replaced), *values.shape)
    if values.dim() == value_dims + 2 and values.size(0) == 1:
        values = values[0]
    length, count = len(replaced), int(replaced.sum())
    end = int(replaced.nonzero().max()) + 1  # values for a prompt leave its target out
    if values.dim() == value_dims + 1 and end <= len(values) < length:
        values = torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
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


def token_id(name: str, tokenizer: Any) -> int:
    """The id of a token string, or of the special token that "pad", "eos" or "unk" names."""
    if name in SPECIAL_BASELINES:
        special = getattr(tokenizer, f"{name}_token_id", None)
        if special is None:
            raise ValueError(
                f"the tokenizer has no {name} token: set tokenizer.{name}_token or choose another"
            )
        return int(special)
    token = tokenizer.convert_tokens_to_ids([name])[0]
    unknown = token is None or token == getattr(tokenizer, "unk_token_id", None)
    if unknown and name != getattr(tokenizer, "unk_token", None):
        raise ValueError(
            f"{name!r} is not a token of the vocabulary: expected a token id or string, and as a "
            f"baseline also one of {', '.join((*SPECIAL_BASELINES, *EMBEDDING_BASELINES))}"
        )
    return int(token)


def token_ids(tokens: Sequence[int] | Sequence[str] | None, tokenizer: Any) -> list[int]:
    """The ids of tokens that are ids or strings; none for None.

    Raises:
        TypeError: a string instead of a list, whose characters would count.
    """
    if isinstance(tokens, str):
        raise TypeError(
            f"expected a list of token ids or strings, got {tokens!r}: give [{tokens!r}]"
        )
    return [token_id(t, tokenizer) if isinstance(t, str) else t for t in tokens or ()]


# --- the start of a path -------------------------------------------------------------------------


@dataclass(frozen=True)
class PathStart:
    """The start of a path: ids (1, length), and embeddings where no token id stands for them.

    embeddings: (length, hidden) for the positions in `replaced` (length,), or None.
    """

    ids: Tensor
    replaced: Tensor
    embeddings: Tensor | None = None


def path_start(
    spec: BaselineSpec, ids: Tensor, replaced: Tensor, tokenizer: Any, model: nn.Module
) -> PathStart:
    """The start for `ids` (1, length), with a baseline at the `replaced` positions (length,)."""
    if not replaced.any():
        return PathStart(ids, replaced)
    baseline = Baseline.parse(spec, tokenizer)
    if baseline.kind != "embeddings":
        absent = AbsentTokens(ids[0], replaced, tokenizer, model)
        return PathStart(torch.where(replaced, baseline_ids(baseline, absent), ids), replaced)
    named = isinstance(baseline.value, str)
    values = EMBEDDING_BASELINES[baseline.value](model) if named else baseline.value
    width = token_embedding(model).weight.size(1)  # type: ignore[operator]
    if values.size(-1) != width:
        raise ValueError(f"baseline embeddings must be {width} wide, got {tuple(values.shape)}")
    return PathStart(ids, replaced, _per_position(values.to(ids.device), replaced, 1))


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
    of `ids` (1, length), -1 for none. Positions whose value is not among these, such as earlier
    target tokens that are features too, have the neutral baseline.

    Raises ValueError where a value has no position and its baseline has tokens.
    """
    spans = [(value_at == i).nonzero().flatten() for i in range(len(values))]
    is_neutral = value_at >= 0
    for tokens, positions in zip(values, spans, strict=True):
        is_neutral[positions] = not tokens
    start = path_start(neutral, ids, is_neutral, tokenizer, model)
    ids, means = start.ids.clone(), []
    for i, (tokens, positions) in enumerate(zip(values, spans, strict=True)):
        if tokens and not len(positions):
            raise ValueError(
                f"value {i} of the template is empty and its baseline "
                f"{tokenizer.decode(tokens)!r} is not: a path has no place for it; give it an "
                "empty baseline too, or use a perturbation method (LLMAttribution)"
            )
        if tokens and len(tokens) == len(positions):
            ids[0, positions] = torch.tensor(tokens, device=ids.device)
        elif tokens:
            means.append((positions, embed(torch.tensor(tokens), model).mean(0)))
    return _with_embeddings(replace(start, ids=ids), means)


def _with_embeddings(start: PathStart, embeddings: Sequence[tuple[Tensor, Tensor]]) -> PathStart:
    """The start with more embeddings: pairs of positions and the embedding (hidden,) they share."""
    if not embeddings:
        return start
    if start.embeddings is None:
        width = len(embeddings[0][1])
        replaced = torch.zeros_like(start.replaced)
        values = torch.zeros(len(replaced), width, device=replaced.device)
    else:
        replaced, values = start.replaced.clone(), start.embeddings.float().clone()
    for positions, embedding in embeddings:
        replaced[positions] = True
        values[positions] = embedding.to(values.device)
    return PathStart(start.ids, replaced, values)


# --- the baselines of an input -------------------------------------------------------------------


def baseline_of_input(inp: InterpretableInput) -> BaselineSpec:
    """The baseline that an input was made, or attributed, with; for a template the neutral one."""
    if isinstance(inp, CaptumTextTemplateInput):
        return "mean"
    named = getattr(inp, "named_baseline", None)
    return getattr(inp, "baselines", 0) if named is None else named


def baselines_to_average(
    baselines: BaselineSpec | list[BaselineSpec], inp: InterpretableInput
) -> list[BaselineSpec]:
    """The caller's baselines, or where these are None the input's."""
    specs: Any = baseline_of_input(inp) if baselines is None else baselines
    return specs if isinstance(specs, list) else [specs]


def with_named_baseline(
    inp: InterpretableInput, baselines: BaselineSpec | list[BaselineSpec]
) -> InterpretableInput:
    """The input of a result, which keeps the baselines that it was attributed with."""
    if baselines is None or not isinstance(inp, CaptumTextTokenInput):
        return inp
    attributed: Any = copy(inp)
    attributed.named_baseline = baselines
    return attributed
