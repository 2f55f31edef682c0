"""Result rows: what every row carries, files of them, and the comparison of two runs by ratio to a peer."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

import memkernels as mk
from memkernels import _native

from .case import Case, Goal
from .ceilings import Ceilings

DIRECTORY = Path(__file__).parent / "results"

# A ratio to a peer that falls below this share of the one before is a regression. Medians of two variants of one run
# move by up to a fifth on a machine that others use too.
GUARD = 0.7

ENVIRONMENT = ("device", "processor", "threads", "isa", "python", "torch", "memkernels", "commit", "date")
FIELDS = (
    *("op", "case", "direction", "dtype", "sizes", "unit", "backend", "median", "low", "high", "samples"),
    *("error", "tolerance", "why", "peers", "best_peer", "ratio", "flops", "bytes", "peak", "bandwidth"),
    *("peak_share", "bandwidth_share", "goals", "reached", "timed", "host", *ENVIRONMENT),
)


def environment(device: str, threads: int) -> dict:
    """Where and with what a run was made; part of every row."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "processor": _native.host().processor(),
        "threads": threads,
        "isa": torch.ops.memkernels_cpu.isa() if device == "cpu" and _native.missing() is None else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "memkernels": mk.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The checked-out commit, with a plus where tracked files differ from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=DIRECTORY.parent, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def complete(row: dict, case: Case, ceilings: Ceilings, where: dict) -> dict:
    """Add what follows from the measurements: the ratio to the best peer, shares of the ceilings, goals reached."""
    row = {**row, **where}
    own = None if row["median"] is None else max(row["median"], 1e-12)
    timed = own is not None and row["unit"] == "s"
    medians = {name: p["median"] for name, p in row["peers"].items() if p["median"] is not None}
    row["best_peer"] = best = min(medians, key=medians.get, default=None) if own is not None else None
    row["ratio"] = medians[best] / own if best is not None else None
    row["peak"], row["bandwidth"] = ceilings.peaks.get(case.dtype), ceilings.bandwidth
    row["peak_share"] = row["flops"] / own / row["peak"] if timed and row["peak"] else None
    row["bandwidth_share"] = row["bytes"] / own / row["bandwidth"] if timed else None
    # Goals are stated for the full sizes.
    full = row["sizes"] == dict(case.sizes)
    row["goals"] = [
        _judged(goal, row, medians, full and (ceilings.fast_bfloat16 or not goal.fast_bfloat16)) for goal in case.goals
    ]
    row["reached"] = _all_reached(row)
    return row


def _judged(goal: Goal, row: dict, medians: Mapping[str, float], judge: bool) -> dict:
    """A goal, the value reached, whether that is enough (None: not judged), and why not all of its peers count."""
    value = _reached_value(goal, row, medians)
    absent = [name for name in goal.peers if name not in medians] if row["median"] is not None else []
    good = value is not None and (value <= goal.value if goal.kind == "memory" else value >= goal.value)
    why = f"without {', '.join(absent)}" if absent else ""
    if absent and value is None:
        why = "not judged, no peer ran: " + ", ".join(_absence(name, row["peers"]) for name in absent)
        judge = False
    return {"goal": goal.text(), "value": value, "reached": good if judge else None, "why": why}


def _absence(name: str, peers: Mapping[str, dict]) -> str:
    why = peers[name]["why"] if name in peers else ""
    return f"{name} ({why})" if why else name


def _all_reached(row: dict) -> bool | None:
    reached = [goal["reached"] for goal in row["goals"]]
    return False if False in reached else (None if None in reached or not reached else True)


def best_of_ours(rows: Iterable[dict]) -> list[dict]:
    """Complete rows, their goals judged on the fastest backend of a case alone; the others say which that is."""
    rows, fastest = list(rows), {}
    for row in rows:
        other = fastest.setdefault(_work(row), row)
        if row["median"] is not None and (other["median"] is None or row["median"] < other["median"]):
            fastest[_work(row)] = row
    judged = []
    for row in rows:
        best = fastest[_work(row)]
        if row is not best:
            why = f"judged on {best['backend']}"
            row = {**row, "goals": [{**goal, "reached": None, "why": why} for goal in row["goals"]], "reached": None}
        judged.append(row)
    return judged


def _reached_value(goal: Goal, row: dict, medians: dict[str, float]) -> float | None:
    if row["median"] is None:
        return None
    if goal.kind == "peak":
        return row["peak_share"]
    if goal.kind in ("bandwidth", "copy"):
        return row["bandwidth_share"]
    if goal.kind == "memory":
        return row["median"] / (row["sizes"]["T"] * row["sizes"]["N"] * getattr(torch, row["dtype"]).itemsize)
    named = [medians[name] for name in goal.peers if name in medians]
    return min(named) / max(row["median"], 1e-12) if named else None


def _work(row: dict) -> tuple:
    """Rows of one file with the same work differ in the backend that did it."""
    return row["op"], row["case"], row["direction"], row["dtype"], tuple(sorted(row["sizes"].items()))


def key(row: dict) -> tuple:
    """Rows of two files with the same key measured the same work on the same kind of machine."""
    return (*_work(row), row["backend"], row["device"], row["processor"], row["threads"], row["isa"])


def compare(rows: Iterable[dict], before: Iterable[dict]) -> list[tuple[dict, float, float]]:
    """(row, ratio before, ratio now) for each row that both have, each against the peer that was best before."""
    known = {key(row): row for row in before}
    found = []
    for row in rows:
        old = known.get(key(row))
        if old is None or old["ratio"] is None or row["median"] is None:
            continue
        peer = row["peers"].get(old["best_peer"], {}).get("median")
        if peer is not None:
            found.append((row, old["ratio"], peer / max(row["median"], 1e-12)))
    return found


def save(rows: Sequence[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": list(rows)}, indent=1) + "\n")


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def committed() -> list[dict]:
    """The rows of the result files of cases, older before newer."""
    other = ("ladder", "store-", "lookup-", "ngram_memory", "crash", "everyday-")
    files = [load(path) for path in DIRECTORY.glob("*.json") if not path.name.startswith(other)]
    return sorted((row for rows in files for row in rows), key=lambda row: row["date"])


def default_path(where: dict, quick: bool) -> Path:
    """One file per machine, thread count and instruction set; the version history keeps the older ones."""
    words = [where["device"], where["processor"] if where["device"] == "cpu" else "", where["isa"]]
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(filter(None, words)).lower().replace("(r)", "")).strip("-")
    return DIRECTORY / f"{slug}-{where['threads']}t{'-quick' if quick else ''}.json"
