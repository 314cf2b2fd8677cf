"""The benchmark's methods by label, from the registry; their attributions and what these cost."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_llm_ext import (
    LLMAttributionResult,
    TextTemplateInput,
    TextTokenInput,
    chat_input,
    explain,
    segment_input,
)
from captum_llm_ext.compat import CaptumTextTokenInput
from captum_llm_ext.registry import METHODS
from tests.benchmarks.integrals import SENTENCE

BASELINE = "pad"  # of the methods that take one, unless their options name another
SALIENCY, ABLATION = "L1 saliency", "feature ablation"
FROM_TEXT = "integrated gradients, 20 steps, from a text"
FLOW = "information flow"
BY_REMOVAL, BY_WORDS = f"{ABLATION}, by removal", f"{ABLATION}, by common words"
VALUE_NORMS = "attention × value norms"
RELEVANCE = ("relevance, cp", "relevance, AttnLRP")
Method: TypeAlias = Callable[[nn.Module, Any, Any, Tensor], LLMAttributionResult]
# The labels of a method with the options of each; a method without a line has its defaults.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "saliency": {SALIENCY: {}},
    "ig": {
        "integrated gradients, 20 steps": {"n_steps": 20},
        FROM_TEXT: {"n_steps": 20, "baselines": ("text", SENTENCE)},
        "integrated gradients, adaptive": {"quadrature": "adaptive"},
    },
    "gradxact": {"gradient × activation": {}},
    "gradshap": {"gradient SHAP, 10 samples": {"n_samples": 10}},
    "relevance": {"relevance, cp": {}, "relevance, AttnLRP": {"rules": "attnlrp"}},
    "conductance": {},  # of the embeddings it is integrated gradients
    "ablation": {
        ABLATION: {},
        BY_REMOVAL: {"baselines": "remove"},
        BY_WORDS: {"baselines": "common"},
    },
    "two_stage": {
        "two-stage ablation": {},
        "two-stage ablation, by removal": {"baselines": "remove"},
    },
    "shapley": {},  # exact values take 2^K prompts
    "shapley_sampling": {"Shapley sampling, 5 permutations": {"n_samples": 5}},
    "lime": {"LIME, 50 samples": {"n_samples": 50}},
    "kernelshap": {"Kernel SHAP, 50 samples": {"n_samples": 50}},
    "attention": {
        "attention, mean": {"reduction": "mean"},
        "attention, max": {"reduction": "max"},
        "attention, rollout": {"reduction": "rollout"},
        VALUE_NORMS: {"reduction": "value_norm"},
    },
    "flow": {FLOW: {}},
    "flow_rollout": {"information flow, rolled out": {}},
}
# What the aims ask of comes first, what costs most last.
FIRST = (SALIENCY, FROM_TEXT, ABLATION, BY_REMOVAL, FLOW, VALUE_NORMS, *RELEVANCE)
LAST = (
    "integrated gradients, adaptive",
    "gradient SHAP, 10 samples",
    "Shapley sampling, 5 permutations",
    "LIME, 50 samples",
    "Kernel SHAP, 50 samples",
)
# Not asked for planted facts, whose prompts are long, and whose sentences leave nothing behind.
WITHOUT_FACTS = (*LAST, FROM_TEXT, BY_REMOVAL, BY_WORDS, "two-stage ablation, by removal")


def methods(turn: int | None = None) -> dict[str, Method]:
    """Label → method with its options, of every row of the registry; of the first (0), second or
    last (2) turn only, or of all."""
    every = {
        label: partial(by_name, name, options)
        for name, method in METHODS.items()
        for label, options in VARIANTS.get(name, {method.help: {}}).items()
    }
    turns = {**dict.fromkeys(FIRST, 0), **dict.fromkeys(LAST, 2)}
    return {x: method for x, method in every.items() if turn in (None, turns.get(x, 1))}


def kinds() -> dict[str, str]:
    """Label → "gradient", "perturbation" or "attention"."""
    return {
        label: method.wrapper
        for name, method in METHODS.items()
        for label in VARIANTS.get(name, {method.help: {}})
    }


def by_name(
    name: str, options: dict[str, Any], model: nn.Module, tokenizer: Any, inp: Any, target: Tensor
) -> LLMAttributionResult:
    options = {**METHODS[name].wrapped_by.sequence_only, **options}
    if not isinstance(inp, CaptumTextTokenInput):
        options.pop("baselines", None)  # a template has its own
    elif METHODS[name].takes_baselines:
        options.setdefault("baselines", BASELINE)
    return explain(model, tokenizer, inp, target, name, **options)


def result_of(attr: Any, inp: Any, tokenizer: Any, target: Tensor) -> LLMAttributionResult:
    """An attribution (n_features,) as a result."""
    return LLMAttributionResult(
        input_tokens=list(inp.values),
        output_tokens=tokenizer.convert_ids_to_tokens(target.tolist()),
        seq_attr=attr,
        inp=inp,
    )


def as_input(entry: dict[str, Any], tokenizer: Any) -> Any:
    """The interpretable input of a prompt of prompts.json; special tokens are no features."""
    if "template" in entry:
        return TextTemplateInput(entry["template"], entry["values"], entry["baselines"])
    if "by" in entry:
        return segment_input(entry["text"], by=entry["by"])
    if "messages" in entry:
        return chat_input(entry["messages"], tokenizer)
    special = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else None
    first = tokenizer.encode(entry["text"])[0]
    return TextTokenInput(
        entry["text"], tokenizer, skip_tokens=special if special == [first] else None
    )


@dataclass(frozen=True)
class Attributed:
    """An attribution, (n_features,), and its cost."""

    attr: list[float]
    cpu_s: float
    rows: int
    backward_rows: int

    @classmethod
    def by(
        cls, method: Method, model: nn.Module, tokenizer: Any, inp: Any, target: Tensor
    ) -> Attributed:
        spent: dict[str, int] = defaultdict(int)
        torch.manual_seed(0)
        start = time.process_time()
        with _counted_rows(model, spent):
            result = method(model, tokenizer, inp, target)
        cpu_s = round(time.process_time() - start, 3)
        attr = [float(f"{value:.6g}") for value in result.seq_attr.tolist()]
        return cls(attr, cpu_s, spent["rows"], spent["backward_rows"])


@contextmanager
def _counted_rows(model: nn.Module, spent: dict[str, int]) -> Iterator[None]:
    """Count rows that go through the model, and those of them that are differentiated."""

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        spent["rows"] += len(args[0])
        spent["backward_rows"] += len(args[0]) if torch.is_grad_enabled() else 0

    hook = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()
