"""Structures of params and gradients that do not fit. A refused call has done nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, _core
from snapshots import (
    Scene,
    refused,
)

Change = Callable[[Any], Any]


def without(key: str, tree: dict[str, Any]) -> dict[str, Any]:
    return {k: child for k, child in tree.items() if k != key}


CHANGES: list[tuple[str, Change, str]] = [
    ("missing-key", lambda g: without("one", g), "grads: expected a dict .*without the key 'one'"),
    ("extra-key", lambda g: {**g, "x": g["w"]}, "grads: expected a dict .*4.* got one .*5"),
    ("other-key", lambda g: {**without("w", g), "W": g["w"]}, "grads: .*without the key 'w'"),
    ("empty-dict", lambda g: {}, "grads: .*without the key 'b'"),
    ("list-for-dict", lambda g: list(g.values()), "grads: expected a dict .* got .*list"),
    ("array-for-dict", lambda g: g["w"], "grads: expected a dict .* got .*numpy.ndarray"),
    ("closure-for-dict", lambda g: lambda: 0.0, "grads: expected a dict .* got .*function"),
    ("number-for-dict", lambda g: 1.0, "grads: expected a dict .* got .*float"),
    ("short-list", lambda g: {**g, "b": g["b"][:1]}, r"grads\['b'\]: expected a list .*2.* got one .*1"),
    ("long-list", lambda g: {**g, "b": [*g["b"], None]}, r"grads\['b'\]: expected a list .*2.* got one .*3"),
    ("dict-for-list", lambda g: {**g, "b": {}}, r"grads\['b'\]: expected a list .* got .*dict"),
    ("array-for-list", lambda g: {**g, "b": g["w"]}, r"grads\['b'\]: expected a list .* got .*numpy.ndarray"),
    ("None-for-list", lambda g: {**g, "b": None}, r"grads\['b'\]: expected a list .* NoneType"),
    (
        "list-for-array",
        lambda g: {**g, "w": [g["w"]]},
        r"grad for params\['w'\] is .*list.*One array is needed here",
    ),
    (
        "dict-for-array",
        lambda g: {**g, "w": {}},
        r"grad for params\['w'\] is .*dict.*One array is needed here",
    ),
]
CHANGES_OF_GROUPS: list[tuple[str, Change, str]] = [
    ("dict", lambda g: {**g[0], "w": g[1]}, "grads: expected a list with .* each of the 2 .* got .*dict"),
    ("array", lambda g: g[1], "grads: expected a list .* got .*numpy.ndarray"),
    ("too-few", lambda g: g[:1], "grads: expected an entry for each of the 2 param groups, got 1"),
    ("too-many", lambda g: [*g, None], "grads: expected an entry for each of the 2 param groups, got 3"),
    ("list-for-dict", lambda g: [list(g[0]), g[1]], r"grads\[0\]: expected a dict .* got .*list"),
    ("swapped", lambda g: g[::-1], r"grads\[0\]: expected a dict .* got .*numpy.ndarray"),
]


def check_refused(scene: Scene, change: Change, message: str) -> None:
    grads = scene.grads()
    error = TypeError if message.startswith("grad for") else ValueError
    with refused(error, f"^{message}", scene.opt, grads):
        scene.opt.step(change(grads))
    scene.goes_on()
    # The same in place of the optimizer's own buffers, as far as it lets itself be put there.
    buffers = scene.opt.grads
    bad = change(scene.grads())
    if type(bad) is not type(buffers):
        return
    buffers.clear()
    buffers.update(bad) if isinstance(bad, dict) else buffers.extend(bad)
    for call in (scene.opt.step, scene.opt.zero_grad):
        with refused(error, f"^{message}", scene.opt, buffers):
            call()


@pytest.mark.parametrize(("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in CHANGES])
def test_refuses_structure(change: Change, message: str) -> None:
    check_refused(Scene(), change, message)


@pytest.mark.parametrize(
    ("change", "message"), [pytest.param(*row[1:], id=row[0]) for row in CHANGES_OF_GROUPS]
)
def test_refuses_structure_of_groups(change: Change, message: str) -> None:
    check_refused(Scene(grouped=True), change, message)


BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "list": (lambda: [], ValueError, "params has no arrays"),
    "dict": (lambda: {}, ValueError, "params has no arrays"),
    "nested": (lambda: {"a": [], "b": ()}, ValueError, "params has no arrays"),
    "iterator": (lambda: iter([]), ValueError, "params has no arrays"),
    "group": (lambda: [{"params": []}], ValueError, r"param_groups\[0\]\['params'\] has no arrays"),
    "keys": (lambda: {"w": np.ones(2)}.keys(), TypeError, "params is .*dict_keys, expected"),
    "set": (lambda: {1.0}, TypeError, "params is .*set, expected"),
    "group-without": (lambda: [{"params": np.ones(2)}, {}], ValueError, r"params\[1\] has no key 'params'"),
    "without-group": (lambda: [{}, {"params": np.ones(2)}], ValueError, r"params\[0\] has no key 'params'"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_refuses_structure_of_params(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with refused(error, f"^{message}", None):
        Adam(make())


def test_refuses_list_that_contains_itself() -> None:
    scene = Scene()
    endless: list[Any] = []
    endless.append(endless)
    with refused(RecursionError, "nested params", None):
        Adam(endless)
    tree = scene.grads()
    with refused(TypeError, r"^grad for params\['w'\] is .*list", scene.opt, tree):
        scene.opt.step({**tree, "w": endless})
    scene.goes_on()


def test_error_inside_of_the_callers_generator() -> None:
    opt = Adam([np.ones(2), np.ones(3)])

    def grads() -> Iterator[np.ndarray]:
        yield np.ones(2)
        raise ZeroDivisionError("of the caller")

    with refused(ZeroDivisionError, "of the caller", opt):
        opt.step(grads())
    opt.step([np.ones(2), np.ones(3)])


def test_step_needs_grads() -> None:
    scene = Scene()
    with refused(ValueError, "step.. needs grads: pass them, or fill the buffers opt.grads", scene.opt):
        scene.opt.step()
    scene.goes_on()


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ([np.ones(2)], TypeError, r"^param_groups\[1\] must be a dict, got list"),
        (np.ones(2), TypeError, r"^param_groups\[1\] must be a dict, got ndarray"),
        ({"lr": 0.1}, ValueError, r"^param_groups\[1\] has no key 'params'"),
        ({"params": []}, ValueError, r"^param_groups\[1\]\['params'\] has no arrays"),
    ],
    ids=["list", "array", "no-params", "no-arrays"],
)
def test_refuses_added_group(group: Any, error: type[Exception], message: str) -> None:
    scene = Scene()
    with refused(error, message, scene.opt):
        scene.opt.add_param_group(group)
    scene.goes_on()


def test_key_that_changes_its_dict_while_it_is_read() -> None:
    """Naming a parameter runs the key's code; the arrays must outlive what it does."""

    class Key:
        def __str__(self) -> str:
            params.clear()
            return "k"

        __repr__ = __str__

    params: dict[Any, Any] = {Key(): np.ones(3), "w": np.ones(2)}
    opt = Adam(params)
    assert [param.tolist() for param in opt.param_groups[0]["params"]] == [[1, 1, 1], [1, 1]]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_the_core_itself_knows_how_many_leaves_there_are(count: int) -> None:
    """One too few would be a read behind their end."""
    structure = _core.Structure({"a": [1, 2], "b": 3})
    with pytest.raises(ValueError, match=rf"^expected 3 leaves, got {count}\."):
        structure.unflatten([0] * count)
    assert structure.unflatten([4, 5, 6]) == {"a": [4, 5], "b": 6}
