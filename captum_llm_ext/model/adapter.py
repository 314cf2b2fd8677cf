"""A model of another kind, run as the passes here run a causal one: ids in, logits out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from captum_llm_ext.model.layers import Site, decoder_blocks
from captum_llm_ext.model.parts import named_by_model

Part = tuple[int, int]


class Adapter(nn.Module):
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

    def site(self, site: Site) -> Site:
        """Where a layer of the wrapped model is to be read."""
        return site

    def prompt(self, ids: Tensor) -> Tensor:
        """The ids (n_prompt,) that a row begins with, for a prompt's own ids (n,)."""
        return ids

    def parts(self, length: int) -> list[Part]:
        """What of `length` ids a layer may hold, (start, stop): all of them, or a part."""
        return [(0, length)]

    def context(self, n_prompt: int, n_fed: int) -> int:
        """How many positions the model needs for a prompt and the target ids after it."""
        return n_prompt + n_fed

    def whole_blocks(self) -> list[nn.Module]:
        """The blocks that all which the scores depend on passes."""
        return decoder_blocks(self.model)

    @abstractmethod
    def logits_after(self, prompts: Sequence[Tensor], fed: Tensor) -> Tensor:
        """Logits (rows, n_output, …) after prompts of any lengths and the target's `fed` ids."""


def sites_in(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Where layers are to be read, in a model that may be wrapped."""
    return [model.site(site) for site in sites] if isinstance(model, Adapter) else list(sites)


def prompt_in(model: nn.Module, ids: Tensor) -> Tensor:
    """The ids (n_prompt,) that a row begins with, for a prompt's own ids (n,)."""
    return model.prompt(ids) if isinstance(model, Adapter) else ids


def parts_of(model: nn.Module, length: int) -> list[Part]:
    """What of `length` ids a layer may hold, (start, stop)."""
    return model.parts(length) if isinstance(model, Adapter) else [(0, length)]


def context_length(model: nn.Module, n_prompt: int, n_fed: int) -> int:
    """How many positions a model needs for a prompt and the target ids after it."""
    return model.context(n_prompt, n_fed) if isinstance(model, Adapter) else n_prompt + n_fed


def whole_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that all which the scores depend on passes."""
    return model.whole_blocks() if isinstance(model, Adapter) else decoder_blocks(model)
