"""Every public call with every argument wrong: one table, and a world that its rows must leave alone.

Other tests take the kinds of defects one by one, and look at what the call was given. Here a row may break
anything of the world beforehand; the call must be refused with a message that names the place, and then
*everything* is compared, also what the call had nothing to do with. At the end the breakage is undone, and
all goes on as in a twin of the world that never saw it.
"""

from __future__ import annotations

import copy
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fused_adam import Adam, AdamW, CheckpointError, adam_step
from snapshots import ROLES, adam_step_arrays, assert_same_bits, assign, random_like, train

NAN, INF = float("nan"), float("inf")
SWAPPED = ">" if sys.byteorder == "little" else "<"

# --- The world --------------------------------------------------------------------------------------


class World:
    """All that a call may be given or may touch. A row changes these attributes, or what they hold."""

    def __init__(self, folder: Path) -> None:
        empty = {"a": np.empty((3, 4), np.float32), "b": [np.empty(7), np.empty((2, 3), order="F")]}
        # An optimizer two steps into training, with two groups; "b" is the one to be broken, as "a" comes
        # before it and would have been updated already.
        self.params = random_like(empty, 1)
        a, b = self.params.values()
        self.opt = AdamW([{"params": a, "lr": 0.02}, {"params": {"b": b}}], lr=0.01, amsgrad=True)
        train(self.opt, [a, {"b": b}], (2, 3))
        self.opt.zero_grad()
        self.grads = [random_like(a, 4), {"b": random_like(b, 4)}]
        self.opt.grads = self.grads
        self.group = {"params": [np.ones(3), np.ones(5, np.float32)], "eps": 1e-6}  # to be added
        self.lr: Any = 0.03
        # One without groups, for what depends on that.
        self.lone = np.ones(4)
        self.lone_opt = Adam(self.lone)
        self.lone_grad: Any = np.ones(4)
        # Arguments of the other calls.
        self.arrays: dict[str, Any] = adam_step_arrays()
        self.step_options: dict[str, Any] = {"step": 3, "amsgrad": True}
        self.new_params: Any = random_like({"w": np.empty((3, 4)), "v": [np.empty(5, np.float32)]}, 5)
        self.new_options: dict[str, Any] = {}
        self.state_dict = self.opt.state_dict()
        self.path: Any = folder / "kept" / "adam.safetensors"
        self.load_path: Any = self.path
        self.loaded_params: Any = [
            {"params": np.ones((3, 4), np.float32)},
            {"params": {"b": random_like(b, 6)}},
        ]
        self.load_options: dict[str, Any] = {}
        self.save_options: dict[str, Any] = {}
        self.folder = folder
        assert len(self.opt.state) + len(self.lone_opt.state) == 4  # makes what it keeps

    def go_on(self) -> Iterator[Any]:
        """Correct calls of each function but save, and what comes of them."""
        self.opt.step()
        self.opt.lr = self.lr
        self.opt.add_param_group(self.group)
        self.opt.step([*self.grads, [np.ones(3), None]])
        yield self.params, [dict(entry) for entry in self.opt.state.values()], self.group["params"]
        self.lone_opt.step(self.lone_grad)
        yield self.lone, dict(self.lone_opt.state[0])
        adam_step(**self.arrays, **self.step_options)
        yield self.arrays
        new = Adam(self.new_params, **self.new_options)
        new.step(random_like(self.new_params, 7))
        yield self.new_params, [dict(entry) for entry in new.state.values()]
        loaded = AdamW.load(self.load_path, self.loaded_params, **self.load_options)
        loaded.step(self.grads)
        yield [group["params"] for group in self.loaded_params], [dict(e) for e in loaded.state.values()]
        loaded.load_state_dict(self.state_dict)
        yield [dict(entry) for entry in loaded.state.values()]


class Borrowed:
    """An array is made of it in memory that is partly somebody else's: to be passed, not to be read."""

    def __init__(self, like: np.ndarray, address: int, owner: np.ndarray) -> None:
        self.__array_interface__ = {
            **like.__array_interface__,
            "data": (address, False),
            "strides": like.strides,
        }
        self._owner = owner


