"""``captum-llm-ext methods``: what there is, without a model and without torch."""

from __future__ import annotations

import argparse
from typing import Any

from captum_llm_ext.cli.arguments import Parser
from captum_llm_ext.registry import CHOICES, METHODS


def build_parser() -> argparse.ArgumentParser:
    """The parser, which has no arguments of its own."""
    return Parser(
        prog="captum-llm-ext methods",
        description="List the methods of --method, and the values of their options.",
    )


def run(arguments: dict[str, Any]) -> None:
    """Print a line for each method, and one for each option that takes one of a few values."""
    del arguments
    width = max(map(len, METHODS))
    for name, method in METHODS.items():
        print(f"{name:<{width}}  {method.help} ({method.wrapper})")
    print()
    for option, values in CHOICES.items():
        print(f"--{option.replace('_', '-'):<{width}}  {', '.join(values)}")
