"""The version, which packaging and provenance read without importing anything else."""

__version__ = "0.1.0"