class Facts:
    """A description of the world: what is in containers, every byte of arrays, which object others are."""

    def __init__(self, world: World, addresses: bool = True) -> None:
        self._addresses = addresses
        self._kept: list[Any] = []  # as long as these live, no other object has their id
        self._seen: set[int] = set()
        self.facts: dict[str, Any] = {}
        self._add("world", vars(world))
        for name in ("opt", "lone_opt"):
            opt = getattr(world, name)
            self._add(name, vars(opt))
            for index, entry in opt.state.items():  # a new view each time: its address says which memory
                self._add(f"{name}.state[{index}]['step']", entry.pop("step"))
                for key, moment in entry.items():
                    place = moment.ctypes.data if addresses else None
                    self.facts[f"{name}.state[{index}][{key!r}]"] = (place, moment.shape, moment.tobytes())
        for path in sorted((world.folder / "kept").iterdir()):
            self.facts[str(path)] = path.read_bytes()

    def _add(self, path: str, value: Any) -> None:
        self._kept.append(value)
        fact: Any = (type(value), id(value))
        if isinstance(value, (np.ndarray, dict, list, tuple)) and id(value) in self._seen:
            self.facts[path] = fact  # described where it was first
            return
        self._seen.add(id(value))
        if isinstance(value, (bool, int, float, complex, str, bytes)):
            fact = (type(value), repr(value))
        elif isinstance(value, np.ndarray):
            fact = (*fact, value.dtype, value.shape, value.strides, value.flags.writeable)
            fact += (value.ctypes.data if self._addresses else None,)
            owner = value
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            if not isinstance(owner.base, Borrowed):  # a write between strided elements counts too
                fact += (np.asarray(value).tobytes(), np.asarray(owner).tobytes())
        elif isinstance(value, (dict, list, tuple)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            fact = (*fact, len(value))
            for key, child in pairs:
                self._add(f"{path}[{key!r}]", child)
        self.facts[path] = fact

    def assert_same_as(self, before: Facts) -> None:
        places = self.facts.keys() | before.facts.keys()
        changed = [place for place in places if self.facts.get(place) != before.facts.get(place)]
        assert not changed, f"changed: {sorted(changed)}"


class Backup:
    """Undoes whatever a row did to containers, arrays and attributes of the world."""

    def __init__(self, world: World) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        for attributes in (vars(world), vars(world.opt), vars(world.lone_opt)):
            self._add(attributes)

    def _add(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            self._arrays.append((value, value.copy(order="K")))
        elif isinstance(value, (dict, list)):
            self._containers.append((value, value.copy()))
        if isinstance(value, (dict, list, tuple)):
            for child in list(value.values() if isinstance(value, dict) else value):
                self._add(child)

    def restore(self) -> None:
        for container, saved in self._containers:
            container.clear()
            container.update(saved) if isinstance(container, dict) else container.extend(saved)
        for array, saved in self._arrays:
            array.setflags(write=True)
            if array.dtype != saved.dtype:
                assign(array, "dtype", saved.dtype)
            if array.shape != saved.shape:
                array.resize(saved.shape, refcheck=False)
            array[...] = saved


# --- The table --------------------------------------------------------------------------------------

Change = Callable[[World], Any]


class Row(NamedTuple):
    id: str
    call: str  # a key of CALLS
    change: Change  # what is broken before
    error: type[BaseException]
    message: str  # a regex, of its beginning


CALLS: dict[str, Change] = {
    "Adam": lambda w: Adam(w.new_params, **w.new_options),
    "AdamW": lambda w: AdamW(w.new_params, **w.new_options),
    "step": lambda w: w.opt.step(w.grads),
    "step()": lambda w: w.opt.step(),
    "lone step": lambda w: w.lone_opt.step(w.lone_grad),
    "zero_grad": lambda w: w.opt.zero_grad(),
    "grads": lambda w: w.opt.grads,
    "add_param_group": lambda w: w.opt.add_param_group(w.group),
    "set lr": lambda w: setattr(w.opt, "lr", w.lr),
    "get lr": lambda w: w.opt.lr,
    "state_dict": lambda w: w.opt.state_dict(),
    "load_state_dict": lambda w: w.opt.load_state_dict(w.state_dict),
    "save": lambda w: w.opt.save(w.path, **w.save_options),
    "load": lambda w: AdamW.load(w.load_path, w.loaded_params, **w.load_options),
    "adam_step": lambda w: adam_step(**w.arrays, **w.step_options),
}


def put(attribute: str, *path: Any, value: Any = None, make: Callable[[Any], Any] | None = None) -> Change:
    """Replaces something in the world, by a value or by what `make` makes of it."""

    def inside(thing: Any) -> Any:
        return thing if isinstance(thing, (dict, list)) else vars(thing)

    def change(world: World) -> None:
        container = inside(world)
        *keys, last = attribute, *path
        for key in keys:
            container = inside(container[key])
        container[last] = make(container[last]) if make else value

    return change


def drop(attribute: str, *path: Any) -> Change:
    def change(world: World) -> None:
        container = getattr(world, attribute)
        for key in path[:-1]:
            container = container[key] if isinstance(container, (dict, list)) else getattr(container, key)
        del container[path[-1]]

    return change


def group_of(world: World, index: int) -> Any:
    return world.opt.param_groups[index]


def edit(index: int, key: str, value: Any) -> Change:
    return lambda world: group_of(world, index).update({key: value})


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
            "has dtype .*, expected float32 or float64",
        )
        for dtype in (
            "i1",
            "u4",
            "i8",
            "f2",
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
            yield Row(f"{call}: {id}", call, put(*path, make=make), error, f"{re.escape(place)} {message}")
    for i, role in enumerate(ROLES):
        table = {
            **some(DEFECTS, i % 4),
            **(READ_ONLY if role != "grad" else {}),
            **(MISFITS if role != "param" else {}),
        }
        for id, (make, error, message) in table.items():
            yield Row(
                f"adam_step: {role} {id}",
                "adam_step",
                put("arrays", role, make=make),
                error,
                f"{role} {message}",
            )
    message = r"grad for param_groups\[1\]\['params'\]\['b'\]\[1\] is in C order, but .* is in Fortran order"
    to_c = put("grads", 1, "b", 1, make=np.ascontiguousarray)
    yield Row("step: C order", "step", to_c, ValueError, message)
    yield Row("zero_grad: C order", "zero_grad", to_c, ValueError, message)
    to_fortran = put("arrays", "exp_avg_sq", make=np.asfortranarray)
    yield Row(
        "adam_step: F order", "adam_step", to_fortran, ValueError, "exp_avg_sq is in Fortran order, but param"
    )
    for role in ROLES[:4]:
        change = put("arrays", role, value=None)
        yield Row(f"adam_step: {role} None", "adam_step", change, TypeError, f"{role} is of type NoneType")


def overlap_rows() -> Iterator[Row]:
    """Every pair of roles, the same memory or one element apart, in one parameter and across parameters."""

    def in_one_block(world: World, first: str, second: str, shift: int) -> None:
        memory = np.ones(14, np.float32)
        world.arrays[first] = memory[1:13].reshape(3, 4)
        world.arrays[second] = memory[1 + shift : 13 + shift].reshape(3, 4)

    for (a, b), shift in itertools.product(itertools.combinations(ROLES, 2), (-1, 0, 1)):
        yield Row(
            f"adam_step: {a} {b} {shift}",
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
            id = f"{call}: grad {grad} in {stream} {owner}, {'end' if end else 'begin'}"
            yield Row(id, call, change, ValueError, message)

    # Parameters that share memory with others: of the same call, of the optimizer, of its moments.
    def cut(shift: int) -> Change:
        def change(world: World) -> None:
            memory = np.ones(9)
            world.new_params = {"w": memory[1:6], "v": [memory[1 + 4 + shift :][:3]]}

        return change

    for shift in (-4, 0):
        message = r"params\['v'\]\[0\] shares memory with params\['w'\]"
        yield Row(f"Adam: overlap {shift}", "Adam", cut(shift), ValueError, message)
        yield Row(f"AdamW: overlap {shift}", "AdamW", cut(shift), ValueError, message)
    twice: Change = lambda w: put("new_params", "v", 0, value=w.new_params["w"])(w)  # noqa: E731
    yield Row(
        "Adam: twice", "Adam", twice, ValueError, r"params\['v'\]\[0\] is the same array as params\['w'\]"
    )
    for stream in streams:
        owner_text = ("" if stream == "param" else "the state of ") + "param_groups[1]['params']['b'][0]"

        def share(world: World, stream: str = stream) -> None:
            source = group_of(world, 1)["params"][0] if stream == "param" else world.opt.state[1][stream]
            world.group["params"][1] = source[-1:]

        message = re.escape(f"param_groups[2]['params'][1] shares memory with {owner_text}")
        yield Row(f"add_param_group: end of {stream}", "add_param_group", share, ValueError, message)


def change_rows() -> Iterator[Row]:
    """Parameters that are not what they were when the optimizer was made; the gradients still are."""
    own = "param_groups[1]['params']['b'][0]"
    has = f"{own} has shape {{}}, but the state of {own} has (7,)"
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
            yield Row(f"{call}: param {id}", call, broken, error, re.escape(message))
    grad_place = re.escape("grad for param_groups[1]['params']['b'][0]")
    for id in ("grown", "shrunk", "emptied", "row", "int64", "float32", "swapped"):
        change, error, _ = changes[id]
        for call in ("step", "step()", "zero_grad"):
            broken = lambda w, change=change: change(w.grads[1]["b"][0])  # noqa: E731
            yield Row(f"{call}: grad {id}", call, broken, error, f"{grad_place} (has|is) ")
    for role, id in itertools.product(ROLES[1:], ("grown", "row", "int64")):
        change = {
            "grown": lambda a: a.resize((4, 4), refcheck=False),
            "row": lambda a: assign(a, "shape", (1, 12)),
            "int64": lambda a: assign(a, "dtype", "i8"),
        }[id]
        broken = lambda w, change=change, role=role: change(w.arrays[role])  # noqa: E731
        error = TypeError if id == "int64" else ValueError
        yield Row(f"adam_step: {role} {id}", "adam_step", broken, error, f"{role} has ")


NO_NUMBER: dict[str, Any] = {
    "str": "0.1",
    "bytes": b"0.1",
    "numpy str": np.str_("0.1"),
    "None": None,
    "bool": True,
    "numpy bool": np.True_,
    "complex": 0.1 + 0j,
    "0-d complex": np.array(0.1 + 1j),
    "array": np.array([0.1, 0.1]),
    "list": [0.1],
    "dict": {},
    "object": object(),
    "type": float,
    "time": np.timedelta64(5, "s"),
}
# What float() takes, and no number is: NumPy warns of the first one only.
SLIPS: dict[str, Any] = {
    "numpy complex": np.complex128(0.1 + 1j),
    "0-d str": np.array("0.1"),
    "0-d bool": np.array(True),
    "0-d object": np.array("0.1", object),
    "void": np.void(b"1234"),
}
OUT_OF_RANGE: dict[str, Any] = {
    "nan": NAN,
    "inf": INF,
    "-inf": -INF,
    "negative": -1e-300,
    "int": -1,
    "float32 nan": np.float32(NAN),
    "0-d": np.array(-0.5),
    "fraction": Fraction(-1, 3),
}


def written(value: Any) -> str:
    """Like repr, which has another form for scalars of NumPy since 2.0."""
    return f"{type(value).__name__}({value})" if isinstance(value, np.generic) else repr(value)


def bad_options() -> Iterator[tuple[str, str, Any, type[Exception], str]]:
    """id, option, value, error, how the message goes on after the option."""
    for key in ("lr", "eps", "weight_decay"):
        for id, value in NO_NUMBER.items():
            yield f"{key} {id}", key, value, TypeError, " must be a number, got "
        for id, value in SLIPS.items():
            yield f"{key} {id}", key, value, TypeError, " must be a number, got "
        for id, value in OUT_OF_RANGE.items():
            yield f"{key} {id}", key, value, ValueError, " must be finite and >= 0, got "
        yield f"{key} huge int", key, 10**400, ValueError, " is too large for a float"
    for i in (0, 1):
        pairs = [(value, 0.9) if i == 0 else [0.9, value] for value in NO_NUMBER.values()]
        for id, pair in zip(NO_NUMBER, pairs, strict=True):
            yield f"betas[{i}] {id}", "betas", pair, TypeError, rf"\[{i}\] must be a number"
        for value in (1, 1.0, np.nextafter(1, 2), 2**70, -1e-300, NAN, INF, np.float32(1)):
            pair = (value, 0.9) if i == 0 else (0.9, value)
            yield f"betas[{i}]={written(value)}", "betas", pair, ValueError, rf"\[{i}\] must be >= 0 and < 1"
    for value in (0.9, "ab", None, np.array([0.9, 0.99]), {0.9, 0.99}, {0: 0.9, 1: 0.99}, iter((0.9, 0.99))):
        yield f"betas {type(value)}", "betas", value, TypeError, " must be a pair of numbers"
    for value in ((), [0.9], (0.9,) * 3):
        yield f"betas {value}", "betas", value, ValueError, " must be a pair of numbers"
    for key in ("amsgrad", "maximize"):
        for value in (1, 0, 1.0, "True", None, np.True_, [], np.array([True, False]), np.array(True)):
            yield f"{key}={written(value)}", key, value, TypeError, " must be True or False, got "


def option_rows() -> Iterator[Row]:
    """Every option in every place where it may be given."""
    for i, (id, key, value, error, message) in enumerate(bad_options()):
        given, edited = re.escape(key), rf"param_groups\[1\]\['{key}'\]"
        added, added_error, added_message = rf"param_groups\[2\]\['{key}'\]", error, message
        if isinstance(value, np.ndarray) and value.size > 1:
            added_error, added_message = ValueError, " is an array: arrays to train belong under"
        saved = rf"state_dict\['param_groups'\]\[1\]\['{key}'\]"
        rows = [
            Row(f"AdamW: {id}", "AdamW", put("new_options", key, value=value), error, given + message),
            Row(
                f"adam_step: {id}", "adam_step", put("step_options", key, value=value), error, given + message
            ),
            Row(
                f"add_param_group: {id}",
                "add_param_group",
                put("group", key, value=value),
                added_error,
                added + added_message,
            ),
            Row(
                f"load_state_dict: {id}",
                "load_state_dict",
                put("state_dict", "param_groups", 1, key, value=value),
                error,
                saved + message,
            ),
            *(
                Row(f"{call}: edited {id}", call, edit(1, key, value), error, edited + message)
                for call in ("step", "step()", "state_dict", "save")
            ),
        ]
        if hasattr(value, "dtype") and key in ("amsgrad", "maximize"):
            rows = [
                row for row in rows if row.call != "load_state_dict"
            ]  # which takes them as PyTorch's tensors
        yield Row(f"Adam: {id}", "Adam", put("new_options", key, value=value), error, given + message)
        if key == "lr":
            yield Row(f"set lr: {id}", "set lr", put("lr", value=value), error, given + message)
        # All calls ask the same reader: some values everywhere, the others somewhere.
        everywhere = id.endswith((" str", " nan", "=None", "=1.0"))
        yield from (rows if everywhere else [rows[i % len(rows)]])
    for key, wrong in (("decoupled_weight_decay", 1), ("decoupled_weight_decay", None)):
        message = "decoupled_weight_decay'?(\\])? must be True or False"
        yield Row(f"Adam: {key}={wrong}", "Adam", put("new_options", key, value=wrong), TypeError, message)
        yield Row(
            f"adam_step: {key}={wrong}",
            "adam_step",
            put("step_options", key, value=wrong),
            TypeError,
            message,
        )
        place = r"param_groups\[0\]\['decoupled_weight_decay'\] must be True or False"
        yield Row(f"step: {key}={wrong}", "step", edit(0, key, wrong), TypeError, place)
    change = put("new_options", "decoupled_weight_decay", value=True)
    yield Row(
        "AdamW: decoupled",
        "AdamW",
        change,
        TypeError,
        ".*unexpected keyword argument 'decoupled_weight_decay'",
    )
    for call, attribute in (("Adam", "new_options"), ("AdamW", "new_options"), ("adam_step", "step_options")):
        change = put(attribute, "learning_rate", value=0.1)
        yield Row(
            f"{call}: unknown", call, change, TypeError, ".*unexpected keyword argument 'learning_rate'"
        )
    for id, value, error, message in (
        ("0", 0, ValueError, "must be >= 1 or None, got 0"),
        ("negative", -(2**70), ValueError, "must be >= 1 or None, got -"),
        ("many", 4097, ValueError, "must be at most 4096, got 4097"),
        ("0-d 0", np.array(0), ValueError, "must be >= 1 or None, got 0"),
        ("bool", False, TypeError, "must be an int or None, got False"),
        ("numpy bool", np.True_, TypeError, "must be an int or None, got"),
        ("float", 2.0, TypeError, "must be an int or None, got 2.0"),
        ("numpy float", np.float64(2), TypeError, "must be an int or None, got"),
        ("nan", NAN, TypeError, "must be an int or None, got nan"),
        ("str", "2", TypeError, "must be an int or None, got '2'"),
        ("complex", 2j, TypeError, "must be an int or None, got 2j"),
        ("list", [2], TypeError, r"must be an int or None, got \[2\]"),
        ("float array", np.array(2.0), TypeError, "must be an int or None, got"),
        ("array", np.array([2]), TypeError, "must be an int or None, got"),
    ):
        for call, attribute in (
            ("Adam", "new_options"),
            ("AdamW", "new_options"),
            ("load", "load_options"),
            ("adam_step", "step_options"),
        ):
            change = put(attribute, "num_threads", value=value)
            yield Row(f"{call}: num_threads {id}", call, change, error, f"num_threads {message}")
    for id, value, error, message in (
        ("0", 0, ValueError, "must be >= 1 and < 2..63, got 0"),
        ("negative", -(2**63) - 1, ValueError, "must be >= 1 and"),
        ("2**63", 2**63, ValueError, "must be >= 1 and"),
        ("0-d 0", np.array(0), ValueError, "must be >= 1 and"),
        ("uint64", np.uint64(2**63), ValueError, "must be >= 1 and"),
        ("bool", True, TypeError, "must be an int, got True"),
        ("numpy bool", np.True_, TypeError, "must be an int, got"),
        ("float", 3.0, TypeError, "must be an int, got 3.0"),
        ("nan", NAN, TypeError, "must be an int, got nan"),
        ("str", "3", TypeError, "must be an int, got '3'"),
        ("None", None, TypeError, "must be an int, got None"),
        ("complex", 3j, TypeError, "must be an int, got 3j"),
        ("fraction", Fraction(3), TypeError, "must be an int, got"),
        ("float array", np.array(3.0), TypeError, "must be an int, got"),
        ("array", np.array([3]), TypeError, "must be an int, got"),
    ):
        change = put("step_options", "step", value=value)
        yield Row(f"adam_step: step {id}", "adam_step", change, error, f"step {message}")
    yield Row(
        "adam_step: no step", "adam_step", drop("step_options", "step"), TypeError, ".*argument: 'step'"
    )
    no_maximum = put("arrays", "max_exp_avg_sq", value=None)
    yield Row("adam_step: no maximum", "adam_step", no_maximum, ValueError, "amsgrad needs max_exp_avg_sq")
    for role in ROLES[:4]:
        change = drop("arrays", role)
        yield Row(f"adam_step: no {role}", "adam_step", change, TypeError, f".*argument: '{role}'")


def structure_rows() -> Iterator[Row]:
    """Containers that do not fit: gradients, parameters, groups, and groups that were edited."""
    for call in ("step", "step()", "zero_grad"):
        for id, change, message in (
            (
                "a group less",
                drop("grads", 1),
                "grads: expected an entry for each of the 2 param groups, got 1",
            ),
            (
                "a group more",
                lambda w: w.grads.append(None),
                "grads: expected an entry .* 2 param groups, got 3",
            ),
            ("none", lambda w: w.grads.clear(), "grads: expected an entry .* 2 param groups, got 0"),
            ("a key less", drop("grads", 1, "b"), r"grads\[1\]: expected a dict .* without the key 'b'"),
            (
                "a key more",
                put("grads", 1, "c", value=None),
                r"grads\[1\]: expected a dict with 1 .* got one with 2",
            ),
            ("list for dict", put("grads", 1, value=[]), r"grads\[1\]: expected a dict .*got list"),
            ("None for dict", put("grads", 1, value=None), r"grads\[1\]: expected a dict .*got NoneType"),
            ("array for dict", put("grads", 1, value=np.ones(7)), r"grads\[1\]: expected a dict .*ndarray"),
            (
                "an entry less",
                drop("grads", 1, "b", 1),
                r"grads\[1\]\['b'\]: expected a list with 2 .*one with 1",
            ),
            (
                "an entry more",
                lambda w: w.grads[1]["b"].append(None),
                r"grads\[1\]\['b'\]: .*with 2 .*one with 3",
            ),
            (
                "array for list",
                put("grads", 1, "b", value=np.ones((2, 7))),
                r"grads\[1\]\['b'\]: expected a list",
            ),
            (
                "str for list",
                put("grads", 1, "b", value="ab"),
                r"grads\[1\]\['b'\]: expected a list .*got str",
            ),
        ):
            yield Row(f"{call}: {id}", call, change, ValueError, message)
        for id, change in (
            ("list for array", put("grads", 0, make=lambda a: [a])),
            ("dict for array", put("grads", 0, make=lambda a: {"a": a})),
            ("tuple for array", put("grads", 1, "b", 0, make=lambda a: (a,))),
        ):
            message = r"grad for param_groups\[.\]\['params'\].* is of type .*One array is needed here"
            yield Row(f"{call}: {id}", call, change, TypeError, message)
    expected = "grads: expected a list with an entry for each of the 2 param groups, got "
    for value in ("ab", {}, np.ones(2), {1, 2}):
        name = type(value).__name__
        yield Row(f"step: {name}", "step", put("grads", value=value), ValueError, expected + ".*" + name)
        yield Row(f"set grads: {name}", "step()", put("opt", "_grads", value=value), ValueError, expected)
    for id, value in (("number", 5), ("0-d", np.array(5.0)), ("object", object())):
        yield Row(f"step: {id}", "step", put("grads", value=value), ValueError, expected)
        for call in ("step()", "zero_grad"):
            yield Row(
                f"{call}: set grads {id}", call, put("opt", "_grads", value=value), ValueError, expected
            )
    no_grads = put("opt", "_grads", value=None)
    yield Row("step: no grads", "step()", no_grads, ValueError, r"step\(\) needs grads")

    for call in ("Adam", "AdamW"):
        for id, value, error, message in (
            ("empty", {}, ValueError, "params has no arrays"),
            ("nested empty", [[], {"a": ()}], ValueError, "params has no arrays"),
            ("None", None, TypeError, "params is of type NoneType"),
            ("str", "w", TypeError, "params is of type str"),
            ("number", 1.0, TypeError, "params is of type float"),
            ("bytes", b"w", TypeError, "params is of type bytes"),
            ("None inside", {"w": [np.ones(2), None]}, TypeError, r"params\['w'\]\[1\] is of type NoneType"),
            ("str inside", {"w": {5: "x"}}, TypeError, r"params\['w'\]\[5\] is of type str"),
            ("group empty", [{"params": []}], ValueError, r"param_groups\[0\]\['params'\] has no arrays"),
            (
                "second empty",
                [{"params": np.ones(2)}, {"params": {}}],
                ValueError,
                r"param_groups\[1\]\['params'\]",
            ),
            (
                "no group",
                [{"params": np.ones(2)}, np.ones(2)],
                ValueError,
                r"params\[1\] has no key 'params'",
            ),
            (
                "array option",
                [{"params": np.ones(2), "b": np.ones(2)}],
                ValueError,
                r"param_groups\[0\]\['b'\] is an a",
            ),
        ):
            yield Row(f"{call}: {id}", call, put("new_params", value=value), error, message)
    for id, value, error, message in (
        ("None", None, TypeError, r"param_groups\[2\] must be a dict, got NoneType"),
        ("list", [np.ones(2)], TypeError, r"param_groups\[2\] must be a dict, got list"),
        ("str", "params", TypeError, r"param_groups\[2\] must be a dict, got str"),
        ("no params", {"lr": 1.0}, ValueError, r"param_groups\[2\] has no key 'params'"),
        ("no arrays", {"params": {}}, ValueError, r"param_groups\[2\]\['params'\] has no arrays"),
        ("None in it", {"params": None}, TypeError, r"param_groups\[2\]\['params'\] is of type NoneType"),
        (
            "array beside",
            {"params": np.ones(2), "x": np.ones(2)},
            ValueError,
            r"param_groups\[2\]\['x'\] is an array",
        ),
    ):
        yield Row(f"add_param_group: {id}", "add_param_group", put("group", value=value), error, message)
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"):
        message = rf"param_groups\[2\]\['{key}'\] is missing"
        change: Change = lambda w, key=key: (w.opt.defaults.pop(key), w.group.pop(key, None))  # noqa: E731
        yield Row(f"add_param_group: default {key}", "add_param_group", change, ValueError, message)
        message = rf"param_groups\[1\]\['{key}'\] is missing"
        change = lambda w, key=key: group_of(w, 1).pop(key)  # noqa: E731
        for call in ("step", "state_dict", "save"):
            yield Row(f"{call}: no {key}", call, change, ValueError, message)

    replaced = r"param_groups\[1\]\['params'\] was replaced"
    count = "param_groups has {} groups, but the optimizer was given 2"
    edits: dict[str, tuple[Change, type[Exception], str]] = {
        "list of the same": (
            lambda w: group_of(w, 1).update(params=[*group_of(w, 1)["params"]]),
            ValueError,
            replaced,
        ),
        "equal tuple": (
            lambda w: group_of(w, 1).update(params=(*group_of(w, 1)["params"], 0)[:2]),
            ValueError,
            replaced,
        ),
        "an array more": (lambda w: group_of(w, 1).update(params=(np.ones(7),) * 3), ValueError, replaced),
        "no params": (lambda w: group_of(w, 1).pop("params"), ValueError, replaced),
        "removed": (lambda w: w.opt.param_groups.pop(), ValueError, count.format(1)),
        "removed first": (lambda w: w.opt.param_groups.pop(0), ValueError, count.format(1)),
        "all removed": (lambda w: w.opt.param_groups.clear(), ValueError, count.format(0)),
        "appended": (lambda w: w.opt.param_groups.append(dict(group_of(w, 1))), ValueError, count.format(3)),
        "inserted": (lambda w: w.opt.param_groups.insert(0, {"params": ()}), ValueError, count.format(3)),
        "reversed": (
            lambda w: w.opt.param_groups.reverse(),
            ValueError,
            r"param_groups\[0\]\['params'\] was replaced",
        ),
        "twice": (put("opt", "param_groups", 1, make=dict.fromkeys), ValueError, replaced),
        "None": (put("opt", "param_groups", 1), TypeError, r"param_groups\[1\] must be a dict"),
        "list": (put("opt", "param_groups", 1, value=["lr"]), TypeError, r"param_groups\[1\] must be a dict"),
        "groups tuple": (
            put("opt", "param_groups", make=tuple),
            TypeError,
            "param_groups must be a list, got tuple",
        ),
        "groups None": (put("opt", "param_groups"), TypeError, "param_groups must be a list, got NoneType"),
        "groups dict": (
            put("opt", "param_groups", value={}),
            TypeError,
            "param_groups must be a list, got dict",
        ),
    }
    for id, (change, error, message) in edits.items():
        for call in ("step", "step()", "add_param_group", "state_dict", "load_state_dict", "save"):
            yield Row(f"{call}: groups {id}", call, change, error, message)

        def without_buffers(world: World, change: Change = change) -> None:
            world.opt.grads = None
            change(world)

        yield Row(f"grads: groups {id}", "grads", without_buffers, error, message)
    for id in ("None", "list"):
        change, error, message = edits[id]
        yield Row(f"set lr: groups {id}", "set lr", change, error, message)
    yield Row(
        "get lr",
        "get lr",
        lambda w: None,
        ValueError,
        "the groups have different learning rates, .*0.01, 0.02",
    )


def state_rows() -> Iterator[Row]:
    """Checkpoints in memory with each of their fields broken; tests/test_state.py has more of each."""
    entry, saved_group = r"state_dict\['state'\]\[2\]", r"state_dict\['param_groups'\]\[1\]"
    rows: list[tuple[str, Change, type[Exception], str]] = [
        ("None", put("state_dict"), TypeError, "state_dict must be a dict"),
        ("path", put("state_dict", value="adam.safetensors"), TypeError, "state_dict must be a dict"),
        ("no state", drop("state_dict", "state"), ValueError, "state_dict has no key 'state'"),
        ("no groups", drop("state_dict", "param_groups"), ValueError, "state_dict has no key 'param_groups'"),
        (
            "state list",
            put("state_dict", "state", value=[]),
            TypeError,
            r"state_dict\['state'\] must be a dict",
        ),
        (
            "groups dict",
            put("state_dict", "param_groups", value={}),
            TypeError,
            r"state_dict\['param_groups'\] must",
        ),
        (
            "a group less",
            drop("state_dict", "param_groups", 0),
            ValueError,
            "state_dict has 1 param groups, the",
        ),
        (
            "a group twice",
            put("state_dict", "param_groups", make=lambda g: g * 2),
            ValueError,
            "state_dict has 4 ",
        ),
        ("group None", put("state_dict", "param_groups", 1), TypeError, f"{saved_group} must be a dict"),
        (
            "no ids",
            drop("state_dict", "param_groups", 1, "params"),
            ValueError,
            f"{saved_group} has no key 'params'",
        ),
        (
            "ids int",
            put("state_dict", "param_groups", 1, "params", value=1),
            TypeError,
            rf"{saved_group}\['params'\]",
        ),
        (
            "ids array",
            put("state_dict", "param_groups", 1, "params", value=np.arange(2)),
            TypeError,
            saved_group,
        ),
        (
            "ids of arrays",
            put("state_dict", "param_groups", 1, "params", make=lambda i: [np.ones(1)] * 2),
            TypeError,
            saved_group,
        ),
        (
            "an id less",
            put("state_dict", "param_groups", 1, "params", value=[1]),
            ValueError,
            f"{saved_group} has 1 param",
        ),
        (
            "an id twice",
            put("state_dict", "param_groups", 1, "params", value=[1, 0]),
            ValueError,
            ".*lists a parameter twice",
        ),
        (
            "other ids",
            put("state_dict", "param_groups", 1, "params", value=[1, "2"]),
            ValueError,
            r".*no group: \[2\]",
        ),
        (
            "names",
            put("state_dict", "param_groups", 1, "param_names", value=["b.1", "b.0"]),
            ValueError,
            rf"{saved_group}: its parameter 0 is named",
        ),
        (
            "names str",
            put("state_dict", "param_groups", 1, "param_names", value="b.0"),
            TypeError,
            rf"{saved_group}\['param_n",
        ),
        ("entry None", put("state_dict", "state", 2), TypeError, f"{entry} must be a dict"),
        (
            "entry of nobody",
            put("state_dict", "state", 3, value={}),
            ValueError,
            r"state_dict\['state'\] has entries",
        ),
        (
            "field of SGD",
            put("state_dict", "state", 2, "momentum", value=1),
            ValueError,
            rf"{entry} has \['momentum'\]",
        ),
        (
            "other parameter's",
            lambda w: w.state_dict["state"].update({2: w.state_dict["state"][1]}),
            ValueError,
            entry,
        ),
    ]
    for step, error in itertools.chain(
        zip(
            (-1, 0.5, NAN, INF, 2**53 + 1, np.array(-1), np.float32(0.1), Fraction(5, 2)),
            [ValueError] * 8,
            strict=True,
        ),
        zip(
            ("3", None, True, 3j, [3], np.array([3]), np.array("3"), np.array(True)),
            [TypeError] * 8,
            strict=True,
        ),
    ):
        error = TypeError if isinstance(step, Fraction) else error
        rows.append(
            (
                f"step {written(step)}",
                put("state_dict", "state", 2, "step", value=step),
                error,
                rf"{entry}\['step'\] must",
            )
        )
    for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        rows.append(
            (f"no {name}", drop("state_dict", "state", 2, name), ValueError, f"{entry} has no '{name}'")
        )
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        place = rf"{entry}\['{name}'\]"
        for dtype in ("f4", "f2", "i8", "c16", "?", "O", SWAPPED + "f8", "g", "f8,f8"):
            if np.dtype(dtype) == np.float64:
                continue  # long double, where it is none
            change = put("state_dict", "state", 2, name, make=lambda a, dtype=dtype: filled(a, dtype))
            rows.append(
                (f"{name} {dtype}", change, TypeError, f"{place} has dtype .*, the parameter float64")
            )
        for id, make in MISFITS.items():
            if id != "other float":
                change = put("state_dict", "state", 2, name, make=make[0])
                rows.append(
                    (f"{name} {id}", change, ValueError, rf"{place} has shape .*, the parameter \(2, 3\)")
                )
        for id, value in (
            ("None", None),
            ("list", [[0.0] * 3] * 2),
            ("number", 0.0),
            ("bytes", b"0"),
        ):
            change = put("state_dict", "state", 2, name, value=value)
            rows.append((f"{name} {id}", change, TypeError, f"{place} must be an array, got"))
        change = put("state_dict", "state", 2, name, make=lambda a: np.ma.masked_less(a, 0))
        rows.append((f"{name} masked", change, TypeError, f"{place} must be an array, got MaskedArray"))
    for id, change, error, message in rows:
        yield Row(f"load_state_dict: {id}", "load_state_dict", change, error, message)


def file_rows() -> Iterator[Row]:
    """Paths where nothing can be, files that are no checkpoints, and options that no file can hold."""

    def to(name: str, *, load: bool = False) -> Change:
        attribute = "load_path" if load else "path"
        return lambda world: setattr(world, attribute, world.folder / name)

    for call, load in (("save", False), ("load", True)):
        attribute = "load_path" if load else "path"
        if sys.platform == "win32":
            continue  # other errors
        yield Row(f"{call}: no folder", call, to("missing/a", load=load), FileNotFoundError, ".*missing")
        yield Row(f"{call}: folder", call, to("kept", load=load), IsADirectoryError, ".*kept")
        under = to("kept/adam.safetensors/a", load=load)
        yield Row(f"{call}: file as folder", call, under, NotADirectoryError, r".*adam\.safetensors")
        yield Row(f"{call}: long name", call, to("kept/" + "x" * 300, load=load), OSError, ".*x{300}")
        yield Row(f"{call}: zero byte", call, put(attribute, value="a\0b"), ValueError, ".*embedded null")
        for id, value in (("None", None), ("float", 1.5), ("list", ["a"]), ("dict", {})):
            yield Row(
                f"{call}: path {id}",
                call,
                put(attribute, value=value),
                TypeError,
                ".*PathLike object, not " + type(value).__name__,
            )
    yield Row("load: no file", "load", to("kept/none", load=True), FileNotFoundError, ".*kept/none")
    yield Row("save: path int", "save", put("path", value=10**6), TypeError, ".*PathLike object, not int")
    yield Row(
        "load: path int", "load", put("load_path", value=10**6), TypeError, ".*PathLike object, not int"
    )

    def damaged(damage: Callable[[bytearray], Any]) -> Change:
        def change(world: World) -> None:
            content = bytearray(world.path.read_bytes())
            damage(content)
            world.load_path = world.folder / "damaged"
            world.load_path.write_bytes(content)

        return change

    def flip(position: int, bit: int = 0) -> Change:
        def damage(content: bytearray) -> None:
            content[position] ^= 1 << bit

        return damaged(damage)

    for id, change in {
        "empty": damaged(lambda c: c.clear()),
        "cut in length": damaged(lambda c: c.__delitem__(slice(5, None))),
        "cut in header": damaged(lambda c: c.__delitem__(slice(100, None))),
        "cut by a byte": damaged(lambda c: c.pop()),
        "longer by a byte": damaged(lambda c: c.append(0)),
        "zeros": damaged(lambda c: c.__setitem__(slice(None), bytes(len(c)))),
        "flip in length": flip(1),
        "flip in header": flip(60),
        "flip in last array": flip(-1, 7),
        "flip in first array": flip(-300, 3),
        "text": damaged(lambda c: c.__setitem__(slice(None), b"no checkpoint\n" * 9)),
    }.items():
        yield Row(
            f"load: {id}", "load", change, CheckpointError, ".*damaged: .*(checkpoint|bytes|checksum|cut off)"
        )

    b = ("loaded_params", 1, "params")
    for id, change, error, message in (
        (
            "a group less",
            drop("loaded_params", 0),
            CheckpointError,
            ".*it has 2 parameter groups, but params has 1",
        ),
        (
            "no groups",
            put("loaded_params", value=np.ones(3)),
            CheckpointError,
            ".*it has 2 parameter groups, but params has 1",
        ),
        (
            "a parameter less",
            put(*b, "b", make=lambda p: p[:1]),
            CheckpointError,
            ".*param_groups.1.: 'b.1' in the file but not in params",
        ),
        (
            "other names",
            put(*b, make=lambda p: {"c": p["b"]}),
            CheckpointError,
            ".*'b.0', 'b.1' in the file but not in params; 'c.0', 'c.1' in params",
        ),
        (
            "other shape",
            put(*b, "b", 0, value=np.ones(8)),
            CheckpointError,
            r".*parameter 'b.0' of param_groups\[1\] is float64 of shape \(8,\), but .*\(7,\)",
        ),
        (
            "other dtype",
            put(*b, "b", 0, value=np.ones(7, "f4")),
            CheckpointError,
            r".*parameter 'b.0' of param_groups\[1\] is float32 .* but float64",
        ),
        (
            "flat",
            put("loaded_params", 0, "params", value=np.ones(12, "f4")),
            CheckpointError,
            r".*parameter 0 of param_groups\[0\] is .* \(12,\), but .* \(3, 4\)",
        ),
        ("no arrays", put(*b, value=[]), ValueError, r"param_groups\[1\]\['params'\] has no arrays"),
        ("None", put("loaded_params"), TypeError, "params is of type NoneType"),
        (
            "twice",
            lambda w: put(*b, "b", 1, value=w.loaded_params[1]["params"]["b"][0])(w),
            ValueError,
            ".*same array",
        ),
    ):
        yield Row(f"load: params {id}", "load", change, error, message)
    for id, value in (
        ("nan", NAN),
        ("inf", INF),
        ("set", {1}),
        ("bytes", b"x"),
        ("complex", 1j),
        ("array", np.ones(2)),
        ("object", object()),
        ("nested", {"a": [{"b": 1j}]}),
        ("function", len),
    ):
        message = r"param_groups\[1\]\['note'\].* is .*, which cannot be saved"
        yield Row(f"save: option {id}", "save", edit(1, "note", value), TypeError, message)

    class Enough(Exception):
        pass

    def enough(done: int, total: int) -> None:
        raise Enough("said progress")

    for call, attribute in (("save", "save_options"), ("load", "load_options")):
        stop = put(attribute, "progress", value=enough)
        yield Row(f"{call}: progress raises", call, stop, Enough, "said progress")
        no_function = put(attribute, "progress", value=5)
        yield Row(f"{call}: progress int", call, no_function, TypeError, "'int' object is not callable")


ROWS = [
    *array_rows(),
    *overlap_rows(),
    *change_rows(),
    *option_rows(),
    *structure_rows(),
    *state_rows(),
    *file_rows(),
]


# --- The tests --------------------------------------------------------------------------------------


def as_parameter(row: Row) -> Any:
    return pytest.param(row, id=row.id)


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
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids) >= 60
    assert {row.call for row in ROWS} == CALLS.keys()
