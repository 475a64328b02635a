"""Steps of what is stored in fewer bytes, and those of PyTorch and bitsandbytes.

    python -m benchmarks.storage [ROUNDS [M_ELEMENTS]]

GPT-2 small, or so many million elements in one array, with 1 thread and with 2: parameters and gradients in
float32, bfloat16 and float16, moments in float32, bfloat16 and 8 bits. PyTorch's fused step stores moments
as its parameters, where they stand still in 16 bits (with beta2 = 0.999 a second moment changes by less than
half of its last bit). Each in a process of its own, in turn; medians of the rounds. FUSED_ADAM_ISA counts for
both. bitsandbytes' 8-bit AdamW takes so long on a CPU that it has an array of 4 million elements.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.workloads import WORKLOADS

THREADS = (1, 2)


class Storage(NamedTuple):
    dtype: str  # of parameters and gradients
    bytes: float  # that a step of ours moves for an element
    options: dict[str, Any]
    torch: bool = False  # has it steps of these parameters?


STORAGES = {
    "float32": Storage("float32", 28, {}, True),
    "float32, bfloat16 moments": Storage("float32", 20, {"state_dtype": "bfloat16"}),
    "float32, 8-bit moments": Storage("float32", 16, {"state_dtype": "float8"}),
    "bfloat16": Storage("bfloat16", 22, {}, True),
    "bfloat16, bfloat16 moments": Storage("bfloat16", 14, {"state_dtype": "bfloat16"}),
    "bfloat16, 8-bit moments": Storage("bfloat16", 10, {"state_dtype": "float8"}),
    "bfloat16, stochastic": Storage("bfloat16", 22, {"stochastic_rounding": True}),
    "bfloat16, master weights": Storage("bfloat16", 28, {"master_weights": True}),
    "float16": Storage("float16", 22, {}, True),
}
BITSANDBYTES = "bitsandbytes, 8-bit moments"


def shapes() -> list[tuple[int, ...]]:
    size = os.environ.get("STORAGE_ELEMENTS")
    return [(int(size),)] if size else list(WORKLOADS[-1].shapes)


def arrays(seed: int, dtype: str) -> list[np.ndarray]:
    from ml_dtypes import bfloat16

    rng = np.random.default_rng(seed)
    stored = bfloat16 if dtype == "bfloat16" else dtype
    return [rng.standard_normal(shape, np.float32).astype(stored) for shape in shapes()]


def ours(threads: int, storage: Storage) -> Callable[[], Any]:
    from fused_adam import AdamW

    opt = AdamW(arrays(0, storage.dtype), num_threads=threads, **storage.options)
    grads = arrays(1, storage.dtype)
    return lambda: opt.step(grads)


def torchs(threads: int, dtype: str) -> list[Any]:
    import torch

    torch.set_num_threads(threads)
    stored = getattr(torch, dtype)
    params = [torch.nn.Parameter(torch.from_numpy(array).to(stored)) for array in arrays(0, "float32")]
    for param, grad in zip(params, arrays(1, "float32"), strict=True):
        param.grad = torch.from_numpy(grad).to(stored)
    return params


def step_of(side: str, threads: int, name: str) -> Callable[[], Any]:
    if side == "ours":
        return ours(threads, STORAGES[name])
    if side == "torch":
        import torch

        return torch.optim.AdamW(torchs(threads, STORAGES[name].dtype), fused=True).step
    import bitsandbytes

    step: Callable[[], Any] = bitsandbytes.optim.AdamW8bit(torchs(threads, "float32")).step
    return step


def worker(side: str, threads: int, name: str) -> None:
    """Nanoseconds of an element's step, the median of five."""
    if threads == 1 and sys.platform == "linux":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    call = step_of(side, threads, name)
    samples = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        samples.append(1e9 * (time.perf_counter() - begin))
    print(json.dumps(statistics.median(samples[1:]) / sum(map(np.prod, shapes()))))


def measured(side: str, threads: int, name: str, size: int | None = None) -> float:
    command = [sys.executable, "-m", "benchmarks.storage", side, str(threads), name]
    elements = {} if size is None else {"STORAGE_ELEMENTS": str(size)}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **elements}
    output = subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL)
    return float(json.loads(output.splitlines()[-1]))


def main(rounds: int, size: int | None) -> None:
    elements = sum(map(np.prod, shapes())) if size is None else size
    print(f"{elements / 1e6:.0f} M elements, ns an element: ours, against float32; PyTorch's, against ours")
    for threads in THREADS:
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for name, storage in STORAGES.items():
                for side in ("ours", "torch") if storage.torch else ("ours",):
                    found.setdefault((side, name), []).append(measured(side, threads, name, size))
        medians = {key: statistics.median(samples) for key, samples in found.items()}
        for name, storage in STORAGES.items():
            ns = medians["ours", name]
            theirs = medians.get(("torch", name))
            other = "" if theirs is None else f"{theirs:.3f}  {theirs / ns:.2f}"
            ratio = ns / medians["ours", "float32"]
            bytes_moved = f"{storage.bytes:g} bytes an element"
            print(
                f"{threads} threads  {name:28} {ns:.3f}  {ratio:.2f}  {other:12}  {bytes_moved}", flush=True
            )
        if importlib.util.find_spec("bitsandbytes") is not None:
            theirs = measured("bitsandbytes", threads, BITSANDBYTES, 4_000_000)
            ns = medians["ours", "float32, 8-bit moments"]
            print(
                f"{threads} threads  {BITSANDBYTES:28} {theirs:.1f}, {theirs / ns:.0f} times ours", flush=True
            )


if __name__ == "__main__":
    if len(sys.argv) > 3:
        worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        millions = float(sys.argv[2]) if len(sys.argv) > 2 else None
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, None if millions is None else int(1e6 * millions))
