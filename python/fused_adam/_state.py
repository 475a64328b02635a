"""The view that `Adam.state` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fused_adam import _core


class OptimizerState(Mapping[int | str, dict[str, Any]]):
    """A mapping from parameters, by index over all groups or by name, to their state.

    Iteration goes over indices. In a group all names are different; one that two groups use is refused:
    there the index decides.
    """

    def __init__(self, core: _core.Optimizer) -> None:
        self._core = core
        self._named: tuple[int, dict[str, list[int]]] = (0, {})  # of how many parameters, and their names

    def __getitem__(self, key: int | str) -> dict[str, Any]:
        if isinstance(key, str):
            found = self._indices_by_name().get(key, [])
            if len(found) != 1:
                problem = f"names the parameters {found}: use the index" if found else "is no parameter"
                raise KeyError(f"{key!r} {problem}")
            key = found[0]
        if not isinstance(key, (int, np.integer)) or not 0 <= key < len(self._core):
            raise KeyError(key)
        return self._core.state(int(key))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._core)))

    def __len__(self) -> int:
        return len(self._core)

    def _indices_by_name(self) -> dict[str, list[int]]:
        if self._named[0] != len(self._core):  # the optimizer may have got more since
            indices: dict[str, list[int]] = {}
            first = 0
            # A group that another thread adds in between is found the next time.
            for names, size in zip(self._core.names, self._core.sizes, strict=False):
                for index, name in enumerate(names or (), first):
                    indices.setdefault(name, []).append(index)
                first += size
            self._named = (first, indices)
        return self._named[1]

    def __repr__(self) -> str:
        return repr(dict(self))
