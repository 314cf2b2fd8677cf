"""What attribution returns: Captum's result, with deltas, layers, readable plots and tables."""

from __future__ import annotations

from captum_llm_ext.results.attention import LLMAttentionAttributionResult
from captum_llm_ext.results.layered import LLMLayerAttributionResult
from captum_llm_ext.results.single import LLMAttributionResult

__all__ = ["LLMAttentionAttributionResult", "LLMAttributionResult", "LLMLayerAttributionResult"]
