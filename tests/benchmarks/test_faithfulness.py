"""The benchmark's prompts, its table, and the candidates on a game whose answer is known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.benchmarks.candidates import CANDIDATES
from tests.benchmarks.faithfulness import PROMPTS, REFERENCE, table


def test_the_two_halves_share_no_prompt_and_are_large_enough() -> None:
    halves = json.loads(PROMPTS.read_text())
    assert len(halves["choosing"]) >= 10
    assert len(halves["holdout"]) >= 20
    both = [entry for half in halves.values() for entry in half]
    assert len({entry["name"] for entry in both}) == len(both)
    texts = [json.dumps({k: v for k, v in entry.items() if k != "name"}) for entry in both]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("n_features", [1, 2, 5, 8])
@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_give_a_sum_its_terms(name: str, n_features: int) -> None:
    terms = torch.linspace(-1, 2, n_features).double()

    def game(present: Tensor) -> Tensor:
        return present.double() @ terms + 3

    found = CANDIDATES[name](game, n_features).double()
    assert found.shape == (n_features,)
    if "neighbours" in name:  # shares a window's drop among the two in it
        assert float((found - terms).abs().max()) <= 3 / max(1, n_features - 1) / 4 + 1e-9
    else:
        torch.testing.assert_close(found, terms, atol=1e-6, rtol=0)


def test_the_table_has_means_differences_and_costs() -> None:
    measures = ["deletion", "insertion", "comprehensiveness", "sufficiency"]
    rows = [
        {
            "prompt": str(prompt),
            "method": method,
            "rows": 7,
            "backward_rows": 0,
            "cpu_s": 0.5,
            **{f"{measure} over random": value + prompt / 10 for measure in measures},
        }
        for prompt in range(4)
        for method, value in ((REFERENCE, 0.2), ("other", 0.3))
    ]
    found = table(rows)
    assert found.index.tolist() == ["other", REFERENCE]
    assert found.loc["other", "deletion"].startswith("0.45 [")
    assert found.loc["other", "deletion, less ablation's"] == "+0.10 [0.10, 0.10] (4:0)"
    assert found.loc[REFERENCE, "rows"] == 7
