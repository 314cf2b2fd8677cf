"""A prompt that just fits is scored, for each kind of position; one token more is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from captum.attr import FeatureAblation
from torch import nn

from captum_llm_ext import LLMAttribution, TextTemplateInput, TextTokenInput
from captum_llm_ext.scoring.preparation import prepare
from captum_llm_ext.scoring.tasks import Request
from tests.models.families import VOCAB_SIZE, tiny_tokenizer

N = 24  # positions, before any scaling
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": N}
GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": N}
HALVES = {"vocab_size": VOCAB_SIZE, "d_model": 32, "pad_token_id": 3, "decoder_start_token_id": 2}
for half in ("encoder", "decoder"):
    HALVES |= {f"{half}_layers": 1, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 32}


def causal(family: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def seq2seq(family: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**HALVES, **settings)
    return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


def rope(kind: str, factor: float | None = None, **settings: Any) -> Callable[[], nn.Module]:
    scaling = {"rope_type": kind, "rope_theta": 1e4, **settings}
    scaling |= {} if factor is None else {"factor": factor}
    return lambda: causal("Llama", **SIZES, intermediate_size=32, rope_parameters=scaling)


ROBERTA = {**SIZES, "intermediate_size": 32, "pad_token_id": 1, "is_decoder": True}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
HALF = {"original_max_position_embeddings": N // 2}
LIMITS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "plain rope": (rope("default"), N),
    "linear": (rope("linear", 2.0), 2 * N),
    "dynamic": (rope("dynamic", 2.0), 2 * N),
    "yarn": (rope("yarn", 2.0, original_max_position_embeddings=N), 2 * N),
    "yarn that the config counts": (rope("yarn", 2.0, **HALF), N),
    "llama3": (rope("llama3", 2.0, **HALF, **LLAMA3), N),
    "llama3 that goes on": (rope("llama3", 4.0, **HALF, **LLAMA3), 2 * N),
    "longrope": (rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, **HALF), N),
    "biases, computed": (lambda: causal("Falcon", **SIZES, alibi=True), None),
    "biases, no length": (
        lambda: causal("Bloom", vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=4),
        None,
    ),
    "biases, a table": (
        lambda: causal(
            "Mpt", vocab_size=VOCAB_SIZE, d_model=32, n_layers=1, n_heads=4, max_seq_len=N
        ),
        N,
    ),
    "learned": (lambda: causal("GPT2", **GPT), N),
    "learned, two rows skipped": (
        lambda: causal("OPT", **SIZES, ffn_dim=32, word_embed_proj_dim=32),
        N,
    ),
    "learned, up to the pad token skipped": (lambda: causal("Roberta", **ROBERTA), N - 2),
    "learned, of a decoder": (
        lambda: causal("Bert", **SIZES, intermediate_size=32, is_decoder=True),
        N,
    ),
    "sinusoids, a buffer": (lambda: causal("CTRL", **GPT, dff=32), N),
    "sinusoids in rope": (lambda: causal("GPTJ", **GPT, rotary_dim=4), N),
    "learned, encoder": (lambda: seq2seq("Bart", max_position_embeddings=N), N),
    "sinusoids, encoder": (lambda: seq2seq("Marian", max_position_embeddings=N), N),
    "sinusoids that grow": (lambda: seq2seq("M2M100", max_position_embeddings=N), N),
    "two lengths": (
        lambda: seq2seq(
            "LED",
            attention_window=8,
            max_encoder_position_embeddings=N,
            max_decoder_position_embeddings=N // 2,
        ),
        N,
    ),
    "relative": (
        lambda: seq2seq("T5", d_ff=32, num_layers=1, num_heads=4, d_kv=8),
        None,
    ),
}


def scored(model: nn.Module, n_prompt: int, n_target: int = 1) -> Any:
    ids = torch.arange(n_prompt)[None] + 20
    target = torch.arange(n_target) + 30
    inp = TextTokenInput("golf", tiny_tokenizer())
    return prepare(model, tiny_tokenizer(), inp, ids, Request(target)).probed()


def test_a_prompt_as_long_as_yarn_reaches() -> None:
    model, limit = LIMITS["yarn"][0](), 2 * N
    assert scored(model, limit).probe.token_scores().isfinite().all()
    with pytest.raises(ValueError, match=f"context of {limit} tokens"):
        scored(model, limit + 1)


@pytest.mark.filterwarnings("ignore:.*is not causal")
@pytest.mark.parametrize("kind", LIMITS)
def test_just_fitting_and_one_more(kind: str) -> None:
    make, limit = LIMITS[kind]
    model = make()
    longest = 3 * N if limit is None else limit
    assert scored(model, longest).probe.token_scores().isfinite().all()
    if limit is not None:
        with pytest.raises(ValueError, match="longer than the model"):
            scored(model, limit + 1)


@pytest.mark.parametrize("kind", ["learned", "learned, two rows skipped"])
def test_the_last_target_token_needs_no_position(kind: str) -> None:
    model = LIMITS[kind][0]()
    scored(model, N - 3, n_target=4)
    with pytest.raises(ValueError, match="longer than the model"):
        scored(model, N - 3, n_target=5)


def test_the_decoder_has_a_length_of_its_own() -> None:
    model = LIMITS["two lengths"][0]()
    scored(model, 8, n_target=N // 2)
    with pytest.raises(ValueError, match="longer than the model takes: its table"):
        scored(model, 8, n_target=N // 2 + 1)


@pytest.mark.parametrize("kind", ["learned", "learned, up to the pad token skipped"])
def test_a_target_that_the_model_generates(kind: str) -> None:
    model, tokenizer = LIMITS[kind][0](), tiny_tokenizer()

    def generate(n_prompt: int, n_new: int) -> Any:
        ids = torch.arange(n_prompt)[None] + 20
        gen_args = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
        inp = TextTokenInput("golf", tokenizer)
        return prepare(model, tokenizer, inp, ids, Request(gen_args=gen_args))

    assert len(generate(N - 4, 2).forcing.target) == 2
    for n_prompt, n_new in ((N - 4, 10), (N + 2, 1)):
        with pytest.raises(ValueError, match="longer than the model"):
            generate(n_prompt, n_new)


def test_an_unknown_id_is_not_a_position() -> None:
    model, ids = LIMITS["learned"][0](), torch.tensor([[20, VOCAB_SIZE]])
    inp = TextTokenInput("golf", tiny_tokenizer())
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB_SIZE}"):
        prepare(model, tiny_tokenizer(), inp, ids, Request())


def test_a_masked_prompt_may_be_longer_than_the_prompt() -> None:
    model, tokenizer = LIMITS["learned, up to the pad token skipped"][0](), tiny_tokenizer()
    wrapper = LLMAttribution(FeatureAblation(model), tokenizer)
    inp = TextTemplateInput("{} lives", ["golf"], baselines=["golf " * 19])
    n_baseline = len(tokenizer.encode("golf " * 19 + " lives"))
    assert n_baseline == N  # its first token, the pad token here, takes no position
    with pytest.raises(ValueError, match="longer than the model"):
        wrapper.attribute(inp, target=torch.tensor([30]))


def test_the_prompt_reaches_the_user() -> None:
    model, tokenizer = LIMITS["dynamic"][0](), tiny_tokenizer()
    inp = TextTokenInput("golf " * 30, tokenizer)
    assert N < inp.inp_tensor.size(1) <= 2 * N
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, torch.tensor([30]))
    assert result.seq_attr.shape == (inp.inp_tensor.size(1),)
