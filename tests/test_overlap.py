"""Memory that is used twice is refused, wherever the two arrays come from; neighbours in memory are not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam
from snapshots import (
    ROLES,
    Scene,
    adam_step_arrays,
    adam_step_refused,
    assert_same_bits,
    random_like,
    refused,
    use_buffers,
)

OVERLAPPING_GRADS: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "own-param": (lambda s: s.params["w"], "params['w']"),
    "view-of-own-param": (lambda s: s.params["w"][...], "params['w']"),
    "own-moment": (lambda s: s.opt.state["w"]["exp_avg"], "the state of params['w']"),
    "own-second-moment": (lambda s: s.opt.state["w"]["exp_avg_sq"], "the state of params['w']"),
    "own-maximum": (lambda s: s.opt.state["w"]["max_exp_avg_sq"], "the state of params['w']"),
    "start-of-another": (lambda s: s.params["big"][:12], "params['big']"),
    "end-of-another": (lambda s: s.params["big"][-12:], "params['big']"),
    "part-of-another-moment": (lambda s: s.opt.state["big"]["exp_avg"][2:14], "the state of params['big']"),
}


class SceneWithBig(Scene):
    def _make(self) -> tuple[Any, Adam]:
        params = random_like({"big": np.empty(40, np.float32), "w": np.empty((3, 4), np.float32)}, seed=1)
        opt = Adam(params, amsgrad=True)
        opt.step(random_like(params, 2))
        return params, opt


@pytest.mark.parametrize(("make", "owner"), OVERLAPPING_GRADS.values(), ids=OVERLAPPING_GRADS)
@pytest.mark.parametrize("other", ["given", "None"])
def test_refuses_grad_that_overlaps(make: Callable[[Scene], Any], owner: str, other: str) -> None:
    scene = SceneWithBig()
    grads = {"big": np.ones(40, np.float32) if other == "given" else None, "w": make(scene).reshape(3, 4)}
    message = rf"^grad for params\['w'\] shares memory with {re.escape(owner)}, "
    with refused(ValueError, message, scene.opt, grads):
        scene.opt.step(grads)
    buffers = scene.opt.grads
    buffers.update(grads)
    with refused(ValueError, message, scene.opt, buffers):
        scene.opt.zero_grad()
    scene.goes_on()


def pieces(*starts: int, of: np.ndarray) -> list[np.ndarray]:
    return [of[start : start + 4] for start in starts]


@pytest.mark.parametrize(
    "starts", [(0, 0), (0, 3), (3, 0), (0, 4, 7), (8, 0, 9), (4, 8, 0, 5)], ids=lambda starts: str(starts)
)
def test_refuses_params_that_overlap(starts: tuple[int, ...]) -> None:
    params = pieces(*starts, of=np.ones(16))
    message = r"^params\[\d\] shares memory with params\[\d\]\. Every array"
    with refused(ValueError, message, None, params):
        Adam(params)
    groups = [{"params": param} for param in params]
    message = r"^param_groups\[\d\]\['params'\] shares memory with param_groups\[\d\]\['params'\]\."
    with refused(ValueError, message, None, params):
        Adam(groups)


def test_refuses_same_param_twice() -> None:
    w = np.ones(3)
    twice = r"^params\['b'\]\[0\] is the same array as params\['a'\]\."
    with refused(ValueError, twice, None, [w]):
        Adam({"a": w, "b": [w]})
    across = r"^param_groups\[1\]\['params'\]\[1\] is the same array as param_groups\[0\]\['params'\]\."
    with refused(ValueError, across, None, [w]):
        Adam([{"params": w}, {"params": [np.ones(2), w]}])


ADDED: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "same-array": (lambda s: s.params["b"][1], r"is the same array as params\['b'\]\[1\]\."),
    "row": (lambda s: s.params["w"][1], r"shares memory with params\['w'\]\."),
    "moment": (lambda s: s.opt.state["w"]["exp_avg"], r"shares memory with the state of params\['w'\]\."),
}


@pytest.mark.parametrize(("make", "message"), ADDED.values(), ids=ADDED)
def test_refuses_added_group_that_overlaps(make: Callable[[Scene], Any], message: str) -> None:
    scene = Scene()
    group = {"params": [np.ones(2), make(scene)]}
    place = r"^param_groups\[1\]\['params'\]\[1\] "
    with refused(ValueError, place + message, scene.opt, group):
        scene.opt.add_param_group(group)
    scene.goes_on()


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(ROLES, 2)))
@pytest.mark.parametrize("distance", [-11, 0, 11])
def test_adam_step_refuses_overlap(a: str, b: str, distance: int) -> None:
    arrays = adam_step_arrays()
    memory = np.ones(36, np.float32)
    arrays[a], arrays[b] = (memory[i : i + 12].reshape(3, 4) for i in (12, 12 + distance))
    adam_step_refused(arrays, ValueError, rf"^({a} shares memory with {b}|{b} shares memory with {a})[,.]")


def test_an_empty_grad_overlaps_nothing() -> None:
    params = [np.ones(6), np.ones(0)]
    opt = Adam(params)
    for call in (Adam.step, use_buffers):
        call(opt, [np.ones(6), np.ndarray(0, float, params[0], offset=24)])


def test_neighbours_in_one_block_are_taken() -> None:
    """Every array of the step next to the other, and not one byte shared; then one element too near."""
    size, params_and_grads = 5, 8
    memory = random_like(np.empty((size * params_and_grads + 1,)), 7)
    places = [memory[i * size : (i + 1) * size] for i in range(params_and_grads)]
    params, grads = places[0::2], places[1::2]
    apart = [param.copy() for param in params]
    opt, expected = Adam(params), Adam(apart)
    expected.step([grad.copy() for grad in grads])
    opt.step(grads)
    assert_same_bits(params, apart)
    for i, shift in itertools.product(range(len(grads)), (-1, 1)):
        start = (2 * i + 1) * size + shift
        near = [*grads[:i], memory[start : start + size], *grads[i + 1 :]]
        if i == len(grads) - 1 and shift == 1:
            opt.step(near)  # nothing behind it
            continue
        with refused(ValueError, rf"^grad for params\[{i}\] shares memory with params\[", opt, memory):
            opt.step(near)


def move(array: np.ndarray) -> None:
    """Give an array other memory, with the same contents."""
    old = array.ctypes.data
    shape = array.shape
    kept = []  # else the first free piece of the right size is where it was
    for size in range(array.size * 100, array.size * 200):
        array.resize(size, refcheck=False)
        kept.append(np.empty(shape, array.dtype))
        array.resize(shape, refcheck=False)
        if array.ctypes.data != old:
            return
    pytest.skip("the allocator never moves it")


def test_param_that_moved_is_followed() -> None:
    params = random_like([np.empty(64), np.empty(64)], 1)
    expected = [param.copy() for param in params]
    opt, twin = Adam(params), Adam(expected)
    for moved in (None, 0, 1):
        if moved is not None:
            move(params[moved])
        grads = random_like(params, 2)
        opt.step(grads)
        twin.step(grads)
        assert_same_bits(params, expected)


def add_same_array(opt: Adam, _: Any) -> None:
    with pytest.raises(ValueError, match="is the same array"):
        opt.add_param_group({"params": opt.param_groups[0]["params"]})


@pytest.mark.parametrize("before", [None, add_same_array], ids=["", "after a failed add_param_group"])
@pytest.mark.parametrize("call", [Adam.step, use_buffers], ids=["step", "zero_grad"])
@pytest.mark.parametrize(("with_grad", "moved"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_refuses_grad_in_new_memory_of_param(with_grad: int, moved: int, call: Any, before: Any) -> None:
    params = random_like([np.empty(64), np.empty(64)], 1)
    opt = Adam(params)
    opt.step(random_like(params, 2))
    move(params[moved])
    if before is not None:
        before(opt, params)
    grads = random_like(params, 3)
    grads[with_grad] = params[moved][...]
    message = rf"^grad for params\[{with_grad}\] shares memory with params\[{moved}\]"
    with refused(ValueError, message, opt, grads):
        call(opt, grads)


def switch_amsgrad_on(opt: Adam) -> None:
    opt.param_groups[0]["amsgrad"] = True
    opt.step([np.ones(3), np.ones(4)])


def load_amsgrad(opt: Adam) -> None:
    opt.load_state_dict(Adam([np.ones(3), np.ones(4)], amsgrad=True).state_dict())


@pytest.mark.parametrize("begin", [switch_amsgrad_on, load_amsgrad, Adam.state_dict])
def test_refuses_grad_in_memory_that_was_made_later(begin: Callable[[Adam], Any]) -> None:
    params = [np.ones(3), np.ones(4)]
    opt = Adam(params)
    opt.step([np.ones(3), np.ones(4)])
    opt.param_groups[0]["amsgrad"] = begin is Adam.state_dict
    begin(opt)
    grads = [np.ones(3), opt.state[1]["max_exp_avg_sq"]]
    with refused(
        ValueError, r"^grad for params\[1\] shares memory with the state of params\[1\]", opt, grads
    ):
        opt.step(grads)


def test_a_step_that_clears_refuses_new_memory_of_a_param_that_is_left_out() -> None:
    """Else it would set the parameter to zeros."""
    params = random_like([np.empty(64), np.empty(64)], 1)
    opt = Adam(params)
    opt.step(random_like(params, 2))
    move(params[1])
    grads = [params[1][...], None]
    with refused(ValueError, r"^grad for params\[0\] shares memory with params\[1\]", opt, params):
        opt.step(grads, zero_grad=True)
