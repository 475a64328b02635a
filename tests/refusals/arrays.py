"""Arrays that no call takes, that overlap, or that are not what they were."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refusals.table import SWAPPED, Change, Row, group_of, put
from refusals.world import Borrowed, World
from snapshots import ROLES, assign


class OwnArray(np.ndarray):
    pass


class OwnMask(np.ndarray):
    """With a mask, but no np.ma.MaskedArray."""

    mask = np.True_


def matrix(array: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.ones((2, 2), array.dtype).view(np.matrix)


def filled(array: np.ndarray, dtype: Any) -> np.ndarray:
    return np.zeros(array.shape, dtype)


def strided(array: np.ndarray) -> np.ndarray:
    return np.ones((*array.shape, 2), array.dtype)[..., 0]


def backwards(array: np.ndarray) -> np.ndarray:
    return np.ones_like(array)[::-1]


def broadcast(array: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.ones(1, array.dtype), array.shape, (0,) * array.ndim)


def unaligned(array: np.ndarray) -> np.ndarray:
    return np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy(order="K")
    array.setflags(write=False)
    return array


def other_dtype(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64 if array.dtype == np.float32 else np.float32, order="K")


# Of any array in any place: how it is made from a correct one, the error, and what the message says.
DEFECTS: dict[str, tuple[Callable[[np.ndarray], Any], type[Exception], str]] = {
    **{
        f"dtype {dtype}": (
            lambda a, dtype=dtype: filled(a, dtype),
            TypeError,
            "has dtype .*, expected float32, float64, float16 or bfloat16",
        )
        for dtype in (
            "i1",
            "u4",
            "i8",
            "g",
            "c8",
            "c16",
            "?",
            "O",
            "S4",
            "U1",
            "V4",
            "m8[s]",
            "M8[D]",
            "f4,f4",
        )
    },
    "byte-swapped f4": (lambda a: filled(a, SWAPPED + "f4"), ValueError, "has byte-swapped elements"),
    "byte-swapped f8": (lambda a: filled(a, SWAPPED + "f8"), ValueError, "has byte-swapped elements"),
    "strided": (strided, ValueError, "is a strided view"),
    "backwards": (backwards, ValueError, "is a strided view"),
    "broadcast": (broadcast, ValueError, "is a strided view"),
    "unaligned": (unaligned, ValueError, "is not aligned"),
    "masked": (lambda a: np.ma.masked_less(a, 0), ValueError, "is a masked array"),
    "masked without mask": (lambda a: np.ma.asarray(a), ValueError, "is a masked array"),
    "own mask": (lambda a: a.view(OwnMask), ValueError, "is a masked array"),
    "matrix": (matrix, TypeError, "is of type numpy.matrix, a subclass of ndarray"),
    "recarray": (
        lambda a: a.view(np.recarray),
        TypeError,
        "is of type numpy.*recarray, a subclass of ndarray",
    ),
    "own subclass": (lambda a: a.view(OwnArray), TypeError, "is of type .*OwnArray, a subclass of ndarray"),
    "scalar": (lambda a: a.dtype.type(1), TypeError, "is of type numpy.float.*np.asarray"),
    "float": (lambda a: 1.0, TypeError, "is of type float, expected numpy.ndarray"),
    "its bytes": (lambda a: a.tobytes(), TypeError, "is of type bytes, expected numpy.ndarray"),
    "class": (lambda a: np.ndarray, TypeError, "is of type type, expected numpy.ndarray"),
    "buffer": (lambda a: memoryview(a), TypeError, "is of type memoryview, expected numpy.ndarray"),
}
# Of an array that has to be like another, and of one that is written.
MISFITS: dict[str, tuple[Callable[[np.ndarray], Any], type[Exception], str]] = {
    "other float": (other_dtype, TypeError, "has dtype float.., but .* has float"),
    "an axis more": (lambda a: a[None], ValueError, r"has shape \(1, .*, but .* has \("),
    "longer": (
        lambda a: np.ones((a.shape[0] + 1, *a.shape[1:]), a.dtype),
        ValueError,
        "has shape .*, but .* has",
    ),
    "empty": (lambda a: np.ones(0, a.dtype), ValueError, r"has shape \(0,\), but .* has"),
    "as 0-d": (lambda a: np.ones((), a.dtype), ValueError, r"has shape \(\), but .* has"),
}
READ_ONLY = {"read-only": (read_only, ValueError, "is read-only")}
IN_PLACE = {**DEFECTS, **READ_ONLY}
LIKE = {**DEFECTS, **MISFITS}


def some(table: dict[str, Any], start: int = 0) -> dict[str, Any]:
    """Where a place leads to a check that another place has in full."""
    return dict(list(table.items())[start::4])


def array_rows() -> Iterator[Row]:
    """Every kind of defect, in every place where an array may be given."""
    places = [
        ("Adam", "params['v'][0]", ("new_params", "v", 0), IN_PLACE),
        ("AdamW", "params['w']", ("new_params", "w"), some(IN_PLACE)),
        ("add_param_group", "param_groups[2]['params'][1]", ("group", "params", 1), some(IN_PLACE, 1)),
        ("load", "param_groups[1]['params']['b'][0]", ("loaded_params", 1, "params", "b", 0), some(IN_PLACE)),
        ("step", "grad for param_groups[1]['params']['b'][0]", ("grads", 1, "b", 0), LIKE),
        ("step()", "grad for param_groups[0]['params']", ("grads", 0), some(LIKE)),
        (
            "zero_grad",
            "grad for param_groups[1]['params']['b'][0]",
            ("grads", 1, "b", 0),
            {**some(LIKE, 2), **READ_ONLY},
        ),
        ("lone step", "grad for params", ("lone_grad",), some(LIKE)),
    ]
    for call, place, path, table in places:
        for id, (make, error, message) in table.items():
            yield Row(f"{id}", call, put(*path, make=make), error, f"{re.escape(place)} {message}")
    for i, role in enumerate(ROLES):
        table = {
            **some(DEFECTS, i % 4),
            **(READ_ONLY if role != "grad" else {}),
            **(MISFITS if role != "param" else {}),
        }
        for id, (make, error, message) in table.items():
            yield Row(f"{role} {id}", "adam_step", put("arrays", role, make=make), error, f"{role} {message}")
    message = r"grad for param_groups\[1\]\['params'\]\['b'\]\[1\] is in C order, but .* is in Fortran order"
    to_c = put("grads", 1, "b", 1, make=np.ascontiguousarray)
    yield Row("C order", "step", to_c, ValueError, message)
    yield Row("C order", "zero_grad", to_c, ValueError, message)
    to_fortran = put("arrays", "exp_avg_sq", make=np.asfortranarray)
    yield Row("F order", "adam_step", to_fortran, ValueError, "exp_avg_sq is in Fortran order, but param")
    for role in ROLES[:4]:
        change = put("arrays", role, value=None)
        yield Row(f"{role} None", "adam_step", change, TypeError, f"{role} is of type NoneType")


def overlap_rows() -> Iterator[Row]:
    """Every pair of roles, the same memory or one element apart, in one parameter and across parameters."""

    def in_one_block(world: World, first: str, second: str, shift: int) -> None:
        memory = np.ones(14, np.float32)
        world.arrays[first] = memory[1:13].reshape(3, 4)
        world.arrays[second] = memory[1 + shift : 13 + shift].reshape(3, 4)

    for (a, b), shift in itertools.product(itertools.combinations(ROLES, 2), (-1, 0, 1)):
        yield Row(
            f"{a} {b} {shift}",
            "adam_step",
            lambda w, a=a, b=b, shift=shift: in_one_block(w, a, b, shift),
            ValueError,
            f"({a} shares memory with {b}|{b} shares memory with {a})",
        )

    # Each array that a step writes, and the parameter whose gradient has no business there.
    places = [
        "param_groups[0]['params']",
        "param_groups[1]['params']['b'][0]",
        "param_groups[1]['params']['b'][1]",
    ]
    streams = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def piece(world: World, owner: int, stream: str, grad: np.ndarray, end: bool) -> np.ndarray:
        """One element at the end of what is written (or at its begin), in a gradient."""
        params = [*group_of(world, 0)["params"], *group_of(world, 1)["params"]]
        written = params[owner] if stream == "param" else world.opt.state[owner][stream]
        address = written.ctypes.data + (
            written.nbytes - grad.itemsize if end else grad.itemsize - grad.nbytes
        )
        address -= address % grad.itemsize  # float64 in float32
        return np.asarray(Borrowed(np.empty_like(grad), address, written))

    paths = [("grads", 0), ("grads", 1, "b", 0), ("grads", 1, "b", 1)]
    for owner, grad, stream, end in itertools.product(range(3), range(3), streams, (False, True)):

        def change(
            world: World, owner: int = owner, grad: int = grad, stream: str = stream, end: bool = end
        ) -> None:
            put(*paths[grad], make=lambda good: piece(world, owner, stream, good, end))(world)

        # Where the gradient begins elsewhere, what stands there may be met first.
        found = ("" if stream == "param" else "the state of ") + places[owner]
        found = re.escape(found) if end else r"(the state of |)param_groups\["
        message = f"grad for {re.escape(places[grad])} shares memory with {found}"
        for call in ("step", "zero_grad") if end else ("step",):
            id = f"grad {grad} in {stream} {owner}, {'end' if end else 'begin'}"
            yield Row(id, call, change, ValueError, message)

    # Parameters that share memory with others: of the same call, of the optimizer, of its moments.
    def cut(shift: int) -> Change:
        def change(world: World) -> None:
            memory = np.ones(9)
            world.new_params = {"w": memory[1:6], "v": [memory[1 + 4 + shift :][:3]]}

        return change

    for shift in (-4, 0):
        message = r"params\['v'\]\[0\] shares memory with params\['w'\]"
        yield Row(f"overlap {shift}", "Adam", cut(shift), ValueError, message)
        yield Row(f"overlap {shift}", "AdamW", cut(shift), ValueError, message)
    twice: Change = lambda w: put("new_params", "v", 0, value=w.new_params["w"])(w)  # noqa: E731
    yield Row("twice", "Adam", twice, ValueError, r"params\['v'\]\[0\] is the same array as params\['w'\]")
    for stream in streams:
        owner_text = ("" if stream == "param" else "the state of ") + "param_groups[1]['params']['b'][0]"

        def share(world: World, stream: str = stream) -> None:
            source = group_of(world, 1)["params"][0] if stream == "param" else world.opt.state[1][stream]
            world.group["params"][1] = source[-1:]

        message = re.escape(f"param_groups[2]['params'][1] shares memory with {owner_text}")
        yield Row(f"end of {stream}", "add_param_group", share, ValueError, message)


def change_rows() -> Iterator[Row]:
    """Parameters that are not what they were when the optimizer was made; the gradients still are."""
    own = "param_groups[1]['params']['b'][0]"
    has = f"{own} has shape {{}}, but it had (7,) when this optimizer was made"
    changes: dict[str, tuple[Callable[[np.ndarray], Any], type[Exception], str]] = {
        "grown": (lambda a: a.resize(8, refcheck=False), ValueError, has.format("(8,)")),
        "grown far": (lambda a: a.resize(100_000, refcheck=False), ValueError, has.format("(100000,)")),
        "shrunk": (lambda a: a.resize(6, refcheck=False), ValueError, has.format("(6,)")),
        "emptied": (lambda a: a.resize(0, refcheck=False), ValueError, has.format("(0,)")),
        "0-d": (lambda a: a.resize((), refcheck=False), ValueError, has.format("()")),
        "row": (lambda a: assign(a, "shape", (1, 7)), ValueError, has.format("(1, 7)")),
        "column": (lambda a: assign(a, "shape", (7, 1)), ValueError, has.format("(7, 1)")),
        "float32": (lambda a: assign(a, "dtype", "f4"), TypeError, f"{own} has dtype float32, but"),
        "int64": (lambda a: assign(a, "dtype", "i8"), TypeError, f"{own} has dtype int64, expected"),
        "complex": (
            lambda a: a.resize(8, refcheck=False) or assign(a, "dtype", "c16"),
            TypeError,
            f"{own} has dtype c",
        ),
        "swapped": (lambda a: assign(a, "dtype", SWAPPED + "f8"), ValueError, f"{own} has byte-swapped"),
        "read-only": (lambda a: a.setflags(write=False), ValueError, f"{own} is read-only"),
    }
    for id, (change, error, message) in changes.items():
        for call in ("step", "step()"):
            broken: Change = lambda w, change=change: change(w.params["b"][0])  # noqa: E731
            yield Row(f"param {id}", call, broken, error, re.escape(message))
    grad_place = re.escape("grad for param_groups[1]['params']['b'][0]")
    for id in ("grown", "shrunk", "emptied", "row", "int64", "float32", "swapped"):
        change, error, _ = changes[id]
        for call in ("step", "step()", "zero_grad"):
            broken = lambda w, change=change: change(w.grads[1]["b"][0])  # noqa: E731
            yield Row(f"grad {id}", call, broken, error, f"{grad_place} (has|is) ")
    for role, id in itertools.product(ROLES[1:], ("grown", "row", "int64")):
        change = {
            "grown": lambda a: a.resize((4, 4), refcheck=False),
            "row": lambda a: assign(a, "shape", (1, 12)),
            "int64": lambda a: assign(a, "dtype", "i8"),
        }[id]
        broken = lambda w, change=change, role=role: change(w.arrays[role])  # noqa: E731
        error = TypeError if id == "int64" else ValueError
        yield Row(f"{role} {id}", "adam_step", broken, error, f"{role} has ")
