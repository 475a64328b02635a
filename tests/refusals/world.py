"""All that a call may be given or may touch, what it looks like to the last byte, and how it is mended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cases import EVERYTHING
from fused_adam import Adam, AdamW, adam_step
from snapshots import adam_step_arrays, assign, owner_of, random_like, train


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
        self.call_options: dict[str, Any] = {}  # of step()
        self.step_options: dict[str, Any] = {"step": 3, **EVERYTHING}
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
        if isinstance(value, (bool, int, float, complex, str, bytes)):
            self.facts[path] = (type(value), repr(value))
            return
        self._kept.append(value)
        fact: Any = (type(value), id(value))
        if isinstance(value, (np.ndarray, dict, list, tuple)) and id(value) in self._seen:
            self.facts[path] = fact  # described where it was first
            return
        self._seen.add(id(value))
        if isinstance(value, np.ndarray):
            fact = (*fact, value.dtype, value.shape, value.strides, value.flags.writeable)
            fact += (value.ctypes.data if self._addresses else None,)
            owner = owner_of(value)
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
