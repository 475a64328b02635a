"""What a training loop does around Adam, in the step and as passes of its own, in PyTorch.

    python -m benchmarks.onepass [ROUNDS]

GPT-2 small in float32, with 1 thread and with 2. Each side runs in processes of its own, in turn; medians of
the rounds. PyTorch's passes are what its users call: `GradScaler.unscale_`, `clip_grad_norm_` (by the faster
of its two ways), AdamW with fused=True, `zero_grad(set_to_none=False)`, an average by `_foreach_lerp_`. (With
set_to_none=True the next backward pass makes the gradients anew instead.)
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
SCALE, MAX_NORM, DECAY = 65536.0, 1.0, 0.999
WHAT = ("step", "clip, step", "unscale, clip, step, zero, average")


def arrays(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in SHAPES]


def ours(threads: int) -> dict[str, Callable[[], Any]]:
    from fused_adam import AdamW

    grads = arrays(1)
    plain = AdamW(arrays(0), num_threads=threads)
    every = AdamW(arrays(0), num_threads=threads, ema_decay=DECAY)
    return {
        WHAT[0]: lambda: plain.step(grads),
        WHAT[1]: lambda: plain.step(grads, max_norm=MAX_NORM),
        WHAT[2]: lambda: every.step(
            grads, grad_scale=SCALE, max_norm=MAX_NORM, skip_nonfinite=True, zero_grad=True
        ),
    }


def torchs(threads: int) -> dict[str, Callable[[], Any]]:
    import torch

    torch.set_num_threads(threads)
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in arrays(0)]
    for param, grad in zip(params, arrays(1), strict=True):
        param.grad = torch.from_numpy(grad)
    averages = [param.detach().clone() for param in params]
    opt = torch.optim.AdamW(params, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**9)

    def clip(foreach: bool) -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for foreach in (False, True) * 3:
        begin = time.perf_counter()
        clip(foreach)
        seconds[foreach].append(time.perf_counter() - begin)
    is_faster = min(seconds[True]) < min(seconds[False])

    def clip_and_step() -> None:
        clip(is_faster)
        opt.step()

    def all_five() -> None:
        scaler.scale(torch.ones(()))
        scaler.unscale_(opt)
        clip(is_faster)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=False)
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - DECAY)

    return dict(zip(WHAT, (opt.step, clip_and_step, all_five), strict=True))


def worker(side: str, threads: int) -> None:
    """Milliseconds of each, medians of five."""
    if threads == 1 and sys.platform == "linux":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = {}
    for what, call in {"ours": ours, "torch": torchs}[side](threads).items():
        samples = []
        for _ in range(6):
            begin = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - begin))
        found[what] = statistics.median(samples[1:])
    print(json.dumps(found))


def main(rounds: int) -> None:
    print(f"{sum(map(np.prod, SHAPES)) / 1e6:.0f} M float32, ms; PyTorch's time / ours")
    for threads in THREADS:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "torch": []}
        for _ in range(rounds):
            for side, results in found.items():
                command = [sys.executable, "-m", "benchmarks.onepass", side, str(threads)]
                limits = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                results.append(json.loads(subprocess.check_output(command, env=limits)))
        for what in WHAT:
            ms = {side: statistics.median(r[what] for r in results) for side, results in found.items()}
            ratio = ms["torch"] / ms["ours"]
            print(
                f"{threads} threads  {what:36} {ms['ours']:7.1f} {ms['torch']:7.1f}  {ratio:.2f}", flush=True
            )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        worker(sys.argv[1], int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 5)
