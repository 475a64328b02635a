"""The scale of a loss whose gradients must not vanish in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fused_adam import _config
from fused_adam._step_info import StepInfo

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_ABOVE_1, _BELOW_1 = float(np.nextafter(1, 2)), float(np.nextafter(1, 0))
_RANGES: Final[Mapping[str, tuple[float, float, str]]] = {
    "scale": (_SMALLEST, _LARGEST, "from 1.2e-38 to 3.4e38"),
    "growth_factor": (_ABOVE_1, _LARGEST, "> 1"),
    "backoff_factor": (_SMALLEST, _BELOW_1, "> 0 and < 1"),
    "growth_interval": (1, 2**62, ">= 1"),
    "_growth_tracker": (0, 2**62, ">= 0"),
}


class LossScale:
    """A dynamic loss scale, in the manner of :class:`torch.amp.GradScaler`.

    The scale is multiplied by `growth_factor` after `growth_interval` steps in a row that were made, and by
    `backoff_factor` after each that was skipped. It is a float32 number, as in PyTorch, and stays a normal
    one.

    Parameters
    ----------
    init_scale : float, default 65536.0
        The first scale. > 0.
    growth_factor : float, default 2.0
        > 1.
    backoff_factor : float, default 0.5
        > 0 and < 1.
    growth_interval : int, default 2000
        Steps in a row. >= 1.

    Raises
    ------
    TypeError, ValueError
        An argument of another type or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from fused_adam import Adam, LossScale
    >>> w = np.zeros(2)
    >>> opt, scale = Adam(w), LossScale()
    >>> grads = np.array([1.0, np.inf]) * float(scale)  # of the loss times the scale
    >>> scale.update(opt.step(grads, grad_scale=scale, skip_nonfinite=True))
    >>> float(scale)
    32768.0
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self._state = _checked(
            {
                "scale": init_scale,
                "growth_factor": growth_factor,
                "backoff_factor": backoff_factor,
                "growth_interval": growth_interval,
                "_growth_tracker": 0,
            },
            "{}",
        )

    def __float__(self) -> float:
        return float(self._state["scale"])

    def update(self, info: StepInfo) -> None:
        """Take note of a step.

        Parameters
        ----------
        info : StepInfo
            What :meth:`Adam.step` returned, with ``skip_nonfinite=True``.

        Raises
        ------
        ValueError
            The step did not look for infinities, or was made although there were some.
        """
        if info.grad_norm is None or not (info.skipped or math.isfinite(info.grad_norm)):
            raise ValueError("the step did not look for infinities: opt.step(..., skip_nonfinite=True).")
        made = 0 if info.skipped else self._state["_growth_tracker"] + 1
        grows = made == self._state["growth_interval"]
        self._state["_growth_tracker"] = 0 if grows else made
        if grows or info.skipped:
            scale = self._state["scale"] * self._state["growth_factor" if grows else "backoff_factor"]
            if scale <= _LARGEST:
                self._state["scale"] = max(float(np.float32(scale)), _SMALLEST)

    def state_dict(self) -> dict[str, Any]:
        """All numbers, with the keys of :class:`torch.amp.GradScaler`, which loads them.

        Returns
        -------
        dict
        """
        return dict(self._state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, here or in PyTorch.

        Parameters
        ----------
        state_dict : dict

        Raises
        ------
        TypeError, ValueError
            A key is missing, or its value of another type or out of range. Nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}.")
        missing = [key for key in self._state if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict has no key {missing[0]!r}.")
        self._state = _checked({key: state_dict[key] for key in self._state}, "state_dict[{!r}]")

    def __repr__(self) -> str:
        return f"LossScale({float(self)!r})"


def _checked(state: dict[str, Any], where: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, (low, high, expected) in _RANGES.items():
        name = where.format("init_scale" if key == "scale" and where == "{}" else key)
        value = state[key]
        if not _config.is_number(value):
            raise TypeError(f"{name} must be a number, got {value!r}.")
        is_count = key in ("growth_interval", "_growth_tracker")
        value = _config.as_int(name, value) if is_count else float(value)
        if not low <= value <= high:
            raise ValueError(f"{name} must be {expected}, got {value!r}.")
        checked[key] = value
    return {**checked, "scale": float(np.float32(checked["scale"]))}
