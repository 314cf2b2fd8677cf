"""``captum-llm-ext batch PROMPTS --out RESULTS``: many prompts, from a file to a file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from captum_llm_ext.cli.arguments import (
    Parser,
    add_input_arguments,
    add_method_arguments,
    add_model_arguments,
)
from captum_llm_ext.cli.options import explain_keywords, load

DESCRIPTION = """\
Attribute every prompt of a file. A command that was stopped goes on where it was when you give it
again.

A line is a JSON object: {"prompt": "..."}, {"messages": [{"role": "user", "content": "..."}]} or
{"template": "{} lives in {}", "values": ["Dave", "Palm Coast"]}, each perhaps with "target",
"contrast_target" and "id". A line that is malformed or fails becomes an error record.
"""
EXAMPLES = """\
examples:
  captum-llm-ext batch prompts.jsonl --out results.jsonl
  captum-llm-ext batch prompts.jsonl --out results.parquet --method ablation --by sentence
several processes, each with a GPU of its own where there are any:
  accelerate launch --multi_gpu --num_processes 4 -m captum_llm_ext batch in.jsonl --out out.jsonl
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of many attributions."""
    parser = Parser(
        prog="captum-llm-ext batch",
        usage="%(prog)s PROMPTS --out FILE [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("prompts", help="a JSONL file")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="a new file, .jsonl or .parquet"
    )
    add_model_arguments(parser)
    add_input_arguments(parser)
    add_method_arguments(parser)
    return parser


def run(arguments: dict[str, Any]) -> None:
    """Load the model, attribute all prompts, and print how many have a result."""
    model, tokenizer = load(arguments)

    from captum_llm_ext.batches.run import batch

    prompts, out = arguments.pop("prompts"), arguments.pop("out")
    options = explain_keywords(arguments)
    report = batch(model, tokenizer, prompts, out, show_progress=sys.stderr.isatty(), **options)
    counts = f"{report.n_results} results, {report.n_errors} errors"
    if report.n_left:
        summary = f"{counts}; {report.n_left} left to other processes"
    else:
        summary = f"wrote {out}: {counts}"
    print(f"captum-llm-ext: {summary}", file=sys.stderr)
    if report.n_errors and not (report.n_results or report.n_left):
        raise ValueError(f"no prompt has a result: the records in {out} say why")
