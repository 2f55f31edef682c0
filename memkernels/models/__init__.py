"""Models built on the modules and operations."""

from .memory_rnn import MemoryRNN, RNNState
from .memory_transformer import MemoryTransformerLM
from .similarity_lm import SimilarityLM

__all__ = ["MemoryRNN", "MemoryTransformerLM", "RNNState", "SimilarityLM"]
