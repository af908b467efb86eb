"""Fused optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import NARROW_FLOATS
from systolith_hdl.isa import AluOp, Function, Rounding

from ..kernel import DramTensor, KernelBuilder, Tile
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import add, in_turns, is_shape, parts, same

register_exclusion(__file__)


@kernel
def adamw(
    nc: KernelBuilder,
    parameters: DramTensor,
    gradient: DramTensor,
    mean: DramTensor,
    square: DramTensor,
    rates: DramTensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    decay: float = 0.01,
    rounding: str = "nearest",
) -> Any:
    """One step of AdamW; returns the new parameters, mean and square.

    ``mean' = beta1 * mean + (1 - beta1) * g`` and likewise the square of g; ``parameters' =
    parameters - rate * (mean' * c1 / (sqrt(square' * c2) + eps) + decay * parameters)``.

    Parameters
    ----------
    parameters, gradient, mean, square : of one shape, any types of floats
    rates : float32 [3]: rate, c1 = 1 / (1 - beta1**t) and c2 = 1 / (1 - beta2**t) at step t
    rounding : "nearest" or "stochastic": how results of narrow types are rounded as they are stored
    """
    same(parameters, gradient, mean, square)
    is_shape(rates, 3)
    if rounding not in {mode.name.lower() for mode in Rounding}:
        refuse(f"rounding must be nearest or stochastic, not {rounding!r}")
    results = [nc.output(t.shape, t.dtype) for t in (parameters, mean, square)]
    n = nc.config.lanes
    numbers = nc.sbuf.tile(3, "rates").view()
    nc.dma.load(numbers, rates, lane_stride=0)
    total = math.prod(parameters.shape)
    columns = -(-total // n)
    width = max(1, min(-(-columns // 8), nc.config.sbuf_depth // 24))
    slots = [[nc.sbuf.tile(width) for _ in range(6)] for _ in range(3)]

    def job(work: tuple[int, int, int], slot: list[Tile]) -> Iterator[None]:
        """Elements from `first` on, `count` columns of `lanes` each."""
        first, count, lanes = work
        rate, c1, c2 = (numbers[i : i + 1].with_lanes(lanes) for i in range(3))
        p, g, m, v, a, b = (tile.view(count, lanes=lanes) for tile in slot)
        loads = zip((g, m, v, p), (gradient, mean, square, parameters), strict=True)
        for view, tensor in loads:
            item = tensor.itemsize
            nc.dma.load(view, tensor, first * item, (lanes * item,), item)
        nc.scalar.activate(a, g, Function.IDENTITY, 1.0 - beta1)
        nc.vector.tensor_tensor(g, g, AluOp.MUL, g, AluOp.MUL, 1.0 - beta2)
        yield
        add(nc, v, v, g, scale=beta2)
        add(nc, m, m, a, scale=beta1)
        yield
        nc.vector.tensor_tensor(b, v, AluOp.MUL, c2)
        nc.vector.tensor_tensor(a, m, AluOp.MUL, c1)
        yield
        nc.scalar.activate(b, b, Function.SQRT)
        nc.scalar.activate(b, b, Function.RECIPROCAL, 1.0, eps)
        yield
        nc.vector.tensor_tensor(a, a, AluOp.MUL, b)
        if decay:
            nc.vector.tensor_tensor(a, p, AluOp.ADD, a, AluOp.MUL, decay)
        nc.vector.tensor_tensor(a, a, AluOp.MUL, rate)
        yield
        add(nc, p, a, p, scale=-1.0)
        for view, tensor in zip((p, m, v), results, strict=True):
            item = tensor.itemsize
            narrow = tensor.dtype in NARROW_FLOATS
            nc.dma.store(
                view, tensor, first * item, (lanes * item,), item,
                rounding=rounding if narrow else Rounding.NEAREST,
            )  # fmt: skip

    works = [(start * n, count, n) for start, count in parts(total // n, width)]
    if total % n:
        works.append((total // n * n, 1, total % n))
    in_turns(works, slots, job)
    return tuple(results)
