"""Tables and helpers that the tests share."""

from __future__ import annotations

import functools
import itertools
from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from fused_adam import _config, _core, _tables

DTYPES = (np.float32, np.float64)  # that are stored as they are computed in
try:
    from ml_dtypes import bfloat16
except ImportError:
    CODED: tuple[Any, ...] = (np.float16,)  # of params and grads, beside float32 for all else
else:
    CODED = (np.float16, bfloat16)
LINE = 64  # bytes of a cache line, and of the widest vector

# --- options ---------------------------------------------------------------------------------------

OPTION_TABLE, ALL_STREAMS = _tables.OPTIONS, _tables.STREAMS
# Those of numbers; the others say how moments are stored that are in blocks (test_stored_moments.py).
STREAMS = tuple(stream for stream in ALL_STREAMS if stream.elements_per_entry == 1)
DEFAULTS = dict(_tables.DEFAULTS)
# The options that ask for a stream, so that a step with these has all of them.
EVERYTHING: dict[str, Any] = {
    option.name: {"flag": True, "fraction or None": 0.9}[option.kind]
    for option in OPTION_TABLE
    if any(stream.option == option.name for stream in STREAMS)
}
_DECAYS = {
    "plain": {},
    "l2": {"weight_decay": 0.03},
    "decoupled": {"weight_decay": 0.03, "decoupled_weight_decay": True},
}
# The average of the gradient is computed in two ways: 0.5 is where one gives way to the other.
_BETA1 = (0.0, 0.3, 0.5, 0.9)


def _options() -> dict[str, dict[str, Any]]:
    """All options, each alone and all of them combined, by a name that says which."""
    table = {}
    for decay, amsgrad, maximize, beta1 in itertools.product(_DECAYS, (False, True), (False, True), _BETA1):
        words = [decay] + ["amsgrad"] * amsgrad + ["maximize"] * maximize + [f"beta1={beta1}"]
        betas = (beta1, 0.999)
        flags = {"amsgrad": amsgrad, "maximize": maximize, "betas": betas}
        table["-".join(words)] = {**DEFAULTS, **_DECAYS[decay], **flags}
    for name, options in {
        "hat": {"eps_mode": "hat", "eps": 1e-3},
        "root": {"eps_mode": "root", "eps": 1e-6},
        "root-amsgrad-eps=0": {"eps_mode": "root", "eps": 0.0, "amsgrad": True},
        "uncorrected": {"bias_correction": False},
        "uncorrected-root-amsgrad-l2": {
            "bias_correction": False,
            "eps_mode": "root",
            "amsgrad": True,
            "weight_decay": 0.03,
        },
        "max_norm": {"max_norm": 0.7},
        "max_norm=0": {"max_norm": 0.0},
        "max_norm-never-reached": {"max_norm": 1e30},
        "clip_value": {"clip_value": 0.01},
        "clip_value=0-maximize": {"clip_value": 0.0, "maximize": True},
        "skip_nonfinite": {"skip_nonfinite": True},
        "max_norm-skip_nonfinite-ema=0.9-l2-amsgrad": {
            "max_norm": 0.7,
            "skip_nonfinite": True,
            "ema_decay": 0.9,
            "weight_decay": 0.03,
            "amsgrad": True,
        },
        "lr=0": {"lr": 0.0},
        "lr=0-decoupled": {"lr": 0.0, **_DECAYS["decoupled"]},
        "large-lr": {"lr": 12.5},
        "eps=0": {"eps": 0.0},
        "large-eps": {"eps": 0.1},
        "beta1=0.5+1e-12": {"betas": (0.5 + 1e-12, 0.999)},  # as a float32, 1 - beta1 is 0.5
        "beta2=0": {"betas": (0.9, 0.0)},
        "beta2=0.5-amsgrad": {"betas": (0.9, 0.5), "amsgrad": True},
        "betas=0": {"betas": (0.0, 0.0)},
        # Here 1 - lr * weight_decay in two roundings is another number than in one.
        "large-decoupled": {"lr": 0.7, "weight_decay": 0.9, "decoupled_weight_decay": True},
        "decoupled-of-0": {"decoupled_weight_decay": True},
        "decoupled-to-0": {"lr": 1.0, "weight_decay": 1.0, "decoupled_weight_decay": True},
        "ema=0.999": {"ema_decay": 0.999},
        "master_weights": {"master_weights": True},
        "ema=0.3": {"ema_decay": 0.3},
        "ema=0.5+1e-12": {"ema_decay": 0.5 + 1e-12},  # as a float32, 1 - ema_decay is 0.5
        "ema=0": {"ema_decay": 0.0},
        "ema=0.9-l2-amsgrad-maximize": {
            "ema_decay": 0.9,
            "weight_decay": 0.03,
            "amsgrad": True,
            "maximize": True,
        },
    }.items():
        table[name] = {**DEFAULTS, **options}
    return table


def without_conflicts(options: dict[str, Any]) -> dict[str, Any]:
    """Drawn options, without what others among them exclude."""
    options = options if options["max_norm"] is None else {**options, "clip_value": None}
    return {**options, "stochastic_rounding": False} if options["master_weights"] else options


OPTIONS = _options()
# One for each piece of code that the options choose between: form of the kernel, forms of the averages.
FORMS = (
    *(
        f"{decay}{amsgrad}-beta1={beta1}"
        for decay, amsgrad, beta1 in itertools.product(("plain", "l2"), ("", "-amsgrad"), (0.3, 0.9))
    ),
    "ema=0.3",
    "ema=0.9-l2-amsgrad-maximize",
    "root",
    "uncorrected-root-amsgrad-l2",
    "max_norm",
    "clip_value",
    "max_norm-skip_nonfinite-ema=0.9-l2-amsgrad",
)


