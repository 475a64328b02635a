"""Containers that do not fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cases import DEFAULTS
from refusals.table import Change, Row, drop, group_of, put, set_grads
from refusals.world import World


def structure_rows() -> Iterator[Row]:
    """Containers that do not fit: gradients, parameters, groups, and groups that were edited."""
    for call in ("step", "step()", "zero_grad"):
        for id, change, message in (
            (
                "a group less",
                drop("grads", 1),
                "grads: expected an entry for each of the 2 param groups, got 1",
            ),
            (
                "a group more",
                lambda w: w.grads.append(None),
                "grads: expected an entry .* 2 param groups, got 3",
            ),
            ("none", lambda w: w.grads.clear(), "grads: expected an entry .* 2 param groups, got 0"),
            ("a key less", drop("grads", 1, "b"), r"grads\[1\]: expected a dict .* without the key 'b'"),
            (
                "a key more",
                put("grads", 1, "c", value=None),
                r"grads\[1\]: expected a dict with 1 .* got one with 2",
            ),
            ("list for dict", put("grads", 1, value=[]), r"grads\[1\]: expected a dict .*got list"),
            ("None for dict", put("grads", 1, value=None), r"grads\[1\]: expected a dict .*got NoneType"),
            ("array for dict", put("grads", 1, value=np.ones(7)), r"grads\[1\]: expected a dict .*ndarray"),
            (
                "an entry less",
                drop("grads", 1, "b", 1),
                r"grads\[1\]\['b'\]: expected a list with 2 .*one with 1",
            ),
            (
                "an entry more",
                lambda w: w.grads[1]["b"].append(None),
                r"grads\[1\]\['b'\]: .*with 2 .*one with 3",
            ),
            (
                "array for list",
                put("grads", 1, "b", value=np.ones((2, 7))),
                r"grads\[1\]\['b'\]: expected a list",
            ),
            (
                "str for list",
                put("grads", 1, "b", value="ab"),
                r"grads\[1\]\['b'\]: expected a list .*got str",
            ),
        ):
            yield Row(f"{id}", call, change, ValueError, message)
        for id, change in (
            ("list for array", put("grads", 0, make=lambda a: [a])),
            ("dict for array", put("grads", 0, make=lambda a: {"a": a})),
            ("tuple for array", put("grads", 1, "b", 0, make=lambda a: (a,))),
        ):
            message = r"grad for param_groups\[.\]\['params'\].* is of type .*One array is needed here"
            yield Row(f"{id}", call, change, TypeError, message)
    expected = "grads: expected a list with an entry for each of the 2 param groups, got "
    for value in ("ab", {}, np.ones(2), {1, 2}):
        name = type(value).__name__
        yield Row(f"{name}", "step", put("grads", value=value), ValueError, expected + ".*" + name)
        yield Row(f"set grads: {name}", "step()", set_grads(value), ValueError, expected)
    for id, value in (("number", 5), ("0-d", np.array(5.0)), ("object", object())):
        yield Row(f"{id}", "step", put("grads", value=value), ValueError, expected)
        for call in ("step()", "zero_grad"):
            yield Row(f"set grads {id}", call, set_grads(value), ValueError, expected)
    yield Row("no grads", "step()", set_grads(None), ValueError, r"step\(\) needs grads")

    for call in ("Adam", "AdamW"):
        for id, value, error, message in (
            ("empty", {}, ValueError, "params has no arrays"),
            ("nested empty", [[], {"a": ()}], ValueError, "params has no arrays"),
            ("None", None, TypeError, "params is of type NoneType"),
            ("str", "w", TypeError, "params is of type str"),
            ("number", 1.0, TypeError, "params is of type float"),
            ("bytes", b"w", TypeError, "params is of type bytes"),
            ("None inside", {"w": [np.ones(2), None]}, TypeError, r"params\['w'\]\[1\] is of type NoneType"),
            ("str inside", {"w": {5: "x"}}, TypeError, r"params\['w'\]\[5\] is of type str"),
            ("group empty", [{"params": []}], ValueError, r"param_groups\[0\]\['params'\] has no arrays"),
            (
                "second empty",
                [{"params": np.ones(2)}, {"params": {}}],
                ValueError,
                r"param_groups\[1\]\['params'\]",
            ),
            (
                "no group",
                [{"params": np.ones(2)}, np.ones(2)],
                ValueError,
                r"params\[1\] has no key 'params'",
            ),
            (
                "array option",
                [{"params": np.ones(2), "b": np.ones(2)}],
                ValueError,
                r"param_groups\[0\]\['b'\] is an a",
            ),
        ):
            yield Row(f"{id}", call, put("new_params", value=value), error, message)
    for id, value, error, message in (
        ("None", None, TypeError, r"param_groups\[2\] must be a dict, got NoneType"),
        ("list", [np.ones(2)], TypeError, r"param_groups\[2\] must be a dict, got list"),
        ("str", "params", TypeError, r"param_groups\[2\] must be a dict, got str"),
        ("no params", {"lr": 1.0}, ValueError, r"param_groups\[2\] has no key 'params'"),
        ("no arrays", {"params": {}}, ValueError, r"param_groups\[2\]\['params'\] has no arrays"),
        ("None in it", {"params": None}, TypeError, r"param_groups\[2\]\['params'\] is of type NoneType"),
        (
            "array beside",
            {"params": np.ones(2), "x": np.ones(2)},
            ValueError,
            r"param_groups\[2\]\['x'\] is an array",
        ),
    ):
        yield Row(f"{id}", "add_param_group", put("group", value=value), error, message)
    for key in DEFAULTS:
        message = rf"param_groups\[2\]\['{key}'\] is missing"
        change: Change = lambda w, key=key: (w.opt.defaults.pop(key), w.group.pop(key, None))  # noqa: E731
        yield Row(f"default {key}", "add_param_group", change, ValueError, message)
        message = rf"param_groups\[1\]\['{key}'\] is missing"
        change = lambda w, key=key: group_of(w, 1).pop(key)  # noqa: E731
        for call in ("step", "state_dict", "save"):
            yield Row(f"no {key}", call, change, ValueError, message)

    replaced = r"param_groups\[1\]\['params'\] was replaced"
    count = "param_groups has {} groups, but the optimizer was given 2"
    edits: dict[str, tuple[Change, type[Exception], str]] = {
        "list of the same": (
            lambda w: group_of(w, 1).update(params=[*group_of(w, 1)["params"]]),
            ValueError,
            replaced,
        ),
        "equal tuple": (
            lambda w: group_of(w, 1).update(params=(*group_of(w, 1)["params"], 0)[:2]),
            ValueError,
            replaced,
        ),
        "an array more": (lambda w: group_of(w, 1).update(params=(np.ones(7),) * 3), ValueError, replaced),
        "no params": (lambda w: group_of(w, 1).pop("params"), ValueError, replaced),
        "removed": (lambda w: w.opt.param_groups.pop(), ValueError, count.format(1)),
        "removed first": (lambda w: w.opt.param_groups.pop(0), ValueError, count.format(1)),
        "all removed": (lambda w: w.opt.param_groups.clear(), ValueError, count.format(0)),
        "appended": (lambda w: w.opt.param_groups.append(dict(group_of(w, 1))), ValueError, count.format(3)),
        "inserted": (lambda w: w.opt.param_groups.insert(0, {"params": ()}), ValueError, count.format(3)),
        "reversed": (
            lambda w: w.opt.param_groups.reverse(),
            ValueError,
            r"param_groups\[0\]\['params'\] was replaced",
        ),
        "twice": (put("opt", "param_groups", 1, make=dict.fromkeys), ValueError, replaced),
        "None": (put("opt", "param_groups", 1), TypeError, r"param_groups\[1\] must be a dict"),
        "list": (put("opt", "param_groups", 1, value=["lr"]), TypeError, r"param_groups\[1\] must be a dict"),
        "groups tuple": (
            put("opt", "param_groups", make=tuple),
            TypeError,
            "param_groups must be a list, got tuple",
        ),
        "groups None": (put("opt", "param_groups"), TypeError, "param_groups must be a list, got NoneType"),
        "groups dict": (
            put("opt", "param_groups", value={}),
            TypeError,
            "param_groups must be a list, got dict",
        ),
    }
    for id, (change, error, message) in edits.items():
        for call in ("step", "step()", "add_param_group", "state_dict", "load_state_dict", "save"):
            yield Row(f"groups {id}", call, change, error, message)

        def without_buffers(world: World, change: Change = change) -> None:
            world.opt.grads = None
            change(world)

        yield Row(f"groups {id}", "grads", without_buffers, error, message)
    for id in ("None", "list"):
        change, error, message = edits[id]
        yield Row(f"groups {id}", "set lr", change, error, message)
    yield Row(
        "groups that differ",
        "get lr",
        lambda w: None,
        ValueError,
        "the groups have different learning rates, .*0.01, 0.02",
    )
