"""What is written out by hand says what the tables of the core say: signatures, docstrings, state, files."""

from __future__ import annotations

import inspect
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cases import ALL_STREAMS, DEFAULTS, OPTION_TABLE, STREAMS
from fused_adam import Adam, AdamW, _core, adam_step
from fused_adam._tables import LATER
from snapshots import random_like

POSITIONAL = ("lr", "betas", "eps", "weight_decay")  # as in torch.optim
# With every stream that there is.
EVERYTHING: dict[str, Any] = {"amsgrad": True, "ema_decay": 0.5, "master_weights": True}


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: parameter for name, parameter in parameters.items() if name in DEFAULTS}


# What each of them does not have, and what has another default there.
FUNCTIONS: dict[str, tuple[Callable[..., Any], set[str], dict[str, Any]]] = {
    "Adam": (Adam, set(), {}),
    "AdamW": (AdamW, {"decoupled_weight_decay"}, {"weight_decay": 1e-2}),
    "adam_step": (adam_step, set(), {}),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
def test_options_of_signatures(name: str) -> None:
    function, without, other_defaults = FUNCTIONS[name]
    found = options_of(function)
    expected = {key: value for key, value in {**DEFAULTS, **other_defaults}.items() if key not in without}
    defaults = {key: parameter.default for key, parameter in found.items()}
    assert defaults == expected
    assert {key: type(value) for key, value in defaults.items()} == {k: type(v) for k, v in expected.items()}
    keyword_only = {key for key, parameter in found.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert keyword_only == set(found) - (set() if name == "adam_step" else set(POSITIONAL))
    assert list(found) == [option.name for option in OPTION_TABLE if option.name in found]


@functions
def test_all_arguments_of_signatures(name: str) -> None:
    """Nothing that is in no table, but for these."""
    arrays = [stream.name for stream in ALL_STREAMS]
    others = [*arrays, "step", "grad_scale", "zero_grad"] if name == "adam_step" else ["params", "no_decay"]
    others.append("allow_mixed")
    found = set(inspect.signature(FUNCTIONS[name][0]).parameters)
    assert found - set(DEFAULTS) == {*others, "num_threads"}


@functions
def test_docstrings_name_every_argument(name: str) -> None:
    function = FUNCTIONS[name][0]
    _, _, section = inspect.getdoc(function).partition("Parameters\n----------\n")
    section = re.split(r"\n\w+\n-+\n", section)[0]
    named = re.findall(r"^(\S.*?)(?: :.*)?$", section, re.MULTILINE)
    documented = [argument for line in named for argument in line.split(", ")]
    assert sorted(documented) == sorted(inspect.signature(function).parameters)


@functions
def test_docstrings_say_the_default(name: str) -> None:
    function, _, others = FUNCTIONS[name]
    doc = inspect.getdoc(function)
    said = dict(re.findall(r"^(\w+) : .*, default (.*)$", doc, re.MULTILINE))
    for key in said.keys() & DEFAULTS.keys():
        written = said[key]
        assert eval(written, {}) == {**DEFAULTS, **others}[key], key
    assert name != "Adam" or len(said) >= 7


def test_positional_options_of_our_classes_are_alike() -> None:
    orders = [
        [name for name, p in inspect.signature(cls).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for cls in (Adam, AdamW)
    ]
    assert orders == [["params", *POSITIONAL]] * 2


def test_options_of_groups_are_those_of_the_table() -> None:
    for cls in (Adam, AdamW):
        opt = cls(np.ones(2))
        assert set(opt.defaults) == set(DEFAULTS)
        assert set(opt.param_groups[0]) == {"params", *DEFAULTS}


def test_streams_have_the_names_of_arguments_and_of_options() -> None:
    parameters = inspect.signature(adam_step).parameters
    for stream in ALL_STREAMS:
        parameter = parameters[stream.name]
        if stream.option is None:
            assert parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        else:
            assert parameter.default is None and parameter.kind is parameter.KEYWORD_ONLY
            assert stream.option in DEFAULTS
    assert {stream.option for stream in STREAMS} - {None} == set(EVERYTHING)
    assert {stream.option for stream in set(ALL_STREAMS) - set(STREAMS)} == {"state_dtype"}
    assert [stream.name for stream in ALL_STREAMS if not stream.ours] == ["param", "grad"]


def test_streams_that_options_ask_for() -> None:
    always = [stream.name for stream in STREAMS if stream.ours and stream.option is None]
    assert _core.streams_of(DEFAULTS) == always
    for key, value in {**EVERYTHING, "state_dtype": "float8"}.items():
        asked = [s.name for s in ALL_STREAMS if s.option == key]
        assert _core.streams_of({**DEFAULTS, key: value}) == [*always, *asked]


def test_state_and_checkpoints_have_the_streams_of_the_table(tmp_path: pathlib.Path) -> None:
    params = {"w": np.ones(3, np.float32), "b": np.ones((2, 2))}
    opt = Adam(params, **EVERYTHING)
    opt.step(random_like(params, 1))
    there = [stream.name for stream in STREAMS if stream.ours and not stream.coded_only]
    for index in (0, 1):
        assert tuple(opt.state[index]) == ("step", *there)
    saved = opt.state_dict()
    assert all(tuple(entry) == ("step", *there) for entry in saved["state"].values())
    used = {name for name in LATER if name in EVERYTHING}
    assert set(saved["requires"]) == {*used, *(s.name for s in STREAMS if s.format > 1 and not s.coded_only)}
    path = tmp_path / "a"
    opt.save(path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.pop("__metadata__")
    expected = {f"state.{index}.{name}" for index in (0, 1) for name in there}
    assert set(header) == {"step", *expected} == set(json.loads(metadata["crc32"]))
    assert json.loads(metadata["streams"]) == {
        s.name: {"elements_per_entry": s.elements_per_entry} for s in STREAMS if s.name in there
    }
    assert json.loads(metadata["requires"]) == saved["requires"]
    assert json.loads(metadata["params"]) == [["float32", [3]], ["float64", [2, 2]]]


def test_plain_checkpoints_ask_nothing_of_a_reader(tmp_path: pathlib.Path) -> None:
    opt = Adam([np.ones(3)], amsgrad=True)
    assert "requires" not in opt.state_dict()
    assert not set(LATER) & set(opt.state_dict()["param_groups"][0])
    opt.save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata["requires"] == "[]"


# --- Where large arrays lie --------------------------------------------------------------------------

SIZE = 100_000  # of float32, large enough for a place of its own in a page


def large(offset: int) -> list[np.ndarray]:
    return [np.ones(5), np.ones(SIZE + 1000, np.float32)[offset : offset + SIZE]]


def at_once(params: list[np.ndarray]) -> Adam:
    return Adam(params, **EVERYTHING)


def switched_on(params: list[np.ndarray]) -> Adam:
    """One after the other, so that each has a block of its own."""
    opt = Adam(params)
    opt.step(random_like(params, 1))
    for key, value in EVERYTHING.items():
        opt.param_groups[0][key] = value
        opt.step(random_like(params, 1))
    return opt


def loaded_state(params: list[np.ndarray]) -> Adam:
    opt = Adam(params)
    opt.load_state_dict(switched_on(large(0)).state_dict())
    return opt


@pytest.mark.parametrize("offset", [0, 1, 500])
@pytest.mark.parametrize("made", ["at once", "switched on", "load_state_dict", "load", "read"])
def test_streams_of_a_large_array_stand_apart_in_their_pages(
    made: str, offset: int, tmp_path: pathlib.Path
) -> None:
    """Else the CPU takes a load for one that has to wait for a store, 4 KiB apart."""
    params = large(offset)
    if made == "load":
        switched_on(large(0)).save(tmp_path / "a")
        opt = Adam.load(tmp_path / "a", params)
    elif made == "read":  # opt.ema makes what was switched on
        opt = Adam(params, amsgrad=True)
        opt.param_groups[0]["ema_decay"] = 0.5
        opt.ema  # noqa: B018
    else:
        opt = {"at once": at_once, "switched on": switched_on, "load_state_dict": loaded_state}[made](params)
    opt.step(random_like(params, 2))
    streams = {"param": params[1], "grad": opt.grads[1], **opt.state[1]}
    del streams["step"]
    assert sorted(streams) == sorted(stream.name for stream in STREAMS if not stream.coded_only)
    places = sorted(array.ctypes.data % 4096 for array in streams.values())
    distances = np.diff([*places, places[0] + 4096])
    assert min(distances) >= 256, distances
    assert all(array.ctypes.data % 64 == 0 for name, array in streams.items() if name != "param")
