"""What a step reports."""

from __future__ import annotations

from typing import Final, NamedTuple


class StepInfo(NamedTuple):
    """What :meth:`Adam.step` reports.

    Attributes
    ----------
    skipped : bool
        With `skip_nonfinite`: was there an infinity or a NaN, and so nothing changed?
    grad_norm : float or None
        With `max_norm` or `skip_nonfinite`: the 2-norm of all gradients, unscaled and before they are
        clipped; 0.0 without any. None for a step that did not need it.
    """

    skipped: bool = False
    grad_norm: float | None = None


PLAIN_STEP: Final = StepInfo()
