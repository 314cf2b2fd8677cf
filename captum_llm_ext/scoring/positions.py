"""Which of the ids that a model is fed the positions of a layer belong to.

A causal model's layers hold a position for every id. Those of an encoder-decoder model hold one
for the encoder's ids, for the decoder's, or, as its token embeddings here, for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from captum_llm_ext.model.adapter import Part, parts_of
from captum_llm_ext.model.hooks import LayerState, tracing
from captum_llm_ext.model.layers import Site
from captum_llm_ext.scoring.teacher_forcing import TargetSpan, TeacherForcing


def place_states(
    forcing: TeacherForcing,
    span: TargetSpan,
    states: Mapping[Site, LayerState],
    sites: Sequence[Site],
    column_at: Tensor | None = None,
) -> None:
    """Tell each state its first position's place among the ids; refuse what is no position.

    column_at: (length,) the feature of each id, -1 for none; a layer that holds none is refused.
    """
    ids = forcing.fed(forcing.ids, span)
    parts = parts_of(forcing.model, ids.size(1))
    found = {s: _matching(states.get(s), ids, parts, s) for s in sites}
    if any(len(matching) > 1 for matching in found.values()):
        found = _told_apart(forcing, ids, found)
    for site, (part, *_) in found.items():
        states[site].first = part[0]
        if column_at is not None and states[site].depends_on_tokens:
            _check_features(site, column_at[part[0] :])


def _matching(
    state: LayerState | None, ids: Tensor, parts: Sequence[Part], site: Site
) -> list[Part]:
    """The parts of the ids that the state has as many positions as."""
    if state is None:
        raise ValueError(f"layer {site.name!r} does not run in the model's forward pass")
    if not state.depends_on_tokens:
        return [parts[0]]
    shape = state.tensor.shape
    # With as many heads as tokens, (1, heads, sequence, width) would be taken for tokens.
    unclear = len(shape) > 3 and shape[1] == shape[2]
    matching = [(a, b) for a, b in parts if shape[:2] == (len(ids), b - a)]
    if unclear or not matching:
        expected = " or ".join(str((len(ids), b - a)) for a, b in parts)
        raise ValueError(
            f"expected layer {site.name!r} to hold a tensor (batch, sequence, …) with "
            f"{expected} first, got {tuple(shape)}; choose another layer"
        )
    return matching


def _told_apart(
    forcing: TeacherForcing, ids: Tensor, found: Mapping[Site, list[Part]]
) -> dict[Site, list[Part]]:
    """Of parts of one length, that which changes its length as the layer does with other ids."""
    # The last id is the decoder's, and no position of the encoder looks at it.
    other = ids[:, :-1] if ids.size(1) > 2 else torch.cat([ids, ids[:, -1:]], dim=1)
    with torch.no_grad(), tracing(forcing.model, list(found), [], other) as (states, _):
        forcing.model(other)
    before, after = (parts_of(forcing.model, x.size(1)) for x in (ids, other))
    return {
        site: [
            part
            for part, (a, b) in zip(before, after, strict=True)
            if part in matching and (len(matching) == 1 or b - a == states[site].tensor.size(1))
        ]
        for site, matching in found.items()
    }


def _check_features(site: Site, columns: Tensor) -> None:
    if not (columns >= 0).any():
        raise ValueError(
            f"layer {site.name!r} holds the decoder's positions, of which none is a feature: "
            "choose a layer of the encoder, or include_generated=True"
        )
