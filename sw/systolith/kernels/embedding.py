"""Rows of a table by index: lookup, its gradient, and addition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import DType
from systolith_hdl.isa import Space

from ..kernel import DramTensor, KernelBuilder, Tile, View
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import Ring, is_shape, parts

register_exclusion(__file__)

#: sets of tiles used in turn: one is filled while another is emptied
_BUFFERS = 3


class _Block(NamedTuple):
    """Rows, or a part of the columns of these, that are moved at once: element c * lanes + l of the
    part lies in partition l, column c."""

    first: int
    rows: int
    offset: int  #: elements of a row before the part
    columns: int
    lanes: int

    def view(self, tile: Tile) -> View:
        return tile.view((self.rows, self.columns), lanes=self.lanes)

    def in_rows(self, tensor: DramTensor) -> dict[str, Any]:
        """Where the part of the rows picked lies, as arguments of a gather or scatter."""
        item = tensor.itemsize
        return {
            "base_offset_bytes": self.offset * item,
            "column_stride": self.lanes * item,
            "lane_stride": item,
        }

    def in_order(self, tensor: DramTensor) -> dict[str, Any]:
        """Where the rows lie one after the other, as arguments of a load or store."""
        item, pitch = tensor.itemsize, tensor.shape[1] * tensor.itemsize
        return {
            "base_offset_bytes": self.first * pitch + self.offset * item,
            "dram_strides": (pitch, self.lanes * item),
            "lane_stride": item,
        }


def _blocks(nc: KernelBuilder, rows: int, width: int) -> tuple[list[_Block], int]:
    """What a matrix is moved in, each part after the other, and the columns that hold any of it."""
    lanes = nc.config.lanes
    room = nc.sbuf.largest_free // 2 // _BUFFERS
    whole = max(1, min(width // lanes, room // lanes))
    pieces = [(start * lanes, count, lanes) for start, count in parts(width // lanes, whole)]
    if width % lanes:
        pieces.append((width // lanes * lanes, 1, width % lanes))
    widest = max(columns for _, columns, _ in pieces)
    # Indices are whole columns.
    step = max(1, min(room // widest // lanes, -(-rows // lanes))) * lanes
    blocks = [
        _Block(first, count, *piece) for first, count in parts(rows, step) for piece in pieces
    ]
    return blocks, min(step, rows) * widest


def _with_indices(
    nc: KernelBuilder, index: DramTensor, blocks: list[_Block]
) -> Iterator[tuple[_Block, View]]:
    """The blocks with their indices, which are loaded once for all parts of the same rows."""
    lanes = nc.config.lanes
    ring = Ring(nc, Space.SBUF, -(-max(block.rows for block in blocks) // lanes), _BUFFERS)
    first = -1
    for block in blocks:
        if block.first != first:
            first = block.first
            tile = ring.take()
            full, rest = divmod(block.rows, lanes)
            for column, count, used in ((0, full, lanes), (full, 1, rest)):
                if count and used:
                    view = tile.view(count, offset=column, lanes=used).astype(DType.INT32)
                    at = 4 * (first + column * lanes)
                    nc.dma.load(view, index, at, (4 * lanes,), 4)
        yield block, tile.view().astype(DType.INT32)


def _check(index: DramTensor, *tables: DramTensor) -> None:
    if len(index.shape) != 1 or index.dtype is not DType.INT32:
        refuse(f"{index} must be a vector of int32")
    for table in tables:
        if len(table.shape) != 2:
            refuse(f"{table} must have rank 2")


def _whole(nc: KernelBuilder, tensor: DramTensor, width: int) -> Iterator[tuple[int, int, int]]:
    """(first element, columns, lanes) of the pieces of at most `width` columns of a tensor."""
    lanes = nc.config.lanes
    full, rest = divmod(math.prod(tensor.shape), lanes)
    for start, columns in parts(full, width):
        yield start * lanes, columns, lanes
    if rest:
        yield full * lanes, 1, rest


def _add_rows(nc: KernelBuilder, out: DramTensor, index: DramTensor, updates: DramTensor) -> None:
    """out[index[i]] += updates[i], in order."""
    blocks, columns = _blocks(nc, *updates.shape)
    ring = Ring(nc, Space.SBUF, columns, _BUFFERS)
    for block, numbers in _with_indices(nc, index, blocks):
        view = block.view(ring.take())
        nc.dma.load(view, updates, **block.in_order(updates))
        nc.dma.scatter(view, out, numbers, accumulate=True, **block.in_rows(out))


@kernel
def embedding(nc: KernelBuilder, table: DramTensor, index: DramTensor) -> Any:
    """Rows of a table: ``out[i] = table[index[i]]``, bit for bit.

    Parameters
    ----------
    table : [R, C], of any type
    index : int32 [T], from 0 to R - 1: another one is a DeviceFault, OUT_OF_BOUNDS
    """
    _check(index, table)
    out = nc.output((index.shape[0], table.shape[1]), table.dtype)
    blocks, columns = _blocks(nc, *out.shape)
    ring = Ring(nc, Space.SBUF, columns, _BUFFERS)
    for block, numbers in _with_indices(nc, index, blocks):
        view = block.view(ring.take())
        nc.dma.gather(view, table, numbers, **block.in_rows(table))
        nc.dma.store(view, out, **block.in_order(out))
    return out


@kernel
def embedding_grad(nc: KernelBuilder, gradient: DramTensor, index: DramTensor, *, rows: int) -> Any:
    """Gradient of `embedding` for its table: the rows of the gradient added up by their indices.

    Row r is the sum of all ``gradient[i]`` with ``index[i] == r``, added in order of i, from zero,
    each step rounded to FP32 and then to the type of the gradient.

    Parameters
    ----------
    gradient : [T, C]
    index : int32 [T]
    rows : R, of the table
    """
    _check(index, gradient)
    is_shape(index, gradient.shape[0])
    out = nc.output((rows, gradient.shape[1]), gradient.dtype)
    lanes = nc.config.lanes
    width = max(1, min(nc.sbuf.largest_free // 8, math.prod(out.shape) // lanes))
    zeros = nc.sbuf.tile(width)
    nc.vector.memset(zeros.view(), 0.0)
    for first, columns, used in _whole(nc, out, width):
        view = zeros.view(columns, lanes=used)
        item = out.itemsize
        nc.dma.store(view, out, first * item, (used * item,), item)
    _add_rows(nc, out, index, gradient)
    return out


@kernel
def scatter_add(
    nc: KernelBuilder, table: DramTensor, index: DramTensor, updates: DramTensor
) -> Any:
    """A table with rows added to its rows: ``out[index[i]] += updates[i]``, one after the other.

    Each step is rounded to FP32 and then to the type of the table; integers wrap around.

    Parameters
    ----------
    table : [R, C], of any type
    index : int32 [T], from 0 to R - 1: another one is a DeviceFault, OUT_OF_BOUNDS
    updates : [T, C], of the type of the table
    """
    _check(index, table, updates)
    is_shape(updates, index.shape[0], table.shape[1])
    if updates.dtype is not table.dtype:
        refuse(f"{updates} must have the type of {table}")
    out = nc.output(table.shape, table.dtype)
    lanes, item = nc.config.lanes, table.itemsize
    width = max(1, min(nc.sbuf.largest_free // 8, math.prod(table.shape) // lanes))
    ring = Ring(nc, Space.SBUF, width, _BUFFERS)
    for first, columns, used in _whole(nc, table, width):
        view = ring.take().view(columns, lanes=used)
        nc.dma.load(view, table, first * item, (used * item,), item)
        nc.dma.store(view, out, first * item, (used * item,), item)
    _add_rows(nc, out, index, updates)
    return out


def _forward(table: Any, index: Any) -> Any:
    return embedding(table, index), (table, index)


def _backward(kept: Any, gradient: Any) -> Any:
    table, index = kept
    nothing = np.zeros(index.shape, jax.dtypes.float0)  # integers have no gradient
    return embedding_grad(gradient, index, rows=table.shape[0]), nothing


embedding.defvjp(_forward, _backward)
