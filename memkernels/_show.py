"""show: a text and the records that each of its tokens read, as one HTML page that needs nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what no HTML page may hold, and carriage returns

_RETURN = '<span class="soft">\N{RETURN SYMBOL}</span>'

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5d6570; --page: #fbfbfa; --card: #ffffff; --line: #d9dce0;
  --memory: 255 138 0; --most: .62; --yes: #0b6b3a; --mark: #ffe2b8; --shadow: 0 8px 30px rgb(0 0 0 / .16); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ec; --soft: #9aa3ae; --page: #14171b; --card: #1e2329; --line: #363d46;
    --memory: 255 150 30; --most: .5; --yes: #6fdca0; --mark: #5c3d10; --shadow: 0 8px 30px rgb(0 0 0 / .6); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 17px/1.65 system-ui, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 50vh; }
h1 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { margin: 0 0 1rem; }
.soft, .prompt { color: var(--soft); }
.small { font-size: .85rem; line-height: 1.5; }
.scale { display: inline-block; width: 7rem; height: .8em; vertical-align: baseline; border-radius: 3px;
  border: 1px solid var(--line); background: linear-gradient(to right, transparent, rgb(var(--memory) / var(--most))); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.t { background: rgb(var(--memory) / calc(var(--s) * var(--most))); border-radius: 3px;
  padding: .15em 0; cursor: help; }
.t:hover, .t:focus, .t:target { outline: 2px solid rgb(var(--memory)); outline-offset: 1px; }
.card { display: none; position: fixed; left: 0; right: 0; bottom: 0; z-index: 2; max-height: 48vh; overflow: auto;
  padding: .8rem 1rem 1rem; background: var(--card); border-top: 1px solid var(--line); box-shadow: var(--shadow);
  font-size: .9rem; line-height: 1.5; white-space: normal; cursor: auto; }
.t:hover > .card, .t:focus > .card, .t:target > .card { display: block; }
.t:hover > .card { z-index: 3; }
.t:focus > .card { z-index: 2; }
.t:target > .card { z-index: 1; }
.row { display: block; }
.record { display: block; margin-top: .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
.head { display: flex; gap: .5rem; align-items: baseline; justify-content: space-between; }
.head > b { overflow-wrap: anywhere; }
.weight { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: block; height: 4px; margin: .2rem 0 .3rem; border-radius: 2px; background: var(--line); }
.bar > span { display: block; height: 4px; border-radius: 2px; background: rgb(var(--memory)); }
.quote { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: .05em 0; }
.yes { color: var(--yes); }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { overflow-wrap: anywhere; }
th { font-size: .85rem; font-weight: 600; color: var(--soft); }
td + td, th + th { text-align: right; padding-right: 0; font-variant-numeric: tabular-nums; }
@media (min-width: 60rem) {
  main { margin: 0; padding: 2.5rem 28rem 4rem 3rem; max-width: 76rem; }
  .card { left: auto; top: 2.5rem; right: 1.5rem; bottom: auto; width: 25rem; max-height: calc(100vh - 4rem);
    border: 1px solid var(--line); border-radius: 10px; } }
"""


def show(attachment: Any, ids: Any, path: str | os.PathLike[str], *, prompt: int = 1, most: int = 3, title: str = ""):
    """Write a page that shows a text, and behind each of its tokens the records of the memory that it came from.

    A pointer over a token, or the keyboard on it (Tab), opens its sources: the document, the weight of the record, its
    text before and after, and whether it votes for this token. The colour of a token is the share of its probability
    that the records gave, ``p_memory(x_t) / p(x_t)``. The page is one file, loads nothing and runs no script. ``#t12``
    after its address opens the sources of token 12.

    Args:
        attachment: what ``attach`` of :mod:`memkernels.integrations.transformers` returned, with ``Neighbours``.
        ids: the text, int64 ``[T]`` or ``[1, T]``, as ``generate`` returns it; the model reads it once.
        path: of the file, which is written anew, in a folder that is made if it is not there.
        prompt: tokens at the beginning that are shown without sources, from 1. most: records of each token.
        title: of the page.

    Returns:
        The path.

    Raises:
        TypeError: ``attachment`` is none. ValueError: it is disabled, has no memory with records, or prompt, most or
            ids do not fit. Nothing is written then.

    Source: Khandelwal et al. 2020, Generalization through Memorization: Nearest Neighbor Language Models (whose tables
    of neighbours the page has for every token).
    """
    if not hasattr(attachment, "trace"):
        raise TypeError(f"show: attachment must be what attach returned, got {type(attachment).__name__}")
    traced = attachment.trace(ids, first=prompt, most=most)
    tokens = [int(token) for token in (ids.reshape(-1) if hasattr(ids, "reshape") else ids)]
    tokenizer = next(memory.tokenizer for memory in attachment.memories if memory.tokenizer is not None)
    given = tokenizer.decode(tokens[:prompt])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page(given, traced, prompt, title or "What each token read").encode("utf-8"))
    return path


