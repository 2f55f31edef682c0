"""The documentation: examples run as written, tables are those of the code, links lead somewhere, no typed figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from promised import SIGNATURES
from support import ROOT

import memkernels as mk
from docs import generate
from memkernels.testing import TOLERANCE

PAGES = [*generate.pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# Results of measurements: ratios, times, rates. Sizes of tiles and caches are not matched.
FIGURE = re.compile(
    r"\b\d+(\.\d+)?\s?(x|times)\s+(as\s+)?(fast|slow|speed|the speed)"
    r"|\b\d+(\.\d+)?x\b"
    r"|\b\d+(\.\d+)?\s?(GB/s|GiB/s|[GT]FLOPS?|[GT]FLOP/s|tokens/s|ms|us|µs|ns|seconds?)\b"
    r"|\b\d+(\.\d+)?\s?%"
)


def sections(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


SNIPPETS = [
    (page, text[: match.start()].count("\n") + 1, match[1])
    for page in PAGES
    for text in [page.read_text()]
    for match in CODE.finditer(text)
]


@pytest.mark.parametrize(
    "page, line, code", SNIPPETS, ids=lambda x: getattr(x, "name", x if isinstance(x, int) else "")
)
def test_examples_run_as_written(page, line, code, capsys):
    """Each alone, without the snippets above it, as a reader who copies it runs it."""
    torch.manual_seed(0)
    exec(compile("\n" * line + code, str(page), "exec"), {})


def commands(text: str) -> list[str]:
    """The lines of a page's shell fences, and the commands in its prose."""
    fences = "\n".join(re.findall(r"^```(?:ba)?sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    prose = re.findall(r"`((?:make|python) [^`]+)`", FENCE.sub("", text))
    return [line.partition("#")[0].strip() for line in (*fences.splitlines(), *prose)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page):
    """Every `make X` is a target, every `python -m X` a module with a command line, every script is there."""
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for line in commands(page.read_text()):
        if made := re.search(r"\bmake ((?:[a-z][\w-]* ?)+)", line):
            assert set(made[1].split()) <= set(targets), line
        if run := re.search(r"\bpython -m ([\w.]+)(?: ([a-z]+)\b)?", line):
            module, word = run.groups()
            if not module.startswith(("memkernels", "bench", "docs")):
                continue
            folder = ROOT.joinpath(*module.split("."))
            file = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
            assert file.exists() and '__name__ == "__main__"' in file.read_text(), line
            if module == "memkernels" and word:
                assert f'add_parser("{word}"' in file.read_text(), line
        if script := re.search(r"\bpython ([\w/]+\.py)", line):
            assert (ROOT / script[1]).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_of_commands_exist(page):
    """Every `--option` of our commands is in the code of that command, or of the modules that it uses."""
    for line in commands(page.read_text()):
        run = re.search(r"\bpython -m ((?:memkernels|bench|docs)[\w.]*)|\bmake gpu-check\b", line)
        if run is None:
            continue
        module = run[1] or "bench.gpu_check"
        folder = ROOT / module.partition(".")[0]
        code = "".join(file.read_text() for file in folder.rglob("*.py"))
        missing = [option for option in re.findall(r"(?<=[ \"])--[a-z][\w-]*", line) if f'"{option}"' not in code]
        assert not missing, line


def test_no_example_is_left_out():
    """All Python is in unindented fences marked as Python, where the test above finds it."""
    for page in PAGES:
        text = page.read_text()
        assert len(re.findall(r"```\s*(?:python|py|pycon)\b", text)) == len(CODE.findall(text)), page.name
        unnamed = [block for block in FENCE.findall(text) if block.startswith("```\n")]
        assert not [block for block in unnamed if "import " in block], page.name


def test_generated_blocks_are_up_to_date():
    if generate.result_files():
        pytest.importorskip("matplotlib")
    assert not generate.stale(), "run: python -m docs.generate"


def test_readme_has_the_table_and_the_picture():
    assert set(generate.blocks((ROOT / "README.md").read_text())) == {"ops", "speed"}
    assert set(generate.blocks((ROOT / "docs" / "index.md").read_text())) == {"speed"}
    assert set(generate.blocks((ROOT / "docs" / "operations.md").read_text())) == {"ops"}
    assert set(generate.blocks((ROOT / "docs" / "store.md").read_text())) == {"store", "crash"}
    blocks = set(generate.blocks((ROOT / "docs" / "performance.md").read_text()))
    assert blocks == {"performance", "ladder", "limits", "everyday"}


def test_the_tolerance_table_is_that_of_the_checker():
    text = (ROOT / "docs" / "testing.md").read_text()
    assert not [d for d, tolerance in TOLERANCE.items() if f"| {str(d)[6:]} | {tolerance} |" not in text]


@pytest.mark.parametrize("name", [n for n in SIGNATURES if not n.endswith("_")])
def test_every_op_has_a_section(name):
    assert generate.page_of(name) is not None


@pytest.mark.parametrize("name", [*SIGNATURES, "show", "use_backend"])
def test_every_public_name_is_documented(name):
    assert any(f"`{name}" in page.read_text() or f"{name}(" in page.read_text() for page in generate.pages())


@pytest.mark.parametrize("name", [*mk.nn.__all__, *mk.models.__all__])
def test_every_module_and_model_is_documented(name):
    text = "".join((ROOT / "docs" / page).read_text() for page in ("models.md", "lookup.md"))
    assert f"`{name}`" in text or f"{name}(" in text


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {index.parent / target.partition("#")[0] for target in LINK.findall(index.read_text())}
    assert set(generate.pages()[1:]) - {index} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there: Path = (page.parent / path) if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in sections(there.read_text()), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_performance_figure_is_typed(page):
    text = generate.BLOCK.sub("", page.read_text())
    found = [match[0] for match in FIGURE.finditer(FENCE.sub("", text))]
    assert not found, f"{page.name}: {found}; figures come from python -m docs.generate"
