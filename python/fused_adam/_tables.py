"""The options that there are and the streams of memory of a parameter, as the core lists them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from fused_adam import _core


class Option(NamedTuple):
    """An option of a parameter group."""

    name: str
    kind: str  # "number", "betas", "flag", "fraction or None", "number or None", "eps mode"
    format: int  # of checkpoint files: the first one that knows it
    default: Any


class Stream(NamedTuple):
    """What belongs to a parameter, the parameter itself and its gradient included."""

    name: str
    ours: bool  # made by the optimizer, and part of its state
    copy_of_param: bool  # it begins as one, with the first step; else as zeros
    elements_per_entry: int
    format: int  # of checkpoint files: the first one that has it
    option: str | None  # the one that asks for it


OPTIONS: Final = tuple(Option(**row) for row in _core.option_table())
STREAMS: Final = tuple(Stream(**row) for row in _core.stream_table())
DEFAULTS: Final[Mapping[str, Any]] = {option.name: option.default for option in OPTIONS}
LATER: Final = tuple(option.name for option in OPTIONS if option.format > 1)  # PyTorch has none of them
STATE: Final = tuple(stream.name for stream in STREAMS if stream.ours)


def options_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a function, its ``locals()``."""
    return {name: arguments[name] for name in DEFAULTS if name in arguments}


def streams_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays among the arguments of a function."""
    return {stream.name: arguments[stream.name] for stream in STREAMS}


def features(groups: Iterable[Mapping[str, Any]], streams: Iterable[str]) -> list[str]:
    """What a reader has to know, other than what every reader of a checkpoint knows: without it, it would
    load another state, or go on with another formula.
    """
    groups = list(groups)
    needed = [name for name in LATER if any(group.get(name) != DEFAULTS[name] for group in groups)]
    present = set(streams)
    return needed + [stream.name for stream in STREAMS if stream.format > 1 and stream.name in present]


def used(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that PyTorch's Adam has not, where they are as if they did not exist."""
    return {k: v for k, v in options.items() if k not in LATER or v != DEFAULTS[k]}


def refuse_slips(group: Mapping[Any, Any], where: str) -> None:
    """ValueError for a key that is nearly the name of an option. Others are somebody's own, and kept."""
    unknown = [key for key in group if isinstance(key, str) and key not in DEFAULTS and key != "params"]
    if not unknown:
        return
    from difflib import get_close_matches  # seldom needed

    for key in unknown:
        for option in get_close_matches(key, [*DEFAULTS, "params"], 1, 0.8):
            if f"{option}_" not in key and f"_{option}" not in key:  # weight_decay_scale is no slip
                raise ValueError(f"{where} has a key {key!r}, which is no option: did you mean {option!r}?")


def unknown_features(required: Iterable[str]) -> list[str]:
    known = [*DEFAULTS, *STATE]
    return [feature for feature in required if feature not in known]
