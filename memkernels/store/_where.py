"""A filter over metadata: SQL with ``?`` for values, of which only what is listed here passes.

Names stand for the fields of a slot's JSON document; a slot without the field has NULL. Values are bound, never text.
"""

from __future__ import annotations

import re
import sqlite3

import numpy as np

from ._bitmap import Bitmap
from ._database import FILE, translated
from ._engine import Engine
from ._errors import StoreDamaged

WORDS = {"AND", "OR", "NOT", "IN", "IS", "NULL", "LIKE", "GLOB", "BETWEEN", "ESCAPE", "TRUE", "FALSE"}
FUNCTIONS = {"abs", "coalesce", "ifnull", "instr", "length", "lower", "round", "substr", "trim", "upper"}
TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<text>'(?:[^']|'')*')|(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"
    r"|(?P<mark>\?)|(?P<sign><=|>=|<>|!=|==|\|\||-(?!-)|[+*/%<>=(),]))"
)
REFUSED = re.compile(r"syntax|incomplete|misuse|arguments|unrecognized|ESCAPE|row value|too (many|large|long)")
LONGEST = 10_000  # characters of a condition


def parse(op: str, where: object) -> tuple[str, list, list[str]]:
    """SQL over the documents, what is bound in it, and the fields that it names."""
    wanted = "where must be (condition, values), e.g. ('year >= ?', [2024])"
    if isinstance(where, str):
        where = (where, [])
    if not isinstance(where, (tuple, list)) or len(where) != 2 or not isinstance(where[0], str):
        raise TypeError(f"{op}: {wanted}, got {type(where).__name__}")
    condition, values = where
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{op}: {wanted}, got values of {type(values).__name__}")
    for value in values:
        if not (value is None or isinstance(value, (str, int, float))):
            raise TypeError(
                f"{op}: a value of where must be a text, a number, a bool or None, got {type(value).__name__}"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}: a value of where must fit 64 bits, got an int beyond it")
    if not condition.strip() or len(condition) > LONGEST:
        raise ValueError(f"{op}: the condition of where must have 1 to {LONGEST} characters, got {len(condition)}")
    sql, fields = _translate(op, condition)
    if sql.count("?") != len(values):
        raise ValueError(f"{op}: where has {sql.count('?')} ? and {len(values)} values")
    return sql, [int(v) if isinstance(v, bool) else v for v in values], fields


def _translate(op: str, condition: str) -> tuple[str, list[str]]:
    out, fields, at = [], [], 0
    condition = condition.rstrip()
    while at < len(condition):
        match = TOKEN.match(condition, at)
        if match is None:
            raise ValueError(f"{op}: where cannot contain {condition[at : at + 20].strip()!r}")
        at = match.end()
        name = match["name"]
        if name is None:
            if match["text"] and "?" in match["text"]:
                raise ValueError(f"{op}: where must give texts as values, got {match['text']}")
            out.append(match[0].strip())
        elif name.upper() in WORDS:
            out.append(name.upper())
        elif condition[at:].lstrip().startswith("("):
            if name.lower() not in FUNCTIONS:
                raise ValueError(f"{op}: where cannot call {name}; it can call {', '.join(sorted(FUNCTIONS))}")
            out.append(name.lower())
        else:
            fields.append(name)
            out.append(field(name))
    return " ".join(out), list(dict.fromkeys(fields))


def field(name: str) -> str:
    """The SQL of a field; an index on just this text serves it."""
    return f"json_extract(doc, '$.{name}')"


def matching(engine: Engine, op: str, where: object) -> np.ndarray:
    """The live slots that satisfy a condition, as a packed bitmap."""
    sql, values, fields = parse(op, where)
    live, db = engine.maps["live"], engine.db
    with translated():
        if engine.mode == "w":
            for name in set(fields) - engine.indexed:
                db.execute(f'CREATE INDEX IF NOT EXISTS "meta_{name}" ON meta({field(name)})')
                engine.indexed.add(name)
        table, chosen = "meta", ""
        if engine.snapshot:
            table, chosen = "snapshot_meta", f"snapshot = {int(engine.snapshot)} AND "
        try:
            # A slot without a document has no row: it matches where a row of nothing but NULL does.
            empty = db.execute(f"SELECT ({sql}) FROM (SELECT '{{}}' AS doc)", values).fetchone()[0]
            rows = db.execute(f"SELECT slot FROM {table} WHERE {chosen}({sql})", values).fetchall()
            some = db.execute(f"SELECT slot FROM {table} WHERE {chosen} 1").fetchall() if empty else []
        except sqlite3.OperationalError as error:
            if REFUSED.search(str(error)):
                raise ValueError(f"{op}: where does not read as a condition: {error}") from error
            raise
    found = Bitmap()
    found.bytes = live.bytes.copy() if empty else np.zeros_like(live.bytes)
    if empty:
        found.set(_inside(some, engine), False)
    found.set(_inside(rows, engine))
    return found.bytes & live.bytes


def _inside(rows: list[tuple], engine: Engine) -> np.ndarray:
    slots = np.array([row[0] for row in rows], dtype=np.int64)
    if len(slots) and (slots.min() < 0 or slots.max() >= engine.capacity):
        raise StoreDamaged(f"{FILE}: meta: has a row of slot {slots.max()}, beyond {engine.capacity}")
    return slots
