"""The kinds of model, and adapters that run other kinds like causal ones: ids in, logits out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from captum_llm_ext.model.layers import (
    Site,
    decoder_blocks,
    find_token_embedding,
    module_from_getter,
    owner_of,
)

CAUSAL, SEQ2SEQ, QA = "causal", "seq2seq", "qa"

Part = tuple[int, int]  # start and stop among the ids of a row


def kind_of(config: Any, class_names: Iterable[str]) -> str:
    """The kind of a model, by its configuration and the names of its modules' classes.

    Raises:
        ValueError: a question answering model with an encoder and a decoder.
    """
    has_encoder = getattr(config, "is_encoder_decoder", False) is True
    if not any("ForQuestionAnswering" in name for name in class_names):
        return SEQ2SEQ if has_encoder else CAUSAL
    if has_encoder:
        raise ValueError(
            "question answering by start and end is for models of one stack (such as BERT or "
            "RoBERTa), and this one has an encoder and a decoder: load it as a seq2seq model"
        )
    return QA


class Layout:
    """How a model uses a row of ids; this class describes a causal model, which runs as it is."""

    def site(self, site: Site) -> Site:
        """The site at which a layer of the model is read."""
        return site

    def prompt(self, ids: Tensor) -> Tensor:
        """The first ids (n_prompt,) of a row, for the ids (n,) of a prompt."""
        return ids

    def parts(self, length: int) -> list[Part]:
        """The parts of `length` ids that a layer may hold."""
        return [(0, length)]

    def context(self, n_prompt: int, n_target: int) -> int:
        """How many positions the model needs for a prompt and the target ids after it."""
        return n_prompt + n_target

    def whole_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks whose outputs hold all that the scores depend on."""
        return decoder_blocks(model)

    def check_embedding_baseline(self, replaced: Tensor) -> None:
        """Refuse embeddings as the baseline of `replaced` (length,) positions where none fits."""


class Adapter(nn.Module, Layout):
    """Wraps a model so that ``forward(ids)`` of a row of ids returns ``.logits`` to be scored.

    The layers stay those of the wrapped model, and hooks read and replace them there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    @property
    def config(self) -> Any:
        return getattr(owner_of(self.model, "config"), "config", None)

    def get_input_embeddings(self) -> nn.Module | None:
        return find_token_embedding(self.model)

    def get_output_embeddings(self) -> nn.Module | None:
        return module_from_getter(self.model, "get_output_embeddings")

    @abstractmethod
    def logits_after(self, prompts: Sequence[Tensor], fed: Tensor) -> Tensor:
        """Logits (rows, n_output, …) after prompts of any lengths and the `fed` target ids."""


_CAUSAL = Layout()


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model: an adapter describes itself, and other models are causal."""
    return model if isinstance(model, Adapter) else _CAUSAL
