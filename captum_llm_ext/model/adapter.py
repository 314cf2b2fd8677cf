"""A model of another kind, run as a causal one: rows of ids in, logits out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from captum_llm_ext.model.layers import Site, decoder_blocks
from captum_llm_ext.model.parts import named_by_model

Part = tuple[int, int]


class Layout:
    """How a model uses a row of ids. These answers are a causal model's, which runs as it is."""

    def site(self, site: Site) -> Site:
        """Where a layer of the model is read."""
        return site

    def prompt(self, ids: Tensor) -> Tensor:
        """The ids (n_prompt,) that a row begins with, for the ids (n,) of a prompt."""
        return ids

    def parts(self, length: int) -> list[Part]:
        """The parts (start, stop) of `length` ids that a layer may hold."""
        return [(0, length)]

    def context(self, n_prompt: int, n_target: int) -> int:
        """How many positions the model needs for a prompt and the target ids after it."""
        return n_prompt + n_target

    def whole_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks that hold everything the scores depend on."""
        return decoder_blocks(model)

    def check_embedding_baseline(self, replaced: Tensor) -> None:
        """Refuse embeddings as the baseline of the `replaced` (length,) positions."""


class Adapter(nn.Module, Layout):
    """Wraps a model so that ``forward(ids)`` of one row of ids gives ``.logits`` to be scored.

    Layers are those of the wrapped model, read and replaced where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", None)

    def get_input_embeddings(self) -> nn.Module | None:
        return named_by_model(self.model, "get_input_embeddings")

    def get_output_embeddings(self) -> nn.Module | None:
        return named_by_model(self.model, "get_output_embeddings")

    @abstractmethod
    def logits_after(self, prompts: Sequence[Tensor], fed: Tensor) -> Tensor:
        """Logits (rows, n_output, …) after prompts of any lengths and the target's `fed` ids."""


_CAUSAL = Layout()


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model: its own where it is an adapter, else a causal one."""
    return model if isinstance(model, Adapter) else _CAUSAL
