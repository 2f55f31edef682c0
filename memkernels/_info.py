"""What this installation is and can do: the facts behind ``python -m memkernels info``."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from . import __version__, _native, backends
from .registration import OPS

# Features without which an instruction set of the cpu backend cannot run.
_NEEDS = {
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
}
_NEEDS["avx512bf16"] = (*_NEEDS["avx512"], "avx512_bf16")


def collect() -> dict[str, Any]:
    """Everything ``info`` prints, as plain data."""
    return {
        "memkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "devices": _devices(),
        "requested_backend": backends.requested(),
        "backends": _backends(),
        "ops": _matrix(),
    }


def gaps(info: dict[str, Any]) -> list[str]:
    """Every reason in the op x backend matrix, once; one for a backend that is missing altogether."""
    missing = {name: row["missing"] for name, row in info["backends"].items() if row["missing"]}
    whole = [f"every op: backend {name!r} is not available: {why}" for name, why in missing.items()]
    rows = (by for row in info["ops"].values() for name, by in row.items() if name not in missing)
    return [*whole, *dict.fromkeys(why for by in rows for why in by.values() if why)]


def _processor() -> dict[str, Any]:
    threads = {"threads": torch.get_num_threads()}
    if why := _native.missing():
        unknown = f"unknown, as the cpu backend would tell: {why}"
        return {"name": platform.processor() or platform.machine(), **threads, "why_no_details": unknown}
    facts = _native.processor()
    sets = [name for name in _native.ISAS if set(_NEEDS[name]) <= set(facts["features"])]
    return {**facts, **threads, "instruction_sets": sets}


def _devices() -> list[str]:
    return ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]


def _backends() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {
        "reference": {"devices": ["any device"], "missing": None, "detail": "plain PyTorch"}
    }
    for backend in backends.BACKENDS:
        why = backend.missing()
        rows[backend.name] = {"devices": list(backend.devices), "missing": why, "detail": ""}
        if backend.name == "cpu" and why is None:
            rows["cpu"]["detail"] = _instruction_set()
    return rows


def _instruction_set() -> str:
    try:
        used = torch.ops.memkernels_cpu.isa()
    except RuntimeError as error:  # MEMKERNELS_CPU_ISA names a set that this processor or library lacks
        return str(error).splitlines()[0]
    forced = os.environ.get("MEMKERNELS_CPU_ISA")
    return f"instruction set {used}" + (" (forced by MEMKERNELS_CPU_ISA)" if forced else "")


def _matrix() -> dict[str, dict[str, dict[str, str | None]]]:
    """op -> backend -> direction -> None, or the sentence that says why not."""
    matrix: dict[str, dict[str, dict[str, str | None]]] = {}
    for op in OPS.values():
        matrix[op.name] = {"reference": dict.fromkeys(op.directions)}
        for backend in backends.BACKENDS:
            device = backend.devices[0]
            matrix[op.name][backend.name] = {d: backend.gap(op.name, device, direction=d) for d in op.directions}
        if op.inplace:
            matrix[f"{op.name}_"] = {
                "reference": {"forward": None},
                **{b.name: {"forward": b.gap(f"{op.name}_", b.devices[0])} for b in backends.BACKENDS},
            }
    return matrix


def render(info: dict[str, Any]) -> str:
    """The facts as text for a terminal."""
    cpu = info["processor"]
    lines = [
        f"memkernels {info['memkernels']}",
        "",
        *_pairs(
            ("torch", info["torch"]),
            ("Python", f"{info['python']} on {info['platform']}"),
            ("processor", cpu["name"] + (f", {cpu['cores']} cores" if "cores" in cpu else "")),
            ("threads", f"{cpu['threads']} (torch.set_num_threads)"),
            ("caches", _caches(cpu.get("caches", {})) or cpu.get("why_no_details", "unknown")),
            ("instruction sets", ", ".join(cpu.get("instruction_sets", [])) or "unknown"),
            ("devices", ", ".join(info["devices"])),
            ("backend", f"{info['requested_backend']} (use_backend, MEMKERNELS_BACKEND)"),
        ),
        "",
        "Backends",
    ]
    for name, row in info["backends"].items():
        state = f"not available: {row['missing']}" if row["missing"] else f"on {' and '.join(row['devices'])}"
        lines.append(f"  {name:<12}{state}" + (f": {row['detail']}" if row["detail"] else ""))
    lines += ["", "Operations", *_table(info), ""]
    why = gaps(info)
    lines += ["Gaps", *(f"  {w}" for w in why)] if why else ["No gaps."]
    return "\n".join(lines)


def _pairs(*pairs: tuple[str, str]) -> list[str]:
    width = max(len(name) for name, _ in pairs) + 2
    return [f"  {name:<{width}}{value}" for name, value in pairs]


def _caches(caches: dict[str, int]) -> str:
    names = (("l1d", "L1 data per core"), ("l2", "L2 per core"), ("l3", "L3"))
    return ", ".join(f"{_bytes(caches[key])} {name}" for key, name in names if caches.get(key))


def _bytes(n: int) -> str:
    return f"{n / 2**20:g} MiB" if n >= 2**20 else f"{n / 2**10:g} KiB"


def _table(info: dict[str, Any]) -> list[str]:
    names = list(info["backends"])
    width = max(len(op) for op in info["ops"]) + 4
    cell = max(len("backward"), *(len(n) for n in names)) + 2
    span = cell * len(backends.DIRECTIONS)
    lines = ["  " + " " * width + "".join(f"{name:<{span}}" for name in names).rstrip()]
    lines.append("  " + " " * width + "".join(f"{d:<{cell}}" for _ in names for d in backends.DIRECTIONS).rstrip())
    for op, row in info["ops"].items():
        cells = (row[name].get(d, "") for name in names for d in backends.DIRECTIONS)
        marks = ("yes" if why is None else ("no" if why else "") for why in cells)
        lines.append("  " + f"{op:<{width}}" + "".join(f"{mark:<{cell}}" for mark in marks).rstrip())
    return lines
