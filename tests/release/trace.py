"""How many files and functions of the package one call enters: how much one must read to follow it.

Run as ``python -m tests.release.trace``. A function counts once, however often it is called; what a
comprehension or a lambda does counts for the function that it stands in.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import captum_llm_ext
from captum_llm_ext import (
    FeatureAblation,
    LayerIntegratedGradients,
    LayerSaliency,
    LLMAttribution,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from tests.models.families import tiny_model, tiny_tokenizer

PACKAGE = str(Path(captum_llm_ext.__file__).parent)
PREFIX = "Dave lives in Palm Coast and plays golf with friends in the sun; " * 2
EMBEDDINGS = "model.embed_tokens"


@contextmanager
def entered() -> Iterator[set[CodeType]]:
    """The functions of the package that are entered inside."""
    codes: set[CodeType] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name[0] != "<":
            codes.add(code)

    sys.setprofile(profile)
    try:
        yield codes
    finally:
        sys.setprofile(None)


def integrated_gradients() -> None:
    method = LayerIntegratedGradients(tiny_model("llama"), EMBEDDINGS)
    inp = TextTokenInput("Dave lives in", tiny_tokenizer(), baselines="<pad>")
    LLMGradientAttribution(method, tiny_tokenizer()).attribute(inp, " plays golf", n_steps=4)


def saliency() -> None:
    method = LayerSaliency(tiny_model("llama"), EMBEDDINGS)
    inp = TextTokenInput("Dave lives in", tiny_tokenizer())
    LLMGradientAttribution(method, tiny_tokenizer()).attribute(inp, " plays golf")


def ablation() -> None:
    inp = TextTokenInput("Dave lives in", tiny_tokenizer())
    method = FeatureAblation(tiny_model("llama"))
    LLMAttribution(method, tiny_tokenizer()).attribute(inp, " plays golf")


def template_with_prefix() -> None:
    method = LayerIntegratedGradients(tiny_model("llama"), EMBEDDINGS)
    inp = TextTemplateInput(PREFIX + "{} lives in {}", ["Dave", "Palm Coast"])
    LLMGradientAttribution(method, tiny_tokenizer()).attribute(inp, " plays golf", n_steps=4)


CALLS: dict[str, Callable[[], None]] = {
    "integrated gradients": integrated_gradients,
    "saliency": saliency,
    "ablation": ablation,
    "a template with a cached prefix": template_with_prefix,
}


def counts(call: Callable[[], None]) -> tuple[int, int]:
    """Files and functions that a call enters."""
    with warnings.catch_warnings(), entered() as codes:
        warnings.simplefilter("ignore")  # four steps do not converge
        call()
    return len({code.co_filename for code in codes}), len(codes)


def main() -> None:
    for name, call in CALLS.items():
        call()  # what is made once, such as the model, is not counted
        files, functions = counts(call)
        print(f"{name}: {files} files, {functions} functions")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
