"""What the environment and the machine decide: the ISA, the threads and their number."""

from __future__ import annotations

import operator
import os
from typing import Any, Final

import numpy as np

from fused_adam import _core

_MANY_THREADS: Final = 4096


def _isa() -> str:
    name = os.environ.get("FUSED_ADAM_ISA")
    if not name:
        return _core.supported_isas()[0]
    try:
        _core.check_isa(name)
    except ValueError as error:
        raise ValueError(f"environment variable FUSED_ADAM_ISA: {error}") from None
    return name


def _num_threads() -> int:
    text = os.environ.get("FUSED_ADAM_NUM_THREADS")
    if not text:
        return 0  # what the machine allows
    if not text.isdecimal() or not 1 <= int(text) <= _MANY_THREADS:
        raise ValueError(
            f"environment variable FUSED_ADAM_NUM_THREADS must be a number from 1 to {_MANY_THREADS}, "
            f"got {text!r}."
        )
    return int(text)


def _threads() -> _core.Threads:
    num_threads = _num_threads()
    try:
        return _core.Threads(os.environ.get("FUSED_ADAM_THREADS") or "team", num_threads)
    except ValueError as error:
        raise ValueError(f"environment variable FUSED_ADAM_THREADS: {error}") from None


# Read once, at import: a wrong value must be an error now, not at some later step.
ISA: Final = _isa()
THREADS: Final = _threads()


def threads(num_threads: int | None) -> _core.Threads:
    """The threads that a step may have, from a `num_threads` argument, which is checked."""
    if num_threads is None:
        return THREADS
    num_threads = as_int("num_threads", num_threads, "an int or None")
    if num_threads < 1:
        raise ValueError(f"num_threads must be >= 1 or None, got {num_threads}.")
    if num_threads > _MANY_THREADS:
        raise ValueError(f"num_threads must be at most {_MANY_THREADS}, got {num_threads}.")
    return _core.Threads(THREADS.back_end, num_threads)


def as_int(name: str, value: Any, expected: str = "an int") -> int:
    """The value of an argument as an int; TypeError where it is none, booleans included."""
    try:
        if not isinstance(value, (bool, np.bool_)):  # NumPy 1.26 still takes its own for an index
            return operator.index(value)
    except TypeError:  # also of arrays of shape (1,), with a message of NumPy's own
        pass
    raise TypeError(f"{name} must be {expected}, got {value!r}.")


def is_number(value: Any) -> bool:
    """An int or a float, of Python or NumPy; a bool is a slip."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def require_flag(name: str, value: Any) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")


def show_config() -> dict[str, Any]:
    """What this build is and what it found on this machine.

    Returns
    -------
    dict
        ``version``; ``numerics``, the id of the formula (equal ids give equal bits); ``isa``, the
        instruction set that steps use, ``isas_supported`` by this machine and ``isas_compiled``, best
        first; ``threads``, whose they are: of this package's ``"team"``, or ``"openmp"``;
        ``num_threads``, the most that a step uses, and ``cpus`` that this process may use; ``openmp``,
        the date of the OpenMP standard that it was built with, whose limits on threads are honoured, or
        None; ``compiler``; and ``environment``, the variables that count and are set.

    Notes
    -----
    ``python -m fused_adam`` prints it. The library itself prints nothing.
    """
    ours = ("FUSED_ADAM_ISA", "FUSED_ADAM_THREADS", "FUSED_ADAM_NUM_THREADS")
    variables = (*ours, "OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND")
    return {
        "version": _core.__version__,
        "numerics": _core.numerics,
        "isa": ISA,
        "isas_supported": _core.supported_isas(),
        "isas_compiled": _core.compiled_isas(),
        "threads": THREADS.back_end,
        "num_threads": THREADS.most,
        "cpus": _core.usable_cpus(),
        "openmp": _core.openmp_version() or None,
        "compiler": _core.compiler,
        "environment": {name: os.environ[name] for name in variables if name in os.environ},
    }
