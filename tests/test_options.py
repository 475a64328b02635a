"""Hyper-parameters and groups that are refused: when given, and again when edited between steps."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam
from snapshots import (
    Scene,
    adam_step_arrays,
    adam_step_refused,
    random_like,
    refused,
)

NAN, INF = float("nan"), float("inf")

NUMBER = r"must be a number, got {value}\W.*\w"
FINITE = "must be finite and >= 0, got {value}"
BETA = "must be >= 0 and < 1, got {value}"
PAIR = "must be a pair of numbers, got {value}"
FLAG = "must be True or False, got {value}"


def bad_options() -> Iterator[Any]:
    def row(key: str, value: Any, error: type[Exception], message: str, *at: Any) -> Any:
        i, found = at or ("", value)
        message = message.format(value=re.escape(repr(found)))
        message = rf"\[{i}\] {message}" if at else message
        return pytest.param(key, value, error, message, id=f"{key}={value!r}")

    for key in ("lr", "eps", "weight_decay"):
        for value in (NAN, INF, -INF, -1e-3, -1, np.float32(-1)):
            yield row(key, value, ValueError, FINITE)
        for value in ("0.1", None, True, False, 1j, [0.1]):
            yield row(key, value, TypeError, NUMBER)
    for i, value in itertools.product((0, 1), (1.0, 1, 1.5, -0.1, NAN, INF)):
        yield row("betas", [(value, 0.9), (0.9, value)][i], ValueError, BETA, i, value)
    for i, value in itertools.product((0, 1), ("0.9", None, True)):
        yield row("betas", [(value, 0.9), (0.9, value)][i], TypeError, NUMBER, i, value)
    for value in ((), (0.9,), (0.9, 0.99, 0.999), []):
        yield row("betas", value, ValueError, PAIR)
    for value in (0.9, "ab", None, {0.9, 0.999}):
        yield row("betas", value, TypeError, PAIR)
    for key in ("amsgrad", "maximize", "decoupled_weight_decay"):
        for value in (1, 0, None, "yes", 1.0, np.True_):
            yield row(key, value, TypeError, FLAG)


options = pytest.mark.parametrize(("key", "value", "error", "message"), list(bad_options()))


def on(where: str, key: str, message: str) -> str:
    """A regex: the message begins with the option, as its group calls it."""
    name = f"{where}['{key}']" if where else key
    return f"^{re.escape(name)} ?{message}"


@options
def test_refuses_option(key: str, value: Any, error: type[Exception], message: str) -> None:
    params = [np.ones(3)]
    with refused(error, on("", key, message), None, params):
        Adam(params, **{key: value})
    groups = [{"params": np.ones(3)}, {"params": params, key: value}]
    with refused(error, on("param_groups[1]", key, message), None, params):
        Adam(groups)
    scene = Scene()
    with refused(error, on("param_groups[1]", key, message), scene.opt, params):
        scene.opt.add_param_group({"params": params, key: value})
    scene.goes_on()
    adam_step_refused(adam_step_arrays(), error, on("", key, message), **{key: value})


@options
@pytest.mark.parametrize("group", [0, 1], ids=["first", "last"])
def test_refuses_edited_option(
    key: str, value: Any, error: type[Exception], message: str, group: int
) -> None:
    scene = Scene(grouped=True)
    edited = scene.opt.param_groups[group]
    saved = edited[key]
    message = on(f"param_groups[{group}]", key, message)
    with refused(error, message, scene.opt, undo=lambda: edited.update({key: saved})):
        edited[key] = value
        scene.opt.step(scene.grads())
    scene.goes_on()


def test_option_that_acts_when_it_is_read() -> None:
    """Reading a number may run anybody's code. What was checked before it does not hold after it."""
    scene = Scene(grouped=True)
    first, last = scene.opt.param_groups
    param, saved = first["params"][0], first["params"][0].copy()

    class Rate:
        def __float__(self) -> float:
            param.resize(1_000_000, refcheck=False)
            return 0.01

    def undo() -> None:
        param.resize(saved.shape, refcheck=False)
        param[...] = saved
        last["lr"] = 0.01

    last["lr"] = 0.01
    scene.twin.param_groups[1]["lr"] = 0.01
    with refused(ValueError, "has shape", scene.opt, undo=undo):
        last["lr"] = Rate()
        scene.opt.step(scene.grads())
    scene.goes_on()


