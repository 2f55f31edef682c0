"""Plain PyTorch: for every op the forms that an author writes who knows PyTorch well, and which of them fit a call.

A form takes the tensors and options of the op by name and returns its main result, or all of them, main one first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..row import Row
from . import outputs, reads, writes
from .form import Form

FORMS: dict[str, tuple[Form, ...]] = {**reads.FORMS, **writes.FORMS, **outputs.FORMS}


def peers_of(row: Row, arguments: Mapping[str, Any], compiled: bool) -> dict[str, Callable[..., Any]]:
    """Name -> function, of the forms that fit a call; ``compiled``: and torch.compile of the first of them."""
    forms = [form for form in FORMS[row.op] if form.in_place == row.in_place and form.fits(**arguments)]
    found = {form.name: form.function for form in forms}
    if compiled and found:
        torch.compiler.reset()  # otherwise shapes of earlier cases count against the limit of recompilations
        found["torch.compile"] = torch.compile(forms[0].function, dynamic=False)
    return found
