"""Learning rates as functions of a count of steps, from 0: ``Adam(params, lr=schedule)``.

They are plain values: they compare, pickle and print, and a call depends on nothing but its argument. A count
beyond the end of a schedule gives its last rate. A function of your own does as well.

>>> import numpy as np
>>> from fused_adam import Adam, schedules
>>> opt = Adam(np.ones(2), lr=schedules.WarmupCosine(1e-3, warmup=2, steps=6))
>>> for _ in range(7):
...     print(round(opt.lr, 6), end=" ")
...     info = opt.step(np.ones(2))
0.0 0.0005 0.001 0.000854 0.0005 0.000146 0.0
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fused_adam import _config

__all__ = [
    "Constant",
    "Cosine",
    "LinearWarmup",
    "OneCycle",
    "Piecewise",
    "Schedule",
    "StepDecay",
    "WarmupCosine",
    "WarmupLinear",
]


@dataclass(frozen=True)
class Schedule(ABC):
    """What all schedules are: a function of the number of steps that were made before this one.

    Raises
    ------
    TypeError, ValueError
        At construction: a rate that is no finite number >= 0, a number of steps that is no int >= 1
        (of a warm-up: >= 0). When called: a count that is no int >= 0.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "float":
                object.__setattr__(self, each.name, _number(each.name, value))
            elif each.type == "int":
                value = _config.as_int(each.name, value)
                least = 0 if each.name == "warmup" else 1
                if value < least:
                    raise ValueError(f"{each.name} must be >= {least}, got {value}.")
                object.__setattr__(self, each.name, value)

    def __call__(self, step: int) -> float:
        step = _config.as_int("step", step)
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}.")
        return float(self._rate(step))

    @abstractmethod
    def _rate(self, step: int) -> float: ...


@dataclass(frozen=True)
class Constant(Schedule):
    """Always `lr`."""

    lr: float

    def _rate(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """From `start` in a straight line to `lr`, which is reached at step `warmup` and kept.

    That of :class:`torch.optim.lr_scheduler.LinearLR` (there `start` is a factor).
    """

    lr: float
    warmup: int
    start: float = 0.0

    def _rate(self, step: int) -> float:
        return _line(self.start, self.lr, step, self.warmup)


@dataclass(frozen=True)
class Cosine(Schedule):
    """``end + (lr - end) * (1 + cos(pi * step / steps)) / 2`` up to `steps`, then `end`.

    That of :class:`torch.optim.lr_scheduler.CosineAnnealingLR` (which goes up again after its end) [1]_.

    References
    ----------
    .. [1] I. Loshchilov and F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
       https://arxiv.org/abs/1608.03983
    """

    lr: float
    steps: int
    end: float = 0.0

    def _rate(self, step: int) -> float:
        return _cosine(self.lr, self.end, step, self.steps)


@dataclass(frozen=True)
class _Warmup(Schedule):
    lr: float
    warmup: int
    steps: int
    start: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup must be less than steps, which counts it, too: got {self.warmup} of {self.steps}."
            )

    def _rate(self, step: int) -> float:
        if step < self.warmup:
            return _line(self.start, self.lr, step, self.warmup)
        return self._decay(self.lr, self.end, step - self.warmup, self.steps - self.warmup)

    @staticmethod
    @abstractmethod
    def _decay(start: float, end: float, step: float, steps: float) -> float: ...


class WarmupCosine(_Warmup):
    """A straight line from `start` to `lr` in `warmup` steps, then a cosine to `end` at `steps`, all in all.

    That of ``optax.warmup_cosine_decay_schedule``.
    """

    @staticmethod
    def _decay(start: float, end: float, step: float, steps: float) -> float:
        return _cosine(start, end, step, steps)


class WarmupLinear(_Warmup):
    """A straight line from `start` to `lr` in `warmup` steps, then another to `end` at `steps`, all in all.

    That of ``transformers.get_linear_schedule_with_warmup``.
    """

    @staticmethod
    def _decay(start: float, end: float, step: float, steps: float) -> float:
        return _line(start, end, step, steps)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up by a cosine from ``lr / div_factor`` to `lr`, and down by another one to ``lr / div_factor /
    final_div_factor``.

    That of :class:`torch.optim.lr_scheduler.OneCycleLR` with its two phases [1]_: the first ends at step
    ``pct_start * steps - 1``, the second one at ``steps - 1``.

    References
    ----------
    .. [1] L. N. Smith and N. Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large
       Learning Rates", 2018, https://arxiv.org/abs/1708.07120
    """

    lr: float
    steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pct_start <= 1:
            raise ValueError(f"pct_start must be from 0 to 1, got {self.pct_start!r}.")
        for name in ("div_factor", "final_div_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}.")

    def _rate(self, step: int) -> float:
        first = self.lr / self.div_factor
        peak, end = self.pct_start * self.steps - 1, float(self.steps - 1)
        if step <= peak:
            return _cosine(first, self.lr, step, peak)
        return _cosine(self.lr, first / self.final_div_factor, step - peak, end - peak)


@dataclass(frozen=True)
class StepDecay(Schedule):
    """``lr * gamma ** (step // every)``, as :class:`torch.optim.lr_scheduler.StepLR`."""

    lr: float
    every: int
    gamma: float = 0.1

    def _rate(self, step: int) -> float:
        return self.lr * self.gamma ** (step // self.every)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """Constant in pieces: ``Piecewise({0: 1e-3, 1000: 1e-4})`` is 1e-3 for steps 0 to 999, then 1e-4.

    Parameters
    ----------
    rates : dict
        The rate from each step on; one of them from step 0 on.
    """

    rates: Mapping[int, float] = field(hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rates, Mapping):
            raise TypeError(f"rates must be a dict, got {type(self.rates).__name__}.")
        checked = {
            _config.as_int("a step of rates", step): _number(f"rates[{step!r}]", rate)
            for step, rate in self.rates.items()
        }
        if min(checked, default=1) != 0:
            raise ValueError("rates must have a rate from step 0 on, and none from before it.")
        object.__setattr__(self, "rates", dict(sorted(checked.items())))

    def _rate(self, step: int) -> float:
        starts = list(self.rates)
        return self.rates[starts[bisect_right(starts, step) - 1]]


def _number(name: str, value: Any) -> float:
    if not _config.is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}.")
    return float(value)


def _line(start: float, end: float, step: float, steps: float) -> float:
    return end if step >= steps else start + (end - start) * (step / steps)


def _cosine(start: float, end: float, step: float, steps: float) -> float:
    return end if step >= steps else end + (start - end) * (1 + math.cos(math.pi * (step / steps))) / 2
