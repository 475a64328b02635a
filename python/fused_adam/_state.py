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
        self._named: tuple[int, dict[str, list[int]]] = (0, {})  # of how many groups, and their names

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
        structures = self._core.structures  # of the optimizer, which may have got more since
        if self._named[0] != len(structures):
            indices: dict[str, list[int]] = {}
            index = 0
            for structure in structures:
                for name in structure.names:
                    if structure.named:
                        indices.setdefault(name, []).append(index)
                    index += 1
            self._named = (len(structures), indices)
        return self._named[1]

    def __repr__(self) -> str:
        return repr(dict(self))
