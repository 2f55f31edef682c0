"""show and trace: votes against the formula in numpy, reads of every token of a generation, and the page itself."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from transformers_support import tiny  # isort: skip (may skip the module)
from neighbours_support import TEXTS, Letters, feed_forward_inputs, ids, store

import memkernels as mk
from memkernels.integrations import transformers as mkt
from memkernels.integrations.transformers.trace import pieces

TEXT = "the model reads a store of records, and votes for the token after each. "
HOSTILE = "<script>alert('x')</script>&\"<b>"


def attached(model, texts=None, **options):
    options = {"k": 8, "cache": 32, "shares": (0.4, 0.2), **options}
    return mkt.attach(model, mkt.Neighbours(store(model, texts), **options))


def generated(handle, tokens=12, **options):
    prompt = ids(TEXTS["faq/two.txt"])[None, :20]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **options}
    return handle.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def test_votes_are_those_of_the_formula():
    """``weight_j = m softmax_j(-|q - k_j|^2 / T)``, and ``share = sum_{j: v_j = x} weight_j / p(x)``."""
    model, tokens, m, T, k = tiny("llama"), ids(TEXTS["faq/two.txt"][:32] + TEXT[10:20]), 0.3, 0.7, 8
    with torch.no_grad():
        own = torch.softmax(model(tokens[None]).logits[0].double(), -1).numpy()
    handle = attached(model, k=k, cache=0, shares=(m, 0.0), temperature=T)
    made = handle.memories[0].store
    keys, values = made.records.keys.double().numpy(), made.records.columns[:, 0].numpy()
    with handle.disabled():
        query = made.project(feed_forward_inputs(model, made.layer, tokens)).double().numpy()
    traced = handle.trace(tokens, most=k)
    assert len(traced) == 41
    for t, token in enumerate(traced, 1):
        distances = ((query[t - 1] - keys) ** 2).sum(-1)
        near = distances.argsort()[:k]
        weights = np.exp(-(distances[near] - distances[near].min()) / T)
        weights *= m / weights.sum()
        votes = weights[values[near] == int(tokens[t])].sum()
        p = (1 - m) * own[t - 1, tokens[t]] + votes
        np.testing.assert_allclose([v.weight for v in token.votes], np.sort(weights)[::-1], atol=2e-3)
        np.testing.assert_allclose([token.probability, token.share, token.memory], [p, votes / p, m], atol=2e-3)
        agreeing = sum(vote.weight for vote in token.votes if vote.agrees)
        np.testing.assert_allclose(agreeing, votes, atol=2e-3)
    assert max(token.share for token in traced) > 0.9 and min(token.share for token in traced) < 0.1
    source = traced[29].votes[0].source
    text = TEXTS["faq/two.txt"]
    assert source.document == "faq/two.txt" and source.position in (29, 29 + len(text) // 2)
    assert source.text.endswith(text[19:31]) and source.token == text[30] and source.after == text[31:43]


@pytest.mark.parametrize("cached", [True, False], ids=["with cache", "without cache"])
def test_reads_of_a_generation_are_of_all_its_tokens(cached):
    model = tiny("llama").double()
    handle = attached(model)
    written = generated(handle, use_cache=cached)
    found = dict(handle.reads)
    assert found["0.store"].slots.shape == (1, written.shape[1] - 1, 8)
    with torch.no_grad():
        model(written[:, :-1])
    for name, read in handle.reads.items():
        torch.testing.assert_close(found[name].weights, read.weights, atol=1e-4, rtol=1e-3)
        told = [torch.where(x.weights > 1e-3, x.slots, -1) for x in (found[name], read)]
        assert torch.equal(*told), name
    last = handle.memories[0].sources(found["0.store"], most=1)[-1][0]
    traced = handle.trace(written, first=20, most=8)
    best = max((vote for vote in traced[-1].votes if vote.source.document), key=lambda vote: vote.weight)
    assert best.source.document == last[1].document and best.weight == pytest.approx(last[0], abs=1e-4)


def test_beams_are_traced():
    model = tiny("llama")
    handle = attached(model)
    written = generated(handle, num_beams=3, num_return_sequences=2)
    for row in written:
        traced = handle.trace(row, first=20)
        assert "".join(token.text for token in traced) == Letters().decode(row[20:].tolist())
        assert all(0 <= token.share <= 1 and len(token.votes) <= 3 for token in traced)


def test_votes_of_the_text_itself():
    model = tiny("llama")
    handle = attached(model, shares=(0.1, 0.6))
    text = "abcdefgh abcdefgh abcdefgh"
    traced = handle.trace(ids(text), most=2)
    vote = traced[-1].votes[0]
    assert vote.source.document == "" and vote.agrees and vote.source.token == "h"
    assert text[: vote.source.position + 2].endswith(vote.source.text) and vote.source.position + 1 in (7, 16)
    assert text[vote.source.position + 2 :].startswith(vote.source.after) and vote.source.after


class Bytes:
    """One token per byte of UTF-8, as tokenizers have for rare characters."""

    def decode(self, numbers):
        return bytes(numbers).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "é \N{SNOWMAN}\N{GRINNING FACE} x", "\N{GRINNING FACE}" * 9])
def test_pieces_are_the_text(text):
    found = pieces(Bytes(), list(text.encode()))
    assert "".join(found) == text and len(found) == len(text.encode())


# --- the page ---


class Page(HTMLParser):
    """The tokens of a page, their cards, and every tag and attribute that there is."""

    void = ("meta", "br")

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.attributes = [], [], []
        self.tokens, self.cards, self.prompt, self.between = {}, {}, "", ""
        self.feed(source)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs.items()
        if tag not in self.void:
            self.stack.append((tag, attrs))
        if attrs.get("class") == "t":
            self.tokens[attrs["id"]] = [attrs["style"], "", attrs["tabindex"]]
        if attrs.get("class") == "card":
            self.cards[attrs["id"]] = ""

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        inside = {attrs.get("class"): attrs.get("id") for _, attrs in self.stack}
        if "card" in inside:
            self.cards[inside["card"]] += data
        elif "t" in inside:
            self.tokens[inside["t"]][1] += data
        elif "prompt" in inside:
            self.prompt += data
        elif "text" in inside:
            self.between += data


def shown(handle, written, tmp_path, **options):
    path = mk.show(handle, written, tmp_path / "page.html", prompt=20, **options)
    assert path == tmp_path / "page.html"
    return path.read_text("utf-8")


def test_the_page_has_every_token_and_its_weights(tmp_path):
    model = tiny("llama")
    handle = attached(model)
    written = generated(handle)
    page, traced = Page(shown(handle, written, tmp_path, most=2)), handle.trace(written, first=20, most=2)
    assert page.prompt == Letters().decode(written[0, :20].tolist())
    assert list(page.tokens) == [f"t{number}" for number in range(20, 32)] and len(page.cards) == 12
    for number, token in enumerate(traced, 20):
        style, text, tabindex = page.tokens[f"t{number}"]
        assert text == token.text and tabindex == "0"
        assert float(style.removeprefix("--s:")) == pytest.approx(token.share, abs=6e-4)
        card = page.cards[f"c{number}"]
        assert f"probability {token.probability:.1%}" in card and f"of it from the memory{token.share:.1%}" in card
        assert f"in all tokens{token.memory:.1%}" in card
        for vote in token.votes:
            assert f"{vote.weight:.1%}" in card or vote.weight < 0.001
            assert (vote.source.document or "this text") in card and vote.source.text + vote.source.after in card
        assert card.count("votes for this token") == sum(vote.agrees for vote in token.votes)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    model = tiny("llama")
    source = shown(attached(model), ids(TEXT)[:30], tmp_path)
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "svg"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:|//", source.split("<body>")[0])
    assert "default-src 'none'" in html.unescape(source)
    assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source and '<html lang="en">' in source


def test_what_documents_and_titles_hold_is_escaped(tmp_path):
    model = tiny("llama")
    handle = attached(model, {HOSTILE: (HOSTILE + "\x00\x1b. ") * 6})
    written = ids(HOSTILE * 2)
    source = shown(handle, written, tmp_path, title=HOSTILE)
    page = Page(source)
    assert "script" not in page.tags and "b" in page.tags  # <b> is used, but never with a token's text alone
    assert source.count("<script") == 0 and "\x00" not in source and "\x1b" not in source
    assert HOSTILE in "".join(page.cards.values())
    assert "".join(text for _, text, _ in page.tokens.values()) == (HOSTILE * 2)[20:]


def test_lines_and_removed_records(tmp_path):
    from memkernels._show import page

    vote = mkt.Vote(0.25, True, mkt.Source("a", 3, "x\ny", "y", "z"))
    tokens = [
        mkt.Traced(5, "a\nb", 0.5, 0.5, 0.25, [vote]),
        mkt.Traced(6, "c\n\n", 0.5, 0.0, 0.25, []),
        mkt.Traced(6, "", 0.5, 0.0, 0.25, [mkt.Vote(0.0004, False, None)]),
        mkt.Traced(7, "\ud800", 0.5, 0.0, 0.0, []),
    ]
    source = page("given", tokens, 1, "title")
    source.encode("utf-8")
    found = Page(source)
    assert found.tokens["t1"][1] == "a\N{RETURN SYMBOL}\nb"
    assert found.tokens["t2"][1] == "c\N{RETURN SYMBOL}\N{RETURN SYMBOL}" and found.between == "\n\n"
    assert "x\N{RETURN SYMBOL}yz" in found.cards["c1"] and "25.0%" in found.cards["c1"]
    assert "a removed record" in found.cards["c3"] and "below 0.1%" in found.cards["c3"] and found.tokens["t3"][1]
    assert "No record was read" in found.cards["c4"]


def test_refusals_write_nothing(tmp_path):
    path, text = tmp_path / "page.html", ids(TEXT)
    model = tiny("llama")
    with pytest.raises(TypeError, match="show: attachment must be what attach returned, got LlamaForCausalLM"):
        mk.show(model, text, path)
    handle = mkt.attach(model, mkt.Streaming(layers=[1], mem_size=4, heads=4))
    with pytest.raises(ValueError, match="a memory must have records that vote .* got Streaming"):
        mk.show(handle, text, path)
    handle.detach()
    handle = attached(model)
    with pytest.raises(ValueError, match=r"first must lie in 1\.\.71, got 72"):
        mk.show(handle, text, path, prompt=72)
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        mk.show(handle, text, path, most=0)
    with pytest.raises(ValueError, match="ids must be of at least 2 tokens, got 1"):
        mk.show(handle, text[:1], path)
    with pytest.raises(ValueError, match=r"ids must be of one text, \[T\] or \[1, T\], got \[2, 36\]"):
        mk.show(handle, text.view(2, 36), path)
    with handle.disabled(), pytest.raises(ValueError, match="got an attachment that is disabled"):
        mk.show(handle, text, path)
    assert not path.exists()
