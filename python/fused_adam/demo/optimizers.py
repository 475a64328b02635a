"""The entrants: four textbook optimizers in NumPy, as everyone writes them, and ``fused_adam.Adam``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

import fused_adam
from fused_adam.demo.network import Params


class Optimizer(Protocol):
    """What training asks of an optimizer; ``fused_adam.Adam`` is one as it is."""

    def step(self, grads: Params, /) -> object:
        """Update in place the parameters that it was made for."""


class SGD:
    """Stochastic gradient descent."""

    def __init__(self, params: Params, lr: float) -> None:
        self.params, self.lr = params, lr

    def step(self, grads: Params, /) -> None:
        for name, g in grads.items():
            self.params[name] -= self.lr * g


class Momentum:
    """SGD along a decaying sum of the gradients."""

    def __init__(self, params: Params, lr: float, decay: float = 0.9) -> None:
        self.params, self.lr, self.decay = params, lr, decay
        self.velocity = _zeros_like(params)

    def step(self, grads: Params, /) -> None:
        for name, g in grads.items():
            self.velocity[name] = self.decay * self.velocity[name] + g
            self.params[name] -= self.lr * self.velocity[name]


class RMSprop:
    """SGD with each gradient divided by its usual size."""

    def __init__(self, params: Params, lr: float, decay: float = 0.99, eps: float = 1e-8) -> None:
        self.params, self.lr, self.decay, self.eps = params, lr, decay, eps
        self.v = _zeros_like(params)

    def step(self, grads: Params, /) -> None:
        for name, g in grads.items():
            self.v[name] = self.decay * self.v[name] + (1 - self.decay) * g**2
            self.params[name] -= self.lr * g / (np.sqrt(self.v[name]) + self.eps)


class TextbookAdam:
    """Adam as in the paper: the formula of ``fused_adam.Adam``, with a temporary array per operation."""

    def __init__(
        self, params: Params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.m, self.v = _zeros_like(params), _zeros_like(params)
        self.t = 0

    def step(self, grads: Params, /) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        for name, g in grads.items():
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g**2
            m_hat = self.m[name] / (1 - beta1**self.t)
            v_hat = self.v[name] / (1 - beta2**self.t)
            self.params[name] -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


class Entrant(NamedTuple):
    """An optimizer, and the learning rate that it gets."""

    name: str
    new: Callable[[Params, float], Optimizer]
    lr: float


# The same rule for all rates: on the grid 1, 2, 5, 10, ..., two places below the largest at which training
# is steady (0.5, 0.1, 0.002 and 0.01). One place above that it diverges or, with RMSprop, relapses now and
# then.
ENTRANTS = (
    Entrant("SGD", SGD, 0.1),
    Entrant("momentum", Momentum, 0.02),
    Entrant("RMSprop", RMSprop, 0.0005),
    Entrant("textbook Adam", TextbookAdam, 0.002),
    Entrant("fused Adam", fused_adam.Adam, 0.002),
)


def _zeros_like(params: Params) -> Params:
    return {name: np.zeros_like(param) for name, param in params.items()}
