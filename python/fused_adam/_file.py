"""Checkpoints on disk: one file in the safetensors format, checked to the last bit.

The format is a JSON header and the bytes of the arrays, so that other tools read it, in Python and elsewhere
(https://github.com/huggingface/safetensors). What it lacks are checksums: they are in the metadata of the
header, one of each array, and one of the header itself, computed with zeros in its own place. Arrays follow
each other without gaps and the file ends with the last one, so that every bit counts in one of them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam import _checkpoint, _core
from fused_adam._checkpoint import CheckpointError
from fused_adam._file_header import (
    DAMAGED,
    DTYPES,
    FORMAT,
    NO_CHECKPOINT,
    Header,
    Refusal,
    Tensors,
    as_json,
    entries_of,
    header_bytes,
    header_room,
    read_header,
    refuse,
    require,
    shown,
)
from fused_adam._replace import Writer, open_at_once, replacing

Progress: TypeAlias = Callable[[int, int], object]

_BLOCK: Final = 1 << 20  # bytes that are hashed and written at a time, out of a cache
_REPORTED: Final = 1 << 20  # bytes between two calls of a progress function


def save(
    path: str | os.PathLike[str],
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    progress: Progress | None,
    defaults: Mapping[str, Any],
) -> None:
    live = [core.state(i) for i in range(len(core))]
    tensors = {"step": np.array([entry["step"] for entry in live], np.int64), **_moments(live)}
    saved = _checkpoint.saved_groups(groups, names)
    _core.check_options({**defaults}, "defaults")  # what is saved must load
    metadata = {
        "fused_adam_format": str(FORMAT),
        "fused_adam_version": _core.__version__,
        "numerics": _core.numerics,
        "param_groups": json.dumps([as_json(group, f"param_groups[{i}]") for i, group in enumerate(saved)]),
        "defaults": json.dumps(as_json(defaults, "defaults")),
    }
    # Checksums are known once the arrays are written. Until then, zeros keep their place.
    checksums = dict.fromkeys(tensors, 0)
    header = header_bytes(metadata, tensors, checksums)
    room = header_room(len(core))
    if len(header) > room:
        raise ValueError(
            f"names and options take {len(header)} bytes in the file, more than the {room} it may have. "
            "Nothing was saved. Keep long lists out of opt.param_groups."
        )
    counter = _Counter(tensors, progress)
    with replacing(path) as file, Writer(file, path) as writer:
        writer.write(header)
        for name, array in tensors.items():
            for block in _blocks(array, "readonly"):
                checksums[name] = writer.write_hashed(block.data, checksums[name])
                counter.add(block.nbytes)
        file.seek(0)
        writer.write(header_bytes(metadata, tensors, checksums))


def load(
    path: str | os.PathLike[str],
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    fixed_options: Mapping[str, Any],
    progress: Progress | None,
    defaults: dict[str, Any],
) -> None:
    """Fill a new optimizer. Where this fails, some of its moments have been written already: drop it."""
    path = os.fspath(path)  # a number is no file descriptor of somebody else
    with open(path, "rb", opener=open_at_once) as file:
        try:
            _load(file, core, groups, names, fixed_options, progress, defaults)
        except Refusal as refusal:
            raise CheckpointError(f"{path}: {refusal}.") from None


def _load(
    file: BinaryIO,
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    fixed_options: Mapping[str, Any],
    progress: Progress | None,
    defaults: dict[str, Any],
) -> None:
    saved = read_header(file, header_room(len(core)))
    options = _read_groups(saved.groups, groups, names)
    for i, group in enumerate(options):
        group.update(fixed_options)
        _check_options(group, f"param_groups[{i}]")
    new_defaults = {**defaults, **saved.defaults, **fixed_options}
    _check_options(new_defaults, "defaults")

    # Those of the file, whatever the groups of the caller say: the options of the file hold.
    maxima = [i for i in range(len(core)) if f"state.{i}.max_exp_avg_sq" in saved.entries]
    core.make_max_exp_avg_sq(maxima)
    live = [core.state(i) for i in range(len(core))]
    for i in set(range(len(core))).difference(maxima):
        live[i].pop("max_exp_avg_sq", None)
    steps = np.zeros(len(live), np.int64)
    tensors = {"step": steps, **_moments(live)}
    labels = _labels(names, groups)
    _require_layout(file, saved, tensors, live, labels)

    counter = _Counter(tensors, progress)
    for name, array in tensors.items():
        checksum = 0
        for block in _blocks(array, "writeonly"):
            _read_into(file, block)
            checksum = zlib.crc32(block.data, checksum)
            counter.add(block.nbytes)
        if checksum != saved.checksums[name]:
            refuse(f"it is damaged: {_what(name, labels)} has another checksum. {DAMAGED}")
    for label, step in zip(labels, steps.tolist(), strict=True):
        require(0 <= step <= _checkpoint.MAX_STEP, f"the step count of {label} is {step}. {DAMAGED}")
    for index, step in enumerate(steps.tolist()):
        core.set_step(index, step)
    for group, new in zip(groups, options, strict=True):
        group.update(new)
    defaults.update(new_defaults)


def _moments(live: list[_checkpoint.Entry]) -> Tensors:
    """The arrays of all parameters; those of float64 first, so that all are aligned in the file."""
    moments = {
        f"state.{i}.{key}": array
        for i, entry in enumerate(live)
        for key, array in entry.items()
        if key != "step"
    }
    return dict(sorted(moments.items(), key=lambda item: -item[1].itemsize))


def _blocks(array: npt.NDArray[Any], access: str) -> Iterator[npt.NDArray[Any]]:
    """The elements in C order, some at a time: views, or a buffer where the array is in Fortran order."""
    flags = ["external_loop", "buffered", "zerosize_ok"]
    little_endian = array.dtype.newbyteorder("<")  # as in the file, on any machine
    with np.nditer(  # type: ignore[call-overload]  # "contig" is missing from the stubs
        array,
        flags,
        [[access, "contig"]],  # without it, a long axis comes as a strided view
        [little_endian],
        order="C",
        casting="equiv",
        buffersize=_BLOCK // array.itemsize,
    ) as blocks:
        yield from blocks


def _read_into(file: BinaryIO, block: npt.NDArray[Any]) -> None:
    try:
        count = file.readinto(block.data)  # type: ignore[attr-defined]
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None
    require(count == block.nbytes, f"it was cut off while it was read. {DAMAGED}")


class _Counter:
    """Tells a function of the caller how many bytes are done, of how many."""

    def __init__(self, tensors: Tensors, progress: Progress | None) -> None:
        self._progress = progress
        self._total = sum(array.nbytes for array in tensors.values())
        self._done = 0
        self._reported = 0

    def add(self, count: int) -> None:
        self._done += count
        is_due = self._done - self._reported >= _REPORTED or self._done == self._total
        if self._progress is not None and is_due:
            self._reported = self._done
            self._progress(self._done, self._total)


# --- What the file has to have for these parameters --------------------------------------------------


def _labels(names: _checkpoint.Names, groups: list[dict[str, Any]]) -> list[str]:
    """How messages call the parameters: by the names that the user knows, where there are any."""
    labels = []
    for i, (group_names, group) in enumerate(zip(names, groups, strict=True)):
        for k in range(len(group["params"])):
            label = f"parameter {k}" if group_names is None else f"parameter {group_names[k]!r}"
            labels.append(label + (f" of param_groups[{i}]" if len(groups) > 1 else ""))
    return labels


def _what(tensor: str, labels: list[str]) -> str:
    if tensor == "step":
        return "the array of step counts"
    _, index, moment = tensor.split(".")
    return f"{moment} of {labels[int(index)]}"


def _read_groups(
    saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]], names: _checkpoint.Names
) -> list[dict[str, Any]]:
    """The options of each group, after the comparison of groups, their sizes and names."""
    found, count = len(saved_groups), len(groups)
    require(
        found == count,
        f"it has {found} parameter group{'s' * (found != 1)}, but params has {count}. Pass the params as the "
        'saved optimizer had them: for several groups, a list with a dict {"params": ...} for each',
    )
    all_options = []
    first = 0
    for i, (saved, group, group_names) in enumerate(zip(saved_groups, groups, names, strict=True)):
        size = len(group["params"])
        ids, saved_names = saved.get("params"), saved.get("param_names")
        if not (isinstance(ids, list) and isinstance(saved_names, (list, type(None)))):
            refuse(NO_CHECKPOINT)
        here = f" in param_groups[{i}]" if count > 1 else ""
        if group_names is not None and saved_names is not None:
            _require_names(saved_names, group_names, here)
        require(
            len(ids) == size,
            f"it has {len(ids)} parameters{here}, but params has {size} there: it is of another model",
        )
        if json.dumps(ids) != json.dumps(list(range(first, first + size))):
            refuse(NO_CHECKPOINT)
        first += size
        not_options = {"params", "param_names", *_checkpoint.TORCH_FLAGS}
        options = {key: value for key, value in saved.items() if key not in not_options}
        all_options.append({**group, **options})
    return all_options


def _require_names(saved: list[Any], given: list[str], here: str) -> None:
    if saved == given:
        return
    if sorted(map(str, saved)) == sorted(given):
        k = next(k for k, name in enumerate(given) if saved[k] != name)
        refuse(
            f"its parameters have another order{here}: number {k} is {shown(saved[k])} in the file, "
            f"{shown(given[k])} in params. Put the dicts of params in the order that they had",
        )
    problems = []
    for where, but, one, other in (
        ("in the file", "not in params", saved, set(given)),
        ("in params", "not in the file", given, set(map(str, saved))),
    ):
        extra = [shown(name) for name in one if str(name) not in other]
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            problems.append(f"{', '.join(extra[:3])}{more} {where} but {but}")
    refuse(f"its parameters have other names{here}: {'; '.join(problems)}. It is of another model")


def _check_options(options: dict[str, Any], where: str) -> None:
    try:
        _core.check_options(options, where)
    except (TypeError, ValueError) as error:
        refuse(f"it holds options that no optimizer has: {error} {DAMAGED}")


def _require_layout(
    file: BinaryIO, saved: Header, tensors: Tensors, live: list[_checkpoint.Entry], labels: list[str]
) -> None:
    expected = entries_of(tensors)
    dtypes = {name: str(dtype) for dtype, name in DTYPES.items()}
    for i, (entry, label) in enumerate(zip(live, labels, strict=True)):
        found, like = saved.entries.get(f"state.{i}.exp_avg"), entry["exp_avg"]
        if not isinstance(found, dict) or not isinstance(found.get("shape"), list):
            refuse(NO_CHECKPOINT)
        shape, dtype = found["shape"], dtypes.get(str(found.get("dtype")), "an unknown dtype")
        if shape != list(like.shape) or dtype != str(like.dtype):
            refuse(
                f"{label} is {like.dtype} of shape {like.shape}, but {dtype} of shape "
                f"({shown(shape)[1:-1]}{',' * (len(shape) == 1)}) in the file: it is of another model"
            )
    # From here on, only a file that this package has not written differs. As texts, 1 is not 1.0, nor True.
    for name, wanted in expected.items():
        same = json.dumps(saved.entries.get(name), sort_keys=True) == json.dumps(wanted, sort_keys=True)
        require(same and name in saved.checksums, f"its table is wrong at {_what(name, labels)}. {DAMAGED}")
    unknown = sorted((saved.entries.keys() | saved.checksums.keys()) - expected.keys())
    require(not unknown, f"it has arrays that are not Adam's: {shown(unknown[:3])}. {DAMAGED}")
    size = saved.size + sum(array.nbytes for array in tensors.values())
    found_size = os.fstat(file.fileno()).st_size
    problem = "is cut off" if found_size < size else "has something appended"
    require(found_size == size, f"it {problem}: it has {found_size} bytes instead of {size}. {DAMAGED}")
