"""Steps of parameters that are stored in 16 bits, and PyTorch's of the same.

    python -m benchmarks.storage [ROUNDS]

GPT-2 small, with 1 thread and with 2: parameters and gradients in float32, bfloat16 and float16, and with
master weights. PyTorch's fused step keeps its moments in 16 bits then, where they stand still (with beta2 =
0.999 a second moment changes by less than half of its last bit); here they are float32. Each in a process
of its own, in turn; medians of the rounds. FUSED_ADAM_ISA counts for both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.workloads import WORKLOADS

SHAPES = WORKLOADS[-1].shapes
THREADS = (1, 2)
# By name: the dtype, whether there are master weights, bytes that a step of ours moves for an element.
STORAGES = {
    "float32": ("float32", False, 28),
    "bfloat16": ("bfloat16", False, 22),
    "float16": ("float16", False, 22),
    "bfloat16, master weights": ("bfloat16", True, 28),
}


def arrays(seed: int, dtype: str) -> list[np.ndarray]:
    from ml_dtypes import bfloat16

    rng = np.random.default_rng(seed)
    stored = bfloat16 if dtype == "bfloat16" else dtype
    return [rng.standard_normal(shape, np.float32).astype(stored) for shape in SHAPES]


def ours(threads: int, dtype: str, masters: bool) -> Callable[[], Any]:
    from fused_adam import AdamW

    opt, grads = AdamW(arrays(0, dtype), num_threads=threads, master_weights=masters), arrays(1, dtype)
    return lambda: opt.step(grads)


def torchs(threads: int, dtype: str) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    stored = getattr(torch, dtype)
    params = [torch.nn.Parameter(torch.from_numpy(array).to(stored)) for array in arrays(0, "float32")]
    for param, grad in zip(params, arrays(1, "float32"), strict=True):
        param.grad = torch.from_numpy(grad).to(stored)
    return torch.optim.AdamW(params, fused=True).step


def worker(side: str, threads: int, storage: str) -> None:
    """Milliseconds of a step, the median of five."""
    if threads == 1 and sys.platform == "linux":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    dtype, masters, _ = STORAGES[storage]
    call = torchs(threads, dtype) if side == "torch" else ours(threads, dtype, masters)
    samples = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - begin))
    print(json.dumps(statistics.median(samples[1:])))


def main(rounds: int) -> None:
    print(f"{sum(map(np.prod, SHAPES)) / 1e6:.0f} M elements, ms: ours, against float32; PyTorch's")
    for threads in THREADS:
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for storage, (_, masters, _) in STORAGES.items():
                for side in ("ours",) if masters else ("ours", "torch"):
                    command = [sys.executable, "-m", "benchmarks.storage", side, str(threads), storage]
                    limits = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                    ms = json.loads(subprocess.check_output(command, env=limits))
                    found.setdefault((side, storage), []).append(ms)
        medians = {key: statistics.median(samples) for key, samples in found.items()}
        for storage, (_, masters, moved) in STORAGES.items():
            ms = medians["ours", storage]
            other = "" if masters else f"{medians['torch', storage]:7.1f}"
            ratio = ms / medians["ours", "float32"]
            bytes_moved = f"{moved} bytes an element"
            print(
                f"{threads} threads  {storage:24} {ms:7.1f}  {ratio:.2f}  {other:7}  {bytes_moved}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
