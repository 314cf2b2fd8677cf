"""The command line: it passes its arguments to ``explain`` or ``batch``."""

from captum_llm_ext.cli.entry import main

__all__ = ["main"]
