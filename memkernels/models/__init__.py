"""Models built on the modules and operations."""

from .memory_transformer import MemoryTransformerLM

__all__ = ["MemoryTransformerLM"]