@pytest.mark.parametrize("value", [NAN, INF, -1.0, "0.1", None, True], ids=repr)
def test_lr_setter_refuses(value: Any) -> None:
    scene = Scene(grouped=True)
    error = ValueError if isinstance(value, float) else TypeError
    with refused(error, "^lr must be", scene.opt):
        scene.opt.lr = value
    scene.goes_on()


@pytest.mark.parametrize("step", [0, -1, -(2**63), -(2**63) - 1, 2**63, 2**70, np.int64(0)], ids=repr)
def test_adam_step_refuses_step_number(step: int) -> None:
    adam_step_refused(adam_step_arrays(), ValueError, f"^step must be >= 1 .*, got {step}", step=step)


@pytest.mark.parametrize("step", [True, 1.0, "1", None, np.float64(1)], ids=repr)
def test_adam_step_refuses_type_of_step(step: Any) -> None:
    adam_step_refused(adam_step_arrays(), TypeError, "^step must be an int, got ", step=step)


REPLACED = r"param_groups\[1\]\['params'\] was replaced; the arrays of a group are fixed.*add_param_group"
OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
GROUP_EDITS: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    **{
        f"no-{key}": (lambda g, key=key: g[1].pop(key), rf"param_groups\[1\]\['{key}'\] is missing")
        for key in OPTIONS
    },
    "no-params": (lambda g: g[1].pop("params"), REPLACED),
    "params-as-list": (lambda g: g[1].update(params=list(g[1]["params"])), REPLACED),
    "params-fewer": (lambda g: g[1].update(params=()), REPLACED),
    "params-as-given": (lambda g: g[1].update(params=g[1]["params"][0]), REPLACED),
    "removed": (list.pop, "param_groups has 1 groups, but .* was given 2.*add_param_group"),
    "cleared": (list.clear, "param_groups has 0 groups, but .* was given 2"),
    "appended": (lambda g: g.append({"params": ()}), "param_groups has 3 groups, but .* was given 2"),
    "swapped": (list.reverse, r"param_groups\[0\]\['params'\] was replaced"),
    "not-a-dict": (lambda g: g.__setitem__(1, ["lr"]), r"param_groups\[1\] must be a dict"),
}


@pytest.mark.parametrize(("change", "message"), GROUP_EDITS.values(), ids=GROUP_EDITS)
def test_refuses_edited_groups(change: Callable[[list[Any]], Any], message: str) -> None:
    scene = Scene(grouped=True)
    groups = scene.opt.param_groups
    saved = [(group, dict(group)) for group in groups]

    def undo() -> None:
        groups[:] = [group for group, _ in saved]
        for group, content in saved:
            group.clear()
            group.update(content)

    with refused(TypeError if "must be" in message else ValueError, f"^{message}", scene.opt, undo=undo):
        change(groups)
        scene.opt.step(scene.grads())
    scene.goes_on()


OTHER_CALLS: dict[str, Callable[[Adam], Any]] = {
    "state_dict": Adam.state_dict,
    "load_state_dict": lambda opt: opt.load_state_dict(Scene(grouped=True).opt.state_dict()),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "grads": lambda opt: opt.grads,
    "add_param_group": lambda opt: opt.add_param_group({"params": np.ones(2)}),
}


