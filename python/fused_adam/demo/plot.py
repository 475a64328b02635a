"""The picture of the loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fused_adam.demo.network import Array
from fused_adam.demo.training import EPOCHS, Digits, Run

# Colours that the colour-blind can tell apart (Okabe and Ito). Fused Adam is a broad band and textbook
# Adam a dashed line on top of it: where they coincide, one sees it.
_STYLES: dict[str, dict[str, Any]] = {
    "SGD": {"color": "#E69F00"},
    "momentum": {"color": "#009E73"},
    "RMSprop": {"color": "#CC79A7"},
    "textbook Adam": {"color": "black", "linestyle": (0, (3.5, 2.5)), "zorder": 4},
    "fused Adam": {"color": "#56B4E9", "linewidth": 9, "zorder": 3},
}


def save(runs: Sequence[Run], digits: Digits, subtitle: str, path: Path) -> None:
    """Draw the loss curves into a PNG file."""
    with matplotlib.rc_context({"font.size": 13, "lines.linewidth": 2.2}):
        # A Figure of its own, without pyplot, needs no display and leaves nothing behind.
        figure = Figure(figsize=(10.5, 6.5))
        axes = figure.add_subplot()
        # In the order in which the curves end, from top to bottom.
        for run in sorted(runs, key=lambda run: run.final_loss, reverse=True):
            epochs = np.linspace(0, EPOCHS, len(run.losses))
            label = f"{run.accuracy * 100:.1f} %  {run.name}"
            axes.plot(epochs, _smooth(run.losses), label=label, **_STYLES[run.name])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(0, EPOCHS)
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss (cross-entropy, smoothed)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="test digits read correctly", alignment="left", frameon=False, handlelength=3)
        axes.set_title(
            "A small network learns to read handwritten digits",
            fontsize=19,
            fontweight="bold",
            loc="left",
            pad=34,
        )
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, color="#555555")

        # What there is to read, in the corner that the curves leave free: one of each digit.
        corner = axes.inset_axes((0.02, 0.03, 0.5, 0.13))
        firsts = [digits.test_images[digits.test_labels == digit][0] for digit in range(10)]
        corner.imshow(np.hstack([image.reshape(8, 8) for image in firsts]), cmap="Greys")
        corner.axis("off")
        figure.savefig(path, format="png", dpi=150, bbox_inches="tight", pad_inches=0.25)


def _smooth(losses: Array) -> Array:
    """Averages over an epoch to either side, near steps counting more; over what there is at the ends."""
    window = np.hanning(2 * len(losses) // EPOCHS)
    sums = np.convolve(losses, window, "same")
    smooth: Array = sums / np.convolve(np.ones(len(losses)), window, "same")
    return smooth
