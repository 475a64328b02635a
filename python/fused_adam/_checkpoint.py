"""Checkpoints in PyTorch's layout: written, and read with every check before the first change."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam import _config, _core
from fused_adam._tables import (
    DEFAULTS,
    LR_SCHEDULE,
    NUMBERS,
    STATE,
    STREAMS,
    features,
    unknown_features,
    used,
)

# How torch.optim.Adam computes, not what: written for it, so that it goes on fused, and dropped when read.
TORCH_FLAGS = {"foreach": None, "capturable": False, "differentiable": False, "fused": True}
# What a saved group holds besides its options.
NOT_OPTIONS = frozenset({"params", "param_names", *TORCH_FLAGS})
MAX_STEP = 2**62  # of an int64, which leaves as many steps to go
_MAX_FLOAT_STEP = 2**53  # beyond it, a count that went through a float is no longer exact

Names = list[list[str] | None]  # for each group: the names of its parameters, if it has any; all different
# A dict of layouts for each kind of parameter, and the kind of each: _core.Optimizer.kinds().
Kinds: TypeAlias = tuple[list[dict[str, tuple[str, tuple[int, ...], Literal["C", "F"]]]], list[int]]
Entry = dict[str, Any]  # {"step": int, "exp_avg": array, ...}


class CheckpointError(ValueError):
    """A checkpoint file that is damaged, not of these parameters, or of a newer version."""


def state_dict(core: _core.Optimizer, groups: list[dict[str, Any]], names: Names) -> dict[str, Any]:
    # How it is stored is nothing to whom it is given: it is in full precision.
    stored_anyhow = [{**group, "state_dtype": None} for group in groups]
    param_groups = saved_groups(stored_anyhow, names, rates_of(groups, core.steps))
    core.make_wanted_streams(groups)  # those of options that were switched on, and not stepped since
    state = dict(enumerate(copy_state(core)))
    saved: dict[str, Any] = {"state": state, "param_groups": param_groups}
    if core.steps != most_steps(entry["step"] for entry in state.values()):
        saved["steps"] = core.steps
    required = features(stored_anyhow, {name for entry in state.values() for name in entry})
    return {**saved, "requires": required} if required else saved


def rates_of(groups: list[dict[str, Any]], steps: int, *more: str) -> list[float]:
    """The rate of each in the next step. All options are checked, as edited: what is saved must load.

    more: what messages call those behind the groups of parameters.
    """
    where = [f"param_groups[{i}]" for i in range(len(groups) - len(more))]
    return _core.learning_rates(groups, [*where, *more], steps)


def saved_groups(groups: list[dict[str, Any]], names: Names, rates: list[float]) -> list[dict[str, Any]]:
    """The groups with indices and names for arrays."""
    all_saved = []
    first = 0
    for group, group_names, rate in zip(groups, names, rates, strict=True):
        # Of their own, as the arrays: what the groups hold may be edited.
        options = {
            k: list(v) if type(v) is list else v if _is_list(v) else plain(v)
            for k, v in with_plain_lr(group, rate).items()
        }
        saved = {**TORCH_FLAGS, **used(options), "params": list(range(first, first + len(group["params"])))}
        if group_names is not None:
            saved["param_names"] = group_names
        all_saved.append(saved)
        first += len(group["params"])
    return all_saved


def with_plain_lr(options: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """The options, with the rate of the next step in the place of a function, and how that is written."""
    lr = options["lr"]
    if not callable(lr):
        return {**options}
    try:
        written = re.sub(r" at 0x[0-9a-fA-F]+", "", ascii(lr))  # not where it lay in memory
    except Exception:
        written = type(lr).__qualname__
    return {**options, "lr": rate, LR_SCHEDULE: " ".join(written.split())[:200]}


def taken_over(
    options: Mapping[str, Any],
    saved: Mapping[str, Any],
    required: Collection[Any],
    keep_lr: bool,
    fixed_options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the options become where those of a saved group are taken over, and what that is to have.

    A function for the rate stays. LookupError where the saved group had one, and these options have none.
    """
    found = {key: plain(value) for key, value in saved.items() if key not in NOT_OPTIONS}
    kept = {"lr": options["lr"]} if keep_lr or callable(options["lr"]) else {}
    # Without the requirement it is a key of somebody else's.
    schedule = found.pop(LR_SCHEDULE, None) if LR_SCHEDULE in required else None
    if schedule is not None and not kept:
        written = f"{schedule!s:.200}"
        raise LookupError(f"was saved with a schedule as lr, {written}, which is code and in no checkpoint")
    return {**options, **DEFAULTS, **found, **kept, **fixed_options}


