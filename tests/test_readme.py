"""Every Python block of the README is run as it stands, and prints what it says it prints.

FUSED_ADAM_README names other Markdown files (separated as in PATH) whose blocks are run too.
"""

import ast
import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import fused_adam

README = Path(__file__).parent.parent / "README.md"


class Block(NamedTuple):
    name: str
    first_line: int
    code: str


def blocks_of(path):
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(str(path), text.count("\n", 0, match.start(1)), match[1])


def all_blocks():
    others = os.environ.get("FUSED_ADAM_README", "").split(os.pathsep)
    paths = [README, *(Path(path) for path in others if path)]
    return [
        pytest.param(block, id=f"{path.name}:{block.first_line}")
        for path in paths
        for block in blocks_of(path)
    ]


def imported_modules(code):
    """All that a block imports, as far as it is neither Python nor NumPy nor this package itself."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    known = {*sys.stdlib_module_names, "numpy"}
    return [name for name in names if name.partition(".")[0] not in known and name != "fused_adam"]


def names_for_a_fragment():
    """What the one-liners of the README leave out."""
    params = {"w": np.ones(3), "b": np.ones(())}
    grads = {"w": np.array([1.0, -2.0, 0.0]), "b": np.array(0.5)}
    public = {name: getattr(fused_adam, name) for name in fused_adam.__all__}
    return {**public, "np": np, "params": params, "grads": grads}


def test_there_are_blocks():
    codes = [block.code for block in blocks_of(README)]
    assert len(codes) >= 2
    assert README.read_text(encoding="utf-8").count("```python") == len(codes)


@pytest.mark.parametrize("block", all_blocks())
def test_block_of_readme(block, request, capsys, monkeypatch, tmp_path):
    modules = {name: pytest.importorskip(name) for name in imported_modules(block.code)}
    if "torch" in modules:
        # Its threads and ours, each pool spinning while the other works, would take long.
        torch = modules["torch"]
        request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(1)
    # Names of a fragment, a block that imports nothing, are supplied.
    namespace = names_for_a_fragment() if "import " not in block.code else {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    # Empty lines, so that tracebacks have the line numbers of the file.
    exec(compile("\n" * block.first_line + block.code, block.name, "exec"), namespace)
    promised = re.findall(r"^ *print\(.*\) +# (.*)$", block.code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised
