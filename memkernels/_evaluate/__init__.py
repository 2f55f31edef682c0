"""``python -m memkernels evaluate``: a memory beside a real language model, in numbers."""
