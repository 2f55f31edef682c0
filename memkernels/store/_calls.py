"""How a method of a store is called: one at a time, on the latest commit, as one commit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from ._copies import KINDS
from ._engine import Engine, TornPage
from ._errors import StoreError

S = TypeVar("S", bound=Any)
P = ParamSpec("P")
R = TypeVar("R")
READ_AGAIN = 3  # times that a reader looks at the table again where a page is not what it says


def exact(engine: Engine) -> contextlib.AbstractContextManager:
    """No autocast: scores in 16 bits are too coarse to merge by. Searches take a query of any float dtype under it."""
    on = [kind for kind in KINDS if torch.is_autocast_enabled(kind)]
    engine.autocast = bool(on)
    if not on:
        return contextlib.nullcontext()
    off = contextlib.ExitStack()
    for kind in on:
        off.enter_context(torch.autocast(kind, enabled=False))
    return off


def reading(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A call that reads: sees what others committed, and reads again where a page changed under it."""

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **options: P.kwargs) -> R:
        engine = self._engine
        with engine.lock, exact(engine):
            self._ready(method.__name__)
            engine.refresh()
            for _ in range(READ_AGAIN):
                try:
                    return method(self, *args, **options)
                except TornPage as torn:
                    engine.refresh(force=True)
                    if int(engine.tables[torn.column][torn.page]["extent"]) == torn.extent:
                        raise
            return method(self, *args, **options)

    return call


def writing(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A call that writes: one commit, or a part of the open transaction."""

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **options: P.kwargs) -> R:
        with self._engine.lock:
            self._ready(method.__name__, write=True)
            if self._engine.staged is not None:
                try:
                    return method(self, *args, **options)
                except StoreError:
                    self._engine.doomed = True  # a part of the call may be done: the transaction cannot be whole
                    raise
            with self.transaction():
                return method(self, *args, **options)

    return call
