"""Who is measured. A peer gets shapes, a dtype and a number of threads, and returns its step.

Each peer runs in a process of its own (two OpenMP runtimes in one process ruin each other) and imports its
library inside its function: one that is not installed is left out by name. All get the same random parameters
and gradients; the gradients are reused, so that only the optimizer is timed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import Shape

Step = Callable[[], object]
Peer = Callable[[Sequence[Shape], str, int], Step]


def _arrays(shapes: Sequence[Shape], dtype: str) -> tuple[list[Any], list[Any]]:
    """Parameters and gradients; the same block of random numbers over and over, to be made quickly."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(65_537).astype(dtype)

    def filled(shape: Shape, scale: float) -> Any:
        return np.resize(block * np.dtype(dtype).type(scale), shape)

    return [filled(s, 1.0) for s in shapes], [filled(s, 0.01) for s in shapes]


def fused_adam(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    from fused_adam import Adam

    params, grads = _arrays(shapes, dtype)
    opt = Adam(params, num_threads=threads)
    return lambda: opt.step(grads)


def _torch_params(shapes: Sequence[Shape], dtype: str, threads: int) -> list[Any]:
    if _AVX2:
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    import torch

    torch.set_num_threads(threads)
    params = []
    for param, grad in zip(*_arrays(shapes, dtype), strict=True):
        params.append(torch.nn.Parameter(torch.from_numpy(param)))
        params[-1].grad = torch.from_numpy(grad)
    return params


def torch_fused(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    import torch

    return torch.optim.Adam(_torch_params(shapes, dtype, threads), fused=True).step


def deepspeed(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if dtype != "float32":
        raise NotImplementedError("DeepSpeedCPUAdam has no float64")
    return DeepSpeedCPUAdam(_torch_params(shapes, dtype, threads), adamw_mode=False).step


def numba_loop(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    if _AVX2:
        import llvmlite.binding as llvm

        features = llvm.get_host_cpu_features()
        features.update({name: False for name in features if name.startswith("avx512")})
        os.environ["NUMBA_CPU_FEATURES"] = features.flatten()
    import numba

    def loop(p: Any, g: Any, m: Any, v: Any, b1: Any, b2: Any, rate: Any, root: Any, eps: Any) -> None:
        one = b1 / b1
        for i in numba.prange(p.size):
            m[i] = b1 * m[i] + (one - b1) * g[i]
            v[i] = b2 * v[i] + (one - b2) * g[i] * g[i]
            p[i] -= rate * m[i] / (np.sqrt(v[i]) / root + eps)

    options = {"fastmath": True, "error_model": "numpy"}
    serial = numba.njit(**options)(loop)
    parallel = numba.njit(parallel=True, **options)(loop)
    numba.set_num_threads(threads)
    scalar = np.dtype(dtype).type
    state = [
        (p.ravel(), g.ravel(), np.zeros_like(p).ravel(), np.zeros_like(p).ravel())
        for p, g in zip(*_arrays(shapes, dtype), strict=True)
    ]
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        rate, root = scalar(1e-3 / (1 - 0.9**step)), scalar((1 - 0.999**step) ** 0.5)
        b1, b2, eps = scalar(0.9), scalar(0.999), scalar(1e-8)
        for p, g, m, v in state:
            # Whoever writes such a loop would also see that threads do not pay below this size.
            update = parallel if threads > 1 and p.size >= 16_384 else serial
            update(p, g, m, v, b1, b2, rate, root, eps)

    return run


def optax(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    import jax

    jax.config.update("jax_enable_x64", True)
    import optax as library

    params, grads = ([jax.numpy.asarray(a) for a in arrays] for arrays in _arrays(shapes, dtype))
    adam = library.adam(1e-3)
    state = adam.init(params)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = adam.update(grads, state, params)
        return library.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(1, 2))

    def run() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(compiled(grads, state, params))

    return run


def sklearn(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

    params, grads = _arrays(shapes, dtype)
    opt = AdamOptimizer(params)
    return lambda: opt.update_params(params, grads)


def thinc(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    from thinc.api import Adam

    if dtype != "float32":
        raise NotImplementedError("thinc has no float64")
    params, grads = _arrays(shapes, dtype)
    buffers = [grad.copy() for grad in grads]
    opt = Adam(1e-3, grad_clip=0.0, use_averages=False, L2=0.0)

    def run() -> None:
        for i, (param, grad, buffer) in enumerate(zip(params, grads, buffers, strict=True)):
            np.copyto(buffer, grad)  # thinc leaves zeros in the gradients
            opt((i, "w"), param, buffer)
        opt.step_schedules()

    return run


def numpy_textbook(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    params, grads = _arrays(shapes, dtype)
    ms, vs = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        for p, g, m, v in zip(params, grads, ms, vs, strict=True):
            m[...] = 0.9 * m + 0.1 * g
            v[...] = 0.999 * v + 0.001 * g**2
            m_hat = m / (1 - 0.9**step)
            v_hat = v / (1 - 0.999**step)
            p -= 1e-3 * m_hat / (np.sqrt(v_hat) + 1e-8)

    return run


def limit(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    if sum(map(prod, shapes)) < 32_768:
        raise NotImplementedError("below 32,768 elements it would measure the call from Python")
    return _compiled("limit", shapes, dtype, threads, np.dtype(dtype).itemsize // 4)


def divider(shapes: Sequence[Shape], dtype: str, threads: int) -> Step:
    if sum(map(prod, shapes)) < 16_384:
        threads = 1  # as in the other loops
    return _compiled(f"divider_{dtype}", shapes, dtype, threads, 1)


def _compiled(name: str, shapes: Sequence[Shape], dtype: str, threads: int, units: int) -> Step:
    """A loop of limit.cpp, over arrays of so many of its elements for one of ours."""
    from fused_adam import Adam

    params, grads = _arrays(shapes, dtype)
    state = Adam(params).state.values()  # for its moments, which lie where ours do
    moments = [(entry["exp_avg"], entry["exp_avg_sq"]) for entry in state]
    for _, second in moments:
        second[...] = 1
    count = len(shapes)
    pointers = ctypes.c_void_p * count
    streams = [
        pointers(*(a.ctypes.data for a in arrays)) for arrays in (params, grads, *zip(*moments, strict=True))
    ]
    sizes = (ctypes.c_int64 * count)(*(prod(s) * units for s in shapes))
    kernel = getattr(_library(), name)
    kernel.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 5, ctypes.c_int]
    kernel.restype = None
    run = lambda: kernel(count, *streams, sizes, threads)  # noqa: E731
    run.keep = (params, grads, moments)  # type: ignore[attr-defined]
    return run


def _library() -> Any:
    from fused_adam import show_config

    by_isa = {"avx512": ["-mavx512f", "-mprefer-vector-width=512"], "avx2": ["-mavx2"]}
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", *by_isa.get(show_config()["isa"], [])]
    source = Path(__file__).with_name("limit.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


PEERS: dict[str, Peer] = {
    "fused-adam": fused_adam,
    "torch fused": torch_fused,
    "DeepSpeed": deepspeed,
    "Numba loop": numba_loop,
    "optax, jit": optax,
    "thinc": thinc,
    "scikit-learn": sklearn,
    "textbook NumPy": numpy_textbook,
    "limit": limit,
    "divider": divider,
}

# No optimizers: what memory and the divider allow.
LIMITS = ("limit", "divider")

# Who can be kept to AVX2 on a CPU with more: FUSED_ADAM_ISA=avx2 does it for all of them.
ON_AVX2 = ("fused-adam", "torch fused", "Numba loop", *LIMITS)
_AVX2 = os.environ.get("FUSED_ADAM_ISA") == "avx2"
