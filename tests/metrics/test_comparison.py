"""Several methods on several prompts: the table, its intervals, the plot, and what is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from captum_llm_ext import LLMAttributionResult, TextTemplateInput, TextTokenInput, explain
from captum_llm_ext.metrics import MethodComparison, compare_methods, faithfulness
from captum_llm_ext.registry import METHODS as REGISTERED
from tests.inputs.template_cases import chat_tokenizer
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import target_ids

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients have not converged")

PROMPTS = ["Dave lives in Palm", "The capital of France is", "His personal interests include"]
METHODS = ["saliency", ("ig", {"n_steps": 3}), "ablation"]
NAMES = ["saliency", "ig n_steps=3", "ablation"]
MEASURES = ["deletion", "insertion", "comprehensiveness", "sufficiency"]


def compared(methods: Any = METHODS, prompts: Any = PROMPTS, **options: Any) -> MethodComparison:
    tokenizer = options.pop("tokenizer", tiny_tokenizer())
    given = {"targets": [target_ids(2)] * len(prompts), "n_random": 2, **options}
    return compare_methods(tiny_model("llama"), tokenizer, prompts, methods, **given)


def by_position(model: nn.Module, tokenizer: Any, inp: Any, target: Tensor) -> LLMAttributionResult:
    """A method of a caller's own: the later a feature, the more important."""
    return LLMAttributionResult(
        input_tokens=list(inp.values),
        output_tokens=tokenizer.convert_ids_to_tokens(target.tolist()),
        seq_attr=list(range(len(inp.values))),
    )


