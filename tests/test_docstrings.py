"""Docstrings of modules and models: equation, arguments, errors, sources. Pages: no commands of TeX in code spans."""

import inspect
import re

import pytest
from torch import nn as torch_nn

from docs import generate
from memkernels import models, nn

PUBLIC = {name: getattr(package, name) for package in (nn, models) for name in package.__all__}
MODULES = [name for name, value in PUBLIC.items() if inspect.isclass(value) and issubclass(value, torch_nn.Module)]
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]


def absent(function, text: str) -> list[str]:
    """The parameters of ``function`` that ``text`` does not name."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return [name for name in names if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_a_caller_needs(name):
    module = PUBLIC[name]
    text = inspect.getdoc(module)
    assert "``" in text.split("Args:")[0], "the docstring states the equation before the arguments"
    assert not [part for part in ("Args:", "Raises:", "Source:") if part not in text]
    assert not absent(module.__init__, text)
    if "forward" in vars(module):
        text = inspect.getdoc(module.forward)
        assert not [part for part in ("Args:", "Returns:", "Raises:") if part not in text]
        assert not absent(module.forward, text)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_over_slots_says_what_a_caller_needs(name):
    text = inspect.getdoc(PUBLIC[name])
    if ":func:`least_used`" in text:
        text += inspect.getdoc(nn.least_used)
    assert not [part for part in ("Args:", "Returns:") if part not in text]
    assert not absent(PUBLIC[name], text)


@pytest.mark.parametrize("page", generate.pages(), ids=lambda page: page.name)
def test_no_tex_is_shown_as_code(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    tex = [code for code in re.findall(r"`([^`]+)`", prose) if re.search(r"\\[a-z]{2,}", code)]
    assert not tex, "a code span shows the commands of TeX"
