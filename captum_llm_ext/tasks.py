"""What kinds of model there are: how each is run, and what of it is scored.

A new kind is an adapter, a function that makes the pass from a request, and one line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from captum_llm_ext.encoder_decoder import EncoderDecoder
from captum_llm_ext.model_pass import TeacherForcing
from captum_llm_ext.targets import Target, contrast_ids, output_tokens, target_ids


@dataclass(frozen=True)
class Request:
    """What is to be scored, as it was asked for."""

    target: Any = None
    gen_args: dict[str, Any] | None = None
    contrast: Any = None
    attr_target: str = "log_prob"


@dataclass(frozen=True)
class Task:
    """A kind of model.

    forcing: from model, tokenizer, the ids (1, n_prompt) of a prompt and a request to the pass
    that scores it, whose ids begin with those of the prompt; names: of the target's tokens.
    """

    name: str
    forcing: Callable[[nn.Module, Any, Tensor, Request], TeacherForcing]
    names: Callable[[TeacherForcing, Any], list[str]]


def task_of(model: nn.Module) -> Task:
    """The kind of a model, by its configuration."""
    config = getattr(model, "config", None)
    return TASKS["seq2seq" if getattr(config, "is_encoder_decoder", False) is True else "causal"]


def _causal(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The target follows the prompt."""
    return TeacherForcing(model, prompt, _target(model, tokenizer, prompt, request))


def _seq2seq(model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request) -> TeacherForcing:
    """The prompt is the encoder's; the target follows the decoder's start token."""
    adapter = EncoderDecoder(model, prompt.size(1), decoder_start(model))
    target = _target(model, _InTargetLanguage(tokenizer), prompt, request, n_given=1)
    return TeacherForcing(adapter, adapter.prompt(prompt[0])[None], target)


def decoder_start(model: nn.Module) -> int:
    """The id that the decoder starts with, of the model's configuration."""
    for name in ("config", "generation_config"):
        start = getattr(getattr(model, name, None), "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise ValueError(
        f"{type(model).__name__} does not say which token its decoder starts with: set "
        "model.config.decoder_start_token_id (of T5 it is the pad token, of BART the eos token)"
    )


def _target(
    model: nn.Module, tokenizer: Any, prompt: Tensor, request: Request, n_given: int | None = None
) -> Target:
    inputs = {"input_ids": prompt}
    ids = target_ids(model, tokenizer, inputs, request.target, request.gen_args, n_given)
    ids = ids.to(prompt.device, copy=True)
    contrast = contrast_ids(tokenizer, request.contrast, len(ids))
    contrast = None if contrast is None else contrast.to(prompt.device, copy=True)
    return Target(ids, request.attr_target, contrast)


@dataclass(frozen=True)
class _InTargetLanguage:
    """A tokenizer's side of the target: some (Marian) have a vocabulary for each language."""

    tokenizer: Any

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self.tokenizer(text_target=text, add_special_tokens=add_special_tokens)["input_ids"]


def _token_names(forcing: TeacherForcing, tokenizer: Any) -> list[str]:
    return output_tokens(forcing.target.ids, tokenizer)


TASKS: dict[str, Task] = {
    "causal": Task("causal", _causal, _token_names),
    "seq2seq": Task("seq2seq", _seq2seq, _token_names),
}
