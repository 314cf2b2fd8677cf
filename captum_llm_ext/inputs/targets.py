"""The target: which token ids it has, and how logits become its scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import DEFAULT_GEN_ARGS, _convert_ids_to_pretty_tokens
from captum_llm_ext.inputs.baselines import token_ids
from captum_llm_ext.inputs.token_text import (
    are_cut_off,
    in_word,
    readable_token,
    readable_tokens,
)
from captum_llm_ext.model.lock import holding
from captum_llm_ext.model.signatures import takes
from captum_llm_ext.registry import did_you_mean
from captum_llm_ext.warning import warn

GRADIENT_TARGETS = ("log_prob", "prob", "logit")
JOINED = "\u203f"  # an undertie, before a target that goes on with the prompt's last word
_LAST_TOKENS = 16  # of the prompt: a word has fewer
PERTURBATION_TARGETS = (*GRADIENT_TARGETS, "rank")

# Inputs of a model, which its scores would not see; the settings of `generate` are others.
MODEL_INPUTS = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "token_type_ids",
    "past_key_values",
    "encoder_outputs",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
)


def check_attr_target(attr_target: str, supported: Sequence[str]) -> str:
    if attr_target not in supported:
        names = ", ".join(supported)
        hint = did_you_mean(attr_target, supported)
        raise ValueError(f"attr_target must be one of {names}; got {attr_target!r}{hint}")
    return attr_target


def generated_ids(
    model: nn.Module,
    prompt: Tensor,
    gen_args: Mapping[str, Any] | None,
    tokenizer: Any,
    beginning: Sequence[int] | None = None,
) -> Tensor:
    """The token ids (n_output,) that the model generates after a prompt (1, n_prompt).

    beginning: the ids that `generate` returns before the generated ones. Default: the prompt's. The
    first of several sequences counts, without the padding to the length of the longest.
    """
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise ValueError(
            f"no target was given and {type(model).__name__} has no generate(): pass target="
        )
    settings = generation_settings(gen_args, tokenizer, generate)
    with torch.no_grad():
        output = generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    sequences = output if isinstance(output, Tensor) else output.sequences
    if beginning is None:
        generated: Tensor = sequences[0, prompt.size(1) :]
    else:
        generated = _after(beginning, sequences[0])
    if not len(generated):
        raise ValueError("the model generated no token: the target must have at least one token")
    if len(sequences) > 1:
        of_config = getattr(settings.get("generation_config"), "pad_token_id", None)
        pad, end = settings.get("pad_token_id", of_config), getattr(tokenizer, "eos_token_id", None)
        return _without_padding(generated, pad, keep=int(pad == end))
    return generated


def _without_padding(ids: Tensor, pad: int | None, keep: int) -> Tensor:
    """The ids (n_output,) without pad tokens at their end, but for `keep` that end the text."""
    n_padding = next((n for n, i in enumerate(reversed(ids.tolist())) if i != pad), len(ids))
    return ids[: max(1, len(ids) - max(0, n_padding - keep))]


def generation_settings(
    gen_args: Mapping[str, Any] | None, tokenizer: Any, generate: Callable[..., Any]
) -> dict[str, Any]:
    """The caller's settings of `generate`, or Captum's, and a pad token where they name none.

    Raises:
        ValueError: an input of the model is among them, or a mask that hides tokens of the prompt.
    """
    settings = dict(gen_args or DEFAULT_GEN_ARGS)
    mask = settings.pop("attention_mask", None)
    if mask is not None and not torch.as_tensor(mask).bool().all():
        raise ValueError(
            "the attention_mask in gen_args hides tokens, which the scores would see: leave these "
            "tokens out of the prompt"
        )
    if inputs := [name for name in MODEL_INPUTS if name in settings]:
        raise ValueError(
            f"gen_args holds settings of generate(), and {', '.join(inputs)} is an input of the "
            "model: the prompt comes from the input that is attributed"
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
    of_caller = getattr(settings.get("generation_config"), "pad_token_id", None)
    if pad is not None and of_caller is None and takes(generate, "pad_token_id"):
        settings.setdefault("pad_token_id", pad)
    return settings


def _after(beginning: Sequence[int], ids: Tensor) -> Tensor:
    if ids[: len(beginning)].tolist() != list(beginning):
        raise ValueError(
            f"generate() was expected to begin with the ids {list(beginning)}, and began with "
            f"{ids[: len(beginning)].tolist()}: pass target="
        )
    return ids[len(beginning) :]


def encode_target(tokenizer: Any, target: str | Tensor | Sequence[int]) -> Tensor:
    """Token ids (n_output,) of a string (without special tokens), a tensor or a list of ids."""
    if isinstance(target, str):
        ids = torch.tensor(tokenizer.encode(target, add_special_tokens=False), dtype=torch.long)
        if not len(ids):
            raise ValueError(
                f"the target {target!r} encodes to no token: the target must have at least one "
                "token"
            )
        return ids
    if not isinstance(target, Tensor | list | tuple):
        raise TypeError(f"target must be a str, a 1-D tensor of ids or None, got {type(target)}")
    are_ids = (isinstance(i, int) and not isinstance(i, bool) for i in target)
    if not isinstance(target, Tensor) and not all(are_ids):
        raise TypeError(f"a target given as a list must hold token ids, got {list(target)[:5]}")
    ids = torch.as_tensor(target)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"target must be a 1-D tensor of token ids, got shape {tuple(ids.shape)} of {ids.dtype}"
        )
    if not len(ids):
        raise ValueError("the target is empty: the target must have at least one token")
    return ids.long()


def without_tokens(
    ids: Tensor, skip_tokens: Sequence[int] | Sequence[str], tokenizer: Any
) -> Tensor:
    """The ids (n_output,) of a target without `skip_tokens`, which are ids or strings."""
    skipped = torch.tensor(token_ids(skip_tokens, tokenizer), device=ids.device)
    kept = ids[~torch.isin(ids, skipped)]
    if not len(kept):
        raise ValueError(
            "all tokens of the target are skipped: the target must have at least one token"
        )
    return kept


def contrast_ids(tokenizer: Any, contrast: str | Tensor | Sequence[int], n_output: int) -> Tensor:
    """Token ids (n_output,) of a contrast target, which has one token or as many as the target."""
    ids = encode_target(tokenizer, contrast)
    if len(ids) not in (1, n_output):
        raise ValueError(
            f"contrast_target must have 1 token or as many as the target ({n_output}), "
            f"got {len(ids)}"
        )
    return ids.expand(n_output)


def output_tokens(ids: Tensor, tokenizer: Any) -> list[str]:
    """The target tokens as Captum shows them; those that it leaves blank become readable."""
    labels = zip(captum_labels(ids, tokenizer), ids.tolist(), strict=True)
    return [
        label if label.strip() else readable_token(tokenizer.convert_ids_to_tokens(token))
        for label, token in labels
    ]


def captum_labels(ids: Tensor, tokenizer: Any) -> list[str]:
    """The target tokens as Captum shows them.

    Where Captum cannot, as the vocabulary has them: where a character is cut off, its tokens alone.
    """
    try:
        with holding(warnings), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_convert_ids_to_pretty_tokens(ids.cpu(), tokenizer))
    except Exception:  # Captum re-encodes the decoded text, and some tokenizers cannot
        labels = [str(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    cut_off = are_cut_off(labels)
    if any(cut_off):
        for in_pieces, run in groupby(range(len(labels)), cut_off.__getitem__):
            at = list(run)
            if not in_pieces:
                labels[at[0] : at[-1] + 1] = captum_labels(ids[at], tokenizer)
    return labels


def output_labels(prompt: Tensor, ids: Tensor, tokenizer: Any) -> list[str]:
    """Names of the target tokens (n_output,) in tables and plots, with their spaces.

    A first token that goes on with the last word of the prompt (1, n_prompt) begins with "‿".
    """
    labels = readable_tokens(tokenizer.convert_ids_to_tokens(ids.tolist()))
    if torn_word(prompt, ids, tokenizer):
        labels[0] = JOINED + labels[0]
    return labels


def torn_word(prompt: Tensor, ids: Tensor, tokenizer: Any) -> tuple[str, str] | None:
    """The ends of the word that begins in the prompt (1, n_prompt) and goes on in a target.

    None where there is a space, punctuation, a special token or a script without spaces between.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    last: list[int] = []
    for token in reversed(prompt[0, -_LAST_TOKENS:].tolist()):
        if token in special:
            break
        last.insert(0, token)
    before, both = tokenizer.decode(last), tokenizer.decode([*last, *ids.tolist()])
    after = both[len(before) :]
    if not (before and after and both.startswith(before)):
        return None
    if not (in_word(before[-1]) and in_word(after[0])):
        return None
    return before.split()[-1], after.split()[0]


def warn_of_torn_word(prompt: Tensor, target: str, tokenizer: Any, name: str = "target") -> None:
    """Warn where a target in words goes on with the last word of the prompt (1, n_prompt).

    Digits go on with a number without a warning, if the tokenizer cuts the number there too.
    """
    ids = encode_target(tokenizer, target)
    word = torn_word(prompt, ids, tokenizer)
    if word is None:
        return
    start, rest = word
    if start[-1].isdigit() and rest[0].isdigit():
        whole, *parts = (
            tokenizer.encode(text, add_special_tokens=False) for text in (start + rest, start, rest)
        )
        if whole == [*parts[0], *parts[1]]:
            return
    warn(
        f"no space stands between the prompt and the {name}, so it is scored as the end of "
        f"{start + rest!r}: if it is a word of its own, begin it with a space, {' ' + rest!r}"
    )
