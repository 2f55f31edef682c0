"""Modules over the operations. Memory state is explicit: it comes in as an argument and goes out as a result."""

from .external_memory import ExternalMemory, MemoryState

__all__ = ["ExternalMemory", "MemoryState"]
