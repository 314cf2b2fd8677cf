"""Writes small results of every kind to tests/data, as the package stores them now.

Run it once before the schema changes, `python -m tests.results.make_schema_files`, and keep the
files: `test_export.py` reads those of every version.
"""

from __future__ import annotations

from pathlib import Path

import torch

from captum_llm_ext import explain
from captum_llm_ext.results.json_format import VERSION
from tests.models.families import tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "data"
CALLS = {
    "single": {"method": "ig", "n_steps": 3},
    "layered": {"method": "gradxact", "layers": ["model.layers.0.mlp", "model.layers.1.mlp"]},
    "attention": {"method": "attention", "layers": 0, "heads": [0]},
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    for name, call in CALLS.items():
        result = explain(model, tokenizer, "the cat sat", " on the", **call)
        result.to_json(FOLDER / f"schema_{VERSION}_{name}.json")


if __name__ == "__main__":
    main()
