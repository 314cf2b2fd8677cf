"""`recorded`: the one place where results learn where they come from."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from captum_llm_ext._version import __version__
from captum_llm_ext.compat import CaptumTextTemplateInput, InterpretableInput
from captum_llm_ext.model.compiled import original
from captum_llm_ext.model.layers import named_layers
from captum_llm_ext.model.quantized import quantization_of
from captum_llm_ext.registry import METHODS, WITHOUT_EFFECT, load
from captum_llm_ext.results.provenance import Provenance

_TOLD_ELSEWHERE = ("inp", "target", "baselines", "_inspect_forward")

Attribute = TypeVar("Attribute", bound=Callable[..., Any])


def recorded(attribute: Attribute) -> Attribute:
    """Give the result of a wrapper's `attribute` its provenance.

    The wrapper itself puts the target's ids and its evaluations there, and has `record_settings`:
    what it and its method were made with.
    """
    signature = inspect.signature(attribute)

    @wraps(attribute)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = attribute(self, *args, **kwargs)
        seconds = time.perf_counter() - started
        arguments = signature.bind(self, *args, **kwargs).arguments
        result.provenance = _provenance(self, signature, arguments, result, seconds)
        return result

    return cast(Attribute, call)


def _provenance(
    wrapper: Any,
    signature: inspect.Signature,
    arguments: Mapping[str, Any],
    result: Any,
    seconds: float,
) -> Provenance:
    name, model = method_name(wrapper), wrapper.model
    row = METHODS.get(name)
    options = {**wrapper.record_settings(), **_chosen(signature, arguments)}
    renamed = {} if row is None else {new: old for old, new in row.renamed.items()}
    takes_baselines = row is None or row.takes_baselines
    inner = original(model)
    known: Provenance = result.provenance or Provenance()
    return replace(
        known,
        method=name,
        options={renamed.get(key, key): as_json(value, model) for key, value in options.items()},
        baseline=_baseline(result.inp, arguments, model) if takes_baselines else None,
        score=getattr(wrapper, "attr_target", None),
        model=_source(getattr(getattr(inner, "config", None), "_name_or_path", None)),
        model_class=type(inner).__name__,
        dtype=_dtype(inner),
        quantization=_quantization(inner),
        tokenizer=_source(getattr(wrapper.tokenizer, "name_or_path", None))
        or type(wrapper.tokenizer).__name__,
        versions=versions(),
        evaluations=result.n_evaluations or known.evaluations,
        seconds=seconds,
    )


def settings_of(attr_method: Any) -> dict[str, Any]:
    """What a method was made with: the settings of its row of the registry, but None."""
    rows = [row for row in METHODS.values() if row.settings and _made_by(row) is type(attr_method)]
    names = rows[0].settings if rows else ()
    settings = {name: getattr(attr_method, name, None) for name in names}
    return {name: value for name, value in settings.items() if value is not None}


def method_name(wrapper: Any) -> str:
    """The name that `explain` has for a wrapper's method, or the name of its class."""
    made = getattr(wrapper, "attr_method", wrapper)
    fitting = [
        (len(row.fixed), name)
        for name, row in METHODS.items()
        if load(row.wrapped_by.path) is type(wrapper)
        and _made_by(row) is type(made)
        and all(getattr(wrapper, key, None) == value for key, value in row.fixed.items())
    ]
    return max(fitting)[1] if fitting else type(made).__name__


def _made_by(row: Any) -> Any:
    return load(row.driver).drives if row.driver else load(row.path)


def _chosen(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not the default, with those of the method."""
    chosen: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        if name not in arguments or name in (*_TOLD_ELSEWHERE, *WITHOUT_EFFECT):
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            chosen |= arguments[name]
        elif arguments[name] is not parameter.default:
            chosen[name] = arguments[name]
    return {name: value for name, value in chosen.items() if value is not None}


def _baseline(inp: Any, arguments: Mapping[str, Any], model: nn.Module) -> Any:
    """What stood for absent features: of the call, or of the input that was attributed."""
    named, of_input = arguments.get("baselines"), getattr(inp, "named_baseline", None)
    of_input = getattr(inp, "baselines", None) if of_input is None else of_input
    if isinstance(inp, CaptumTextTemplateInput) and named is not None:
        return as_json({"values": of_input, "neutral": named}, model)
    return as_json(of_input if named is None else named, model)


def _source(name: Any) -> str | None:
    """The name of a model, or of the folder that it lies in."""
    text = str(name or "")
    return (Path(text).name if Path(text).is_dir() else text) or None


def _dtype(model: nn.Module) -> str | None:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = getattr(model, "dtype", None) or next(dtypes, None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _quantization(model: nn.Module) -> str | None:
    layers = quantization_of(model).layers
    if not layers:
        return None
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = config if isinstance(config, Mapping) else vars(config) if config else {}
    kind = next(type(module).__name__ for module in layers.values())
    if kind == "Linear4bit":
        return str(settings.get("bnb_4bit_quant_type", kind))
    return "int8" if kind == "Linear8bitLt" else str(settings.get("quant_method", kind))


@cache
def versions() -> dict[str, str]:
    """Package → version."""
    others = {name: version(name) for name in ("captum", "torch", "transformers")}
    return {"captum_llm_ext": __version__, **others}


def as_json(value: Any, model: nn.Module) -> Any:
    """A value as JSON can write it: a module as its name, a tensor as a digest."""
    if isinstance(value, nn.Module):
        return next((name for name, part in named_layers(model) if part is value), repr(value))
    if isinstance(value, Tensor):
        return {"tensor": digest([repr(value.detach().cpu().tolist())])}
    if isinstance(value, Mapping):
        return {str(key): as_json(item, model) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, model) for item in value]
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, InterpretableInput):
        return type(value).__name__
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, str | int | float | None) else repr(value)


def digest(parts: Iterable[str | bytes]) -> str:
    """Sixteen hexadecimal digits that tell the parts from other ones."""
    hashed = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        hashed.update(len(content).to_bytes(8, "big") + content)
    return hashed.hexdigest()[:16]
