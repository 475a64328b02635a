"""How close moments in fewer bytes come to what float32 moments do.

    python -m benchmarks.moments [STEPS]

Nothing is trained: each coding is given the same gradients, of seven kinds, and its updates are compared with
those of float32 moments. The codings stand here once more, in plain NumPy, beside some that were not taken;
before anything else, those of the package are compared with the moments that it has.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam import Adam

Floats: TypeAlias = npt.NDArray[np.float32]
Bits: TypeAlias = npt.NDArray[np.int32]

SIZE, BLOCK = 16_384, 128
BETAS = 0.9, 0.999
WEIGHT1, WEIGHT2, BETA2 = np.float32(1 - BETAS[0]), np.float32(1 - BETAS[1]), np.float32(BETAS[1])
EPS = np.float32(1e-8)


# --- What is added before bits are cut off -----------------------------------------------------------

# Of bits that are a row for each block: how many are cut off, the step, and 0 for m or 1 for v.
Added: TypeAlias = Callable[[Bits, int, int, int], Bits]


def nearest(bits: Bits, cut: int, step: int, moment: int) -> Bits:
    return (1 << (cut - 1)) - 1 + (bits >> cut & 1)


def dithered(bits: Bits, cut: int, step: int, moment: int) -> Bits:
    """As csrc/dither.hpp says."""
    of_step = hash32(hash32(hash32(1 + moment) ^ step >> 32) + step & 0xFFFFFFFF)
    return net(bits.shape, hash32(counting(len(bits)) ^ of_step), cut)


def dithered_over_steps(bits: Bits, cut: int, step: int, moment: int) -> Bits:
    """So that 256 steps of an element are a net, too: what was not taken, as v drifts."""
    key = hash32(1 + moment)
    top = reversed_bits(step & 255, 8) ^ hash32(step >> 8 ^ key) >> 24
    return net(bits.shape, hash32(counting(len(bits))) ^ (top << 24 | hash32(step ^ key) >> 8), cut)


def net(shape: tuple[int, ...], words: npt.NDArray[np.uint64], cut: int) -> Bits:
    of_block = np.array([sobol(i) for i in range(shape[1])], np.uint64)
    return ((of_block ^ words[:, None]) >> (32 - cut)).astype(np.int32)


def counting(count: int) -> npt.NDArray[np.uint64]:
    return np.arange(count, dtype=np.uint64)


def sobol(i: int) -> int:
    """The second of Sobol's sequences, in 32 bits."""
    bits, v = 0, 1 << 31
    while i:
        bits, v, i = bits ^ (v if i & 1 else 0), v ^ v >> 1, i >> 1
    return bits


def reversed_bits(x: int, width: int) -> int:
    return int(f"{x:0{width}b}"[::-1], 2)


def hash32(x: Any) -> Any:
    """Of an int, or of an array of uint64, where products have room."""
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


# --- Codings -----------------------------------------------------------------------------------------

# What comes back of a moment that was stored: m (0) or v (1), after this step.
Coding: TypeAlias = Callable[[Floats, int, int], Floats]


def float32(x: Floats, step: int, moment: int) -> Floats:
    return x


def bfloat16(added: Added) -> Coding:
    def stored(x: Floats, step: int, moment: int) -> Floats:
        bits = np.abs(x).view(np.int32).reshape(-1, BLOCK)
        return signed(bits + added(bits, 16, step, moment) & -0x10000, x)

    return stored


def float8(added: Added, block: int = BLOCK) -> Coding:
    """m as E4M3 and v as E5M3, above a base that each block has."""

    def stored(x: Floats, step: int, moment: int) -> Floats:
        bits = np.abs(x).view(np.int32).reshape(-1, block)
        exponents = bits.max(axis=1, keepdims=True) + 0xFFFFF >> 23
        base = np.maximum(exponents - (31 if moment else 15), 0) << 23
        codes = np.clip(bits - base + added(bits, 20, step, moment) >> 20, 0, 255 if moment else 127)
        return signed(np.where((codes > 0) | (moment == 1), (codes << 20) + base, 0), x)

    return stored


