"""The optimizers of the demo: the textbooks' in NumPy, and ``fused_adam.Adam``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

import fused_adam
from fused_adam.demo.network import Params


class Optimizer(Protocol):
    """What training needs: ``fused_adam.Adam`` is one as it is."""

    def step(self, grads: Params, /) -> object:
        """Update in place the parameters that the optimizer was made for."""


class SGD:
    """Stochastic gradient descent."""

    def __init__(self, params: Params, lr: float) -> None:
        self.params = params
        self.lr = lr

    def step(self, grads: Params, /) -> None:
        for name, grad in grads.items():
            self.params[name] -= self.lr * grad


class Momentum(SGD):
    """SGD with heavy-ball momentum: the velocity remembers past gradients."""

    def __init__(self, params: Params, lr: float, decay: float = 0.9) -> None:
        super().__init__(params, lr)
        self.decay = decay
        self.velocity = _zeros_like(params)

    def step(self, grads: Params, /) -> None:
        for name, grad in grads.items():
            self.velocity[name] = self.decay * self.velocity[name] + grad
            self.params[name] -= self.lr * self.velocity[name]


class RMSprop(SGD):
    """Gradients divided by a running average of their size."""

    def __init__(self, params: Params, lr: float, decay: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(params, lr)
        self.decay, self.eps = decay, eps
        self.square = _zeros_like(params)

    def step(self, grads: Params, /) -> None:
        for name, grad in grads.items():
            self.square[name] = self.decay * self.square[name] + (1 - self.decay) * grad**2
            self.params[name] -= self.lr * grad / (np.sqrt(self.square[name]) + self.eps)


class TextbookAdam(SGD):
    """Adam as everyone writes it in NumPy: each operation one more pass over memory, and a temporary."""

    def __init__(
        self, params: Params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, lr)
        self.betas, self.eps, self.t = betas, eps, 0
        self.m, self.v = _zeros_like(params), _zeros_like(params)

    def step(self, grads: Params, /) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        for name, grad in grads.items():
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * grad
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * grad**2
            m_hat = self.m[name] / (1 - beta1**self.t)
            v_hat = self.v[name] / (1 - beta2**self.t)
            self.params[name] -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


@dataclass(frozen=True)
class Entrant:
    """An optimizer and the learning rate that suits it."""

    name: str
    new: Callable[[Params, float], Optimizer]
    lr: float


ENTRANTS = (
    Entrant("SGD", SGD, 0.1),
    Entrant("momentum", Momentum, 0.05),
    Entrant("RMSprop", RMSprop, 1e-3),
    Entrant("textbook Adam", TextbookAdam, 1e-3),
    Entrant("fused Adam", fused_adam.Adam, 1e-3),
)


def _zeros_like(params: Params) -> Params:
    return {name: np.zeros_like(param) for name, param in params.items()}
