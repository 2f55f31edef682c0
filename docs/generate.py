"""python -m docs.generate: fill the generated blocks of README.md and docs/ in place. Run from the repository root.

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``:

- ``ops``: the table of operations, from their declarations and the kernels that the dispatcher knows;
- ``speed``: table and picture of a dozen rows of one of the committed result files, chosen by :func:`headline`;
- ``performance``: pictures and tables of the same files, printed by ``bench.report``;
- ``ladder``, ``limits``: what each step bought, and what loops reach on a free and on a busy core, recorded in
  ``bench/results/ladder.json``;
- ``store``, ``lookup``: what ``python -m bench store`` and ``lookup`` measured, from their committed result files;
- ``everyday``: the ratios of ``python -m bench --everyday``, losses included;
- ``evaluate``: what memories of manuals are worth beside a pretrained model, by ``python -m memkernels evaluate``;
- ``trained``: what memories learn alone beside a pretrained model, by ``python -m memkernels evaluate --train``;
- ``attention``: attention of pretrained models on softmax_read beside that of transformers, by ``python -m bench
  attention``;
- ``ngram_memory``: what ``examples/ngram_memory.py --out`` measured;
- ``scale``: what reads over ranks cost on paper; ``sharding``: what ``python -m bench sharding`` measured;
- ``crash``: what the crash laboratory of MemoryStore tried, recorded in ``bench/results/crash_lab.json``;
- ``predicted``: where main kernels will be bound, as ``python -m bench.predict`` reads it from compiled code.

``tests/test_docs.py`` fails when a block differs from what would be written here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memkernels import backends
from memkernels.registration import OPS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LADDER = RESULTS / "ladder.json"
CRASHES = RESULTS / "crash_lab.json"
BLOCK = re.compile(r"<!-- generated: (\w+) -->\n(.*?)<!-- end: \1 -->", re.DOTALL)
EMPTY = "No result file is committed yet. `python -m bench` writes one to `bench/results/`.\n"


def pages() -> list[Path]:
    """README and every page under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def navigation() -> list[str]:
    """The pages at the top of docs/, in the order in which the site shows them."""
    return re.findall(r": (\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def blocks(text: str) -> dict[str, str]:
    """name -> content of the generated blocks of a page."""
    return dict(BLOCK.findall(text))


def page_of(op: str) -> Path | None:
    """The page that has a section named ``op``."""
    found = (page for page in pages()[1:] if re.search(rf"^## {op}$", page.read_text(), re.MULTILINE))
    return next(found, None)


def _kernels(backend: backends.Backend, op: str, before: str) -> str:
    """Which directions ``backend`` has. One that is not installed here keeps what the table said ``before``."""
    if backend.missing() is not None:
        return before
    gaps = {d: backend.gap(op, backend.devices[0], direction=d) for d in backends.DIRECTIONS}
    found = [d for d, gap in gaps.items() if gap is None]
    return "" if not found else backend.name + ("" if len(found) == len(gaps) else f" ({' and '.join(found)})")


def op_table(before: str) -> str:
    """One row per op that has a page: name, equation, backends. ``before``: the table as it is."""
    rows = ["| operation | equation | backends |", "| --- | --- | --- |"]
    for name, op in sorted(OPS.items()):
        page = page_of(name)
        if op.twin_of or page is None:  # a twin, of compressed slots, is called through the op in whose row it stands
            continue
        old = next((line for line in before.splitlines() if line.startswith(f"| [`{name}`]")), "")
        known = [cell.strip() for cell in old.split("|")[3].split(",")] if old else []
        cells = ["reference"]
        for backend in backends.BACKENDS:
            own = next((cell for cell in known if cell.split(" ")[0] == backend.name), "")
            cells.append(_kernels(backend, name, own))
        twin = f", `{name}_`" if op.inplace else ""
        link = f"[`{name}`](docs/{page.name}#{name}){twin}"
        rows.append(f"| {link} | `{op.equation}` | {', '.join(filter(None, cells))} |")
    return "\n".join(rows) + "\n"


def result_files() -> list[Path]:
    """The committed results of full sizes."""
    kinds = "gpu|store|lookup|everyday|sharding|evaluate|trained|attention"
    other = re.compile(rf"^({kinds})-|^ladder$|^ngram_memory|^crash|-quick$")
    return sorted(file for file in RESULTS.glob("*.json") if not other.search(file.stem))


def headline(rows: list[dict]) -> list[dict]:
    """The rows of the README and of the start page, by rule: of each page of operations and each direction the float32
    case with the most multiply-adds that a peer ran too (of equals the one with the smaller ratio); then the smallest
    ratio of all."""
    compared = [row for row in rows if row["unit"] == "s" and row["ratio"] is not None and not OPS[row["op"]].twin_of]
    kinds: dict[tuple[str, str], list[dict]] = {}
    for row in compared:
        if row["dtype"] == "float32":
            kinds.setdefault((page_of(row["op"]).stem, row["direction"]), []).append(row)
    order = navigation()
    chosen = [
        max(kinds[kind], key=lambda row: (row["flops"], -row["ratio"]))
        for kind in sorted(kinds, key=lambda kind: (order.index(kind[0]), kind[1] == "backward"))
    ]
    worst = min(compared, key=lambda row: row["ratio"])
    return chosen + [worst] * (worst not in chosen)


def speed(pictures_to: Path) -> str:
    """The headline of the result file with the most cases, of several the newest: not of a forced instruction set."""
    if not result_files():
        return EMPTY
    from bench import report as bench_report
    from bench import text

    files = {file: json.loads(file.read_text())["rows"] for file in result_files()}
    best = max(files, key=lambda file: (len(files[file]), files[file][0]["date"]))
    rows = headline(files[best])
    bench_report.plot(rows, pictures_to / "speed.png")
    lines = [
        "| op | case | time | times as fast as the best peer | share of the ceiling |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"[`{row['op']}`](docs/{page_of(row['op']).name}#{row['op']})"
        share = max(row["peak_share"] or 0, row["bandwidth_share"] or 0)
        name += " backward" if row["direction"] == "backward" else ""
        lines.append(
            f"| {name} | {row['case']} | {text.median(row)} | {row['ratio']:.2f}x {row['best_peer']} | {share:.0%} |"
        )
    first = rows[0]
    where = f"{bench_report.machine(first)}; torch {first['torch']}, commit {first['commit']}, {first['date'][:10]}."
    table = "\n".join(lines)
    return f"{where}\n\n{table}\n\n![Speed against the best peer, and share of the ceiling](docs/speed.png)\n"


def report(pictures_to: Path) -> str:
    """What ``python -m bench.report`` prints for the committed files; its pictures go to ``pictures_to``."""
    if not result_files():
        return EMPTY
    from bench import report as bench_report

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        bench_report.main([*map(str, result_files()), "--docs", str(pictures_to)])
    return text.getvalue()


def ladder(before: str) -> str:
    """Steps of optimisation, kept or not, with the ratio that each gave."""
    recorded = json.loads(LADDER.read_text())

    def table(steps: list[dict]) -> str:
        rows = ["| step | case | gain | kept |", "| --- | --- | --- | --- |"]
        rows += [f"| {r['step']} | {r['case']} | {r['gain']} | {'yes' if r['kept'] else 'no'} |" for r in steps]
        return "\n".join(rows) + "\n"

    text = f"{recorded['device']}, {recorded['date']}: {recorded['method']}.\n\n{table(recorded['steps'])}"
    measured = recorded.get("measured", [])
    for device in dict.fromkeys(r["device"] for r in measured):
        text += f"\n{device}: measured by `python -m bench.step`.\n\n"
        text += table([r for r in measured if r["device"] == device])
    return text


def limits(before: str) -> str:
    """GFLOP/s of loops, the other hardware thread of the core being idle and busy."""
    rows = ["| loop | core free, GFLOP/s | core busy, GFLOP/s |", "| --- | --- | --- |"]
    rows += [f"| {r['loop']} | {r['free']} | {r['busy']} |" for r in json.loads(LADDER.read_text())["limits"]]
    return "\n".join(rows) + "\n"


def store(before: str) -> str:
    """The promises of MemoryStore beside what was measured, a table per machine."""
    return _promises("store", "store")


def lookup(before: str) -> str:
    """The promises of the lookup memory beside what was measured, a table per machine."""
    return _promises("lookup", "memkernels")


def evaluate(before: str) -> str:
    """Perplexity with a memory and without, time and bytes, a part per result file."""
    from memkernels._evaluate import report

    return _evaluations("evaluate", report) or EMPTY.replace("python -m bench", "python -m memkernels evaluate --out")


def trained(before: str) -> str:
    """Perplexity with memories that learned alone, and with networks of their size, a part per result file."""
    from memkernels._evaluate import trained_report

    command = "python -m memkernels evaluate --train product-keys --out"
    return _evaluations("trained", trained_report) or EMPTY.replace("python -m bench", command)


def _evaluations(stem: str, tables: Any) -> str:
    found = []
    for file in sorted(RESULTS.glob(f"{stem}-*.json")):
        result = json.loads(file.read_text())
        where = [f"{result['model']} in {result['dtype']}", f"{result['processor']}, {result['threads']} thread"]
        where += [f"transformers {result['transformers']}", f"commit {result['commit']}", result["date"][:10]]
        found.append("; ".join(where) + ".\n\n" + tables.table(result) + "\n" + tables.documents(result))
    return "\n".join(found)


def attention(before: str) -> str:
    """Calls of attention through transformers, a table per result file."""
    from bench.attention import page

    return page.tables() or EMPTY.replace("python -m bench", "python -m bench attention")


def everyday(before: str) -> str:
    """Ratios of everyday calls to plain PyTorch, a part per machine."""
    from bench import results
    from bench.everyday import summary

    found = [summary.page(results.load(file)) for file in summary.files()]
    return "\n".join(found) or EMPTY.replace("python -m bench", "python -m bench --everyday")


def ngram_memory(before: str) -> str:
    """What examples/ngram_memory.py measured: models, then generation, per machine."""
    from bench import results
    from bench.report import machine

    text = ""
    for file in sorted(results.DIRECTORY.glob("ngram_memory-*.json")):
        rows = results.load(file)
        models = [row for row in rows if "bits per byte" in row]
        text += f"{machine(rows[0])}; {rows[0]['setup']['steps']} steps; commit {rows[0]['commit']}.\n\n"
        text += "| model | parameters | operations per token | bits per byte held out, by seed | trained, tokens/s |\n"
        text += "| --- | --- | --- | --- | --- |\n"
        for row in models:
            bits = ", ".join(f"{x:.4f}" for x in row["bits per byte"])
            speed = f"{statistics.median(row['tokens/s']):,.0f}"
            text += f"| {row['row']} | {row['parameters']:,} | {row['operations']:,.0f} | {bits} | {speed} |\n"
        text += "\n| generation | tier | tokens/s, rows in RAM | tokens/s, rows on disk | disk / RAM |\n"
        text += "| --- | --- | --- | --- | --- |\n"
        for row in (row for row in rows if row not in models):
            speeds = (f"{row['tokens/s, ' + where]:,.1f}" for where in ("RAM", "disk"))
            cells = [row["row"].removeprefix("generation, "), row["tier"], *speeds, f"{row['disk / RAM']:.3f}"]
            text += "| " + " | ".join(cells) + " |\n"
    return text or EMPTY.replace("python -m bench", "python examples/ngram_memory.py")


def _promises(subject: str, own: str) -> str:
    from bench import results
    from bench.contests import report

    found = [report.page(results.load(file), own) for file in report.files(subject)]
    return "\n".join(found) or EMPTY.replace("python -m bench", f"python -m bench {subject}")


def scale(before: str) -> str:
    """What reads of slots on H200 cost by the formula, for some sizes."""
    from memkernels._scale import read_cost

    text = "| slots, 64 + 64 in bfloat16 | tokens | GPUs | memory | arithmetic | received by a GPU | a read |\n"
    text += "| --- | --- | --- | --- | --- | --- | --- |\n"
    for slots, ranks in ((1e8, 1), (1e9, 4), (1e10, 32), (1e12, None)):
        for tokens in (1, 256):
            cost = read_cost(slots, 64, 64, tokens=tokens, ranks=ranks)
            times = [f"{x * 1e3:.3g} ms" for x in (cost.memory, cost.arithmetic)]
            cells = [f"{slots:.0e}", tokens, f"{cost.ranks:,}", *times, f"{cost.moved / 1e6:.3g} MB"]
            text += f"| {' | '.join(map(str, cells))} | {cost.seconds * 1e3:.3g} ms |\n"
    return text


def sharding(before: str) -> str:
    """The bars of slots over ranks, what was wanted and what was measured."""
    from bench.sharding import page

    return page.table() or EMPTY.replace("python -m bench", "python -m bench sharding")


def predicted(before: str) -> str:
    """Bounds of the main kernels, and what they rest on."""
    from bench import predict

    versions, rows = predict.read()
    return predict.page(rows, versions)


def host(before: str) -> str:
    """What the rehearsal counted and timed."""
    from bench.gpu import rehearsal

    return rehearsal.page(json.loads(rehearsal.RESULT.read_text()))


TRIED = {  # part of the crash laboratory -> what was tried, what came of it
    "kills": (
        "{kills:,} kills, half of them within a system call; {acknowledged:,} operations acknowledged",
        "{lost} lost, {torn} torn; in flight: {in flight and there:,} whole, {in flight and not there:,} not there",
    ),
    "power": (
        "{cuts:,} power cuts in {histories:,} histories of {calls traced:,} calls; "
        "{calls lost:,} calls lost and {writes torn:,} writes torn at 512 bytes",
        "{acknowledged lost} of what was acknowledged lost",
    ),
    "flips": (
        "{header flips:,} flipped bits of headers, {flips:,} elsewhere, {cuts:,} files cut short",
        "{wrong numbers} wrong numbers; refused: {header flips refused:,}, {flips refused:,}, {cuts refused:,}; "
        "the others change nothing that is read",
    ),
    "refusals": (
        "{calls refused:,} operations of which one system call, or all from one on, failed",
        "{wrong states} wrong states; {operations refused:,} named errors, {operations done:,} done all the same",
    ),
    "readers": (
        "{readers} readers beside a writer; {calls:,} calls, {generations seen:,} generations seen",
        "{mixed} mixed, {going back} going back",
    ),
    "mutants": ("{mutants} stores with a fault put in", "{found} found"),
}


def crashes(before: str) -> str:
    """A row for each part of the crash laboratory."""
    parts = json.loads(CRASHES.read_text())["parts"]
    rows = ["| tried | outcome | on |", "| --- | --- | --- |"]
    for part in filter(parts.get, TRIED):
        cells, found = TRIED[part], parts[part]
        on = f"{found['date']}, {found['system']}, Python {found['python']}, SQLite {found['sqlite']}"
        rows.append("| " + " | ".join([*(cell.format_map(found) for cell in cells), on]) + " |")
    return "\n".join(rows) + "\n"


def generated(pictures_to: Path) -> dict[str, Callable[[str], str]]:
    """name -> the content of a block, given what it holds now."""
    once = functools.cache(speed)  # it stands on two pages
    return {
        # what is not installed here keeps what the README says of it, on every page
        "ops": lambda before: op_table(blocks((ROOT / "README.md").read_text())["ops"]),
        "speed": lambda before: once(pictures_to),
        "performance": lambda before: report(pictures_to),
        "ladder": ladder,
        "limits": limits,
        "store": store,
        "lookup": lookup,
        "everyday": everyday,
        "ngram_memory": ngram_memory,
        "evaluate": evaluate,
        "trained": trained,
        "attention": attention,
        "scale": scale,
        "sharding": sharding,
        "crash": crashes,
        "predicted": predicted,
        "host": host,
    }


def filled(page: Path, make: dict[str, Callable[[str], str]]) -> str:
    """The text of a page with its generated blocks as they should be. Blocks are made with the links of README."""
    docs = os.path.relpath(ROOT / "docs", page.parent)

    def block(match: re.Match) -> str:
        content = make[match[1]](match[2]).replace("](docs/", "](" if docs == "." else f"]({docs}/")
        return f"<!-- generated: {match[1]} -->\n{content}<!-- end: {match[1]} -->"

    return BLOCK.sub(block, page.read_text())


def stale() -> list[str]:
    """Names of the pages that ``python -m docs.generate`` would change."""
    with tempfile.TemporaryDirectory() as folder:
        make = generated(Path(folder))
        return [page.name for page in pages() if page.read_text() != filled(page, make)]


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m docs.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    make = generated(ROOT / "docs")
    for page in pages():
        before = page.read_text()
        after = filled(page, make)
        if after != before:
            page.write_text(after)
            print(f"{page.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
