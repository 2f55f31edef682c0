"""The documentation site: built strictly and without a network, with every public name in its API reference."""

from __future__ import annotations

import html
import importlib
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
from support import ROOT

pytest.importorskip("material", reason="the site is built with mkdocs-material (requirements.txt)")
pytest.importorskip("mkdocstrings_handlers.python", reason="the site is built with mkdocstrings (requirements.txt)")
pytest.importorskip("latex2mathml", reason="the site is built with latex2mathml (requirements.txt)")

from docs import generate, site

NAV = re.findall(r": ([\w/]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
# What a page loads by itself. Links that a reader may click are not matched.
LOADED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]*)"|<link\b[^>]*\brel="stylesheet"[^>]*\bhref="([^"]*)"'
)


def build(folder, *options):
    """Build the site into ``folder``. Any access to the network fails, because the proxy does not exist."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, **nowhere, "no_proxy": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_the_navigation_is_there(built):
    assert {"index", "install", "tutorials/memory", "performance", "contributing", "changelog"} <= set(NAV)
    assert not [page for page in NAV if not (built / f"{page}.html").exists()]
    pages = {file.relative_to(built).with_suffix("").as_posix() for file in built.rglob("*.html")} - {"404"}
    assert pages == set(NAV), "every page is reached from the navigation"


@pytest.mark.parametrize("module", site.API)
def test_every_public_name_is_in_the_api_reference(built, module):
    text = (built / site.API[module]).with_suffix(".html").read_text()
    public = importlib.import_module(module)
    parts = re.split(rf'<h\d id="({re.escape(module)}\.\w+)" class="doc doc-heading"', text)
    entries = {name.rpartition(".")[2]: entry for name, entry in zip(parts[1::2], parts[2::2])}
    assert sorted(entries) == sorted(public.__all__)
    functions = [name for name in public.__all__ if inspect.isfunction(getattr(public, name))]
    contents = {name: entry.split("doc-heading")[0] for name, entry in entries.items()}
    mistaken = [name for name in functions if f'doc-function-name">{name}</span>' not in contents[name]]
    assert not mistaken, "shown as the module of that name"


def test_the_reference_shows_signature_and_contract(built):
    text = re.sub(r"<[^>]+>", "", (built / "api" / "memkernels.html").read_text())
    entry = text[text.index("Read a memory: a softmax-weighted sum") :][:6000]
    for word in ("key_scale", "return_lse", "[..., T, V]", "no addressable slot", "ValueError"):
        assert word in entry, word
    assert ":func:" not in text and ":class:" not in text


def test_no_page_loads_anything_from_elsewhere(built):
    for page in built.rglob("*.html"):
        urls = [a or b for a, b in LOADED.findall(page.read_text())]
        assert urls and not [url for url in urls if "//" in url], page.name
    for style in built.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style.name


def test_formulas_are_drawn_without_a_script(built):
    for page in generate.pages()[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        drawn = re.findall(r"<math\b.*?</math>", (built / name).read_text(), re.DOTALL)
        assert len(drawn) == page.read_text().count("```math\n"), name
        words = [html.unescape(re.sub(r"<[^>]+>", "", formula)) for formula in drawn]
        assert not [text for text in words if re.search(r"\\|&|begin", text)], f"{name}: TeX that was not understood"


def test_search_finds_every_operation(built):
    index = json.loads((built / "search" / "search_index.json").read_text())
    titles = {re.sub(r"<[^>]+>", "", entry["title"]) for entry in index["docs"]}
    assert not set(site.public("memkernels")) - titles
    assert (built / "search" / "search_index.js").exists(), "pages that are opened as files read it as a script"


@pytest.mark.parametrize(
    "mistake",
    ["[a page](missing.md)", "[a section](read.md#no-such-section)", "[elsewhere](/absolute.md)"],
)
def test_a_broken_link_fails_the_build(tmp_path, mistake, monkeypatch):
    """On a small site with the configuration of this one."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Start\n\n{mistake}\n")
    (docs / "read.md").write_text("# Reads\n")
    text = (ROOT / "mkdocs.yml").read_text()
    validation = re.search(r"^validation:\n(?: .*\n)+", text, re.MULTILINE)[0]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nstrict: true\n{validation}")
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0 and "warning" in done.stderr.lower(), done.stderr