@pytest.mark.parametrize("call", OTHER_CALLS.values(), ids=OTHER_CALLS)
@pytest.mark.parametrize(
    "edit", ["no-params", "params-fewer", "removed", "cleared", "appended", "swapped", "not-a-dict"]
)
def test_other_calls_refuse_edited_groups(edit: str, call: Callable[[Adam], Any]) -> None:
    change, message = GROUP_EDITS[edit]
    opt = Scene(grouped=True).opt
    change(opt.param_groups)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(opt)


def test_refuses_groups_that_are_no_list() -> None:
    scene = Scene(grouped=True)
    opt, groups = scene.opt, scene.opt.param_groups
    with refused(TypeError, "param_groups", opt, undo=lambda: setattr(opt, "param_groups", groups)):
        opt.param_groups = tuple(groups)
        opt.step(scene.grads())
    scene.goes_on()


def test_amsgrad_and_a_refused_step_at_once() -> None:
    """amsgrad needs one more array; a step that is refused must not leave it behind."""
    params = random_like([np.empty(3), np.empty(4)], 1)
    opt = Adam(params)
    opt.step(random_like(params, 2))
    group = opt.param_groups[0]
    message = r"^grad for params\[1\] has shape"
    with refused(ValueError, message, opt, undo=lambda: group.update(amsgrad=False)):
        group["amsgrad"] = True
        opt.step([np.ones(3), np.ones(3)])


def test_error_of_a_number_is_the_callers() -> None:
    class Rate:
        def __float__(self) -> float:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Adam(np.ones(2), lr=Rate())  # type: ignore[arg-type]


def test_number_that_is_no_float() -> None:
    """Its own ValueError would not say where it stands."""
    with pytest.raises(TypeError, match=r"^lr must be a number, got Decimal\('sNaN'\) of type"):
        Adam(np.ones(2), lr=Decimal("sNaN"))  # type: ignore[arg-type]


def test_betas_that_get_fewer_while_they_are_read() -> None:
    class Beta:
        def __float__(self) -> float:
            betas.clear()
            return 0.9

    betas: list[Any] = [Beta(), 0.99]
    with pytest.raises(IndexError):
        Adam(np.ones(2), betas=betas)  # type: ignore[arg-type]


def test_refuses_numpy_bool_as_number() -> None:
    with pytest.raises(TypeError, match=r"^lr must be a number, got"):
        Adam(np.ones(2), lr=np.True_)


def test_group_that_is_replaced_while_another_is_read() -> None:
    """What was checked is what is read: the groups as they were when the step began."""
    scene = Scene(grouped=True)
    groups = scene.opt.param_groups

    class Rate:
        def __float__(self) -> float:
            groups[1] = "oops"  # type: ignore[call-overload]
            return 0.01

    last = groups[1]
    before = scene.opt.state[0]["step"]
    groups[0]["lr"] = Rate()  # type: ignore[assignment]
    scene.opt.step(scene.grads())
    groups[0]["lr"], groups[1] = 0.01, last
    assert {entry["step"] for entry in scene.opt.state.values()} == {before + 1}


@pytest.mark.parametrize("edit", [lambda g: g.pop("amsgrad"), lambda g: g.update(amsgrad="x")])
def test_state_dict_refuses_options_that_would_not_load(edit: Callable[[dict[str, Any]], Any]) -> None:
    opt = Adam(np.ones(2))
    edit(opt.param_groups[0])
    with pytest.raises((TypeError, ValueError), match=r"^param_groups\[0\]\['amsgrad'\]"):
        opt.state_dict()


def test_refuses_array_beside_params() -> None:
    """It would look like one more option, and never be trained."""
    with pytest.raises(ValueError, match=r"^param_groups\[0\]\['bias'\] is an array"):
        Adam([{"params": np.ones(2), "bias": np.ones(2)}])


def test_takes_numpy_integer_as_num_threads() -> None:
    Adam(np.ones(2), num_threads=np.int64(2)).step(np.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [5, "", "\ud800", "float", None.__class__])
