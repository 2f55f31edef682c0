"""The rows of the store, and the option that it has beside the others."""

from __future__ import annotations

from ..contests import command
from . import cold, commits, index, large, opening, peers, reads, scans, searches, space, traces
from .setting import Setting

ROWS = command.rows_of((reads, searches, cold, commits, space, opening, index, scans, traces))
NAMES = (*ROWS, *large.ROWS)


def main(arguments: list[str]) -> int:
    parser = command.parser_of("store", ROWS)
    parser.add_argument("--large", action="store_true", help="instead: a store of many gigabytes, deleted afterwards")
    options = parser.parse_args(arguments)
    if options.large and options.only:
        parser.error("--large is a row of its own, and goes without --only")
    rows = large.ROWS if options.large else {name: ROWS[name] for name in options.only or ROWS}
    return command.run("store", rows, Setting, options, peers.versions(), NAMES)
