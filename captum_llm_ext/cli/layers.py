"""``captum-llm-ext layers MODEL``: the layers of a model, by the names that --layers takes."""

from __future__ import annotations

import argparse
from typing import Any

from captum_llm_ext.cli.arguments import Parser
from captum_llm_ext.cli.options import load

DESCRIPTION = """\
List the layers of a model for --layers: the last part of their names, how many there are, their
class, and the first of them.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser: a model, or the demo model."""
    parser = Parser(
        prog="captum-llm-ext layers", usage="%(prog)s [MODEL] [options]", description=DESCRIPTION
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder or name of a model (default: the demo model)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code from the model's folder"
    )
    return parser


def run(arguments: dict[str, Any]) -> None:
    """Load the model and print a line for each kind of layer."""
    model, _ = load({name: value for name, value in arguments.items() if value is not None})

    from captum_llm_ext.model.layers import named_layers

    kinds: dict[tuple[str, str], list[str]] = {}
    for name, module in named_layers(model):
        last = name.rpartition(".")[2]
        if name:
            pattern = f"{name.rpartition('.')[0]}.*" if last.isdecimal() else last
            kinds.setdefault((pattern, type(module).__name__), []).append(name)
    width = max(len(pattern) for pattern, _ in kinds)
    for (pattern, kind), names in kinds.items():
        print(f"{pattern:<{width}}  {len(names):>4}  {kind}, {names[0]}")
