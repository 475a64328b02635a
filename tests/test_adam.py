"""How Adam and AdamW behave: forms of params, groups, buffers, state, memory. (The formula: elsewhere.)"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, AdamW, StepInfo, __version__, _core, adam_step, show_config
from snapshots import (
    Scene,
    Snapshot,
    assert_same_bits,
    assert_same_state,
    assign,
    interrupt_at,
    leaves,
    map_tree,
    random_like,
    refused,
    train,
)

Layer = namedtuple("Layer", ["weight", "bias", "scale"])
EMPTY = [np.empty((3, 4), np.float32), np.empty(5), np.empty((), np.float32)]


def zeros(tree: Any) -> Any:
    return map_tree(np.zeros_like, tree)


class ByHand:
    """The same training with adam_step: what Adam should do, with nothing hidden."""

    def __init__(self, params: list[np.ndarray]) -> None:
        self.params = [param.copy() for param in params]
        self.moments = [[np.zeros_like(param) for _ in range(3)] for param in params]
        self.steps = [0] * len(params)

    def step(self, grads: list[Any], **options: Any) -> None:
        for i, (param, grad, (m, v, v_max)) in enumerate(zip(self.params, grads, self.moments, strict=True)):
            if grad is not None:
                self.steps[i] += 1
                adam_step(param, grad, m, v, step=self.steps[i], max_exp_avg_sq=v_max, **options)

    def check(self, opt: Adam) -> None:
        assert_same_bits([array for group in opt.param_groups for array in group["params"]], self.params)
        assert [entry["step"] for entry in opt.state.values()] == self.steps
        for entry, moments in zip(opt.state.values(), self.moments, strict=True):
            live = [value for name, value in entry.items() if name != "step"]
            assert_same_bits(live, moments[: len(live)])


# --- Forms of params and grads ----------------------------------------------------------------------

FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda a: dict(zip("wbs", a, strict=True)),
    "namedtuple": lambda a: Layer(*a),
    "nested-list": lambda a: [a[0], [[a[1]], (a[2],)]],
    "nested-dict": lambda a: {"encoder": {"w": a[0], "b": a[1]}, 2: [a[2]]},
    "dict-of-lists": lambda a: {"w": a[:1], "rest": tuple(a[1:]), "none": []},
    "list-of-namedtuples": lambda a: [Layer(*a), []],
}
WALKED_ONCE: dict[str, Callable[[list[Any]], Any]] = {
    "generator": lambda a: (array for array in a),
    "iterator": iter,
    "map": lambda a: map(np.asarray, a),
    "dict-values": lambda a: dict(enumerate(a)).values(),
}


def check_form(params: Any, arrays: list[np.ndarray], *forms_of_grads: Callable[[list[Any]], Any]) -> Adam:
    expected = [array.copy() for array in arrays]
    opt, twin = Adam(params, lr=0.1), Adam(expected, lr=0.1)
    for seed, form in enumerate(forms_of_grads):
        grads = random_like(arrays, seed)
        opt.step(form(grads))
        twin.step(grads)
    assert_same_bits(arrays, expected)
    assert_same_state(opt, twin)
    return opt


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_form_of_params(form: Callable[[list[Any]], Any]) -> None:
    arrays = random_like(EMPTY, 9)
    params = form(arrays)
    opt = check_form(params, arrays, form, form)
    assert map_tree(type, opt.grads) == map_tree(type, params)
    assert_same_bits(opt.grads, zeros(params))


@pytest.mark.parametrize("form", WALKED_ONCE.values(), ids=WALKED_ONCE)
def test_form_that_is_walked_once(form: Callable[[list[Any]], Any]) -> None:
    arrays = random_like(EMPTY, 9)
    opt = check_form(form(arrays), arrays, form, list, form)
    assert type(opt.grads) is list
    Adam([{"params": form(zeros(arrays))}]).step([form(arrays)])


def test_one_array() -> None:
    param = random_like(np.empty((3, 4)), 9)
    expected = [param.copy()]
    opt, twin = Adam(param), Adam(expected)
    for seed in (1, 2):
        grad = random_like(param, seed)
        opt.step(grad)
        twin.step([grad])
    assert_same_bits([param], expected)
    opt.grads[...] = 1
    opt.step()
    twin.step([np.ones((3, 4))])
    assert_same_bits([param], expected)
    assert opt.grads.shape == (3, 4)


def test_grads_in_another_container() -> None:
    arrays = random_like(EMPTY, 9)
    check_form(list(arrays), arrays, tuple, iter, lambda a: dict(enumerate(a)).values())
    check_form(tuple(arrays), arrays, list, iter)
    check_form(Layer(*arrays), arrays, list, tuple)


def test_grads_in_another_order_of_keys() -> None:
    arrays = random_like(EMPTY, 9)
    form = FORMS["nested-dict"]

    def backwards(tree: Any) -> Any:
        return {k: backwards(tree[k]) for k in reversed(tree)} if isinstance(tree, dict) else tree

    check_form(form(arrays), arrays, lambda a: backwards(form(a)), form)


def test_groups_are_recognized() -> None:
    a, b = random_like([np.empty(3), np.empty(4)], 1)
    as_groups = Adam(({"params": a}, {"params": {"x": b}, "lr": 0.5}))
    assert [group["lr"] for group in as_groups.param_groups] == [1e-3, 0.5]
    as_structure = Adam({"params": a, "batch_stats": b})
    assert len(as_structure.param_groups) == 1
    as_structure.step({"params": a.copy(), "batch_stats": None})


def test_groups_may_be_walked_once() -> None:
    opt = Adam(iter([{"params": np.ones(2)}, {"params": np.ones(3)}]))
    assert len(opt.param_groups) == 2
    opt.step([np.ones(2), np.ones(3)])


def test_params_of_a_group_are_a_flat_tuple() -> None:
    arrays = random_like(EMPTY, 1)
    (group,) = Adam(FORMS["nested-dict"](arrays)).param_groups
    assert type(group["params"]) is tuple
    assert all(a is b for a, b in zip(group["params"], arrays, strict=True))


# --- None -------------------------------------------------------------------------------------------


def test_none_leaves_a_param_out() -> None:
    arrays = random_like(EMPTY, 1)
    hand, opt = ByHand(arrays), Adam(arrays, amsgrad=True, weight_decay=0.1)
    for seed, left_out in enumerate([(), (0,), (), (1, 2), (0, 1, 2), ()]):
        grads = [None if i in left_out else g for i, g in enumerate(random_like(arrays, seed))]
        untouched = [[arrays[i], *opt.state[i].values()] for i in left_out]
        before = Snapshot(None, [[np.array(value) for value in values] for values in untouched])
        assert opt.step(grads) == StepInfo()
        before.assert_unchanged()
        hand.step(grads, amsgrad=True, weight_decay=0.1)
        hand.check(opt)
    assert hand.steps == [4, 4, 4]
    opt.step([random_like(arrays[0], 9), None, None])
    assert [entry["step"] for entry in opt.state.values()] == [5, 4, 4]


# --- Groups -----------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.3},
    {"betas": (0.5, 0.9)},
    {"eps": 0.1},
    {"weight_decay": 0.2},
    {"weight_decay": 0.2, "decoupled_weight_decay": True},
    {"amsgrad": True},
    {"maximize": True},
    {"lr": 0.2, "betas": (0.2, 0.3), "eps": 1e-4, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_adam_step_is_the_step_of_adam(options: dict[str, Any]) -> None:
    arrays = random_like(EMPTY, 1)
    hand, opt = ByHand(arrays), Adam(arrays, **options)
    for seed in range(4):
        grads = random_like(arrays, seed)
        opt.step(grads)
        hand.step(grads, **options)
    hand.check(opt)


def test_adam_step_without_amsgrad_needs_no_maximum() -> None:
    param, grad = random_like([np.empty(5)] * 2, 1)
    hand = ByHand([param])
    hand.step([grad])
    m, v = np.zeros(5), np.zeros(5)
    assert adam_step(param, grad, m, v, step=1) == StepInfo()
    assert_same_bits([param, m, v], [hand.params[0], *hand.moments[0][:2]])
    assert not hand.moments[0][2].any()


@pytest.mark.parametrize("step", [np.int64(3), np.array(3), 2**53, 2**63 - 1], ids=repr)
def test_adam_step_takes_any_integer(step: Any) -> None:
    adam_step(np.ones(2), np.ones(2), np.ones(2), np.ones(2), step=step)


def test_groups_have_options_of_their_own() -> None:
    arrays = random_like([np.empty(7, np.float32)] * len(OPTIONS), 1)
    expected = [array.copy() for array in arrays]
    opt = Adam([{"params": [array], **options} for array, options in zip(arrays, OPTIONS, strict=True)])
    alone = [Adam([array], **options) for array, options in zip(expected, OPTIONS, strict=True)]
    for seed in range(3):
        grads = random_like([[array] for array in arrays], seed)
        opt.step(grads)
        for twin, grad in zip(alone, grads, strict=True):
            twin.step(grad)
    assert_same_bits(arrays, expected)


def test_defaults_of_the_constructor_are_those_of_groups() -> None:
    a, b, c = (np.ones(2) for _ in range(3))
    opt = Adam([{"params": a}, {"params": b, "lr": 0.5, "label": "mine"}], lr=0.25, amsgrad=True)
    first, second = opt.param_groups
    assert (first["lr"], second["lr"], second["amsgrad"], second["label"]) == (0.25, 0.5, True, "mine")
    first["lr"] = 0.125
    opt.add_param_group({"params": c})
    assert opt.param_groups[2]["lr"] == opt.defaults["lr"] == 0.25


EDITS = [edit for edit in OPTIONS if edit]


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_edit_between_steps_counts_from_the_next_one(edit: dict[str, Any]) -> None:
    """Made, kept for two steps, taken back: with amsgrad on, off and on again its maxima stand still."""
    arrays = random_like(EMPTY, 1)
    hand, opt = ByHand(arrays), Adam(arrays)
    group = opt.param_groups[0]
    before = {key: group[key] for key in edit}
    for seed, options in enumerate([{}, {}, edit, edit, before, edit]):
        group.update(options)
        grads = random_like(arrays, seed)
        opt.step(grads)
        hand.step(grads, **options)
    hand.check(opt)


def test_option_of_an_unknown_name_is_kept() -> None:
    """Schedulers keep theirs there."""
    opt = Adam(np.ones(2))
    opt.param_groups[0]["initial_lr"] = 0.5
    opt.step(np.ones(2))
    assert opt.param_groups[0]["initial_lr"] == 0.5


def test_added_group_trains_from_its_first_step() -> None:
    old, new = random_like([{"w": np.empty(3)}, np.empty(4)], 1)
    apart = random_like([{"w": np.empty(3)}, np.empty(4)], 1)
    opt = Adam(old, lr=0.1)
    twins = [Adam(apart[0], lr=0.1), Adam(apart[1], lr=0.2)]
    grads = random_like([old, new], 2)
    opt.step(grads[0])
    twins[0].step(grads[0])
    group = {"params": new, "lr": 0.2}
    before = Snapshot(None, group)
    opt.add_param_group(group)
    before.assert_unchanged()  # the dict stays the caller's
    for _ in range(2):
        opt.step(grads)
        for twin, grad in zip(twins, grads, strict=True):
            twin.step(grad)
    assert_same_bits([old, new], apart)
    assert [entry["step"] for entry in opt.state.values()] == [3, 2]


@pytest.mark.parametrize("grouped", [False, True], ids=["from-params", "from-groups"])
def test_added_group_joins_the_buffers(grouped: bool) -> None:
    w, b = np.ones(3), np.ones(4)
    opt = Adam([{"params": {"w": w}}] if grouped else {"w": w})
    old = opt.grads[0] if grouped else opt.grads
    old["w"] += 1
    with refused(ValueError, "same array", opt, old):
        opt.add_param_group({"params": w})
    assert (opt.grads[0] if grouped else opt.grads) is old
    opt.step()  # the structure is still the old one

    opt.add_param_group({"params": [b]})
    assert opt.grads[0] is old
    assert_same_bits(opt.grads, [{"w": np.ones(3)}, [np.zeros(4)]])
    opt.grads[1][0] += 1
    opt.step()
    assert [entry["step"] for entry in opt.state.values()] == [2, 1]
    opt.zero_grad()
    assert_same_bits(opt.grads, [{"w": np.zeros(3)}, [np.zeros(4)]])


def test_groups_can_be_added_again_and_again() -> None:
    opt = Adam(np.ones(1))
    for size in range(2, 6):
        opt.add_param_group({"params": np.ones(size)})
    opt.step([np.ones(size) for size in range(1, 6)])
    assert [entry["exp_avg"].size for entry in opt.state.values()] == [1, 2, 3, 4, 5]


# --- The buffers for gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True], ids=["params", "groups"])
def test_loop_with_buffers(grouped: bool) -> None:
    scene = Scene(grouped)
    for seed in range(5, 8):
        scene.opt.zero_grad()
        for part in (seed, seed + 100):  # accumulated over two batches
            for (_, buffer), (_, grad) in zip(
                leaves(scene.opt.grads), leaves(scene.grads(part)), strict=True
            ):
                buffer += grad
        scene.opt.step()
        both = zip(leaves(scene.grads(seed)), leaves(scene.grads(seed + 100)), strict=True)
        sums = iter([np.asarray(x + y) for (_, x), (_, y) in both])
        scene.twin.step(map_tree(lambda _, sums=sums: next(sums), scene.grads()))
    assert_same_bits(scene.params, scene.twin_params)
    assert_same_state(scene.opt, scene.twin)


def test_buffers_are_zeros_like_params() -> None:
    params = Scene().params
    buffers = Adam(params).grads
    assert_same_bits(buffers, zeros(params))
    for (path, buffer), (_, param) in zip(leaves(buffers), leaves(params), strict=True):
        assert buffer.ctypes.data % 64 == 0, path
        assert buffer.flags.c_contiguous == param.flags.c_contiguous, path


def test_buffers_are_made_once_and_kept() -> None:
    opt = Adam({"w": np.ones(3)})
    opt.zero_grad()  # nothing to do yet
    buffers, w = opt.grads, opt.grads["w"]
    w += 1
    assert opt.grads is buffers
    opt.step()
    assert opt.grads["w"] is w and w.tolist() == [1, 1, 1]
    opt.zero_grad()
    assert opt.grads["w"] is w and w.tolist() == [0, 0, 0]


def test_buffer_may_be_replaced() -> None:
    a, b = (random_like({"w": np.empty(3), "b": np.empty(4)}, 1) for _ in range(2))
    opt, twin = Adam(a), Adam(b)
    mine = random_like(np.empty(3), 2)
    opt.grads["w"], opt.grads["b"] = mine, None
    opt.step()
    twin.step({"w": mine, "b": None})
    assert_same_bits(a, b)
    assert_same_state(opt, twin)
    opt.zero_grad()
    assert opt.grads["w"] is mine and not mine.any() and opt.grads["b"] is None


def test_given_grads_leave_buffers_alone() -> None:
    opt = Adam([np.ones(3)])
    opt.grads[0][...] = 5
    opt.step([np.ones(3)])
    assert opt.grads[0].tolist() == [5, 5, 5]


def test_buffers_that_are_walked_once_are_kept() -> None:
    params = [np.ones(2), np.ones(3)]
    opt, twin = Adam(params), Adam([np.ones(2), np.ones(3)])
    opt.grads = (np.ones_like(param) for param in params)
    for _ in range(2):
        opt.step()
        twin.step([np.ones(2), np.ones(3)])
    assert_same_state(opt, twin)


def test_buffers_of_groups_that_are_no_list_are_refused() -> None:
    opt = Adam([{"params": np.ones(2)}])
    opt.grads = 5
    with pytest.raises(ValueError, match="grads: expected a list with an entry for each of the 1 param"):
        opt.step()


def test_buffer_of_one_array_can_be_added_to() -> None:
    opt = Adam(np.ones(3))
    opt.grads += np.ones(3)
    assert opt.grads.tolist() == [1, 1, 1]


# --- lr ---------------------------------------------------------------------------------------------


def test_lr_is_that_of_all_groups() -> None:
    opt = Adam([{"params": np.ones(2)}, {"params": np.ones(3)}], lr=0.5)
    assert opt.lr == 0.5 and type(opt.lr) is float
    opt.lr = 0.25
    assert [group["lr"] for group in opt.param_groups] == [0.25, 0.25]
    opt.lr = np.float32(0.125)
    assert opt.lr == 0.125
    opt.param_groups[1]["lr"] = 0.5
    with refused(ValueError, r"different learning rates, \[0.125, 0.5\]: see opt.param_groups", opt):
        opt.lr  # noqa: B018
    opt.lr = 1
    assert opt.lr == 1.0


def test_lr_takes_effect() -> None:
    a, b = np.ones(3), np.ones(3)
    opt, twin = Adam(a, lr=0.5), Adam(b, lr=0.25)
    opt.lr = 0.25
    opt.step(np.ones(3))
    twin.step(np.ones(3))
    assert_same_bits(a, b)


# --- state ------------------------------------------------------------------------------------------


def test_state_by_name_and_index() -> None:
    params = {"encoder": [np.ones(1), {"w": np.ones(2)}], "w": np.ones(3), 7: np.ones(4)}
    opt = Adam([{"params": params}, {"params": [np.ones(5)]}, {"params": {"w": np.ones(6), "x": np.ones(7)}}])
    opt.step([random_like(params, 1), [None], {"w": None, "x": np.ones(7)}])
    names = {"encoder.0": 0, "encoder.1.w": 1, "7": 3, "x": 6}
    for name, index in names.items():
        assert name in opt.state and np.int64(index) in opt.state
        assert opt.state[name]["exp_avg"].size == index + 1
        assert opt.state[name]["exp_avg"].ctypes.data == opt.state[index]["exp_avg"].ctypes.data
    assert [opt.state[i]["step"] for i in range(7)] == [1, 1, 1, 1, 0, 0, 1]
    assert list(opt.state) == list(range(7)) and len(opt.state) == 7
    for entry in opt.state.values():
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq"] and type(entry["step"]) is int

    with pytest.raises(KeyError, match=r"'w' names the parameters \[2, 5\]: use the index"):
        opt.state["w"]
    for key in ("encoder", "encoder.2", "0", "", 7, -1, 2**70):
        assert key not in opt.state
        with pytest.raises(KeyError, match=re.escape(repr(key))):
            opt.state[key]


@pytest.mark.parametrize("key", [None, 0.5, (0,)], ids=repr)
def test_state_of_no_key(key: Any) -> None:
    """What is no name and no index is no key, as in any dict."""
    with pytest.raises(KeyError):
        Adam([np.ones(2), np.ones(2)]).state[key]


# Two leaves would share a dotted name, so that all have their paths for names.
AMBIGUOUS: dict[str, tuple[Any, list[str]]] = {
    "dots": ({"a.b": 0, "a": {"b": 0}, "c": 0}, ["['a.b']", "['a']['b']", "['c']"]),
    "numbers": ({1: 0, "1": 0}, ["[1]", "['1']"]),
    "lists": ({"a": [0, 0], "a.1": 0}, ["['a'][0]", "['a'][1]", "['a.1']"]),
    "empty": ({"": {"x": 0}, "x": 0}, ["['']['x']", "['x']"]),
    "a pair": ({"\ud83d\ude00": 0, "😀": 0}, ["['\\ud83d\\ude00']", "['😀']"]),
    "surrogates": ({"\ud800": {"x": 0}, "\ud800.x": 0}, ["['\\ud800']['x']", "['\\ud800.x']"]),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_names_are_never_ambiguous(case: str) -> None:
    tree, names = AMBIGUOUS[case]
    opt = Adam(map_tree(lambda leaf: np.ones(2), tree))
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    for index, name in enumerate(names):
        opt.state[index]["exp_avg"][0] = index + 1
        assert opt.state[name]["exp_avg"][0] == index + 1
    for name in ("a.b", "1", "a.1", "x", "\ud800.x"):
        assert name not in opt.state


def test_keys_that_cannot_be_told_apart() -> None:
    class Key:
        def __repr__(self) -> str:
            return "k"

    params = {"w": {Key(): np.ones(2), Key(): np.ones(2)}}
    message = r"^two parameters are at params\['w'\]\[k\]: their keys are different, but have the same repr"
    with pytest.raises(ValueError, match=message):
        Adam(params)
    opt = Adam({"w": np.ones(2)})
    with refused(ValueError, message, opt):
        opt.add_param_group({"params": params})
    Adam({"w": {Key(): np.ones(2)}, "v": {Key(): np.ones(2)}})


@pytest.mark.parametrize("key", ["\ud800", "a\udfff.b\0", "\ude00\ud83d", "😀"], ids=ascii)
def test_keys_of_any_text(key: str) -> None:
    """Half a surrogate pair has no place in UTF-8, but in a dict."""
    params = {key: [np.ones(2)], "w": np.ones(3)}
    opt = Adam(params)
    opt.step({key: [np.ones(2)], "w": np.ones(3)})
    assert opt.state[f"{key}.0"]["step"] == 1
    for grads in ({"w": np.ones(3), "x": None}, {key: None, "w": None}, {key: [np.ones(3)], "w": None}):
        with refused(ValueError, re.escape(repr(key)), opt):
            opt.step(grads)
    opt.add_param_group({"params": np.ones(1), key: key})
    twin = Adam([{"params": map_tree(np.copy, params)}, {"params": np.ones(1)}])
    twin.load_state_dict(opt.state_dict())
    assert twin.state[f"{key}.0"]["step"] == 1 and twin.param_groups[1][key] == key
    assert copy.deepcopy(opt).state[f"{key}.0"]["step"] == 1


@pytest.mark.parametrize("key", ["\ud83dabc", "\ud83d\ud83d", "\ud83d.\ude00", "\ude00\ud83d"], ids=ascii)
def test_halves_of_a_character_that_are_no_pair_are_names(key: str) -> None:
    assert list(_core.Structure({key: 0, "x": 0}).names) == [key, "x"]


def test_reprs_of_any_text() -> None:
    class Odd:
        def __repr__(self) -> str:
            return "<\ud800>"

    key = Odd()
    opt = Adam({key: np.ones(2)})
    with refused(TypeError, r"^grad for params\[<\\ud800>\] is of type int", opt):
        opt.step({key: 3})
    with refused(ValueError, r"without the key <\\ud800>", opt):
        opt.step({"w": None})
    opt.param_groups[0]["lr"] = key
    with refused(TypeError, r"^param_groups\[0\]\['lr'\] must be a number, got <\\ud800> of type", opt):
        opt.step({key: np.ones(2)})


def test_state_that_is_kept_knows_groups_that_come_later() -> None:
    opt = Adam({"a": np.ones(1)})
    state = opt.state
    assert "a" in state and "b" not in state
    opt.add_param_group({"params": {"b": np.ones(2)}})
    assert state["b"]["exp_avg"].size == 2 and len(state) == 2


def test_state_has_no_names_without_dicts() -> None:
    for params in (np.ones(2), [np.ones(2)], ([np.ones(2)],)):
        state = Adam(params).state
        assert "0" not in state and "" not in state and 0 in state
        assert repr(state) == repr(dict(state))


def test_state_is_live() -> None:
    opt, twin = Adam({"w": np.ones(3)}, amsgrad=True), Adam({"w": np.ones(3)}, amsgrad=True)
    views = opt.state["w"]
    grads = {"w": np.array([1.0, -2.0, 3.0])}
    opt.step(grads)
    twin.step(grads)
    assert views["step"] == 0 and opt.state["w"]["step"] == 1  # a number is no view
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_same_bits(views[name], twin.state["w"][name])
        assert views[name].all()
    # Written to, they count: this is how moments are reset.
    for name in ("exp_avg", "exp_avg_sq"):
        opt.state["w"][name][...] = 0
        assert not views[name].any()
    opt.step(grads)
    twin.step(grads)
    assert not np.array_equal(opt.state["w"]["exp_avg"], twin.state["w"]["exp_avg"])


def test_what_is_done_to_a_view_stays_with_it() -> None:
    scene = Scene()
    views = scene.opt.state["w"]
    views["exp_avg"].setflags(write=False)
    assign(views["exp_avg_sq"], "shape", (12,))
    assign(views["exp_avg"], "dtype", np.int32)
    del views["max_exp_avg_sq"]
    views["step"] = 77
    scene.goes_on()


def test_moments_outlive_the_optimizer() -> None:
    opt = Adam(np.ones(1000))
    opt.step(np.ones(1000))
    view, expected = opt.state[0]["exp_avg"], opt.state[0]["exp_avg"].copy()
    del opt
    np.ones(1000)  # would be where the moments were
    assert_same_bits(view, expected)


# --- AdamW, StepInfo, repr, configuration -----------------------------------------------------------


def test_adamw_is_adam_with_decoupled_decay() -> None:
    a, b = random_like([np.empty(5)] * 2, 1)
    b[...] = a
    opt, twin = AdamW(a), Adam(b, weight_decay=1e-2, decoupled_weight_decay=True)
    assert opt.defaults == twin.defaults
    train(opt, a, (1, 2, 3))
    train(twin, b, (1, 2, 3))
    assert_same_bits(a, b)
    assert_same_state(opt, twin)
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        AdamW(a, decoupled_weight_decay=False)


def test_adamw_refuses_a_group_with_another_decay() -> None:
    """A checkpoint would make it decoupled again when it is loaded."""
    group = {"params": np.ones(2), "decoupled_weight_decay": False}
    with pytest.raises(
        ValueError, match=r"^param_groups\[0\]\['decoupled_weight_decay'\] must be True in AdamW"
    ):
        AdamW([group])
    opt = AdamW(np.ones(2))
    with pytest.raises(ValueError, match=r"^param_groups\[1\]\['decoupled_weight_decay'\] must be True"):
        opt.add_param_group(group)


def test_step_info_is_a_constant() -> None:
    opt = Adam(np.ones(2))
    info = opt.step(np.ones(2))
    assert info is opt.step(np.ones(2)) is Adam(np.ones(3)).step(np.ones(3))
    assert type(info) is StepInfo and info == (False, None)
    assert info.skipped is False and info.grad_norm is None


def test_repr() -> None:
    class Mine(Adam):
        pass

    opt = Mine([{"params": [np.ones((1000, 2)), np.ones(3)]}, {"params": np.ones(1), "lr": 0.5, "tag": "x"}])
    rest = "betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, maximize=False"
    assert repr(opt) == (
        "Mine(\n"
        f"  group 0: 2 arrays, 2,003 elements, lr=0.001, {rest}, decoupled_weight_decay=False\n"
        f"  group 1: 1 array, 1 elements, lr=0.5, {rest}, decoupled_weight_decay=False, tag='x'\n"
        ")"
    )
    assert repr(AdamW(np.ones(2))).startswith("AdamW(\n  group 0: 1 array, 2 elements, lr=0.001")


@pytest.mark.parametrize("num_threads", [None, 1, 2, 3, 64])
def test_num_threads_decides_nothing_but_speed(num_threads: int | None) -> None:
    params, expected = (random_like(np.empty(600_011, np.float32), 1) for _ in range(2))
    hand = [[array.copy() for array in (params, np.zeros_like(params), np.zeros_like(params))] for _ in "ab"]
    opt, twin = Adam(params, num_threads=num_threads), Adam(expected, num_threads=1)
    for step in (1, 2):
        grad = random_like(params, step)
        opt.step(grad)
        twin.step(grad)
        for (param, m, v), threads in zip(hand, (num_threads, 1), strict=True):
            adam_step(param, grad, m, v, step=step, num_threads=threads)
    assert_same_bits(params, expected)
    assert_same_bits([array[0] for array in hand], [expected, expected])


@pytest.mark.parametrize(
    ("num_threads", "error", "message"),
    [
        (0, ValueError, "^num_threads must be >= 1 or None, got 0"),
        (-1, ValueError, "^num_threads must be >= 1 or None, got -1"),
        (True, TypeError, "^num_threads must be an int or None, got True"),
        (np.True_, TypeError, r"^num_threads must be an int or None, got (np\.True_|True)"),
        (2.0, TypeError, "^num_threads must be an int or None, got 2.0"),
        ("2", TypeError, "^num_threads must be an int or None, got '2'"),
        (2**31, ValueError, "^num_threads must be at most 4096, got 2147483648"),
        (4097, ValueError, "^num_threads must be at most 4096, got 4097"),
    ],
    ids=repr,
)
def test_num_threads_refused(num_threads: Any, error: type[Exception], message: str) -> None:
    params = [np.ones(2)]
    with refused(error, message, None, params):
        Adam(params, num_threads=num_threads)
    arrays = [np.ones(2) for _ in range(4)]
    with refused(error, message, None, arrays):
        adam_step(*arrays, step=1, num_threads=num_threads)


def test_show_config() -> None:
    config = show_config()
    types = {
        "version": str,
        "numerics": str,
        "isa": str,
        "isas_supported": list,
        "isas_compiled": list,
        "threads": str,
        "num_threads": int,
        "cpus": int,
        "openmp": int,
        "compiler": str,
        "environment": dict,
    }
    assert list(config) == list(types)
    for key, kind in types.items():
        assert isinstance(config[key], kind) or (key == "openmp" and config[key] is None), key
    assert config["version"] == __version__
    assert config["isa"] in config["isas_supported"]
    assert set(config["isas_supported"]) <= set(config["isas_compiled"])
    assert "scalar" in config["isas_supported"]
    assert config["num_threads"] >= 1 and config["cpus"] >= 1
    assert show_config() == config and show_config() is not config


def test_module_prints_the_configuration() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fused_adam"], capture_output=True, text=True, check=True
    )
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert not done.stderr
    assert list(shown) == [*show_config(), "numpy", "python", "platform"]
    assert shown["version"] == __version__ and shown["numpy"] == np.__version__


# --- Memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_begin_at_cache_lines_and_as_zeros(amsgrad: bool) -> None:
    params = [np.ones(size, dtype) for size in (1, 3, 16, 17, 1000, 70_000) for dtype in ("f4", "f8")]
    for entry in Adam(params, amsgrad=amsgrad).state.values():
        assert entry.pop("step") == 0
        assert len(entry) == 2 + amsgrad
        for name, moment in entry.items():
            assert moment.ctypes.data % 64 == 0 and not moment.any(), name


def traced(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that are left allocated by a function, and at its peak."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = function()
        after, peak = tracemalloc.get_traced_memory()
        del kept
        return after - before, peak - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("dtype", "amsgrad", "expected"), [("f4", False, 8), ("f4", True, 12), ("f8", False, 16)]
)
def test_state_is_what_adam_needs(dtype: str, amsgrad: bool, expected: int) -> None:
    size, count = 100_000, 3
    overhead = 4096 * (3 * count + 2)  # each stream may begin a page later; and some Python objects
    params = [np.ones(size, dtype) for _ in range(count)]
    kept, peak = traced(lambda: Adam(params, amsgrad=amsgrad))
    assert 0 <= kept - count * size * expected <= overhead
    assert peak - kept <= 4096
    opt = Adam(params)
    kept, _ = traced(lambda: opt.grads)
    assert 0 <= kept - sum(param.nbytes for param in params) <= overhead


@pytest.mark.parametrize("size", [0, 1, 5000, 70_000])
def test_memory_of_the_optimizer_is_within_its_block(size: int) -> None:
    """The block says how much there is, to whoever looks at the base of a view."""
    opt = Adam([np.ones(3), np.ones(size, np.float32)], amsgrad=True)
    arrays = [array for entry in opt.state.values() for array in list(entry.values())[1:]]
    for array in (*arrays, *opt.grads):
        block, begin = array.base, array.ctypes.data
        assert block.ctypes.data <= begin
        assert begin + array.nbytes <= block.ctypes.data + block.nbytes


def test_memory_of_the_optimizer_is_freed_with_it() -> None:
    params = [np.ones(100_000, np.float32)]

    def train_and_forget() -> None:
        opt = Adam(params)
        opt.step(opt.grads)

    train_and_forget()
    left, peak = traced(train_and_forget)
    assert left <= 4096 and peak >= 3 * params[0].nbytes


def test_moments_of_small_arrays_lie_close_together() -> None:
    opt = Adam([np.ones(3, np.float32) for _ in range(1000)])
    places = [entry[name].ctypes.data for entry in opt.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(set(places)) == 2000
    assert max(places) - min(places) == 64 * 1999


def resident_bytes() -> int:
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_step_allocates_nothing() -> None:
    params = [np.ones((30, 50), np.float32) for _ in range(20)]
    opt = Adam(params, num_threads=1)
    grads = random_like(params, 1)

    def steps() -> None:
        for _ in range(1000):
            opt.step(grads)

    steps()
    left, peak = traced(steps)
    # The frames and arguments of the calls: not one of the arrays, which have 6000 bytes each.
    assert left <= 512 and peak <= 2048


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says what is resident")
def test_steps_do_not_make_the_process_grow() -> None:
    params = [np.ones(1500, np.float32) for _ in range(20)]
    opt = Adam({"x": params})
    grads = {"x": random_like(params, 1)}
    refused_grads = {"x": [*grads["x"][:-1], np.ones(3, np.float32)]}

    def steps() -> None:
        for _ in range(1000):
            opt.step(grads)
            with pytest.raises(ValueError, match="has shape"):
                opt.step(refused_grads)

    steps()
    before = resident_bytes()
    steps()
    assert resident_bytes() - before <= 512 * 1024  # a reference or a float for each array and step is more


@pytest.mark.parametrize("fails", [False, True], ids=["taken", "refused"])
@pytest.mark.parametrize("call", ["step", "zero_grad"])
def test_no_reference_to_a_grad_is_kept(call: str, fails: bool) -> None:
    params = {"w": np.ones(3), "b": [np.ones(4), np.ones(5)]}
    opt = Adam(params)
    grads = opt.grads if call == "zero_grad" else random_like(params, 1)
    if fails:
        grads["b"][1] = np.ones(6)
    objects = [
        grads,
        grads["w"],
        grads["b"],
        *grads["b"],
        *(array for _, array in leaves(params)),
        *opt.param_groups,
    ]
    before = [sys.getrefcount(obj) for obj in objects]
    for _ in range(3):
        if fails:
            with pytest.raises(ValueError, match="has shape"):
                opt.step(grads) if call == "step" else opt.zero_grad()
        else:
            opt.step(grads) if call == "step" else opt.zero_grad()
    assert [sys.getrefcount(obj) for obj in objects] == before


def test_buffers_that_are_no_list_do_not_stop_a_group_half_way() -> None:
    opt = Adam([{"params": np.ones(2)}])
    opt.grads = 5
    opt.add_param_group({"params": np.ones(3)})
    assert len(opt.param_groups) == len(opt.state) == 2
    with pytest.raises(
        ValueError, match="grads: expected a list with an entry for each of the 2 param groups"
    ):
        opt.step()
    opt.step([np.ones(2), np.ones(3)])


@pytest.mark.parametrize("grouped", [False, True])
def test_a_group_is_added_whole_or_not_at_all(grouped: bool) -> None:
    """Wherever add_param_group is interrupted, the optimizer goes on with the groups that it has."""
    event = 0
    interrupted = True
    while interrupted:
        event += 1
        first = np.ones(3)
        opt = Adam([{"params": first}] if grouped else first)
        opt.grads  # noqa: B018  (made now; those of the new group come later)
        interrupted = interrupt_at(event, lambda opt=opt: opt.add_param_group({"params": [np.ones(2)]}))
        added = len(opt.param_groups) == 2
        assert len(opt.state) == 1 + added
        assert added or interrupted
        opt.zero_grad()
        opt.step()
        grads = [np.ones(3), [np.ones(2)]]
        opt.step(grads if added else grads[:1] if grouped else grads[0])
        if not added:
            opt.add_param_group({"params": [np.ones(2)]})
        opt.step([np.ones(3), [np.ones(2)]])
        assert [entry["step"] for entry in opt.state.values()] == ([3, 3] if added else [3, 1])
    assert event > 10


def test_amsgrad_switched_on_leaves_alone_what_is_left_out() -> None:
    opt = Adam([np.ones(2), np.ones(3)])
    opt.param_groups[0]["amsgrad"] = True
    opt.step([np.ones(2), None])
    assert [("max_exp_avg_sq" in entry) for entry in opt.state.values()] == [True, False]
    saved = opt.state_dict()
    assert saved["state"][1]["max_exp_avg_sq"].tolist() == [0, 0, 0]
    twin = Adam([np.ones(2), np.ones(3)])
    twin.load_state_dict(saved)
    for one in (opt, twin):
        one.step([np.ones(2), np.ones(3)])
    assert twin.param_groups[0]["params"][1].tolist() == opt.param_groups[0]["params"][1].tolist()


def test_the_core_itself_knows_how_many_params_there_are() -> None:
    """One too many would be a read behind their end."""
    opt = Adam([np.ones(3), np.ones(2)])
    for call in (opt._core.state, lambda i: opt._core.streams({"exp_avg": [i]})):
        call(1)
        with pytest.raises(IndexError):
            call(2)
    moments = opt._core.all_state()["exp_avg"]
    opt._core.set_state([1, 2], {"exp_avg": moments}, [], 0)
    for steps, arrays in ([1], moments), ([1, 2, 3], moments), ([1, 2], moments[:1]), ([1, 2], moments * 2):
        with pytest.raises(ValueError, match="another number of parameters"):
            opt._core.set_state(steps, {"exp_avg": arrays}, [], 0)
    for wrong in (np.ones(2), np.ones((3, 1)), np.ones(3, np.float32), np.ones(6)[::2]):
        with pytest.raises(ValueError, match="new state of params\\[0\\]"):
            opt._core.set_state([3, 4], {"exp_avg": [wrong, None]}, [], 0)
    with pytest.raises(ValueError, match="no optimizer has a stream"):
        opt._core.set_state([3, 4], {"grad": [None, None]}, [], 0)
    assert [entry["step"] for entry in opt.state.values()] == [1, 2]


def test_the_core_itself_knows_whether_gradients_are_grouped() -> None:
    """Two groups without grouped gradients would be a read behind the end of the gradients."""
    opt = Adam(np.ones(3))
    group = {**opt.defaults, "params": None}
    with pytest.raises(RuntimeError, match="several trees need grouped gradients"):
        opt._core.add_tree(opt.param_groups, _core.Structure(np.ones(2)), [(group, [0])], False, False)
    assert len(opt.param_groups) == len(opt.state) == 1
    opt.step(np.ones(3))


def test_exclusive_use_that_is_lost_ends() -> None:
    """From Python 3.14 on an interruption may come after it was taken and before the protected body."""
    opt = Adam(np.ones(3))
    use = _core.ExclusiveUse(opt._core)
    with pytest.raises(RuntimeError, match="is in use"):
        _core.ExclusiveUse(opt._core)
    del use
    use = _core.ExclusiveUse(opt._core)
    with use:
        pass
    with pytest.raises(RuntimeError, match="has ended"), use:
        pass
    with _core.ExclusiveUse(opt._core), pytest.raises(RuntimeError, match="is in use"):
        opt.step(np.ones(3))
    opt.step(np.ones(3))


def test_what_is_left_of_a_refused_construction() -> None:
    """A subclass may catch the refusal and go on: with an optimizer of nothing."""

    class Half(Adam):
        def __init__(self) -> None:
            with pytest.raises(ValueError, match="strided"):
                super().__init__(np.ones(6)[::2])

    opt = Half()
    assert len(opt.state) == 0 and repr(opt) == "Half(\n)"
    with pytest.raises(ValueError, match="no groups"):
        opt.lr  # noqa: B018
    for call in (opt.zero_grad, opt.state_dict, lambda: opt.step([]), lambda: opt._core.zero([])):
        call()
    opt.add_param_group({"params": np.ones(2)})
    opt.step([np.ones(2)])
    assert opt.state[0]["step"] == 1
