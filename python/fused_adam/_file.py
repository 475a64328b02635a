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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam import _checkpoint, _core
from fused_adam._checkpoint import CheckpointError, Kinds
from fused_adam._file_header import (
    DAMAGED,
    FORMAT,
    NO_CHECKPOINT,
    Header,
    NewHeader,
    Refusal,
    as_json,
    checksums_in,
    entries_in,
    header_room,
    kinds_in,
    read_header,
    refuse,
    require,
    shown,
)
from fused_adam._file_table import DTYPES, Table, params_text
from fused_adam._replace import Writer, open_at_once, replacing
from fused_adam._tables import LR_SCHEDULE, STATE, STREAMS, features

Array: TypeAlias = npt.NDArray[Any]
Progress: TypeAlias = Callable[[int, int], object]

_BLOCK: Final = 1 << 20  # bytes that are copied, hashed and written at a time, out of a cache
_VIEW: Final = 1 << 24  # where they need no copy: bytes that a thread hashes meanwhile
_SMALL: Final = 1 << 14  # bytes up to which arrays share a block: a call of the system costs as much as 4 kB
_REPORTED: Final = 1 << 20  # bytes between two calls of a progress function
_TENSOR: Final = re.compile(r'"state\.([0-9]{1,9})\.([a-z_]+)"')
_PER_ENTRY: Final = {stream.name: stream.elements_per_entry for stream in STREAMS}
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
    kinds = core.kinds()
    table = Table(kinds, np.array(state.pop("step"), np.int64), state)
    streams = _streams_as_json(table)
    steps = core.steps
    *rates, default_rate = _checkpoint.rates_of([*groups, {**defaults}], steps, "defaults")
    saved = _checkpoint.saved_groups(groups, names, rates)
    # Of a function that no group may have there is the rate: nobody is asked for it when this is loaded.
    plain_defaults = _checkpoint.with_plain_lr(defaults, default_rate)
    if callable(defaults["lr"]):
        del plain_defaults[LR_SCHEDULE]
    metadata = {
        "fused_adam_format": str(FORMAT),
        "fused_adam_version": _core.__version__,
        "numerics": _core.numerics,
        "steps": str(steps),
        "requires": json.dumps(features([*groups, plain_defaults], streams)),
        "streams": json.dumps(streams),
        "params": params_text(kinds),
        "param_groups": json.dumps([_group_as_json(group, i) for i, group in enumerate(saved)]),
        "defaults": json.dumps(as_json(plain_defaults, "defaults")),
    }
    header = NewHeader(metadata, table.checksums(), table.members())
    room = header_room(len(core))
    if header.size > room:
        raise ValueError(
            f"names and options take {header.size} bytes in the file, more than the {room} it may have. "
            "Nothing was saved. Keep long lists out of opt.param_groups."
        )
    counter = _Counter(table, progress)
    with replacing(path) as file, Writer(file, path) as writer:
        file.seek(header.size)  # it comes last: checksums are known once the arrays are written
        checksums: list[int] = []
        for run in table.runs(_SMALL, _BLOCK):
            write = _write_small if len(run) > 1 else _write_one
            checksums += write(writer, counter, *run)
        file.seek(0)
        for piece in header.sealed(checksums):
            writer.write(piece)


