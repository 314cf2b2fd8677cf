"""The command line: a thin skin over ``explain`` and ``batch``."""

from captum_llm_ext.cli.entry import main

__all__ = ["main"]