def page(given: str, traced: Sequence[Any], first: int, title: str) -> str:
    """The HTML of a prompt and of what ``Attachment.trace`` tells of the tokens after it, the first of number
    ``first``."""
    spans = "".join(_token(token, first + number) for number, token in enumerate(traced))
    shared = sum(token.share for token in traced) / max(len(traced), 1)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="soft small">Share of a token's probability that comes from the memory: 0 <span class="scale"></span> 1; \
{shared:.0%} on average. Point at a token, tap it, or step through them with Tab, to see the records behind it.</p>
<p class="text"><span class="prompt">{_text(given)}</span>{spans}</p>
{_documents(traced)}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    """Text for HTML, quotes too; control characters become a visible sign."""
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _line(text: str) -> str:
    """Text in one line."""
    return _text(text).replace("\n", _RETURN)


def _token(token: Any, number: int) -> str:
    words = token.text.rstrip("\n")
    ends = len(token.text) - len(
        words
    )  # line ends that end a token stand behind it, where they make no box of their own
    visible = _text(words).replace("\n", f"{_RETURN}\n") + _RETURN * ends or "\N{DOTTED CIRCLE}"
    records = "".join(_record(vote) for vote in token.votes)
    if not records:
        records = '<span class="record soft">No record was read.</span>'
    return (
        f'<span class="t" id="t{number}" tabindex="0" aria-describedby="c{number}" style="--s:{token.share:.3f}">'
        f'{visible}<span class="card" role="tooltip" id="c{number}">'
        f'<span class="row head"><b>{_text(repr(token.text))}</b>'
        f'<span class="weight soft">probability {_percent(token.probability)}</span></span>'
        f'<span class="row head">of it from the memory<span class="weight">{_percent(token.share)}</span></span>'
        f'<span class="row head">share of the memory in all tokens<span class="weight">{_percent(token.memory)}</span>'
        f"</span>{records}</span></span>" + "\n" * ends
    )


def _record(vote: Any) -> str:
    source = vote.source
    weight = f'<span class="weight">{_percent(vote.weight)}</span>'
    bar = f'<span class="bar"><span style="width:{100 * min(max(vote.weight, 0.0), 1.0):.1f}%"></span></span>'
    if source is None:
        return f'<span class="record"><span class="row head"><b>a removed record</b>{weight}</span>{bar}</span>'
    before = source.text.removesuffix(source.token)
    name = source.document or "this text"
    agrees = '<span class="yes">votes for this token</span>' if vote.agrees else "votes for another token"
    return (
        f'<span class="record"><span class="row head"><b>{_text(name)}</b>{weight}</span>{bar}'
        f'<span class="quote">\N{HORIZONTAL ELLIPSIS}{_line(before)}<mark>{_line(source.token)}</mark>'
        f"{_line(source.after)}\N{HORIZONTAL ELLIPSIS}</span>"
        f'<span class="row small soft">token {source.position + 1}, {agrees}</span></span>'
    )


def _documents(traced: Sequence[Any]) -> str:
    """The documents by what their records that are shown gave to the tokens that came."""
    given: dict[str, float] = {}
    for token in traced:
        for vote in token.votes:
            if vote.agrees and vote.source is not None:
                name = vote.source.document or "this text"
                given[name] = given.get(name, 0.0) + vote.weight / max(token.probability, 1e-30) / len(traced)
    if not given:
        return ""
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{_percent(share)}</td></tr>\n"
        for name, share in sorted(given.items(), key=lambda pair: -pair[1])[:12]
    )
    return f"<h2>Documents</h2>\n<table>\n<tr><th>document</th><th>share of the text</th></tr>\n{rows}</table>"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else "below 0.1%"
