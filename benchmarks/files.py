"""What a checkpoint costs for each array: many small ones, where the disk does not count.

python -m benchmarks.files [ARRAYS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fused_adam import Adam


def seconds(call: Callable[[], Any]) -> float:
    samples = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def main(count: int) -> None:
    params = [np.ones(3, np.float32) for _ in range(count)]
    opt = Adam(params)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adam.safetensors"
        save, load = seconds(lambda: opt.save(path)), seconds(lambda: Adam.load(path, params))
        print(
            f"{count:,} arrays of 3: save {save:.2f} s, load {load:.2f} s, {path.stat().st_size / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) == 2 else 100_000)
