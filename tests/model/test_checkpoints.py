"""What a saved model holds decides whether it is loaded; nothing is filled in at random."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from captum_llm_ext import LayerSaliency, LLMGradientAttribution, TextTokenInput, cli, load_model
from captum_llm_ext.model.checkpoints import Checkpoint
from tests.model.test_checks import ENCODER
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import FAMILIES, PROMPT, TARGET, tiny_model, tiny_tokenizer
from tests.models.question_answering import tiny_qa

LLAMA = {**ENCODER, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 352, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 352, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def build(name: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_classifier_is_not_loaded_as_a_language_model(tmp_path: Path) -> None:
    save(build("LlamaForSequenceClassification", "LlamaConfig", **LLAMA), tmp_path)
    with pytest.raises(ValueError, match="holds a LlamaForSequenceClassification, which is a clas"):
        load_model(tmp_path)


OTHER_HEADS = {
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA, "classifier of texts or a reward"),
    "LlamaForTokenClassification": ("LlamaConfig", LLAMA, "classifier of tokens"),
    "LlamaModel": ("LlamaConfig", LLAMA, "gives hidden states"),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2, "classifier of texts"),
    "GPT2Model": ("GPT2Config", GPT2, "gives hidden states"),
    "BertForSequenceClassification": ("BertConfig", ENCODER, "classifier of texts"),
    "BertForMaskedLM": ("BertConfig", ENCODER, "masked language model"),
    "BertForMultipleChoice": ("BertConfig", ENCODER, "multiple choice"),
    "BertForPreTraining": ("BertConfig", ENCODER, "heads of pretraining"),
    "ModernBertForMaskedLM": ("ModernBertConfig", ENCODER, "masked language model"),
    "T5EncoderModel": ("T5Config", T5, "gives hidden states"),
}


@pytest.mark.parametrize("task", [None, "causal"])
@pytest.mark.parametrize("name", OTHER_HEADS)
def test_models_with_another_head(name: str, task: str | None, tmp_path: Path, capsys: Any) -> None:
    config, settings, message = OTHER_HEADS[name]
    save(build(name, config, **settings), tmp_path)
    with pytest.raises(ValueError, match=f"holds a {name}, which .*{message}"):
        load_model(tmp_path, task=task)
    if task is None:
        assert cli.main([PROMPT, "--target", TARGET, "--model", str(tmp_path)]) != 0
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_folder_that_does_not_name_its_class_is_judged_by_its_weights(
    name: str, tmp_path: Path
) -> None:
    save(build(name, "LlamaConfig", **LLAMA), tmp_path)
    change_json(tmp_path / "config.json", architectures=None)
    with pytest.raises(ValueError, match=r"lacks weights of a LlamaForCausalLM \(lm_head"):
        load_model(tmp_path)


def test_missing_weights_elsewhere_are_refused_too(tmp_path: Path) -> None:
    save(build("LlamaForCausalLM", "LlamaConfig", **LLAMA), tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    save(build("LlamaForCausalLM", "LlamaConfig", **LLAMA), tmp_path)
    change_json(tmp_path / "config.json", intermediate_size=40)
    with pytest.raises(ValueError, match=r"other shapes than its config\.json says .*down_proj"):
        load_model(tmp_path)


def test_blocks_that_the_configuration_leaves_out(tmp_path: Path) -> None:
    save(build("LlamaForCausalLM", "LlamaConfig", **LLAMA), tmp_path)
    change_json(tmp_path / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"blocks that its config\.json leaves out, .*layers\.1\."):
        load_model(tmp_path)


TIED = {
    "llama": lambda: build("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: build("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt2 untied": lambda: build(
        "GPT2LMHeadModel", "GPT2Config", **GPT2, tie_word_embeddings=False
    ),
    "gemma": lambda: build("GemmaForCausalLM", "GemmaConfig", **LLAMA, head_dim=8),
    "t5": lambda: tiny_seq2seq("t5"),
    "t5 untied": lambda: build(
        "T5ForConditionalGeneration", "T5Config", **T5, tie_word_embeddings=False
    ),
    "bart": lambda: tiny_seq2seq("bart"),
    "marian": lambda: tiny_seq2seq("marian"),
    "bert that answers": lambda: tiny_qa("bert"),
    "bert as a decoder": lambda: build(
        "BertLMHeadModel", "BertConfig", **ENCODER, is_decoder=True
    ),
    "xlm as a decoder": lambda: build(
        "XLMWithLMHeadModel", "XLMConfig", vocab_size=352, emb_dim=32, n_layers=2, n_heads=4,
        causal=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*TIED, *FAMILIES])
def test_tied_weights_are_not_missing(name: str, tmp_path: Path, recwarn: Any) -> None:
    model = TIED[name]() if name in TIED else tiny_model(name)
    loaded, _ = load_model(save(model, tmp_path))
    assert type(loaded) is type(model)
    stored, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    assert [w for w in recwarn if "holds weights" in str(w.message)] == []


@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        ("BertLMHeadModel", "BertConfig", ENCODER),
        ("RobertaForCausalLM", "RobertaConfig", ENCODER),
        (
            "XLMWithLMHeadModel",
            "XLMConfig",
            {"vocab_size": 352, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
        ),
    ],
)
def test_an_encoder_under_the_name_of_a_decoder(
    name: str, config: str, settings: Any, tmp_path: Path
) -> None:
    save(build(name, config, **settings), tmp_path)
    with pytest.raises(ValueError, match=f"holds a {name} that is an encoder"):
        load_model(tmp_path)


def test_a_model_loaded_in_inference_mode_has_gradients(tmp_path: Path) -> None:
    save(tiny_seq2seq("marian"), tmp_path)  # which does not store all its weights
    with torch.inference_mode():
        model, tokenizer = load_model(tmp_path)
    assert not any(weight.is_inference() for weight in (*model.parameters(), *model.buffers()))
    inp = TextTokenInput(PROMPT, tokenizer)
    method = LayerSaliency(model, model.get_input_embeddings())
    assert LLMGradientAttribution(method, tokenizer).attribute(inp, TARGET).seq_attr.all()


def test_a_model_that_is_stored_quantised_is_not_quantised_again(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    save(tiny_model("llama"), tmp_path)
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    change_json(tmp_path / "config.json", quantization_config=stored)
    with pytest.raises(ValueError, match="stored quantised: leave out quantization"):
        load_model(tmp_path, "nf4")


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tmp_path / "base")


def adapter_folder(base: Path, task_type: str | None, **fields: Any) -> Path:
    """A folder with an adapter's configuration and nothing else."""
    folder = base.parent / "adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": str(base), "task_type": task_type, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.fixture
