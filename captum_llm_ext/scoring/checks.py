"""Checks before any work: refuse what is meaningless, warn of what is doubtful."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.features import ends_by_itself
from captum_llm_ext.model.hooks import embedding_leaves, reading
from captum_llm_ext.model.layers import Site, decoder_blocks, find_token_embedding
from captum_llm_ext.model.quantized import quantization_of
from captum_llm_ext.model.random_state import same_random_state
from captum_llm_ext.scoring.target_scores import Target
from captum_llm_ext.scoring.teacher_forcing import Pass, TeacherForcing
from captum_llm_ext.warning import warn


def check_ids(forcing: TeacherForcing) -> None:
    """Refuse token ids that the model has no embedding for."""
    target = forcing.target
    ids = [forcing.prompt_ids[0]]
    if not target.of_positions:
        ids += [target.ids] if target.contrast is None else [target.ids, target.contrast]
    check_vocabulary(forcing.model, torch.cat(ids))


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Refuse ids (n,) that the model has no embedding for."""
    size = getattr(find_token_embedding(model), "num_embeddings", None)
    wrong = [i for i in ids.tolist() if i < 0 or (size is not None and i >= size)]
    if wrong:
        raise ValueError(
            f"the ids of prompt and target must be in the model's vocabulary of {size}; "
            f"got {wrong[:5]}: are tokenizer and model a pair?"
        )


def warn_of_dropout(forcing: TeacherForcing) -> None:
    """Warn of dropout: in training mode it makes every pass, and so every attribution, random."""
    if is_random(forcing):
        warn(
            "the model is in training mode and has dropout, so the attribution is random: "
            "call model.eval() first",
        )


def is_random(forcing: TeacherForcing) -> bool:
    """Whether two passes differ, as with dropout in training mode.

    Two passes tell, whether a module drops or a function that a module calls.
    """
    if not any(module.training for module in forcing.model.modules()):
        return False
    return forcing.answer("random", lambda: _two_passes_differ(forcing))


@torch.no_grad()
def _two_passes_differ(forcing: TeacherForcing) -> bool:
    ids = forcing.fed(forcing.whole)
    with same_random_state():
        first, second = (forcing.run(ids, forcing.whole).logits for _ in range(2))
    return not torch.allclose(first, second, equal_nan=True)


def warn_of_ended_prompt(inp: InterpretableInput, prompt: Tensor, tokenizer: Any) -> None:
    """Warn where the tokenizer itself ended the prompt (1, n_prompt), which the target follows."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or int(prompt[0, -1]) != end or not ends_by_itself(inp, tokenizer, end):
        return
    warn(
        f"the tokenizer ends each text with its end-of-sequence token {tokenizer.eos_token!r}, so "
        "the target is scored after a text that has ended: turn that off where the tokenizer is "
        "loaded (add_eos_token=False, with add_bos_token as it is)",
    )


def warn_of_other_tokenizer(inp: InterpretableInput, prompt: Tensor, tokenizer: Any) -> None:
    """Warn where another tokenizer made the prompt's ids (1, n_prompt), which mean other tokens."""
    made_by = getattr(inp, "tokenizer", tokenizer)
    if made_by is tokenizer:
        return
    ids = prompt[0].tolist()
    theirs, ours = (list(one.convert_ids_to_tokens(ids)) for one in (made_by, tokenizer))
    wrong = next(((a, b) for a, b in zip(theirs, ours, strict=True) if a != b), None)
    if wrong is not None:
        warn(
            f"another tokenizer made this input: what it meant as {wrong[0]!r} is {wrong[1]!r} to "
            "the tokenizer of this attribution, and so to its model: make the input with that one",
        )


def warn_of_low_precision(precision: torch.dtype, sites: Sequence[Site], model: nn.Module) -> None:
    """Warn of a path from the embeddings in 16 bits, which cannot resolve its spikes.

    On a real model its attribution in bfloat16 had nothing in common with that in float32.
    """
    embedding = find_token_embedding(model)
    low = precision in (torch.bfloat16, torch.float16)
    if low and any(site.module is embedding for site in sites):
        warn(
            f"a path at the embeddings computed in {str(precision).removeprefix('torch.')} "
            "is not reliable: take a float32 model, the layers of a block, or LayerSaliency",
        )


