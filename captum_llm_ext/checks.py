"""What is checked of a model before any work: refuse what is meaningless, warn of what is doubtful."""

from __future__ import annotations

import logging
import warnings

from torch import nn

from captum_llm_ext.model_pass import TeacherForcing

logger = logging.getLogger(__name__)


def check_context(forcing: TeacherForcing) -> None:
    """Refuse a prompt and target longer than the positions that the model was built for."""
    config = getattr(forcing.model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    limit = getattr(text_config, "max_position_embeddings", None)
    length = forcing.ids.size(1)
    if isinstance(limit, int) and 0 < limit < length:
        raise ValueError(
            f"the prompt ({forcing.n_prompt} tokens) and target ({len(forcing.target)}) are longer "
            f"than the model's context of {limit} tokens: shorten one of them"
        )


def warn_of_dropout(model: nn.Module) -> None:
    """In training mode dropout makes every pass, and so every attribution, random."""
    if any(module.training and _drops(module) for module in model.modules()):
        warnings.warn(
            "the model is in training mode and has dropout, so the attribution is random: "
            "call model.eval() first",
            stacklevel=3,
        )


def is_causal(forcing: TeacherForcing) -> bool:
    """Whether one pass can score all target tokens; says so when it cannot."""
    if forcing.is_causal():
        return True
    if not forcing.target.is_additive:
        raise ValueError(
            "attr_target='prob' needs a causal model for a target of several tokens, and here a "
            "later token changes earlier scores: use attr_target='log_prob' or a target of one token"
        )
    warnings.warn(
        f"{type(forcing.model).__name__} is not causal (a later token changes earlier scores), so "
        "the target is scored token by token, one pass each",
        stacklevel=3,
    )
    return False


def _drops(module: nn.Module) -> bool:
    rates = (getattr(module, name, 0.0) for name in ("p", "attention_dropout", "dropout"))
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return any(isinstance(r, float) and r > 0 for r in rates) and (
        is_dropout or hasattr(module, "attention_dropout")
    )
