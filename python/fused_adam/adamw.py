"""AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fused_adam._groups import NoDecay
from fused_adam._tables import options_in
from fused_adam.adam import Adam, EpsMode, LearningRate, Params, StateDType


class AdamW(Adam):
    """Adam with decoupled weight decay [1]_: :class:`Adam` with ``decoupled_weight_decay=True``.

    Before each step a parameter is multiplied by ``1 - lr * weight_decay``. What is loaded from a checkpoint
    is decoupled too, whatever it was there, as in PyTorch.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize, ema_decay, max_norm, clip_value, skip_nonfinite
        As in :class:`Adam`.
    eps_mode, bias_correction, master_weights, stochastic_rounding, seed, state_dtype
        As in :class:`Adam`.
    no_decay, allow_mixed, num_threads
        As in :class:`Adam`.
    weight_decay : float, default 1e-2
        >= 0.

    References
    ----------
    .. [1] I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
       https://arxiv.org/abs/1711.05101
    """

    _fixed_options: ClassVar[Mapping[str, Any]] = {"decoupled_weight_decay": True}

    def __init__(
        self,
        params: Params | Sequence[dict[str, Any]],
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        ema_decay: float | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        eps_mode: EpsMode = "outside",
        bias_correction: bool = True,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        state_dtype: StateDType | None = None,
        no_decay: NoDecay | None = None,
        allow_mixed: bool = False,
        num_threads: int | None = None,
    ) -> None:
        options = options_in(locals())
        super().__init__(
            params,
            **options,
            decoupled_weight_decay=True,
            no_decay=no_decay,
            allow_mixed=allow_mixed,
            num_threads=num_threads,
        )
