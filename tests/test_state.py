"""Checkpoints, pickles and copies: whatever goes on from them goes on with the same bits, or is refused."""

from __future__ import annotations

import copy
import pickle
import re
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, AdamW
from snapshots import (
    Snapshot,
    assert_same_bits,
    assert_same_state,
    interrupt_at,
    leaves,
    map_tree,
    random_like,
    refused,
    train,
)

Layer = namedtuple("Layer", ["weight", "bias"])
EMPTY = {
    "layers": [Layer(np.empty((3, 4), np.float32), np.empty((2, 3), order="F")), {"scale": np.empty(())}],
    "none": np.empty((0, 2), np.float32),
    "w": np.empty(33, np.float32),
}
NAMES = ["layers.0.0", "layers.0.1", "layers.1.scale", "none", "w"]
NAN, INF = float("nan"), float("inf")


def in_groups(params: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": params["layers"], "lr": 0.02}, {"params": {"w": params["w"], "none": params["none"]}}]


def as_is(params: dict[str, Any]) -> Any:
    return params


def grads_for(opt: Adam, seed: int) -> Any:
    """Gradients in the structure of an optimizer's buffers, every other one of them None for odd seeds."""
    grads = random_like(opt.grads, seed)
    if seed % 2:
        grads = map_tree(lambda grad: None if grad.size % 2 else grad, grads)
    return grads


def go_on(*opts: Adam, seeds: range) -> None:
    for opt in opts:
        for seed in seeds:
            opt.step(grads_for(opt, seed))


# Class, options, form of params, of every kind that a checkpoint may be of.
KINDS: dict[str, tuple[type[Adam], dict[str, Any], Callable[[Any], Any]]] = {
    "adam": (Adam, {}, as_is),
    "l2": (Adam, {"weight_decay": 0.1, "maximize": True}, as_is),
    "amsgrad": (Adam, {"amsgrad": True, "betas": (0.5, 0.6)}, as_is),
    "adamw": (AdamW, {"lr": 0.1, "eps": 1e-3}, as_is),
    "groups": (AdamW, {"amsgrad": True}, in_groups),
    "array": (Adam, {}, lambda params: params["w"]),
    "list": (Adam, {}, lambda params: list(params.values())[1:]),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def new(kind: str, seed: int = 1, **changes: Any) -> tuple[Any, Adam]:
    cls, options, form = KINDS[kind]
    params = random_like(EMPTY, seed)
    return params, cls(form(params), **{**options, **changes})


def arrays_of(opt: Adam) -> list[np.ndarray]:
    return [array for group in opt.param_groups for array in group["params"]]


def give_params(source: Adam, target: Adam) -> None:
    for a, b in zip(arrays_of(source), arrays_of(target), strict=True):
        b[...] = a


def assert_same_options(a: Adam, b: Adam) -> None:
    for one, other in zip(a.param_groups, b.param_groups, strict=True):
        assert {**one, "params": None} == {**other, "params": None}


# --- state_dict and load_state_dict -----------------------------------------------------------------


@kinds
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_round_trip(kind: str, steps: int) -> None:
    _, opt = new(kind)
    go_on(opt, seeds=range(steps))
    saved = opt.state_dict()
    # Another one, which has gone its own way before it is given the checkpoint.
    _, other = new(kind, seed=2, lr=0.7, weight_decay=0.9)
    go_on(other, seeds=range(2, 5))
    give_params(opt, other)
    before = Snapshot(None, saved)
    assert other.load_state_dict(saved) is None
    before.assert_unchanged()
    assert_same_state(other, opt)
    assert_same_options(other, opt)
    go_on(opt, other, seeds=range(10, 13))
    assert_same_bits(arrays_of(other), arrays_of(opt))
    assert_same_state(other, opt)


def test_layout() -> None:
    _, opt = new("groups")
    go_on(opt, seeds=range(3))
    saved = opt.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert list(saved["state"]) == [0, 1, 2, 3, 4]
    for index, entry in saved["state"].items():
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        assert entry["step"].dtype == np.int64 and entry["step"].shape == ()
        assert entry["step"] == opt.state[index]["step"]
    assert {int(entry["step"]) for entry in saved["state"].values()} == {2, 3}
    first, second = saved["param_groups"]
    assert first["params"] == [0, 1, 2] and second["params"] == [3, 4]
    assert first["param_names"] == ["0.0", "0.1", "1.scale"] and second["param_names"] == ["w", "none"]
    assert first["lr"] == 0.02 and second["lr"] == 1e-3
    for group in (first, second):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr")}
        assert options == {
            **{"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": True, "maximize": False},
            **{"foreach": None, "capturable": False, "differentiable": False, "fused": True},
            "decoupled_weight_decay": True,
        }


@kinds
def test_checkpoint_shares_no_memory(kind: str) -> None:
    _, opt = new(kind)
    go_on(opt, seeds=range(2))
    saved = opt.state_dict()
    expected = copy.deepcopy(saved)
    go_on(opt, seeds=range(2, 4))
    opt.param_groups[0]["lr"] = 0.5
    assert_same_bits(saved["state"], expected["state"])
    assert saved["param_groups"] == expected["param_groups"]

    opt.load_state_dict(saved)
    for _, array in leaves(saved["state"]):
        array[...] = 77
    saved["param_groups"][0].update(lr=9.0, betas=(0.0, 0.0))
    _, twin = new(kind)
    give_params(opt, twin)
    twin.load_state_dict(expected)
    assert_same_state(opt, twin)
    assert_same_options(opt, twin)


def small(steps: int = 3, **options: Any) -> Adam:
    """Two groups, names in the last one: what is wrong with it shows when the first might be loaded."""
    params = random_like([np.empty(3), {"w": np.empty((2, 3), np.float32), "b": np.empty(4)}], 1)
    opt = Adam([{"params": params[0]}, {"params": params[1]}], **{"amsgrad": True, **options})
    train(opt, params, range(steps))
    return opt


@pytest.mark.parametrize(
    "step",
    [3, 3.0, np.int32(3), np.longdouble(3), np.array(3), np.array(3.0), 0, 2**53 + 1, 2.0**53, 2**62],
    ids=repr,
)
def test_step_of_any_kind_of_number(step: Any) -> None:
    opt, saved = small(), small().state_dict()
    saved["state"][1]["step"] = step
    opt.load_state_dict(saved)
    assert [entry["step"] for entry in opt.state.values()] == [3, int(step), 3]
    assert type(opt.state[1]["step"]) is int


@pytest.mark.parametrize(
    ("saved", "given"),
    [
        ({"a.b": 1, "a": {"b": 2}}, {"a": {"b": 2}, "a.b": 1}),
        ({1: 1, "1": 2}, {"1": 2, 1: 1}),
    ],
)
def test_ambiguous_names_in_another_order(saved: Any, given: Any) -> None:
    make = partial(map_tree, lambda value: np.full(2, float(value)))
    opt, twin = Adam(make(saved)), Adam(make(given))
    opt.step(make(saved))
    with refused(ValueError, r"its parameter 0 is named .*, here it is ", twin):
        twin.load_state_dict(opt.state_dict())


def test_names_that_do_not_tell_apart() -> None:
    opt = Adam({"v": np.ones(2), "w": np.ones(2)})
    checkpoint = opt.state_dict()
    checkpoint["param_groups"][0]["param_names"] = ["w", "w"]
    with refused(ValueError, r"\['param_names'\] has 'w' twice, so that nobody knows which is which", opt):
        opt.load_state_dict(checkpoint)
    del checkpoint["param_groups"][0]["param_names"]  # as the message says
    opt.load_state_dict(checkpoint)


@pytest.mark.parametrize("how", ["no-entry", "empty-entry"])
def test_param_without_state_starts_afresh(how: str) -> None:
    opt, saved = small(), small().state_dict()
    if how == "no-entry":
        del saved["state"][1]
    else:
        saved["state"][1] = {}
    opt.load_state_dict(saved)
    for index, entry in opt.state.items():
        assert entry["step"] == (0 if index == 1 else 3)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert entry[name].any() == (index != 1)
    saved["state"] = {}
    opt.load_state_dict(saved)
    assert_same_state(opt, small(steps=0))


def test_ids_are_only_names() -> None:
    """As the layout has it, "params" says which entry belongs to which parameter."""
    opt, other, saved = small(), small(steps=0), small().state_dict()
    saved["state"] = {4: saved["state"][2], "first": saved["state"][0], 9: saved["state"][1]}
    saved["param_groups"][0]["params"] = ("first",)
    saved["param_groups"][1]["params"] = [9, 4]
    other.load_state_dict(saved)
    assert_same_state(other, opt)


@pytest.mark.parametrize(("saver", "loader"), [(True, False), (False, True)], ids=["on", "off"])
def test_amsgrad_is_that_of_the_checkpoint(saver: bool, loader: bool) -> None:
    opt, other = small(amsgrad=saver), small(amsgrad=loader)
    give_params(opt, other)
    other.load_state_dict(opt.state_dict())
    train(opt, opt.grads, (7, 8))
    train(other, opt.grads, (7, 8))
    assert_same_bits(arrays_of(other), arrays_of(opt))
    for entry in other.state.values():
        assert "max_exp_avg_sq" in entry
        assert entry["max_exp_avg_sq"].any() == saver  # what was there before belongs to another training


@pytest.mark.parametrize("keep_lr", [False, True])
def test_keep_lr(keep_lr: bool) -> None:
    opt, saved = small(lr=0.5), small(lr=0.25, eps=0.125).state_dict()
    saved["param_groups"][1]["lr"] = 0.75
    opt.param_groups[0]["lr"] = 0.375
    opt.load_state_dict(saved, keep_lr=keep_lr)
    rates = [group["lr"] for group in opt.param_groups]
    assert rates == ([0.375, 0.5] if keep_lr else [0.25, 0.75])
    assert [group["eps"] for group in opt.param_groups] == [0.125, 0.125]


def test_keep_lr_does_not_look_at_the_other() -> None:
    opt, saved = small(), small().state_dict()
    for group in saved["param_groups"]:
        group["lr"] = NAN
    opt.load_state_dict(saved, keep_lr=True)


def test_adamw_stays_decoupled() -> None:
    params = random_like([np.empty(3)], 1)
    adam, adamw = Adam(params, weight_decay=0.5), AdamW(random_like(params, 1))
    adamw.load_state_dict(adam.state_dict())
    (group,) = adamw.param_groups
    assert group["decoupled_weight_decay"] is True and group["weight_decay"] == 0.5
    adam.load_state_dict(adamw.state_dict())
    assert adam.param_groups[0]["decoupled_weight_decay"] is True


def test_options_of_others_are_kept_and_torch_flags_dropped() -> None:
    opt, other = small(), small()
    opt.param_groups[1]["initial_lr"] = 0.5
    saved = opt.state_dict()
    assert saved["param_groups"][1]["initial_lr"] == 0.5
    other.load_state_dict(saved)
    assert_same_options(other, opt)
    assert not {"fused", "foreach", "param_names"} & set(other.param_groups[1])


def test_options_of_others_keep_their_type() -> None:
    """Only in lists and tuples tensors are looked for; no other sequence may be made of its items."""
    opt = small()
    values = [Layer(1, 2), range(3), [Layer(3, 4)], (5, [6])]
    opt.param_groups[0].update(tags=values, tag=values[0], span=values[1])
    saved = opt.state_dict()
    group = saved["param_groups"][0]
    assert group["tags"] == values and type(group["tag"]) is Layer and group["span"] == range(3)
    twin = small()
    twin.load_state_dict(saved)
    assert twin.param_groups[0]["tags"] == values and type(twin.param_groups[0]["tag"]) is Layer


def test_options_that_a_checkpoint_lacks_are_the_default() -> None:
    """Checkpoints of older versions know fewer, and went on without. What is no option stays."""
    opt, saved = small(eps=0.5, maximize=True, ema_decay=0.9), small().state_dict()
    opt.param_groups[0]["initial_lr"] = 0.7
    for group in saved["param_groups"]:
        assert "ema_decay" not in group
        for key in ("eps", "maximize", "foreach", "param_names"):
            group.pop(key, None)
    opt.load_state_dict(saved)
    keys = ("eps", "maximize", "ema_decay")
    assert [[group[key] for key in keys] for group in opt.param_groups] == [[1e-8, False, None]] * 2
    assert opt.param_groups[0]["initial_lr"] == 0.7


def test_names_matter_only_where_both_have_them() -> None:
    named, unnamed = random_like([{"a": np.empty(2), "b": np.empty(2)}, [np.empty(2), np.empty(2)]], 1)
    for one, other in ((Adam(named), Adam(unnamed)), (Adam(unnamed), Adam(named))):
        other.load_state_dict(one.state_dict())


# --- Checkpoints that are refused -------------------------------------------------------------------

ENTRY = "state_dict['state'][2]"
GROUP = "state_dict['param_groups'][1]"


def entry(**changes: Any) -> Callable[[Any], None]:
    return lambda saved: saved["state"][2].update(changes)


def group(**changes: Any) -> Callable[[Any], None]:
    return lambda saved: saved["param_groups"][1].update(changes)


def drop(*path: Any) -> Callable[[Any], None]:
    def change(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return change


# What is done to a correct checkpoint, the error, how its message begins.
BROKEN: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no-state": (drop("state"), ValueError, "state_dict has no key 'state'"),
    "no-groups": (drop("param_groups"), ValueError, "state_dict has no key 'param_groups'"),
    "state-list": (put([], "state"), TypeError, "state_dict['state'] must be a dict"),
    "state-None": (put(None, "state"), TypeError, "state_dict['state'] must be a dict"),
    "groups-dict": (put({}, "param_groups"), TypeError, "state_dict['param_groups'] must be a list"),
    "groups-str": (put("ab", "param_groups"), TypeError, "state_dict['param_groups'] must be a list"),
    "fewer-groups": (
        drop("param_groups", 1),
        ValueError,
        "state_dict has 1 param groups, the optimizer has 2",
    ),
    "more-groups": (
        lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
        ValueError,
        "state_dict has 3 param groups, the optimizer has 2",
    ),
    "group-list": (put([1, 2], "param_groups", 1), TypeError, f"{GROUP} must be a dict"),
    "no-params": (drop("param_groups", 1, "params"), ValueError, f"{GROUP} has no key 'params'"),
    "params-int": (group(params=2), TypeError, f"{GROUP}['params'] must be a list of indices"),
    "params-str": (group(params="12"), TypeError, f"{GROUP}['params'] must be a list of indices"),
    "params-unhashable": (
        group(params=[[1], [2]]),
        TypeError,
        f"{GROUP}['params'] must be a list of indices",
    ),
    "params-fewer": (group(params=[1]), ValueError, f"{GROUP} has 1 parameters, the optimizer has 2"),
    "params-more": (group(params=[1, 2, 3]), ValueError, f"{GROUP} has 3 parameters, the optimizer has 2"),
    "params-twice": (group(params=[1, 1]), ValueError, "state_dict['param_groups'] lists a parameter twice"),
    "params-of-other": (
        group(params=[0, 1]),
        ValueError,
        "state_dict['param_groups'] lists a parameter twice",
    ),
    "params-unknown": (group(params=[1, 3]), ValueError, "state_dict['state'] has entries of no group: [2]"),
    "state-unknown": (put({}, "state", 9), ValueError, "state_dict['state'] has entries of no group: [9]"),
    "names-other": (group(param_names=["w", "c"]), ValueError, f"{GROUP}: its parameter 1 is named 'c'"),
    "names-order": (group(param_names=["b", "w"]), ValueError, f"{GROUP}: its parameter 0 is named 'b'"),
    "names-fewer": (group(param_names=["w"]), ValueError, f"{GROUP} has 1 names for 2 parameters"),
    "names-number": (group(param_names=5), TypeError, f"{GROUP}['param_names'] must be a list"),
    "names-lists": (
        group(param_names=[["w"], ["w"]]),
        ValueError,
        f"{GROUP}: its parameter 0 is named ['w']",
    ),
    "requires-number": (put(5, "requires"), TypeError, "state_dict['requires'] must be a list"),
    "requires-str": (put("ema", "requires"), TypeError, "state_dict['requires'] must be a list"),
    "requires-more": (put(["ema", "soap"], "requires"), ValueError, "state_dict needs ['soap'], which "),
    "entry-list": (put([1], "state", 2), TypeError, f"{ENTRY} must be a dict"),
    "entry-None": (put(None, "state", 2), TypeError, f"{ENTRY} must be a dict"),
    "entry-array": (put(np.ones(4), "state", 2), TypeError, f"{ENTRY} must be a dict"),
    "entry-sgd": (entry(momentum_buffer=np.ones(4)), ValueError, f"{ENTRY} has ['momentum_buffer']"),
    **{
        f"no-{name}": (drop("state", 2, name), ValueError, f"{ENTRY} has no '{name}'")
        for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    },
    **{
        f"step={step!r}": (entry(step=step), TypeError, f"{ENTRY}['step'] must be a number")
        for step in ("3", None, True, np.True_, [3], 3j, np.array([3]), np.array(True))
    },
    **{
        f"step={step!r}": (entry(step=step), ValueError, f"{ENTRY}['step'] must be a whole number >= 0")
        for step in (
            -1,
            -1.0,
            0.5,
            NAN,
            INF,
            -INF,
            2**62 + 1,
            2.0**53 + 2,
            2**70,
            1e300,
            np.float32(1.5),
            np.array(-1),
        )
    },
    **{
        f"{name}={id}": (entry(**{name: value}), TypeError, f"{ENTRY}['{name}'] must be an array")
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for id, value in {
            "None": None,
            "list": [0.0] * 4,
            "str": "array",
            "number": 0.0,
            "masked": np.ma.masked_array(np.ones(4), mask=[1, 0, 0, 0]),
        }.items()
    },
    **{
        f"{name}={id}": (entry(**{name: value}), TypeError, f"{ENTRY}['{name}'] has dtype {value.dtype}, ")
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for id, value in {
            "float32": np.ones(4, np.float32),
            "int": np.ones(4, int),
            "complex": np.ones(4, complex),
            "object": np.ones(4, object),
            "swapped": np.ones(4, np.dtype(float).newbyteorder("S")),
        }.items()
    },
    **{
        f"{name}-shape={shape}": (
            entry(**{name: np.ones(shape)}),
            ValueError,
            f"{ENTRY}['{name}'] has shape {shape}, expected (4,)",
        )
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for shape in ((2, 2), (1, 4), (5,), (0,), (1,), ())
    },
    **{
        f"lr={value!r}": (group(lr=value), ValueError, f"{GROUP}['lr'] must be finite and >= 0")
        for value in (NAN, INF, -0.1, np.float32(-1), np.array(NAN))
    },
    "lr-str": (group(lr="0.1"), TypeError, f"{GROUP}['lr'] must be a number"),
    "lr-None": (group(lr=None), TypeError, f"{GROUP}['lr'] must be a number"),
    "eps": (group(eps=-1e-8), ValueError, f"{GROUP}['eps'] must be finite and >= 0"),
    "weight_decay": (group(weight_decay=INF), ValueError, f"{GROUP}['weight_decay'] must be finite"),
    "beta1": (group(betas=(1.0, 0.999)), ValueError, f"{GROUP}['betas'][0] must be >= 0 and < 1"),
    "beta2": (group(betas=[0.9, NAN]), ValueError, f"{GROUP}['betas'][1] must be >= 0 and < 1"),
    "betas": (group(betas=0.9), TypeError, f"{GROUP}['betas'] must be a pair of numbers"),
    "three-betas": (group(betas=(0.9,) * 3), ValueError, f"{GROUP}['betas'] must be a pair of numbers"),
    "amsgrad": (group(amsgrad=1), TypeError, f"{GROUP}['amsgrad'] must be True or False"),
    "maximize": (group(maximize=None), TypeError, f"{GROUP}['maximize'] must be True or False"),
    "decoupled": (group(decoupled_weight_decay=0.0), TypeError, f"{GROUP}['decoupled_weight_decay'] must be"),
}


@pytest.mark.parametrize(("change", "error", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_broken_checkpoint(
    change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    check_load_refused(small(), broken(change), error, message)


def broken(change: Callable[[Any], Any]) -> Any:
    saved = small(steps=5, lr=0.125).state_dict()  # nothing in it is as in small()
    change(saved)
    return saved


def check_load_refused(opt: Adam, saved: Any, error: type[Exception], message: str) -> None:
    for keep_lr in (False, True):
        if keep_lr and "['lr']" in message:
            continue
        with refused(error, "^" + re.escape(message), opt, saved):
            opt.load_state_dict(saved, keep_lr=keep_lr)
    twin = small()
    for one in (opt, twin):
        train(one, one.grads, (7, 8))
    assert_same_bits(arrays_of(opt), arrays_of(twin))
    assert_same_state(opt, twin)


@pytest.mark.parametrize("saved", [None, [], "checkpoint.npz", 5, np.ones(3)], ids=repr)
def test_refuses_what_is_no_dict(saved: Any) -> None:
    check_load_refused(small(), saved, TypeError, "state_dict must be a dict")


def test_checkpoint_of_live_views() -> None:
    """Moments that change places, by a dict of the views themselves."""
    opt = Adam([np.ones(3), np.ones(3)])
    opt.step([np.full(3, 2.0), np.full(3, 5.0)])
    first, second = (np.array(opt.state[i]["exp_avg"]) for i in (0, 1))
    opt.load_state_dict({**opt.state_dict(), "state": {0: opt.state[1], 1: opt.state[0]}})
    assert_same_bits([opt.state[i]["exp_avg"] for i in (0, 1)], [second, first])


def test_refuses_checkpoint_of_another_model() -> None:
    other = Adam([{"params": [np.ones(3)]}, {"params": {"w": np.ones((2, 3)), "b": np.ones(4)}}])
    other.step([[np.ones(3)], {"w": np.ones((2, 3)), "b": np.ones(4)}])
    place = "state_dict['state'][1]['exp_avg'] has dtype float64, expected float32"
    check_load_refused(small(), other.state_dict(), TypeError, place)


# --- pickle and copy --------------------------------------------------------------------------------


class Tagged(AdamW):
    """A subclass with a constructor and attributes of its own."""

    def __init__(self, tag: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag, self.history = tag, [1, 2]


COPIES: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle-{protocol}": lambda obj, protocol=protocol: pickle.loads(pickle.dumps(obj, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "deepcopy": copy.deepcopy,
}
copies = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)


@copies
@kinds
@pytest.mark.parametrize("steps", [0, 3])
def test_copy_goes_on(duplicate: Callable[[Any], Any], kind: str, steps: int) -> None:
    _, opt = new(kind, num_threads=1)
    go_on(opt, seeds=range(steps))
    opt.param_groups[0]["tag"] = "mine"
    before = Snapshot(opt, opt.grads)
    twin = duplicate(opt)
    assert type(twin) is type(opt)
    assert twin.defaults == opt.defaults
    assert_same_options(twin, opt)
    assert_same_bits(arrays_of(twin), arrays_of(opt))
    assert_same_state(twin, opt)
    for a, b in zip(arrays_of(twin), arrays_of(opt), strict=True):
        assert a is not b and not np.may_share_memory(a, b)
        assert (a.flags.c_contiguous, a.flags.f_contiguous) == (b.flags.c_contiguous, b.flags.f_contiguous)
    go_on(twin, seeds=range(10, 13))
    before.assert_unchanged()  # independent of the copy
    go_on(opt, seeds=range(10, 13))
    assert_same_bits(arrays_of(twin), arrays_of(opt))
    assert_same_state(twin, opt)
    assert twin.state_dict()["param_groups"] == opt.state_dict()["param_groups"]  # the names, too


@copies
def test_copy_with_an_array_among_its_options(duplicate: Callable[[Any], Any]) -> None:
    opt = Adam(np.ones(2))
    opt.param_groups[0]["schedule"] = np.arange(3)
    assert_same_bits(duplicate(opt).param_groups[0]["schedule"], np.arange(3))


@copies
def test_copy_of_names_and_buffers(duplicate: Callable[[Any], Any]) -> None:
    _, opt = new("adam")
    opt.grads["w"] += 3
    opt.grads["layers"][0].weight[...] = 2
    twin = duplicate(opt)
    for name in NAMES:
        assert_same_bits(twin.state[name]["exp_avg"], opt.state[name]["exp_avg"])
    assert_same_bits(twin.grads, opt.grads)
    assert type(twin.grads["layers"][0]) is Layer
    assert twin.grads["w"] is not opt.grads["w"]
    for one in (twin, opt):
        one.step()
        one.zero_grad()
        assert not one.grads["w"].any()
    assert_same_bits(arrays_of(twin), arrays_of(opt))
    with pytest.raises(ValueError, match=r"^grad for params\['layers'\]\[0\]\[1\] has shape"):
        twin.step(
            {**opt.grads, "layers": [Layer(opt.grads["layers"][0].weight, np.ones(2)), {"scale": None}]}
        )


@copies
def test_copy_together_with_params_stays_bound_to_them(duplicate: Callable[[Any], Any]) -> None:
    params, opt = new("groups")
    go_on(opt, seeds=range(2))
    twin_params, twin = duplicate((params, opt))
    go_on(opt, twin, seeds=range(10, 12))
    assert_same_bits(twin_params, params)
    bound = {id(array) for array in arrays_of(twin)}
    assert bound == {id(array) for _, array in leaves(twin_params)}


@copies
def test_copy_of_added_groups(duplicate: Callable[[Any], Any]) -> None:
    opt = Adam({"w": np.ones(3)})
    opt.step({"w": np.ones(3)})
    opt.add_param_group({"params": [np.ones(4)], "lr": 0.5})
    twin = duplicate(opt)
    for one in (opt, twin):
        one.step([{"w": np.ones(3)}, [np.ones(4)]])
        one.add_param_group({"params": np.ones(2)})
        one.step([{"w": None}, [np.ones(4)], np.ones(2)])
    assert_same_bits(arrays_of(twin), arrays_of(opt))
    assert [entry["step"] for entry in twin.state.values()] == [2, 2, 1]


@copies
def test_copy_of_a_subclass(duplicate: Callable[[Any], Any]) -> None:
    opt = Tagged("mine", np.ones(3), lr=0.5)
    opt.step(np.ones(3))
    twin = duplicate(opt)
    assert type(twin) is Tagged
    assert (twin.tag, twin.history, twin.lr) == ("mine", [1, 2], 0.5)
    assert twin.history is not opt.history
    assert_same_state(twin, opt)


@copies
def test_moments_of_a_copy_are_aligned(duplicate: Callable[[Any], Any]) -> None:
    opt = Adam([np.ones(3), np.ones(100_003, np.float32)], amsgrad=True)
    for entry in duplicate(opt).state.values():
        assert all(moment.ctypes.data % 64 == 0 for name, moment in entry.items() if name != "step")


@copies
def test_copy_with_a_frozen_param(duplicate: Callable[[Any], Any]) -> None:
    """An array may become read-only when it is to be left out; the copy must not fail on it."""
    opt = Adam([np.ones(3), np.ones(4)])
    opt.param_groups[0]["params"][0].setflags(write=False)
    for one in (opt, duplicate(opt)):
        one.step([None, np.ones(4)])
        assert [entry["step"] for entry in one.state.values()] == [0, 1]


@copies
def test_copy_of_an_edited_subclass(duplicate: Callable[[Any], Any]) -> None:
    """What its options are is what they are in the copy."""
    opt = AdamW([np.ones(3)])
    opt.param_groups[0]["decoupled_weight_decay"] = False
    assert duplicate(opt).param_groups[0]["decoupled_weight_decay"] is False


def test_state_of_a_copy_can_be_used_again() -> None:
    opt = Adam([np.ones(3)])
    opt.step([np.ones(3)])
    state = opt.__getstate__()
    for _ in range(2):
        twin = Adam.__new__(Adam)
        twin.__setstate__(state)
        assert_same_state(twin, opt)


def test_shallow_copy_leaves_the_original_alone() -> None:
    opt = Adam([np.ones(3)])
    before = Snapshot(opt)
    copy.copy(opt)
    before.assert_unchanged()
    opt.step([np.ones(3)])


def test_step_counts_that_pass_what_a_float_holds() -> None:
    """What a state_dict has must load, here as in files: counts are integers at any size."""
    opt = small(0)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry["step"] = 2**53
    opt.load_state_dict(saved)
    train(opt, opt.grads, [1, 2])
    twin = small(0)
    twin.load_state_dict(opt.state_dict())
    assert [entry["step"] for entry in twin.state.values()] == [2**53 + 2] * 3


def test_a_state_is_loaded_whole_or_not_at_all() -> None:
    """Wherever load_state_dict is interrupted: what goes on is the old state, or the new one."""

    def scene() -> tuple[list[np.ndarray], Adam]:
        params = [np.ones(3), np.ones((2, 2), np.float32, order="F")]
        opt = Adam(params, lr=0.5)
        train(opt, params, [1])
        return params, opt

    params, other = scene()
    other = Adam(params, lr=0.25, amsgrad=True, ema_decay=0.5)
    train(other, params, [2, 3])
    saved = other.state_dict()
    event, outcomes = 0, []
    interrupted = True
    while interrupted:
        event += 1
        params, opt = scene()
        interrupted = interrupt_at(event, lambda opt=opt: opt.load_state_dict(saved))
        loaded = opt.param_groups[0]["lr"] == 0.25
        twin_params, twin = scene()
        if loaded:
            twin.load_state_dict(saved)
        assert_same_state(opt, twin)
        train(opt, params, [4])
        train(twin, twin_params, [4])
        assert_same_bits(params, twin_params)
        outcomes.append(loaded)
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True} and event > 10


def test_what_is_loaded_may_lie_in_memory_in_any_way() -> None:
    params = {"c": np.ones((3, 2)), "f": np.asfortranarray(np.ones((3, 2)))}
    opt = Adam(params)
    train(opt, params, [1, 2])
    saved = opt.state_dict()
    odd = np.empty(8 * 6 + 1, np.uint8)[1:].view(np.float64).reshape(3, 2)
    odd[...] = saved["state"][1]["exp_avg"]
    saved["state"][0]["exp_avg"] = np.asfortranarray(saved["state"][0]["exp_avg"])
    saved["state"][0]["exp_avg_sq"] = np.repeat(saved["state"][0]["exp_avg_sq"], 2, axis=0)[::2]
    saved["state"][1]["exp_avg"] = odd
    twin = Adam(map_tree(np.zeros_like, params))
    twin.load_state_dict(saved)
    assert_same_state(twin, opt)
