"""The same numbers as optax and Keras, from them: where eps stands there, weight decay, schedules.

In float64, where only the order of operations differs, and each in a process of its own: JAX has threads, and
a program that forks, as others of these tests do, must have none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

# Of 30 steps. Both compute 1 - beta**t anew, we by one rounding and they by a power of JAX: what differs in
# it is divided by 1e-3, that of beta2 at the first step, and taken over by the averages of all later ones.
TOLERANCE = 1e-11

COMMON = """
import numpy as np
from fused_adam import Adam, AdamW, schedules

rng = np.random.default_rng(5)
start = {"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(3)}
all_grads = [{k: rng.standard_normal(v.shape) for k, v in start.items()} for _ in range(30)]

def ours(cls, **options):
    params = {k: v.copy() for k, v in start.items()}
    opt = cls(params, **options)
    for grads in all_grads:
        opt.step(grads)
    return params

def assert_same(name, found, expected):
    for key in start:
        np.testing.assert_allclose(found[key], np.asarray(expected[key]), TOLERANCE, 1e-15, err_msg=name)
        assert abs(found[key] - start[key]).min() > 1e-5, name
"""

OPTAX = """
import jax
jax.config.update("jax_enable_x64", True)
import optax

def theirs(transform):
    params = {k: jax.numpy.asarray(v) for k, v in start.items()}
    state = transform.init(params)
    for grads in all_grads:
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params

for eps in (1e-8, 1e-3, 1.0):
    assert_same("outside", ours(Adam, lr=0.1, eps=eps), theirs(optax.adam(0.1, eps=eps)))
    root = ours(Adam, lr=0.1, eps=eps, eps_mode="root")
    assert_same("root", root, theirs(optax.adam(0.1, eps=0.0, eps_root=eps)))
    if eps > 1e-6:
        assert abs(root["w"] - ours(Adam, lr=0.1, eps=eps)["w"]).max() > 1e-6
decayed = ours(AdamW, lr=0.1, weight_decay=0.3, no_decay="b")
assert_same("adamw", decayed, theirs(optax.adamw(0.1, weight_decay=0.3, mask={"w": True, "b": False})))
assert abs(decayed["b"] - ours(AdamW, lr=0.1, weight_decay=0.3)["b"]).max() > 1e-3

pairs = [
    (schedules.Constant(0.1), optax.constant_schedule(0.1)),
    (schedules.LinearWarmup(0.1, 7, start=0.01), optax.linear_schedule(0.01, 0.1, 7)),
    (schedules.Cosine(0.1, 20, end=0.02), optax.cosine_decay_schedule(0.1, 20, alpha=0.2)),
    (schedules.WarmupCosine(0.1, 5, 25, 0.01, 0.02),
     optax.warmup_cosine_decay_schedule(0.01, 0.1, 5, 25, 0.02)),
    (schedules.WarmupLinear(0.1, 5, 25), optax.join_schedules(
        [optax.linear_schedule(0.0, 0.1, 5), optax.linear_schedule(0.1, 0.0, 20)], [5])),
    (schedules.StepDecay(0.1, 4, 0.5), optax.exponential_decay(0.1, 4, 0.5, staircase=True)),
    (schedules.Piecewise({0: 0.1, 3: 0.05, 9: 0.2}),
     optax.piecewise_constant_schedule(0.1, {3: 0.5, 9: 4.0})),
]
for mine, other in pairs:
    for step in range(40):
        np.testing.assert_allclose(mine(step), float(other(step)), 1e-12, 1e-17, err_msg=f"{mine} {step}")
    # Of optax's own count, an int32, its schedules make a float32.
    assert_same(str(mine), ours(Adam, lr=mine), theirs(optax.adam(lambda count: other(count.astype(float)))))
print("done")
"""

KERAS = """
import keras
keras.config.set_floatx("float64")

def theirs(optimizer):
    variables = {k: keras.Variable(v) for k, v in start.items()}
    optimizer.build(list(variables.values()))
    for grads in all_grads:
        optimizer.apply([keras.ops.convert_to_tensor(grads[k]) for k in variables])
    return variables

def same(name, cls, their_options, **options):
    mine = ours(cls, lr=0.1, **options)
    assert_same(name, mine, theirs(getattr(keras.optimizers, cls.__name__)(0.1, **their_options)))
    return mine

for eps in (1e-7, 1e-3, 1.0):
    hat = same("hat", Adam, {"epsilon": eps}, eps=eps, eps_mode="hat")
    if eps > 1e-6:
        assert abs(hat["w"] - ours(Adam, lr=0.1, eps=eps)["w"]).max() > 1e-6
    same("amsgrad", Adam, {"epsilon": eps, "amsgrad": True}, eps=eps, eps_mode="hat", amsgrad=True)
same("betas", Adam, {"beta_1": 0.5, "beta_2": 0.99}, betas=(0.5, 0.99), eps=1e-7, eps_mode="hat")
same("AdamW", AdamW, {"weight_decay": 0.3}, weight_decay=0.3, eps=1e-7, eps_mode="hat")
same("clipvalue", Adam, {"clipvalue": 0.5}, clip_value=0.5, eps=1e-7, eps_mode="hat")
print("done")
"""


@pytest.mark.parametrize("library, code", [("optax", OPTAX), ("keras", KERAS)])
def test_same_numbers(library: str, code: str) -> None:
    for module in ("jax", library):  # not imported here: Keras asks for its back end then
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", f"TOLERANCE = {TOLERANCE}{COMMON}{code}"],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
