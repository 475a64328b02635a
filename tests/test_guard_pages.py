"""No byte outside of the arrays is read or written: they lie against pages that nobody may touch.

A step that goes one element too far ends the process there, so all steps run in processes of their own.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cases import (
    CODED,
    DTYPES,
    OPTIONS,
    STREAMS,
    Arrays,
    all_isas,
    assert_same_arrays,
    assert_same_bits,
    each_isa,
    random_arrays,
)
from fused_adam import Adam

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="protects pages with mprotect")

PAGE = mmap.PAGESIZE
NO_ACCESS, READ_ONLY = 0, 1  # PROT_NONE, PROT_READ
FILLING = 0xA5  # of memory beside the arrays

# Every kernel, both forms of the average of the gradient, and the decay that has no kernel of its own.
FORMS = (
    "plain-beta1=0.9",
    "l2-beta1=0.3",
    "decoupled-beta1=0.9",
    "plain-amsgrad-beta1=0.3",
    "l2-amsgrad-beta1=0.9",
    "decoupled-amsgrad-beta1=0.9",
    "ema=0.3",
    "ema=0.9-l2-amsgrad-maximize",
)
WIDTH = 16  # elements of the widest vector
SMALL = (*range(2 * WIDTH + 2), 63, 64, 65, 127, 1001)
LARGE = 600_011  # as in test_slicing.py: enough for threads to be started and woken
THREADS = 3

# Where the arrays of a step, in turn, lie: "<" begins after a page without access, ">" ends before one.
PLACEMENTS = (">", "<", "><", "<>")


class Region:
    """Memory between two pages without access, large enough for one array."""

    def __init__(self, like: np.ndarray) -> None:
        size = max(1, -(-like.nbytes // PAGE)) * PAGE
        whole = np.frombuffer(mmap.mmap(-1, size + 2 * PAGE), np.uint8)
        self.bytes = whole[PAGE : PAGE + size]
        protect(whole[:PAGE], NO_ACCESS)
        protect(whole[PAGE + size :], NO_ACCESS)

    def place(self, values: np.ndarray, side: str) -> np.ndarray:
        """A copy of the values at one end, and the filling around it."""
        self.bytes[...] = FILLING
        start = 0 if side == "<" else self.bytes.size - values.nbytes
        array = self.bytes[start : start + values.nbytes].view(values.dtype)
        array[...] = values
        return array

    def assert_clean(self, array: np.ndarray, side: str) -> None:
        """Besides the array nothing was written; afterwards the array is filled, too."""
        array.view(np.uint8)[...] = FILLING
        assert (self.bytes == FILLING).all(), f"bytes beside an array at {side} were written"


def regions_for(arrays: Arrays) -> list[Region]:
    return [Region(array) for array in arrays]


def placed(regions: list[Region], arrays: Arrays, placement: str) -> Arrays:
    """Copies of the arrays, each in its region."""
    sides = itertools.cycle(placement)
    return Arrays(*(region.place(a, next(sides)) for region, a in zip(regions, arrays, strict=True)))


def assert_all_clean(regions: list[Region], arrays: Arrays, placement: str) -> None:
    sides = itertools.cycle(placement)
    for region, array in zip(regions, arrays, strict=True):
        region.assert_clean(array, next(sides))


def protect(memory: np.ndarray, access: int) -> None:
    """What may be done from now on to whole pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


# --- What runs in a process of its own --------------------------------------------------------------

Log = Callable[[str], object]


def steps(
    log: Log,
    isa: str,
    sizes: Iterable[int],
    threads: int = 1,
    forms: Sequence[str] = FORMS,
    placements: Sequence[str] = PLACEMENTS,
) -> None:
    for dtype in (*DTYPES, *CODED):
        for size in sizes:
            start = random_arrays(size, dtype)
            regions = regions_for(start)
            for form in forms:
                expected = start.copy()  # from ordinary memory
                expected.step(OPTIONS[form], 3, isa)
                for placement in placements:
                    log(f"{dtype.__name__}, {size} elements, {form}, placed {placement}")
                    arrays = placed(regions, start, placement)
                    arrays.step(OPTIONS[form], 3, isa, threads)
                    assert_same_arrays(arrays, expected)
                    assert_all_clean(regions, arrays, placement)


def small(log: Log, isa: str) -> None:
    steps(log, isa, SMALL)


