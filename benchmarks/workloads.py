"""What is measured: sets of arrays, by shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    name: str
    shapes: tuple[Shape, ...]

    @property
    def size(self) -> int:
        return sum(map(prod, self.shapes))


def _gpt2_small() -> tuple[Shape, ...]:
    width = 768
    block: list[Shape] = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return ((50257, width), (1024, width), *block * 12, (width,), (width,))


WORKLOADS = (
    Workload("1 array of 1,000", ((1000,),)),
    Workload("1 array of 10,000", ((10_000,),)),
    Workload("MLP, 6 arrays, 26,122", ((64, 128), (128,), (128, 128), (128,), (128, 10), (10,))),
    Workload("1,000 arrays of 64", ((64,),) * 1000),
    Workload("LoRA, 96 arrays, 589,824", ((8, 768), (768, 8)) * 48),
    Workload("1 array of 100,000", ((100_000,),)),
    Workload("1 array of 1,000,000", ((1_000_000,),)),
    Workload("GPT-2 small, 148 arrays, 124 M", _gpt2_small()),
)
