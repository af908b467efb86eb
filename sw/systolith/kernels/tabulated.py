"""Functions of the user's own, element by element, from tables loaded when they are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.isa import AluOp, Function, Space

from ..kernel import DramTensor, KernelBuilder, Table, View, table
from ..kernel.function import Kernel, kernel
from .tiles import Ring, parts, rank, same

register_exclusion(__file__)

_COLUMNS = 256  #: worked on at a time


def _chunks(
    nc: KernelBuilder, tensor: DramTensor, rings: list[Ring], columns: int
) -> Iterator[tuple[list[View], dict[str, Any]]]:
    """The elements of tensors of one shape, N in a column: a view of the next tile of each ring,
    and where they lie in DRAM."""
    lanes, item = nc.config.lanes, tensor.itemsize
    full, rest = divmod(math.prod(tensor.shape), lanes)
    works = [(start, count, lanes) for start, count in parts(full, columns)]
    works += [(full, 1, rest)] if rest else []
    for start, count, used in works:
        views = [ring.take().view((count,), lanes=used) for ring in rings]
        place = {"base_offset_bytes": start * lanes * item, "dram_strides": (lanes * item,)}
        yield views, {**place, "lane_stride": item}


def _apply(nc: KernelBuilder, made: Table, *tensors: DramTensor) -> DramTensor:
    """The function of the first tensor, times the second one if there is one."""
    rank(tensors[0], len(tensors[0].shape))  # of floats, of any rank
    same(*tensors)
    out = nc.output(tensors[0].shape, tensors[0].dtype)
    made.load(nc)
    needed = -(-math.prod(out.shape) // nc.config.lanes)
    columns = max(1, min(_COLUMNS, needed, nc.sbuf.largest_free // (3 * len(tensors))))
    rings = [Ring(nc, Space.SBUF, columns, 3) for _ in tensors]
    for views, place in _chunks(nc, out, rings, columns):
        for view, tensor in zip(views, tensors, strict=True):
            nc.dma.load(view, tensor, **place)
        result, *factors = views
        nc.scalar.activate(result, result, Function.CUSTOM, 1.0, -0.0)
        for factor in factors:
            nc.vector.tensor_tensor(result, result, AluOp.MUL, factor)
        nc.dma.store(result, out, **place)
    return out


def tabulated(
    f: Callable[[float], float],
    df: Callable[[float], float] | None = None,
    *,
    ulp: float = 1.0,
    absolute: float = 0.0,
    domain: tuple[float, float] = (-math.inf, math.inf),
) -> Kernel:
    """A function of real numbers as one for `systolith.jit` code, element by element.

    Parameters
    ----------
    f, df : take and return a float: the function, and its derivative if it is wanted
    ulp, absolute, domain : error bounds of both tables and where they matter, as of
        `systolith.kernel.table`

    One instruction of the scalar engine for every few columns, from a table that is loaded at every
    call: 128 words for each partition and 4 for each segment. The derivative takes one of its own.
    """
    bounds: dict[str, Any] = {"ulp": ulp, "absolute": absolute, "domain": domain}
    name = getattr(f, "__name__", "function")
    made = table(f, **bounds)

    def apply(nc: KernelBuilder, x: DramTensor) -> DramTensor:
        return _apply(nc, made, x)

    function = kernel(apply, outputs=lambda x: x, name=name)
    if df is None:
        return function
    slope = table(df, **bounds, name=f"derivative of {name}")

    def chain(nc: KernelBuilder, x: DramTensor, gradient: DramTensor) -> DramTensor:
        return _apply(nc, slope, x, gradient)

    derivative = kernel(chain, outputs=lambda x, gradient: x, name=f"{name}_dx")
    function.defvjp(lambda x: (function(x), x), lambda x, gradient: (derivative(x, gradient),))
    return function
