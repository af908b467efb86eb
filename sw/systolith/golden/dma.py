"""DMA instructions in numpy: their definition.

Element (i0, i1, i2, i3) of lane l lies at DRAM byte
``dram_base + sum(i[d] * dram_strides[d]) + l * lane_stride`` modulo 2**48, bit 0 of which is
ignored unless an element has one byte. Elements that coincide are written in the order
(i0, i1, i2, i3, l), the last index changing fastest, so the last of them stays.

GATHER and SCATTER execute as DMA_LOADs and DMA_STOREs, one for each row: see `rows`. With
`accumulate` a load adds to SBUF, element by element in that order, and a store, or SCATTER,
executes as two for each i0: a load that adds, and then a store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from systolith_hdl.config import axi_bytes
from systolith_hdl.formats import FORMATS, INTEGERS, DType
from systolith_hdl.isa import DRAM_READERS, SPECS, FaultCause, Opcode

from .arithmetic import Words, add, pack, unpack

_ADDRESSES = 1 << 48


class DmaFault(Exception):
    """DRAM answered a burst with an error, or an index names no row.

    Attributes
    ----------
    cause : AXI_READ_ERROR, AXI_WRITE_ERROR or OUT_OF_BOUNDS
    address : byte address of the first such burst, or the index
    """

    def __init__(self, cause: FaultCause, address: int) -> None:
        super().__init__(f"{cause.name} at {address:#x}")
        self.cause = cause
        self.address = address


def _walk(base: int, strides: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Returns base + sum(i[d] * strides[d]) for all indices, flattened, the last index fastest."""
    total = np.array([base], np.int64)
    for stride, count in zip(strides, counts, strict=True):
        total = (total[:, None] + stride * np.arange(count, dtype=np.int64)).reshape(-1)
    return total


def _counts(fields: Mapping[str, int]) -> list[int]:
    return [fields[f"counts.{d}"] for d in range(4)]


def _columns(fields: Mapping[str, int]) -> np.ndarray:
    """Word addresses of the columns [steps]."""
    strides = [fields[f"local.strides.{d}"] for d in range(4)]
    return _walk(fields["local.base"], strides, _counts(fields))


def element_addresses(fields: Mapping[str, int]) -> np.ndarray:
    """Byte addresses of the elements [steps, lanes]."""
    strides = [*(fields[f"dram_strides.{d}"] for d in range(4)), fields["lane_stride"]]
    address = _walk(fields["dram_base"], strides, [*_counts(fields), fields["lanes"]])
    ignored = 0 if _element_bytes(fields) == 1 else 1
    return ((address % _ADDRESSES) & ~ignored).reshape(-1, fields["lanes"])


def _dtype(fields: Mapping[str, int]) -> DType:
    return DType(fields["dram_dtype"])


def _element_bytes(fields: Mapping[str, int]) -> int:
    return FORMATS[_dtype(fields)].bytes


