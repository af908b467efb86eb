"""Matrix products of all layouts, and transposition."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import NARROW_FLOATS, DType, dtype_of
from systolith_hdl.isa import Function, Space

from ..kernel import DramTensor, KernelBuilder
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import Ring, load_across, parts, rank

register_exclusion(__file__)


def operand_type(name: str) -> DType:
    """The narrow float that operands of products are rounded to."""
    try:
        dtype = dtype_of(np.dtype(name))
    except TypeError:
        refuse(f"operands must be rounded to a narrow float, not {name!r}")
    if dtype not in NARROW_FLOATS:
        refuse(f"operands must be rounded to a narrow float, not {name!r}")
    return dtype


@kernel
def matmul(
    nc: KernelBuilder,
    a: DramTensor,
    b: DramTensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    operands: str = "bfloat16",
    dtype: str = "float32",
) -> DramTensor:
    """``a @ b``, either operand transposed: [M, K] or [K, M] by [K, F] or [F, K] gives [M, F].

    Parameters
    ----------
    operands : narrow float that both are rounded to; sums are FP32
    dtype : of the result
    """
    rank(a, 2)
    rank(b, 2)
    m, k = a.shape[::-1] if transpose_a else a.shape
    k2, f = b.shape[::-1] if transpose_b else b.shape
    if k != k2:
        refuse(f"the inner dimensions of {a} and {b} differ: {k} and {k2}")
    out = nc.output((m, f), np.dtype(dtype))
    rounded = operand_type(operands)
    n = nc.config.lanes
    a_steps = (m, 1) if transpose_a else (1, k)  # along K, along M
    b_steps = (1, k) if transpose_b else (f, 1)  # along K, along F
    # Blocks of N rows of the result, and its columns, whose sums take half of PSUM.
    half = nc.config.psum_depth // 2
    width = min(f, max(n, half // 4))
    group = max(1, min(-(-m // n), half // width))
    # Tiles of K that come together.
    depth = n * max(1, min(-(-k // n), nc.config.sbuf_depth // 8 // (group * n + width)))
    left = Ring(nc, Space.SBUF, depth // n * group * n)
    right = Ring(nc, Space.SBUF, depth // n * width)
    sums = Ring(nc, Space.PSUM, group * width)
    results = Ring(nc, Space.SBUF, width, 4)
    turn = 0
    for column, columns in parts(f, width):
        for row, rows in parts(m, group * n):
            psum = sums.take()
            for start, length in parts(k, depth):
                still, moving = left.take(), right.take()
                load_across(
                    nc, still, a, offset=start * a_steps[0] + row * a_steps[1],
                    rows=length, columns=rows, row_step=a_steps[0], column_step=a_steps[1],
                )  # fmt: skip
                load_across(
                    nc, moving, b, offset=start * b_steps[0] + column * b_steps[1],
                    rows=length, columns=columns, row_step=b_steps[0], column_step=b_steps[1],
                )  # fmt: skip
                for block, (first, used) in enumerate(parts(rows, n)):
                    for tile, (at, lanes) in enumerate(parts(length, n)):
                        nc.tensor.load_stationary(
                            still.view(used, offset=tile * rows + first, lanes=lanes)
                            .astype(rounded)
                        )  # fmt: skip
                        nc.tensor.matmul(
                            psum.view(columns, offset=block * width, lanes=used),
                            moving.view(columns, offset=tile * columns, lanes=lanes)
                            .astype(rounded),
                            accumulate=start + at > 0,
                        )  # fmt: skip
            for block, (first, used) in enumerate(parts(rows, n)):
                done = results.take().view(columns, lanes=used)
                total = psum.view(columns, offset=block * width, lanes=used)
                turn += 1
                if turn % 2:
                    nc.vector.copy(done, total)
                else:
                    nc.scalar.activate(done, total, Function.IDENTITY, bias=-0.0)
                item = out.itemsize
                nc.dma.store(done, out, ((row + first) * f + column) * item, lane_stride=f * item)
    return out


def _matmul_forward(a: Any, b: Any, **options: Any) -> Any:
    return matmul(a, b, **options), (a, b)


def _matmul_backward(
    kept: Any,
    gradient: Any,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    operands: str = "bfloat16",
    dtype: str = "float32",
) -> Any:
    a, b = kept

    def product(x: Any, y: Any, turn_x: bool, turn_y: bool, like: Any) -> Any:
        return matmul(
            x, y, transpose_a=turn_x, transpose_b=turn_y, operands=operands,
            dtype=np.dtype(like.dtype).name,
        )  # fmt: skip

    if transpose_a:
        da = product(b, gradient, transpose_b, True, a)
    else:
        da = product(gradient, b, False, not transpose_b, a)
    if transpose_b:
        db = product(gradient, a, True, transpose_a, b)
    else:
        db = product(a, gradient, not transpose_a, False, b)
    return da, db


matmul.defvjp(_matmul_forward, _matmul_backward)


@kernel
def transpose(nc: KernelBuilder, x: DramTensor) -> DramTensor:
    """``x.T``, by two transfers of each element and nothing else."""
    rank(x, 2)
    rows, columns = x.shape
    out = nc.output((columns, rows), x.dtype)
    item = x.itemsize
    width = min(columns, nc.config.sbuf_depth // 8)
    tiles = Ring(nc, Space.SBUF, width, 4)
    for row, lanes in parts(rows, nc.config.lanes):
        for column, count in parts(columns, width):
            view = tiles.take().view(count, lanes=lanes)
            nc.dma.load(view, x, (row * columns + column) * item, lane_stride=columns * item)
            # A column of the tile is a piece of a row of the result.
            nc.dma.store(view, out, (column * rows + row) * item, (rows * item,), item)
    return out


transpose.defvjp(lambda x: (transpose(x), None), lambda _, gradient: (transpose(gradient),))
