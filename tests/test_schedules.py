"""Learning-rate schedules: against PyTorch's, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, schedules
from fused_adam.schedules import (
    Constant,
    Cosine,
    LinearWarmup,
    OneCycle,
    Piecewise,
    Schedule,
    StepDecay,
    WarmupCosine,
    WarmupLinear,
)

ALL: list[Schedule] = [
    Constant(0.1),
    LinearWarmup(0.1, 10),
    LinearWarmup(0.1, 10, start=0.01),
    Cosine(0.1, 20, end=0.003),
    WarmupCosine(0.1, 5, 25, end=0.01),
    WarmupLinear(0.1, 5, 25),
    OneCycle(0.1, 30),
    OneCycle(0.1, 30, pct_start=0.5, div_factor=10.0, final_div_factor=100.0),
    StepDecay(0.1, 7, gamma=0.5),
    Piecewise({0: 0.1, 5: 0.02, 11: 0.003}),
]
each = pytest.mark.parametrize("schedule", ALL, ids=repr)


def theirs(schedule: Schedule, optimizer: Any, lr_scheduler: Any) -> Any:
    """PyTorch's of the same meaning, and for how many steps it has it."""
    match schedule:
        case LinearWarmup(lr, warmup, start):
            if start == 0:
                return None, 0  # a factor of 0 is refused there
            return lr_scheduler.LinearLR(optimizer, start / lr, total_iters=warmup), 30
        case Cosine(_, steps, end):
            return lr_scheduler.CosineAnnealingLR(optimizer, steps, end), steps + 1
        case OneCycle(lr, steps, start, div, final):
            options = {"pct_start": start, "div_factor": div, "final_div_factor": final}
            return lr_scheduler.OneCycleLR(optimizer, lr, steps, cycle_momentum=False, **options), steps
        case StepDecay(_, every, gamma):
            return lr_scheduler.StepLR(optimizer, every, gamma), 40
        case Piecewise():
            return lr_scheduler.LambdaLR(optimizer, lambda k: [1, 0.2, 0.03][(k >= 5) + (k >= 11)]), 30
        case WarmupLinear(_, warmup, steps):
            line = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps - warmup)
            up = lr_scheduler.LambdaLR(optimizer, lambda k: k / warmup)
            return lr_scheduler.SequentialLR(optimizer, [up, line], [warmup]), 40
        case WarmupCosine(_, warmup, steps, _, end):
            up = lr_scheduler.LambdaLR(optimizer, lambda k: k / warmup)
            down = lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, end)
            return lr_scheduler.SequentialLR(optimizer, [up, down], [warmup]), steps + 1
    return None, 0


@each
def test_as_in_torch(schedule: Schedule) -> None:
    torch = pytest.importorskip("torch")
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.1)
    scheduler, steps = theirs(schedule, optimizer, torch.optim.lr_scheduler)
    for step in range(steps):
        # PyTorch's go from one rate to the next: their roundings add up.
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-11, abs=1e-17), step
        optimizer.step()
        scheduler.step()
    assert steps or isinstance(schedule, (Constant, LinearWarmup))


@each
def test_ends_and_copies(schedule: Schedule) -> None:
    assert schedule(10**9) == schedule(10**12)  # where it ends, it stays
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), eval(repr(schedule))):
        assert twin == schedule and [twin(k) for k in range(50)] == [schedule(k) for k in range(50)]
    assert all(type(schedule(step)) is float and schedule(step) >= 0 for step in range(50))
    assert schedule(np.int64(3)) == schedule(3)


def test_values_worked_out_by_hand() -> None:
    assert [LinearWarmup(1.0, 4)(k) for k in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert LinearWarmup(1.0, 0)(0) == WarmupLinear(1.0, 0, 1)(0) == 1
    assert [WarmupLinear(1.0, 2, 6)(k) for k in range(8)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [Cosine(1.0, 2, end=0.5)(k) for k in range(4)] == [1, 0.75, 0.5, 0.5]
    assert [WarmupCosine(1.0, 1, 3)(k) for k in range(5)] == [0, 1, 0.5, 0, 0]
    assert [StepDecay(1.0, 2, 0.5)(k) for k in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert [Piecewise({2: 3.0, 0: 1.0})(k) for k in range(4)] == [1, 1, 3, 3]
    assert OneCycle(1.0, 10)(2) == 1.0 and OneCycle(1.0, 10)(0) == pytest.approx(0.04)


def test_drives_an_optimizer() -> None:
    param = np.zeros(1)
    opt = Adam(param, betas=(0.0, 0.0), eps=0.0)
    schedule = LinearWarmup(0.5, 2)
    for step in range(4):
        opt.lr = schedule(step)
        opt.step(np.ones(1))
    assert param == -(0.0 + 0.25 + 0.5 + 0.5)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: Constant(-1.0), ValueError, "lr must be finite and >= 0"),
    (lambda: Constant(math.inf), ValueError, "lr must be finite"),
    (lambda: Constant(math.nan), ValueError, "lr must be finite"),
    (lambda: Constant("1"), TypeError, "lr must be a number"),
    (lambda: Constant(True), TypeError, "lr must be a number"),
    (lambda: LinearWarmup(0.1, 2.0), TypeError, "warmup must be an int"),
    (lambda: LinearWarmup(0.1, -1), ValueError, "warmup must be >= 0"),
    (lambda: Cosine(0.1, 0), ValueError, "steps must be >= 1"),
    (lambda: WarmupCosine(0.1, 5, 5), ValueError, "warmup must be less than steps"),
    (lambda: WarmupLinear(0.1, 5, 4), ValueError, "warmup must be less than steps"),
    (lambda: OneCycle(0.1, 10, pct_start=1.5), ValueError, "pct_start must be from 0 to 1"),
    (lambda: OneCycle(0.1, 10, div_factor=0.0), ValueError, "div_factor must be > 0"),
    (lambda: StepDecay(0.1, 0), ValueError, "every must be >= 1"),
    (lambda: Piecewise({1: 0.1}), ValueError, "rate from step 0 on"),
    (lambda: Piecewise({}), ValueError, "rate from step 0 on"),
    (lambda: Piecewise({0: 0.1, -1: 0.2}), ValueError, "rate from step 0 on"),
    (lambda: Piecewise({0: "x"}), TypeError, r"rates\[0\] must be a number"),
    (lambda: Piecewise([0.1]), TypeError, "rates must be a dict"),
    (lambda: Constant(0.1)(-1), ValueError, "step must be >= 0"),
    (lambda: Constant(0.1)(1.0), TypeError, "step must be an int"),
    (lambda: Schedule(), TypeError, "abstract"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_all_are_public() -> None:
    kinds = {type(schedule).__name__ for schedule in ALL}
    assert {*schedules.__all__} == {"Schedule", *kinds}
