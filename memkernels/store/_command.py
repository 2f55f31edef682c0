"""Command line: ``python -m memkernels store info | verify | compact | export PATH``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import _crc, _index
from ._columns import dtype_name
from ._errors import StoreError
from ._store import MemoryStore


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m memkernels store", description="Look after a MemoryStore.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="sizes, dtypes, generation, snapshots and index")
    info.add_argument("--json", action="store_true", help="print the same as JSON")
    verify = commands.add_parser(
        "verify", help="read everything and compare it with its checksums; status 1 on a fault"
    )
    compact = commands.add_parser("compact", help="give back the space and the numbers of deleted slots")
    export = commands.add_parser("export", help="write the live slots to a file of the safetensors format")
    for command in (info, verify, compact, export):
        command.add_argument("path", help="the directory of the store")
    export.add_argument("file", nargs="?", help="where to (default: PATH.safetensors)")
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(list(argv))
    try:
        with MemoryStore.open(options.path, mode="w" if options.command == "compact" else "r") as store:
            return {"info": _info, "verify": _verify, "compact": _compact, "export": _export}[options.command](
                store, options
            )
    except (StoreError, OSError) as error:
        print(f"python -m memkernels store {options.command}: {error}", file=sys.stderr)
        return 1


def describe(store: MemoryStore) -> dict:
    """What ``info`` prints."""
    facts: dict = {"path": str(store.path), "slots": len(store), "capacity": store.capacity}
    facts["generation"] = store.generation
    for column in store.columns.values():
        facts[column.name] = f"{column.dim} {dtype_name(column.dtype)}"
    facts["page_slots"] = store.columns["keys"].slots
    facts["bytes"] = sum(file.stat().st_size for file in store.path.iterdir() if file.is_file())
    facts["snapshots"] = store.snapshots()
    index = _index.record(store._engine)
    facts["index"] = index and {name: index[name] for name in ("description", "generation", "slots", "recall")}
    facts["crc32c"] = _crc.SOURCE
    return facts


def _info(store: MemoryStore, options: argparse.Namespace) -> int:
    facts = describe(store)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name:12} {value if value not in ([], None) else 'none'}")
    return 0


def _verify(store: MemoryStore, options: argparse.Namespace) -> int:
    faults = store.verify()
    for fault in faults:
        print(fault)
    print(f"{len(faults)} fault{'s' * (len(faults) > 1)}" if faults else "sound")
    return 1 if faults else 0


def _compact(store: MemoryStore, options: argparse.Namespace) -> int:
    print(f"{store.compact()} bytes given back")
    return 0


def _export(store: MemoryStore, options: argparse.Namespace) -> int:
    file = options.file or f"{options.path.rstrip('/')}.safetensors"
    store.export(file)
    print(file)
    return 0
