"""Memory maps: two addresses that are the same bytes of a file are the same memory."""

from __future__ import annotations

import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, adam_step
from snapshots import refused, use_buffers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which file is mapped where")

SIZE = 1500  # elements: more than a page, so that maps begin at several places of their file

Mapped = Callable[..., np.ndarray]  # (offset in elements, further arguments of np.memmap)


@pytest.fixture
def mapped(tmp_path: Path) -> Mapped:
    """Makes maps of one file."""
    path = tmp_path / "file"
    np.ones(10 * SIZE, np.float32).tofile(path)

    def new_map(first: int = 0, mode: Any = "r+") -> np.ndarray:
        return np.memmap(path, np.float32, mode, offset=4 * first, shape=(SIZE,))

    return new_map


@pytest.mark.parametrize("first", [0, 1, SIZE - 1])
@pytest.mark.parametrize("form", [np.asarray, lambda array: array[:], lambda array: array.reshape(5, -1)])
def test_params_in_the_same_bytes_are_refused(mapped: Mapped, first: int, form: Any) -> None:
    params = [form(mapped(2 * SIZE)), np.ones(3), form(mapped(2 * SIZE + first))]
    with refused(ValueError, r"^params\[2\] shares memory with params\[0\]\.", None, params):
        Adam(params)
    opt = Adam(params[:2])
    with refused(ValueError, r"^param_groups\[1\]\['params'\] shares memory with params\[0\]\.", opt, params):
        opt.add_param_group({"params": params[2]})


@pytest.mark.parametrize("first", [0, 1, SIZE - 1])
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_grads_in_the_same_bytes_are_refused(mapped: Mapped, first: int, mode: str) -> None:
    param, grad = mapped(SIZE), mapped(SIZE + first, mode)
    opt = Adam({"w": param})
    with refused(ValueError, r"^grad for params\['w'\] shares memory with params\['w'\]", opt, param):
        opt.step({"w": grad})
    if mode != "r":
        opt.grads = {"w": grad}
        with refused(ValueError, r"^grad for params\['w'\] shares memory with params\['w'\]", opt, param):
            opt.zero_grad()
    averages = [np.zeros(SIZE, np.float32) for _ in range(2)]
    with refused(ValueError, "^grad shares memory with param,", None, param, averages):
        adam_step(param, grad, *averages, step=1)
    with refused(ValueError, "^exp_avg shares memory with param.", None, param, averages):
        adam_step(param, averages[0], mapped(SIZE + first), averages[1], step=1)


def test_other_bytes_are_taken(mapped: Mapped, tmp_path: Path) -> None:
    """Neighbours in one file, and the same place in another one."""
    other = np.memmap(tmp_path / "other", np.float32, "w+", shape=(SIZE,))
    params = [mapped(SIZE), mapped(2 * SIZE), other]
    opt = Adam(params)
    for _ in range(2):  # maps of its own in each step
        opt.step([mapped(0), mapped(3 * SIZE), mapped(0, "r")])
    adam_step(params[0], mapped(0), mapped(4 * SIZE), mapped(5 * SIZE), step=1)


@pytest.mark.slow
def test_files_of_one_number_on_two_file_systems_are_taken(tmp_path: Path) -> None:
    if not shutil.which("mount"):
        pytest.skip("no mount")
    mount = ["mount", "-t", "tmpfs", "tmpfs"]
    folders = [tmp_path / name for name in "ab"]
    mounted = []
    try:
        for folder in folders:
            folder.mkdir()
            if subprocess.run([*mount, folder], capture_output=True).returncode:
                pytest.skip("mount needs root")
            mounted.append(folder)
        paths = [folder / "file" for folder in folders]
        params = [np.memmap(path, np.float32, "w+", shape=(SIZE,)) for path in paths]
        assert len({path.stat().st_ino for path in paths}) == 1
        Adam(params).step([np.ones(SIZE, np.float32)] * 2)
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", folder], check=True)  # it goes when its maps are gone


def test_private_copies_are_taken(mapped: Mapped) -> None:
    """What is written to a copy-on-write map does not reach the file."""
    params = [mapped(0, "c"), mapped(0, "c"), mapped(0)]
    Adam(params).step([np.ones(SIZE, np.float32)] * 3)
    assert mapped(0)[0] == np.float32(0.999)


@pytest.mark.parametrize("call", [Adam.step, use_buffers], ids=["step", "zero_grad"])
def test_a_file_that_is_mapped_after_the_first_step_is_noticed(mapped: Mapped, call: Any) -> None:
    param, first = mapped(0), mapped(SIZE)  # first stays: else the next map lies where it was
    opt = Adam(param)
    call(opt, first)
    with refused(ValueError, "^grad for params shares memory with params", opt, param):
        call(opt, mapped(1))
    call(opt, mapped(2 * SIZE))


@pytest.fixture
def shared() -> Iterator[list[SharedMemory]]:
    """Two handles of the same shared memory."""
    first = SharedMemory(create=True, size=8 * SIZE)
    second = SharedMemory(name=first.name)
    yield [first, second]
    for handle in (second, first):
        handle.close()
    first.unlink()


def test_shared_memory_by_its_name(shared: list[SharedMemory]) -> None:
    one, same = (np.ndarray((SIZE,), np.float32, handle.buf) for handle in shared)
    behind = np.ndarray((SIZE,), np.float32, shared[1].buf, offset=4 * SIZE)
    one[:], behind[:] = 1, 2
    with refused(ValueError, r"^params\[1\] shares memory with params\[0\]\.", None, one):
        Adam([one, same])
    opt = Adam(one)
    with refused(ValueError, "^grad for params shares memory with params", opt, one):
        opt.step(same)
    opt.step(behind)
    assert same[0] == np.float32(0.999)
    del one, same, behind, opt  # before the handles are closed


def test_views_of_a_memoryview_of_a_map(mapped: Mapped, tmp_path: Path) -> None:
    mapped(0)
    arrays = []
    for _ in range(2):
        with open(tmp_path / "file", "r+b") as file:
            arrays.append(np.frombuffer(memoryview(mmap.mmap(file.fileno(), 0)), np.float32))
    with refused(ValueError, r"^params\[1\] shares memory with params\[0\]\.", None, arrays):
        Adam(arrays)
