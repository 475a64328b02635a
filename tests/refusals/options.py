"""Options that are none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from cases import OPTION_TABLE
from refusals.table import INF, NAN, Row, drop, edit, put, written
from snapshots import ROLES

NO_NUMBER: dict[str, Any] = {
    "str": "0.1",
    "bytes": b"0.1",
    "numpy str": np.str_("0.1"),
    "None": None,
    "bool": True,
    "numpy bool": np.True_,
    "complex": 0.1 + 0j,
    "0-d complex": np.array(0.1 + 1j),
    "array": np.array([0.1, 0.1]),
    "list": [0.1],
    "dict": {},
    "object": object(),
    "type": float,
    "time": np.timedelta64(5, "s"),
}
NUMBERS, OPTIONAL_NUMBERS, FLAGS, FRACTIONS = (
    [option.name for option in OPTION_TABLE if option.kind == kind]
    for kind in ("number", "number or None", "flag", "fraction or None")
)
NUMBERS += [option.name for option in OPTION_TABLE if option.kind == "number or function"]
FLAGS.remove("decoupled_weight_decay")  # AdamW has no such argument
# What float() takes, and no number is: NumPy warns of the first one only.
SLIPS: dict[str, Any] = {
    "numpy complex": np.complex128(0.1 + 1j),
    "0-d str": np.array("0.1"),
    "0-d bool": np.array(True),
    "0-d object": np.array("0.1", object),
    "void": np.void(b"1234"),
}
OUT_OF_RANGE: dict[str, Any] = {
    "nan": NAN,
    "inf": INF,
    "-inf": -INF,
    "negative": -1e-300,
    "int": -1,
    "float32 nan": np.float32(NAN),
    "0-d": np.array(-0.5),
    "fraction": Fraction(-1, 3),
}


def bad_options() -> Iterator[tuple[str, str, Any, type[Exception], str]]:
    """id, option, value, error, how the message goes on after the option."""
    for key in NUMBERS + OPTIONAL_NUMBERS:
        for id, value in NO_NUMBER.items():
            if value is not None or key in NUMBERS:
                yield f"{key} {id}", key, value, TypeError, " must be a number, got "
        for id, value in SLIPS.items():
            yield f"{key} {id}", key, value, TypeError, " must be a number, got "
        for id, value in OUT_OF_RANGE.items():
            yield f"{key} {id}", key, value, ValueError, " must be finite and >= 0, got "
        yield f"{key} huge int", key, 10**400, ValueError, " is too large for a float"
    for i in (0, 1):
        pairs = [(value, 0.9) if i == 0 else [0.9, value] for value in NO_NUMBER.values()]
        for id, pair in zip(NO_NUMBER, pairs, strict=True):
            yield f"betas[{i}] {id}", "betas", pair, TypeError, rf"\[{i}\] must be a number"
        for value in (1, 1.0, np.nextafter(1, 2), 2**70, -1e-300, NAN, INF, np.float32(1)):
            pair = (value, 0.9) if i == 0 else (0.9, value)
            yield f"betas[{i}]={written(value)}", "betas", pair, ValueError, rf"\[{i}\] must be >= 0 and < 1"
    for value in (0.9, "ab", None, np.array([0.9, 0.99]), {0.9, 0.99}, {0: 0.9, 1: 0.99}, iter((0.9, 0.99))):
        yield f"betas {type(value)}", "betas", value, TypeError, " must be a pair of numbers"
    for value in ((), [0.9], (0.9,) * 3):
        yield f"betas {value}", "betas", value, ValueError, " must be a pair of numbers"
    for key in FLAGS:
        for value in (1, 0, 1.0, "True", None, np.True_, [], np.array([True, False]), np.array(True)):
            yield f"{key}={written(value)}", key, value, TypeError, " must be True or False, got "

    for key in FRACTIONS:
        for id, value in {**NO_NUMBER, **SLIPS}.items():
            if value is not None:
                yield f"{key} {id}", key, value, TypeError, " must be a number, got "
        for value in (1, 1.0, np.nextafter(1, 2), 2**70, -1e-300, NAN, INF, np.float32(1)):
            yield f"{key}={written(value)}", key, value, ValueError, " must be >= 0 and < 1, got "

    for value in (1, None, b"hat", ["hat"], np.str_, True):
        yield (
            f"eps_mode={written(value)}",
            "eps_mode",
            value,
            TypeError,
            " must be 'outside', 'hat' or 'root', ",
        )
    for value in ("", "Hat", "hat ", "inside", "root\0"):
        yield (
            f"eps_mode={value!r}",
            "eps_mode",
            value,
            ValueError,
            " must be 'outside', 'hat' or 'root', got ",
        )


def option_rows() -> Iterator[Row]:
    """Every option in every place where it may be given."""
    for i, (id, key, value, error, message) in enumerate(bad_options()):
        given, edited = re.escape(key), rf"param_groups\[1\]\['{key}'\]"
        added, added_error, added_message = rf"param_groups\[2\]\['{key}'\]", error, message
        if isinstance(value, np.ndarray) and value.size > 1:
            added_error, added_message = ValueError, " is an array: arrays to train belong under"
        saved = rf"state_dict\['param_groups'\]\[1\]\['{key}'\]"
        rows = [
            Row(f"{id}", "AdamW", put("new_options", key, value=value), error, given + message),
            Row(f"{id}", "adam_step", put("step_options", key, value=value), error, given + message),
            Row(
                f"{id}", "add_param_group", put("group", key, value=value), added_error, added + added_message
            ),
            Row(
                f"{id}",
                "load_state_dict",
                put("state_dict", "param_groups", 1, key, value=value),
                error,
                saved + message,
            ),
            *(
                Row(f"edited {id}", call, edit(1, key, value), error, edited + message)
                for call in ("step", "step()", "state_dict", "save")
            ),
        ]
        if hasattr(value, "dtype") and key in FLAGS:
            rows = [
                row for row in rows if row.call != "load_state_dict"
            ]  # which takes them as PyTorch's tensors
        yield Row(f"{id}", "Adam", put("new_options", key, value=value), error, given + message)
        if key == "lr":
            yield Row(f"{id}", "set lr", put("lr", value=value), error, given + message)
        # All calls ask the same reader: some values everywhere, the others somewhere.
        everywhere = id.endswith((" str", " nan", "=None", "=1.0"))
        yield from (rows if everywhere else [rows[i % len(rows)]])
    for key, wrong in (("decoupled_weight_decay", 1), ("decoupled_weight_decay", None)):
        message = "decoupled_weight_decay'?(\\])? must be True or False"
        yield Row(f"{key}={wrong}", "Adam", put("new_options", key, value=wrong), TypeError, message)
        yield Row(f"{key}={wrong}", "adam_step", put("step_options", key, value=wrong), TypeError, message)
        place = r"param_groups\[0\]\['decoupled_weight_decay'\] must be True or False"
        yield Row(f"{key}={wrong}", "step", edit(0, key, wrong), TypeError, place)
    change = put("new_options", "decoupled_weight_decay", value=True)
    yield Row(
        "decoupled", "AdamW", change, TypeError, ".*unexpected keyword argument 'decoupled_weight_decay'"
    )
    for call, attribute in (("Adam", "new_options"), ("AdamW", "new_options"), ("adam_step", "step_options")):
        change = put(attribute, "learning_rate", value=0.1)
        yield Row("unknown", call, change, TypeError, ".*unexpected keyword argument 'learning_rate'")
    for id, value, error, message in (
        ("0", 0, ValueError, "must be >= 1 or None, got 0"),
        ("negative", -(2**70), ValueError, "must be >= 1 or None, got -"),
        ("many", 4097, ValueError, "must be at most 4096, got 4097"),
        ("0-d 0", np.array(0), ValueError, "must be >= 1 or None, got 0"),
        ("bool", False, TypeError, "must be an int or None, got False"),
        ("numpy bool", np.True_, TypeError, "must be an int or None, got"),
        ("float", 2.0, TypeError, "must be an int or None, got 2.0"),
        ("numpy float", np.float64(2), TypeError, "must be an int or None, got"),
        ("nan", NAN, TypeError, "must be an int or None, got nan"),
        ("str", "2", TypeError, "must be an int or None, got '2'"),
        ("complex", 2j, TypeError, "must be an int or None, got 2j"),
        ("list", [2], TypeError, r"must be an int or None, got \[2\]"),
        ("float array", np.array(2.0), TypeError, "must be an int or None, got"),
        ("array", np.array([2]), TypeError, "must be an int or None, got"),
    ):
        for call, attribute in (
            ("Adam", "new_options"),
            ("AdamW", "new_options"),
            ("load", "load_options"),
            ("adam_step", "step_options"),
        ):
            change = put(attribute, "num_threads", value=value)
            yield Row(f"num_threads {id}", call, change, error, f"num_threads {message}")
    for id, value, error, message in (
        ("0", 0, ValueError, "must be >= 1 and < 2..63, got 0"),
        ("negative", -(2**63) - 1, ValueError, "must be >= 1 and"),
        ("2**63", 2**63, ValueError, "must be >= 1 and"),
        ("0-d 0", np.array(0), ValueError, "must be >= 1 and"),
        ("uint64", np.uint64(2**63), ValueError, "must be >= 1 and"),
        ("bool", True, TypeError, "must be an int, got True"),
        ("numpy bool", np.True_, TypeError, "must be an int, got"),
        ("float", 3.0, TypeError, "must be an int, got 3.0"),
        ("nan", NAN, TypeError, "must be an int, got nan"),
        ("str", "3", TypeError, "must be an int, got '3'"),
        ("None", None, TypeError, "must be an int, got None"),
        ("complex", 3j, TypeError, "must be an int, got 3j"),
        ("fraction", Fraction(3), TypeError, "must be an int, got"),
        ("float array", np.array(3.0), TypeError, "must be an int, got"),
        ("array", np.array([3]), TypeError, "must be an int, got"),
    ):
        change = put("step_options", "step", value=value)
        yield Row(f"step {id}", "adam_step", change, error, f"step {message}")
    yield Row("no step", "adam_step", drop("step_options", "step"), TypeError, ".*argument: 'step'")
    no_maximum = put("arrays", "max_exp_avg_sq", value=None)
    yield Row("no maximum", "adam_step", no_maximum, ValueError, "amsgrad needs max_exp_avg_sq")
    no_average = put("arrays", "ema", value=None)
    yield Row("no average", "adam_step", no_average, ValueError, "ema_decay needs ema")
    places = (("step", "call_options"), ("step()", "call_options"), ("adam_step", "step_options"))
    for value in (1, 0, None, "True", np.True_, np.array(True)):
        message = "zero_grad must be True or False, got "
        for call, attribute in places:
            change = put(attribute, "zero_grad", value=value)
            yield Row(f"zero_grad={written(value)}", call, change, TypeError, message)
    for role in ROLES[:4]:
        change = drop("arrays", role)
        yield Row(f"no {role}", "adam_step", change, TypeError, f".*argument: '{role}'")
