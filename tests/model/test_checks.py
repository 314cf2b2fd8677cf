"""What is passed as model and tokenizer: each mistake is told in words before any work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from captum.attr import FeatureAblation, LayerIntegratedGradients
from tokenizers import Tokenizer
from transformers.models.auto import modeling_auto

from captum_llm_ext import (
    LayerSaliency,
    LLMAttentionAttribution,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
    batch,
    chat_input,
    compare_methods,
    explain,
    faithfulness,
    qa_input,
)
from captum_llm_ext.model.suitability import check_head, check_pair
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import (
    PROMPT,
    TARGET,
    BidirectionalToy,
    CausalToy,
    MinimalTokenizer,
    tiny_model,
    tiny_tokenizer,
)
from tests.models.question_answering import ANSWER, CONTEXT, QUESTION, qa_tokenizer, tiny_qa

ENCODER = {
    "vocab_size": 352,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
}


def pipeline() -> Any:
    make: Any = transformers.pipeline
    return make("text-generation", model=tiny_model("llama"), tokenizer=tiny_tokenizer())


def test_a_pipeline_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"got TextGenerationPipeline: .* pipeline\.model and") as e:
        LLMAttribution(FeatureAblation(pipeline()), tiny_tokenizer())
    assert "pipeline.tokenizer" in str(e.value)


def wrapped(model: Any, tokenizer: Any) -> Any:
    return LLMAttribution(FeatureAblation(model), tokenizer)


def differentiated(model: Any, tokenizer: Any) -> Any:
    method = LayerIntegratedGradients(model, tiny_model("llama").model.embed_tokens)
    return LLMGradientAttribution(method, tokenizer)


def result() -> Any:
    return explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, TARGET, "ablation")


ENTRIES: dict[str, Callable[[Any, Any], Any]] = {
    "LLMAttribution": wrapped,
    "LLMGradientAttribution": differentiated,
    "LLMAttentionAttribution": LLMAttentionAttribution,
    "explain": lambda model, tokenizer: explain(model, tokenizer, PROMPT, TARGET),
    "ablation": lambda model, tokenizer: explain(model, tokenizer, PROMPT, TARGET, "ablation"),
    "batch": lambda model, tokenizer: batch(model, tokenizer, [PROMPT], "out.jsonl"),
    "faithfulness": lambda model, tokenizer: faithfulness(model, tokenizer, result(), TARGET),
    "compare_methods": lambda model, tokenizer: compare_methods(model, tokenizer, [PROMPT]),
}  # fmt: skip

NO_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "string": (lambda: "gpt2", r"got str 'gpt2': load it first"),
    "none": (lambda: None, "got None"),
    "pipeline": (pipeline, "pipeline.model and pipeline.tokenizer"),
    "function": (lambda: lambda ids: tiny_model("llama")(ids), "got function: pass the model"),
    "partial": (lambda: partial(tiny_model("llama"), use_cache=False), "got partial: pass the mod"),
    "forward": (lambda: tiny_model("llama").forward, "got method: pass the model itself"),
    "tokenizer": (tiny_tokenizer, "the model comes first, and then its tokenizer"),
    "class": (lambda: transformers.LlamaForCausalLM, "got the class LlamaForCausalLM"),
    "both": (lambda: (tiny_model("llama"), tiny_tokenizer()), "got tuple: unpack it"),
}
NO_TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "string": (lambda: "gpt2", r"got str 'gpt2': load it first"),
    "none": (lambda: None, "encode, decode, convert_ids_to_tokens; got None"),
    "pipeline": (pipeline, "pipeline.model and pipeline.tokenizer"),
    "function": (lambda: tiny_tokenizer().encode, "got method"),
    "model": (lambda: tiny_model("llama"), "the model comes first, and then its tokenizer"),
    "class": (lambda: type(tiny_tokenizer()), "got the class .*: pass what from_pretrained"),
    "backend": (
        lambda: Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        r"PreTrainedTokenizerFast\(tokenizer_object=tokenizer\)",
    ),
    "processor": (lambda: SimpleNamespace(tokenizer=tiny_tokenizer()), r"processor\.tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model(kind: str) -> None:
    build, message = NO_MODELS[kind]
    with pytest.raises(TypeError, match=message) as caught:
        check_pair(build(), tiny_tokenizer())
    assert "expected a model first" in str(caught.value)


@pytest.mark.parametrize("kind", NO_TOKENIZERS)
def test_what_is_no_tokenizer(kind: str) -> None:
    build, message = NO_TOKENIZERS[kind]
    with pytest.raises(TypeError, match=message) as caught:
        check_pair(tiny_model("llama"), build())
    assert "expected the model's tokenizer" in str(caught.value)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_them(entry: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="expected a model first"):
        ENTRIES[entry](lambda ids: ids, tiny_tokenizer())
    with pytest.raises(TypeError, match="the model comes first"):
        ENTRIES[entry](tiny_tokenizer(), tiny_model("llama"))
    with pytest.raises(TypeError, match="expected the model's tokenizer"):
        ENTRIES[entry](tiny_model("llama"), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda tokenizer: TextTokenInput(PROMPT, tokenizer),
        lambda tokenizer: chat_input([{"role": "user", "content": PROMPT}], tokenizer),
        lambda tokenizer: qa_input("Who?", PROMPT, tokenizer),
    ],
)
def test_inputs_refuse_what_is_no_tokenizer(make: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"the model's tokenizer, .*; got LlamaForCausalLM"):
        make(tiny_model("llama"))


# --- models without the head that is needed -------------------------------------------------------

HEADLESS = {
    "BertForMaskedLM": "is not causal: it is a masked language model",
    "BertForPreTraining": "has the heads of pretraining",
    "BertForSequenceClassification": "is a classifier of texts or a reward model",
    "BertForTokenClassification": "is a classifier of tokens",
    "BertForMultipleChoice": "is a multiple choice model",
    "BertForNextSentencePrediction": "is a classifier of pairs of sentences",
    "BertModel": "gives hidden states and has no language-model head",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_a_masked_language_model(
    entry: str, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)).eval()
    with pytest.raises(ValueError, match="BertForMaskedLM is not causal: it is a masked"):
        ENTRIES[entry](model, tiny_tokenizer())


@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_the_head_says_what_it_is(name: str) -> None:
    model = getattr(transformers, name)(transformers.BertConfig(**ENCODER)).eval()
    with pytest.raises(ValueError, match=f"{name} {HEADLESS[name]}.*: expected logits"):
        LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    with pytest.raises(ValueError, match=HEADLESS[name]):
        explain(model, tiny_tokenizer(), PROMPT, TARGET)


def class_names(*mappings: str) -> set[str]:
    """The classes that transformers itself lists for these tasks."""
    listed: set[str] = set()
    for mapping in mappings:
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            listed |= {names} if isinstance(names, str) else set(names)
    return listed


def is_refused(name: str) -> bool:
    try:
        check_head(name)
    except ValueError:
        return True
    return False


SERVED = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "QUESTION_ANSWERING")
REFUSED = (
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "TEXT_ENCODING",
)


def test_the_names_agree_with_the_tables_of_transformers() -> None:
    served = class_names(*SERVED)
    assert [name for name in sorted(served) if is_refused(name)] == []
    refused = class_names(*REFUSED) | {n for n in class_names("MASKED_LM") if "MaskedLM" in n}
    variants = ("Fourier", "Learned", "ConvProcessing", "WithTeacher")  # of images
    left = [n for n in refused - served if not is_refused(n) and not n.endswith(variants)]
    assert left == []


def test_other_code_may_use_any_name() -> None:
    for name in ("ChatGLMModel", "InternLM2ForCausalLM", "T5WithLMHeadModel", "TinyModel"):
        check_head(name)
    with pytest.raises(ValueError, match="Qwen2ForRewardModel is a reward model"):
        check_head("Qwen2ForRewardModel")


class TinyModel(transformers.LlamaForCausalLM):
    """A user's own class, whose name says nothing."""


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [
        (lambda: tiny_model("llama"), tiny_tokenizer),
        (lambda: TinyModel(tiny_model("llama").config), tiny_tokenizer),
        (lambda: tiny_seq2seq("marian"), tiny_tokenizer),
        (lambda: tiny_qa("bert"), tiny_tokenizer),
        (CausalToy, MinimalTokenizer),
        (BidirectionalToy, MinimalTokenizer),
        (lambda: torch.nn.DataParallel(CausalToy()), MinimalTokenizer),
    ],
)
def test_what_serves_passes(model: Any, tokenizer: Any) -> None:
    check_pair(model(), tokenizer())


