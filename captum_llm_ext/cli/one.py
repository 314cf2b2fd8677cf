"""``captum-llm-ext PROMPT``: one attribution, shown and written to files."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from string import Formatter
from typing import Any

from captum_llm_ext._version import __version__
from captum_llm_ext.cli.arguments import (
    Parser,
    add_input_arguments,
    add_method_arguments,
    add_model_arguments,
)
from captum_llm_ext.cli.options import explain_keywords, load, take
from captum_llm_ext.cli.outputs import OUTPUT_OPTIONS, add_output_arguments, show

DESCRIPTION = "Show which words of a prompt made a language model say what it said."
EXAMPLES = """\
examples:
  captum-llm-ext "The capital of France is" --target " Paris"
  captum-llm-ext "The capital of France is" --method ig --n-steps 100 --out capital.png
  captum-llm-ext "Name a fruit." --chat --max-new-tokens 5
  captum-llm-ext "It rains. Stay in. I am" --by sentence --method shapley --out rain.html
  captum-llm-ext "{name} lives in {city}" --values name=Dave "city=Palm Coast" --method ablation
  captum-llm-ext "The capital of France is" --layers "model.layers.*.mlp" q_proj --out layers.png
  captum-llm-ext "The capital of France is" --model path/to/model --sequence-only
  captum-llm-ext "Das Haus ist alt." --model path/to/translator --method ig --adaptive
  captum-llm-ext "Who plays golf?" --context "Dave plays golf." --model path/to/qa-model
many prompts (captum-llm-ext batch --help):
  captum-llm-ext batch prompts.jsonl --out results.jsonl
what there is:
  captum-llm-ext methods
  captum-llm-ext layers path/to/model
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of one attribution."""
    parser = Parser(
        prog="captum-llm-ext",
        usage="%(prog)s PROMPT [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("prompt", help="the text, or the template of --values")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_model_arguments(parser)
    add_input_arguments(parser)
    add = parser.add_argument_group("other kinds of prompt").add_argument
    add(
        "--chat",
        action="store_true",
        default=False,
        help="put the prompt through the model's chat template",
    )
    add(
        "--context",
        metavar="TEXT",
        help="the text that holds the answer, for question answering models",
    )
    add(
        "--values",
        nargs="+",
        metavar="TEXT",
        help="the prompt is a template, and these are its features: one for each {}, or NAME=TEXT "
        "for each {NAME}; put them after the prompt",
    )
    add_method_arguments(parser)
    add_output_arguments(parser)
    return parser


def run(arguments: dict[str, Any]) -> None:
    """Load the model, explain the prompt, show the result."""
    output, fields = take(arguments, OUTPUT_OPTIONS), _input_fields(arguments)
    seed = arguments.pop("seed", None)
    model, tokenizer = load(arguments)

    from captum_llm_ext.explaining import check_options, explain
    from captum_llm_ext.inputs.prompts import requested_input
    from captum_llm_ext.model.adapter import QA
    from captum_llm_ext.model.random_state import seeded
    from captum_llm_ext.scoring.tasks import task_of

    options = explain_keywords(arguments)
    target, method = options.pop("target", None), options.pop("method")
    layers = options.pop("layers", None)
    check_options(model, tokenizer, method, layers, options)
    prompt = requested_input(tokenizer, answers=task_of(model).name == QA, **fields)
    options["show_progress"] = sys.stderr.isatty()
    with nullcontext() if seed is None else seeded(seed):
        result = explain(model, tokenizer, prompt, target, method, layers, **options)
    show(result, output)


def _input_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """The prompt and its features, as keywords of `requested_input`."""
    fields = take(arguments, ("by", "roles", "context"))
    prompt, chat = arguments.pop("prompt"), arguments.pop("chat")
    if "values" not in arguments:
        if chat:
            return fields | {"messages": [{"role": "user", "content": prompt}]}
        return fields | {"prompt": prompt}
    if chat:
        raise ValueError("--chat and --values exclude each other")
    texts = take(arguments, ("values", "baselines"))
    values = {name: _template_values(prompt, list(map(str, texts[name]))) for name in texts}
    return {**fields, "template": prompt, **values}


def _template_values(template: str, texts: list[str]) -> list[str] | dict[str, str]:
    """The values of a template's fields, by name where the fields have names."""
    if not any(name for _, name, _, _ in Formatter().parse(template)):
        return texts
    pairs = [text.partition("=") for text in texts]
    unnamed = [text for text, (_, equals, _) in zip(texts, pairs, strict=True) if not equals]
    if unnamed:
        raise ValueError(f"the fields have names: expected NAME=TEXT, got {unnamed[0]!r}")
    return {name: value for name, _, value in pairs}
