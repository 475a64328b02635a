"""The arrays of a checkpoint file: their order, and what its header says of them.

For 100,000 small arrays the time of a checkpoint is that of these texts. So most things are done for all
arrays at once: a text for each kind of parameter is made once, and all numbers are put in by one `%`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam._checkpoint import Kinds

Array: TypeAlias = npt.NDArray[Any]

# As the safetensors format calls them, which has no name for our codings of 8 bits.
DTYPES: Final = {
    "int64": "I64",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3": "U8",
    "float8_e5m3": "U8",
    "exponent": "U8",
}
_WIDTHS: Final = {"I64": 8, "F64": 8, "F32": 4, "BF16": 2, "U8": 1}


class Table:
    """The step counts, then an array for each stream of each parameter that has it.

    Wider types come first, so that all are aligned in the file.

    Parameters
    ----------
    kinds
        What the parameters are, as the core says it: a dict for each kind, and for each parameter its kind.
    steps
        One for each parameter.
    streams
        By name, an array for each parameter, or None where it has no such stream.
    """

    def __init__(
        self,
        kinds: Kinds,
        steps: npt.NDArray[np.int64],
        streams: Mapping[str, Sequence[Array | None]],
    ) -> None:
        layouts, of_param = kinds
        self._streams = list(streams)
        count = len(self._streams)
        self._layouts = [kind[name][:2] for kind in layouts for name in self._streams]
        # A row for each parameter, a column for each stream.
        kind = np.add.outer(np.array(of_param, np.intp) * count, np.arange(count)).ravel()
        width = np.array([_WIDTHS[DTYPES[dtype]] for dtype, _ in self._layouts], np.intp)[kind]
        arrays = list(chain.from_iterable(zip(*streams.values(), strict=True)))
        is_there = np.array([array is not None for array in arrays], np.bool_)
        self._is_there = is_there.reshape(len(of_param), count)
        order = np.flatnonzero(is_there)
        order = order[np.argsort(-width[order], kind="stable")]
        self._param = order // count
        self._stream = (order % count).tolist()
        self._kind = kind[order].tolist()
        self.arrays: list[Array] = [steps, *map(arrays.__getitem__, order.tolist())]
        self.sizes = np.array([array.nbytes for array in self.arrays], np.int64)

    def names(self) -> list[str]:
        found = zip(self._param.tolist(), self._stream, strict=True)
        return ["step", *(f"state.{param}.{self._streams[stream]}" for param, stream in found)]

    def owners(self) -> dict[str, list[int] | None]:
        """For each stream that there is, the parameters that have it; None for all."""
        columns = zip(self._streams, self._is_there.T, strict=True)
        return {
            name: None if column.all() else np.flatnonzero(column).tolist()
            for name, column in columns
            if column.any()
        }

    def members(self) -> str:
        """Type, shape and place of each array, as the members of a JSON object."""
        forms = [
            f'"state.%d.{self._streams[k % len(self._streams)]}":{_entry(dtype, shape)}'
            for k, (dtype, shape) in enumerate(self._layouts)
        ]
        ends = self.sizes.cumsum()
        numbers = np.stack([self._param, ends[:-1], ends[1:]], axis=1)
        steps = f'"step":{_entry("int64", self.arrays[0].shape)}' % (0, self.sizes[0])
        return ",".join([steps, *map(forms.__getitem__, self._kind)]) % tuple(numbers.ravel().tolist())

    def checksums(self) -> str:
        """Those of the arrays, as a JSON object, once they are put in by `%`."""
        forms = [f'"state.%d.{name}": "%%08x"' for name in self._streams]
        members = ['{"step": "%%08x"', *map(forms.__getitem__, self._stream)]
        return f"{', '.join(members)}}}" % tuple(self._param.tolist())

    def runs(self, small: int, block: int) -> Iterator[list[Array]]:
        """Neighbours: arrays of one dtype that are small and fit into about one block, or a single array."""
        is_large = self.sizes > small
        blocks = np.where(is_large, block, np.maximum(self.sizes, 1)).cumsum() // block
        dtypes = [dtype for dtype, _ in self._layouts]
        dtype = np.array([-1, *map([dtypes.index(d) for d in dtypes].__getitem__, self._kind)])
        is_end = is_large[1:] | is_large[:-1] | (np.diff(blocks) != 0) | (np.diff(dtype) != 0)
        ends = [*(np.flatnonzero(is_end) + 1).tolist(), len(self.arrays)]
        for begin, end in zip([0, *ends], ends, strict=False):
            yield self.arrays[begin:end]


def params_text(kinds: Kinds) -> str:
    """Dtype and shape of each parameter, as a JSON list. And "F" where its state is stored in blocks of
    elements that are neighbours in memory, and that is Fortran order.
    """
    layouts, of_param = kinds
    forms = []
    for kind in layouts:
        dtype, shape, order = kind["param"]
        in_blocks = len(shape) > 1 and len(kind["exp_avg"][1]) == 1
        is_fortran = ',"F"' if in_blocks and order == "F" else ""
        forms.append(f'["{dtype}",[{_numbers(shape)}]{is_fortran}]')
    return f"[{','.join(map(forms.__getitem__, of_param))}]"


def _entry(dtype: str, shape: Sequence[int]) -> str:
    return f'{{"dtype":"{DTYPES[dtype]}","shape":[{_numbers(shape)}],"data_offsets":[%d,%d]}}'


def _numbers(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))
