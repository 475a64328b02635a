"""Trees of arrays for tests, and a bit-for-bit snapshot of what a refused call must leave alone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fused_adam
from cases import EVERYTHING, Arrays
from fused_adam import Adam, adam_step


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, lists and tuples, each with its path as Python would write it."""
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    else:
        yield path, tree
        return
    for key, child in children:
        yield from leaves(child, f"{path}[{key!r}]")


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: map_tree(function, child) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        children = [map_tree(function, child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return function(tree)


def random_like(tree: Any, seed: int) -> Any:
    """Arrays of the same structure, shapes, dtypes and memory order; the same for the same seed."""
    rng = np.random.default_rng(seed)

    def draw(array: Any) -> Any:
        new = np.empty_like(array, subok=False)
        new[...] = rng.standard_normal(array.shape)
        return new

    return map_tree(draw, tree)


def train(opt: Adam, like: Any, seeds: Sequence[int]) -> None:
    """One step for each seed."""
    for seed in seeds:
        opt.step(random_like(like, seed))


def use_buffers(opt: Adam, grads: Any) -> None:
    """Where gradients are checked as in a step: in zero_grad()."""
    opt.grads = grads
    opt.zero_grad()


def assign(array: np.ndarray, name: str, value: Any) -> None:
    """Sets shape or dtype in place, which NumPy would rather see in no program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        setattr(array, name, value)


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Two trees of arrays, as sequences of leaves: their containers and memory orders may differ."""
    a, b = list(leaves(actual)), list(leaves(expected))
    assert len(a) == len(b)
    different = [path for (path, x), (_, y) in zip(a, b, strict=True) if not same_bits(x, y)]
    assert not different, f"bits differ at {different}"


def assert_same_state(actual: Adam, expected: Adam) -> None:
    """Step counts and moments of two optimizers."""
    assert len(actual.state) == len(expected.state)
    for index, entry in expected.state.items():
        found = dict(actual.state[index])
        assert found.keys() == entry.keys(), f"state[{index}]"
        assert found.pop("step") == entry.pop("step"), f"state[{index}]['step']"
        assert_same_bits(found, entry)


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array whose memory it is."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _array_facts(array: np.ndarray) -> tuple[Any, ...]:
    owner = owner_of(array)  # a write between the elements of a strided view counts too
    layout = (array.dtype, array.shape, array.strides, array.flags.writeable)
    return (id(array), *layout, np.asarray(array).tobytes(), np.asarray(owner).tobytes())


class Snapshot:
    """Everything that a refused call must leave alone: trees of arrays, and what an optimizer holds.

    Of the optimizer: its arrays, moments (and where they are), step counts, options and groups.
    """

    def __init__(self, opt: Adam | None, *trees: Any) -> None:
        self._opt, self._trees = opt, trees
        self._kept: list[Any] = []  # as long as these live, no other object has their id
        self._before = dict(self._facts())

    def _identity(self, value: Any) -> int:
        self._kept.append(value)
        return id(value)

    def _facts(self) -> Iterator[tuple[str, Any]]:
        for i, tree in enumerate(self._trees):
            for path, leaf in leaves(tree, f"tree {i}"):
                is_array = isinstance(leaf, np.ndarray)
                yield path, _array_facts(leaf) if is_array else self._identity(leaf)
        if self._opt is None:
            return
        yield "defaults", dict(self._opt.defaults)
        yield "steps", self._opt.steps
        for i, group in enumerate(self._opt.param_groups):
            yield f"param_groups[{i}]", self._identity(group)
            for key, value in group.items():
                yield f"param_groups[{i}][{key!r}]", self._identity(value)
            for path, array in leaves(group["params"], f"param_groups[{i}]['params']"):
                yield path, _array_facts(array)
        for index, entry in self._opt.state.items():
            yield f"state[{index}]['step']", entry.pop("step")
            for name, array in entry.items():  # a new view each time: its address says which memory
                place = array.ctypes.data if array.flags.writeable else None  # or a copy of what is coded
                yield f"state[{index}][{name!r}]", (place, array.shape, array.tobytes())

    def assert_unchanged(self) -> None:
        after = dict(self._facts())
        assert after.keys() == self._before.keys()
        changed = [where for where, fact in self._before.items() if fact != after[where]]
        assert not changed, f"changed: {changed}"


@contextmanager
def refused(
    error: type[BaseException],
    message: str,
    opt: Adam | None,
    *trees: Any,
    undo: Callable[[], Any] = lambda: None,
) -> Iterator[None]:
    """The body must raise, and change nothing: of `opt`, of `trees`.

    Body and `undo` together may break and mend something themselves: the comparison is of before the body
    with after `undo`.
    """
    before = Snapshot(opt, *trees)
    with pytest.raises(error, match=message) as caught:
        yield
    assert type(caught.value) is error, "a subclass of the promised error"
    # pybind11's own refusal of an argument: a dump of signatures that means nothing to a user.
    assert "incompatible" not in str(caught.value)
    undo()
    before.assert_unchanged()


class Scene:
    """An optimizer two steps into training, and a twin that is spared the bad calls.

    The parameters mix dtypes, layouts, a container in a container, and arrays of one element. "w" is the
    last, in a group of its own where there are groups: what is wrong with it comes to light when all
    others might have been updated.
    """

    def __init__(self, grouped: bool = False) -> None:
        self.grouped = grouped
        self.params, self.opt = self._make()
        self.twin_params, self.twin = self._make()

    def _make(self) -> tuple[Any, Adam]:
        empty = {
            "b": [np.empty(5, np.float32), np.empty((2, 3), order="F")],
            "one": np.empty(1, np.float32),
            "scalar": np.empty((), np.float32),
            "w": np.empty((3, 4), np.float32),
        }
        params = random_like(empty, seed=1)
        given = self.mirror(params)
        if self.grouped:
            given = [{"params": given[0], "lr": 0.02}, {"params": given[1]}]
        opt = Adam(given, lr=0.01, weight_decay=0.1, amsgrad=True)
        train(opt, self.mirror(params), seeds=(2, 3))
        return params, opt

    def mirror(self, tree: dict[str, Any]) -> Any:
        """A dict like params as what step() expects."""
        if not self.grouped:
            return tree
        return [{key: child for key, child in tree.items() if key != "w"}, tree["w"]]

    def grads(self, seed: int = 4) -> Any:
        return self.mirror(random_like(self.params, seed))

    def goes_on(self) -> None:
        """A correct step gives what it gives the optimizer that never saw a bad call."""
        self.opt.step(self.grads())
        self.twin.step(self.grads())
        assert_same_bits(self.params, self.twin_params)
        assert_same_state(self.opt, self.twin)


def like(array: np.ndarray, dtype: Any = None, order: Any = "K") -> np.ndarray:
    """A correct array in its place, but for what is asked for."""
    return np.ones_like(array, dtype=dtype, order=order, subok=False)


ROLES = Arrays._fields  # the names of all streams are arguments of adam_step


def adam_step_arrays() -> dict[str, np.ndarray]:
    """Correct arrays for adam_step, by the names of its arguments."""
    arrays = random_like({role: np.empty((3, 4), np.float32) for role in ROLES}, seed=6)
    return {role: abs(array) if "sq" in role else array for role, array in arrays.items()}


def adam_step_refused(arrays: dict[str, Any], error: type[Exception], message: str, **options: Any) -> None:
    with refused(error, message, None, arrays):
        adam_step(**arrays, **{"step": 3, **EVERYTHING, **options})


def interrupt_at(event: int, call: Callable[[], Any]) -> bool:
    """Raise KeyboardInterrupt at one line of this package during a call; False where it has fewer lines."""
    package, seen = str(Path(fused_adam.__file__).parent), 0

    def trace(frame: Any, kind: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(package):
            return None
        seen += kind == "line"
        if kind == "line" and seen == event:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