def test_a_row_for_each_prompt_and_method_as_faithfulness_has_it() -> None:
    model, tokenizer, target = tiny_model("llama"), tiny_tokenizer(), target_ids(2)
    frame = compared(generator=torch.Generator().manual_seed(3)).prompts
    assert frame["prompt"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert frame["method"].tolist() == NAMES * 3
    assert (frame["seconds"] > 0).all()
    generator = torch.Generator().manual_seed(3)
    for number, prompt in enumerate(PROMPTS):
        state = generator.get_state()
        for method, name in (("saliency", "saliency"), ("ablation", "ablation")):
            generator.set_state(state)
            result = explain(model, tokenizer, prompt, target, method)
            judged = faithfulness(model, tokenizer, result, target, n_random=2, generator=generator)
            row = frame[(frame["prompt"] == number) & (frame["method"] == name)].iloc[0]
            for measure in MEASURES:
                assert row[measure] == pytest.approx(judged.summary()[measure]["value"], abs=1e-3)
                assert row[f"{measure} over random"] == pytest.approx(
                    judged.over_random()[measure], abs=1e-3
                )


def test_means_over_prompts_and_their_intervals() -> None:
    prompts = [f"{a} {b}" for a in ("Dave lives", "The capital") for b in ("in", "of Japan", "is")]
    found = compared(["saliency", "gradxact"], prompts, n_bootstrap=20_000, confidence=0.9)
    assert set(found.table.index) == {"saliency", "gradxact"}
    for method in found.table.index:
        rows = found.prompts[found.prompts["method"] == method]
        for measure in MEASURES:
            values = rows[f"{measure} over random"].to_numpy()
            assert len(values) == 6
            entry = found.table[measure].loc[method]
            assert entry["mean"] == pytest.approx(values.mean())
            truth = scipy.stats.bootstrap(
                (values,),
                np.mean,
                n_resamples=20_000,
                confidence_level=0.9,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
            allowed = 0.1 * values.std()
            assert entry["low"] == pytest.approx(truth.low, abs=allowed)
            assert entry["high"] == pytest.approx(truth.high, abs=allowed)
    order = found.table["deletion", "mean"].tolist()
    assert order == sorted(order, reverse=True)


def test_equal_prompts_leave_no_doubt() -> None:
    inputs = [TextTokenInput("Dave", tiny_tokenizer(), skip_tokens=["<s>"])] * 3
    entry = compared(["ablation"], inputs).table["deletion"].loc["ablation"]
    assert entry["low"] == pytest.approx(entry["mean"], abs=1e-6)
    assert entry["high"] == pytest.approx(entry["mean"], abs=1e-6)


def test_methods_named_by_the_caller_and_of_his_own() -> None:
    found = compared({"last first": by_position, "IG": ("ig", {"n_steps": 2})})
    assert set(found.table.index) == {"last first", "IG"}
    assert compared([by_position]).table.index.tolist() == ["by_position"]


def test_prompts_of_every_kind_and_generated_targets() -> None:
    tokenizer = chat_tokenizer()
    prompts = [
        "Dave lives",
        [{"role": "user", "content": "Dave plays golf"}],
        TextTemplateInput("{} lives in {}", ["Dave", "Palm Coast"], ["He", "Tokyo"]),
    ]
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    seen: list[Tensor] = []

    def watching(model: nn.Module, tokenizer: Any, inp: Any, target: Tensor) -> Any:
        seen.append(target)
        return by_position(model, tokenizer, inp, target)

    targets = [None, target_ids(1), None]
    found = compared(
        ["ablation", watching], prompts, targets=targets, gen_args=options, tokenizer=tokenizer
    )
    assert len(found.prompts) == 6
    assert [len(target) for target in seen] == [2, 1, 2]
    ids = torch.tensor([tokenizer.encode("Dave lives")])
    model: Any = tiny_model("llama")
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(seen[0], generated[0, ids.size(1) :])


def test_one_baseline_for_methods_and_removal() -> None:
    prompts = ["Dave lives in", TextTemplateInput("{} lives", ["Dave"])]
    found = compared(["ablation"], prompts, baselines=9)
    own = [TextTokenInput("Dave lives in", tiny_tokenizer(), baselines=9), prompts[1]]
    expected = compared(["ablation"], own)
    assert found.prompts["deletion"].tolist() == expected.prompts["deletion"].tolist()
    other = compared([("ablation", {"baselines": 3})], prompts[:1], baselines=9)
    assert other.table.index.tolist() == ["ablation baselines=3"]


def test_a_callable_baseline_is_drawn_once() -> None:
    """The methods explain the prompt that they are judged by."""
    others, seen = iter([["His"], ["golf"], ["Paris"], ["hiking"]]), []

    def watching(model: nn.Module, tokenizer: Any, inp: Any, target: Tensor) -> Any:
        seen.append(inp.to_model_input(torch.zeros(1, 1)))
        return by_position(model, tokenizer, inp, target)

    inp = TextTemplateInput("{} lives in", ["Dave"], baselines=lambda: next(others))
    methods = {"a": watching, "b": watching, "ablation": "ablation", "ig": ("ig", {"n_steps": 2})}
    found = compared(methods, [inp])
    assert seen == ["His lives in"] * 2
    assert next(others) == ["golf"]
    fixed = compared(methods, [TextTemplateInput("{} lives in", ["Dave"], baselines=["His"])])
    assert found.prompts["deletion"].tolist() == fixed.prompts["deletion"].tolist()


def test_a_baseline_beside_a_method_that_has_none() -> None:
    without = [name for name, method in REGISTERED.items() if not method.takes_baselines]
    assert {"saliency", "gradxact", "attention"} <= set(without)
    found = compared([*without, "ablation"], baselines=9)
    expected = compared(["ablation"], baselines=9)
    rows = found.prompts[found.prompts["method"] == "ablation"]
    assert rows["deletion"].tolist() == expected.prompts["deletion"].tolist()


def test_plot_has_a_bar_for_each_method_and_measure() -> None:
    found = compared(["saliency", "ablation"])
    ax: Any = found.plot()[1]
    widths = sorted(bar.get_width() for bar in ax.patches)
    assert len(widths) == 4
    means = [found.table[name, "mean"] for name in ("deletion", "insertion")]
    np.testing.assert_allclose(widths, np.sort(np.concatenate(means)), rtol=1e-9)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(found.table.index)
    given = plt.subplots()[1]
    assert found.plot(["sufficiency"], given)[1] is given
    with pytest.raises(ValueError, match="measures must be among deletion"):
        found.plot(["speed"])
    plt.close("all")


def test_rows_of_several_runs_put_together() -> None:
    whole = compared(["saliency", "ablation"])
    parts = [whole.prompts[whole.prompts["prompt"] == number] for number in (2, 0, 1)]
    again = MethodComparison.of(pandas.concat(parts))
    assert again.table["deletion", "mean"].tolist() == pytest.approx(
        whole.table["deletion", "mean"].tolist()
    )
    with pytest.raises(ValueError, match="each of 2 methods on each of 3 prompts, got 5 rows"):
        MethodComparison.of(whole.prompts.iloc[1:])


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"captum-llm-ext\[export\]"):
        compared(["saliency"])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"methods": ["magic"]}, "expected a method among saliency"),
    "no method": ({"methods": []}, "at least one method"),
    "twice": ({"methods": ["saliency", "saliency"]}, "saliency more than once"),
    "no prompt": ({"prompts": []}, "at least one prompt"),
    "one string": ({"prompts": "Dave"}, "list of at least one prompt"),
    "targets": ({"targets": [None]}, "a target for each of 3 prompts"),
    "target": ({"targets": " golf"}, "a target for each of 3 prompts"),
    "resamples": ({"n_bootstrap": 0}, "n_bootstrap must be"),
    "confidence": ({"confidence": 95}, "confidence must be between 0 and 1"),
    "random": ({"n_random": 0}, "n_random must be"),
    "score": ({"attr_target": "odds"}, "attr_target must be one of"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_what_was_expected(wrong: str) -> None:
    options, message = WRONG[wrong]
    given = {"methods": ["saliency"], "prompts": PROMPTS, **options}
    if "prompts" in options:
        given["targets"] = None
    with pytest.raises(ValueError, match=message):
        compared(**given)
