"""A typical user's code, annotated. test_integrations.py has mypy --strict check it, and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fused_adam import Adam, AdamW, StepInfo, adam_step, show_config

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def make_params() -> dict[str, Float32]:
    return {"w": np.zeros(5, np.float32), "b": np.zeros((), np.float32)}


def train(params: dict[str, Float32], steps: int) -> Adam:
    opt = Adam(params, lr=0.05, betas=(0.9, 0.99))
    for i in range(steps):
        opt.lr = 0.05 / (1 + i)
        info: StepInfo = opt.step({name: np.ones_like(param) for name, param in params.items()})
        skipped: bool = info.skipped
        assert not skipped
    return opt


def other_structures() -> None:
    one: Float64 = np.ones(3)
    Adam(one).step(np.ones(3))
    several: list[Float64] = [np.ones(3), np.ones((2, 2))]
    Adam(several).step([np.ones(3), None])
    Adam((np.ones(3), np.ones(2, np.float32))).step((np.ones(3), np.ones(2, np.float32)))
    nested: dict[str, list[tuple[Float32, Float32]]] = {
        "layers": [(np.ones((2, 3), np.float32), np.ones(3, np.float32))]
    }
    AdamW(nested, weight_decay=0.1).step(nested_grads(nested))
    groups: list[dict[str, Any]] = [{"params": np.ones(3)}, {"params": [np.ones(2)], "lr": 0.1}]
    grouped = AdamW(groups, num_threads=1)
    grouped.add_param_group({"params": np.ones(4)})
    grouped.step([np.ones(3), [np.ones(2)], None])


def nested_grads(
    params: dict[str, list[tuple[Float32, Float32]]],
) -> dict[str, list[tuple[Float32, Float32]]]:
    return {key: [(w + 1, b + 1) for w, b in layers] for key, layers in params.items()}


def function() -> Float64:
    param, exp_avg, exp_avg_sq = np.ones(3), np.zeros(3), np.zeros(3)
    adam_step(param, np.ones(3), exp_avg, exp_avg_sq, step=1, lr=0.1)
    return param


def resume(opt: Adam, params: dict[str, Float32], path: Path) -> AdamW:
    checkpoint: dict[str, Any] = opt.state_dict()
    opt.load_state_dict(checkpoint, keep_lr=True)
    decaying = AdamW(params)
    decaying.save(path)
    loaded: AdamW = AdamW.load(path, params)
    return loaded


def mistakes() -> None:
    """mypy finds these: strict mode complains about a comment that ignores nothing."""
    Adam(1.0)  # type: ignore[arg-type]
    Adam(np.ones(3), lr="0.1")  # type: ignore[arg-type]
    Adam(np.ones(3), learning_rate=0.1)  # type: ignore[call-arg]
    adam_step(np.ones(3), np.ones(3), np.zeros(3), np.zeros(3))  # type: ignore[call-arg]
    Adam(np.ones(3)).lr = None  # type: ignore[assignment]


def main(folder: Path) -> None:
    params = make_params()
    opt = train(params, 3)
    other_structures()
    assert function()[0] < 1
    assert isinstance(resume(opt, params, folder / "adam.safetensors"), AdamW)
    isa: object = show_config()["isa"]
    assert isa
