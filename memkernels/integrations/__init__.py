"""Memories for models of other libraries. Each integration imports its library itself, when it is imported."""
