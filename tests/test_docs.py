"""The examples in the docstrings and in the README are run as they stand."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", ["fused_adam", "fused_adam.adam", "fused_adam.functional"])
def test_examples_of_docstrings(name):
    failures, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failures == 0


def test_example_of_readme(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "import numpy" in block]
    promised = re.search(r"print\(.*\) +# (.*)", example)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == promised.group(1)


def test_every_public_name_has_a_docstring():
    package = importlib.import_module("fused_adam")
    public = [getattr(package, name) for name in package.__all__ if not name.startswith("__")]
    members = [member for item in public for name, member in vars(item).items() if not name.startswith("_")]
    described = [*public, *(m for m in members if callable(m) or isinstance(m, property))]
    assert len(described) > 12
    assert [item for item in described if not item.__doc__] == []
