"""The benchmark against other libraries: its oracle, its scripts for Captum and us, its page.

The scripts for inseq and interpreto need those libraries, which stay out of this environment.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.benchmarks.measure import RESULTS
from tests.benchmarks.peers import oracle, run_captum, run_ours
from tests.benchmarks.peers.compare import expected, relative_difference, values
from tests.benchmarks.peers.render import END, PAGE, START, tables
from tests.benchmarks.peers.workload import QUESTIONS, Question, Run, measure
from tests.models.families import tiny_model, tiny_tokenizer

SCRIPTS = {"ours": run_ours.WORKS, "captum": run_captum.WORKS}
RIGHT = {
    "ours": ("tokens", "tokens/prefix", "sequence", "layers", "ablation", "error/50"),
    "captum": ("tokens", "sequence", "layers/core", "ablation/sequence", "ablation/core"),
}


def question(target: str = " Paris is", n_steps: int = 3) -> Question:
    return Question(
        tiny_model("llama"), tiny_tokenizer(), "The capital of France is", target, n_steps
    )


def found(run: Run) -> torch.Tensor:
    return run.attributions(run.call()).detach().double()


@pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
@pytest.mark.parametrize(
    ("library", "work"), [(library, work) for library, works in RIGHT.items() for work in works]
)
def test_both_scripts_give_what_the_oracle_gives(library: str, work: str) -> None:
    asked = question(n_steps=50 if work == "error/50" else 3)
    known = {
        name: {"attributions": found(run(asked)).tolist()}
        for name, run in oracle.WORKS.items()
        if name != "error" and name.partition("/")[0] in (work.partition("/")[0], "tokens")
    }
    attributions = found(SCRIPTS[library][work](asked))
    assert attributions.abs().max() > 1e-4
    assert relative_difference(attributions, expected(work, attributions, known)) < 1e-3


def test_the_reference_of_a_converged_integral_adds_up() -> None:
    asked = question(" is")
    asked = Question(asked.model, asked.tokenizer, asked.prompt, "a", 400)
    reference = oracle.converged(asked, tolerance=1e-3)
    difference = oracle.score_difference(asked)
    assert abs(float(reference.sum()) - difference) < 2e-3 * abs(difference)
    assert relative_difference(oracle.integrated_gradients(asked), reference) < 1e-2


def test_a_piece_is_a_five_point_rule() -> None:
    asked = Question(tiny_model("llama"), tiny_tokenizer(), "The capital", "a", 5)
    (whole,) = oracle.pieces(asked, torch.tensor([0.0, 1.0]))
    assert torch.allclose(whole[3], oracle.integrated_gradients(asked)[0], rtol=1e-3, atol=1e-5)


def test_an_error_is_written_with_its_type_and_first_line() -> None:
    def call() -> None:
        raise ValueError("no such thing\nand more")

    row = measure(question(), Run("how", call, lambda found: found))
    assert row == {"settings": "how", "error": "ValueError: no such thing"}


def test_cost_is_scaled_and_in_units_of_the_same_process() -> None:
    row = measure(question(), Run("how", lambda: torch.ones(1, 2), lambda found: found, scale=10.0))
    assert row["runs"] == 3
    assert math.isclose(row["units"], row["cpu_s"] / row["unit_s"])
    assert row["attributions"] == [[1.0, 1.0]]
    assert values(row).shape == (1, 2)


def test_every_work_has_a_question() -> None:
    for works in (*SCRIPTS.values(), oracle.WORKS):
        assert {name.partition("/")[0] for name in works} <= set(QUESTIONS)


def test_the_page_shows_the_stored_results() -> None:
    stored = tables(json.loads((RESULTS / "peers.json").read_text()))
    assert PAGE.read_text().split(START)[1].split(END)[0].strip() == stored