def test_a_module_that_is_not_causal_keeps_its_warning() -> None:
    tokenizer = MinimalTokenizer()
    model = BidirectionalToy(len(tokenizer.words))
    inp = TextTokenInput("Dave lives in Palm Coast", tokenizer)
    with pytest.warns(UserWarning, match="BidirectionalToy is not causal"):
        LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, "plays golf,")


def test_the_model_inside_a_peft_model_counts() -> None:
    peft = pytest.importorskip("peft")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="BertForMaskedLM is not causal"):
        wrapped(adapted, tiny_tokenizer())


# --- models that read no texts, and weights without gradients -------------------------------------


def blip2() -> Any:
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
    qformer = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer |= {"intermediate_size": 16, "encoder_hidden_size": 16}
    text = {"model_type": "opt", "vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "ffn_dim": 32, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=2,
        image_token_index=4,
    )
    return transformers.Blip2ForConditionalGeneration(config).eval()


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=352,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_mel_bins=8,
        max_source_positions=10,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (blip2, "Blip2ForConditionalGeneration reads pixel_values first"),
        (whisper, "WhisperForConditionalGeneration reads input_features first"),
    ],
)
@pytest.mark.parametrize("method", ["ablation", "saliency"])
def test_a_text_alone_for_a_model_of_pictures_or_sounds(
    build: Any, message: str, method: str
) -> None:
    model = build()
    layers = "*embed_tokens" if method == "saliency" else None
    with pytest.raises(ValueError, match=message):
        explain(model, tiny_tokenizer(), PROMPT, TARGET, method, layers)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = transformers.LlamaForCausalLM(tiny_model("llama").config).eval()
        model.load_state_dict(tiny_model("llama").state_dict())
    inp = TextTokenInput(PROMPT, tiny_tokenizer())
    method = LayerSaliency(model, model.get_input_embeddings())
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode\(\)"):
        LLMGradientAttribution(method, tiny_tokenizer()).attribute(inp, TARGET)
    ablated = wrapped(model, tiny_tokenizer()).attribute(inp, TARGET)
    expected = wrapped(tiny_model("llama"), tiny_tokenizer()).attribute(inp, TARGET)
    torch.testing.assert_close(ablated.token_attr, expected.token_attr)


def test_answers_that_are_no_two_positions() -> None:
    config = transformers.XLNetConfig(vocab_size=352, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = transformers.XLNetForQuestionAnswering(config).eval()
    with pytest.raises(ValueError, match="gives no start_logits"):
        explain(model, qa_tokenizer("bert"), QUESTION, ANSWER, "ablation", context=CONTEXT)
