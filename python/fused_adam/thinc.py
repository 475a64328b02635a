"""An optimizer for thinc and spaCy. Importing this module, and nothing else of the package, needs thinc.

>>> import numpy as np
>>> from fused_adam.thinc import Adam
>>> optimizer = Adam(0.25)
>>> w, grad = optimizer((1, "W"), np.ones(2, np.float32), np.array([0.5, 0], np.float32))
>>> w.round(3), grad
(array([0.75, 1.  ], dtype=float32), array([0., 0.], dtype=float32))
"""

# No `from __future__ import annotations`: thinc's configs read the annotations of __init__ as they stand.
# Where thinc is not installed its base class is an Any for mypy; where it is, get_array_ops is not annotated.
# mypy: allow-subclassing-any, disable-error-code="import-not-found, no-untyped-call"

from typing import Any

import numpy as np
from thinc.backends import get_array_ops
from thinc.config import registry
from thinc.optimizers import Optimizer, ScheduleT

from fused_adam.functional import adam_step


class Adam(Optimizer):
    """Adam for thinc models: thinc's parameters, defaults and calls, and this package's fused step.

    For ``model.finish_update(optimizer)``, ``model.use_params(optimizer.averages)``, spaCy's training
    loop, and configs: ``@optimizers = "fused_adam.Adam.v1"``.

    Parameters
    ----------
    learn_rate : float, list, generator or Schedule, default 1e-3
        As all others but the last two: a number, or something that gives one for each
        ``step_schedules()``.
    L2 : default 0
        Weight decay, decoupled or added to the gradient: see `L2_is_weight_decay`.
    beta1, beta2 : default 0.9 and 0.999
        Decay rates of the averages of the gradient and of its square.
    eps : default 1e-8
        Added to the denominator before the bias correction, as thinc does: ``eps_mode="hat"``.
    grad_clip : default 1.0
        The largest norm of the gradient of one parameter; 0 for no clipping.
    L2_is_weight_decay : bool, default True
        The decoupled form (AdamW). The weights shrink before the step; in thinc's own Adam after it.
    use_averages : bool, default True
        Keep averages of the weights in ``optimizer.averages``; of large ones that takes longer than a step.

    Notes
    -----
    Weights, ``mom1`` and ``mom2`` are updated in place, and the gradient is filled with zeros. Where
    something is refused (see :func:`fused_adam.adam_step`), the weights, the moments and the count of
    updates have not changed; the gradient may have been clipped.
    """

    __slots__ = ()  # as thinc's: an attribute with a misspelt name is an error

    def __init__(
        self,
        learn_rate: ScheduleT = 1e-3,
        *,
        L2: ScheduleT = 0.0,
        beta1: ScheduleT = 0.9,
        beta2: ScheduleT = 0.999,
        eps: ScheduleT = 1e-8,
        grad_clip: ScheduleT = 1.0,
        L2_is_weight_decay: bool = True,
        use_averages: bool = True,
    ) -> None:
        super().__init__(
            learn_rate,
            L2=L2,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            grad_clip=grad_clip,
            L2_is_weight_decay=L2_is_weight_decay,
            use_averages=use_averages,
        )

    def __call__(
        self, key: tuple[int, str], weights: Any, gradient: Any, *, lr_scale: float = 1.0
    ) -> tuple[Any, Any]:
        """Update the weights in place and fill the gradient with zeros; returns both.

        Parameters
        ----------
        key : (int, str)
            What thinc calls the parameter: the id of its node and its name.
        weights, gradient : numpy.ndarray
            Of one shape and dtype.
        lr_scale : float, default 1.0
            Times the learning rate.
        """

        def now(schedule: Any) -> float:
            return float(schedule(self.step, key=key, last_score=self.last_score))

        if not gradient.size:
            return weights, gradient
        if not gradient.flags.writeable:
            raise ValueError("gradient is read-only, but is filled with zeros after the step.")
        ops = get_array_ops(weights)
        if clip := now(self.grad_clip):
            gradient = ops.clip_gradient(gradient, clip)
        moments: list[Any] = []
        for arrays in (self.mom1, self.mom2):
            if key not in arrays:
                arrays[key] = np.zeros_like(weights)
            moments.append(arrays[key])
        adam_step(
            weights,
            gradient,
            *moments,
            step=self.nr_update[key] + 1,
            lr=now(self.learn_rate) * lr_scale,
            betas=(now(self.b1), now(self.b2)),
            eps=now(self.eps),
            weight_decay=now(self.L2),
            decoupled_weight_decay=self.L2_is_weight_decay,
            eps_mode="hat",
            zero_grad=True,
        )
        self.nr_update[key] += 1
        if self.averages is not None:
            if key not in self.averages:
                self.averages[key] = ops.alloc(weights.shape, dtype=weights.dtype)
            ops.update_averages(self.averages[key], weights, self.nr_update[key])
        return weights, gradient


registry.optimizers("fused_adam.Adam.v1")(Adam)
