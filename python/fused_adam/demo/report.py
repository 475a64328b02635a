"""What the demo says about its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fused_adam.demo.training import Run

# Textbook and fused Adam compute the same formula in float32 and round in another order, so their losses
# may differ by rounding and by what training makes of it. Over 64 seeds they differed by 5e-7 at most,
# twice the last bit of the first losses; a textbook run differs by up to 3e-6 from one whose first layer
# starts one last bit away. Errors show: at least 9e-6 for eps added before the bias correction, 2e-4 for
# eps inside the root or beta2 off by 1e-4, 6e-2 for a step count off by one (16 seeds).
TOLERANCE: Final = 5e-6
WANTED_ACCURACY: Final = 0.97


def table(runs: Sequence[Run]) -> str:
    """A line for each run."""
    lines = ["optimizer      learning rate  final training loss  test accuracy  time in optimizer   per step"]
    lines += [
        f"{run.name:13}  {run.lr:13g}  {run.final_loss:19.5f}  {run.accuracy * 100:11.1f} %"
        f"  {run.seconds * 1e3:14.1f} ms  {run.seconds / len(run.losses) * 1e6:6.1f} us"
        for run in runs
    ]
    return "\n".join(lines)


def largest_difference(a: Run, b: Run) -> float:
    """Between the loss curves of two runs, at any step."""
    return float(np.abs(a.losses - b.losses).max())
