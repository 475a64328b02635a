"""step(grads, zero_grad=True): what a step makes, and zeros in the place of the gradients."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases import DEFAULTS, OPTIONS, each_dtype, each_isa, empty_at, offsets, random_arrays
from cases import assert_same_arrays as assert_same_step
from fused_adam import Adam, adam_step
from snapshots import Scene, assert_same_bits, assert_same_state, leaves, map_tree, random_like, refused

TILE = 512  # elements that all stages of a step go through before the next ones
SIZES = (0, 1, 15, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 70_001)  # the last: for several threads
FORMS = ("plain-beta1=0.9", "l2-amsgrad-maximize-beta1=0.3", "ema=0.999", "ema=0.9-l2-amsgrad-maximize")


def is_cleared(grad: np.ndarray) -> bool:
    """Zeros of positive sign: what an accumulation begins with."""
    return not grad.tobytes(order="A").strip(b"\0")


@each_isa
@each_dtype
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_same_bits_and_zeros(name: str, dtype: Any, isa: str, threads: int) -> None:
    for size in SIZES:
        plain = random_arrays(size, dtype, seed=size)
        cleared = plain.copy()
        plain.step(OPTIONS[name], 3, isa, threads)
        cleared.step(OPTIONS[name], 3, isa, threads, zero_grad=True)
        assert is_cleared(cleared.grad), size
        assert_same_step(cleared, plain._replace(grad=cleared.grad), f"size {size}")


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [1, 17, TILE - 1, TILE + 1, 3 * TILE + 5])
def test_clears_exactly_the_gradient(size: int, dtype: Any, isa: str) -> None:
    """At every alignment, with memory around it that belongs to others."""
    start = random_arrays(size, dtype, seed=1)
    expected = start.copy()
    expected.step(DEFAULTS, 3, isa)
    for offset in offsets(dtype):
        memory = empty_at(offset, size + 32, dtype)
        memory[:] = 5
        arrays = start.copy()._replace(grad=memory[16 : size + 16])
        arrays.grad[:] = start.grad
        arrays.step(DEFAULTS, 3, isa, zero_grad=True)
        assert is_cleared(arrays.grad)
        assert np.all(memory[:16] == 5) and np.all(memory[size + 16 :] == 5)
        assert_same_step(arrays, expected._replace(grad=arrays.grad))


@each_isa
def test_clears_what_is_no_number(isa: str) -> None:
    arrays = random_arrays(1000, np.float32)
    arrays.grad[::3], arrays.grad[1::3], arrays.grad[2::3] = np.nan, np.inf, -0.0
    arrays.step(DEFAULTS, 1, isa, zero_grad=True)
    assert is_cleared(arrays.grad)


def test_adam_step() -> None:
    one, two = random_arrays(100, np.float32), random_arrays(100, np.float32)
    for arrays, zero_grad in ((one, False), (two, True)):
        optional = {"max_exp_avg_sq": arrays.max_exp_avg_sq, "ema": arrays.ema}
        adam_step(*arrays[:4], **optional, step=3, amsgrad=True, ema_decay=0.9, zero_grad=zero_grad)
    assert is_cleared(two.grad) and one.grad.all()
    assert_same_step(two, one._replace(grad=two.grad))


def assert_a_step_clears(opt: Adam, twin: Adam, grads: Any, twin_grads: Any) -> None:
    """`twin` makes a plain step, and its gradients are set to zeros by hand."""
    opt.step(grads, zero_grad=True)
    twin.step(twin_grads)
    for (_, mine), (_, other) in zip(leaves(grads), leaves(twin_grads), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert is_cleared(mine)
    for mine, other in zip(opt.param_groups, twin.param_groups, strict=True):
        assert_same_bits(mine["params"], other["params"])
    assert_same_state(opt, twin)


@pytest.mark.parametrize("grouped", [False, True])
def test_trees_and_groups(grouped: bool) -> None:
    scene = Scene(grouped)
    assert_a_step_clears(scene.opt, scene.twin, scene.grads(), scene.grads())
    scene.goes_on()


@pytest.mark.parametrize("grouped", [False, True])
def test_what_is_left_out_keeps_its_gradient(grouped: bool) -> None:
    """None stands for an array that the caller still holds, and may go on adding to."""
    scene = Scene(grouped)
    before = scene.params["w"].copy()
    grads, twin_grads = scene.grads(), scene.grads()
    for tree in (grads, twin_grads):
        first, last = (tree[0], 1) if grouped else (tree, "w")
        first["b"][1] = tree[last] = None
    assert_a_step_clears(scene.opt, scene.twin, grads, twin_grads)
    assert_same_bits(scene.params["w"], before)
    buffers = scene.opt.grads
    one = buffers[0]["one"] if grouped else buffers["one"]
    one += 1
    scene.opt.step(map_tree(lambda buffer: None if buffer is one else buffer, buffers), zero_grad=True)
    assert one == 1


def test_buffers() -> None:
    """The loop that it is for: accumulate, step, and there is nothing left to be cleared."""
    scene, seeds = Scene(), (5, 6, 7)
    for opt, zero_grad in ((scene.opt, True), (scene.twin, False)):
        for seed in seeds:
            for (_, buffer), (_, grad) in zip(
                leaves(opt.grads), leaves(random_like(scene.params, seed)), strict=True
            ):
                buffer += grad
            opt.step(zero_grad=zero_grad)
            if not zero_grad:
                opt.zero_grad()
    assert all(is_cleared(buffer) for _, buffer in leaves(scene.opt.grads))
    assert_same_bits(scene.params, scene.twin_params)
    scene.goes_on()


def test_a_plain_step_after_it_clears_nothing() -> None:
    scene = Scene()
    assert_a_step_clears(scene.opt, scene.twin, scene.grads(), scene.grads())
    grads = scene.grads()
    scene.opt.step(grads)
    scene.twin.step(scene.grads())
    assert_same_bits(grads, scene.grads())


# --- What is refused ---------------------------------------------------------------------------------


def test_read_only_gradients() -> None:
    scene = Scene()
    grads = scene.grads()
    grads["w"].setflags(write=False)
    message = r"^grad for params\['w'\] is read-only, but zero_grad=True sets it to zeros\."
    with refused(ValueError, message, scene.opt, grads):
        scene.opt.step(grads, zero_grad=True)
    scene.opt.step(grads)  # which only reads them
    scene.twin.step(scene.grads())
    scene.goes_on()
    arrays = random_arrays(5, np.float32)
    arrays.grad.setflags(write=False)
    with refused(ValueError, "^grad is read-only, but zero_grad=True", None, list(arrays)):
        adam_step(*arrays[:4], step=1, zero_grad=True)
    adam_step(*arrays[:4], step=1)


SHARED: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "same": lambda: (np.ones(4),) * 2,
    "view": lambda: (lambda a: (a, a[:]))(np.ones(4)),
    "overlap": lambda: (lambda a: (a[:4], a[3:]))(np.ones(7)),
    "overlap-backwards": lambda: (lambda a: (a[3:], a[:4]))(np.ones(7)),
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("grouped", [False, True])
def test_shared_gradients(make: Callable[[], tuple[np.ndarray, np.ndarray]], grouped: bool) -> None:
    """The second param would see zeros, or not, as the threads happen to run."""
    params = [np.ones(4), np.ones(2), np.ones(4)]
    opt = Adam([{"params": params[:2]}, {"params": params[2]}] if grouped else params)
    a, b = make()
    grads = [[a, np.ones(2)], b] if grouped else [a, np.ones(2), b]
    last = r"param_groups\[1\]\['params'\]" if grouped else r"params\[2\]"
    first = r"param_groups\[0\]\['params'\]\[0\]" if grouped else r"params\[0\]"
    message = f"^grad for {last} shares memory with grad for {first}, and zero_grad=True sets both to zeros"
    with refused(ValueError, message, opt, grads):
        opt.step(grads, zero_grad=True)
    opt.step(grads)  # reads both, as ever
    left_out = [[a, np.ones(2)], None] if grouped else [a, np.ones(2), None]
    opt.step(left_out, zero_grad=True)
    assert is_cleared(a)
    assert [entry["step"] for entry in opt.state.values()] == [2, 2, 1]


def test_neighbours_are_taken() -> None:
    memory = np.ones(8)
    opt = Adam([np.ones(4), np.ones(0), np.ones(4)])
    opt.step([memory[:4], memory[2:2], memory[4:]], zero_grad=True)
    assert is_cleared(memory)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which file is mapped where")
@pytest.mark.parametrize("form", [lambda a: a, np.asarray, lambda a: a[:]])
def test_gradients_in_the_same_bytes_of_a_file(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "grads"
    np.ones(100).tofile(path)

    def mapped(first: int, mode: Any = "r+") -> np.ndarray:
        return form(np.memmap(path, np.float64, mode, offset=8 * first, shape=(4,)))

    opt = Adam([np.ones(4), np.ones(4)])
    for first in (10, 13):
        grads = [mapped(10), mapped(first)]
        message = r"^grad for params\[1\] shares memory with grad for params\[0\], and zero_grad=True"
        with refused(ValueError, message, opt, grads):
            opt.step(grads, zero_grad=True)
        opt.step(grads)
    # Neighbours, and a map whose writes the file does not see.
    for grads in ([mapped(10), mapped(14)], [mapped(20), mapped(20, "c")]):
        opt.step(grads, zero_grad=True)
        assert all(is_cleared(grad) for grad in grads)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_refused_step_clears_nothing(grouped: bool) -> None:
    scene = Scene(grouped)
    grads = scene.grads()
    grads[1 if grouped else "w"] = np.ones((4, 3), np.float32)
    with refused(ValueError, "has shape", scene.opt, grads):
        scene.opt.step(grads, zero_grad=True)
    grads = scene.grads()
    group = scene.opt.param_groups[-1]
    saved = group["lr"]
    with refused(ValueError, "must be finite", scene.opt, grads, undo=lambda: group.update(lr=saved)):
        group["lr"] = -1
        scene.opt.step(grads, zero_grad=True)
    scene.goes_on()


@pytest.mark.parametrize("value", [1, 0, None, "yes", np.True_, 1.0, [True]])
def test_refuses_what_is_no_bool(value: Any) -> None:
    scene, arrays = Scene(), random_arrays(5, np.float32)
    grads = scene.grads()
    with refused(TypeError, "^zero_grad must be True or False, got ", scene.opt, grads):
        scene.opt.step(grads, zero_grad=value)
    with refused(TypeError, "^zero_grad must be True or False, got ", None, list(arrays)):
        adam_step(*arrays[:4], step=1, zero_grad=value)
    scene.goes_on()


def test_it_is_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        Adam(np.ones(2)).step(np.ones(2), True)  # type: ignore[misc]


def test_it_allocates_nothing() -> None:
    params = [np.ones((30, 50), np.float32) for _ in range(20)]
    opt = Adam(params, num_threads=1, ema_decay=0.9)
    grads = random_like(params, 1)

    def steps() -> None:
        for _ in range(300):
            opt.step(grads, zero_grad=True)

    steps()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        steps()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before <= 512 and peak - before <= 2048  # not one of the arrays, which have 6000 bytes


def test_no_reference_to_a_gradient_is_kept() -> None:
    opt, grads = Adam([np.ones(3), np.ones(4)]), [np.ones(3), np.ones(4)]
    before = [sys.getrefcount(grad) for grad in grads]
    for _ in range(3):
        opt.step(grads, zero_grad=True)
    assert [sys.getrefcount(grad) for grad in grads] == before
