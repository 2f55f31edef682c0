"""memkernels: fused kernels for neural external memory in PyTorch.

    import memkernels as mk
    read = mk.softmax_read(query, keys, values)

Operations are in :mod:`memkernels.ops`, modules in :mod:`memkernels.nn`, models in :mod:`memkernels.models`.
"""

from . import _states, ops  # noqa: F401 (registers states that torch.load may make)
from .backends import use_backend
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [*ops.__all__, "use_backend"]


def __getattr__(name: str):
    if name in ("nn", "models", "testing"):  # imported on first use, to keep the import of the ops fast
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
