"""One table for several processes: what they hold together, and how soon another one has its rows.

python -m bench.lookup.sharing FILE ROWS
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from memkernels.store import RowTable, StoreError

from ..contests.contest import same
from ..contests.finding import Finding, Goal, Wrong, lacking, most
from .setting import OUT, Content, Setting, write

PROCESSES = 4
TOKEN, SAMPLE = 24, 4_096  # rows of the first gather, and of those that are checked
PIECE = 1 << 16  # rows of a gather, of all of them
ONE_COPY, START = "one copy", most(1, "s")


class Reader:
    """A process that opens the table, and then does what it is told."""

    def __init__(self, path: Path, rows: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.lookup.sharing", str(path), str(rows)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"bench.lookup.sharing ended with status {self.process.wait()}")
        return json.loads(line)

    def tell(self, word: str) -> dict:
        print(word, file=self.process.stdin, flush=True)
        return self.answer()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def shared(setting: Setting) -> Iterator[Finding]:
    """Four processes with one table of tier shared: memory of all together, and the start of the last."""
    content = Content.of(setting.size(1 << 23, 1 << 14))
    path = write(setting.folder / "shared", content)
    what = f"{PROCESSES} processes, {content.text()}"
    with ExitStack() as stack:
        readers: list[Reader] = []
        for _ in range(PROCESSES):
            readers.append(stack.enter_context(Reader(path, content.count)))
            if why := readers[-1].started.get("why"):
                yield lacking(f"{what}: memory of all", ONE_COPY, most(1.1), why)
                return
        if any(reader.tell("check") != {"right": True} for reader in readers):
            raise Wrong("a process reads other rows than those of the table")
        for reader in readers:
            reader.tell("all")
        held = sum(reader.tell("held")["bytes"] for reader in readers)
    path.unlink()
    once = content.nbytes + content.scale.nbytes
    yield Finding(f"{what}: memory of all", ONE_COPY, most(1.1), held / once, held, once, "bytes")
    for i, goal in ((0, Goal(unit="s")), (-1, START)):
        seconds = readers[i].started["seconds"]
        which = "first, which fills the copy" if i == 0 else "last"
        words = f"{what}: from the call of open to the rows of a token, of the {which}"
        yield Finding(words, "", goal, seconds, seconds)


def held() -> int:
    """Bytes of this process alone, and its part of what it shares with others, files left out."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    parts = {words[0]: int(words[1]) << 10 for words in lines}
    return parts["Pss_Anon:"] + parts["Pss_Shmem:"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lookup.sharing", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("rows", type=int)
    options = parser.parse_args()
    content = Content.of(options.rows)
    generator = torch.Generator().manual_seed(36)
    slots = torch.randint(options.rows, (SAMPLE,), generator=generator)
    out = torch.zeros(PIECE, content.pattern.shape[1], dtype=OUT)
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    before = held()
    begin = time.perf_counter()
    try:
        table = RowTable.open(options.file, tier="shared", out_dtype=OUT)
    except StoreError as error:
        print(json.dumps({"why": str(error)}), flush=True)
        return
    with table:
        table.gather(slots[:TOKEN])
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
        for line in sys.stdin:
            print(json.dumps(_done(line.strip(), table, content, slots, out, before)), flush=True)


def _done(word: str, table: RowTable, content: Content, slots, out, before: int) -> dict:
    """check: are the rows right? all: read every row. held: bytes that the table takes here."""
    if word == "check":
        try:
            same(table.gather(slots), content.rows(slots))
        except Wrong:
            return {"right": False}
        return {"right": True}
    if word == "all":
        for first in range(0, len(table), PIECE):
            part = torch.arange(first, min(first + PIECE, len(table)))
            table.gather(part, out=out[: len(part)])
        return {"read": len(table)}
    return {"bytes": held() - before}


ROWS = {"shared": shared}

if __name__ == "__main__":
    main()