def linear(root_of_m: int, root_of_v: int, least: int = 0) -> Coding:
    """A root of each, as a multiple of 1/127 or 1/255 of the largest of its block, to the nearest."""

    def stored(x: Floats, step: int, moment: int) -> Floats:
        root, most = (root_of_v, 255) if moment else (root_of_m, 127)
        sizes = np.abs(x).astype(np.float64).reshape(-1, BLOCK)
        largest = np.maximum(sizes.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        codes = np.round((sizes / largest) ** (1 / root) * most)
        codes = np.maximum(codes, least if moment else 0)
        return signed(((codes / most) ** root * largest).astype(np.float32).view(np.int32), x)

    return stored


def signed(bits: Bits, signs: Floats) -> Floats:
    return np.copysign(bits.view(np.float32).ravel(), signs)


CODINGS = {
    "float32": float32,
    "bfloat16, nearest": bfloat16(nearest),
    "**bfloat16, dithered**": bfloat16(dithered),
    "float8, nearest, blocks of 64": float8(nearest, 64),
    "float8, nearest, blocks of 128": float8(nearest),
    "float8, nearest, blocks of 256": float8(nearest, 256),
    "float8, dithered, blocks of 64": float8(dithered, 64),
    "**float8, dithered, blocks of 128**": float8(dithered),
    "float8, dithered, blocks of 256": float8(dithered, 256),
    "float8, a net over steps too": float8(dithered_over_steps),
    "int8, linear": linear(1, 1),
    "int8, linear; v: its root": linear(1, 2),
    "int8, root of m, fourth root of v, never 0": linear(2, 4, least=1),
}
PACKAGE: dict[Literal["bfloat16", "float8"], str] = {
    "bfloat16": "**bfloat16, dithered**",
    "float8": "**float8, dithered, blocks of 128**",
}


# --- Gradients ---------------------------------------------------------------------------------------


def gauss(rng: np.random.Generator) -> Floats:
    return rng.standard_normal(SIZE, np.float32)


def lognormal(rng: np.random.Generator, steps: int) -> Iterator[Floats]:
    """Each element has a size of its own."""
    sizes = rng.lognormal(0, 2, SIZE).astype(np.float32)
    for _ in range(steps):
        yield sizes * gauss(rng)


def student(rng: np.random.Generator, steps: int) -> Iterator[Floats]:
    for _ in range(steps):
        yield rng.standard_t(1.5, SIZE).astype(np.float32)


def sparse_rows(rng: np.random.Generator, steps: int) -> Iterator[Floats]:
    """As of an embedding: of 256 rows, the one of rank k has a gradient in one of k / 2 steps."""
    chance = np.minimum(1, 2 / np.arange(1, 257)[rng.permutation(256)])
    for _ in range(steps):
        used = rng.random(256) < chance
        yield (gauss(rng).reshape(256, -1) * used[:, None]).astype(np.float32).ravel()


def scaled(power: float) -> Callable[[np.random.Generator, int], Iterator[Floats]]:
    """In the end so many powers of ten larger, in equal factors."""

    def gradients(rng: np.random.Generator, steps: int) -> Iterator[Floats]:
        for step in range(steps):
            yield np.float32(10 ** (power * step / steps)) * gauss(rng)

    return gradients


def periodic(rng: np.random.Generator, steps: int) -> Iterator[Floats]:
    batches = [gauss(rng) for _ in range(4)]
    for step in range(steps):
        yield batches[step % 4]


GRADIENTS = {
    "Gauss": scaled(0),
    "lognormal": lognormal,
    "t(1.5)": student,
    "sparse rows": sparse_rows,
    "falls": scaled(-3),
    "rises": scaled(3),
    "periodic": periodic,
}


# --- Adam --------------------------------------------------------------------------------------------


def moments(m: Floats, v: Floats, grad: Floats) -> tuple[Floats, Floats]:
    """The next ones. Products are exact and sums rounded in float64 first: all but always an fma."""
    wide = np.float64
    change, part = (grad - m).astype(wide), (WEIGHT2 * grad).astype(wide)
    new_m = (m + wide(WEIGHT1) * change).astype(np.float32)
    return new_m, (v * BETA2 + part * grad).astype(np.float32)


def update(m: Floats, v: Floats, step: int) -> Floats:
    correction1, correction2 = (np.float32(1 - beta**step) for beta in BETAS)
    u: Floats = m / correction1 / (np.sqrt(v) / np.sqrt(correction2) + EPS)
    return u


def check_codings(steps: int = 20) -> None:
    """That they are what the package does, or the tables would be of something else."""
    for state_dtype, name in PACKAGE.items():
        opt = Adam(np.zeros(SIZE, np.float32), state_dtype=state_dtype)
        m = v = np.zeros(SIZE, np.float32)
        gradients = lognormal(np.random.default_rng(0), steps)
        for step, grad in enumerate(gradients, 1):
            opt.step(grad)
            m, v = (CODINGS[name](x, step, i) for i, x in enumerate(moments(m, v, grad)))
            for ours, key in ((m, "exp_avg"), (v, "exp_avg_sq")):
                if not np.array_equal(ours, opt.state[0][key]):
                    sys.exit(f"step {step}: {key} of {state_dtype} is not what this program has")


class Found(NamedTuple):
    """Of one coding and kind of gradients, all of them against float32 moments."""

    error: float
    gain: float
    bias: float
    largest: float


class Track:
    """One coding on its way: its moments, and what is summed up."""

    def __init__(self) -> None:
        self.m = self.v = np.zeros(SIZE, np.float32)
        self.moved = np.zeros(SIZE)
        self.errors: list[float] = []
        self.largest = 0.0

    def step(self, coding: Coding, grad: Floats, step: int) -> Floats:
        """As in the package the update is made of the new moments, before they are stored."""
        m, v = moments(self.m, self.v, grad)
        u = update(m, v, step)
        self.m, self.v = (coding(x, step, i) for i, x in enumerate((m, v)))
        self.moved += u
        self.largest = max(self.largest, float(np.abs(u).max()))
        return u


def study(gradients: Iterator[Floats], steps: int) -> dict[str, Found]:
    tracks = {name: Track() for name in CODINGS}
    exact = tracks["float32"]
    for step, grad in enumerate(gradients, 1):
        updates = {name: track.step(CODINGS[name], grad, step) for name, track in tracks.items()}
        if step > steps // 2:
            right = updates["float32"]
            for name, track in tracks.items():
                track.errors.append(norm(updates[name] - right) / norm(right))
    return {
        name: Found(
            error=math.fsum(track.errors) / len(track.errors),
            gain=norm(track.moved) / norm(exact.moved),
            bias=bias(track.v, exact.v),
            largest=track.largest / exact.largest,
        )
        for name, track in tracks.items()
    }


def bias(v: Floats, right: Floats) -> float:
    """Each element counts alike: what the mean of v is, a few decide where gradients differ in size."""
    begun = right > 0
    return float((v[begun].astype(np.float64) / right[begun]).mean()) - 1


def norm(x: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def main(steps: int) -> None:
    check_codings()
    found = {kind: study(make(np.random.default_rng(1), steps), steps) for kind, make in GRADIENTS.items()}
    titles = {
        "error": "Error of the update, the mean of the second half of the steps",
        "gain": "Length of all updates together, of float32 moments 1",
        "bias": "What v is too large by at the end, the mean of all elements",
        "largest": "The largest update of an element, of float32 moments 1",
    }
    print(f"{SIZE:,} elements, {steps:,} steps")
    for field, title in titles.items():
        print(f"\n{title}\n\n| | {' | '.join(found)} |\n{'|---' * (len(found) + 1)}|")
        for name in CODINGS:
            if name != "float32":
                values = (getattr(of_kind[name], field) for of_kind in found.values())
                print(f"| {name} | {' | '.join(map(written, values))} |")


def written(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
