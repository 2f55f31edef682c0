"""Modules over the operations. Memory state is explicit: it comes in as an argument and goes out as a result."""

from .additive_attention import AdditiveAttention
from .external_memory import ExternalMemory, MemoryState
from .memory_cell import MemoryCell
from .multi_hop_read import MultiHopRead
from .neural_cache import CacheState, NeuralCache
from .ngram_memory import NgramHistory, NgramMemory
from .replacement import SlotUse, fade, least_recently_used, least_used, replace_slots
from .retrieval_mixture import RetrievalMixture
from .streaming_memory import StreamingMemory
from .token_map import TokenMap

__all__ = [
    "AdditiveAttention",
    "CacheState",
    "ExternalMemory",
    "MemoryCell",
    "MemoryState",
    "MultiHopRead",
    "NeuralCache",
    "NgramHistory",
    "NgramMemory",
    "RetrievalMixture",
    "SlotUse",
    "StreamingMemory",
    "TokenMap",
    "fade",
    "least_recently_used",
    "least_used",
    "replace_slots",
]
