"""Bad input is refused by name or answered rightly, never with NaN."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from tokenizers import processors

from captum_llm_ext import LLMAttribution, TextTokenInput
from tests.models.families import PROMPT, CausalToy, MinimalTokenizer, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    INPUTS,
    KEYED_TEMPLATE,
    METHODS,
    OTHERS,
    TEMPLATE,
    VALUES,
    ablation,
    filled_template,
    game,
    keyed,
    ours,
    rows,
    shapley,
    template_input,
    token_input,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def attribute(inp: Any = None, method: str = "feature_ablation", /, **kwargs: Any) -> Any:
    kwargs.setdefault("target", target_ids(2))
    model = kwargs.pop("model", None) or tiny_model("llama")
    return ours(method, model, inp or INPUTS["template_list"](), **kwargs)


def short(*arguments: Any, **settings: Any) -> Any:
    """A template with one setting wrong."""
    return lambda: attribute(template_input(*arguments, **settings))


def wrapped(method: Any) -> Any:
    return LLMAttribution(method, tiny_tokenizer())


def draws(*values: Any) -> Callable[[], Any]:
    """A callable baseline that gives this, whatever the values are."""
    return lambda: values[0]


LIST = list(VALUES)
MISTAKES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no trial": (lambda: attribute(num_trials=0), ["num_trials", "0"]),
    "negative trials": (lambda: attribute(num_trials=-2), ["num_trials", "-2"]),
    "half a trial": (lambda: attribute(num_trials=1.5), ["num_trials", "1.5"]),
    "no sample": (
        lambda: attribute(None, "shapley_sampling", n_samples=0),
        ["n_samples", "0"],
    ),
    "no sample of lime": (lambda: attribute(None, "lime", n_samples=0), ["n_samples", "0"]),
    "no perturbation per evaluation": (
        lambda: attribute(perturbations_per_eval=0),
        ["perturbations_per_eval", "0"],
    ),
    "no row per pass": (
        lambda: attribute(internal_batch_size=0),
        ["internal_batch_size", "0"],
    ),
    "too few baselines": (short(TEMPLATE, LIST, ["He"]), ["baseline", "1", "4"]),
    "too many baselines": (short(TEMPLATE, LIST, [*OTHERS, "more"]), ["baseline", "5", "4"]),
    "too few drawn baselines": (short(TEMPLATE, LIST, draws(["He"])), ["baseline", "1", "4"]),
    "drawn list for a dict": (
        short(KEYED_TEMPLATE, keyed(VALUES), draws(list(OTHERS))),
        ["baseline", "dict"],
    ),
    "drawn dict without a key": (
        short(KEYED_TEMPLATE, keyed(VALUES), draws({"name": "He"})),
        ["baseline", "place|key"],
    ),
    "too short a mask": (short(TEMPLATE, LIST, mask=[0, 1]), ["mask", "2", "4"]),
    "too long a mask": (short(TEMPLATE, LIST, mask=[0, 1, 1, 2, 2]), ["mask", "5", "4"]),
    "open brace": (short("{} { {} {} {}", LIST), ["template", r"brace|\{\{"]),
    "braces of code": (
        short('{{}} {} {} {} {} "a": {1 + 1}', LIST),
        ["template", r"brace|\{\{"],
    ),
    "named braces": (short('{} {} {} {} {"key"}', LIST), ["template", r"brace|\{\{"]),
    "more places than values": (short("{} {} {} {} {}", LIST), ["template"]),
    "place without a value": (
        short(KEYED_TEMPLATE + " {when}", keyed(VALUES)),
        ["template", "when"],
    ),
    "empty target": (lambda: attribute(target=""), ["target", "empty|no token|at least one"]),
    "empty target tensor": (
        lambda: attribute(target=torch.tensor([], dtype=torch.long)),
        ["target", "empty|no token|at least one"],
    ),
    "2-D target": (lambda: attribute(target=target_ids(2)[None]), ["target", "1-D"]),
    "target outside the vocabulary": (
        lambda: attribute(target=torch.tensor([9999])),
        ["target", "9999", "352"],
    ),
    "contrast outside the vocabulary": (
        lambda: attribute(contrast_target=torch.tensor([9999])),
        ["9999", "352"],
    ),
    "contrast of another length": (
        lambda: attribute(target=target_ids(3), contrast_target=target_ids(2)),
        ["contrast", "2", "3"],
    ),
    "generation and a target": (
        lambda: attribute(gen_args={"max_new_tokens": 2}),
        ["gen_args", "target"],
    ),
    "nothing to generate with": (
        lambda: attribute(target=None, model=CausalToy()),
        ["target", "generate"],
    ),
    "unknown baseline of the input": (
        lambda: TextTokenInput(PROMPT, tiny_tokenizer(), baselines="no such token"),
        ["no such token"],
    ),
    "unknown baseline": (
        lambda: attribute(INPUTS["token"](), baselines="no such token"),
        ["no such token"],
    ),
    "baseline outside the vocabulary": (
        lambda: attribute(INPUTS["token"](), baselines=9999),
        ["baseline", "9999", "352|351"],
    ),
    "own baseline outside the vocabulary": (
        lambda: attribute(token_input("Dave lives", baselines=9999)),
        ["baseline", "9999", "352|351"],
    ),
    "baseline of embeddings": (
        lambda: attribute(INPUTS["token"](), baselines="mean"),
        ["baseline", "mean"],
    ),
    "rank of nearest": (
        lambda: attribute(INPUTS["token"](), baselines=("nearest", 0)),
        ["nearest", "0"],
    ),
    "unknown score": (lambda: attribute(attr_target="loss"), ["attr_target", "loss", "log_prob"]),
    "method with gradients": (
        lambda: wrapped(captum.attr.IntegratedGradients(tiny_model("llama"))),
        ["IntegratedGradients", "FeatureAblation", "KernelShap"],
    ),
    "no feature": (
        lambda: attribute(token_input(PROMPT, skip_tokens=tiny_tokenizer().encode(PROMPT))),
        ["skip|feature"],
    ),
    "beyond the context": (
        lambda: attribute(template_input("{} " + "golf " * 70, ["Dave"])),
        ["context|positions", "64"],
    ),
    "baseline beyond the context": (
        lambda: attribute(template_input("{} lives", ["Dave"], ["golf " * 70])),
        ["context|positions", "64"],
    ),
}


def test_no_trial_is_refused() -> None:
    with pytest.raises(ValueError, match="num_trials must be an int of at least 1, got 0"):
        attribute(num_trials=0)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str) -> None:
    call, expected = MISTAKES[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    for words in expected:
        assert caught.match(f"(?i){words}")


def test_mistakes_of_type() -> None:
    for call, word in (
        (lambda: attribute(target=3), "int"),
        (lambda: attribute("a plain string"), "str"),
        (lambda: wrapped(tiny_model("llama")), "Llama"),
        (lambda: attribute(INPUTS["token"](), baselines=object()), "object"),
    ):
        with pytest.raises((TypeError, ValueError), match=word):
            call()


def test_keyword_of_another_name() -> None:
    with pytest.raises((TypeError, ValueError), match="n_samplez"):
        attribute(None, "shapley_sampling", n_samplez=3)


# --- hard cases with a right answer --------------------------------------------------------------


def result_unless(word: str, inp: Any, method: str) -> Any:
    """The result, or None where it was refused with an error that has the word in it."""
    try:
        return attribute(inp, method)
    except ValueError as error:
        if word not in str(error):
            raise
        return None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [["Dave", "", "golf"], ["", "Coast", "golf"], ["", "", ""]])
def test_empty_feature_is_refused_or_counts_nothing(values: list[str], method: str) -> None:
    template = "{} lives in {} and {}"
    result = result_unless("empty", template_input(template, list(values)), method)
    if result is None:
        return
    assert torch.isfinite(rows(result)).all()
    if method in ("feature_ablation", "shapley"):
        formula = {"feature_ablation": ablation, "shapley": shapley}[method]
        prompt_of = filled_template(template, values, [""] * 3)
        expected = formula(game(tiny_model("llama"), prompt_of, target_ids(2)), 3)
        assert (rows(result) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("method", ["feature_ablation", "shapley"])
def test_doubled_braces_are_text(method: str) -> None:
    template = '{{"name": {}, "place": {}}}'
    formula = {"feature_ablation": ablation, "shapley": shapley}[method]
    prompt_of = filled_template(template, VALUES[:2], ["", ""])
    expected = formula(game(tiny_model("llama"), prompt_of, target_ids(2)), 2)
    assert_close(rows(attribute(template_input(template, VALUES[:2]), method)), expected)


def test_braces_in_values_are_text() -> None:
    values, absent = ["{}", "a {0} b"], ["{", "}"]
    prompt_of = filled_template("{} or {}", values, absent)
    expected = ablation(game(tiny_model("llama"), prompt_of, target_ids(2)), 2)
    assert_close(rows(attribute(template_input("{} or {}", values, absent))), expected)


def without_start_token() -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.bos_token = None
    assert tokenizer.encode("") == []
    return tokenizer


EMPTIED = "(?i)empty.*(baseline|template)|(baseline|template).*empty"


@pytest.mark.parametrize(
    ("method", "mask"),
    [
        ("feature_ablation", [0, 0]),
        ("shapley_sampling", [0, 0]),
        ("shapley_sampling", None),
        ("kernel_shap", None),
    ],
)
def test_prompt_that_is_empty_without_its_features(method: str, mask: list[int] | None) -> None:
    inp = template_input("{}{}", VALUES[:2], mask=mask)
    with pytest.raises(ValueError, match=EMPTIED):
        attribute(inp, method, tokenizer=without_start_token())


@pytest.mark.parametrize("method", ["feature_ablation", "shapley_sampling"])
def test_prompt_that_is_empty_with_a_plain_module(method: str) -> None:
    tokenizer = MinimalTokenizer()
    model = CausalToy(len(tokenizer.words))
    inp = template_input("{}", ["Dave"])
    with pytest.raises(ValueError, match=EMPTIED):
        attribute(inp, method, tokenizer=tokenizer, model=model, target="plays golf,")


def test_start_token_stands_for_an_empty_prompt() -> None:
    """The tokenizer puts "<s>" before every text, so that a prompt is never empty."""
    expected = ablation(
        game(tiny_model("llama"), filled_template("{}", ["Dave"], [""]), target_ids(2)), 1
    )
    assert_close(rows(attribute(template_input("{}", ["Dave"]))), expected)


def test_one_feature_of_kernel_shap_is_refused_or_right() -> None:
    inp = template_input("{} lives", ["Dave"], ["He"])
    result = result_unless("feature", inp, "kernel_shap")
    if result is not None:
        prompt_of = filled_template("{} lives", ["Dave"], ["He"])
        value = game(tiny_model("llama"), prompt_of, target_ids(2))
        assert_close(rows(result), ablation(value, 1)[:1])


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for method in ("lime", "kernel_shap"):
        with pytest.raises(
            (ImportError, ValueError), match=r"scikit-learn.*lime|lime.*scikit-learn"
        ):
            attribute(None, method)
    assert attribute().seq_attr.shape == (4,)
