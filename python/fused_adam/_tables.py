"""The options that there are and the streams of memory of a parameter, as the core lists them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from fused_adam import _core


class Option(NamedTuple):
    """An option of a parameter group."""

    name: str
    # "number", "number or function", "number or None", "betas", "flag", "fraction or None", "eps mode",
    # "state dtype", "seed"
    kind: str
    format: int  # of checkpoint files: the first one that knows it
    default: Any


class Stream(NamedTuple):
    """What belongs to a parameter, the parameter itself and its gradient included."""

    name: str
    ours: bool  # made by the optimizer, and part of its state
    copy_of_param: bool  # it begins as one, with the first step; else as zeros
    coded_only: bool  # only parameters of 16 bits have it
    elements_per_entry: int
    format: int  # of checkpoint files: the first one that has it
    option: str | None  # the one that asks for it


OPTIONS: Final = tuple(Option(**row) for row in _core.option_table())
STREAMS: Final = tuple(Stream(**row) for row in _core.stream_table())
DEFAULTS: Final[Mapping[str, Any]] = {option.name: option.default for option in OPTIONS}
LATER: Final = tuple(option.name for option in OPTIONS if option.format > 1)  # PyTorch has none of them
# In a saved group whose rate was a function: how that was written. It is code, which no checkpoint holds.
LR_SCHEDULE: Final = "lr_schedule"
STATE: Final = tuple(stream.name for stream in STREAMS if stream.ours)
# Without what only says how others are stored: the state in full precision.
NUMBERS: Final = tuple(s.name for s in STREAMS if s.ours and s.elements_per_entry == 1)


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
    needed += [LR_SCHEDULE] if any(callable(group["lr"]) for group in groups) else []
    present = set(streams)
    return needed + [stream.name for stream in STREAMS if stream.format > 1 and stream.name in present]


def used(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that PyTorch's Adam has not, where they are as if they did not exist."""
    return {k: v for k, v in options.items() if k not in LATER or v != DEFAULTS[k]}


# What options are called elsewhere.
_ELSEWHERE: Final[Mapping[str, str]] = {
    **dict.fromkeys(("learning_rate", "learn_rate", "step_size", "alpha"), "lr"),
    **dict.fromkeys((LR_SCHEDULE, "lr_scheduler", "schedule", "scheduler"), "lr"),
    **dict.fromkeys(("beta", "beta1", "beta2", "beta_1", "beta_2", "b1", "b2"), "betas"),
    **dict.fromkeys(("epsilon",), "eps"),
    **dict.fromkeys(("wd", "l2"), "weight_decay"),
    **dict.fromkeys(("no_weight_decay", "nodecay"), "no_decay"),
    **dict.fromkeys(("grad_clip", "clip_norm", "clipnorm", "global_clipnorm", "clip_grad_norm"), "max_norm"),
    **dict.fromkeys(("clipvalue", "clip_grad_value"), "clip_value"),
}


def refuse_slips(group: Mapping[Any, Any], where: str) -> None:
    """ValueError for a key that is nearly the name of an option, or one elsewhere. Others are kept."""
    for key in group:
        if isinstance(key, str) and key not in (*DEFAULTS, "params", "no_decay"):
            option = _meant_by(key)
            if option is not None:
                raise ValueError(
                    f"{where} has a key {key!r}, which is no option: did you mean {option!r}? "
                    "If it is yours, give it another name."
                )


def _meant_by(key: str) -> str | None:
    from difflib import get_close_matches  # seldom needed

    folded = key.lower().strip("_")
    if folded in (*DEFAULTS, "no_decay"):
        return folded
    if folded in _ELSEWHERE:
        return _ELSEWHERE[folded]
    # In fewer letters one is a large part, and weight_decay_scale is no slip.
    known = [name for name in (*DEFAULTS, "params", "no_decay") if len(name) > 3]
    matches = get_close_matches(folded, known, 1, 0.8) if len(folded) > 3 else []
    return next((m for m in matches if f"{m}_" not in folded and f"_{m}" not in folded), None)


def unknown_features(required: Iterable[str]) -> list[str]:
    known = [*DEFAULTS, *STATE, LR_SCHEDULE]
    return [feature for feature in required if feature not in known]
