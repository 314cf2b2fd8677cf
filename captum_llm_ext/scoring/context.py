"""How many positions a model takes: a longer prompt and target are refused, and no others.

The config says how far a model was trained: `max_position_embeddings`, or the factor of its rope
scaling times the length before scaling, where that is more. Attention with linear biases (ALiBi)
has no such length, except where the biases are a table (MPT). A table of positions has as many
rows as it has, whatever the config says: OPT and BART skip 2 rows, RoBERTa its pad token's, and LED
has two lengths. So a pass shows which rows are looked up, where a table may be too short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_llm_ext.model.adapter import layout_of
from captum_llm_ext.model.hooks import evaluating
from captum_llm_ext.model.layers import find_token_embedding
from captum_llm_ext.model.random_state import same_random_state
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing

MOST_SKIPPED = 8  # rows that a table of positions may skip


def check_context(forcing: TeacherForcing, run: Callable[[], object] | None = None) -> None:
    """Refuse a prompt and target that are longer than the model takes.

    run: a pass over them; the forcing's own by default.
    """
    model, row, target = forcing.model, forcing.row, forcing.target
    length = layout_of(model).context(row.n_prompt, row.n_target)
    what = f"the prompt ({row.n_prompt} tokens) and target ({len(target)}) are"
    _refuse_beyond_limit(model, length, what)
    if has_short_table(model, length):
        run = run or partial(forcing.run, forcing.ids, forcing.whole)
        with torch.no_grad(), evaluating(model), same_random_state(), refusing_missing_rows(what):
            run()


@contextmanager
def generating(model: nn.Module, n_prompt: int) -> Iterator[None]:
    """Refuse a prompt that is longer than the model takes, and a target that becomes so.

    The prompt's ids must be in the vocabulary.
    """
    what = f"the prompt ({n_prompt} tokens) is"
    _refuse_beyond_limit(model, n_prompt, what)
    with refusing_missing_rows(f"the prompt ({n_prompt} tokens) and the generated target are"):
        yield


def _refuse_beyond_limit(model: nn.Module, length: int, what: str) -> None:
    limit = context_limit(getattr(model, "config", None))
    if limit is not None and length > limit:
        raise ValueError(
            f"{what} longer than the model's context of {limit} tokens: shorten prompt or target"
        )


def context_limit(config: Any) -> int | None:
    """The number of positions that a config allows, or None where it names none."""
    config = getattr(config, "get_text_config", lambda: config)()
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    trained = next((n for n in lengths if isinstance(n, int) and n > 0), None)
    biases = getattr(config, "alibi", False) is True
    if trained is None or biases or getattr(config, "position_embedding_type", "") == "alibi":
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    scaling = scaling if isinstance(scaling, Mapping) else {}
    # Some families have one entry for each kind of layer, and all layers see all positions.
    by_layer = [entry for entry in scaling.values() if isinstance(entry, Mapping)]
    return max(trained, min(_scaled(entry, trained) for entry in by_layer or [scaling]))


def _scaled(scaling: Mapping[str, Any], trained: int) -> int:
    """The length that a rope scaling reaches from the length before it."""
    original = scaling.get("original_max_position_embeddings") or trained
    return int(original * (scaling.get("factor") or 1))


# --- tables of positions -------------------------------------------------------------------------


def has_short_table(model: nn.Module, length: int) -> bool:
    """Whether a table besides the token embedding may have too few rows for so many positions."""
    tokens = find_token_embedding(model)
    inside = set() if tokens is None else set(tokens.modules())
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside)
    return any(table.num_embeddings < length + MOST_SKIPPED for table in tables)


@contextmanager
def refusing_missing_rows(what: str) -> Iterator[None]:
    """Refuse, before it is looked up, a row that a table does not have.

    After that look-up a GPU would do nothing more. The message begins with `what`.
    """
    try:
        with _CheckingTables():
            yield
    except _NoSuchRowError as error:
        raise ValueError(
            f"{what} longer than the model takes: {error}; shorten prompt or target"
        ) from None


class _NoSuchRowError(Exception):
    """A row is looked up that a table does not have."""


class _CheckingTables(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOK_UPS:
            n_rows, rows = _LOOK_UPS[func](*args, **kwargs)
            if rows.numel() and int(rows.max()) >= n_rows:
                raise _NoSuchRowError(f"its table of {n_rows} positions has no row {rows.max()}")
        return func(*args, **kwargs)


# From a look-up's arguments to the number of rows in the table, and those that are looked up.
_LOOK_UPS: dict[Any, Callable[..., tuple[int, Tensor]]] = {
    nn.functional.embedding: lambda input, weight, *_, **__: (len(weight), input),
    torch.embedding: lambda weight, indices, *_, **__: (len(weight), indices),
    torch.gather: lambda input, dim, index, **_: (input.size(dim), index),
    Tensor.gather: lambda input, dim, index, **_: (input.size(dim), index),
}
