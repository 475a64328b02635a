"""What an optimizer is given: one structure of arrays or groups of them, and which are not to decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np

from fused_adam import _core
from fused_adam._config import require_flag

# Patterns of names, or a function of a name and its array.
NoDecay: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool]


def is_groups(params: Any) -> bool:
    """A list of dicts with "params" is groups; any other list is a structure of arrays."""
    if not isinstance(params, (list, tuple)) or not params:
        return False
    with_params = [isinstance(entry, Mapping) and "params" in entry for entry in params]
    if any(with_params) and not all(with_params):
        raise ValueError(
            f"params[{with_params.index(False)}] has no key 'params', but other entries have: "
            "a list of groups needs it in each."
        )
    return all(with_params)


class DecayRule:
    """Who is not to decay, by the `no_decay` of a caller, which is checked."""

    def __init__(self, no_decay: NoDecay | None) -> None:
        self._predicate = no_decay if callable(no_decay) else None
        patterns = [no_decay] if isinstance(no_decay, str) else no_decay
        self._patterns: list[str] = []
        if patterns is not None and not callable(patterns):
            is_list = isinstance(patterns, (list, tuple))
            if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(
                    "no_decay must be patterns of names, like ['*bias', '*norm*'], or a function of a name "
                    f"and its array, got {no_decay!r}."
                )
            self._patterns = list(patterns)
        self._unmatched = set(self._patterns)
        self._example = ""

    @property
    def is_needed(self) -> bool:
        return self._predicate is not None or bool(self._patterns)

    def divided(self, structure: _core.Structure) -> list[tuple[bool, list[int]]]:
        """The leaves that decay (True), and then those that do not (False), where there are any."""
        if not self.is_needed:
            return [(True, list(range(len(structure))))]
        parts: dict[bool, list[int]] = {True: [], False: []}
        for leaf, (name, array) in enumerate(zip(structure.names, structure.leaves, strict=True)):
            # What is no array is refused later, by a message of its own.
            is_asked = self._predicate is None or isinstance(array, np.ndarray)
            parts[not (is_asked and self.spares(name, array))].append(leaf)
        return [(decays, leaves) for decays, leaves in parts.items() if leaves]

    def require_matches(self) -> None:
        """ValueError for a pattern that nothing had: misspelt, it would change how a model trains."""
        for pattern in self._patterns:
            if pattern in self._unmatched:
                raise ValueError(
                    f"no_decay has a pattern {pattern!r} that no parameter matches. Their names are like "
                    f"{self._example!r}; a pattern matches a whole name, or its end after a dot."
                )

    def spares(self, name: str, array: Any) -> bool:
        """Is this one not to decay?"""
        self._example = self._example or name
        if self._predicate is not None:
            answer = self._predicate(name, array)
            if isinstance(answer, np.bool_):
                answer = bool(answer)
            require_flag(f"no_decay({name!r}, ...)", answer)
            return answer
        matched = [p for p in self._patterns if fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}")]
        self._unmatched.difference_update(matched)
        return bool(matched)
