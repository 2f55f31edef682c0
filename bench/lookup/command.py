"""The rows of the lookup memory."""

from __future__ import annotations

from ..contests import command, peers
from . import cold, gate, gathers, prefetches, resident, sharing, slots, tokens, training
from .setting import Setting

ROWS = command.rows_of((gathers, tokens, slots, gate, cold, resident, prefetches, sharing, training))


def main(arguments: list[str]) -> int:
    options = command.parser_of("lookup", ROWS).parse_args(arguments)
    rows = {name: ROWS[name] for name in options.only or ROWS}
    return command.run("lookup", rows, Setting, options, peers.versions(["LMDB"]), ROWS)
