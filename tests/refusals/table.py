"""What a row is, the calls that it may be about, and what it may do to the world."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fused_adam import Adam, AdamW, adam_step
from refusals.world import World

NAN, INF = float("nan"), float("inf")
SWAPPED = ">" if sys.byteorder == "little" else "<"

Change = Callable[[World], Any]


class Row(NamedTuple):
    id: str  # unique among the rows of a call
    call: str  # a key of CALLS
    change: Change  # what is broken before
    error: type[BaseException]
    message: str  # a regex, of its beginning


CALLS: dict[str, Change] = {
    "Adam": lambda w: Adam(w.new_params, **w.new_options),
    "AdamW": lambda w: AdamW(w.new_params, **w.new_options),
    "step": lambda w: w.opt.step(w.grads, **w.call_options),
    "step()": lambda w: w.opt.step(**w.call_options),
    "lone step": lambda w: w.lone_opt.step(w.lone_grad),
    "zero_grad": lambda w: w.opt.zero_grad(),
    "grads": lambda w: w.opt.grads,
    "add_param_group": lambda w: w.opt.add_param_group(w.group),
    "set lr": lambda w: setattr(w.opt, "lr", w.lr),
    "get lr": lambda w: w.opt.lr,
    "state_dict": lambda w: w.opt.state_dict(),
    "load_state_dict": lambda w: w.opt.load_state_dict(w.state_dict),
    "save": lambda w: w.opt.save(w.path, **w.save_options),
    "load": lambda w: AdamW.load(w.load_path, w.loaded_params, **w.load_options),
    "adam_step": lambda w: adam_step(**w.arrays, **w.step_options),
}


def put(attribute: str, *path: Any, value: Any = None, make: Callable[[Any], Any] | None = None) -> Change:
    """Replaces something in the world, by a value or by what `make` makes of it."""

    def inside(thing: Any) -> Any:
        return thing if isinstance(thing, (dict, list)) else vars(thing)

    def change(world: World) -> None:
        container = inside(world)
        *keys, last = attribute, *path
        for key in keys:
            container = inside(container[key])
        container[last] = make(container[last]) if make else value

    return change


def set_grads(grads: Any) -> Change:
    return lambda world: setattr(world.opt, "grads", grads)


def drop(attribute: str, *path: Any) -> Change:
    def change(world: World) -> None:
        container = getattr(world, attribute)
        for key in path[:-1]:
            container = container[key] if isinstance(container, (dict, list)) else getattr(container, key)
        del container[path[-1]]

    return change


def group_of(world: World, index: int) -> Any:
    return world.opt.param_groups[index]


def edit(index: int, key: str, value: Any) -> Change:
    return lambda world: group_of(world, index).update({key: value})


def written(value: Any) -> str:
    """Like repr, which has another form for scalars of NumPy since 2.0."""
    return f"{type(value).__name__}({value})" if isinstance(value, np.generic) else repr(value)