def with_peft(monkeypatch: Any) -> None:
    """Adapters can be looked at without the package that loads them."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n if n == "peft" else find(n))


@pytest.mark.usefixtures("with_peft")
@pytest.mark.parametrize(
    ("task_type", "message"),
    [
        ("SEQ_CLS", "classifier of texts or a reward model"),
        ("TOKEN_CLS", "classifier of tokens"),
        ("FEATURE_EXTRACTION", "gives hidden states"),
    ],
)
def test_an_adapter_of_another_task(base: Path, task_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"holds the adapter of a PeftModelFor.*{message}"):
        load_model(adapter_folder(base, task_type))


@pytest.mark.usefixtures("with_peft")
@pytest.mark.parametrize(
    ("task_type", "model", "kind"),
    [
        ("CAUSAL_LM", lambda: tiny_model("llama"), "causal"),
        ("SEQ_2_SEQ_LM", lambda: tiny_seq2seq("bart"), "seq2seq"),
        ("QUESTION_ANS", lambda: tiny_qa("bert"), "qa"),
        (None, lambda: tiny_seq2seq("bart"), "seq2seq"),
        (None, lambda: tiny_qa("bert"), "qa"),
    ],
)
def test_the_kind_of_an_adapter(
    tmp_path: Path, task_type: str | None, model: Any, kind: str
) -> None:
    folder = adapter_folder(save(model(), tmp_path / "base"), task_type)
    checkpoint = Checkpoint.at(str(folder), trust_remote_code=False)
    assert checkpoint.kind() == checkpoint.kind(kind) == kind
    other = "qa" if kind == "causal" else "causal"
    with pytest.raises(ValueError, match=f"whose task is '{kind}'; got task='{other}'"):
        checkpoint.kind(other)


@pytest.mark.usefixtures("with_peft")
def test_an_adapter_without_a_tokenizer_has_that_of_its_model(base: Path) -> None:
    checkpoint = Checkpoint.at(str(adapter_folder(base, "CAUSAL_LM")), trust_remote_code=False)
    assert checkpoint.load_tokenizer().encode(PROMPT) == tiny_tokenizer().encode(PROMPT)


@pytest.mark.usefixtures("with_peft")
def test_an_adapter_of_no_model(base: Path) -> None:
    with pytest.raises(ValueError, match="does not say which model it belongs to"):
        load_model(adapter_folder(base, "CAUSAL_LM", base_model_name_or_path=None))


def test_an_adapter_without_the_package(base: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="adapter, which needs the package peft"):
        load_model(adapter_folder(base, "CAUSAL_LM"))


def trained_adapter(model: Any, base: Path, task_type: str | None, layer: str) -> Path:
    """An adapter of random weights, saved as PEFT saves it."""
    peft = pytest.importorskip("peft", reason="training an adapter needs peft")
    settings = peft.LoraConfig(
        task_type=task_type, r=2, target_modules=[layer], init_lora_weights=False
    )
    folder = base.parent / "trained"
    peft.get_peft_model(model, settings).save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_an_adapter_changes_the_scores_of_its_model(base: Path, task_type: str | None) -> None:
    model = tiny_model("llama", fresh=True)
    folder = trained_adapter(model, base, task_type, "q_proj")  # and adapts the model in place
    loaded, tokenizer = load_model(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert not torch.allclose(loaded(ids).logits, tiny_model("llama")(ids).logits)


def test_an_adapter_of_a_model_without_a_head(base: Path) -> None:
    folder = trained_adapter(tiny_model("llama", fresh=True), base, "CAUSAL_LM", "q_proj")
    build("LlamaModel", "LlamaConfig", **LLAMA).save_pretrained(base)
    with pytest.raises(ValueError, match=r"lacks weights of a LlamaForCausalLM \(lm_head"):
        load_model(folder)


def test_an_adapter_that_lacks_weights(base: Path) -> None:
    folder = trained_adapter(tiny_model("llama", fresh=True), base, "CAUSAL_LM", "q_proj")
    path = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(path).items())[2:]), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"trained' lacks weights .*lora_A"):
        load_model(folder)


def test_the_head_of_an_answering_adapter_comes_with_it(tmp_path: Path) -> None:
    answering = tiny_qa("bert")
    fresh = type(answering)(answering.config).eval()
    fresh.load_state_dict(answering.state_dict())
    save(build("BertModel", "BertConfig", **answering.config.to_dict()), tmp_path / "base")
    fresh.bert.save_pretrained(tmp_path / "base")
    folder = trained_adapter(fresh, tmp_path / "base", "QUESTION_ANS", "query")
    loaded, _ = load_model(folder)
    ids = torch.tensor([[1, 20, 30, 2]])
    torch.testing.assert_close(loaded(ids).start_logits, fresh.eval()(ids).start_logits)


# --- models with code of their own ----------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: Any) -> Path:
    cache = str(tmp_path / "code")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path, cache])
    folder = save(tiny_model("llama"), tmp_path / "own")
    (folder / "modeling_own.py").write_text(CODE)
    names = {"AutoConfig": "modeling_own.OwnConfig"}
    names["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    change_json(
        folder / "config.json", auto_map=names, model_type="own", architectures=["OwnForCausalLM"]
    )
    return folder


def test_code_of_its_own_runs_when_it_is_trusted_alone(own_code: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    with pytest.raises(ValueError, match=r"Python code of its own.*trust_remote_code=True") as e:
        load_model(own_code)
    assert "\n" not in str(e.value)
    assert not list(own_code.parent.rglob("ran"))
    model, tokenizer = load_model(own_code, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, tiny_model("llama")(ids).logits)


def test_the_command_line_asks_nothing(own_code: Path) -> None:
    command = [sys.executable, "-m", "captum_llm_ext", PROMPT, "--target", TARGET]
    command += ["--model", str(own_code)]
    done = subprocess.run(command, input="y\n", capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--trust-remote-code" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


def test_the_command_line_trusts(own_code: Path, capsys: Any) -> None:
    arguments = [PROMPT, "--target", TARGET, "--model", str(own_code), "--no-color"]
    assert cli.main([*arguments, "--trust-remote-code"]) == 0
    assert "golf" in capsys.readouterr().out
