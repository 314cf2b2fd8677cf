"""The private names of Captum and transformers that this package uses; no other file imports them.

`tests/test_compat.py` names the one that a new version of either library has moved.
"""

from __future__ import annotations

from typing import Any

from captum._utils.common import (
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
    _format_feature_mask,
    _run_forward,
)
from captum._utils.gradient import compute_layer_gradients_and_eval
from captum.attr._core.lime import default_perturb_func
from captum.attr._core.llm_attr import (
    DEFAULT_GEN_ARGS,
    BaseLLMAttribution,
    _convert_ids_to_pretty_tokens,
)
from captum.attr._core.llm_attr import (
    LLMAttribution as CaptumLLMAttribution,
)
from captum.attr._core.llm_attr import (
    LLMGradientAttribution as CaptumLLMGradientAttribution,
)
from captum.attr._utils.approximation_methods import (
    SUPPORTED_METHODS as FIXED_RULES,
)
from captum.attr._utils.approximation_methods import (
    approximation_parameters,
)
from captum.attr._utils.attribution import (
    Attribution,
    GradientAttribution,
    LayerAttribution,
    PerturbationAttribution,
)
from captum.attr._utils.common import _format_input_baseline
from captum.attr._utils.interpretable_input import (
    ImageMaskInput,
    InterpretableInput,
)
from captum.attr._utils.interpretable_input import (
    TextTemplateInput as CaptumTextTemplateInput,
)
from captum.attr._utils.interpretable_input import (
    TextTokenInput as CaptumTextTokenInput,
)
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

# Name of an attention implementation → its kernel, for every model that has no kernel of its own.
ATTENTION_KERNELS: dict[str, Any] = AttentionInterface._global_mapping

__all__ = [
    "ATTENTION_KERNELS",
    "DEFAULT_GEN_ARGS",
    "FIXED_RULES",
    "Attribution",
    "BaseLLMAttribution",
    "Cache",
    "CaptumLLMAttribution",
    "CaptumLLMGradientAttribution",
    "CaptumTextTemplateInput",
    "CaptumTextTokenInput",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GradientAttribution",
    "ImageMaskInput",
    "InterpretableInput",
    "LayerAttribution",
    "PerturbationAttribution",
    "_convert_ids_to_pretty_tokens",
    "_expand_additional_forward_args",
    "_expand_target",
    "_format_additional_forward_args",
    "_format_feature_mask",
    "_format_input_baseline",
    "_run_forward",
    "approximation_parameters",
    "compute_layer_gradients_and_eval",
    "default_perturb_func",
]
