"""How often the C library's pow gives another bias correction than the correctly rounded power of the core.

    python -m benchmarks.powers

PyTorch takes its corrections from the C library, so these are the steps in which its float64 results may
differ from ours; in float32 a difference in the last bit of a double is nearly always rounded away.
"""

from __future__ import annotations

import math
import random

STEPS = 100_000
NAMED = (0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999)


def powers(base: float, count: int) -> list[float]:
    """The powers 1 to `count`, with 200 bits behind the point, rounded once."""
    bits = 200
    factor = int(math.ldexp(base, 53)) << (bits - 53)
    value, found = 1 << bits, []
    for _ in range(count):
        value = value * factor >> bits
        found.append(value / (1 << bits))
    return found


def differ(base: float, step: int, correct: float) -> bool:
    return 1.0 - math.pow(base, step) != 1.0 - correct


def main() -> None:
    print(f"bias corrections that differ, of the first {STEPS:,} steps:")
    for beta in NAMED:
        steps = [t for t, correct in enumerate(powers(beta, STEPS), 1) if differ(beta, t, correct)]
        print(f"  beta {beta:<8} {len(steps):4}" + (f"   first at step {steps[0]}" if steps else ""))
    draw = random.Random(0)
    for digits in (3, None):
        for low, high in ((0.5, 0.9), (0.9, 0.99), (0.99, 0.999)):
            betas = [draw.uniform(low, high) for _ in range(100)]
            betas = [round(beta, digits) if digits else beta for beta in betas]
            found = sum(
                differ(beta, t, correct) for beta in betas for t, correct in enumerate(powers(beta, 1000), 1)
            )
            some = f"with {digits} digits" if digits else "any double"
            print(f"  100 betas, {some}, in [{low}, {high}], 1,000 steps each: {found} of 100,000")


if __name__ == "__main__":
    main()
