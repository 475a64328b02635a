"""Memory that belongs to an optimizer: moments and gradient buffers."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from fused_adam import _core

Array = npt.NDArray[Any]

_LINE = 64  # bytes of a cache line, and of the widest vector
_PAGE = 4096
_LARGE = 64 * _PAGE  # from here on, a page more is below half a percent


def zeros_like_each(params: list[Array], streams: int, shift: int = 0) -> list[list[Array]]:
    """For each array, `streams` new ones like it, filled with zeros.

    Every array starts at a multiple of 64 bytes. Those of a large array stand a quarter page apart from
    it and from each other (plus `shift` bytes): a CPU that compares only the low 12 bits of addresses
    would otherwise take the load of one stream for a load after the store of another.

    All of them are views of one block, which cannot be resized, and which the operating system fills with
    zeros only where it is touched: by the threads of the first step.
    """
    offsets: list[list[int]] = []
    end = 0
    for param in params:
        base = param.__array_interface__["data"][0]
        offsets.append([])
        for stream in range(streams):
            start = -(-end // _LINE) * _LINE
            if param.nbytes >= _LARGE:
                wanted = base + shift + (stream + 1) * (_PAGE // 4)
                start += (wanted - start) % _PAGE // _LINE * _LINE
            offsets[-1].append(start)
            end = start + param.nbytes
    # A whole page to spare lets offsets mean addresses modulo a page.
    block = _core.zeroed(end + _PAGE)
    lead = -block.__array_interface__["data"][0] % _PAGE
    return [
        [_view(block[lead + start : lead + start + param.nbytes], param) for start in starts]
        for param, starts in zip(params, offsets, strict=True)
    ]


def _view(part: Array, like: Array) -> Array:
    flat: Array = part.view(like.dtype)
    return flat.reshape(like.shape, order="C" if like.flags.c_contiguous else "F")