def check_read(options: dict[str, Any], where: str) -> None:
    """As a step would check them, but for a function that this optimizer had before."""
    _core.check_options(options, where, None)


def stored_state(core: _core.Optimizer) -> list[Entry]:
    """Copies of the state of each parameter, as it is stored."""
    columns = core.all_state()
    return [
        {name: np.array(value) for name, value in zip(columns, row, strict=True) if value is not None}
        for row in zip(*columns.values(), strict=True)
    ]


def copy_state(core: _core.Optimizer) -> list[Entry]:
    """The state of each parameter in full precision, as arrays of its own."""
    live = map(core.state, range(len(core)))
    return [
        {name: np.array(value, np.int64 if name == "step" else None) for name, value in entry.items()}
        for entry in live
    ]


def most_steps(counts: Iterable[Any]) -> int:
    """How many steps were made, by the counts of the parameters: more, if never all took part."""
    return max((int(count) for count in counts), default=0)


def restore_state(
    core: _core.Optimizer,
    all_kinds: Kinds,
    entries: list[Entry],
    new_options: Iterable[tuple[dict[str, Any], dict[str, Any]]],
    steps: int | None,
) -> None:
    """Write checked entries into the optimizer; what an entry does not have is as at the beginning.

    Their arrays are as stored, or in full precision.

    all_kinds: ``core.kinds()``. new_options: groups, and what to update them by. steps: made so far; None
    where it was not saved.
    """
    kinds, of_param = all_kinds
    arrays = {
        name: [
            np.asarray(entry[name], order=kinds[kind][name][2]) if name in entry else None
            for entry, kind in zip(entries, of_param, strict=True)
        ]
        for name in STATE
    }
    counts = [int(entry["step"]) for entry in entries]
    core.set_state(counts, arrays, list(new_options), most_steps(counts) if steps is None else steps)


def load_state_dict(
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: Names,
    checkpoint: Mapping[str, Any],
    keep_lr: bool,
    fixed_options: Mapping[str, Any],
) -> None:
    _require(isinstance(checkpoint, Mapping), "state_dict must be a dict", TypeError)
    for key in ("state", "param_groups"):
        _require(key in checkpoint, f"state_dict has no key {key!r}")
    required = checkpoint.get("requires", [])
    _require(_is_list(required), "state_dict['requires'] must be a list", TypeError)
    unknown = unknown_features(required)
    _require(
        not unknown,
        f"state_dict needs {unknown}, which fused-adam {_core.__version__} does not know. Upgrade it",
    )
    groups_read, saved_state = checkpoint["param_groups"], checkpoint["state"]
    _require(_is_list(groups_read), "state_dict['param_groups'] must be a list", TypeError)
    _require(isinstance(saved_state, Mapping), "state_dict['state'] must be a dict", TypeError)
    _require(
        len(groups_read) == len(groups),
        f"state_dict has {len(groups_read)} param groups, the optimizer has {len(groups)} (what no_decay "
        "names is a group)",
    )

    steps = None if "steps" not in checkpoint else _read_step(checkpoint["steps"], "state_dict['steps']")
    ids: list[Any] = []
    new_options: list[dict[str, Any]] = []
    for i, (saved, group) in enumerate(zip(groups_read, groups, strict=True)):
        where = f"state_dict['param_groups'][{i}]"
        ids += _read_ids(saved, len(group["params"]), names[i], where)
        try:
            fixed = {**fixed_options, "state_dtype": core.state_dtypes[i]}
            new_options.append(taken_over(group, saved, required, keep_lr, fixed))
        except LookupError as problem:
            _require(False, f"{where} {problem.args[0]}. Give this optimizer one, or pass keep_lr=True")
        check_read(new_options[i], where)
    _require(len(set(ids)) == len(ids), "state_dict['param_groups'] lists a parameter twice")
    known = set(ids)
    unknown = [key for key in saved_state if key not in known]
    _require(not unknown, f"state_dict['state'] has entries of no group: {unknown}")

    wanted = [
        [name for name in _core.streams_of(o) if name in NUMBERS]
        for o, group in zip(new_options, groups, strict=True)
        for _ in group["params"]
    ]
    kinds, of_param = all_kinds = core.kinds()
    entries = [
        _read_entry(saved_state[key], f"state_dict['state'][{key!r}]", kinds[kind], wanted_here)
        if key in saved_state
        else {"step": 0}
        for key, kind, wanted_here in zip(ids, of_param, wanted, strict=True)
    ]
    restore_state(core, all_kinds, entries, zip(groups, new_options, strict=True), steps)


