"""Is an attribution faithful? Remove what it calls important, and see whether the score falls."""

from captum_llm_ext.metrics.comparison import REMOVED_BY, MethodComparison, compare_methods
from captum_llm_ext.metrics.curves import RemovalCurves
from captum_llm_ext.metrics.judging import Faithfulness, faithfulness

__all__ = [
    "REMOVED_BY",
    "Faithfulness",
    "MethodComparison",
    "RemovalCurves",
    "compare_methods",
    "faithfulness",
]