def load(
    path: str | os.PathLike[str],
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    fixed_options: Mapping[str, Any],
    progress: Progress | None,
    defaults: dict[str, Any],
    keep_lr: bool,
) -> None:
    """Fill a new optimizer. Where this fails, some of its moments have been written already: drop it."""
    path = os.fsdecode(path)  # a number is no file descriptor of somebody else
    with open(path, "rb", opener=open_at_once) as file:
        try:
            _load(file, core, groups, names, fixed_options, progress, defaults, keep_lr)
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
    keep_lr: bool,
) -> None:
    saved = read_header(file, header_room(len(core)))
    _require_groups(saved.groups, groups, names)

    def taken_over(here: dict[str, Any], read: dict[str, Any], where: str) -> dict[str, Any]:
        try:
            options = _checkpoint.taken_over(here, read, saved.required, keep_lr, fixed_options)
        except LookupError as problem:
            refuse(
                f"its {where} {problem.args[0]}. Pass one for all groups, load(path, params, lr=...), or as "
                '"lr" of that group'
            )
        _check_read(options, where)
        return options

    options = [
        taken_over(group, read, f"param_groups[{i}]")
        for i, (group, read) in enumerate(zip(groups, saved.groups, strict=True))
    ]
    # A file of format 1 may have none: then they stay.
    new_defaults = taken_over(defaults, saved.defaults, "defaults") if saved.defaults else defaults

    label = partial(_label, names, groups)
    try:
        core.store_state_as(options)
    except ValueError as error:
        refuse(f"it is of another model: {error}".removesuffix("."))
    kinds = core.kinds()
    _require_params(saved, kinds, label)
    # Those of the file, whatever the groups of the caller say: the options of the file hold.
    count = len(core)
    found = _present(saved, count)
    present = {name: found[name] for name in STATE if name in found}  # the order that the file has
    _require_scales(present, core.state_dtypes, groups)
    streams: dict[str, Sequence[Array | None]] = {}
    for name, arrays in core.streams(present).items():
        of_param = dict(zip(present[name], arrays, strict=True))
        streams[name] = arrays if len(arrays) == count else [of_param.get(i) for i in range(count)]
    steps = np.zeros(count, np.int64)
    table = Table(kinds, steps, streams)
    _require_layout(file, saved, table, label)

    counter = _Counter(table, progress)
    checksums: list[int] = []
    for run in table.runs(_SMALL, _BLOCK):
        read = _read_small if len(run) > 1 else _read_one
        checksums += read(file, counter, *run)
    _require_checksums(saved, table, checksums, label)
    for index in np.flatnonzero((steps < 0) | (steps > _checkpoint.MAX_STEP))[:1].tolist():
        refuse(f"the step count of {label(index)} is {steps[index]}. {DAMAGED}")
    counts = steps.tolist()
    made = _checkpoint.most_steps(counts) if saved.steps is None else saved.steps
    core.set_state(counts, streams, list(zip(groups, options, strict=True)), made)
    defaults.update(new_defaults)


def _group_as_json(group: dict[str, Any], i: int) -> dict[str, Any]:
    ours: dict[str, Any] = {key: group[key] for key in ("params", "param_names") if key in group}
    options = {key: value for key, value in group.items() if key not in ours}
    return {**as_json(options, f"param_groups[{i}]"), **ours}  # ours are long, and nobody's to edit


def _streams_as_json(table: Table) -> dict[str, Any]:
    """Those that there are: how they are stored, and which parameters have one, where not all have."""
    return {
        name: {"elements_per_entry": _PER_ENTRY[name], **({} if owners is None else {"params": owners})}
        for name, owners in table.owners().items()
    }


def _present(saved: Header, count: int) -> dict[str, list[int]]:
    """The reverse: for each stream the parameters that have it, in order."""
    present: dict[str, list[int]] = {}
    if saved.streams is None:
        for index, name in _TENSOR.findall(saved.crc32):
            if int(index) < count and name in STATE:
                present.setdefault(name, []).append(int(index))
        return {name: sorted(set(indices)) for name, indices in present.items()}
    for name, row in saved.streams.items():
        require(name in STATE and isinstance(row, dict), NO_CHECKPOINT)
        per_entry = row.get("elements_per_entry")
        is_same = type(per_entry) is int and per_entry == _PER_ENTRY[name]
        require(is_same, f"its {name} is stored in another way, or {NO_CHECKPOINT}")
        if "params" in row:
            indices = row["params"]
            require(isinstance(indices, list) and len(indices) < count, NO_CHECKPOINT)
            require(all(type(i) is int and 0 <= i < count for i in indices), NO_CHECKPOINT)
            require(all(i < j for i, j in pairwise(indices)), NO_CHECKPOINT)
            present[name] = indices
        else:
            present[name] = list(range(count))
    return present


def _require_scales(
    present: Mapping[str, list[int]], state_dtypes: list[str | None], groups: list[dict[str, Any]]
) -> None:
    """Moments in blocks are nothing without the exponents of these, nor these without them."""
    of_param = [kind for kind, group in zip(state_dtypes, groups, strict=True) for _ in group["params"]]
    in_blocks = {i for i, kind in enumerate(of_param) if kind == "float8"}
    for name in present:
        if f"{name}_scale" in _PER_ENTRY:
            wanted = in_blocks & set(present[name])
            require(set(present.get(f"{name}_scale", ())) == wanted, f"its {name} has no scales. {DAMAGED}")
        elif name.endswith("_scale"):
            require(name.removesuffix("_scale") in present, f"its {name} is of no moments. {DAMAGED}")


