"""opt.accumulate: sums of gradients in opt.grads."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import numpy as np
import pytest

from cases import awkward_values, each_dtype
from fused_adam import Adam
from snapshots import Scene, assert_same_bits, leaves, map_tree, random_like, refused


@each_dtype
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, 70_001])
@pytest.mark.parametrize("threads", [1, 3])
def test_adds(threads: int, size: int, dtype: Any) -> None:
    params = {"a": np.zeros(size, dtype), "b": [np.zeros((3, 5), dtype, order="F"), np.zeros((), dtype)]}
    opt = Adam(params, num_threads=threads)
    expected = map_tree(np.zeros_like, params)
    for seed in range(3):
        grads = random_like(params, seed)
        values = awkward_values(dtype)[: grads["a"].size]
        grads["a"][: values.size] = values
        before = map_tree(np.copy, grads)
        opt.accumulate(grads)
        with np.errstate(all="ignore"):
            expected = map_tree(np.asarray, _added(expected, grads))
        assert_same_bits(opt.grads, expected)
        assert_same_bits(grads, before)


def _added(a: Any, b: Any) -> Any:
    b_leaves = iter([leaf for _, leaf in leaves(b)])
    return map_tree(lambda x: x + next(b_leaves), a)


def test_micro_batches_make_the_step_of_their_sum() -> None:
    shapes = [{"params": [np.empty(300), np.empty((4, 5), np.float32)]}, {"params": np.empty(7)}]
    params = map_tree(lambda x: random_like(x, 1), shapes)
    twins = map_tree(np.copy, params)
    opt, twin = Adam(params, max_norm=1.0), Adam(twins, max_norm=1.0)
    trees = [group["params"] for group in params]
    for k in range(3):
        batches = [random_like(trees, 10 * k + i) for i in range(4)]
        total = map_tree(np.zeros_like, trees)
        for batch in batches:
            opt.accumulate(batch)
            total = map_tree(np.asarray, _added(total, batch))
        assert opt.step(grad_scale=4.0, zero_grad=True) == twin.step(total, grad_scale=4.0)
        assert_same_bits(params, twins)
        assert not any(grad.any() for _, grad in leaves(opt.grads))


def test_none_adds_nothing() -> None:
    opt = Adam([np.zeros(2), np.zeros(3)])
    opt.accumulate([None, np.ones(3)])
    opt.accumulate((np.ones(2), None))
    assert [grad.tolist() for grad in opt.grads] == [[1, 1], [1, 1, 1]]
    opt.grads = [None, np.ones(3)]
    opt.accumulate([None, np.ones(3)])
    with pytest.raises(ValueError, match=r"^opt.grads has no array for params\[0\] to add"):
        opt.accumulate([np.ones(2), np.ones(3)])
    assert opt.grads[1].tolist() == [2, 2, 2]


def test_what_is_refused_changes_nothing() -> None:
    base = np.zeros(8)
    first, second = np.zeros(4), base[:4]
    opt = Adam([first, second])
    opt.accumulate([np.ones(4), np.ones(4)])
    good, buffers = np.ones(4), opt.grads
    read_only = np.zeros(4)
    read_only.setflags(write=False)
    rows: list[tuple[list[Any], str, type[Exception], list[Any] | None]] = [
        ([good], "grads: expected a list with 2 entries", ValueError, None),
        ([good, np.ones(4, np.float32)], "grad for params[1] has dtype float32", TypeError, None),
        ([good, np.ones(5)], "grad for params[1] has shape (5,)", ValueError, None),
        ([good, np.ones(8)[::2]], "grad for params[1] is a strided view", ValueError, None),
        ([good, buffers[1]], "grad for params[1] shares memory with opt.grads, to which", ValueError, None),
        ([buffers[1], good], "grad for params[0] shares memory with opt.grads, to which", ValueError, None),
        ([good, base[:4]], "grad for params[1] shares memory with params[1]", ValueError, None),
        ([good] * 2, "opt.grads for params[1] is read-only, but accum", ValueError, [good, read_only]),
        ([good] * 2, "shares memory with opt.grads for params[0], and", ValueError, [buffers[0]] * 2),
        ([good] * 2, "opt.grads for params[1] shares memory with params[1]", ValueError, [good, base[:4]]),
    ]
    for grads, message, error, other_buffers in rows:
        if other_buffers is not None:
            opt.grads = other_buffers
        with refused(error, re.escape(message), opt, grads, opt.grads):
            opt.accumulate(grads)
        opt.grads = buffers


def test_allocates_little_and_keeps_no_gradient() -> None:
    opt = Adam(np.zeros(200_000))
    grad = np.ones(200_000)
    opt.accumulate(grad)
    tracemalloc.start()
    opt.accumulate(grad)
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    assert np.all(opt.grads == 2)


def test_scene_goes_on_after_refusals() -> None:
    opt = Adam(np.ones(2))
    with refused(ValueError, "shape", opt):
        opt.accumulate(np.ones(3))
    with refused(ValueError, r"^step\(\) needs grads", opt):  # no buffers were made
        opt.step()
    scene = Scene(grouped=True)
    with refused(ValueError, "grads: expected", scene.opt):
        scene.opt.accumulate([])
    scene.goes_on()
