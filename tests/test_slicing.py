"""The bits do not depend on threads, on how arrays are split and packed, or on the caller's float mode."""

import contextlib
import ctypes
import functools
import itertools
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from cases import (
    OPTIONS,
    assert_same_arrays,
    assert_same_bits,
    awkward_sizes,
    drawn,
    each_dtype,
    each_form,
    each_isa,
    empty_at,
    offsets,
    random_arrays,
)
from fused_adam import Adam

# Large enough for threads to be started and woken, and no multiple of a cache line: csrc/parallel.cpp
# does so from 32,768 lines on, 524,288 elements of float32.
LARGE = 600_011
THREADS = (1, 2, 3, 7)
STEPS = 3

OPTIMIZER = {"lr": 0.01, "weight_decay": 0.02, "amsgrad": True}


@functools.lru_cache(None)
def params_and_grads(size, dtype, seed=0):
    """A parameter and a gradient for each step, not to be changed."""
    param = random_arrays(size, dtype, seed).param.copy()  # alone: the other arrays need not stay
    grads = [random_arrays(size, dtype, seed + 1 + i).grad.copy() for i in range(STEPS)]
    for array in (param, *grads):
        array.setflags(write=False)
    return param, grads


def trained(params, grads_of_steps, **options):
    """The optimizer, after steps on `params`."""
    optimizer = Adam(params, **OPTIMIZER, **options)
    for grads in grads_of_steps:
        optimizer.step(grads)
    return optimizer


@functools.lru_cache(None)
def trained_whole(size, dtype, seed=0):
    """What one thread makes of such a parameter, alone: the parameter, and its moments."""
    param, grads = params_and_grads(size, dtype, seed)
    param = param.copy()
    return param, moments(trained(param, grads, num_threads=1))[0]


@pytest.fixture(scope="module", autouse=True)
def nothing_stays():
    """Later tests fork, which takes longer the more memory there is."""
    yield
    for function in (drawn, params_and_grads, trained_whole):
        function.cache_clear()


def moments(optimizer):
    """For each parameter: exp_avg, exp_avg_sq, max_exp_avg_sq."""
    return [[state[key] for key in state if key != "step"] for state in optimizer.state.values()]


# --- threads ---------------------------------------------------------------------------------------


@each_isa
@each_dtype
@each_form
def test_any_number_of_threads(name, dtype, isa):
    arrays = random_arrays(LARGE, dtype)
    expected = arrays.copy()
    expected.step(OPTIONS[name], 3, isa, max_threads=1)
    for threads in (0, *THREADS[1:]):
        result = arrays.copy()
        result.step(OPTIONS[name], 3, isa, threads)
        assert_same_arrays(result, expected, f"{threads} threads:")


@pytest.mark.parametrize("threads", THREADS)
def test_an_optimizer_with_any_number_of_threads(threads):
    param, grads = params_and_grads(LARGE, np.float32)
    param = param.copy()
    actual = moments(trained(param, grads, num_threads=threads))[0]
    expected, expected_moments = trained_whole(LARGE, np.float32)
    assert_same_bits(param, expected, "param")
    for moment, expected_moment in zip(actual, expected_moments, strict=True):
        assert_same_bits(moment, expected_moment, "moment")