# --- Arrays and bytes: those of the file are little-endian, in C order --------------------------------


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
    ends = list(accumulate([array.nbytes for array in run], initial=0))
    block = np.empty(ends[-1], np.uint8)
    _read_into(file, block)
    data = block.data
    checksums = [zlib.crc32(data[begin:end]) for begin, end in pairwise(ends)]
    elements = block.view(run[0].dtype.newbyteorder("<"))
    if not (_IS_NATIVE and _core.scatter(elements, run)):
        end = 0
        for array in run:
            begin, end = end, end + array.size
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

    def __init__(self, table: Table, progress: Progress | None) -> None:
        self._progress = progress
        self._total = int(table.sizes.sum())
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


def _require_groups(
    saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]], names: _checkpoint.Names
) -> None:
    """As many, of these sizes, with these names."""
    found, count = len(saved_groups), len(groups)
    require(
        found == count,
        f"it has {found} parameter group{'s' * (found != 1)}, but params has {count}. Pass the params as the "
        'saved optimizer had them: for several groups, a list with a dict {"params": ...} for each, and its '
        "no_decay, which makes groups, too",
    )
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


def _check_read(options: dict[str, Any], where: str) -> None:
    try:
        _checkpoint.check_read(options, where)
    except (TypeError, ValueError) as error:
        refuse(f"it holds options that no optimizer has: {error} {DAMAGED}")


def _require_params(saved: Header, kinds: Kinds, label: Callable[[int], str]) -> None:
    expected = params_text(kinds)
    if saved.params == expected:
        return
    params = json.loads(expected)
    found = _params_of_format_1(saved, len(params)) if saved.params is None else kinds_in(saved.params)
    require(len(found) == len(params), NO_CHECKPOINT)
    for i, (was, here) in enumerate(zip(found, params, strict=True)):
        if was == here:
            continue
        is_kind = isinstance(was, list) and len(was) in (2, 3) and isinstance(was[1], list)
        require(is_kind, NO_CHECKPOINT)
        if was[:2] == here[:2]:
            orders = [("C order", "Fortran order")[kind[2:] == ["F"]] for kind in (here, was)]
            refuse(
                f"{label(i)} is in {orders[0]}, but was in {orders[1]} when this file was saved, and its "
                "moments are stored in blocks of elements that are neighbours in memory"
            )
        here_shape, shape = (f"({shown(s)[1:-1]}{',' * (len(s) == 1)})" for s in (here[1], was[1]))
        refuse(
            f"{label(i)} is {here[0]} of shape {here_shape}, but {was[0]!s:.40} of shape {shape} in the "
            "file: it is of another model"
        )


def _params_of_format_1(saved: Header, count: int) -> list[Any]:
    """It did not say what the parameters were; their moments were the same."""
    entries = entries_in(saved.table)
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    found: list[Any] = [entries.get(f"state.{i}.exp_avg") for i in range(count)]
    require(all(isinstance(entry, dict) for entry in found), NO_CHECKPOINT)
    return [[dtypes.get(str(entry.get("dtype")), "an unknown dtype"), entry.get("shape")] for entry in found]


def _require_layout(file: BinaryIO, saved: Header, table: Table, label: Callable[[int], str]) -> None:
    if saved.table != table.members():
        _require_entries(saved, table, label)
    size = saved.size + int(table.sizes.sum())
    found_size = os.fstat(file.fileno()).st_size
    problem = "is cut off" if found_size < size else "has something appended"
    require(found_size == size, f"it {problem}: it has {found_size} bytes instead of {size}. {DAMAGED}")


def _require_checksums(saved: Header, table: Table, found: list[int], label: Callable[[int], str]) -> None:
    if saved.crc32 == table.checksums() % tuple(found):
        return
    _require_entries(saved, table, label)
    checksums = checksums_in(saved.crc32)
    for name, checksum in zip(table.names(), found, strict=True):
        if checksum != checksums[name]:
            refuse(f"it is damaged: {_what(name, label)} has another checksum. {DAMAGED}")


def _require_entries(saved: Header, table: Table, label: Callable[[int], str]) -> None:
    expected, entries = entries_in(table.members()), entries_in(saved.table)
    checksums = checksums_in(saved.crc32)
    # Only a file that this package has not written differs. As texts, 1 is not 1.0, nor True.
    for name, wanted in expected.items():
        same = json.dumps(entries.get(name), sort_keys=True) == json.dumps(wanted, sort_keys=True)
        require(same and name in checksums, f"its table is wrong at {_what(name, label)}. {DAMAGED}")
    unknown = sorted((entries.keys() | checksums.keys()) - expected.keys())
    require(not unknown, f"it has arrays that are not Adam's: {shown(unknown[:3])}. {DAMAGED}")