def first_bad_burst(
    fields: Mapping[str, int], dram_bytes: int, lanes: int, *, store: bool
) -> int | None:
    """Returns the address of the first burst that reaches past the end of DRAM, in the order in
    which the hardware issues them (`systolith_hdl.dma.queue.DmaQueue`), or None if none does.

    Parameters
    ----------
    fields : as `isa.decode` gives them
    dram_bytes : a multiple of 16 beats, so that no burst lies partly inside
    lanes : N of the core
    """
    size = _element_bytes(fields)
    low = high = fields["dram_base"]
    used, lane_stride = fields["lanes"], fields["lane_stride"]
    counts = _counts(fields)
    for d, count in enumerate([*counts, used]):
        reach = (count - 1) * (lane_stride if d == 4 else fields[f"dram_strides.{d}"])
        low, high = low + min(reach, 0), high + max(reach, 0)
    if low >= 0 and high + size <= dram_bytes:
        return None

    element = element_addresses(fields)
    inner, inner_stride = counts[3], fields["dram_strides.3"]
    if lane_stride == size or used == 1:
        starts = element[:, 0]
        lengths = np.full(starts.size, used * size)
        if inner_stride == used * size:
            starts, lengths = starts[::inner], lengths[::inner] * inner
    else:
        rows = 1 if lane_stride == 0 and not store else used
        turned = inner_stride == size and (not store or abs(lane_stride) >= lanes * size)
        width = lanes if turned else 1
        # [outer steps, inner steps, lanes]
        starts = element.reshape(-1, inner, used)[:, ::width, :rows]
        columns = np.minimum(width, inner - np.arange(0, inner, width))
        lengths = np.broadcast_to(columns[None, :, None] * size, starts.shape).reshape(-1)
        starts = starts.reshape(-1)
    bad = starts + lengths > dram_bytes
    if not bad.any():
        return None
    beat = axi_bytes(lanes)
    # The run's first burst, unless that still lies inside: then one begins where DRAM ends.
    return max(int(starts[np.argmax(bad)]) // beat * beat, dram_bytes)


def _check(dram: np.ndarray, sbuf: np.ndarray, fields: Mapping[str, int], *, store: bool) -> None:
    bad = first_bad_burst(fields, dram.size, sbuf.shape[0], store=store)
    if bad is not None:
        cause = FaultCause.AXI_WRITE_ERROR if store else FaultCause.AXI_READ_ERROR
        raise DmaFault(cause, bad)


def indices(sbuf: np.ndarray, fields: Mapping[str, int]) -> np.ndarray:
    """The vector of indices of a GATHER or SCATTER: uint32 [counts.0]."""
    lanes, count = sbuf.shape[0], fields["counts.0"]
    first = fields["index.base"]
    return sbuf[:, first : first + -(-count // lanes)].T.reshape(-1)[:count]


def rows(
    opcode: Opcode, sbuf: np.ndarray, fields: Mapping[str, int]
) -> Iterator[Mapping[str, int]]:
    """Yields the fields of the DMA_LOADs or DMA_STOREs that a DMA instruction executes as, in
    order: one for each i0 if it has indices or is a store that adds, else just one. Raises DmaFault
    at an index that is not below `rows`."""
    if not SPECS[opcode].indexed:
        if opcode in DRAM_READERS or not fields.get("accumulate"):
            yield fields
            return
        whole = dict(fields)
        numbers, stride = list(range(fields["counts.0"])), fields["dram_strides.0"]
    else:
        # All indices are read first.
        numbers, stride = indices(sbuf, fields).tolist(), fields["row_stride"]
        whole = {
            **fields,
            **{f"local.strides.{d}": 0 for d in (1, 2)},
            **{f"dram_strides.{d}": 0 for d in range(3)},
            "dram_strides.3": fields["column_stride"],
        }
    for row, number in enumerate(numbers):
        if SPECS[opcode].indexed and number >= fields["rows"]:
            raise DmaFault(FaultCause.OUT_OF_BOUNDS, number)
        yield {
            **whole,
            "counts.0": 1,
            "local.base": fields["local.base"] + row * fields["local.strides.0"],
            "dram_base": (fields["dram_base"] + number * stride) % _ADDRESSES,
        }


def dma_load(dram: np.ndarray, sbuf: np.ndarray, fields: Mapping[str, int]) -> None:
    """Executes DMA_LOAD, with `accumulate` as it says.

    Parameters
    ----------
    dram : uint8 [bytes], contiguous, a multiple of 16 beats long
    sbuf : uint32 [N, depth], changed in place
    fields : as `isa.decode` gives them

    Raises DmaFault, having changed nothing, when an element lies past the end of DRAM.
    """
    _check(dram, sbuf, fields, store=False)
    element = element_addresses(fields)
    size = _element_bytes(fields)
    packed = np.dtype(f"<u{size}")
    if (element % size).any():
        bits = dram[element[..., None] + np.arange(size)].view(packed)[..., 0]
    else:
        bits = dram.view(packed)[element // size]
    words, columns = unpack(bits, _dtype(fields)).T, _columns(fields)
    lanes = slice(fields["lanes"])
    if not fields.get("accumulate"):
        # numpy assigns in order, so of the steps that meet in one column the last one stays.
        sbuf[lanes, columns] = words
        return
    plus = np.add if _dtype(fields) in INTEGERS else add
    if np.unique(columns).size == columns.size:
        sbuf[lanes, columns] = plus(sbuf[lanes, columns], words)
        return
    for step, column in enumerate(columns):
        sbuf[lanes, column] = plus(sbuf[lanes, column], words[:, step])


def dma_store(
    dram: np.ndarray, sbuf: np.ndarray, fields: Mapping[str, int], random: Words | None = None
) -> None:
    """Executes DMA_STORE, `accumulate` apart; parameters and faults as `dma_load`, but `dram` is
    changed in place.

    With `random`, words [lanes, steps], it rounds stochastically, else to nearest.
    """
    _check(dram, sbuf, fields, store=True)
    element = element_addresses(fields)
    size = _element_bytes(fields)
    words = np.ascontiguousarray(sbuf[: fields["lanes"], _columns(fields)].T)
    bits = pack(words, _dtype(fields), None if random is None else random.T)
    # numpy assigns in order, so of the elements that meet the last one stays.
    if (element % size).any():
        raw = np.ascontiguousarray(bits[..., None]).view(np.uint8)
        dram[element[..., None] + np.arange(size)] = raw
    else:
        dram.view(np.dtype(f"<u{size}"))[element // size] = bits


def execute(
    opcode: Opcode,
    dram: np.ndarray,
    sbuf: np.ndarray,
    fields: Mapping[str, int],
    random: Words | None = None,
) -> None:
    """Executes any DMA instruction; parameters as of `dma_store`.

    Raises DmaFault; the `rows` before the one that has the fault are moved.
    """
    done = 0
    for part in rows(opcode, sbuf, fields):
        if opcode in DRAM_READERS or fields.get("accumulate"):
            dma_load(dram, sbuf, part)
        if opcode in DRAM_READERS:
            continue
        columns = slice(done, done + math.prod(_counts(part)))
        dma_store(dram, sbuf, part, None if random is None else random[:, columns])
        done = columns.stop
