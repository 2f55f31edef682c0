"""Command line: ``python -m memkernels info | check | demo | store | scale | evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memkernels", description="Fused kernels for neural external memory in PyTorch."
    )
    metavar = "{info,check,demo,store,scale,evaluate}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=metavar)
    info = commands.add_parser("info", help="versions, processor, backends, and which op runs where")
    info.add_argument("--json", action="store_true", help="print the same as JSON")
    check = commands.add_parser("check", help="compare every op with the float64 reference; exit status 1 on a failure")
    check.add_argument("--op", help="one op, e.g. softmax_read (default: all)")
    check.add_argument("--backend", help="one backend (default: the reference and all that serve the device)")
    check.add_argument("--dtype", help="float32, bfloat16, float16 or float64 (default: all)")
    check.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    check.add_argument("--quick", action="store_true", help="the cases that find most mistakes")
    commands.add_parser("demo", help="train a Transformer with memory on both backends and plot it", add_help=False)
    commands.add_parser("store", help="look at a MemoryStore, check, compact or export it", add_help=False)
    commands.add_parser("scale", help="what a read of slots on several ranks costs, on paper", add_help=False)
    commands.add_parser("evaluate", help="a memory beside a real language model, in numbers", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["demo"]:  # the demo reads its own options
        from . import demo

        return demo.main(argv[1:]) or 0
    if argv[:1] == ["store"]:  # and so does the command of a store
        from .store import _command

        return _command.main(argv[1:])
    if argv[:1] == ["scale"]:
        from . import _scale

        return _scale.main(argv[1:])
    if argv[:1] == ["evaluate"]:
        from ._evaluate import command

        return command.main(argv[1:])
    options = _parser().parse_args(argv)
    return _info(options) if options.command == "info" else _check(options)


def _info(options: argparse.Namespace) -> int:
    from . import _info

    info = _info.collect()
    print(json.dumps(info, indent=2) if options.json else _info.render(info))
    return 0


def _check(options: argparse.Namespace) -> int:
    from . import testing

    begun = time.monotonic()
    try:
        rows = testing.check(
            options.op, options.backend, options.dtype, options.device, quick=options.quick, progress=_progress()
        )
    except ValueError as error:
        print(f"python -m memkernels check: {error}", file=sys.stderr)
        return 2
    print(testing.report(rows), f"in {time.monotonic() - begun:.0f} s")
    return 0 if rows and all(row.passed for row in rows) else 1


def _progress():
    """A bar on a terminal; nothing in a log."""
    if not sys.stderr.isatty():
        return None
    width = 40

    def show(done: int, total: int) -> None:
        bar = "#" * (width * done // total)
        end = "\r\033[K" if done == total else ""
        print(f"\r{bar:.<{width}} {done}/{total}{end}", end="", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
