"""Kinds of input, baselines and targets: from what a user writes to token ids and features."""
