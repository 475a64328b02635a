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
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Final, NamedTuple, NoReturn

from fused_adam import _checkpoint, _core
from fused_adam._tables import OPTIONS, STREAMS, unknown_features

# That of the newest option or stream; a row of the tables raises it. The name, form and rule of header_crc32
# stay: they tell a damaged header from a newer one.
FORMAT: Final = max(*(option.format for option in OPTIONS), *(stream.format for stream in STREAMS))
_MAX_HEADER: Final = 100_000_000  # bytes; the safetensors library reads no more
# What a header may have at most: parsed, a hostile one takes 25 times as much memory.
_HEADER_ROOM: Final = 1 << 16
_HEADER_ROOM_PER_PARAM: Final = 2048
_ALIGNMENT: Final = 64  # of the first array in the file
_CRC_FIELD: Final = b'"header_crc32":"%s"'
_NO_CRC: Final = b"00000000"
_ANY_CRC: Final = re.compile(_CRC_FIELD % b"([0-9a-f]{8})")
_START: Final = '{"__metadata__":'
# Whatever has a __float__ is taken for these.
_REAL_OPTIONS: Final = tuple(
    option.name for option in OPTIONS if option.kind.startswith(("number", "fraction"))
)

DAMAGED: Final = "Use another copy of the file, or an older checkpoint"
NO_CHECKPOINT: Final = "it is no checkpoint of fused-adam, or its header is damaged"


class Refusal(Exception):
    """What a CheckpointError says about a file, without its name."""


class Header(NamedTuple):
    groups: list[Any]
    defaults: dict[str, Any]
    required: list[Any]  # what a reader has to know
    steps: int | None  # made so far; older files do not say
    streams: dict[str, Any] | None  # as _streams_as_json() makes it; format 1 had none
    # Texts, as Table makes them for the same arrays. Where they are what is expected, they need not be
    # parsed, which would take longer than all else for 100,000 arrays.
    params: str | None  # likewise
    crc32: str
    table: str
    size: int  # of the header


def header_room(params: int) -> int:
    return min(_MAX_HEADER, _HEADER_ROOM + _HEADER_ROOM_PER_PARAM * params)


class NewHeader:
    """A header to be written. Its size is known before the checksums are, which have 8 digits each."""

    def __init__(self, metadata: Mapping[str, str], checksums: str, members: str) -> None:
        # Its own checksum first: it is found as the first of this name.
        self._begin = f'{_START}{{{(_CRC_FIELD % _NO_CRC).decode()},"crc32":'.encode()
        self._checksums = json.dumps(checksums)
        size = len(self._checksums) + checksums.count("%08x") * (8 - len("%08x"))
        end = f",{json.dumps(metadata, separators=(',', ':'))[1:]},{members}}}".encode()
        self._end = end + b" " * (-(8 + len(self._begin) + size + len(end)) % _ALIGNMENT)
        self._length = len(self._begin) + size + len(self._end)
        self.size = 8 + self._length

    def sealed(self, checksums: Sequence[int]) -> list[bytes]:
        """In pieces, with the checksums of the arrays in their places, and its own in its place."""
        length = self._length.to_bytes(8, "little")
        middle = (self._checksums % tuple(checksums)).encode()
        checksum = 0
        for piece in (length, self._begin, middle, self._end):
            checksum = zlib.crc32(piece, checksum)
        return [length, self._begin.replace(_NO_CRC, b"%08x" % checksum), middle, self._end]


def kinds_in(params: str) -> list[Any]:
    try:
        return _parse_list(params)
    except (ValueError, TypeError, RecursionError):
        refuse(NO_CHECKPOINT)


def checksums_in(crc32: str) -> dict[str, int]:
    try:
        return {name: int(value, 16) for name, value in _parse_dict(crc32).items()}
    except (ValueError, TypeError, RecursionError):
        refuse(NO_CHECKPOINT)


def entries_in(table: str) -> dict[str, Any]:
    try:
        entries = _parse_dict("{" + table + "}")
        if "__metadata__" in entries:
            raise ValueError
    except (ValueError, RecursionError):
        refuse(NO_CHECKPOINT)
    return entries


def as_json(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    converted = {}
    for key, value in group.items():
        if key in _REAL_OPTIONS and not isinstance(value, (int, float, type(None))):
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
    if isinstance(value, str) and json.loads(json.dumps(value)) != value:
        _refuse_option(where, value, "it has the halves of a character next to each other")
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
        # Metadata first, as this package writes it. That the whole is JSON with no key twice follows once
        # the table is.
        whole = text.decode()
        if not whole.startswith(_START):
            raise ValueError
        metadata, end = _DECODER.raw_decode(whole, len(_START))
        table = whole[end:].rstrip(" ")
        if not (table.startswith(",") and table.endswith("}")):
            raise ValueError
        _require_version(metadata["fused_adam_format"], metadata["fused_adam_version"])
        # Format 1 had none of these.
        is_1 = metadata["fused_adam_format"] == "1"
        required = [] if is_1 else _parse_list(metadata["requires"])
        unknown = unknown_features(required)
        groups = _parse_list(metadata["param_groups"])
        defaults = _parse_dict(metadata.get("defaults", "{}"))
        steps = None
        if "steps" in metadata:
            if not re.fullmatch("[0-9]{1,19}", metadata["steps"]):
                raise ValueError
            steps = int(metadata["steps"])
            require(steps <= _checkpoint.MAX_STEP, f"it counts {steps} steps. {DAMAGED}")
        params = None if is_1 else metadata["params"]
        streams = None if is_1 else _parse_dict(metadata["streams"])
        crc32 = metadata["crc32"]
        if not (isinstance(crc32, str) and (is_1 or isinstance(params, str))):
            raise TypeError
        for options in (*groups, defaults):
            if isinstance(options.get("betas"), list):
                options["betas"] = tuple(options["betas"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        refuse(NO_CHECKPOINT)
    require(
        not unknown,
        f"it needs {shown(unknown)}, which fused-adam {_core.__version__} does not know. Upgrade it",
    )
    return Header(groups, defaults, required, steps, streams, params, crc32, table[1:-1], 8 + length)


def _require_version(version: str, writer: str) -> None:
    if not re.fullmatch("[1-9][0-9]{0,9}", version):
        raise ValueError
    require(
        int(version) <= FORMAT,
        f"it has format {version}, of fused-adam {writer!s:.40}, but this is fused-adam {_core.__version__}, "
        f"which knows formats up to {FORMAT}. Upgrade fused-adam",
    )


def _parse(text: str) -> Any:
    if not isinstance(text, str):
        raise TypeError
    return _DECODER.decode(text)


def _parse_list(text: str) -> list[Any]:
    parsed = _parse(text)
    if not isinstance(parsed, list):
        raise TypeError
    return parsed


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


# JSON that every reader understands in the same way: no NaN, no key twice.
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def shown(name: Any) -> str:
    shown = repr(name)
    return shown if len(shown) <= 200 else shown[:200] + "..."


def require(condition: bool, problem: str) -> None:
    if not condition:
        refuse(problem)


def refuse(problem: str) -> NoReturn:
    raise Refusal(problem)
