"""Fused optimizer steps."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import NARROW_FLOATS
from systolith_hdl.isa import AluOp, Function, Rounding, Space

from ..kernel import DramTensor, KernelBuilder
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import Ring, is_shape, parts, same

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
    width = max(1, min(-(-columns // 4), nc.config.sbuf_depth // 24))
    p_ring, g_ring, m_ring, v_ring = (Ring(nc, Space.SBUF, width, 3) for _ in range(4))
    work_ring = Ring(nc, Space.SBUF, width, 4)

    def step(first: int, count: int, lanes: int) -> None:
        """Elements from `first` on, `count` columns of `lanes` each."""
        rate, c1, c2 = (numbers[i : i + 1].with_lanes(lanes) for i in range(3))
        views = [r.take().view(count, lanes=lanes) for r in (p_ring, g_ring, m_ring, v_ring)]
        p, g, m, v = views
        for view, tensor in zip(views, (parameters, gradient, mean, square), strict=True):
            item = tensor.itemsize
            nc.dma.load(view, tensor, first * item, (lanes * item,), item)
        a, b = (work_ring.take().view(count, lanes=lanes) for _ in range(2))
        nc.scalar.activate(a, g, Function.IDENTITY, 1.0 - beta1)
        nc.vector.tensor_tensor(m, m, AluOp.ADD, a, AluOp.MUL, beta1)
        nc.vector.tensor_tensor(g, g, AluOp.MUL, g, AluOp.MUL, 1.0 - beta2)
        nc.vector.tensor_tensor(v, v, AluOp.ADD, g, AluOp.MUL, beta2)
        nc.vector.tensor_tensor(b, v, AluOp.MUL, c2)
        nc.scalar.activate(b, b, Function.SQRT)
        nc.scalar.activate(b, b, Function.RECIPROCAL, 1.0, eps)
        nc.vector.tensor_tensor(a, m, AluOp.MUL, c1)
        nc.vector.tensor_tensor(a, a, AluOp.MUL, b)
        if decay:
            nc.vector.tensor_tensor(a, p, AluOp.ADD, a, AluOp.MUL, decay)
        nc.vector.tensor_tensor(a, a, AluOp.MUL, rate)
        nc.vector.tensor_tensor(p, p, AluOp.SUB, a)
        for view, tensor in zip((p, m, v), results, strict=True):
            item = tensor.itemsize
            narrow = tensor.dtype in NARROW_FLOATS
            nc.dma.store(
                view, tensor, first * item, (lanes * item,), item,
                rounding=rounding if narrow else Rounding.NEAREST,
            )  # fmt: skip

    for start, count in parts(total // n, width):
        step(start * n, count, n)
    if total % n:
        step(total // n * n, 1, total % n)
    return tuple(results)
