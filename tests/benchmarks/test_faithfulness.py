"""The benchmark's prompts and facts, its tables, and the candidates on a game with known answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_llm_ext.registry import METHODS
from tests.benchmarks import tables
from tests.benchmarks.attributed import ABLATION, BY_REMOVAL, FLOW, SALIENCY, VARIANTS, methods
from tests.benchmarks.candidates import CANDIDATES
from tests.benchmarks.faithfulness import PROMPTS, Log
from tests.benchmarks.planted import N_SENTENCES, facts


def test_the_two_halves_share_no_prompt_and_are_large_enough() -> None:
    halves = json.loads(PROMPTS.read_text())
    assert len(halves["choosing"]) >= 10
    assert len(halves["holdout"]) >= 20
    both = [entry for half in halves.values() for entry in half]
    assert len({entry["name"] for entry in both}) == len(both)
    texts = [json.dumps({k: v for k, v in entry.items() if k != "name"}) for entry in both]
    assert len(set(texts)) == len(texts)


def test_the_answer_of_a_fact_stands_in_its_sentence_alone() -> None:
    choosing, held_out = facts("choosing"), facts("held-out")
    assert (len(choosing), len(held_out)) == (10, 20)
    planted = [fact.sentences[fact.place] for fact in (*choosing, *held_out)]
    assert len(set(planted)) == len(planted)
    assert {fact.place for fact in held_out} == set(range(N_SENTENCES))
    for fact in (*choosing, *held_out):
        assert fact.inp().values == list(fact.sentences)
        assert len(set(fact.sentences)) == N_SENTENCES
        assert fact.answer.strip() in fact.sentences[fact.place]
        others = [s for i, s in enumerate(fact.sentences) if i != fact.place]
        assert not any(fact.answer.strip().lower() in s.lower() for s in [*others, fact.question])


def test_every_method_of_the_registry_is_asked_for_in_one_turn() -> None:
    left_out = {name for name, variants in VARIANTS.items() if not variants}
    assert left_out == {"shapley", "conductance"}
    turns = [set(methods(turn)) for turn in range(3)]
    assert sum(map(len, turns)) == len(methods()) == len(set().union(*turns))
    asked = {method.args[0] for method in methods().values()}  # type: ignore[attr-defined]
    assert asked == set(METHODS) - left_out


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


def records() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Four prompts, judged in two ways; flow has 0.95 of ablation's 1.0, saliency 0.3."""
    areas = {SALIENCY: 0.3, FLOW: 0.95, ABLATION: 1.0, BY_REMOVAL: 1.0}
    attributed = [
        {"prompt": i, "method": x, "attr": [], "cpu_s": i, "rows": 2 * i, "backward_rows": 0}
        for i in range(4)
        for x in areas
    ]
    judged = [
        {
            "prompt": i,
            "method": label,
            "removed by": way,
            "deletion over random": area * (1 + i) * 0.4,
            "insertion over random": area * 2,
            **dict.fromkeys(("drop@1", "drop@3", "drop@5"), float(i)),
            "lds": 0.5,
        }
        for i in range(4)
        for label, area in areas.items()
        for way in ("pad", "removal")
    ]
    planted = [
        {"fact": str(i), "method": label, "rank": 1 if i < found else 4}
        for label, found in ((SALIENCY, 3), (FLOW, 2))
        for i in range(4)
    ]
    judged.append({**judged[0], "method": "only begun"})
    return attributed, judged, planted


def test_the_summary_has_means_differences_costs_and_hits() -> None:
    found = tables.summary(*records())
    assert found["methods"][FLOW].pop("kind") == "attention"
    assert found["methods"][FLOW] == {"cpu_s": 1.5, "rows": 3, "backward_rows": 0, "hits": [2, 4]}
    assert found["methods"][ABLATION]["hits"] is None
    pad = found["judged by"]["pad"]
    assert pad["n_prompts"] == 4
    assert set(pad["methods"]) == {SALIENCY, FLOW, ABLATION, BY_REMOVAL}
    flow = pad["methods"][FLOW]
    assert flow["deletion"][0] == pytest.approx(0.95)  # the mean of 0.4, 0.8, 1.2 and 1.6 of it
    assert flow["insertion"] == pytest.approx([1.9, 1.9, 1.9, 4, 0])
    assert (flow["drop@1"], flow["lds"]) == (1.5, 0.5)
    assert flow["less"]["saliency"]["insertion"] == pytest.approx([1.3, 1.3, 1.3, 4, 0])
    assert flow["less"]["ablation"]["deletion"][3:] == [0, 4]
    assert "ablation" not in pad["methods"][ABLATION]["less"]


def test_the_page_says_what_the_aims_miss() -> None:
    machine = {"threads": 1, "processor": "x", "cores": 2, "python": "3"}
    versions = dict.fromkeys(("captum", "torch", "transformers"), "0")
    text = tables.page_text({"machine": machine | versions, **tables.summary(*records())})
    assert "of feature ablation deletion 95% (met), insertion 95% (met)" in text
    assert "2 of 4 named first, by saliency 3 of 4: missed" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {FLOW} |"))
    assert row.startswith(f"| {FLOW} | 0.95 | 1.90 | 0.95 | 1.90 |")
    assert row.endswith("| 2/4 | 3.0 (0) | 1.5 |")


def test_a_log_goes_on_where_it_stopped(tmp_path: Any) -> None:
    path = tmp_path / "runs" / "log.jsonl"
    Log(path, ("a", "b")).add(a=1, b="x", c=[0.5])
    again = Log(path, ("a", "b"))
    again.add(a=1, b="y", c=[])
    assert Log(path, ("a", "b")).known == again.known
    assert set(again.known) == {(1, "x"), (1, "y")}
