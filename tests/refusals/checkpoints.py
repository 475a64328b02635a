"""Checkpoints, in memory and in files, that were not made for these parameters, or were damaged."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from fused_adam import CheckpointError
from refusals.arrays import MISFITS, filled
from refusals.table import INF, NAN, SWAPPED, Change, Row, drop, edit, put, written
from refusals.world import World


def state_rows() -> Iterator[Row]:
    """Checkpoints in memory with each of their fields broken; tests/test_state.py has more of each."""
    in_group = functools.partial(put, "state_dict", "param_groups", 1)
    in_entry = functools.partial(put, "state_dict", "state", 2)
    entry, saved_group = r"state_dict\['state'\]\[2\]", r"state_dict\['param_groups'\]\[1\]"
    rows: list[tuple[str, Change, type[Exception], str]] = [
        ("None", put("state_dict"), TypeError, "state_dict must be a dict"),
        ("path", put("state_dict", value="adam.safetensors"), TypeError, "state_dict must be a dict"),
        ("no state", drop("state_dict", "state"), ValueError, "state_dict has no key 'state'"),
        ("no groups", drop("state_dict", "param_groups"), ValueError, "state_dict has no key 'param_groups'"),
        (
            "state list",
            put("state_dict", "state", value=[]),
            TypeError,
            r"state_dict\['state'\] must be a dict",
        ),
        (
            "groups dict",
            put("state_dict", "param_groups", value={}),
            TypeError,
            r"state_dict\['param_groups'\] must",
        ),
        (
            "a group less",
            drop("state_dict", "param_groups", 0),
            ValueError,
            "state_dict has 1 param groups, the",
        ),
        (
            "a group twice",
            put("state_dict", "param_groups", make=lambda g: g * 2),
            ValueError,
            "state_dict has 4 ",
        ),
        ("group None", in_group(), TypeError, f"{saved_group} must be a dict"),
        (
            "no ids",
            drop("state_dict", "param_groups", 1, "params"),
            ValueError,
            f"{saved_group} has no key 'params'",
        ),
        ("ids int", in_group("params", value=1), TypeError, rf"{saved_group}\['params'\]"),
        ("ids array", in_group("params", value=np.arange(2)), TypeError, saved_group),
        ("ids of arrays", in_group("params", make=lambda i: [np.ones(1)] * 2), TypeError, saved_group),
        ("an id less", in_group("params", value=[1]), ValueError, f"{saved_group} has 1 param"),
        ("an id twice", in_group("params", value=[1, 0]), ValueError, ".*lists a parameter twice"),
        ("other ids", in_group("params", value=[1, "2"]), ValueError, r".*no group: \[2\]"),
        (
            "names",
            in_group("param_names", value=["b.1", "b.0"]),
            ValueError,
            rf"{saved_group}: its parameter 0 is named",
        ),
        ("names str", in_group("param_names", value="b.0"), TypeError, rf"{saved_group}\['param_n"),
        ("entry None", in_entry(), TypeError, f"{entry} must be a dict"),
        (
            "entry of nobody",
            put("state_dict", "state", 3, value={}),
            ValueError,
            r"state_dict\['state'\] has entries",
        ),
        ("field of SGD", in_entry("momentum", value=1), ValueError, rf"{entry} has \['momentum'\]"),
        (
            "other parameter's",
            lambda w: w.state_dict["state"].update({2: w.state_dict["state"][1]}),
            ValueError,
            entry,
        ),
    ]
    steps: dict[type[Exception], tuple[Any, ...]] = {
        ValueError: (-1, 0.5, NAN, INF, 2**62 + 1, np.array(-1), np.float32(0.1)),
        TypeError: (Fraction(5, 2), "3", None, True, 3j, [3], np.array([3]), np.array("3"), np.array(True)),
    }
    for error, values in steps.items():
        for step in values:
            change = in_entry("step", value=step)
            rows.append((f"step {written(step)}", change, error, rf"{entry}\['step'\] must"))
    for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        rows.append(
            (f"no {name}", drop("state_dict", "state", 2, name), ValueError, f"{entry} has no '{name}'")
        )
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        place = rf"{entry}\['{name}'\]"
        for dtype in ("f4", "f2", "i8", "c16", "?", "O", SWAPPED + "f8", "g", "f8,f8"):
            if np.dtype(dtype) == np.float64:
                continue  # long double, where it is none
            change = in_entry(name, make=lambda a, dtype=dtype: filled(a, dtype))
            rows.append((f"{name} {dtype}", change, TypeError, f"{place} has dtype .*, expected float64"))
        for id, make in MISFITS.items():
            if id != "other float":
                change = in_entry(name, make=make[0])
                rows.append((f"{name} {id}", change, ValueError, rf"{place} has shape .*, expected \(2, 3\)"))
        for id, value in (("None", None), ("list", [[0.0] * 3] * 2), ("number", 0.0), ("bytes", b"0")):
            change = in_entry(name, value=value)
            rows.append((f"{name} {id}", change, TypeError, f"{place} must be an array, got"))
        change = in_entry(name, make=lambda a: np.ma.masked_less(a, 0))
        rows.append((f"{name} masked", change, TypeError, f"{place} must be an array, got MaskedArray"))
    for id, change, error, message in rows:
        yield Row(f"{id}", "load_state_dict", change, error, message)


def file_rows() -> Iterator[Row]:
    """Paths where nothing can be, files that are no checkpoints, and options that no file can hold."""

    def to(name: str, *, load: bool = False) -> Change:
        attribute = "load_path" if load else "path"
        return lambda world: setattr(world, attribute, world.folder / name)

    for call, load in (("save", False), ("load", True)):
        attribute = "load_path" if load else "path"
        if sys.platform == "win32":
            continue  # other errors
        yield Row("no folder", call, to("missing/a", load=load), FileNotFoundError, ".*missing")
        yield Row("folder", call, to("kept", load=load), IsADirectoryError, ".*kept")
        under = to("kept/adam.safetensors/a", load=load)
        yield Row("file as folder", call, under, NotADirectoryError, r".*adam\.safetensors")
        yield Row("long name", call, to("kept/" + "x" * 300, load=load), OSError, ".*x{300}")
        yield Row("zero byte", call, put(attribute, value="a\0b"), ValueError, ".*embedded null")
        for id, value in (("None", None), ("float", 1.5), ("list", ["a"]), ("dict", {})):
            yield Row(
                f"path {id}",
                call,
                put(attribute, value=value),
                TypeError,
                ".*PathLike object, not " + type(value).__name__,
            )
    yield Row("no file", "load", to("kept/none", load=True), FileNotFoundError, ".*kept/none")
    yield Row("path int", "save", put("path", value=10**6), TypeError, ".*PathLike object, not int")
    yield Row("path int", "load", put("load_path", value=10**6), TypeError, ".*PathLike object, not int")

    def damaged(damage: Callable[[bytearray], Any]) -> Change:
        def change(world: World) -> None:
            content = bytearray(world.path.read_bytes())
            damage(content)
            world.load_path = world.folder / "damaged"
            world.load_path.write_bytes(content)

        return change

    def flip(position: int, bit: int = 0) -> Change:
        def damage(content: bytearray) -> None:
            content[position] ^= 1 << bit

        return damaged(damage)

    for id, change in {
        "empty": damaged(lambda c: c.clear()),
        "cut in length": damaged(lambda c: c.__delitem__(slice(5, None))),
        "cut in header": damaged(lambda c: c.__delitem__(slice(100, None))),
        "cut by a byte": damaged(lambda c: c.pop()),
        "longer by a byte": damaged(lambda c: c.append(0)),
        "zeros": damaged(lambda c: c.__setitem__(slice(None), bytes(len(c)))),
        "flip in length": flip(1),
        "flip in header": flip(60),
        "flip in last array": flip(-1, 7),
        "flip in first array": flip(-300, 3),
        "text": damaged(lambda c: c.__setitem__(slice(None), b"no checkpoint\n" * 9)),
    }.items():
        yield Row(
            f"{id}", "load", change, CheckpointError, ".*damaged: .*(checkpoint|bytes|checksum|cut off)"
        )

    b = ("loaded_params", 1, "params")
    for id, change, error, message in (
        (
            "a group less",
            drop("loaded_params", 0),
            CheckpointError,
            ".*it has 2 parameter groups, but params has 1",
        ),
        (
            "no groups",
            put("loaded_params", value=np.ones(3)),
            CheckpointError,
            ".*it has 2 parameter groups, but params has 1",
        ),
        (
            "a parameter less",
            put(*b, "b", make=lambda p: p[:1]),
            CheckpointError,
            ".*param_groups.1.: 'b.1' in the file but not in params",
        ),
        (
            "other names",
            put(*b, make=lambda p: {"c": p["b"]}),
            CheckpointError,
            ".*'b.0', 'b.1' in the file but not in params; 'c.0', 'c.1' in params",
        ),
        (
            "other shape",
            put(*b, "b", 0, value=np.ones(8)),
            CheckpointError,
            r".*parameter 'b.0' of param_groups\[1\] is float64 of shape \(8,\), but .*\(7,\)",
        ),
        (
            "other dtype",
            put(*b, "b", 0, value=np.ones(7, "f4")),
            CheckpointError,
            r".*parameter 'b.0' of param_groups\[1\] is float32 .* but float64",
        ),
        (
            "flat",
            put("loaded_params", 0, "params", value=np.ones(12, "f4")),
            CheckpointError,
            r".*parameter 0 of param_groups\[0\] is .* \(12,\), but .* \(3, 4\)",
        ),
        ("no arrays", put(*b, value=[]), ValueError, r"param_groups\[1\]\['params'\] has no arrays"),
        ("None", put("loaded_params"), TypeError, "params is of type NoneType"),
        (
            "twice",
            lambda w: put(*b, "b", 1, value=w.loaded_params[1]["params"]["b"][0])(w),
            ValueError,
            ".*same array",
        ),
    ):
        yield Row(f"params {id}", "load", change, error, message)
    for id, value in (
        ("nan", NAN),
        ("inf", INF),
        ("set", {1}),
        ("bytes", b"x"),
        ("complex", 1j),
        ("array", np.ones(2)),
        ("object", object()),
        ("nested", {"a": [{"b": 1j}]}),
        ("function", len),
    ):
        message = r"param_groups\[1\]\['note'\].* is .*, which cannot be saved"
        yield Row(f"option {id}", "save", edit(1, "note", value), TypeError, message)

    class Enough(Exception):
        pass

    def enough(done: int, total: int) -> None:
        raise Enough("said progress")

    for call, attribute in (("save", "save_options"), ("load", "load_options")):
        stop = put(attribute, "progress", value=enough)
        yield Row("progress raises", call, stop, Enough, "said progress")
        no_function = put(attribute, "progress", value=5)
        yield Row("progress int", call, no_function, TypeError, "'int' object is not callable")
