"""Sums so far, and the largest elements, along rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import DType
from systolith_hdl.isa import MAX_KEPT, AluOp

from ..kernel import DramTensor, KernelBuilder, View
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import Panel, over_panels, rank

register_exclusion(__file__)


@kernel
def cumsum(nc: KernelBuilder, x: DramTensor, *, reverse: bool = False) -> DramTensor:
    """The sum of the elements up to each one along the rows of x [R, C], one by one in FP32; with
    `reverse` from the end of the row."""
    rank(x, 2)
    rows, columns = x.shape
    out = nc.output(x.shape, x.dtype)

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (tile,) = tiles
        nc.dma.load(tile, x, **panel.place(nc, x))
        walked = tile[:, ::-1] if reverse else tile
        nc.vector.scan(walked, walked, AluOp.ADD, 0.0)
        nc.dma.store(tile, out, **panel.place(nc, out))
        yield

    over_panels(nc, rows, columns, 1, 0, job)
    return out


cumsum.defvjp(
    lambda x, reverse=False: (cumsum(x, reverse=reverse), None),
    lambda _, gradient, reverse=False: (cumsum(gradient, reverse=not reverse),),
)


@kernel
def top_k(nc: KernelBuilder, x: DramTensor, *, k: int, largest: bool = True) -> Any:
    """The k largest (or smallest) elements of each row of x [R, C], the greatest (or least) first:
    [R, k], and their indices, int32 [R, k]; k is 8 at most.

    A NaN comes before any number; of equal elements, the one of the lower index.
    """
    rank(x, 2)
    rows, columns = x.shape
    if not 1 <= k <= min(MAX_KEPT, columns):
        refuse(f"k must be 1 to {min(MAX_KEPT, columns)}, not {k}")
    values = nc.output((rows, k), x.dtype)
    indices = nc.output((rows, k), DType.INT32)

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        tile, found = tiles[0][:, :columns], tiles[1][:, : 2 * k]
        nc.dma.load(tile, x, **panel.place(nc, x))
        nc.vector.top(found, tile, largest=largest)
        nc.dma.store(found[:, ::2], values, **panel.place(nc, values))
        nc.dma.store(found[:, 1::2].astype(DType.INT32), indices, **panel.place(nc, indices))
        yield

    over_panels(nc, rows, max(columns, 2 * k), 2, 0, job)
    return values, indices
