"""Attributions of the small real model in 4, 8 and 16 bits against float32.

`python -m tests.benchmarks.quantization` prints two tables and writes results/quantization.json:

1. how near the attributions in low precision are to those of a float32 copy with the same
   (dequantised) weights: the cosine of all token attributions, by method and layer;
2. how far quantisation itself moves them: the rank correlation of the token saliencies of the
   quantised model with those of the unquantised one.
"""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from captum_llm_ext import (
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LayerSaliency,
    LLMGradientAttribution,
    TextTokenInput,
    load_demo_model,
    load_model,
)
from captum_llm_ext.model.loading import DEMO_FOLDER, _cache_folder
from tests.benchmarks.measure import write_results
from tests.models.quantized import is_packed, stored_weights, with_weights

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " playing golf, hiking"
LAYERS = {
    "embeddings": "model.embed_tokens",
    "block 15": "model.layers.15",
    "its q_proj": "model.layers.15.self_attn.q_proj",
    "its mlp": "model.layers.15.mlp",
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "L1 saliency": (LayerSaliency, {}),
    "gradient x activation": (LayerGradientXActivation, {}),
    "integrated gradients, 20 steps": (LayerIntegratedGradients, {"n_steps": 20}),
}
PRECISIONS: dict[str, tuple[str | None, torch.dtype]] = {
    "bfloat16": (None, torch.bfloat16),
    "nf4 in float32": ("nf4", torch.float32),
    "nf4 in bfloat16": ("nf4", torch.bfloat16),
    "int8 in float32": ("int8", torch.float32),
    "int8 in bfloat16": ("int8", torch.bfloat16),
}
RANKED = (
    (PROMPT, TARGET),
    ("The capital of France is", " Paris."),
    ("The capital of Japan is", " Tokyo."),
    ("Water boils at a temperature of", " 100 degrees"),
    ("She opened the door and saw that the room was", " empty."),
    ("To bake a cake you need flour, sugar, butter and", " eggs."),
    ("The Louvre is a museum in Paris. The museum is called the", " Louvre"),
    ("My dog likes to chase the cat of our neighbour, because it", " is"),
)


@dataclass
class Loaded:
    """A model after `generate()`, and its float32 copy with the weights that its bytes mean."""

    model: Any
    tokenizer: Any
    reference: nn.Module


def load(name: str, full: nn.Module) -> Loaded:
    quantization, dtype = PRECISIONS[name]
    model, tokenizer = load_model(_cache_folder() / DEMO_FOLDER, quantization, dtype=dtype)
    weights = {rounded: stored_weights(model, rounded) for rounded in (False, True)}
    ids = TextTokenInput(PROMPT, tokenizer).inp_tensor
    model.generate(ids, max_new_tokens=2, do_sample=False)
    return Loaded(model, tokenizer, with_weights(full, weights[is_packed(model)], model))


def attribute(model: nn.Module, tokenizer: Any, method: str, prompt: str, target: str) -> Any:
    kind, options = METHODS[method]
    wrapper = LLMGradientAttribution(kind(model, list(LAYERS.values())), tokenizer)
    return wrapper.attribute(TextTokenInput(prompt, tokenizer), target=target, **options)


def cosines(
    case: Loaded, method: str, prompt: str = PROMPT, target: str = TARGET
) -> dict[str, float]:
    """Of the attributions of every target token to every prompt token, by layer."""
    found, expected = (
        attribute(model, case.tokenizer, method, prompt, target)
        for model in (case.model, case.reference)
    )
    return {
        layer: float(
            cosine_similarity(
                found[name].token_attr.flatten(), expected[name].token_attr.flatten(), dim=0
            )
        )
        for layer, name in LAYERS.items()
    }


def second_prompt(name: str, case: Loaded) -> dict[str, Any]:
    """Integrated gradients again, since how uneven a path is depends on the prompt."""
    method = list(METHODS)[-1]
    found = cosines(case, method, *RANKED[1])
    print(
        f"{name:16} the same of a short prompt       "
        + "".join(f"{x:9.4f}" for x in found.values())
    )
    return {"precision": name, "method": f"{method}, short prompt", "cosine": found}


def saliencies(model: nn.Module, tokenizer: Any) -> list[Tensor]:
    """L1 saliency of the sequence score at the embeddings, for each prompt."""
    method = LayerSaliency(model, "model.embed_tokens")
    wrapper = LLMGradientAttribution(method, tokenizer)
    return [
        wrapper.attribute(TextTokenInput(prompt, tokenizer), target=target).seq_attr
        for prompt, target in RANKED
    ]


def rank_correlations(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        float(spearmanr(a.numpy(), b.numpy()).statistic)
        for a, b in zip(found, expected, strict=True)
    ]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    full, tokenizer = load_demo_model()
    unquantised = saliencies(full, tokenizer)
    rows: list[dict[str, Any]] = []
    print(f"{'cosine with float32, same weights':34}" + "".join(f"{x:>12}" for x in LAYERS))
    for name in PRECISIONS:
        case = load(name, full)
        for method in METHODS:
            found = cosines(case, method)
            rows.append({"precision": name, "method": method, "cosine": found})
            print(f"{name:16} {method:30}" + "".join(f"{x:9.4f}" for x in found.values()))
        rows.append(second_prompt(name, case))
        ranks = rank_correlations(saliencies(case.model, tokenizer), unquantised)
        median = statistics.median(ranks)
        rows.append({"precision": name, "rank correlation": ranks, "median": median})
        print(
            f"{name:16} rank correlation of saliencies with the unquantised model: "
            f"median {median:.2f}, least {min(ranks):.2f}, of {len(ranks)} prompts"
        )
    rows.append({"bitsandbytes": version("bitsandbytes")})
    print(f"written: {write_results('quantization', rows)}")


if __name__ == "__main__":
    main()