def test_number_with_a_strange_dtype(kind: Any) -> None:
    """What looks like an array and is none must not be taken for one: it crashed the process."""

    class Strange:
        class dtype: ...

        def __float__(self) -> float:
            return 0.5

        def __repr__(self) -> str:  # called with no error of its kind left behind
            return "<strange>"

    Strange.dtype.kind = kind  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="lr must be a number, got <strange>"):
        Adam(np.ones(2), lr=Strange())  # type: ignore[arg-type]


def test_lr_getter_refuses_what_a_step_refuses() -> None:
    opt = Adam([{"params": np.ones(2)}])
    for value in ("0.1", None, NAN):
        opt.param_groups[0]["lr"] = value
        with pytest.raises((TypeError, ValueError), match=r"^param_groups\[0\]\['lr'\] must be"):
            opt.lr  # noqa: B018
        with pytest.raises((TypeError, ValueError), match=r"^param_groups\[0\]\['lr'\] must be"):
            pickle.dumps(opt)  # which could not be loaded
    opt.lr = 0.1
    assert opt.lr == 0.1
    opt.param_groups[0] = [("lr", 0.1)]  # type: ignore[call-overload]
    for call in (lambda: opt.lr, lambda: setattr(opt, "lr", 0.2)):
        with pytest.raises(TypeError, match=r"^param_groups\[0\] must be a dict, got list"):
            call()


def test_options_are_not_shared() -> None:
    betas = [0.9, 0.99]
    opt = Adam(np.ones(2), betas=betas)  # type: ignore[arg-type]
    opt.add_param_group({"params": np.ones(3), "betas": betas})
    opt.param_groups[0]["schedule"] = [1, 2]
    saved = opt.state_dict()["param_groups"][0]
    betas[0] = 0.5
    opt.param_groups[0]["schedule"].append(3)
    for options in (opt.defaults, *opt.param_groups, saved):
        assert options["betas"] == (0.9, 0.99)
    assert saved["schedule"] == [1, 2]


@pytest.mark.parametrize(
    "slip, option",
    [
        ("weigth_decay", "weight_decay"),
        ("wieght_decay", "weight_decay"),
        ("weight_deacy", "weight_decay"),
        ("beta", "betas"),
        ("amsgard", "amsgrad"),
        ("maximise", "maximize"),
        ("ema_decy", "ema_decay"),
        ("maxnorm", "max_norm"),
        ("clip_values", "clip_value"),
        ("decoupled_weight_deacy", "decoupled_weight_decay"),
        ("weight_decay_", "weight_decay"),
        ("Weight_Decay", "weight_decay"),
        ("LR", "lr"),
        ("learning_rate", "lr"),
        ("epsilon", "eps"),
        ("beta_1", "betas"),
        ("wd", "weight_decay"),
        ("clipnorm", "max_norm"),
        ("param", "params"),
    ],
)
def test_slips_in_groups_are_refused(slip: str, option: str) -> None:
    said = f"has a key {slip!r}, which is no option: did you mean {option!r}? If it is yours, give it another"
    message = re.escape(f"{said} name.")
    with pytest.raises(ValueError, match=rf"^param_groups\[0\] {message}$"):
        Adam([{"params": np.ones(2), slip: 0.1}])
    opt = Adam(np.ones(2))
    with pytest.raises(ValueError, match=rf"^param_groups\[1\] {message}$"):
        opt.add_param_group({"params": np.ones(2), slip: 0.1})
    assert len(opt.param_groups) == 1


def test_keys_of_others_are_no_slips() -> None:
    names = """
        initial_lr max_lr min_lr base_lr swa_lr lr_scale lr_mult eta_min lr_decay momentum max_momentum
        base_momentum name tag layer warmup param_names weight_decay_scale weight_decay_mult wd_mult
        foreach fused capturable differentiable step lr0 lr2 lrs eps1 id
    """
    others = re.findall(r"\w+", names)
    opt = Adam([{"params": np.ones(2), **dict.fromkeys(others, 1)}])
    assert set(others) < set(opt.param_groups[0])
    opt.step([np.ones(2)])
