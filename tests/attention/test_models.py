"""Reading attention leaves the model as it was, and refuses what it cannot read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from captum_llm_ext import (
    LLMAttentionAttribution,
    LLMAttentionAttributionResult,
    TextTokenInput,
    cli,
    explain,
)
from captum_llm_ext.attention.hooks import configs, eager_attention
from captum_llm_ext.compat import BaseLLMAttribution
from tests.attention.test_wrapper import read
from tests.model.test_restore import Failing, _tensors, prepared, state
from tests.models.families import (
    FAMILIES,
    PROMPT,
    TARGET,
    VOCAB_SIZE,
    CausalToy,
    tiny_model,
    tiny_tokenizer,
)
from tests.models.question_answering import tiny_qa
from tests.oracles.attention import bidirectional, family_model
from tests.oracles.cases import pairwise, prompt_input, target_ids

REDUCTIONS = ["mean", "max", "rollout", "value_norm"]


def implementations(model: nn.Module) -> list[str | None]:
    return [config._attn_implementation for config in configs(model)]


# --- the model stays as it was -------------------------------------------------------------------


def test_a_model_computes_as_before() -> None:
    model, ids = tiny_model("llama"), prompt_input().inp_tensor
    with torch.no_grad():
        before = model(ids).logits
        read(model)
        assert torch.equal(model(ids).logits, before)
    assert implementations(model) == ["sdpa"]


@pytest.mark.parametrize(
    ("family", "implementation", "reduction"),
    list(
        pairwise(
            {
                "family": [*FAMILIES],
                "implementation": [None, "eager"],
                "reduction": ["mean", "value_norm"],
            }
        )
    ),
)
def test_every_model_computes_as_before(
    family: str, implementation: str | None, reduction: str
) -> None:
    model: Any = FAMILIES[family]()
    implementation = implementation or model.config._attn_implementation  # mostly "sdpa"
    model.config._attn_implementation = implementation
    ids = prompt_input().inp_tensor
    with torch.no_grad():
        before = model(ids).logits
        read(model, reduction=reduction)
        after = model(ids).logits
    assert torch.equal(before, after)
    assert implementations(model) == [implementation]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_is_put_back(reduction: str, error: type[BaseException] | None) -> None:
    model = prepared()
    model.eval()
    if error is not None:
        last = model.model.layers[3].mlp
        last.forward = Failing(last, 1, error)
    before = state(model)
    if error is None:
        read(model, reduction=reduction)
    else:
        with pytest.raises(error, match="stopped by the test"):
            read(model, reduction=reduction)
    assert state(model) == before
    assert implementations(model) == ["sdpa"]


def test_each_part_gets_its_own_implementation_back() -> None:
    config = transformers.Gemma3Config(
        text_config={"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    parts = [config, config.text_config, config.vision_config]
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    for part, implementation in zip(parts, ["eager", "sdpa", "eager"], strict=True):
        part._attn_implementation_internal = implementation
    assert configs(model) == parts
    with eager_attention(model):
        assert implementations(model) == ["eager"] * 3
    assert implementations(model) == ["eager", "sdpa", "eager"]


def test_gradients_and_inference_mode_stay_as_they_were() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        inside = read(model)
    assert inside == read(model)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_calls_keep_no_tensors(reduction: str) -> None:
    model = tiny_model("llama")
    read(model, reduction=reduction)
    before = _tensors()
    for _ in range(3):
        read(model, reduction=reduction)
    assert _tensors() <= before


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1), ({"include_prompt_attention": True}, 2), ({"reduction": "rollout"}, 2)],
)
def test_one_pass_and_another_to_compare_eager_with(options: dict[str, Any], expected: int) -> None:
    model, passes = tiny_model("llama", fresh=True), 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)
    read(model, **options, include_generated=True)
    assert passes == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_in_training_mode() -> None:
    model = tiny_model("llama", fresh=True)
    expected = read(model, reduction="value_norm")
    model.gradient_checkpointing_enable()
    model.train()
    assert read(model, reduction="value_norm") == expected
    assert model.is_gradient_checkpointing
    assert model.training


def test_dropout_is_warned_of() -> None:
    model = FAMILIES["gpt2"]().train()
    with pytest.warns(UserWarning, match="training mode and has dropout"):
        read(model)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reduction": "median"},
            "one of mean, max, .*; got 'median'",
        ),
        ({"layers": []}, "at least one layer, got an empty list"),
        ({"layers": 4}, r"index of a decoder block in 0…3, got layer 4"),
        ({"layers": [0, -5]}, r"in 0…3, got layer -5"),
        ({"layers": True}, r"in 0…3, got layer True"),
        ({"layers": "model.layers.9"}, "no layer of the model matches 'model.layers.9'"),
        ({"layers": nn.Linear(2, 2)}, "not part of the model"),
        ({"layers": "mlp"}, "layer 'mlp' holds no attention: .* such as model.layers.0.self_attn"),
        ({"layers": ["self_attn", "q_proj"]}, "layer 'q_proj' holds no attention"),
        ({"heads": []}, "distinct indices"),
        ({"heads": [1, 1]}, "distinct indices"),
        ({"heads": [-1]}, "distinct indices of heads, from 0"),
        ({"heads": [0.5]}, "distinct indices"),
        ({"heads": True}, "distinct indices"),
        ({"heads": [0, 4]}, r"heads must be in 0…3, as model.layers.0.self_attn has; got \[0, 4\]"),
    ],
)
def test_settings_without_meaning(settings: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        read(model, **settings)
    assert implementations(model) == ["sdpa"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (CausalToy, "CausalToy gives no attention weights: expected a causal language model"),
        (lambda: tiny_qa("bert"), "BertForQuestionAnswering is not causal"),
        (bidirectional, "BertForMaskedLM is not causal"),
        (lambda: family_model("mamba"), "MambaForCausalLM gives no attention weights: it has no"),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "value_norm"])
def test_models_that_cannot_give_attention(build: Any, message: str, reduction: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(build(), reduction=reduction)


def test_a_block_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 0 holds no attention: .*model.layers.1.self_attn"):
        read(family_model("jamba"), layers=[0, 1])


def test_a_block_that_runs_twice_is_refused() -> None:
    model = tiny_model("llama", fresh=True)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="runs more than once"):
        read(model)


def test_a_model_is_expected_first() -> None:
    with pytest.raises(TypeError, match="expected a model first, got str"):
        LLMAttentionAttribution("llama", tiny_tokenizer())


@pytest.mark.parametrize("target", ["", torch.tensor([], dtype=torch.long)])
def test_an_empty_target(target: Any) -> None:
    wrapper = LLMAttentionAttribution(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(ValueError, match="at least one token"):
        wrapper.attribute(prompt_input(), target=target)


def test_a_context_that_is_too_long() -> None:
    wrapper = LLMAttentionAttribution(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(ValueError, match="context of 64 tokens"):
        wrapper.attribute(prompt_input(), target=target_ids(3).repeat(30))


# --- explain and the command line ----------------------------------------------------------------


def test_it_is_captums_kind_of_wrapper() -> None:
    wrapper = LLMAttentionAttribution(tiny_model("llama"), tiny_tokenizer())
    assert isinstance(wrapper, BaseLLMAttribution)
    assert wrapper.model is tiny_model("llama")


def test_explain() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = explain(
        model,
        tokenizer,
        PROMPT,
        TARGET,
        "attention",
        layers=["model.layers.1", "model.layers.2"],
        heads=[0, 3],
        reduction="max",
        include_generated=True,
    )
    wrapper = LLMAttentionAttribution(model, tokenizer, [1, 2], [0, 3], "max")
    inp = TextTokenInput(PROMPT, tokenizer)
    assert isinstance(result, LLMAttentionAttributionResult)
    assert result == wrapper.attribute(inp, TARGET, include_generated=True)


@pytest.mark.parametrize("method", ["saliency", "ablation"])
def test_heads_belong_to_attention(method: str) -> None:
    with pytest.raises(TypeError, match="heads"):
        explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, TARGET, method, heads=[0])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    both = (tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setattr("captum_llm_ext.model.loading.load_demo_model", lambda: both)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main([PROMPT, "--target", TARGET, "--no-color", *arguments])
        return code, *capsys.readouterr()

    return run


def test_command_line(run: Any) -> None:
    arguments = ("--method", "attention", "--heads", "1", "2", "--reduction", "rollout")
    code, out, _ = run(*arguments, "--layers", "model.layers.0", "model.layers.3")
    assert code == 0
    wrapper = LLMAttentionAttribution(
        tiny_model("llama"), tiny_tokenizer(), [0, 3], [1, 2], "rollout"
    )
    result = wrapper.attribute(TextTokenInput(PROMPT, tiny_tokenizer()), TARGET)
    assert out.startswith(result.to_text(color=False))
    assert "layers.3" in out or "3 self_attn" in out


def test_the_sequence_alone_from_the_command_line(run: Any) -> None:
    code, out, _ = run("--method", "attention", "--sequence-only")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wrapper = LLMAttentionAttribution(model, tokenizer)
    inp = TextTokenInput(PROMPT, tokenizer)
    result = wrapper.attribute(inp, TARGET, include_per_token_attr=False)
    assert (code, result.token_attr) == (0, None)
    assert out.startswith(result.to_text(color=False))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--heads", "1"),
        ("--reduction", "max"),
        ("--method", "attention", "--stdevs", "3"),
        ("--method", "attention", "--baseline", "pad"),
        ("--method", "attention", "--steps", "3"),
        ("--method", "attention", "--samples", "3"),
        ("--method", "attention", "--heads", "9"),
    ],
)
def test_command_line_refuses_what_would_do_nothing(run: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert arguments[-2].lstrip("-") in err or arguments[-1].lstrip("-") in err


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_real_model_rests_on_its_first_token(demo_model: Any) -> None:
    """An attention sink: where no token begins every text, the first takes what others leave."""
    model, tokenizer = demo_model
    inp = TextTokenInput("The capital of France is", tokenizer)
    wrapper = LLMAttentionAttribution(model, tokenizer)
    result = wrapper.attribute(inp, target=" Paris, of course", include_generated=True)
    assert result.attention.shape == (30, 9, 4, 9)
    assert (result.attention.sum(-1) - 1).abs().max() < 1e-5
    assert result.token_attr.argmax(-1).tolist() == [0] * 4
    # The values of the sink are small, so it counts for less where they weigh the attention.
    norms = LLMAttentionAttribution(model, tokenizer, reduction="value_norm")
    weighted = norms.attribute(inp, target=" Paris, of course", include_generated=True)
    share = (weighted.token_attr / weighted.token_attr.sum(-1, keepdim=True))[:, 0]
    assert (share < result.token_attr[:, 0]).all()
