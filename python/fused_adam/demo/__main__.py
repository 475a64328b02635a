"""``python -m fused_adam.demo``: learn to read handwritten digits, with five optimizers."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

# Import names and the names to install.
_NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def main() -> int:
    """Train, report, draw.

    Returns
    -------
    int
        The exit status: 1 if packages are missing or the result is not what it has to be.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fused_adam.demo",
        description="Learn to read handwritten digits, with fused Adam and four optimizers in plain NumPy.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fused_adam_demo.png"),
        metavar="PATH",
        help="where to write the picture of the loss curves (default: %(default)s)",
    )
    output: Path = parser.parse_args().output

    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        return _fail(f'the demo needs: pip install "fused-adam[demo]" (missing: {", ".join(missing)})')
    # Only now: these need what was just looked for.
    from tqdm import tqdm

    from fused_adam.demo import plot, report, training
    from fused_adam.demo.optimizers import ENTRANTS

    digits = training.load()
    runs = []
    with tqdm(total=len(ENTRANTS) * training.EPOCHS, unit="epoch") as progress:
        for entrant in ENTRANTS:
            progress.set_description(f"{entrant.name:13}")
            runs.append(training.train(entrant, digits, progress.update))
    *_, textbook, fused = runs
    difference = report.largest_difference(textbook, fused)
    agree = difference <= report.TOLERANCE
    verdict = f"Textbook Adam and fused Adam {'agree' if agree else 'do not agree'}"
    verdict += f": their losses differ by at most {difference:.1e}"

    print(report.table(runs))
    print(f"{verdict}, over {len(fused.losses):,} steps (tolerance {report.TOLERANCE:.0e}).")
    print(f"Time in the optimizer, textbook Adam / fused Adam: {textbook.seconds / fused.seconds:.1f}.")
    try:
        plot.save(runs, digits, verdict, output)
    except OSError as error:
        return _fail(f"Cannot write the picture: {error}")
    print(f"The loss curves are in {output}.")

    if not agree:
        return _fail("FAILED: textbook Adam and fused Adam must agree.")
    if fused.accuracy < report.WANTED_ACCURACY:
        return _fail(
            f"FAILED: fused Adam must read {report.WANTED_ACCURACY:.0%} of the test digits correctly."
        )
    return 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
