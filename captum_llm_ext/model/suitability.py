"""What a caller passes as model and tokenizer: refuse what is neither, or lacks the head it needs.

Only classes are looked at, so that this costs nothing and comes before any other error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from captum_llm_ext.model.compiled import original

_CLASSES = "and this package does not attribute the scores of classes yet"
# Names of classes → what these models are.
WITHOUT_LM_HEAD = {
    "*ForMaskedLM": "is not causal: it is a masked language model, which fills hidden tokens in "
    "from both sides and predicts no next token, and this package does not attribute those yet",
    "*ForPreTraining": "has the heads of pretraining, which predict no next token",
    "*ForSequenceClassification": f"is a classifier of texts or a reward model, {_CLASSES}",
    "*Reward*": "is a reward model, and this package does not attribute rewards yet",
    "*ForTokenClassification": f"is a classifier of tokens, {_CLASSES}",
    "*ForMultipleChoice": f"is a multiple choice model, {_CLASSES}",
    "*ForNextSentencePrediction": f"is a classifier of pairs of sentences, {_CLASSES}",
    "*Classification": f"is a classifier, {_CLASSES}",
    "*ForFeatureExtraction": "gives hidden states and has no language-model head",
}
# The same, of classes of transformers: other code gives such names to anything.
BARE = "gives hidden states and has no language-model head"
WITHOUT_HEAD = {
    "*LMHeadModel": None,
    "*DoubleHeadsModel": None,
    "*MTModel": None,  # translates, as MarianMTModel
    "*EncoderDecoderModel": None,
    "*Model": BARE,
    "*Encoder": BARE,
}
EXPECTED = (
    "expected logits (rows, length, vocabulary), as of a causal or an encoder-decoder language "
    "model (AutoModelForCausalLM, AutoModelForSeq2SeqLM), or a question answering model"
)


class UnreadableAttentionError(ValueError):
    """The attention of a model, or of this kind, cannot be read; says what to use instead."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}. Methods with gradients (LLMGradientAttribution) and by perturbation "
            "(LLMAttribution) need no attention"
        )


def check_head(class_name: str, holder: str = "") -> None:
    """Refuse a class of transformers or PEFT that has no head to attribute.

    holder: who says so, with a space behind it, as "'path/to/model' holds a ".

    Raises:
        ValueError: what such a model is, and what serves.
    """
    table = {**WITHOUT_LM_HEAD, **(WITHOUT_HEAD if hasattr(transformers, class_name) else {})}
    what = next((what for pattern, what in table.items() if fnmatchcase(class_name, pattern)), None)
    if what is not None:
        which = f"{holder}{class_name}, which" if holder else class_name
        raise ValueError(f"{which} {what}: {EXPECTED}")


def check_pair(model: Any, tokenizer: Any) -> None:
    """Refuse a model and a tokenizer of which one is none; see `check_model`, `check_tokenizer`."""
    check_model(model)
    check_tokenizer(tokenizer)


def check_model(model: Any) -> None:
    """Refuse what is no model, and models of transformers without the head that is needed.

    Modules of other origin pass: their logits tell what they are.

    Raises:
        TypeError: no ``nn.Module``.
        ValueError: a masked language model, a classifier, or a model without a head.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model first, got {_named(model)}{_advice(model, MODEL_ADVICE)}"
        )
    model = unwrapped(model)
    if isinstance(model, PreTrainedModel):
        check_head(type(model).__name__)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what cannot encode a text and name its tokens.

    Raises:
        TypeError: methods of a tokenizer are missing.
    """
    lacks = [name for name in TOKENIZER_METHODS if not callable(getattr(tokenizer, name, None))]
    if lacks or isinstance(tokenizer, type):
        raise TypeError(
            f"expected the model's tokenizer, with {', '.join(TOKENIZER_METHODS)}; got "
            f"{_named(tokenizer)}{_advice(tokenizer, TOKENIZER_ADVICE)}"
        )


def check_reads_tokens(model: nn.Module) -> None:
    """Refuse a model whose input is a picture or a sound, where the prompt is a text alone.

    Raises:
        ValueError: what the model reads first.
    """
    model = unwrapped(model)
    reads = getattr(model, "main_input_name", "input_ids")
    if isinstance(model, PreTrainedModel) and reads != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {reads} first, and not token ids alone: "
            "expected a model of texts, such as its language model alone (model.language_model) "
            "where it has one"
        )


def check_weights(model: nn.Module) -> None:
    """Refuse weights that autograd cannot use.

    Raises:
        ValueError: they were made in inference mode.
    """
    made = [name for name, weight in model.named_parameters() if weight.is_inference()]
    if made:
        raise ValueError(
            f"the weights of {type(model).__name__} were made in torch.inference_mode(), so it has "
            f"no gradients ({made[0]}): load or build it outside of that, or take a perturbation "
            "method (LLMAttribution)"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that PEFT, torch.compile or DataParallel wrap, else the model itself."""
    model = original(model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    base = getattr(model, "get_base_model", None)
    return original(base()) if callable(base) else model


Advice = tuple[tuple[Callable[[Any], bool], str], ...]

TOKENIZER_METHODS = ("encode", "decode", "convert_ids_to_tokens")
_PIPELINE = (
    lambda x: hasattr(x, "model") and hasattr(x, "tokenizer"),
    "pass its parts, pipeline.model and pipeline.tokenizer",
)
_PATH = lambda x: isinstance(x, str | os.PathLike)  # noqa: E731
_CLASS = (lambda x: isinstance(x, type), "pass what from_pretrained gives, not the class")

MODEL_ADVICE: Advice = (
    (_PATH, "load it first: model, tokenizer = load_model(...)"),
    _CLASS,
    _PIPELINE,
    (lambda x: hasattr(x, "encode"), "the model comes first, and then its tokenizer"),
    (lambda x: isinstance(x, tuple), "unpack it: model, tokenizer = load_model(...)"),
    (callable, "pass the model itself, which is asked for its layers, its embeddings and its text"),
)
TOKENIZER_ADVICE: Advice = (
    (_PATH, "load it first: model, tokenizer = load_model(...)"),
    _CLASS,
    _PIPELINE,
    (lambda x: isinstance(x, nn.Module), "the model comes first, and then its tokenizer"),
    (lambda x: hasattr(x, "tokenizer"), "pass its tokenizer, processor.tokenizer"),
    (
        lambda x: hasattr(x, "encode_batch"),
        "wrap it: transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)",
    ),
)


def _advice(passed: Any, advice: Advice) -> str:
    return next((f": {text}" for applies, text in advice if applies(passed)), "")


def _named(passed: Any) -> str:
    if isinstance(passed, type):
        return f"the class {passed.__name__}"
    if passed is None:
        return "None"
    text = f" {str(passed)!r}" if _PATH(passed) else ""
    return f"{type(passed).__name__}{text}"
