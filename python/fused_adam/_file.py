"""Checkpoints on disk: one file in the safetensors format, checked to the last bit.

The format is a JSON header and the bytes of the arrays, so that other tools read it, in Python and elsewhere
(https://github.com/huggingface/safetensors). What it lacks are checksums: they are in the metadata of the
header, one of each array, and one of the header itself, computed with zeros in its own place. Arrays follow
each other without gaps and the file ends with the last one, so that every bit counts in one of them.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam import _checkpoint, _core

if sys.platform != "win32":
    import fcntl

Progress: TypeAlias = Callable[[int, int], object]
Tensors: TypeAlias = Mapping[str, npt.NDArray[Any]]  # "state.0.exp_avg", ...

_FORMAT: Final = 1  # to be raised by whoever changes what a file means
_MAX_HEADER: Final = 100_000_000  # bytes; the safetensors library reads no more
_ALIGNMENT: Final = 64  # of the first array in the file
_BLOCK: Final = 1 << 20  # bytes that are hashed and written at a time, out of a cache
_DTYPES: Final = {np.dtype("<i8"): "I64", np.dtype("<f4"): "F32", np.dtype("<f8"): "F64"}
_CRC_FIELD: Final = b'"header_crc32":"%s"'
_NO_CRC: Final = b"00000000"


class CheckpointError(ValueError):
    """A checkpoint file that is damaged, not of these parameters, or of a newer version."""


def save(
    path: str | os.PathLike[str],
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    progress: Progress | None,
) -> None:
    live = [core.state(i) for i in range(len(core))]
    tensors = {"step": np.array([entry["step"] for entry in live], np.int64), **_moments(live)}
    metadata = {
        "fused_adam_format": str(_FORMAT),
        "fused_adam_version": _core.__version__,
        "numerics": _core.numerics,
        "param_groups": _groups_as_json(_checkpoint.saved_groups(groups, names)),
    }
    counter = _Counter(tensors, progress)
    with _replacing(path) as file:
        # Checksums are known once the arrays are written. Until then, zeros keep their place.
        checksums = dict.fromkeys(tensors, 0)
        file.write(_header(metadata, tensors, checksums))
        for name, array in tensors.items():
            for block in _blocks(array, "readonly"):
                checksums[name] = zlib.crc32(block, checksums[name])
                file.write(block)
                counter.add(block.nbytes)
        file.seek(0)
        file.write(_header(metadata, tensors, checksums))


def load(
    path: str | os.PathLike[str],
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    fixed_options: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    """Fill a new optimizer. Where this fails, some of its moments have been written already: drop it."""
    with open(path, "rb") as file:
        try:
            _load(file, core, groups, names, fixed_options, progress)
        except CheckpointError as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from None


def _load(
    file: BinaryIO,
    core: _core.Optimizer,
    groups: list[dict[str, Any]],
    names: _checkpoint.Names,
    fixed_options: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    saved = _read_header(file)
    state_dict = {"state": {}, "param_groups": saved.groups}
    try:
        _checkpoint.load_state_dict(core, groups, names, state_dict, (), fixed_options)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    core.make_max_exp_avg_sq([i for i in range(len(core)) if f"state.{i}.max_exp_avg_sq" in saved.entries])
    live = [core.state(i) for i in range(len(core))]
    steps = np.zeros(len(live), np.int64)
    tensors = {"step": steps, **_moments(live)}
    _require_layout(file, saved, tensors)
    counter = _Counter(tensors, progress)
    for name, array in tensors.items():
        checksum = 0
        for block in _blocks(array, "writeonly"):
            _read_into(file, block)
            checksum = zlib.crc32(block, checksum)
            counter.add(block.nbytes)
        _require(checksum == saved.checksums[name], f"{name} is damaged: its checksum is another")
    for index, step in enumerate(steps):
        _require(0 <= step <= _checkpoint.MAX_STEP, f"step[{index}] is {step}, which is no step count")
        core.set_step(index, int(step))


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
    with np.nditer(array, flags, [[access]], order="C", buffersize=_BLOCK // array.itemsize) as blocks:
        yield from blocks


def _read_into(file: BinaryIO, block: npt.NDArray[Any]) -> None:
    count = file.readinto(block.data)  # type: ignore[attr-defined]
    _require(count == block.nbytes, "it was cut off while it was read")


class _Counter:
    """Tells a function of the caller how many bytes are done, of how many."""

    def __init__(self, tensors: Tensors, progress: Progress | None) -> None:
        self._progress = progress
        self._total = sum(array.nbytes for array in tensors.values())
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


# --- The header --------------------------------------------------------------------------------------


class _Header(NamedTuple):
    groups: Any
    checksums: dict[str, int]
    entries: dict[str, Any]
    size: int  # of the header


def _header(metadata: Mapping[str, str], tensors: Tensors, checksums: Mapping[str, int]) -> bytes:
    more = {
        "header_crc32": _NO_CRC.decode(),
        "crc32": json.dumps({name: f"{checksum:08x}" for name, checksum in checksums.items()}),
    }
    header = {"__metadata__": {**more, **metadata}, **_entries(tensors)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"names and options take {len(text)} bytes in the file, more than it may have.")
    return _with_crc(len(text).to_bytes(8, "little") + text)


def _with_crc(header: bytes) -> bytes:
    """The header with its checksum in place of zeros."""
    checksum = b"%08x" % zlib.crc32(header)
    return header.replace(_CRC_FIELD % _NO_CRC, _CRC_FIELD % checksum, 1)


def _entries(tensors: Tensors) -> dict[str, Any]:
    entries = {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        shape = list(array.shape)
        entries[name] = {"dtype": _DTYPES[array.dtype], "shape": shape, "data_offsets": [begin, end]}
    return entries


def _groups_as_json(groups: list[dict[str, Any]]) -> str:
    plain = [{key: _checkpoint.plain(value) for key, value in group.items()} for group in groups]
    for i, group in enumerate(plain):
        for key, value in group.items():
            try:
                json.dumps({key: value}, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                raise TypeError(
                    f"param_groups[{i}][{key!r}] is {value!r}, which cannot be saved: options in a file are "
                    "numbers, texts, None, and lists and dicts of these."
                ) from None
    return json.dumps(plain)


def _read_header(file: BinaryIO) -> _Header:
    """Everything that can be checked without knowing the parameters; nothing is taken on trust."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    _require(8 + length <= size and length <= _MAX_HEADER, "it is no checkpoint, or was cut off")
    text = file.read(length)
    _require(len(text) == length, "it was cut off while it was read")
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        version, checksum = int(metadata["fused_adam_format"]), metadata["header_crc32"].encode()
        _require(
            version <= _FORMAT,
            f"it has format {version}, of fused-adam {metadata['fused_adam_version']}, but fused-adam "
            f"{_core.__version__} knows formats up to {_FORMAT}. Upgrade fused-adam",
        )
        blank = text.replace(_CRC_FIELD % checksum, _CRC_FIELD % _NO_CRC, 1)
        _require(_with_crc(prefix + blank) == prefix + text, "its header is damaged: its checksum is another")
        groups = json.loads(metadata["param_groups"])
        for group in groups:
            group["betas"] = tuple(group["betas"])
        checksums = {name: int(value, 16) for name, value in json.loads(metadata["crc32"]).items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError("it is no checkpoint of fused-adam, or its header is damaged.") from None
    return _Header(groups, checksums, entries, 8 + length)


def _require_layout(file: BinaryIO, saved: _Header, tensors: Tensors) -> None:
    expected = _entries(tensors)
    for name in expected.keys() | saved.entries.keys():
        found, wanted = saved.entries.get(name), expected.get(name)
        _require(found == wanted, f"{name} is {found} in the file, but has to be {wanted}")
        _require(name in saved.checksums, f"{name} has no checksum")
    size = saved.size + sum(array.nbytes for array in tensors.values())
    found_size = os.fstat(file.fileno()).st_size
    _require(found_size == size, f"it has {found_size} bytes instead of {size}: it is not whole")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckpointError(f"{problem}. Nothing was loaded.")


# --- The file system ---------------------------------------------------------------------------------


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on the disk, or never."""
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; a checkpoint is a file.")
    _remove_leftovers(target)
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}.tmp")
    # With the mode of any new file, or that of the file that it replaces.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _try_lock(file)
            if sys.platform != "win32" and target.exists():
                os.fchmod(descriptor, target.stat().st_mode & 0o7777)
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if sys.platform != "win32":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _remove_leftovers(target: Path) -> None:
    """Of processes that were killed while they saved: nobody holds the lock of their files."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.????????????????.tmp"):
        with suppress(OSError), open(path, "rb") as file:
            if _try_lock(file):
                path.unlink()


def _try_lock(file: BinaryIO) -> bool:
    if sys.platform == "win32":
        return True  # an open file cannot be removed there
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
