"""Arrays of more than 2**31 elements, without the memory for them.

One small piece of memory, the tile, is mapped many times side by side. A step on one thread goes from the
first element to the last, so each element of the tile is updated once for every time that it is mapped: what
as many steps on the tile alone give, all with the same step number. A size or an index that is cut to 32 bits
gives other counts, or an address where nothing is mapped, which ends the process: it is one of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable

import numpy as np
import pytest

from cases import DEFAULTS, OPTIONS, Arrays, assert_same_bits, random_arrays
from fused_adam import Adam

pytestmark = pytest.mark.slow

PAGE = mmap.PAGESIZE
TILE_BYTES = 1025 * PAGE  # odd, so that an index that is wrong by a power of two is another one of the tile
TILE = TILE_BYTES // 4  # elements of float32

MORE = 1003  # no multiple of a vector, and fewer than a tile
HUGE = 2**31 + MORE
MAPPED_SIZE = 2 * HUGE  # elements; what lies behind HUGE is not touched, as each page of it takes time
MAPPED = -(-MAPPED_SIZE // TILE) * TILE_BYTES  # bytes, for each array

# With these a second update of an element changes nothing, so that threads may do them in any order.
IDEMPOTENT = {**DEFAULTS, "lr": 0.0, "betas": (0.0, 0.0)}
# Here each one counts: the parameter goes on and on.
COUNTING = {**OPTIONS["plain-beta1=0.9"], "lr": 1e-4}


class Unavailable(Exception):
    """This system cannot map as much."""


def tiled(tile: np.ndarray) -> np.ndarray:
    """An array of MAPPED_SIZE elements, all in the memory of a copy of `tile`; nothing lies beside it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def map_at(address: int | None, size: int, access: int, flags: int, file: int) -> int:
        mapped = libc.mmap(address, size, access, flags, file, 0)
        if mapped in (None, ctypes.c_void_p(-1).value):
            raise Unavailable(f"mmap: {os.strerror(ctypes.get_errno())}")
        return int(mapped)

    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    shared, fixed = mmap.MAP_SHARED, 0x10
    # As much before and behind it without access: where an index that has become negative leads.
    begin = map_at(None, 3 * MAPPED, 0, nothing, -1) + MAPPED
    file = os.memfd_create("tile")
    try:
        os.pwrite(file, tile.tobytes(), 0)
        for address in range(begin, begin + MAPPED, TILE_BYTES):
            map_at(address, TILE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, shared | fixed, file)
    finally:
        os.close(file)
    return np.frombuffer((ctypes.c_char * (4 * MAPPED_SIZE)).from_address(begin), np.float32)


# --- What runs in a process of its own --------------------------------------------------------------


def without_maximum(four: Iterable[np.ndarray]) -> Arrays:
    return Arrays(*four)


def assert_same_tile(huge: Arrays, expected: Arrays) -> None:
    for name, array, wanted in list(zip(Arrays._fields, huge, expected, strict=True))[:4]:
        assert_same_bits(array[:TILE], wanted, name)


def one_thread(huge: Arrays, expected: Arrays) -> None:
    whole_tiles, rest = divmod(HUGE, TILE)
    for _ in range(whole_tiles):
        expected.step(COUNTING, 3)
    without_maximum(array[:rest] for array in expected[:4]).step(COUNTING, 3)
    without_maximum(array[:HUGE] for array in huge[:4]).step(COUNTING, 3)
    assert_same_tile(huge, expected)


def two_threads(huge: Arrays, expected: Arrays) -> None:
    expected.step(IDEMPOTENT, 1)
    without_maximum(array[:HUGE].reshape(-1, 3) for array in huge[:4]).step(IDEMPOTENT, 1, max_threads=2)
    assert_same_tile(huge, expected)


def overlap(huge: Arrays, expected: Arrays) -> None:
    """In their last element and the first one of another; nothing is stepped."""
    first, second = huge.param[:HUGE], huge.param[HUGE - 1 : 2 * HUGE - 1]
    others = [array[:HUGE] for array in huge[1:4]]
    for arrays, message in (
        ([first, second, *others[1:]], "grad shares memory with param"),
        ([second, first, *others[1:]], "grad shares memory with param"),
        ([first, others[0], second, others[2]], "exp_avg shares memory with param"),
        ([second, others[0], others[1], first], "exp_avg_sq shares memory with param"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            without_maximum(arrays).step(COUNTING, 1)
    assert_same_tile(huge, expected)


def optimizer(huge: Arrays, expected: Arrays) -> None:
    """Its moments are zeros that nobody touches: they take addresses, but no memory."""
    param, grad = huge.param[:HUGE], huge.grad[:HUGE]
    try:
        opt = Adam(param, num_threads=1)
    except MemoryError:
        raise Unavailable("the moments of so large a parameter cannot be promised") from None
    entry = opt.state[0]
    assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == (HUGE,)
    assert abs(entry["exp_avg_sq"].ctypes.data - entry["exp_avg"].ctypes.data) >= 4 * HUGE
    assert entry["exp_avg"][-1] == entry["exp_avg_sq"][-1] == 0
    for bad, message in (
        (huge.param[HUGE - 1 :][:HUGE], "grad for params shares memory with params"),
        (entry["exp_avg"], "grad for params shares memory with the state of params"),
        (grad[:-1], rf"grad for params has shape \({HUGE - 1},\), but params has \({HUGE},\)"),
        (huge.grad[: HUGE + 2**31], "grad for params has shape"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            opt.step(bad)
    assert opt.state[0]["step"] == 0
    assert_same_tile(huge, expected)

    opt.grads = grad
    opt.zero_grad()  # the last byte that it clears is in the middle of a tile
    expected.grad[...] = 0
    assert_same_tile(huge, expected)


FUNCTIONS = (one_thread, two_threads, overlap, optimizer)


def child() -> None:
    """All of them on the same arrays: what takes time is the first touch of each page."""
    try:
        huge = without_maximum(map(tiled, random_arrays(TILE, np.float32)[:4]))
    except (Unavailable, OSError) as error:
        print(f"unavailable: {error}")
        return
    for function in FUNCTIONS:
        try:
            function(huge, without_maximum([array[:TILE].copy() for array in huge[:4]]))
            print(f"{function.__name__}: done", flush=True)
        except Unavailable as error:
            print(f"{function.__name__}: unavailable: {error}", flush=True)
        except (Exception, pytest.fail.Exception):
            print(f"{function.__name__}: {traceback.format_exc()!r}", flush=True)


# --- The tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    """What each function of the process said: "done", if nothing is wrong."""
    if not hasattr(os, "memfd_create") or sys.maxsize < 2**60:
        pytest.skip("maps memory of a memfd (Linux) into 64 bits of addresses")
    here = os.path.dirname(__file__)
    process = subprocess.run(
        [sys.executable, "-c", "import test_huge; test_huge.child()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = dict(line.split(": ", 1) for line in process.stdout.splitlines())
    if "unavailable" in found:
        pytest.skip(f"cannot map so much memory: {found['unavailable']}")
    end = f"exit status {process.returncode}, {process.stderr}"
    if process.returncode < 0:
        end = f"died of {signal.Signals(-process.returncode).name}"
    return {function.__name__: found.get(function.__name__, end) for function in FUNCTIONS}


@pytest.mark.parametrize("function", [function.__name__ for function in FUNCTIONS])
def test_huge(function: str, report: dict[str, str]) -> None:
    if report[function].startswith("unavailable"):
        pytest.skip(report[function])
    assert report[function] == "done"
