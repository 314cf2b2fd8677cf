"""The model's pass at the input itself: what each layer holds there, and at which positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.inputs.baselines import PathStart
from captum_llm_ext.inputs.features import Features
from captum_llm_ext.model.adapter import Adapter, Part, layout_of
from captum_llm_ext.model.handed_on import nodes_of, not_replayable
from captum_llm_ext.model.hooks import LayerState, tracing, writing
from captum_llm_ext.model.layers import (
    Site,
    decoder_blocks,
    find_token_embedding,
    token_embedding,
)
from captum_llm_ext.model.memory import counting_saved_bytes
from captum_llm_ext.scoring.positions import Positions, TargetSpan
from captum_llm_ext.scoring.teacher_forcing import Pass, TeacherForcing


@dataclass(frozen=True)
class Trace:
    """One pass over a span of the target: what gradients are taken in, or paths begin from.

    layers: the state of each layer; positions: where it stands in the row; scores: (1, len(span)
    + 1) of the tokens and of the sequence; scored: the pass with its graph, which the states have
    too. Paths have no use for the graph, and this instead: blocks: the model's blocks,
    block_outputs what each returned, and not_replayable the numbers of first blocks that hand on
    more than that; saved_bytes: what autograd keeps of a pass.
    """

    forcing: TeacherForcing
    span: TargetSpan
    layers: Mapping[Site, LayerState]
    positions: Mapping[Site, Positions]
    scores: Tensor
    scored: Pass | None
    blocks: Sequence[nn.Module] = ()
    block_outputs: Sequence[Any] = ()
    not_replayable: AbstractSet[int] = frozenset()
    saved_bytes: int = 0

    @classmethod
    def of(
        cls,
        forcing: TeacherForcing,
        span: TargetSpan,
        sites: Sequence[Site],
        features: Features,
        for_paths: bool,
    ) -> tuple[Trace, Pass]:
        """Run the model once, and tell the position of each layer; and that pass."""
        model, ids = forcing.model, forcing.fed(span)
        blocks = decoder_blocks(model) if for_paths else []
        count = counting_saved_bytes(model.parameters()) if for_paths else nullcontext(lambda: 0)
        with count as saved_bytes, tracing(model, sites, blocks, ids) as (layers, ended):
            scored = forcing.run(ids, span, sites)
            scores = all_scores(scored)
        parts = _parts(forcing, ids, layers, sites)
        positions = {
            site: Positions.of_layer(forcing.row, part[0], features) for site, part in parts.items()
        }
        for site in sites:
            if layers[site].depends_on_tokens:
                _check_features(site, positions[site])
        trace = cls(forcing, span, layers, positions, scores.detach(), scored)
        if not for_paths:
            return trace, scored
        without_graph = replace(
            trace,
            layers={s: replace(x, tensor=x.tensor.detach()) for s, x in layers.items()},
            scored=None,
            blocks=blocks,
            block_outputs=[block.output for block in ended],
            not_replayable=not_replayable(
                [block.graph for block in ended], nodes_of((scores, scored.head.below))
            ),
            saved_bytes=saved_bytes(),
        )
        return without_graph, scored.detached()

    def replayable(self, sites: Sequence[Site]) -> int:
        """How many of the first blocks need not run again for paths of these layers."""
        most = min(self.layers[site].blocks_before for site in sites)
        return max(n for n in range(most + 1) if n not in self.not_replayable)

    @property
    def alive(self) -> list[Site]:
        """The layers that see the tokens."""
        return [site for site, layer in self.layers.items() if layer.depends_on_tokens]

    def values_at(self, start: PathStart | None, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The layers' values where a path starts: as they are with the embeddings replaced.

        Raises:
            ValueError: a layer does not run there.
        """
        if start is None:
            raise ValueError("a path needs a baseline to start from, got none")
        forcing, model = self.forcing, self.forcing.model
        ids = forcing.row.fed(start.ids, self.span)
        embedding = find_token_embedding(model)
        first = all(site.module is embedding and not site.at_input for site in sites)
        with torch.no_grad(), ExitStack() as stack:
            if first and not isinstance(model, Adapter):  # the model need not go on
                return dict.fromkeys(sites, self._embedded(ids, start))
            if start.embeddings is not None:
                site = Site("input embedding", token_embedding(model))
                stack.enter_context(writing({site: self._embedded(ids, start)}))
            layers, _ = stack.enter_context(tracing(model, sites, [], ids))
            forcing.run(ids, self.span)
        return {site: layers[site].tensor for site in sites}

    def _embedded(self, ids: Tensor, start: PathStart) -> Tensor:
        """The token embeddings where the path starts."""
        embedded: Tensor = token_embedding(self.forcing.model)(ids)
        if start.embeddings is None:
            return embedded
        row = self.forcing.row
        replaced = row.fed(start.replaced, self.span)[:, None].to(embedded.device)
        values = row.fed(start.embeddings, self.span, dim=0).to(embedded)
        return torch.where(replaced, values, embedded)


def all_scores(scored: Pass) -> Tensor:
    """(rows, len(span) + 1) the scores of the tokens and, last, of the sequence."""
    return torch.cat([scored.token_scores(), scored.sequence_score()[:, None]], 1)


def _parts(
    forcing: TeacherForcing, ids: Tensor, layers: Mapping[Site, LayerState], sites: Sequence[Site]
) -> dict[Site, Part]:
    """The part of the fed ids that each layer holds; a layer that holds no positions is refused."""
    parts = layout_of(forcing.model).parts(ids.size(1))
    matches = {site: _matching(layers.get(site), ids, parts, site) for site in sites}
    if any(len(several) > 1 for several in matches.values()):
        matches = _told_apart(forcing, ids, matches)
    return {site: part for site, (part, *_) in matches.items()}


def _matching(
    layer: LayerState | None, ids: Tensor, parts: Sequence[Part], site: Site
) -> list[Part]:
    """The parts of the ids that have as many positions as the layer."""
    if layer is None:
        raise ValueError(f"layer {site.name!r} does not run in the model's forward pass")
    if not layer.depends_on_tokens:
        return [parts[0]]
    shape = layer.tensor.shape
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
    forcing: TeacherForcing, ids: Tensor, matches: Mapping[Site, list[Part]]
) -> dict[Site, list[Part]]:
    """The parts that change their length as the layer does, with one id more or fewer."""
    # The last id is the decoder's, and no position of the encoder looks at it.
    other = ids[:, :-1] if ids.size(1) > 2 else torch.cat([ids, ids[:, -1:]], dim=1)
    with torch.no_grad(), tracing(forcing.model, list(matches), [], other) as (layers, _):
        forcing.model(other)
    before, after = (layout_of(forcing.model).parts(x.size(1)) for x in (ids, other))
    return {
        site: [
            part
            for part, (a, b) in zip(before, after, strict=True)
            if part in matching and (len(matching) == 1 or b - a == layers[site].tensor.size(1))
        ]
        for site, matching in matches.items()
    }


def _check_features(site: Site, positions: Positions) -> None:
    if not (positions.column_of >= 0).any():
        raise ValueError(
            f"layer {site.name!r} holds the decoder's positions, and none of them is a feature: "
            "choose a layer of the encoder, or include_generated=True"
        )
