"""Encoder-decoder models: targets of another language, skipped tokens, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import captum.attr
import pytest
import torch
import transformers

from captum_llm_ext import (
    LayerIntegratedGradients,
    LayerSaliency,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)
from tests.models.encoder_decoder import (
    FAMILIES,
    LAYERS,
    fresh_seq2seq,
    prompt,
    target_of,
    tiny_seq2seq,
)
from tests.models.families import tiny_tokenizer
from tests.oracles.cases import assert_close, our_attribution

# Few steps are enough to compare; that they do not converge is another test's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class _UpperCase(transformers.PreTrainedTokenizerFast):
    """Its target language is written in capitals."""

    def __call__(self, text: Any = None, *args: Any, text_target: Any = None, **more: Any) -> Any:
        text = text if text_target is None else text_target.upper()
        return super().__call__(text, *args, **more)


def _wrappers(model: Any, tokenizer: Any) -> list[Any]:
    return [
        LLMAttribution(captum.attr.FeatureAblation(model), tokenizer),
        LLMGradientAttribution(LayerSaliency(model, model.get_input_embeddings()), tokenizer),
    ]


@pytest.mark.parametrize("skipped", [["O"], [tiny_tokenizer().convert_tokens_to_ids("O")]])
def test_tokens_are_skipped_in_the_target_language(skipped: list[Any]) -> None:
    model, backend = tiny_seq2seq("marian"), tiny_tokenizer().backend_tokenizer
    tokenizer: Any = _UpperCase(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    ids = tiny_tokenizer().encode("GLF", add_special_tokens=False)
    for wrapper in _wrappers(model, tokenizer):
        result = wrapper.attribute(prompt(), target="golf", skip_tokens=skipped)
        given = wrapper.attribute(prompt(), target=torch.tensor(ids))
        assert result.output_tokens == given.output_tokens == ["G", "L", "F"]
        assert_close(result.token_attr, given.token_attr)


def test_skipped_tokens_of_a_vocabulary_for_each_language() -> None:
    """The ids of the same strings differ there, as in Marian with `separate_vocabs`."""
    tokenizer: Any = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    own, other = tokenizer.convert_tokens_to_ids(["g", "o"])
    tokenizer.target_encoder = {"g": other, "o": own}
    target = torch.tensor([own, other, own])
    for wrapper in _wrappers(tiny_seq2seq("marian"), tokenizer):
        result = wrapper.attribute(prompt(), target=target, skip_tokens=["g"])
        given = wrapper.attribute(prompt(), target=torch.tensor([own, own]))
        assert_close(result.token_attr, given.token_attr)
        with pytest.raises(ValueError, match="'h' is not a token"):
            wrapper.attribute(prompt(), target=target, skip_tokens=["h"])


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_the_decoder_has_no_prompt_tokens(family: str) -> None:
    layer = LAYERS[family]["decoder_mlp"]
    with pytest.raises(ValueError, match="include_generated=True"):
        our_attribution(
            LayerIntegratedGradients, tiny_seq2seq(family), layer, prompt(), target=target_of(3)
        )


def test_missing_decoder_start_token() -> None:
    model: Any = fresh_seq2seq("t5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    for wrapper in _wrappers(model, tiny_tokenizer()):
        with pytest.raises(ValueError, match="decoder_start_token_id"):
            wrapper.attribute(prompt(), target="golf")


def test_prompt_longer_than_the_encoder() -> None:
    model = tiny_seq2seq("bart")
    inp = TextTokenInput("golf " * 70, tiny_tokenizer())
    assert inp.inp_tensor.size(1) > 64
    with pytest.raises(ValueError, match="context of 64 tokens"):
        our_attribution(LayerIntegratedGradients, model, "*embed_tokens", inp, target="golf")


def test_prompt_and_target_do_not_share_the_context() -> None:
    model, text = tiny_seq2seq("bart"), "golf " * 25
    inp = TextTokenInput(text, tiny_tokenizer())
    n_prompt, target = inp.inp_tensor.size(1), torch.full((40,), 7)
    assert n_prompt < 64 < n_prompt + len(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = LLMAttribution(captum.attr.FeatureAblation(model), tiny_tokenizer()).attribute(
            inp, target=target
        )
    assert result.token_attr.shape == (40, n_prompt)
