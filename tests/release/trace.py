"""How many files and functions of the package one call enters: how much one must read to follow it.

Run as ``python -m tests.release.trace``. A function counts once, however often it is called; what a
comprehension or a lambda does counts for the function that it stands in. Making the method, the
wrapper and the input is not counted.
"""

from __future__ import annotations

import sys
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
STEPS = 200  # as many as converge
Call = Callable[[], Any]


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


def gradients(kind: Any, inp: Any, **options: Any) -> Call:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wrapper = LLMGradientAttribution(kind(model, EMBEDDINGS), tokenizer)
    return lambda: wrapper.attribute(inp, " plays golf", **options)


def integrated_gradients() -> Call:
    inp = TextTokenInput("Dave lives in", tiny_tokenizer(), baselines="<pad>")
    return gradients(LayerIntegratedGradients, inp, n_steps=STEPS)


def saliency() -> Call:
    return gradients(LayerSaliency, TextTokenInput("Dave lives in", tiny_tokenizer()))


def ablation() -> Call:
    inp = TextTokenInput("Dave lives in", tiny_tokenizer())
    wrapper = LLMAttribution(FeatureAblation(tiny_model("llama")), tiny_tokenizer())
    return lambda: wrapper.attribute(inp, " plays golf")


def template_with_prefix() -> Call:
    inp = TextTemplateInput(PREFIX + "{} lives in {}", ["Dave", "Palm Coast"])
    return gradients(LayerIntegratedGradients, inp, n_steps=STEPS)


CALLS: dict[str, Callable[[], Call]] = {
    "integrated gradients": integrated_gradients,
    "saliency": saliency,
    "ablation": ablation,
    "a template with a cached prefix": template_with_prefix,
}


def counts(call: Call) -> tuple[int, int]:
    """Files and functions that a call of `attribute` enters."""
    call()  # a first call may import
    with entered() as codes:
        call()
    return len({code.co_filename for code in codes}), len(codes)


def main() -> None:
    for name, make in CALLS.items():
        files, functions = counts(make())
        print(f"{name}: {files} files, {functions} functions")


if __name__ == "__main__":
    main()
