"""A folder with a model, or its name on the hub: what it holds, and what loading it left out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

from captum_llm_ext.model.adapter import CAUSAL, QA, SEQ2SEQ, kind_of
from captum_llm_ext.model.layers import input_device
from captum_llm_ext.model.suitability import check_head
from captum_llm_ext.warning import warn

AUTO_CLASSES: dict[str, Any] = {
    CAUSAL: AutoModelForCausalLM,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
    QA: AutoModelForQuestionAnswering,
}
# The task types of PEFT adapters: those that are loaded, and the classes of the others.
ADAPTER_TASKS = {"CAUSAL_LM": CAUSAL, "SEQ_2_SEQ_LM": SEQ2SEQ, "QUESTION_ANS": QA}
ADAPTER_CLASSES = {
    "SEQ_CLS": "PeftModelForSequenceClassification",
    "TOKEN_CLS": "PeftModelForTokenClassification",
    "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model as it is stored.

    name: its folder, or its name on the hub; adapter: the ``adapter_config.json`` of PEFT, where
    it has one; trust_remote_code: whether Python files of the folder may run.
    """

    name: str
    adapter: Mapping[str, Any] | None = None
    trust_remote_code: bool = False

    @classmethod
    def at(cls, name: str, trust_remote_code: bool) -> Checkpoint:
        """What lies there.

        Raises:
            ImportError: an adapter without the package peft.
        """
        with loading_errors(name):
            path = find_adapter_config_file(name)
        if path is None:
            return cls(name, None, trust_remote_code)
        if importlib.util.find_spec("peft") is None:
            raise ImportError(f"{name!r} holds an adapter, which needs the package peft")
        adapter = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(name, adapter, trust_remote_code)

    @property
    def base(self) -> str:
        """Where the whole model lies: of an adapter alone, elsewhere."""
        if self.adapter is None or Path(self.name, "config.json").is_file():
            return self.name
        base = self.adapter.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"the adapter {self.name!r} does not say which model it belongs to")
        return str(base)

    def kind(self, task: str | None = None) -> str:
        """The kind of model: "causal", "seq2seq" or "qa"; `task` is what the caller expects.

        Raises:
            ValueError: it was trained for a task that is not served, or not for `task`.
        """
        trained = (self.adapter or {}).get("task_type")
        if trained in ADAPTER_CLASSES:
            check_head(ADAPTER_CLASSES[trained], f"{self.name!r} holds the adapter of a ")
        names = [] if trained in ADAPTER_TASKS else self._class_names()
        for name in names:
            check_head(name, f"{self.base!r} holds a ")
        found = ADAPTER_TASKS.get(str(trained)) or kind_of(self.config, names)
        if task in (None, found) or not (names or trained):
            return task or found
        # With another head than it was trained with, its scores would be random.
        what = names[0] if names else f"{trained} adapter"
        raise ValueError(
            f"{self.name!r} holds a {what}, whose task is {found!r}; got task={task!r}"
        )

    @cached_property
    def config(self) -> Any:
        with loading_errors(self.name):
            return AutoConfig.from_pretrained(self.base, trust_remote_code=self.trust_remote_code)

    def _class_names(self) -> list[str]:
        """The class that was saved; of code in the folder, the one that it names for loading."""
        if self.trust_remote_code:
            code = getattr(self.config, "auto_map", None) or {}
            named = [code[c.__name__] for c in AUTO_CLASSES.values() if c.__name__ in code]
            if named:
                return [str(named[0]).rpartition(".")[2]]
        return list(getattr(self.config, "architectures", None) or [])

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; an adapter without one has that of its model."""
        with loading_errors(self.name):
            alone = self.adapter is not None and not get_tokenizer_config(self.name)
            source = self.base if alone else self.name
            return AutoTokenizer.from_pretrained(source, trust_remote_code=self.trust_remote_code)

    def load(self, kind: str, **options: Any) -> PreTrainedModel:
        """The model, with its adapter.

        Raises:
            ValueError: weights are missing, or do not fit; it is an encoder that was saved as a
                decoder; or it is to be quantised and is so already.
        """
        if "quantization_config" in options and getattr(self.config, "quantization_config", None):
            raise ValueError(f"{self.base!r} is stored quantised: leave out quantization")
        if self.adapter is not None and self.base == self.name:
            with loading_errors(self.name):  # transformers reports on the adapter or on nothing
                return self._from_pretrained(kind, **options)
        with loading_errors(self.name):
            model, report = self._from_pretrained(
                kind, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        saved_with_adapter = (self.adapter or {}).get("modules_to_save") or []
        missing = [
            key
            for key in report["missing_keys"]
            if not set(key.split(".")).intersection(saved_with_adapter)
        ]
        _check_weights(self.base, model, missing, report["mismatched_keys"])
        _warn_of_blocks(self.base, model, report["unexpected_keys"])
        if kind == CAUSAL:
            _check_decoder(self.base, model)
        if self.adapter is not None:
            with loading_errors(self.name):
                loaded = model.load_adapter(self.name)
            _check_weights(self.name, model, getattr(loaded, "missing_keys", ()))
        return model

    def _from_pretrained(self, kind: str, **options: Any) -> Any:
        return AUTO_CLASSES[kind].from_pretrained(
            self.base, trust_remote_code=self.trust_remote_code, **options
        )


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Errors of loading become ValueErrors of one sentence that name the model."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name!r} needs Python code of its own, from its folder, to be loaded: read that "
                "code, and pass trust_remote_code=True (--trust-remote-code) to run it with all "
                "your rights, or load another model"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            "cannot load a causal language model, an encoder-decoder model or a question answering "
            f"model, and its tokenizer, from {name!r}: {reason} "
            "(give a folder written by save_pretrained, or a model name on the hub)"
        ) from error


def _check_weights(name: str, model: nn.Module, missing: Any, mismatched: Any = ()) -> None:
    """Refuse weights that transformers made up at random. Tied ones are not among them."""
    if missing:
        raise ValueError(
            f"{name!r} lacks weights of a {type(model).__name__} ({_some(missing)}), which would "
            "be random: expected a model that was saved with its head. If they are meant to be "
            "random, load it with transformers and pass the model"
        )
    if mismatched:
        raise ValueError(
            f"weights in {name!r} have other shapes than its config.json says "
            f"({_some(key for key, *_ in mismatched)}), and would be random: save the model anew"
        )


def _warn_of_blocks(name: str, model: nn.Module, unexpected: Any) -> None:
    """Warn of weights of whole blocks that the model has no place for."""
    lists = {n for n, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = [key for key in unexpected if any(key.startswith(f"{n}.") for n in lists)]
    left_out = {key for key in blocks if not _has_block_of(model, key)}
    if left_out:
        warn(
            f"{name!r} holds weights of blocks that its config.json leaves out, and so the model "
            f"runs without them ({_some(left_out)}): check the number of layers there",
        )


def _has_block_of(model: nn.Module, key: str) -> bool:
    """Whether the block that a weight belongs to is in the model."""
    parts = key.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    try:
        model.get_submodule(".".join(parts[: at + 1]))
    except AttributeError:
        return False
    return True


def _check_decoder(name: str, model: Any) -> None:
    """Refuse an encoder whose class could make it a decoder, by what it does."""
    config = model.config
    if getattr(config, "is_decoder", None) is not False and getattr(config, "causal", True):
        return
    # No special tokens, which these models may mask.
    ids = torch.tensor([[11, 12, 13], [11, 12, 14]], device=input_device(model))
    with torch.no_grad():
        first, second = model.eval()(ids).logits[:, :2]
    if not torch.allclose(first, second, atol=1e-5):
        raise ValueError(
            f"{name!r} holds a {type(model).__name__} that is an encoder (its config.json does not "
            "say is_decoder): a later token changes earlier scores, so it predicts no next token; "
            "expected a causal or an encoder-decoder language model"
        )


def _some(keys: Any) -> str:
    """The first few names."""
    names = sorted(keys)
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
