"""What goes wrong with a store, by what can be done about it."""

from __future__ import annotations


class StoreError(RuntimeError):
    """A store cannot do what was asked; the sentence says why and what helps. The base of the kinds below."""


class StoreBusy(StoreError):
    """Another process, or another object of this one, has the store open for writing; or too many tickets of a table
    are outstanding."""


class StoreDamaged(StoreError):
    """Bytes on disk are not those that were written; names the file and the page or row."""


class StoreFull(StoreError):
    """The disk has no room. The store is as it was before the call, and usable when there is room again."""


class StoreFormat(StoreError):
    """The store was written by a newer memkernels, or lies where none can be kept."""
