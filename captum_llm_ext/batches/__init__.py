"""Many prompts: a file of requests in, a file of results out, resumed where it was stopped."""

from captum_llm_ext.batches.run import BatchReport, batch

__all__ = ["BatchReport", "batch"]
