"""What kind of model it is: causal, encoder-decoder, or question answering."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CAUSAL, SEQ2SEQ, QA = "causal", "seq2seq", "qa"


def kind_of(config: Any, class_names: Iterable[str]) -> str:
    """The kind of a model, by its configuration and the names of the classes that it is made of.

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
