"""Captum's attribution of language models: right, fast, and over any set of layers."""

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
from captum_llm_ext.batches import BatchReport, batch
from captum_llm_ext.explaining import explain
from captum_llm_ext.gradients.methods import LayerSaliency
from captum_llm_ext.gradients.wrapper import LLMGradientAttribution
from captum_llm_ext.inputs import (
    TextTemplateInput,
    TextTokenInput,
    chat_input,
    qa_input,
    segment_input,
)
from captum_llm_ext.metrics import compare_methods, faithfulness
from captum_llm_ext.model.layers import find_layers
from captum_llm_ext.model.loading import load_demo_model, load_model
from captum_llm_ext.perturbations.two_stage import TwoStageAblation
from captum_llm_ext.perturbations.wrapper import LLMAttribution
from captum_llm_ext.results import (
    LLMAttentionAttributionResult,
    LLMAttributionResult,
    LLMLayerAttributionResult,
)

__version__ = "0.1.0"

__all__ = [
    "BatchReport",
    "FeatureAblation",
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
    "LayerSaliency",
    "Lime",
    "ProductBaselines",
    "RemoteLLMAttribution",
    "ShapleyValueSampling",
    "ShapleyValues",
    "TextTemplateInput",
    "TextTokenInput",
    "TwoStageAblation",
    "batch",
    "chat_input",
    "compare_methods",
    "explain",
    "faithfulness",
    "find_layers",
    "load_demo_model",
    "load_model",
    "qa_input",
    "segment_input",
]
