"""A small language model with hashed n-gram tables, against one of the same compute and one of the same size.

The text is documentation inside the Python installation: the docstrings of the standard library, of torch and of numpy,
and the language reference. Whole files are held out. Three models differ in one thing each:

    n-grams          a Transformer; before its second layer NgramMemory adds what the last two and three tokens name
    same compute     the Transformer alone, its feed-forward layers widened to at least as many operations per token
    same parameters  the Transformer alone, its feed-forward layers widened to at least as many parameters

What counts is bits per byte of the files held out, which no choice of tokens can flatter. Then the model with n-grams
writes text twice, with its rows in RAM and with its rows on disk and a cache of an eighth of them. Those of a step are
prefetched at its beginning and used in the second layer: tokens per second of both, measured in turns.

    python examples/ngram_memory.py [--quick] [--seeds 0 1 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from memkernels import _text
from memkernels._pieces import Pieces
from memkernels.nn import NgramHistory, NgramMemory, TokenMap
from memkernels.optim import SparseAdam
from memkernels.store import RowTable, StoreFormat

KINDS = ("n-grams", "same compute", "same parameters")
ROOT = Path(__file__).resolve().parent.parent


class Setup(NamedTuple):
    """Sizes of a run; ``rates`` are learning rates by model: for the first two the best on the validation files
    (``--tune``), and for the third that of the second."""

    vocabulary: int = 2048
    dim: int = 128
    layers: int = 3
    inner: int = 512
    rows: int = 4096  # of each table
    heads: int = 4  # tables per order
    head_dim: int = 32
    window: int = 128  # tokens that a prediction can see
    batch: int = 16
    steps: int = 500
    rates: tuple[float, ...] = (4e-3, 4e-3, 4e-3)
    generated: int = 128  # tokens of each stream
    streams: tuple[int, ...] = (1, 8)  # generated side by side


QUICK = Setup(512, 32, 2, 64, 1021, 2, 16, 64, 16, 120, (1e-2, 2e-2, 2e-2), 16, (1, 2))


class Corpus(NamedTuple):
    """Tokens of the files to train on, to choose by, and to measure on; the bytes of each token; one id per word."""

    train: Tensor
    validation: Tensor
    test: Tensor
    length: Tensor
    token_map: TokenMap


@functools.cache
def corpus(vocabulary: int, quick: bool) -> Corpus:
    """Files go by the hash of their path: 1 of 20 (quick: 8) to choose by, 1 to measure on, the others to train on."""
    import numpy as np

    folders = [Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent, Path(np.__file__).parent]
    parts: dict[int, bytearray] = {0: bytearray(), 1: bytearray(), 2: bytearray()}
    for name, text in _text.docstrings(*([] if quick else folders)).items():
        parts[max(2 - int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % (8 if quick else 20), 0)] += (
            text
        )
    train, validation, test = (bytes(part) for part in parts.values())
    pieces = Pieces(train, vocabulary)
    tokens = (torch.tensor(pieces.encode(part)) for part in (train, validation, test))
    return Corpus(*tokens, torch.tensor([len(piece) for piece in pieces.pieces]), TokenMap.from_tokenizer(pieces))


class Block(nn.Module):
    """Causal attention with rotary positions, then a feed-forward layer; both add to the hidden state."""

    def __init__(self, dim: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.attend, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, before: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x ``[B, T, D]``; before: keys and values ``[B, H, t, K]`` of earlier tokens."""
        query, key, value = self.attend(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        past = 0 if before is None else before[0].shape[2]
        query, key = (rotated(part, past) for part in (query, key))
        if before is not None:
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=before is None)  # then T is 1 otherwise
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)))), (key, value)


def rotated(x: Tensor, past: int) -> Tensor:
    """Pairs of numbers of ``x`` ``[B, H, T, K]`` turned by angles that grow with the position.

    Source: Su et al. 2021, RoFormer.
    """
    half = x.shape[-1] // 2
    speed = 1e4 ** (-torch.arange(half) / half)
    angle = torch.arange(past, past + x.shape[2])[:, None] * speed
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class State(NamedTuple):
    """What generation carries from token to token: keys and values of each layer, and the history of the n-grams."""

    layers: list[tuple[Tensor, Tensor]]
    history: NgramHistory | None


