"""Torch models, and nothing else: layers, hooks, caches, memory, quantised layers, loading."""