def whole_pages(log: Log, isa: str) -> None:
    """Pages without access on both sides of each array, for one of the dtypes or for both."""
    steps(log, isa, (PAGE // 8, PAGE // 4, 3 * PAGE // 8, PAGE))


def several_threads(log: Log, isa: str) -> None:
    steps(log, isa, (LARGE,), THREADS, FORMS[-2:], PLACEMENTS[:2])


def no_more_than_needed(log: Log, isa: str) -> None:
    """A gradient that cannot be written; streams that no option asks for, which cannot even be read."""
    for dtype in (*DTYPES, *CODED):
        for form in FORMS:
            log(f"{dtype.__name__}, {form}")
            start = random_arrays(1001, dtype)
            regions = regions_for(start)
            by_name = dict(zip(Arrays._fields, regions, strict=True))
            arrays = placed(regions, start, PLACEMENTS[0])
            expected = start.copy()
            expected.step(OPTIONS[form], 3, isa)
            protect(by_name["grad"].bytes, READ_ONLY)
            for stream in STREAMS:
                if stream.option is not None and not OPTIONS[form][stream.option]:
                    protect(by_name.pop(stream.name).bytes, NO_ACCESS)
            arrays.step(OPTIONS[form], 3, isa)
            for name in by_name:
                assert_same_bits(getattr(arrays, name), getattr(expected, name), name)


def optimizer(log: Log, isa: str) -> None:
    """Adam checks, steps and zeroes; its own moments are where it wants them."""
    for dtype in (*DTYPES, *CODED):
        for placement in ("<>", "><", ">>", "<<"):
            log(f"{dtype.__name__}, placed {placement}")
            start = [random_arrays(size, dtype) for size in SMALL]
            regions = [(Region(one.param), Region(one.grad)) for one in start]
            params, grads, expected = [], [], [one.param.copy() for one in start]
            for one, (first, second) in zip(start, regions, strict=True):
                params.append(first.place(one.param, placement[0]))
                grads.append(second.place(one.grad, placement[1]))
            opt, twin = Adam(params, amsgrad=True), Adam(expected, amsgrad=True)
            for _ in range(2):
                opt.grads = grads
                opt.step()
                twin.step([one.grad for one in start])
            opt.zero_grad()
            for one, param, grad, (first, second) in zip(expected, params, grads, regions, strict=True):
                assert_same_bits(param, one)
                assert not grad.any()
                first.assert_clean(param, placement[0])
                second.assert_clean(grad, placement[1])


def stored_moments(log: Log, isa: str) -> None:
    """Moments in fewer bytes, and their exponents: kernels of blocks, whose last one is not whole."""
    from test_stored_moments import Moment, Scene, options_for, scene

    sizes = (1, 15, 17, 31, 33, 127, 128, 129, 255, 300, 513, 1001)
    for state_dtype, dtype in itertools.product(("bfloat16", "float8"), (np.float32, *CODED)):
        for size, form, placement in itertools.product(sizes, FORMS, PLACEMENTS[:2]):
            log(f"{state_dtype}, {np.dtype(dtype).name}, {size} elements, {form}, placed {placement}")
            start = scene(size, dtype, state_dtype)
            options = options_for(form, state_dtype)
            expected = start.copy()
            expected.step(options, 3, isa)
            pieces: list[tuple[Region, np.ndarray]] = []

            def put(array: np.ndarray | None, placement: str = placement) -> np.ndarray | None:
                if array is None:
                    return None
                region = Region(array)
                pieces.append((region, region.place(array, placement)))  # noqa: B023
                return pieces[-1][1]  # noqa: B023

            arrays = Scene(
                *(Moment(*map(put, one)) if isinstance(one, Moment) else put(one) for one in start)
            )
            arrays.step(options, 3, isa)
            for found, wanted in zip(arrays, expected, strict=True):
                pairs = zip(found, wanted, strict=True) if isinstance(found, Moment) else [(found, wanted)]
                for a, b in pairs:
                    assert a is None or a.tobytes() == b.tobytes()
            for region, array in pieces:
                region.assert_clean(array, placement)


def one_too_far(log: Log, isa: str) -> None:
    """Not an array that anybody could have: its last element lies in the page without access."""
    arrays = random_arrays(2 * WIDTH, np.float32)
    regions = regions_for(arrays)
    inside = placed(regions, arrays, ">")
    address = inside.grad.ctypes.data + inside.grad.itemsize
    log("a gradient that is one element too far")
    beyond = np.frombuffer((ctypes.c_char * inside.grad.nbytes).from_address(address), np.float32)
    inside._replace(grad=beyond).step(OPTIONS[FORMS[0]], 3, isa)


def child(isa: str, log_path: str, *functions: str) -> None:
    """The log holds the case that runs: what there is to read when the process is no more."""
    log_file = os.open(log_path, os.O_WRONLY | os.O_CREAT)
    for name in functions:
        globals()[name](lambda case, name=name: os.pwrite(log_file, f"{name}: {case:100}".encode(), 0), isa)
    print("done")


# --- The tests --------------------------------------------------------------------------------------


def run(isa: str, folder: Path, *functions: str) -> tuple[str, str]:
    """How a process with these functions ended ("done", if nothing is wrong), and its last case."""
    log = folder / "case"
    here = os.path.dirname(__file__)
    code = "import sys, test_guard_pages; test_guard_pages.child(*sys.argv[1:])"
    process = subprocess.run(
        [sys.executable, "-c", code, isa, str(log), *functions],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
            "FUSED_ADAM_ISA": isa,  # of the class Adam
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    case = log.read_text().strip() if log.exists() else "before the first case"
    if process.returncode < 0:
        return f"died of {signal.Signals(-process.returncode).name}", case
    return process.stdout.strip() if process.returncode == 0 else process.stderr, case


@each_isa
def test_stays_inside(isa: str, tmp_path: Path) -> None:
    functions = (small, whole_pages, several_threads, no_more_than_needed, optimizer, stored_moments)
    end, case = run(isa, tmp_path, *(function.__name__ for function in functions))
    assert end == "done", f"{isa}, {case}: {end}"


def test_one_element_too_far_would_be_noticed(tmp_path: Path) -> None:
    """Otherwise the test above would pass whatever a step does."""
    end, case = run(all_isas()[0], tmp_path, one_too_far.__name__)
    assert end in ("died of SIGSEGV", "died of SIGBUS")
    assert case == "one_too_far: a gradient that is one element too far"
