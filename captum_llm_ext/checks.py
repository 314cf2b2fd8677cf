"""Checks before any work: refuse what is meaningless, warn of what is doubtful."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from captum_llm_ext.hooks import evaluating
from captum_llm_ext.model_parts import known_token_embedding
from captum_llm_ext.model_pass import Pass, TeacherForcing


def check_ids(forcing: TeacherForcing) -> None:
    """Refuse token ids that the model has no embedding for."""
    size = getattr(known_token_embedding(forcing.model), "num_embeddings", None)
    contrast = forcing.target.contrast
    ids = [forcing.prompt_ids[0], forcing.target.ids, *([] if contrast is None else [contrast])]
    wrong = [int(i) for i in torch.cat(ids) if i < 0 or (size is not None and i >= size)]
    if wrong:
        raise ValueError(
            f"the ids of prompt and target must be in the model's vocabulary of {size}; "
            f"got {wrong[:5]}: are tokenizer and model a pair?"
        )


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


def probed(forcing: TeacherForcing, use_cache: bool = False) -> Pass:
    """The pass that tells whether the model is causal; dropout would look as if it were not."""
    with evaluating(forcing.model):
        return forcing.probe(use_cache)


def check_finite(probe: Pass) -> None:
    """Refuse scores that are no numbers, from which nothing can be attributed."""
    if not probe.token_scores().isfinite().all():
        raise ValueError(
            f"the model's scores are not finite in {probe.logits.dtype}: load it in bfloat16 or "
            "float32, and check that the target's tokens can be generated at all"
        )


def check_causal(forcing: TeacherForcing, probe: Pass, product: bool = True) -> bool:
    """Whether one pass can score all target tokens; says so when it cannot.

    product: whether a product of probabilities must come from one pass.
    """
    check_finite(probe)
    if probe.is_causal():
        return True
    if product and not forcing.target.is_additive:
        raise ValueError(
            "attr_target='prob' needs a causal model for a target of several tokens, and here "
            "a later token changes earlier scores: use attr_target='log_prob' or one target token"
        )
    warnings.warn(
        f"{type(forcing.model).__name__} is not causal (a later token changes earlier scores), so "
        "the target is scored token by token, one pass each",
        stacklevel=3,
    )
    return False


def check_counts(**counts: int | None) -> None:
    """Refuse counts that are not whole numbers of at least 1; None is the default."""
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and not (whole and count >= 1):
            raise ValueError(f"{name} must be an int of at least 1, got {count!r}")


def _drops(module: nn.Module) -> bool:
    rates = (getattr(module, name, 0.0) for name in ("p", "attention_dropout", "dropout"))
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return any(isinstance(r, float) and r > 0 for r in rates) and (
        is_dropout or hasattr(module, "attention_dropout")
    )
