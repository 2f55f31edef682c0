"""memkernels: fused kernels for neural external memory in PyTorch.

    import memkernels as mk
    read = mk.softmax_read(query, keys, values)

Operations are in :mod:`memkernels.ops`, modules in :mod:`memkernels.nn`, models in :mod:`memkernels.models`,
optimizers in :mod:`memkernels.optim`, a memory on disk in :mod:`memkernels.store`, memories for pretrained models in
:mod:`memkernels.integrations.transformers`, whose reads :func:`show` shows.
"""

from typing import TYPE_CHECKING

from . import _states, ops  # noqa: F401 (registers states that torch.load may make)
from .backends import use_backend
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [*ops.__all__, "show", "use_backend"]

_LAZY = ("models", "nn", "optim", "store", "testing")  # imported on first use, to keep the import of the ops fast

if TYPE_CHECKING:  # a type checker sees the modules, and not a __getattr__ that would excuse every name
    from . import models as models
    from . import nn as nn
    from . import optim as optim
    from . import store as store
    from . import testing as testing
    from ._show import show as show
else:

    def __getattr__(name: str):
        if name in _LAZY:
            import importlib

            return importlib.import_module(f"{__name__}.{name}")
        if name == "show":
            from ._show import show

            globals()[name] = show
            return show
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "show"})