def all_isas() -> list[str]:
    """The instruction sets that this machine runs, best first."""
    return _core.supported_isas()


each_isa = pytest.mark.parametrize("isa", all_isas())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
each_options = pytest.mark.parametrize("name", OPTIONS)  # a key of OPTIONS
each_form = pytest.mark.parametrize("name", FORMS)  # likewise

# --- arrays ----------------------------------------------------------------------------------------


_OPTIONAL = [stream.name for stream in STREAMS if stream.option is not None]  # the last ones


class Arrays(namedtuple("Arrays", [stream.name for stream in STREAMS], defaults=[None] * len(_OPTIONAL))):
    """What a step works on, in the order of the table of streams. None where there is no such stream."""

    __slots__ = ()

    @classmethod
    def each(cls, make: Callable[..., np.ndarray | None], *others: Iterable[Any]) -> Arrays:
        """What a function makes of each stream's name and of what each of the others has for it."""
        return cls(*(make(name, *rest) for name, *rest in zip(cls._fields, *others, strict=True)))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Arrays:
        return Arrays(*(None if array is None else function(array) for array in self))

    def copy(self) -> Arrays:
        return self.map(np.copy)

    def step(
        self,
        options: dict[str, Any],
        step: int,
        isa: str | None = None,
        max_threads: int = 1,
        zero_grad: bool = False,
        grad_scale: float | None = None,
        allow_mixed: bool = False,
    ) -> tuple[bool, float] | None:
        threads = _core.Threads(_config.THREADS.back_end, max_threads)
        isa = isa or all_isas()[0]
        arrays = {**dict.fromkeys(stream.name for stream in ALL_STREAMS), **self._asdict()}
        return _core.adam_step(isa, threads, options, step, arrays, zero_grad, grad_scale, allow_mixed)


# The state of a parameter, as opt.state has it.
STATE = tuple(stream.name for stream in STREAMS if stream.ours)
# Squares are never negative.
SQUARES = tuple(name for name in Arrays._fields if "sq" in name)


def random_arrays(size: int, dtype: Any, seed: int = 0) -> Arrays:
    """As in the middle of a training, but with magnitudes of many orders."""
    return drawn(size, dtype, seed).copy()


@functools.lru_cache(8)  # drawing takes ten times as long as copying
def drawn(size: int, dtype: Any, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)

    def draw(name: str) -> np.ndarray:
        stored = np.float32 if dtype in CODED and name not in ("param", "grad") else dtype
        array = (10.0 ** rng.uniform(-6, 1, size) * rng.standard_normal(size)).astype(stored)
        return array * array if name in SQUARES else array

    return Arrays.each(draw)


def empty_at(offset: int, size: int, dtype: Any) -> np.ndarray:
    """An array that begins `offset` bytes after a multiple of 64 bytes."""
    itemsize = np.dtype(dtype).itemsize
    assert offset % itemsize == 0, "would be unaligned"
    memory = np.empty(size * itemsize + offset + LINE, np.uint8)
    start = -memory.ctypes.data % LINE + offset
    return memory[start : start + size * itemsize].view(dtype)


def offsets(dtype: Any) -> range:
    """Where an aligned array can begin within a line, in bytes."""
    return range(0, LINE, np.dtype(dtype).itemsize)


def awkward_sizes(dtype: Any) -> list[int]:
    """Every size up to four of the widest vectors, then around powers of two."""
    width = LINE // np.dtype(dtype).itemsize
    return [*range(4 * width + 2), 127, 128, 129, 1000, 1023, 1024, 1025, 4099]


def awkward_values(dtype: Any) -> np.ndarray:
    info = np.finfo(dtype)
    subnormal = info.smallest_subnormal
    largest_subnormal = np.nextafter(info.smallest_normal, dtype(0))
    huge_root = np.sqrt(info.max)
    positive = [0, subnormal, 3 * subnormal, largest_subnormal, info.smallest_normal, np.sqrt(info.tiny)]
    positive += [info.eps, 0.1, 1, 1 + info.eps, 3, huge_root, info.max, np.inf]
    values = np.array(positive, dtype)
    return np.concatenate([values, -values, np.array([np.nan], dtype)])


# --- comparison ------------------------------------------------------------------------------------


def assert_same_bits(actual: Any, expected: Any, what: str = "array") -> None:
    """Equal to the last bit, signs of zeros included; any NaN equals any other."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    actual, expected = actual.ravel(), expected.ravel()
    bits = f"u{actual.dtype.itemsize}"
    differ = actual.view(bits) != expected.view(bits)
    differ &= ~(np.isnan(actual) & np.isnan(expected))
    if differ.any():
        i = int(np.argmax(differ))
        got, want = actual[i], expected[i]
        raise AssertionError(
            f"{what}: {differ.sum()} of {differ.size} elements differ, first [{i}]: "
            f"{got!r} = {float(got).hex()}, expected {want!r} = {float(want).hex()}"
        )


def assert_same_arrays(actual: Any, expected: Any, what: str = "") -> None:
    """The same for all arrays of a step; `expected` may be what `reference.adam` returns: all but grad."""
    names = [name for name in Arrays._fields if name != "grad" or len(expected) == len(Arrays._fields)]
    for name, want in zip(names, expected, strict=True):
        found = getattr(actual, name)
        if want is None:
            assert found is None, f"{what} {name} is there"
        else:
            assert_same_bits(found, want, f"{what} {name}".strip())
