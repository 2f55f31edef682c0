"""Modules over the operations. Memory state is explicit: it comes in as an argument and goes out as a result."""

from .external_memory import ExternalMemory, MemoryState
from .multi_hop_read import MultiHopRead
from .replacement import SlotUse, fade, least_recently_used, least_used, replace_slots
from .retrieval_mixture import RetrievalMixture

__all__ = [
    "ExternalMemory",
    "MemoryState",
    "MultiHopRead",
    "RetrievalMixture",
    "SlotUse",
    "fade",
    "least_recently_used",
    "least_used",
    "replace_slots",
]
