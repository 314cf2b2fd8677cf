"""Tokenizers that end each text: the target would be scored after the end."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import captum.attr
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from captum_llm_ext import (
    LayerSaliency,
    LLMAttentionAttribution,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
    chat_input,
    segment_input,
)
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import PROMPT, tiny_model, tiny_tokenizer


def ending_tokenizer(single: str = "<s> $A </s>") -> Any:
    backend = deepcopy(tiny_tokenizer().backend_tokenizer)
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def ablation(tokenizer: Any, model: Any = None) -> LLMAttribution:
    model = tiny_model("llama") if model is None else model
    return LLMAttribution(captum.attr.FeatureAblation(model), tokenizer)


def test_a_prompt_that_the_tokenizer_ended() -> None:
    tokenizer = ending_tokenizer()
    with pytest.warns(UserWarning, match="scored after a text that has ended"):
        ablation(tokenizer).attribute(TextTokenInput(PROMPT, tokenizer), "golf")


def test_every_wrapper_and_input() -> None:
    tokenizer, model = ending_tokenizer(), tiny_model("llama")
    inputs: list[Any] = [
        TextTokenInput(PROMPT, tokenizer),
        TextTokenInput(PROMPT, tokenizer, skip_tokens=["</s>"]),
        captum.attr.TextTokenInput(PROMPT, tokenizer),
        segment_input(PROMPT, "word"),
    ]
    wrappers: list[Any] = [
        ablation(tokenizer),
        LLMGradientAttribution(LayerSaliency(model, model.get_input_embeddings()), tokenizer),
        LLMAttentionAttribution(model, tokenizer),
    ]
    for inp in inputs:
        for wrapper in wrappers:
            with pytest.warns(UserWarning, match="add_eos_token=False"):
                wrapper.attribute(inp, "golf")


def test_no_warning_where_the_end_is_meant() -> None:
    ends, plain = ending_tokenizer(), tiny_tokenizer()
    for tokenizer in (ends, plain):  # a chat by token has the tokens of its template alone
        tokenizer = deepcopy(tokenizer)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
        chat = chat_input([{"role": "user", "content": PROMPT}], tokenizer)
        assert int(chat.inp_tensor[0, -1]) == tokenizer.eos_token_id
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ablation(tokenizer).attribute(chat, "golf")
    written: list[Any] = [
        TextTokenInput(PROMPT + "</s>", plain),
        segment_input(PROMPT + "</s>", "word"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inp in written:
            ablation(plain).attribute(inp, "golf")
        encoder_ends = ending_tokenizer("$A </s>")
        inp = TextTokenInput(PROMPT, encoder_ends)
        ablation(encoder_ends, tiny_seq2seq("t5")).attribute(inp, "golf")
