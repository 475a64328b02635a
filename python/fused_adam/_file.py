"""Checkpoints on disk: one file in the safetensors format, checked to the last bit.

The format is a JSON header and the bytes of the arrays, so that other tools read it, in Python and elsewhere
(https://github.com/huggingface/safetensors). What it lacks are checksums: they are in the metadata of the
header, one of each array, and one of the header itself, computed with zeros in its own place. Arrays follow
each other without gaps and the file ends with the last one, so that every bit counts in one of them.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import compress
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
    checksums_in,
    crc32_template,
    entries_in,
    header_room,
    header_text,
    param_kinds,
    read_header,
    refuse,
    require,
    seal,
    shown,
    table_of,
)
from fused_adam._replace import Writer, open_at_once, replacing
from fused_adam._tables import DEFAULTS, STATE, STREAMS, features

Array: TypeAlias = npt.NDArray[Any]
Progress: TypeAlias = Callable[[int, int], object]

_BLOCK: Final = 1 << 20  # bytes that are copied, hashed and written at a time, out of a cache
_VIEW: Final = 1 << 24  # where they need no copy: bytes that a thread hashes meanwhile
_SMALL: Final = 1 << 14  # bytes up to which arrays share a block: a call of the system costs as much as 4 kB
_REPORTED: Final = 1 << 20  # bytes between two calls of a progress function
_TENSOR: Final = re.compile(r'"state\.([0-9]{1,9})\.([a-z_]+)"')
_IS_NATIVE: Final = sys.byteorder == "little"


def save(
    path: str | os.PathLike[str],
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    progress: Progress | None,
    defaults: Mapping[str, Any],
) -> None:
    state = core.all_state()
    tensors = _tensors(np.array(state["step"], np.int64), state)
    present = [name for name in STATE if any(array is not None for array in state[name])]
    saved = _checkpoint.saved_groups(groups, names)
    _core.check_options({**defaults}, "defaults")  # what is saved must load
    metadata = {
        "fused_adam_format": str(FORMAT),
        "fused_adam_version": _core.__version__,
        "numerics": _core.numerics,
        "requires": json.dumps(features([*groups, defaults], present)),
        "streams": json.dumps({s.name: s.elements_per_entry for s in STREAMS if s.name in present}),
        "params": json.dumps(param_kinds(_params(groups)), separators=(",", ":")),
        "param_groups": json.dumps([_group_as_json(group, i) for i, group in enumerate(saved)]),
        "defaults": json.dumps(as_json(defaults, "defaults")),
    }
    # Checksums are known once the arrays are written. Until then, zeros keep their place.
    table = table_of(tensors)
    crc32 = crc32_template(tensors.names)
    header = header_text(metadata, crc32 % ((0,) * len(tensors.names)), table)
    room = header_room(len(core))
    if len(header) > room:
        raise ValueError(
            f"names and options take {len(header)} bytes in the file, more than the {room} it may have. "
            "Nothing was saved. Keep long lists out of opt.param_groups."
        )
    counter = _Counter(tensors, progress)
    with replacing(path) as file, Writer(file, path) as writer:
        writer.write(header)
        checksums: list[int] = []
        for run in _runs(tensors.arrays):
            write = _write_small if len(run) > 1 else _write_one
            checksums += write(writer, counter, *run)
        file.seek(0)
        writer.write(seal(header_text(metadata, crc32 % tuple(checksums), table)))


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
    new_defaults = {**defaults, **(DEFAULTS if saved.defaults else {}), **saved.defaults, **fixed_options}
    _check_options(new_defaults, "defaults")

    label = partial(_label, names, groups)
    _require_params(saved, param_kinds(_params(groups)), label)
    # Those of the file, whatever the groups of the caller say: the options of the file hold.
    present: list[list[str]] = [[] for _ in range(len(core))]
    for index, name in _TENSOR.findall(saved.crc32):
        if int(index) < len(core) and name in STATE:
            present[int(index)].append(name)
    if saved.streams is not None:
        _require_streams(saved.streams, {name for names_here in present for name in names_here})
    core.make_streams([(i, name) for i, names_here in enumerate(present) for name in names_here])
    for i, names_here in enumerate(present):
        core.reset_state(i, 0, names_here)
    state = core.all_state()
    for name in STATE:
        state[name] = [
            array if name in names_here else None
            for array, names_here in zip(state[name], present, strict=True)
        ]
    steps = np.zeros(len(core), np.int64)
    tensors = _tensors(steps, state)
    _require_layout(file, saved, tensors, label)

    counter = _Counter(tensors, progress)
    checksums: list[int] = []
    for run in _runs(tensors.arrays):
        read = _read_small if len(run) > 1 else _read_one
        checksums += read(file, counter, *run)
    _require_checksums(saved, tensors, checksums, label)
    for index, step in enumerate(steps.tolist()):
        if not 0 <= step <= _checkpoint.MAX_STEP:
            refuse(f"the step count of {label(index)} is {step}. {DAMAGED}")
    for index, step in enumerate(steps.tolist()):
        core.reset_state(index, step, present[index])
    for group, new in zip(groups, options, strict=True):
        group.update(new)
    defaults.update(new_defaults)


def _tensors(steps: npt.NDArray[np.int64], state: dict[str, list[Any]]) -> Tensors:
    """The arrays of all parameters; those of float64 first, so that all are aligned in the file."""
    keys = [key for key in state if key != "step"]
    all_names = [f"state.{i}.{key}" for i in range(len(steps)) for key in keys]
    all_arrays = [array for row in zip(*(state[key] for key in keys), strict=True) for array in row]
    names, arrays = ["step"], [steps]
    for size in sorted({array.itemsize for array in all_arrays if array is not None}, reverse=True):
        is_next = [array is not None and array.itemsize == size for array in all_arrays]
        names += compress(all_names, is_next)
        arrays += compress(all_arrays, is_next)
    return Tensors(names, arrays)


def _params(groups: list[dict[str, Any]]) -> list[Array]:
    return [param for group in groups for param in group["params"]]


def _group_as_json(group: dict[str, Any], i: int) -> dict[str, Any]:
    ours: dict[str, Any] = {key: group[key] for key in ("params", "param_names") if key in group}
    options = {key: value for key, value in group.items() if key not in ours}
    return {**as_json(options, f"param_groups[{i}]"), **ours}  # ours are long, and nobody's to edit


# --- Arrays and bytes: those of the file are little-endian, in C order --------------------------------


def _runs(arrays: list[Array]) -> Iterator[list[Array]]:
    """Neighbours: small arrays of one dtype that fit into one block, or a single array."""
    begin = size = 0
    for k, array in enumerate(arrays):
        weight = max(array.nbytes, 1) if array.nbytes <= _SMALL else _BLOCK
        if size + weight > _BLOCK or array.dtype != arrays[begin].dtype:
            yield arrays[begin:k]
            begin, size = k, 0
        size += weight
    yield arrays[begin:]


def _write_small(writer: Writer, counter: _Counter, *run: Array) -> list[int]:
    parts = [(array if _IS_NATIVE else array.byteswap()).tobytes() for array in run]
    block = b"".join(parts)
    writer.write(block)
    counter.add(len(block))
    return [zlib.crc32(part) for part in parts]


def _write_one(writer: Writer, counter: _Counter, array: Array) -> list[int]:
    checksum = 0
    for block in _blocks(array):
        checksum = writer.write_hashed(block, checksum, counter.add)
    return [checksum]


def _read_small(file: BinaryIO, counter: _Counter, *run: Array) -> list[int]:
    block = np.empty(sum(array.nbytes for array in run), np.uint8)
    _read_into(file, block)
    data, elements = block.data, block.view(run[0].dtype.newbyteorder("<"))
    checksums = []
    end = 0
    for array in run:
        begin, end = end, end + array.size
        checksums.append(zlib.crc32(data[begin * array.itemsize : end * array.itemsize]))
        if begin < end:
            array.flat[:] = elements[begin:end]
    counter.add(block.nbytes)
    return checksums


def _read_one(file: BinaryIO, counter: _Counter, array: Array) -> list[int]:
    checksum = 0
    for block in _elements(array):
        _read_into(file, block)
        checksum = zlib.crc32(block.data, checksum)
        counter.add(block.nbytes)
    return [checksum]


def _blocks(array: Array) -> Iterator[memoryview]:
    """Some elements at a time. Whoever holds a block keeps its memory: no buffer that ends with the loop."""
    little = array.dtype.newbyteorder("<")
    size = _BLOCK
    if array.flags.c_contiguous:
        array = array.reshape(-1)
        size = _VIEW if _IS_NATIVE else _BLOCK
    if array[:1].nbytes > size:
        for part in array:
            yield from _blocks(part)
        return
    count = size // max(array[:1].nbytes, 1)
    for begin in range(0, len(array), count):
        part = np.ascontiguousarray(array[begin : begin + count], little)
        yield part.reshape(-1).view(np.uint8).data


def _elements(array: Array) -> Iterator[Array]:
    """To be filled, some at a time: views, or a buffer of which the elements take over what is in it."""
    with np.nditer(  # type: ignore[call-overload]  # "contig" is missing from the stubs
        array,
        ["external_loop", "buffered", "zerosize_ok"],
        [["writeonly", "contig"]],  # without it, a long axis comes as a strided view
        [array.dtype.newbyteorder("<")],
        order="C",
        casting="equiv",
        buffersize=_BLOCK // array.itemsize,
    ) as elements:
        yield from elements


def _read_into(file: BinaryIO, block: Array) -> None:
    try:
        count = file.readinto(block.data)  # type: ignore[attr-defined]
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None
    require(count == block.nbytes, f"it was cut off while it was read. {DAMAGED}")


class _Counter:
    """Tells a function of the caller how many bytes are done, of how many."""

    def __init__(self, tensors: Tensors, progress: Progress | None) -> None:
        self._progress = progress
        self._total = sum(array.nbytes for array in tensors.arrays)
        self._done = 0
        self._reported = 0

    def add(self, count: int) -> None:
        self._done += count
        is_due = self._done - self._reported >= _REPORTED or self._done == self._total
        if self._progress is not None and is_due:
            self._reported = self._done
            self._progress(self._done, self._total)


# --- What the file has to have for these parameters --------------------------------------------------


def _label(names: _checkpoint.Names, groups: list[dict[str, Any]], index: int) -> str:
    """How messages call a parameter: by the name that the user knows, where there is one."""
    i = 0
    while index >= len(groups[i]["params"]):
        index -= len(groups[i]["params"])
        i += 1
    group_names = names[i]
    label = f"parameter {index}" if group_names is None else f"parameter {group_names[index]!r}"
    return label + (f" of param_groups[{i}]" if len(groups) > 1 else "")


def _what(tensor: str, label: Callable[[int], str]) -> str:
    if tensor == "step":
        return "the array of step counts"
    _, index, moment = tensor.split(".")
    return f"{moment} of {label(int(index))}"


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
        if ids != list(range(first, first + size)) or not all(type(id) is int for id in ids):
            refuse(NO_CHECKPOINT)
        first += size
        not_options = {"params", "param_names", *_checkpoint.TORCH_FLAGS}
        options = {key: value for key, value in saved.items() if key not in not_options}
        all_options.append({**group, **DEFAULTS, **options})
    return all_options


def _require_names(saved: list[Any], given: list[str], here: str) -> None:
    if saved == given:
        return
    twice = _checkpoint.repeated(saved)
    if twice is not None:
        refuse(
            f"it has two parameters named {shown(twice)}{here}, as an earlier version of fused-adam named "
            "them, so that nobody knows which is which. Load it for a list of the arrays in the order that "
            "they had: then their order decides",
        )
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


def _require_params(saved: Header, params: list[list[Any]], label: Callable[[int], str]) -> None:
    found = saved.params if saved.params is not None else _params_of_format_1(saved, len(params))
    require(len(found) == len(params), NO_CHECKPOINT)
    for i, (was, here) in enumerate(zip(found, params, strict=True)):
        if was == here:
            continue
        is_kind = isinstance(was, list) and len(was) == 2 and isinstance(was[1], list)
        require(is_kind, NO_CHECKPOINT)
        here_shape, shape = (f"({shown(s)[1:-1]}{',' * (len(s) == 1)})" for s in (here[1], was[1]))
        refuse(
            f"{label(i)} is {here[0]} of shape {here_shape}, but {was[0]!s:.40} of shape {shape} in the "
            "file: it is of another model"
        )


def _require_streams(found: dict[str, Any], present: set[str]) -> None:
    expected = {s.name: s.elements_per_entry for s in STREAMS if s.name in present}
    for name, per_entry in expected.items():
        require(found.get(name) == per_entry, f"its {name} is stored in another way, or {NO_CHECKPOINT}")
    require(found == expected, NO_CHECKPOINT)


def _params_of_format_1(saved: Header, count: int) -> list[Any]:
    """It did not say what the parameters were; their moments were the same."""
    entries = entries_in(saved.table)
    dtypes = {name: str(dtype) for dtype, name in DTYPES.items()}
    found: list[Any] = [entries.get(f"state.{i}.exp_avg") for i in range(count)]
    require(all(isinstance(entry, dict) for entry in found), NO_CHECKPOINT)
    return [[dtypes.get(str(entry.get("dtype")), "an unknown dtype"), entry.get("shape")] for entry in found]


def _require_layout(file: BinaryIO, saved: Header, tensors: Tensors, label: Callable[[int], str]) -> None:
    if saved.table != table_of(tensors):
        _require_entries(saved, tensors, label)
    size = saved.size + sum(array.nbytes for array in tensors.arrays)
    found_size = os.fstat(file.fileno()).st_size
    problem = "is cut off" if found_size < size else "has something appended"
    require(found_size == size, f"it {problem}: it has {found_size} bytes instead of {size}. {DAMAGED}")


def _require_checksums(
    saved: Header, tensors: Tensors, found: list[int], label: Callable[[int], str]
) -> None:
    if saved.crc32 == crc32_template(tensors.names) % tuple(found):
        return
    _require_entries(saved, tensors, label)
    checksums = checksums_in(saved.crc32)
    for name, checksum in zip(tensors.names, found, strict=True):
        if checksum != checksums[name]:
            refuse(f"it is damaged: {_what(name, label)} has another checksum. {DAMAGED}")


def _require_entries(saved: Header, tensors: Tensors, label: Callable[[int], str]) -> None:
    expected, entries = entries_in(table_of(tensors)), entries_in(saved.table)
    checksums = checksums_in(saved.crc32)
    # Only a file that this package has not written differs. As texts, 1 is not 1.0, nor True.
    for name, wanted in expected.items():
        same = json.dumps(entries.get(name), sort_keys=True) == json.dumps(wanted, sort_keys=True)
        require(same and name in checksums, f"its table is wrong at {_what(name, label)}. {DAMAGED}")
    unknown = sorted((entries.keys() | checksums.keys()) - expected.keys())
    require(not unknown, f"it has arrays that are not Adam's: {shown(unknown[:3])}. {DAMAGED}")
