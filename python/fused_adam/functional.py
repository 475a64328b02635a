"""The step as a function, for frameworks with optimizer classes of their own."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fused_adam import _config, _core
from fused_adam._step_info import PLAIN_STEP, StepInfo
from fused_adam._tables import options_in, streams_in


def adam_step(
    param: npt.NDArray[Any],
    grad: npt.NDArray[Any],
    exp_avg: npt.NDArray[Any],
    exp_avg_sq: npt.NDArray[Any],
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    ema_decay: float | None = None,
    max_norm: float | None = None,
    clip_value: float | None = None,
    skip_nonfinite: bool = False,
    eps_mode: Literal["outside", "hat", "root"] = "outside",
    bias_correction: bool = True,
    master_weights: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    state_dtype: Literal["bfloat16", "float8"] | None = None,
    max_exp_avg_sq: npt.NDArray[Any] | None = None,
    ema: npt.NDArray[Any] | None = None,
    master_param: npt.NDArray[Any] | None = None,
    exp_avg_scale: npt.NDArray[np.uint8] | None = None,
    exp_avg_sq_scale: npt.NDArray[np.uint8] | None = None,
    grad_scale: float | None = None,
    zero_grad: bool = False,
    allow_mixed: bool = False,
    num_threads: int | None = None,
) -> StepInfo:
    """One Adam step on arrays that the caller owns. Updates them in place; `grad` only with `zero_grad`.

    The kernel, the formula and the bits are those of :class:`fused_adam.Adam`.

    Parameters
    ----------
    param, grad, exp_avg, exp_avg_sq : numpy.ndarray
        Of one shape and one dtype (float32 or float64), contiguous in the same order; where `param` is
        float16 or bfloat16, `grad` is that or float32, and all else float32. The two averages are zeros
        before the first step.
    step : int
        The number of this step, counted from 1. It decides the bias corrections.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay, ema_decay
        As in :class:`fused_adam.Adam`.
    eps_mode, bias_correction, master_weights, stochastic_rounding, seed
        As in :class:`fused_adam.Adam`. For stochastic rounding every `param` is the first one: give each a
        seed of its own.
    state_dtype : {"bfloat16", "float8"}, optional
        As in :class:`fused_adam.Adam`. With "bfloat16" the averages are the bits of such numbers, in uint16
        (or bfloat16, of ml_dtypes). With "float8" they are codes, in uint8, of shape ``(param.size,)``, for
        the elements in the order in which they lie in memory.
    max_norm, clip_value, skip_nonfinite
        As in :class:`fused_adam.Adam`, for this gradient alone.
    max_exp_avg_sq : numpy.ndarray, optional
        Like `exp_avg_sq`; needed for `amsgrad`.
    ema : numpy.ndarray, optional
        Like `exp_avg`, and a copy of `param` before the first step; needed for `ema_decay`.
    master_param : numpy.ndarray, optional
        Likewise; needed for `master_weights` where `param` is of 16 bits.
    exp_avg_scale, exp_avg_sq_scale : numpy.ndarray, optional
        The exponents of blocks of 128 codes, in uint8, of shape ``(ceil(param.size / 128),)``, zeros before
        the first step; needed for "float8".
    grad_scale : float, optional
        Divide the gradient by it first, as in :meth:`fused_adam.Adam.step`.
    zero_grad : bool, default False
        Set `grad` to zeros once it is used, or the step is skipped.
    allow_mixed, num_threads : optional
        As in :class:`fused_adam.Adam`.

    Returns
    -------
    StepInfo
        Where it says `skipped`, the next call has the same `step` again.

    Raises
    ------
    TypeError
        Something that is not an array, another dtype, or different dtypes.
    ValueError
        Different shapes, strided, unaligned, byte-swapped, read-only or overlapping arrays,
        hyper-parameters out of range, `step` below 1. Nothing has been written then.

    Notes
    -----
    Nothing is kept between calls, so each makes a plan of its own, in a few small allocations; a step of
    :class:`fused_adam.Adam` makes none. Where several of the arrays are memory maps, each call asks the
    operating system which files they are of (Linux: 0.3 ms).

    Examples
    --------
    >>> import numpy as np
    >>> param, exp_avg, exp_avg_sq = np.full(2, 2.0), np.zeros(2), np.zeros(2)
    >>> info = adam_step(param, np.array([3.0, -3.0]), exp_avg, exp_avg_sq, step=1)
    >>> param
    array([1.999, 2.001])
    """
    options, arrays = options_in(locals()), streams_in(locals())
    step = _config.as_int("step", step)
    _config.require_flag("zero_grad", zero_grad)
    _config.require_flag("allow_mixed", allow_mixed)
    if not 1 <= step < 2**63:
        raise ValueError(f"step must be >= 1 and < 2**63, got {step}.")
    threads = _config.threads(num_threads)
    report = _core.adam_step(_config.ISA, threads, options, step, arrays, zero_grad, grad_scale, allow_mixed)
    return PLAIN_STEP if report is None else StepInfo(*report)
