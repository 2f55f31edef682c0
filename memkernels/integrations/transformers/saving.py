"""Memories on disk: safetensors for the parameters, JSON for the rest, and a fingerprint of the model beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .memory import Memory
from .place import Place, differs, fingerprint

if TYPE_CHECKING:
    from .attachment import Attachment

FORMAT = 1


def save(model: nn.Module, memories: Sequence[Memory], folder: str | os.PathLike[str]) -> None:
    """Write them; see :meth:`Attachment.save`."""
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for number, memory in enumerate(memories):
        tensors.update({f"{number}.{k}": v.detach().cpu().contiguous() for k, v in memory.state_dict().items()})
        part = path / str(number)
        part.mkdir(exist_ok=True)
        memory.save_parts(part)
        if not any(part.iterdir()):
            part.rmdir()
    described = [{"kind": type(memory).__name__, "options": memory.options} for memory in memories]
    record = {"format": FORMAT, "base": fingerprint(model), "memories": described}
    text = json.dumps(record, indent=1)  # before anything is replaced: an option that is no JSON is refused here
    _replace(path / "memory.safetensors", lambda to: save_file({k: v.clone() for k, v in tensors.items()}, to))
    _replace(path / "memory.json", lambda to: to.write_text(text))


def _replace(path: Path, write: Any) -> None:
    """Write beside ``path``, then take its place: a reader finds the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(model: Any, folder: str | os.PathLike[str]) -> Attachment:
    """Attach the memories that :meth:`Attachment.save` wrote.

    Args:
        model: that beside which they were trained; it may be loaded in another float dtype.
        folder: what was given to ``save``.

    Returns:
        The :class:`Attachment`, equal to the one that was saved.

    Raises:
        FileNotFoundError: there is no memory in ``folder``. ValueError: it was written beside another model, by a newer
            memkernels, or holds a kind of memory that is not imported. What :func:`attach` raises.
    """
    from safetensors.torch import load_file

    from .attachment import attach

    path = Path(folder)
    if not (path / "memory.json").exists():
        raise FileNotFoundError(f"load: folder must hold memory.json, got {str(path)!r}")
    record = json.loads((path / "memory.json").read_text())
    if record["format"] > FORMAT:
        raise ValueError(
            f"load: folder must be of format {FORMAT} at most, got {record['format']} of a newer memkernels"
        )
    place = Place.of(model)
    if (why := differs(record["base"], place.model)) is not None:
        raise ValueError(f"load: model must be {why}")
    memories = []
    for described in record["memories"]:
        kind = Memory.kinds.get(described["kind"])
        if kind is None:
            raise ValueError(f"load: the kind of each memory must be imported, got {described['kind']}")
        memories.append(kind(**described["options"]))
    tensors = load_file(path / "memory.safetensors")
    for number, memory in enumerate(memories):
        memory.build_once(place)
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.partition(".")[0] == str(number)}
        _take(memory, own)
        if (path / str(number)).is_dir():
            memory.load_parts(path / str(number))
    return attach(model, *memories)


def _take(memory: Memory, tensors: dict[str, torch.Tensor]) -> None:
    """Load them, each parameter in the dtype in which it was saved."""
    for name, parameter in memory.named_parameters():
        if name in tensors and tensors[name].dtype != parameter.dtype:
            parameter.data = parameter.data.to(tensors[name].dtype)
    memory.load_state_dict(tensors)
