"""Encoder-decoder models: what the decoder begins with, targets of another language, skipped
tokens, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
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
    batch,
    compare_methods,
    explain,
    faithfulness,
)
from tests.models.encoder_decoder import (
    FAMILIES,
    LAYERS,
    fresh_seq2seq,
    log_p,
    prompt,
    target_of,
    tiny_seq2seq,
)
from tests.models.families import PROMPT, tiny_tokenizer
from tests.oracles.cases import BASELINE, assert_close, our_attribution

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


# --- what the decoder begins with ----------------------------------------------------------------

START, FORCED = 2, 9


def _with_forced_token(forced: int | None) -> Any:
    """A BART whose `generate` writes the token after its start; "forced" is a language or <s>."""
    model: Any = fresh_seq2seq("bart")
    model.generation_config.forced_bos_token_id = forced
    model.generation_config.forced_eos_token_id = None
    return model


def _ablated(model: Any, ids: torch.Tensor, beginning: list[int], target: list[int]) -> Any:
    """(n_output, n_input): the drops of log p, token by token and prompt by prompt."""

    def scores(row: torch.Tensor) -> torch.Tensor:
        fed = [torch.tensor([[*beginning, *target[:t]]]) for t in range(len(target))]
        with torch.no_grad():
            rows = [log_p(model, row, one, x) for one, x in zip(fed, target, strict=True)]
        return torch.cat(rows)

    one_absent = [ids.clone() for _ in range(ids.size(1))]
    for i, row in enumerate(one_absent):
        row[0, i] = BASELINE
    return torch.stack([scores(ids) - scores(row) for row in one_absent], dim=1)


def test_a_text_is_scored_after_the_forced_token() -> None:
    model, inp = _with_forced_token(FORCED), prompt()
    ids = tiny_tokenizer().encode("golf", add_special_tokens=False)
    result = LLMAttribution(captum.attr.FeatureAblation(model), tiny_tokenizer()).attribute(
        inp, target="golf"
    )
    assert len(result.output_tokens) == len(ids)
    assert_close(result.token_attr, _ablated(model, inp.inp_tensor, [START, FORCED], ids))
    judged = faithfulness(model, tiny_tokenizer(), result, "golf", n_random=2)
    after = torch.tensor([[START, FORCED, *ids[:-1]]])
    logits = model(input_ids=inp.inp_tensor, decoder_input_ids=after).logits[0, 1:]
    whole = logits.log_softmax(-1)[range(len(ids)), ids].sum().detach()
    assert_close(judged.curves.deletion[0, :1], whole[None])


@pytest.mark.parametrize(
    ("gen_args", "beginning"),
    [
        ({"forced_bos_token_id": FORCED}, [START, FORCED]),
        ({"forced_bos_token_id": None}, [START]),
        ({"decoder_start_token_id": 7}, [7, 5]),  # as mBART's languages are named
        ({"decoder_start_token_id": 7, "forced_bos_token_id": FORCED}, [7, FORCED]),
        ({"decoder_input_ids": torch.tensor([[START, 11, 12]])}, [START, 11, 12]),
        ({"decoder_input_ids": torch.tensor([[11]])}, [START, 11]),
        (None, [START, 5]),
    ],
)
def test_a_caller_names_what_the_decoder_begins_with(gen_args: Any, beginning: list[int]) -> None:
    """A target has it, generated or not, in every method; it is never a part of the target."""
    model, inp, limit = _with_forced_token(5), prompt(), {"max_new_tokens": 4, "do_sample": False}
    target = target_of(3).tolist()
    wrapper, saliency = _wrappers(model, tiny_tokenizer())
    result = wrapper.attribute(inp, torch.tensor(target), gen_args=gen_args)
    assert_close(result.token_attr, _ablated(model, inp.inp_tensor, beginning, target))
    judged = faithfulness(
        model, tiny_tokenizer(), result, torch.tensor(target), gen_args=gen_args, n_random=2
    )
    assert_close(judged.curves.deletion[0, 0] - judged.curves.deletion[0, 1], result.seq_attr.max())

    written = model.generate(inp.inp_tensor, **limit, **(gen_args or {}))[0].tolist()
    assert written[: len(beginning)] == beginning
    generated = wrapper.attribute(inp, gen_args={**limit, **(gen_args or {})})
    expected = _ablated(model, inp.inp_tensor, beginning, written[len(beginning) :])
    assert_close(generated.token_attr, expected)
    by_gradient = saliency.attribute(inp, gen_args={**limit, **(gen_args or {})})
    again = saliency.attribute(inp, torch.tensor(written[1:]), gen_args=gen_args)
    assert by_gradient.output_tokens == generated.output_tokens
    assert_close(by_gradient.token_attr, again.token_attr)


def test_batches_and_comparisons_name_the_language_too(tmp_path: Path) -> None:
    model, tokenizer = _with_forced_token(None), tiny_tokenizer()
    gen_args = {"forced_bos_token_id": FORCED, "max_new_tokens": 3}
    ids = tokenizer.encode("golf", add_special_tokens=False)
    inp = TextTokenInput(PROMPT, tokenizer)
    own = {"gen_args": {"forced_bos_token_id": FORCED}}
    alone = explain(model, tokenizer, inp, "golf", "ablation", **own)
    lines = [{"prompt": PROMPT, "target": "golf"}]
    out = tmp_path / "out.jsonl"
    options = {"method": "ablation", "baselines": 0, "gen_args": gen_args}
    batch(model, tokenizer, lines, out, show_progress=False, **options)
    record = json.loads(out.read_text())
    assert_close(torch.tensor(record["result"]["token_attr"]), alone.token_attr)
    judged = faithfulness(model, tokenizer, alone, "golf", n_random=2, **own)
    for target in ("golf", torch.tensor(ids)):
        compared = compare_methods(
            model, tokenizer, [inp], ["ablation"], [target], gen_args=gen_args, n_random=2
        )
        row = compared.prompts.iloc[0]
        assert abs(row["deletion"] - judged.deletion_area) < 1e-4


def test_the_start_is_the_one_that_the_model_writes_after() -> None:
    """Where the two configurations differ, `generate` reads its own."""
    model, inp = _with_forced_token(None), prompt()
    model.generation_config.decoder_start_token_id = 7
    target = target_of(2)
    result = _wrappers(model, tiny_tokenizer())[0].attribute(inp, target)
    assert_close(result.token_attr, _ablated(model, inp.inp_tensor, [7], target.tolist()))


def test_a_contrast_target_has_the_same_beginning() -> None:
    model, inp, target = _with_forced_token(FORCED), prompt(), target_of(2)
    wrapper, other = _wrappers(model, tiny_tokenizer())[0], torch.tensor([20, 21])
    expected = wrapper.attribute(inp, target, contrast_target=other)
    whole = torch.cat([torch.tensor([FORCED]), target])
    found = wrapper.attribute(inp, whole, contrast_target=torch.tensor([FORCED, 20, 21]))
    assert_close(found.token_attr, expected.token_attr)


def test_a_target_of_the_forced_token_alone() -> None:
    model = _with_forced_token(FORCED)
    for wrapper in _wrappers(model, tiny_tokenizer()):
        with pytest.raises(ValueError, match="not scored: give more"):
            wrapper.attribute(prompt(), torch.tensor([FORCED]))
        with pytest.raises(ValueError, match="generated no token"):
            wrapper.attribute(prompt(), gen_args={"max_new_tokens": 1})
        with pytest.raises(ValueError, match="may have decoder_start_token_id"):
            wrapper.attribute(prompt(), "golf", gen_args={"max_new_tokens": 1})


def test_an_end_that_is_forced_at_the_limit() -> None:
    model = _with_forced_token(FORCED)
    wrapper, how = _wrappers(model, tiny_tokenizer())[0], {"max_new_tokens": 4, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.attribute(prompt(), gen_args=how)
    model.generation_config.forced_eos_token_id = 2
    for limit in (how, {"max_length": 5, "do_sample": False}):
        with pytest.warns(UserWarning, match="forced_eos_token_id puts the last token"):
            wrapper.attribute(prompt(), gen_args=limit)


def test_a_tokenizer_that_begins_a_target_with_a_token() -> None:
    """As NLLB's does with the language, which the model's configuration does not know."""
    wrapper = _wrappers(_with_forced_token(None), tiny_tokenizer())[0]
    with pytest.warns(UserWarning, match="begins a target with '<s>'"):
        wrapper.attribute(prompt(), "golf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for token in (None, FORCED):
            wrapper.attribute(prompt(), "golf", gen_args={"forced_bos_token_id": token})
        _wrappers(_with_forced_token(1), tiny_tokenizer())[0].attribute(prompt(), "golf")


class _OfNoLanguage(transformers.PreTrainedTokenizerFast):
    """Like M2M100's tokenizer before its target language is set."""

    def __call__(self, text: Any = None, *args: Any, text_target: Any = None, **more: Any) -> Any:
        if text_target is not None:
            raise KeyError(None)
        return super().__call__(text, *args, **more)


def test_a_tokenizer_without_a_target_language() -> None:
    model, backend = _with_forced_token(FORCED), tiny_tokenizer().backend_tokenizer
    tokenizer: Any = _OfNoLanguage(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    for wrapper, other in zip(
        _wrappers(model, tokenizer), _wrappers(model, tiny_tokenizer()), strict=True
    ):
        found, expected = (w.attribute(prompt(), "golf").token_attr for w in (wrapper, other))
        assert_close(found, expected)


# --- targets of another language -----------------------------------------------------------------


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