class LM(nn.Module):
    """A Transformer whose output is tied to its embedding; with ``memory``, n-grams are added before layer 2."""

    def __init__(self, vocabulary: int, dim: int, layers: int, inner: int, memory: NgramMemory | None = None):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, dim // 32, inner) for _ in range(layers))
        self.norm, self.memory = nn.RMSNorm(dim), memory

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits ``[B, T, vocabulary]`` of the tokens after ``tokens`` ``[B, T]``, and the state after them."""
        history = None if state is None else state.history
        ticket = None if self.memory is None else self.memory.prefetch(tokens, history)
        x, layers = self.embed(tokens), []
        for number, block in enumerate(self.blocks):
            if number == 1 and self.memory is not None:
                x, history = self.memory(x, tokens, history, ticket=ticket)
            x, kept = block(x, None if state is None else state.layers[number])
            layers.append(kept)
        return F.linear(self.norm(x), self.embed.weight), State(layers, history)


def build(kind: str, setup: Setup, text: Corpus, seed: int) -> LM:
    """A model of one of ``KINDS``; the widths of the others follow from that of the first."""
    torch.manual_seed(seed)
    width = {"orders": (2, 3), "heads": setup.heads, "head_dim": setup.head_dim}
    memory = NgramMemory(setup.dim, setup.rows, **width, token_map=text.token_map, seed=seed, sparse_grad=True)
    model = LM(setup.vocabulary, setup.dim, setup.layers, setup.inner, memory)
    if kind == "n-grams":
        return model
    plain = LM(setup.vocabulary, setup.dim, setup.layers, setup.inner)
    if kind == "same compute":
        wider = (operations(model, setup) - operations(plain, setup)) / (4 * setup.dim * setup.layers)
    else:
        wider = (parameters(model) - parameters(plain)) / (2 * setup.dim * setup.layers)
    return LM(setup.vocabulary, setup.dim, setup.layers, setup.inner + math.ceil(wider))


def parameters(model: LM) -> int:
    return sum(p.numel() for p in model.parameters())


def operations(model: LM, setup: Setup) -> float:
    """Floating-point operations per token of a forward pass over a window."""
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(torch.zeros(1, setup.window).long())
    return counted.get_total_flops() / setup.window


def train(model: LM, setup: Setup, text: Corpus, rate: float, seed: int) -> float:
    """Trains on windows in random order; tokens per second. The rate of rows is five times as high, as published."""
    windows = text.train.unfold(0, setup.window + 1, setup.window)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    rows = [] if model.memory is None else [model.memory.weight]
    dense = [p for p in model.parameters() if all(p is not row for row in rows)]
    groups = [{"params": [p for p in dense if p.dim() > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in dense if p.dim() == 1], "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, rate, betas=(0.9, 0.95))]
    optimizers += [SparseAdam(rows, 5 * rate, betas=(0.9, 0.95))] if rows else []
    warm = max(setup.steps // 20, 1)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * s / setup.steps))
        )
        for optimizer in optimizers
    ]
    begin = time.perf_counter()
    for step in range(setup.steps):
        tokens = windows[order[torch.arange(step * setup.batch, (step + 1) * setup.batch) % len(order)]]
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
    return setup.steps * setup.batch * setup.window / (time.perf_counter() - begin)


@torch.no_grad()
def bits_per_byte(model: LM, setup: Setup, text: Corpus, tokens: Tensor) -> float:
    """Of every token of ``tokens`` but the first, from those before it in its window."""
    bits = 0.0
    windows = tokens.unfold(0, setup.window + 1, setup.window)
    for part in windows.split(32):
        logits = model(part[:, :-1])[0].flatten(0, 1)
        bits += F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item() / math.log(2)
    return bits / text.length[windows[:, 1:]].sum().item()


@torch.no_grad()
def generate(model: LM, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """``count`` tokens after each prompt ``[B, T]``, drawn with the same numbers each time; and tokens per second."""
    generator = torch.Generator().manual_seed(0)
    logits, state = model(prompt)
    found = []
    begin = time.perf_counter()
    for _ in range(count):
        found.append(torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator))
        logits, state = model(found[-1], state)
    return torch.cat(found, 1), len(prompt) * count / (time.perf_counter() - begin)


def generation(model: LM, rows: Path, prompt: Tensor, count: int, turns: int) -> dict[str, float | str]:
    """Tokens per second with rows in RAM and on disk, in turns; the text is the same, or this raises."""
    memory = model.memory
    assert memory is not None
    speeds: dict[str, list[float]] = {"RAM": [], "disk": []}
    written, found = {}, {}
    for turn in range(turns + 1):
        for name in list(speeds)[:: 1 if turn % 2 else -1]:
            with opened(rows, name, memory.rows // 8) as table:  # anew, so that its cache is empty
                memory.read_from(table)
                written[name], speed = generate(model, prompt, count)
                speeds[name] += [speed] if turn else []  # the first turn warms up
                found[name] = table.tier, table.stats()["bytes_read"]
    if not torch.equal(*written.values()):
        raise AssertionError("the text depends on where the rows are")
    ratio = statistics.median(disk / ram for disk, ram in zip(speeds["disk"], speeds["RAM"]))
    tier, read = found["disk"]
    medians = {f"tokens/s, {name}": statistics.median(speeds[name]) for name in speeds}
    return {**medians, "disk / RAM": ratio, "tier": tier, "bytes read": read}


def opened(path: Path, where: str, kept: int) -> RowTable:
    """On disk: by reads past the page cache, with ``kept`` rows cached; by mapping where a file system has none."""
    if where == "RAM":
        return RowTable.open(path, tier="ram")
    try:
        return RowTable.open(path, tier="direct", cache_rows=kept, threads=8)
    except StoreFormat:
        return RowTable.open(path, tier="mmap")


def main(quick: bool = False, seeds: Iterable[int] = (0, 1, 2), out: str | Path | None = None) -> dict[str, dict]:
    """What each model and the generation measured."""
    setup, seeds = QUICK if quick else Setup(), list(seeds)
    text = corpus(setup.vocabulary, quick)
    sizes = " + ".join(f"{text.length[part].sum().item() / 1e6:.2f}" for part in text[:3])
    print(f"{sizes} MB to train on, choose by and measure on; {text.token_map}, {setup.steps} steps")
    print(f"{'':16}{'seed':>5}{'parameters':>12}{'operations':>12}{'trained, tokens/s':>19}{'held out, bits/byte':>21}")
    found: dict[str, dict] = {kind: {"tokens/s": [], "bits per byte": []} for kind in KINDS}
    models = {}
    for seed in seeds:
        for kind, rate in zip(KINDS, setup.rates):
            models[kind] = model = build(kind, setup, text, seed)
            row = found[kind]
            row["parameters"], row["operations"] = parameters(model), operations(model, setup)
            row["tokens/s"].append(train(model, setup, text, rate, seed))
            row["bits per byte"].append(bits_per_byte(model, setup, text, text.test))
            sizes = f"{row['parameters']:12,}{row['operations']:12,.0f}"
            print(f"{kind:16}{seed:5}{sizes}{row['tokens/s'][-1]:19,.0f}{row['bits per byte'][-1]:21.4f}", flush=True)
    for kind, row in found.items():
        bits = row["bits per byte"]
        print(f"{kind:16} {statistics.mean(bits):.4f} bits per byte, {min(bits):.4f} to {max(bits):.4f}")
    found |= generations(models["n-grams"], setup, text, turns=2 if quick else 15)
    if out is not None:
        save(found, setup, seeds, Path(out))
    return found


def generations(model: LM, setup: Setup, text: Corpus, turns: int) -> dict[str, dict]:
    """What :func:`generation` measured with each number of streams, from beginnings of 32 tokens of files held out."""
    found = {}
    assert model.memory is not None
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        model.memory.save_table(rows).close()
        for streams in setup.streams:
            prompt = text.test.unfold(0, 32, (len(text.test) - 32) // streams)[:streams]
            name, measured = f"generation, streams: {streams}", generation(model, rows, prompt, setup.generated, turns)
            print(name, *(f"{what} {x:,.4g}" if isinstance(x, float) else x for what, x in measured.items()), sep=", ")
            found[name] = measured
    return found


def save(found: dict[str, dict], setup: Setup, seeds: list[int], out: Path) -> None:
    """A result file, with where and with what the run was made."""
    sys.path.insert(0, str(ROOT))  # for bench, which is no part of the package
    from bench import results

    where = results.environment("cpu", torch.get_num_threads())
    rows = [{"row": name, **row, "seeds": seeds, "setup": setup._asdict(), **where} for name, row in found.items()]
    results.save(rows, out)
    print(f"written to {out}")


def tune(rates: Iterable[float], quick: bool) -> None:
    """Bits per byte of the validation files by model and learning rate, with a seed that no result has."""
    setup = QUICK if quick else Setup()
    text = corpus(setup.vocabulary, quick)
    for kind in KINDS:
        for rate in rates:
            model = build(kind, setup, text, seed=99)
            train(model, setup, text, rate, seed=99)
            print(f"{kind:16} {rate:g} {bits_per_byte(model, setup, text, text.validation):.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and little text: under a minute")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of all models for each")
    parser.add_argument("--out", type=Path, help="where a result file goes (default: none is written)")
    parser.add_argument("--tune", type=float, nargs="+", metavar="RATE", help="instead: learning rates, on other files")
    options = parser.parse_args()
    if options.tune:
        tune(options.tune, options.quick)
    else:
        main(options.quick, options.seeds, options.out)