COUNT_THREADS = f"""
import os
import numpy as np
from fused_adam import Adam

def threads_started(size):
    before = len(os.listdir("/proc/self/task"))
    Adam(np.zeros(size, np.float32), num_threads=3).step(np.ones(size, np.float32))
    return len(os.listdir("/proc/self/task")) - before

print(threads_started(1000), threads_started({LARGE}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_these_arrays_are_large_enough_for_threads():
    """Otherwise the tests above would compare one thread with one thread."""
    started = subprocess.check_output([sys.executable, "-c", COUNT_THREADS], text=True, timeout=60).split()
    assert started == ["0", "2"]


# --- splitting and packing -------------------------------------------------------------------------


def cuts_of(kind, size):
    """Where to cut an array of that size: numbers between 0 and size."""
    return {
        "halves": [size // 2],
        "uneven": [1, 2, 5, 17, 1000, 1001, size - 1],
        "with empty pieces": [0, 0, 77, 77, size, size],
        "equal": list(range(0, size, 4099)),
        "primes": [7919 * i for i in range(1, size // 7919 + 1)],
        "small": list(range(0, 700, 3)),
        "random": sorted(np.random.default_rng(5).integers(0, size, 200).tolist()),
    }[kind]


SPLITS = ("halves", "uneven", "with empty pieces", "equal", "primes", "small", "random")


@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", SPLITS)
def test_any_split_of_an_array(kind, threads, dtype):
    """Views of one array, so that their pieces lie side by side and anywhere in a line."""
    param, grads = params_and_grads(LARGE, dtype)
    split = param.copy()
    cuts = cuts_of(kind, LARGE)
    whole, expected = trained_whole(LARGE, dtype)
    actual = trained(np.split(split, cuts), [np.split(grad, cuts) for grad in grads], num_threads=threads)
    assert_same_bits(split, whole)
    joined = [np.concatenate(pieces) for pieces in zip(*moments(actual), strict=True)]
    for moment, expected_moment in zip(joined, expected, strict=True):
        assert_same_bits(moment, expected_moment)


def some_arrays():
    """Size, dtype and seed of parameters: both dtypes and all sizes, some large, most small."""
    sizes = [*awkward_sizes(np.float32), 400_003, 20_000, 0, 350_001]
    dtypes = [np.float32, np.float64, np.float64, np.float32, np.float32]
    return [(size, dtypes[i % 5], 10 * i) for i, size in enumerate(sizes)]


def packings():
    """Containers for a list of arrays, by name. A packing may change the order of its arrays."""
    return {
        "list": list,
        "tuple": tuple,
        "dict": lambda arrays: {f"p{i}": array for i, array in enumerate(arrays)},
        "reversed dict": lambda arrays: {f"p{i}": array for i, array in reversed(list(enumerate(arrays)))},
        "nested": lambda arrays: {"a": [arrays[0], (arrays[1], {"b": arrays[2:7]})], "c": tuple(arrays[7:])},
        "shuffled": lambda arrays: [arrays[i] for i in np.random.default_rng(0).permutation(len(arrays))],
        "large ones last": lambda arrays: sorted(arrays, key=lambda array: array.size),
        "one by one": lambda arrays: [[array] for array in arrays],
    }


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("packing", packings())
def test_any_packing_of_many_arrays(packing, threads):
    """float32 and float64 side by side: where a thread begins depends on all arrays before it."""
    pack = packings()[packing]
    params, grads = zip(*(params_and_grads(*which) for which in some_arrays()), strict=True)
    together = [param.copy() for param in params]
    trained(pack(together), [pack(list(step)) for step in zip(*grads, strict=True)], num_threads=threads)
    for i, (actual, which) in enumerate(zip(together, some_arrays(), strict=True)):
        assert_same_bits(actual, trained_whole(*which)[0], f"array {i}")


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_groups_with_options_of_their_own(threads):
    params, grads = zip(*(params_and_grads(*which) for which in some_arrays()), strict=True)
    options = [{"lr": 0.1}, {"betas": (0.4, 0.99)}, {"amsgrad": False, "eps": 1e-3}, {"maximize": True}]
    count = len(options)
    alone = [param.copy() for param in params]
    for i, (param, own_grads) in enumerate(zip(alone, grads, strict=True)):
        trained([{"params": param, **options[i % count]}], [[grad] for grad in own_grads], num_threads=1)
    together = [param.copy() for param in params]
    groups = [{"params": together[i::count], **options[i]} for i in range(count)]
    steps = [[step[i::count] for i in range(count)] for step in zip(*grads, strict=True)]
    trained(groups, steps, num_threads=threads)
    for i, (actual, expected) in enumerate(zip(together, alone, strict=True)):
        assert_same_bits(actual, expected, f"array {i}")


@each_dtype
def test_any_alignment_and_order(dtype):
    """Where param and grad lie within a line, and in which order an array is stored."""
    shape = (37, 41)
    param, grads = params_and_grads(shape[0] * shape[1], dtype)
    expected = param.copy()
    trained(expected, grads)
    for offset in offsets(dtype):
        moved = empty_at(offset, param.size, dtype)
        moved[:] = param
        trained(moved, grads)
        assert_same_bits(moved, expected, f"offset {offset}")
    for order in "CF":
        shaped = np.array(param.reshape(shape), order=order)
        trained(shaped, [np.array(grad.reshape(shape), order=order) for grad in grads])
        assert_same_bits(shaped, expected.reshape(shape), f"order {order}")


# --- the float mode of the caller ------------------------------------------------------------------
#
# fegetenv and fesetenv of the C library give the whole mode of a thread: rounding, flush to zero, traps.

ON_LINUX = sys.platform.startswith("linux")
MACHINE = platform.machine()
if ON_LINUX and MACHINE == "x86_64":
    # MXCSR follows the 28 bytes of the x87 unit. Flags, which say what has happened so far, do not count.
    MODE_AT, FLAGS = 28, 0x3F
    MODES = {"up": 0x4000, "down": 0x2000, "to zero": 0x6000, "flush to zero": 0x8040}
    MODES["flush to zero, up"] = 0xC040
    TRAPS = 0x680  # the masks of "invalid", "division by zero" and "overflow"
elif ON_LINUX and MACHINE == "aarch64":
    MODE_AT, FLAGS = 0, 0
    MODES = {"up": 1 << 22, "down": 2 << 22, "to zero": 3 << 22, "flush to zero": 1 << 24}
    MODES["flush to zero, up"] = 5 << 22
    TRAPS = 0  # not every ARM CPU can trap
else:
    MODES, TRAPS = {"any": 0}, 0

needs_modes = pytest.mark.skipif(len(MODES) < 2, reason="sets float modes on Linux, x86-64 and aarch64")
each_mode = pytest.mark.parametrize("mode", MODES)


def get_mode():
    environment = (ctypes.c_char * 64)()
    ctypes.CDLL(None).fegetenv(environment)
    return environment, ctypes.c_uint32.from_buffer(environment, MODE_AT)


@contextlib.contextmanager
def float_mode(bits):
    """Sets bits of the mode of this thread, and checks that they are still set at the end."""
    saved, _ = get_mode()
    changed, mode = get_mode()
    mode.value ^= bits
    wanted = mode.value & ~FLAGS
    ctypes.CDLL(None).fesetenv(changed)
    try:
        yield
        found = get_mode()[1].value & ~FLAGS
    finally:
        ctypes.CDLL(None).fesetenv(saved)
    assert found == wanted, f"the float mode was {wanted:#x}, afterwards {found:#x}"


def sums_and_products(dtype):
    """Shows the mode: one sum that is not exact, one product that is subnormal."""
    info = np.finfo(dtype)
    one, small = np.ones(16, dtype), np.full(16, info.smallest_normal)
    return np.concatenate([one + info.eps * dtype(0.7), -one - info.eps * dtype(0.7), small * dtype(0.5)])


@needs_modes
@each_dtype
@each_mode
def test_a_float_mode_is_really_set(mode, dtype):
    normal = sums_and_products(dtype)
    with float_mode(MODES[mode]):
        changed = sums_and_products(dtype)
    assert not np.array_equal(normal, changed)


@needs_modes
@each_isa
@each_dtype
@each_mode
def test_the_callers_float_mode_does_not_matter(mode, dtype, isa):
    arrays = random_arrays(LARGE, dtype)
    with np.errstate(all="ignore"):
        for array in arrays:  # a third of all elements is subnormal or nearly
            array[::3] *= np.finfo(dtype).smallest_normal
    names = ("l2-amsgrad-beta1=0.9", "max_norm-skip_nonfinite-ema=0.9-l2-amsgrad")
    for name, threads in itertools.product(names, (1, 3)):
        expected, result = arrays.copy(), arrays.copy()
        report = expected.step(OPTIONS[name], 3, isa, threads, grad_scale=3.0)
        with float_mode(MODES[mode]):
            found = result.step(OPTIONS[name], 3, isa, threads, grad_scale=3.0)
        assert_same_arrays(result, expected, f"{mode}, {name}, {threads} threads:")
        assert found == report


@needs_modes
@each_mode
def test_norms_do_not_depend_on_the_float_mode(mode):
    """Of few elements, so that one rounding is all that could differ; also where squares are subnormal."""
    for seed, size in itertools.product(range(40), (1e-320, 1e-158, 1e-3, 1e200)):
        grad = np.random.default_rng(seed).standard_normal(5) * size
        one, two = (Adam(np.zeros(5), max_norm=0.3) for _ in range(2))
        expected = one.step(grad)
        with float_mode(MODES[mode]):
            found = two.step(grad)
        assert found == expected
        assert_same_bits(two.state[0]["exp_avg"], one.state[0]["exp_avg"])


@needs_modes
@each_mode
def test_coefficients_do_not_depend_on_the_float_mode(mode):
    """In an array so small that one rounding of one coefficient is all that could differ."""
    for step in (1, 2, 3, 7, 50, 999):
        expected, result = (random_arrays(1, np.float64, seed=step) for _ in range(2))
        expected.step(OPTIONS["decoupled-beta1=0.9"], step)
        with float_mode(MODES[mode]):
            result.step(OPTIONS["decoupled-beta1=0.9"], step)
        assert_same_arrays(result, expected, f"{mode}, step {step}:")


@needs_modes
@each_mode
def test_an_optimizer_keeps_the_float_mode(mode):
    param, grads = params_and_grads(1000, np.float32)
    usual, result = param.copy(), param.copy()
    trained(usual, grads)
    with float_mode(MODES[mode]):
        trained(result, grads)
    assert_same_bits(result, usual)


STEP_WITH_TRAPS = """
import numpy as np
import test_slicing
from cases import OPTIONS, random_arrays

arrays = random_arrays(1000, np.float32)
arrays.grad[:3] = np.nan, np.inf, 1e30
arrays.exp_avg_sq[3:] = 0
with test_slicing.float_mode(test_slicing.TRAPS):
    arrays.step(OPTIONS["eps=0"], 1)
print("alive")
"""


@pytest.mark.skipif(not TRAPS, reason="sets traps on Linux, x86-64")
def test_the_callers_traps_do_not_end_the_process():
    """Some debug with feenableexcept: an overflow inside a step is no reason to die."""
    here = os.path.dirname(__file__)
    python_path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", STEP_WITH_TRAPS],
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout == "alive\n", process.stderr
