"""Every public call with every argument wrong: one table, and a world that its rows must leave alone.

Other tests take the kinds of defects one by one, and look at what the call was given. Here a row may break
anything of the world beforehand; the call must be refused with a message that names the place, and then
*everything* is compared, also what the call had nothing to do with. At the end the breakage is undone, and
all goes on as in a twin of the world that never saw it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refusals.arrays import array_rows, change_rows, overlap_rows
from refusals.checkpoints import file_rows, state_rows
from refusals.options import option_rows
from refusals.structure import structure_rows
from refusals.table import CALLS, Row
from refusals.world import Backup, Facts, World
from snapshots import assert_same_bits

ROWS = [
    *array_rows(),
    *overlap_rows(),
    *change_rows(),
    *option_rows(),
    *structure_rows(),
    *state_rows(),
    *file_rows(),
]


def as_parameter(row: Row) -> Any:
    return pytest.param(row, id=f"{row.call}: {row.id}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file in "kept" that no row may change."""
    path = tmp_path_factory.mktemp("world")
    world = World(path)
    world.path.parent.mkdir()
    world.opt.save(world.path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    """Of a twin of the world that sees no row."""
    return [copy.deepcopy(as_arrays(result)) for result in World(folder).go_on()]


@pytest.mark.parametrize("row", [as_parameter(row) for row in ROWS])
def test_refuses(row: Row, folder: Path, expected: list[Any]) -> None:
    world = World(folder)
    path, content = world.path, world.path.read_bytes()
    try:
        check(row, world, expected)
    finally:
        path.write_bytes(content)  # or all rows after one that fails would fail, too


def check(row: Row, world: World, expected: list[Any]) -> None:
    good, backup = Facts(world, addresses=False), Backup(world)
    row.change(world)
    broken = Facts(world)
    with pytest.raises(row.error, match=rf"(?s)^(\[Errno .*\] )?{row.message}") as caught:
        CALLS[row.call](world)
    assert type(caught.value) is row.error, "a subclass of the promised error"
    Facts(world).assert_same_as(broken)
    assert not list(world.folder.rglob("*.tmp")), "a file was left behind"

    backup.restore()
    Facts(world, addresses=False).assert_same_as(good)
    for actual, wanted in zip(world.go_on(), expected, strict=True):
        assert_same_bits(as_arrays(actual), wanted)


def as_arrays(tree: Any) -> Any:
    """Step counts, too."""
    if isinstance(tree, dict):
        return {key: as_arrays(child) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [as_arrays(child) for child in tree]
    return np.asarray(tree)


def test_the_table_has_each_row_once() -> None:
    ids = [(row.call, row.id) for row in ROWS]
    assert len(set(ids)) == len(ids) >= 1300
    assert {row.call for row in ROWS} == CALLS.keys()
