"""What `make docs` adds to the pages of docs/ (hooks of MkDocs, named in mkdocs.yml).

- Pages that live elsewhere: CONTRIBUTING.md, CHANGELOG.md, and one page per script of examples/. Links between files of
  the repository become links between pages.
- The API reference: one page per public module, one entry per name of its ``__all__``, from the docstrings.
- Formulas: MathML, made from the ``math`` fences at build time, so that no page needs a script or a network for them.
"""

from __future__ import annotations

import ast
import importlib
import posixpath
import re
from functools import partial
from pathlib import Path

import griffe
from latex2mathml.converter import convert

from docs import generate

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# file of the repository -> page of the site; those of docs/ keep their path
ELSEWHERE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ELSEWHERE |= {f"examples/{script.name}": f"examples/{script.stem}.md" for script in EXAMPLES}
API = {"memkernels": "api/memkernels.md"}
API |= {f"memkernels.{module}": f"api/{module}.md" for module in ("nn", "models", "store", "testing")}
API["memkernels.integrations.transformers"] = "api/transformers.md"
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


def relinked(text: str, source: str, page: str) -> str:
    """``text`` of the file ``source`` of the repository with its links as the site needs them on ``page``."""

    def link(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        there = ELSEWHERE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return LINK.sub(link, text)


def example(script: Path) -> str:
    """The page of a script of examples/: what its docstring says, then the code below it."""
    source = script.read_text()
    tree = ast.parse(source)
    says = ast.get_docstring(tree)
    code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip()
    title = re.split("[:,.]", says)[0]
    return f"# {title}\n\n{says}\n\n## The script\n\n```python\n{code}\n```\n"


def public(module: str) -> list[str]:
    """Every public name of a module."""
    return list(importlib.import_module(module).__all__)


def api(module: str) -> str:
    """The page of a public module."""
    lines = [f"# {module}", "", importlib.import_module(module).__doc__.strip().partition("\n")[0], ""]
    for heading, names in grouped(module).items():
        lines += [f"## {heading}", ""] if heading else []
        for name in names:
            lines += [f"::: {module}.{name}", "" if heading else "    options: {heading_level: 2}", ""]
    return ROLE.sub(r"`\1`", "\n".join(lines))


def grouped(module: str) -> dict[str, list[str]]:
    """heading -> public names. Operations stand under the title of the page that explains them, in their order."""
    names = public(module)
    if module != "memkernels":
        return {"": names}
    operations = [name for name in names if name in importlib.import_module("memkernels.ops").__all__]
    pages = {name: generate.page_of(name.removesuffix("_")) for name in operations}
    explained = [name for name in operations if pages[name] is not None]
    groups: dict[str, list[str]] = {}
    for name in sorted(explained, key=lambda name: generate.navigation().index(pages[name].stem)):
        groups.setdefault(pages[name].read_text().partition("\n")[0].removeprefix("# "), []).append(name)
    making = [name for name in operations if pages[name] is None]
    groups |= {"In the making": making} if making else {}
    return {**groups, "Choosing a backend": ["use_backend"], "Seeing what a memory gives": ["show"]}


def formula(source, language, css_class, options, md, **_) -> str:
    """A ``math`` fence as MathML."""
    understood = source.replace("{aligned}", "{align*}")
    return f'<div class="{css_class}" data-search-exclude>{convert(understood, display="block")}</div>'


def on_files(files, config):
    from mkdocs.structure.files import File

    contents = {page: relinked((ROOT / source).read_text(), source, page) for source, page in ELSEWHERE.items()}
    contents |= {ELSEWHERE[f"examples/{script.name}"]: example(script) for script in EXAMPLES}
    contents |= {page: api(module) for module, page in API.items()}
    for page, content in contents.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    path = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, f"docs/{path}", path)


class Docstrings(griffe.Extension):
    """Reads docstrings as they are written here: roles of Sphinx become links, each argument and field an entry.
    A public name that is both a module and the function in it means the function."""

    def __init__(self):
        self.pages = {name: f"{module}.{name}" for module in API for name in public(module)}

    def on_package(self, *, pkg, **_):
        for path in API:
            module = pkg[path.partition(".")[2]] if "." in path else pkg
            found = {name: getattr(module.members[name], "final_target", module.members[name]) for name in public(path)}
            for name, obj in found.items():
                if obj.is_module:
                    module.set_member(name, griffe.Alias(name, obj[name], parent=module))

    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return
        text = ROLE.sub(self.link, obj.docstring.value)
        called = obj.members.get("__init__", obj) if obj.is_class else obj
        names = "|".join(p.name.lstrip("*") for p in called.parameters) if called.is_function else ""
        if names:
            text = re.sub(rf"^( +)((?:{names})\b.*)$", partial(self.entries, names), text, flags=re.MULTILINE)
        if obj.is_class and (fields := "|".join(name for name, member in obj.members.items() if member.is_attribute)):
            text = "\n\n".join(self.fields(fields, paragraph) for paragraph in text.split("\n\n"))
        obj.docstring.value = text

    def fields(self, names: str, paragraph: str) -> str:
        """``reads: a. writes: b.``, the fields of a tuple, as a list."""
        if not re.match(rf"(?:{names}): ", paragraph):
            return paragraph
        return re.sub(rf"(?:^|(?<=\.)\s)({names}): ", r"\n- `\1`: ", paragraph)

    def entries(self, names: str, line: re.Match) -> str:
        """``query: a. keys: b.`` as two lines."""
        return re.sub(rf"\. (?=(?:{names}): )", f".\n{line[1]}", line[0])

    def link(self, role: re.Match) -> str:
        """A link to a public name; the name alone where it is not public."""
        name = role[1].rpartition(".")[2]
        return f"[`{name}`][{self.pages[name]}]" if name in self.pages else f"`{name}`"
