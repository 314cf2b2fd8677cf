"""What blocks hand on besides their outputs, read off the graph of one pass.

A block that does not change along a path is not run again: it returns what the last such block
returned. That is right only if nothing else of it is used later. Gemma's last layers take keys and
values from earlier ones, and some models add the output of a block to that of a later one. In the
graph of a pass, those are ways from a later block into an earlier one that miss the block between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


@dataclass(frozen=True, eq=False)
class BlockGraph:
    """The nodes of the tensors that a block took and returned."""

    inputs: list[Node]
    outputs: list[Node]


def nodes_of(value: Any) -> list[Node]:
    """The nodes of all tensors in a value that carry gradients."""
    return [get_gradient_edge(x).node for x in _tensors(value) if x.requires_grad]


def not_replayable(blocks: Sequence[BlockGraph], scores: Iterable[Node]) -> set[int]:
    """The numbers of first blocks that must not be replayed, from the graph under the scores.

    blocks: in the order in which they ran.
    """
    inside: dict[Node, int] = {}  # index of the block in which a node was made
    output_of: dict[Node, int] = {}
    refused: set[int] = set()

    def walk(block: int, nodes: Iterable[Node], passed: set[Node]) -> Iterator[Node]:
        """What lies between these nodes and earlier blocks; `passed` is not walked again."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in passed:
                continue
            passed.add(node)
            if node in output_of:  # right in the last replayed block, which returns it
                refused.update(range(output_of[node] + 2, block + 1))
            elif node in inside:
                refused.update(range(inside[node] + 1, block + 1))
            else:
                yield node
                waiting += [edge for edge, _ in node.next_functions if edge is not None]

    for i, block in enumerate(blocks):
        passed: set[Node] = set()
        list(walk(i, block.inputs, passed))
        inside.update((node, i) for node in list(walk(i, block.outputs, passed)))
        output_of.update((node, i) for node in block.outputs)
    list(walk(len(blocks), scores, set()))
    return refused


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
