"""The examples in the docstrings are run as they stand; test_readme.py runs those of the README."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["fused_adam", "fused_adam.adam", "fused_adam.functional"])
def test_examples_of_docstrings(name):
    failures, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failures == 0


def test_every_public_name_has_a_docstring():
    package = importlib.import_module("fused_adam")
    public = [getattr(package, name) for name in package.__all__ if not name.startswith("__")]
    members = [member for item in public for name, member in vars(item).items() if not name.startswith("_")]
    described = [*public, *(m for m in members if callable(m) or isinstance(m, property))]
    assert len(described) > 12
    assert [item for item in described if not item.__doc__] == []
