"""LossScale: arguments, the ends of its range, and steps. That it goes as PyTorch's: test_torch.py."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, LossScale, StepInfo

MADE, SKIPPED = StepInfo(False, 1.0), StepInfo(True, math.inf)


def test_grows_and_backs_off() -> None:
    scale = LossScale(4.0, growth_interval=2)
    seen = []
    for info in (MADE, MADE, MADE, SKIPPED, MADE, MADE, SKIPPED, SKIPPED):
        scale.update(info)
        seen.append(float(scale))
    assert seen == [4, 8, 8, 4, 4, 8, 4, 2]
    assert repr(scale) == "LossScale(2.0)"


def test_stays_within_float32() -> None:
    scale = LossScale(3e38, growth_interval=1)
    scale.update(MADE)
    assert float(scale) == float(np.float32(3e38))
    scale = LossScale(1.5e-38)
    for _ in range(3):
        scale.update(SKIPPED)
    assert float(scale) == np.finfo(np.float32).tiny
    Adam(np.zeros(1)).step(np.ones(1), grad_scale=scale)
    assert float(LossScale(0.1)) == float(np.float32(0.1))


def test_needs_a_step_that_looked() -> None:
    scale = LossScale()
    with pytest.raises(ValueError, match="did not look for infinities"):
        scale.update(Adam(np.zeros(1)).step(np.ones(1)))
    # One that did not look either, and was made.
    opt = Adam(np.zeros(1))
    with pytest.raises(ValueError, match="did not look for infinities"):
        scale.update(opt.step(np.array([math.inf]), max_norm=1.0))
    assert float(scale) == 65536
    with pytest.raises(TypeError, match=r"^state_dict must be a dict"):
        scale.load_state_dict(None)  # type: ignore[arg-type]
    assert float(LossScale(np.float16(2))) == 2  # type: ignore[arg-type]


BAD: list[tuple[str, Any, type[Exception]]] = [
    *(("init_scale", value, ValueError) for value in (0.0, -1.0, math.inf, math.nan, 1e39, 1e-39)),
    *(("growth_factor", value, ValueError) for value in (1.0, 0.5, math.inf, math.nan)),
    *(("backoff_factor", value, ValueError) for value in (0.0, 1.0, math.nan)),
    *(("growth_interval", value, ValueError) for value in (0, -1)),
    *((name, value, TypeError) for name in ("init_scale", "growth_interval") for value in ("2", True, None)),
    ("growth_interval", 2.0, TypeError),
]


@pytest.mark.parametrize("name, value, error", BAD, ids=repr)
def test_what_is_refused(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must be "):
        LossScale(**{name: value})
    scale = LossScale(2.0)
    key = name.replace("init_", "")
    with pytest.raises(error, match=rf"^state_dict\['{key}'\] must be "):
        scale.load_state_dict({**scale.state_dict(), key: value})
    with pytest.raises(ValueError, match=rf"^state_dict has no key '{key}'"):
        scale.load_state_dict({k: v for k, v in scale.state_dict().items() if k != key})
    assert float(scale) == 2.0


def test_goes_on_where_it_was() -> None:
    scale = LossScale(8.0, growth_interval=3)
    scale.update(MADE)
    scale.update(MADE)
    again = LossScale()
    again.load_state_dict(scale.state_dict())
    for one in (scale, again, pickle.loads(pickle.dumps(scale)), copy.deepcopy(scale)):
        one.update(MADE)
        assert float(one) == 16
