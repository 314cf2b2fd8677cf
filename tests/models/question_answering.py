"""Tiny random question answering models, a tokenizer that pairs texts, and scores of spans."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from captum_llm_ext import qa_input
from tests.models.families import VOCAB_SIZE, _randomise, tiny_tokenizer

QUESTION = "Who plays golf"
CONTEXT = "Dave lives in Palm Coast. Dave plays golf with his family. Paris is in France."
ANSWER = "his family"
BASELINE = 5
_SIZES = {
    "vocab_size": VOCAB_SIZE + 1,  # and the mask
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "pad_token_id": 3,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**_SIZES, "type_vocab_size": 2}),
    "roberta": ("RobertaConfig", {**_SIZES, "type_vocab_size": 1}),
}
FAMILIES = tuple(CONFIGS)
LAYERS = {
    family: {
        "embedding": f"{family}.embeddings.word_embeddings",
        "block": f"{family}.encoder.layer.1",
        "projection": f"{family}.encoder.layer.1.attention.self.query",
        "mlp": f"{family}.encoder.layer.1.output",
    }
    for family in FAMILIES
}
PAIRS = {"bert": "<s> $A </s> $B:1 </s>:1", "roberta": "<s> $A </s> </s> $B </s>"}

TYPES = {"bert": ["token_type_ids"], "roberta": []}


@cache
def qa_tokenizer(family: str) -> PreTrainedTokenizerFast:
    backend = deepcopy(tiny_tokenizer().backend_tokenizer)
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=PAIRS[family], special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_input_names=["input_ids", *TYPES[family], "attention_mask"],
    )


@cache
def tiny_qa(family: str) -> nn.Module:
    kind, settings = CONFIGS[family]
    config = getattr(transformers, kind)(**settings)
    return _randomise(transformers.AutoModelForQuestionAnswering.from_config(config))


def question_input(family: str, by: str = "token", **how: Any) -> Any:
    inp: Any = qa_input(QUESTION, CONTEXT, qa_tokenizer(family), by, **how)
    if by == "token":
        inp.baselines = BASELINE
    return inp


def encoded(family: str) -> Any:
    return qa_tokenizer(family)(QUESTION, CONTEXT, return_tensors="pt", return_offsets_mapping=True)


def answer_span(family: str, answer: str = ANSWER, context: str = CONTEXT) -> list[int]:
    """The answer's first and last position, by its characters in the context."""
    pair = qa_tokenizer(family)(QUESTION, context)
    first = context.index(answer)
    ends = (first, first + len(answer) - 1)
    return [pair.char_to_token(c, sequence_index=1) for c in ends]


def log_p(model: Any, ids: Tensor, types: Tensor | None, end: int, position: int) -> Tensor:
    """log p (rows,) of the answer's start (end = 0) or end (1) at a position: plain forward."""
    more = {} if types is None else {"token_type_ids": types.expand_as(ids)}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    logits = (output.start_logits, output.end_logits)[end]
    return logits.log_softmax(-1)[:, position]


def types_of(family: str) -> Tensor | None:
    return encoded(family)["token_type_ids"] if family == "bert" else None
