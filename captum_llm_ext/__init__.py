"""Captum's attribution of language models: right, fast, and over any set of layers.

Public names are imported when they are first used (PEP 562), so that the command line answers
``--help`` without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_llm_ext._version import __version__ as __version__

if TYPE_CHECKING:
    from captum.attr import (
        FeatureAblation,
        KernelShap,
        LayerConductance,
        LayerGradientShap,
        LayerGradientXActivation,
        LayerIntegratedGradients,
        Lime,
        ProductBaselines,
        RemoteLLMAttribution,
        ShapleyValues,
        ShapleyValueSampling,
    )

    from captum_llm_ext.attention.wrapper import LLMAttentionAttribution
    from captum_llm_ext.batches.reading import BatchRecord, read_batch
    from captum_llm_ext.batches.run import BatchReport, batch
    from captum_llm_ext.explaining import explain
    from captum_llm_ext.gradients.relevance import LayerRelevance
    from captum_llm_ext.gradients.saliency import LayerSaliency
    from captum_llm_ext.gradients.wrapper import LLMGradientAttribution
    from captum_llm_ext.inputs.chats import chat_input
    from captum_llm_ext.inputs.questions import qa_input
    from captum_llm_ext.inputs.segments import segment_input
    from captum_llm_ext.inputs.templates import TextTemplateInput
    from captum_llm_ext.inputs.tokens import TextTokenInput
    from captum_llm_ext.metrics.comparison import compare_methods
    from captum_llm_ext.metrics.judging import faithfulness
    from captum_llm_ext.model.layers import find_layers
    from captum_llm_ext.model.loading import load_demo_model, load_model
    from captum_llm_ext.perturbations.guided import GuidedAblation
    from captum_llm_ext.perturbations.surrogate import SparseSurrogate
    from captum_llm_ext.perturbations.two_stage import TwoStageAblation
    from captum_llm_ext.perturbations.wrapper import LLMAttribution
    from captum_llm_ext.results.aggregation import Aggregate, aggregate
    from captum_llm_ext.results.attention import LLMAttentionAttributionResult
    from captum_llm_ext.results.citations import cite
    from captum_llm_ext.results.comparing import Comparison, compare
    from captum_llm_ext.results.layered import LLMLayerAttributionResult
    from captum_llm_ext.results.provenance import Provenance
    from captum_llm_ext.results.single import LLMAttributionResult
    from captum_llm_ext.zooming import zoom

_MODULES = {
    "captum.attr": (
        "FeatureAblation",
        "KernelShap",
        "LayerConductance",
        "LayerGradientShap",
        "LayerGradientXActivation",
        "LayerIntegratedGradients",
        "Lime",
        "ProductBaselines",
        "RemoteLLMAttribution",
        "ShapleyValueSampling",
        "ShapleyValues",
    ),
    "captum_llm_ext.attention.wrapper": ("LLMAttentionAttribution",),
    "captum_llm_ext.batches.reading": ("BatchRecord", "read_batch"),
    "captum_llm_ext.batches.run": ("BatchReport", "batch"),
    "captum_llm_ext.explaining": ("explain",),
    "captum_llm_ext.gradients.relevance": ("LayerRelevance",),
    "captum_llm_ext.gradients.saliency": ("LayerSaliency",),
    "captum_llm_ext.gradients.wrapper": ("LLMGradientAttribution",),
    "captum_llm_ext.inputs.chats": ("chat_input",),
    "captum_llm_ext.inputs.questions": ("qa_input",),
    "captum_llm_ext.inputs.segments": ("segment_input",),
    "captum_llm_ext.inputs.templates": ("TextTemplateInput",),
    "captum_llm_ext.inputs.tokens": ("TextTokenInput",),
    "captum_llm_ext.metrics.comparison": ("compare_methods",),
    "captum_llm_ext.metrics.judging": ("faithfulness",),
    "captum_llm_ext.model.layers": ("find_layers",),
    "captum_llm_ext.model.loading": ("load_demo_model", "load_model"),
    "captum_llm_ext.perturbations.guided": ("GuidedAblation",),
    "captum_llm_ext.perturbations.surrogate": ("SparseSurrogate",),
    "captum_llm_ext.perturbations.two_stage": ("TwoStageAblation",),
    "captum_llm_ext.perturbations.wrapper": ("LLMAttribution",),
    "captum_llm_ext.results.aggregation": ("Aggregate", "aggregate"),
    "captum_llm_ext.results.citations": ("cite",),
    "captum_llm_ext.zooming": ("zoom",),
    "captum_llm_ext.results.attention": ("LLMAttentionAttributionResult",),
    "captum_llm_ext.results.comparing": ("Comparison", "compare"),
    "captum_llm_ext.results.layered": ("LLMLayerAttributionResult",),
    "captum_llm_ext.results.provenance": ("Provenance",),
    "captum_llm_ext.results.single": ("LLMAttributionResult",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Aggregate",
    "BatchRecord",
    "BatchReport",
    "Comparison",
    "FeatureAblation",
    "GuidedAblation",
    "KernelShap",
    "LLMAttentionAttribution",
    "LLMAttentionAttributionResult",
    "LLMAttribution",
    "LLMAttributionResult",
    "LLMGradientAttribution",
    "LLMLayerAttributionResult",
    "LayerConductance",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerRelevance",
    "LayerSaliency",
    "Lime",
    "ProductBaselines",
    "Provenance",
    "RemoteLLMAttribution",
    "ShapleyValueSampling",
    "ShapleyValues",
    "SparseSurrogate",
    "TextTemplateInput",
    "TextTokenInput",
    "TwoStageAblation",
    "aggregate",
    "batch",
    "chat_input",
    "cite",
    "compare",
    "compare_methods",
    "explain",
    "faithfulness",
    "find_layers",
    "load_demo_model",
    "load_model",
    "qa_input",
    "read_batch",
    "segment_input",
    "zoom",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
