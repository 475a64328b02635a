"""Adam and AdamW for NumPy arrays: one fused C++ pass per step, in place, exact.

>>> import numpy as np
>>> from fused_adam import Adam
>>> params = {"w": np.ones(3)}
>>> opt = Adam(params, lr=0.1)
>>> info = opt.step({"w": np.array([1.0, -2.0, 0.0])})
>>> params["w"]
array([0.9, 1.1, 1. ])
"""

from fused_adam._checkpoint import CheckpointError
from fused_adam._config import show_config
from fused_adam._core import __version__
from fused_adam._step_info import StepInfo
from fused_adam.adam import Adam
from fused_adam.adamw import AdamW
from fused_adam.functional import adam_step
from fused_adam.loss_scale import LossScale

__all__ = [
    "Adam",
    "AdamW",
    "CheckpointError",
    "LossScale",
    "StepInfo",
    "__version__",
    "adam_step",
    "show_config",
]
