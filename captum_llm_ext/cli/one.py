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
from captum_llm_ext.cli.options import explain_options, given, layers, loaded
from captum_llm_ext.cli.outputs import add_output_arguments, show
from captum_llm_ext.explaining import check_options, explain
from captum_llm_ext.inputs.prompts import requested_input
from captum_llm_ext.model.adapter import QA
from captum_llm_ext.model.random_state import seeded
from captum_llm_ext.scoring.tasks import task_of

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
    add("--context", metavar="TEXT", help="of qa: the text that holds the answer to the prompt")
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


def run(arguments: argparse.Namespace) -> None:
    """Load the model, explain the prompt, show the result."""
    fields, options = _fields(arguments), explain_options(arguments)
    chosen, target = layers(arguments), getattr(arguments, "target", None)
    model, tokenizer = loaded(arguments)
    check_options(model, tokenizer, arguments.method, chosen, options)
    fields["answers"] = task_of(model).name == QA
    prompt = requested_input(tokenizer, by=arguments.by, roles=arguments.roles, **fields)
    options["show_progress"] = sys.stderr.isatty()
    with seeded(arguments.seed) if hasattr(arguments, "seed") else nullcontext():
        result = explain(model, tokenizer, prompt, target, arguments.method, chosen, **options)
    show(result, arguments)


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the prompt is, as `requested_input` takes it."""
    if not hasattr(arguments, "values"):
        if arguments.chat:
            return {"messages": [{"role": "user", "content": arguments.prompt}]}
        return {"prompt": arguments.prompt, **given(arguments, ("context",))}
    if arguments.chat:
        raise ValueError("--chat and --values exclude each other")
    fields = {"template": arguments.prompt, "values": _values(arguments.prompt, arguments.values)}
    if hasattr(arguments, "baselines"):
        texts = [str(baseline) for baseline in arguments.baselines]
        fields["baselines"] = _values(arguments.prompt, texts)
    return fields


def _values(template: str, texts: list[str]) -> list[str] | dict[str, str]:
    """The values of a template's fields: by name where these have names."""
    if not any(name for _, name, _, _ in Formatter().parse(template)):
        return texts
    pairs = [text.partition("=") for text in texts]
    unnamed = [text for text, (_, equals, _) in zip(texts, pairs, strict=True) if not equals]
    if unnamed:
        raise ValueError(f"the fields have names: expected NAME=TEXT, got {unnamed[0]!r}")
    return {name: value for name, _, value in pairs}
