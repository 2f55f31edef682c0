"""A memory larger than RAM: slots on disk, durable, shared between processes, read by the library's operations.

store = MemoryStore.create("facts", key_dim=64, value_dim=64)
slots = store.append(keys, values)
read = store.topk_read(query, k=32)

and the rows of a lookup memory by number, in RAM, on disk or on a device: RowTable.
"""

from ._bounded import BoundedStore
from ._errors import StoreBusy, StoreDamaged, StoreError, StoreFormat, StoreFull
from ._store import MemoryStore
from ._table import RowTable
from ._verify import Fault

__all__ = [
    "BoundedStore",
    "Fault",
    "MemoryStore",
    "RowTable",
    "StoreBusy",
    "StoreDamaged",
    "StoreError",
    "StoreFormat",
    "StoreFull",
]