def _read_ids(saved: Any, count: int, names: list[str] | None, where: str) -> list[Any]:
    _require(isinstance(saved, Mapping), f"{where} must be a dict", TypeError)
    _require("params" in saved, f"{where} has no key 'params'")
    ids = saved["params"]
    _require(_is_list(ids) and _all_hashable(ids), f"{where}['params'] must be a list of indices", TypeError)
    _require(len(ids) == count, f"{where} has {len(ids)} parameters, the optimizer has {count} there")
    saved_names = saved.get("param_names")
    if names is not None and saved_names is not None:
        _require(_is_list(saved_names), f"{where}['param_names'] must be a list", TypeError)
        _require(len(saved_names) == count, f"{where} has {len(saved_names)} names for {count} parameters")
        twice = repeated(saved_names)
        _require(
            twice is None,
            f"{where}['param_names'] has {twice!r} twice, so that nobody knows which is which. Where their "
            "order is that of here, remove 'param_names'",
        )
        for index, (found, name) in enumerate(zip(saved_names, names, strict=True)):
            _require(found == name, f"{where}: its parameter {index} is named {found!r}, here it is {name!r}")
    return list(ids)


def _read_entry(
    saved: Any, where: str, layouts: Mapping[str, tuple[str, tuple[int, ...], str]], wanted: list[str]
) -> Entry:
    _require(isinstance(saved, Mapping), f"{where} must be a dict", TypeError)
    if not saved:  # PyTorch's, of a parameter that never had a gradient
        return {"step": 0}
    unknown = [key for key in saved if key not in ("step", *NUMBERS)]
    _require(not unknown, f"{where} has {unknown}, which is not Adam's")
    begins_later = {stream.name for stream in STREAMS if stream.copy_of_param}
    for name in ("step", *wanted):
        _require(name in saved or name in begins_later, f"{where} has no {name!r}")
    entry: Entry = {"step": _read_step(saved["step"], f"{where}['step']")}
    # What only parameters of 16 bits have is nothing to others.
    stored = layouts["param"][0]
    dtype, shape, _ = layouts["grad"]  # as buffers of gradients, whatever it becomes here
    unused = {stream.name for stream in STREAMS if stream.coded_only and stored == dtype}
    for name in NUMBERS:
        if name in saved and name not in unused:
            # PyTorch's are stored as the parameter is.
            entry[name] = _read_array(saved[name], f"{where}[{name!r}]", dtype, shape, stored)
    return entry


def _read_step(value: Any, where: str) -> int:
    value = plain(value)
    _require(_config.is_number(value), f"{where} must be a number, got {value!r}", TypeError)
    limit = MAX_STEP if isinstance(value, (int, np.integer)) else _MAX_FLOAT_STEP
    is_count = 0 <= value <= limit and value == int(value)
    more = f", more than {limit}" if value > limit else ""
    _require(is_count, f"{where} must be a whole number >= 0, got {value!r}{more}")
    return int(value)


def _read_array(
    value: Any, where: str, dtype: str, shape: tuple[int, ...], narrower: str
) -> npt.NDArray[Any]:
    array = value
    if hasattr(value, "detach"):  # a tensor
        tensor = value.detach().cpu()
        if dtype != narrower and str(tensor.dtype) == f"torch.{narrower}":
            tensor = tensor.float()  # exact; and bfloat16 is none of NumPy's own
        try:
            array = tensor.numpy()
        except TypeError:
            _require(False, f"{where} has dtype {value.dtype}, which NumPy has not", TypeError)
    elif not isinstance(value, np.ndarray) and hasattr(value, "__array__"):
        array = np.asarray(value)
    is_array = isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray)
    _require(is_array, f"{where} must be an array, got {type(value).__name__}", TypeError)
    if dtype != narrower and str(array.dtype) == narrower:
        array = array.astype(dtype)
    _require(array.dtype == dtype, f"{where} has dtype {array.dtype}, expected {dtype}", TypeError)
    _require(array.shape == shape, f"{where} has shape {array.shape}, expected {shape}")
    # A view may be of our own moments, from opt.state, and be overwritten before it is read.
    return np.asarray(array) if array.flags.owndata else np.array(array)


def plain(value: Any) -> Any:
    """Numbers out of tensors and arrays of shape (), also inside a pair."""
    if _is_list(value):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    is_scalar = hasattr(value, "item") and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else value


def repeated(names: Iterable[Any]) -> str | None:
    """The first name that another parameter has too, as up to format 1 of the files was possible."""
    seen: set[str] = set()
    for name in names:
        if isinstance(name, str) and name in seen:
            return name
        seen.update([name] if isinstance(name, str) else [])
    return None


def _all_hashable(values: Iterable[Any]) -> bool:
    try:
        set(values)
    except TypeError:
        return False
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _require(condition: bool, problem: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"{problem}. Nothing was loaded.")
