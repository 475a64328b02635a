"""The header of a checkpoint file: JSON that is trusted in nothing.

Before anything in it is believed, its checksum is compared; it is computed with zeros in its own place.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam import _checkpoint, _core

Tensors: TypeAlias = Mapping[str, npt.NDArray[Any]]  # "state.0.exp_avg", ...

# To be raised by whoever changes what a file means. The name, form and rule of header_crc32 stay: they tell
# a damaged header from a newer one.
FORMAT: Final = 1
_MAX_HEADER: Final = 100_000_000  # bytes; the safetensors library reads no more
# What a header may have at most: parsed, a hostile one takes 25 times as much memory.
_HEADER_ROOM: Final = 1 << 16
_HEADER_ROOM_PER_PARAM: Final = 2048
_ALIGNMENT: Final = 64  # of the first array in the file
DTYPES: Final = {np.dtype("<i8"): "I64", np.dtype("<f4"): "F32", np.dtype("<f8"): "F64"}
_CRC_FIELD: Final = b'"header_crc32":"%s"'
_NO_CRC: Final = b"00000000"
_ANY_CRC: Final = re.compile(_CRC_FIELD % b"([0-9a-f]{8})")
_REAL_OPTIONS: Final = ("lr", "eps", "weight_decay")  # whatever has a __float__ is taken for these

DAMAGED: Final = "Use another copy of the file, or an older checkpoint"
NO_CHECKPOINT: Final = "it is no checkpoint of fused-adam, or its header is damaged"


class Refusal(Exception):
    """What a CheckpointError says about a file, without its name."""


class Header(NamedTuple):
    groups: list[Any]
    defaults: dict[str, Any]
    checksums: dict[str, int]
    entries: dict[str, Any]
    size: int  # of the header


def header_room(params: int) -> int:
    return min(_MAX_HEADER, _HEADER_ROOM + _HEADER_ROOM_PER_PARAM * params)


def header_bytes(metadata: Mapping[str, str], tensors: Tensors, checksums: Mapping[str, int]) -> bytes:
    more = {
        "header_crc32": _NO_CRC.decode(),  # first: it is found as the first of this name
        "crc32": json.dumps({name: f"{checksum:08x}" for name, checksum in checksums.items()}),
    }
    header = {"__metadata__": {**more, **metadata}, **entries_of(tensors)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    blank = len(text).to_bytes(8, "little") + text
    return blank.replace(_CRC_FIELD % _NO_CRC, _CRC_FIELD % (b"%08x" % zlib.crc32(blank)), 1)


def entries_of(tensors: Tensors) -> dict[str, Any]:
    entries = {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        dtype = DTYPES[array.dtype.newbyteorder("<")]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    return entries


def as_json(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    converted = {}
    for key, value in group.items():
        if key in _REAL_OPTIONS and not isinstance(value, (int, float)):
            value = float(value)
        elif key == "betas":
            value = [beta if isinstance(beta, (int, float)) else float(beta) for beta in value]
        place = f"{where}[{key!r}]"
        try:
            if not isinstance(key, str):
                _refuse_option(place, value, "its key is no text")
            converted[key] = _plain_json(value, place)
            json.dumps(converted[key])
        except (RecursionError, ValueError):  # a list in itself; a number of thousands of digits
            _refuse_option(place, "there", "it is too deep or too long")
    return converted


def _plain_json(value: Any, where: str) -> Any:
    """A value as it is after JSON, except that tuples become lists; TypeError where it were another."""
    value = _checkpoint.plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            _refuse_option(where, value, "its keys are not all texts")
        return {key: _plain_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        _refuse_option(where, value, "it is not finite")
    if value is not None and not isinstance(value, (bool, int, float, str)):
        _refuse_option(where, value, f"it is of type {type(value).__name__}")
    return value


def _refuse_option(where: str, value: Any, why: str) -> NoReturn:
    shown = repr(value) if not isinstance(value, str) else value
    shown = shown if len(shown) <= 100 else shown[:100] + "..."
    raise TypeError(
        f"{where} is {shown}, which cannot be saved: {why}. Options in a file are finite numbers, texts, "
        "True, False, None, and lists and dicts of these. Nothing was saved. Convert or remove it."
    )


def read_header(file: BinaryIO, room: int) -> Header:
    """Everything that can be checked without knowing the parameters; nothing is taken on trust."""
    status = os.fstat(file.fileno())
    require(stat.S_ISREG(status.st_mode), "it is no regular file")
    require(status.st_size > 0, f"it is empty. {DAMAGED}")
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    require(len(prefix) == 8 and length <= _MAX_HEADER, NO_CHECKPOINT)
    require(8 + length <= status.st_size, f"it is no checkpoint of fused-adam, or is cut off. {DAMAGED}")
    require(
        8 + length <= room,
        f"its header has {length} bytes, far more than that of a checkpoint of these parameters: it is of "
        "another model, or no checkpoint of fused-adam",
    )
    text = file.read(length)
    require(len(text) == length, f"it was cut off while it was read. {DAMAGED}")
    # The checksum before anything else is believed, even that this is JSON.
    field = _ANY_CRC.search(text)
    if field is None:
        refuse(NO_CHECKPOINT)
    checksum = zlib.crc32(text[: field.start(1)], zlib.crc32(prefix))
    checksum = zlib.crc32(text[field.end(1) :], zlib.crc32(_NO_CRC, checksum))
    require(checksum == int(field[1], 16), f"its header is damaged: it has another checksum. {DAMAGED}")
    try:
        entries = _parse_dict(text.decode())
        metadata = entries.pop("__metadata__")
        _require_version(metadata["fused_adam_format"], metadata["fused_adam_version"])
        groups = _parse(metadata["param_groups"])
        defaults = _parse_dict(metadata.get("defaults", "{}"))
        checksums = {name: int(value, 16) for name, value in _parse_dict(metadata["crc32"]).items()}
        if not isinstance(groups, list):
            raise TypeError
        for options in (*groups, defaults):
            if isinstance(options.get("betas"), list):
                options["betas"] = tuple(options["betas"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        refuse(NO_CHECKPOINT)
    return Header(groups, defaults, checksums, entries, 8 + length)


def _require_version(version: str, writer: str) -> None:
    if not re.fullmatch("[1-9][0-9]{0,9}", version, re.ASCII):
        raise ValueError
    require(
        int(version) <= FORMAT,
        f"it has format {version}, of fused-adam {writer!s:.40}, but this is fused-adam {_core.__version__}, "
        f"which knows formats up to {FORMAT}. Upgrade fused-adam",
    )


def _parse(text: str) -> Any:
    """JSON that every reader understands in the same way: no NaN, no key twice."""
    if not isinstance(text, str):
        raise TypeError
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse_dict(text: str) -> dict[str, Any]:
    parsed = _parse(text)
    if not isinstance(parsed, dict):
        raise TypeError
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise ValueError
    return parsed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def shown(name: Any) -> str:
    shown = repr(name)
    return shown if len(shown) <= 200 else shown[:200] + "..."


def require(condition: bool, problem: str) -> None:
    if not condition:
        refuse(problem)


def refuse(problem: str) -> NoReturn:
    raise Refusal(problem)