def check_finite(scored: Pass) -> None:
    """Refuse scores that are not finite: nothing can be attributed to them."""
    if not scored.token_scores().isfinite().all():
        raise ValueError(
            f"the model's scores are not finite in {scored.precision}: load it in bfloat16 or "
            "float32, and check that the target's tokens can be generated at all"
        )


def check_causal(forcing: TeacherForcing, scored: Pass, product: bool = True) -> bool:
    """Whether one pass can score all target tokens; warns where it cannot.

    scored: the pass over the row as it is; product: whether a product of probabilities must come
    from one pass.
    """
    check_finite(scored)
    if quantization_of(forcing.model).rounds_inputs:
        warn(
            "8-bit layers round their input by what else is in the pass, so the model's own scores "
            "depend slightly on later tokens and other rows: all target tokens are scored in one "
            "pass, and gradients are taken with the dequantised weights",
        )
        return True
    if forcing.is_causal(scored):
        return True
    if product and not forcing.target.is_additive:
        raise ValueError(
            "attr_target='prob' needs a causal model for a target of several tokens, and here "
            "a later token changes earlier scores: use attr_target='log_prob' or one target token"
        )
    warn(
        f"{type(forcing.model).__name__} is not causal (a later token changes earlier scores), so "
        "the target is scored token by token, one pass each",
    )
    return False


def check_gradients(forcing: TeacherForcing) -> None:
    """Refuse quantised layers whose backward is missing or wrong, before any work.

    A linear layer f with bias b = f(0) has ‖f(x) − b‖² = ⟨fᵀ(f(x) − b), x⟩, fᵀ its backward.
    Then one backward from the score must reach the embeddings and every block.
    """
    layers = quantization_of(forcing.model).layers
    if not layers:
        return
    for name, x in _last_inputs(forcing, layers).items():
        _check_backward(name, layers[name], x)
    blocks = [Site(f"block {i}", b) for i, b in enumerate(decoder_blocks(forcing.model))]
    # Of the logits, whose gradient does not vanish where the model is certain of its target.
    forcing = replace(forcing, target=Target(forcing.target.ids, "logit"))
    ids = forcing.fed(forcing.whole)
    with embedding_leaves(forcing.model, ids) as leaves, reading(blocks) as read:
        scored = forcing.run(ids, forcing.whole)
    wrt = [*leaves, *read.values()]
    gradients = next(scored.gradients(wrt, per_token=False))[1]
    names = [*("the embeddings" for _ in leaves), *(site.name for site in read)]
    cut = [name for name, g in zip(names, gradients, strict=True) if not g.any()]
    if cut:
        raise ValueError(f"no gradient reaches {', '.join(cut[:3])}: {_ADVICE}")


_ADVICE = (
    "these quantised layers cannot be differentiated; use an unquantised model, load_model(…, "
    'quantization="nf4"), or a perturbation method (LLMAttribution)'
)


@torch.no_grad()
def _last_inputs(forcing: TeacherForcing, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What each layer is fed at the last position."""
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = _last_row(args[0])

        return record

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(recorder(name)).remove)
        forcing.run(forcing.fed(forcing.whole), forcing.whole)
    return inputs


def _last_row(x: Tensor) -> Tensor:
    """The last vector of (…, width) as (1, …, width): some models feed rows without a batch."""
    return x.detach().flatten(0, -2)[-1:].clone().view(*[1] * (x.dim() - 1), -1)


def _check_backward(name: str, layer: nn.Module, x: Tensor) -> None:
    leaf = x.requires_grad_()
    output = layer(leaf)
    if not output.requires_grad:
        raise ValueError(f"{name} ({type(layer).__name__}) has no backward: {_ADVICE}")
    with torch.no_grad():  # not all of them have their bias in an attribute
        linear = output - layer(torch.zeros_like(x))
    (back,) = torch.autograd.grad(output, leaf, linear, allow_unused=True, materialize_grads=True)
    expected, product = linear.float().square().sum(), (back.float() * x.detach().float()).sum()
    if (expected - product).abs() > 0.1 * expected:
        raise ValueError(
            f"{name} ({type(layer).__name__}) has a wrong backward (⟨fᵀy, x⟩ is {product:.3g}, "
            f"expected {expected:.3g}): {_ADVICE}"
        )


def check_counts(**counts: int | None) -> None:
    """Refuse counts that are not whole numbers of at least 1; None is the default."""
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and not (whole and count >= 1):
            raise ValueError(f"{name} must be an int of at least 1, got {count!r}")
