"""Layer and root-mean-square normalization along rows, and batch normalization along columns,
forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.isa import AluOp, Function

from ..kernel import DramTensor, KernelBuilder, View
from ..kernel.function import Kernel, kernel
from .tiles import (
    Panel,
    add,
    everywhere,
    is_shape,
    over_panels,
    rank,
    same,
    sum_of_lanes,
    sum_of_products,
)

register_exclusion(__file__)


def _normalize(
    nc: KernelBuilder, tile: View, mean: View | None, root: View, eps: float
) -> Iterator[None]:
    """tile = (tile - its mean) / sqrt(its variance + eps); root = 1 / that square root.

    Without `mean` nothing is subtracted, and the mean of squares stands for the variance.
    """
    share = 1.0 / tile.shape[-1]
    if mean is not None:
        nc.vector.reduce(mean, tile, AluOp.ADD)
        nc.vector.tensor_scalar(mean, mean, AluOp.MUL, -share)
        yield
        add(nc, tile, tile, mean)
        yield
    sum_of_products(nc, root, tile, tile)
    yield
    nc.scalar.activate(root, root, Function.RSQRT, share, eps)
    yield
    nc.vector.tensor_tensor(tile, tile, AluOp.MUL, root)


def _forward(
    nc: KernelBuilder, x: DramTensor, gain: DramTensor, bias: DramTensor | None, eps: float
) -> DramTensor:
    rank(x, 2)
    rows, columns = x.shape
    is_shape(gain, columns)
    out = nc.output(x.shape, x.dtype)
    gains = everywhere(nc, gain)
    biases = None
    if bias is not None:
        is_shape(bias, columns)
        biases = everywhere(nc, bias)

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (tile,), (mean, root) = tiles, small
        nc.dma.load(tile, x, **panel.place(nc, x))
        yield from _normalize(nc, tile, None if biases is None else mean, root, eps)
        nc.vector.tensor_tensor(tile, tile, AluOp.MUL, gains.with_lanes(panel.lanes))
        if biases is not None:
            yield
            add(nc, tile, tile, biases.with_lanes(panel.lanes))
        nc.dma.store(tile, out, **panel.place(nc, out))

    over_panels(nc, rows, columns, 1, 2, job)
    return out


def _gradients(
    nc: KernelBuilder, x: DramTensor, gain: DramTensor, gradient: DramTensor, vectors: int
) -> list[DramTensor]:
    """Places for the gradient of x and for `vectors` more of the shape of the gain."""
    rank(x, 2)
    rank(gradient, 2)
    same(x, gradient)
    is_shape(gain, x.shape[1])
    return [nc.output(t.shape, t.dtype) for t in (x, *[gain] * vectors)]


def _backward(
    nc: KernelBuilder,
    x: DramTensor,
    gain: DramTensor,
    gradient: DramTensor,
    eps: float,
    *,
    centred: bool,
) -> tuple[DramTensor, ...]:
    """Gradients of x, the gain, and if `centred` the bias.

    With h = x normalized and u = g * gain, that of x is ``(u - mean(u) - h * mean(u * h)) * root``;
    without `centred`, mean(u) is left out. Those of gain and bias are sums over rows of g * h and
    g: each partition adds up its rows, and the partitions are added at the end, all in FP32.
    """
    dx, d_gain, *biases = _gradients(nc, x, gain, gradient, 1 + centred)
    d_bias = biases[0] if biases else None
    rows, columns = x.shape
    gains = everywhere(nc, gain)
    sums = [nc.sbuf.tile(columns) for _ in range(2 if centred else 1)]
    for total in sums:
        nc.vector.memset(total.view(), 0.0)
    share = 1.0 / columns

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (h, g, product), (mean, root, along) = tiles, small
        nc.dma.load(h, x, **panel.place(nc, x))
        nc.dma.load(g, gradient, **panel.place(nc, gradient))
        yield from _normalize(nc, h, mean if centred else None, root, eps)
        nc.vector.tensor_tensor(product, g, AluOp.MUL, h)
        for block in range(panel.blocks):
            for total, part in zip(sums, (product, g), strict=False):
                view = total.view(columns, lanes=panel.lanes)
                add(nc, view, part[block], view)
        yield
        nc.vector.tensor_tensor(g, g, AluOp.MUL, gains.with_lanes(panel.lanes))
        sum_of_products(nc, along, g, h)
        yield
        nc.vector.tensor_scalar(along, along, AluOp.MUL, share)
        if centred:
            nc.vector.reduce(mean, g, AluOp.ADD)
            nc.vector.tensor_scalar(mean, mean, AluOp.MUL, -share)
            yield
            add(nc, g, g, mean)
        nc.vector.tensor_tensor(h, h, AluOp.MUL, along)
        yield
        add(nc, g, h, g, scale=-1.0)
        yield
        nc.vector.tensor_tensor(g, g, AluOp.MUL, root)
        nc.dma.store(g, dx, **panel.place(nc, dx))

    over_panels(nc, rows, columns, 3, 3, job)
    sum_of_lanes(nc, sums[0], d_gain)
    if d_bias is None:
        return dx, d_gain
    sum_of_lanes(nc, sums[1], d_bias)
    return dx, d_gain, d_bias


def _down(nc: KernelBuilder, panel: Panel, tensor: DramTensor) -> dict[str, Any]:
    """Where a panel of a matrix's columns lies, one in each partition, as arguments of a
    transfer."""
    item = tensor.itemsize
    return {
        "base_offset_bytes": panel.row * item,
        "dram_strides": (nc.config.lanes * item, tensor.shape[1] * item),
        "lane_stride": item,
    }


def _standardize(
    nc: KernelBuilder, tile: View, found: View, spare: View, eps: float
) -> Iterator[None]:
    """Subtracts from each row of a tile [blocks, R] its first element, and finds of the rest
    [blocks, 2] the mean and 1 / sqrt(variance + eps); `spare` is [blocks, 1]."""
    # The mean of squares less the square of the mean would lose a variance that is small beside
    # the mean. An element of the row is as near to the mean as the others.
    nc.vector.tensor_scalar(spare, tile[:, :1], AluOp.MUL, -1.0)
    yield
    add(nc, tile, tile, spare)
    yield
    mean, root = found[:, :1], found[:, 1:]
    nc.vector.statistics(found, tile)
    nc.vector.tensor_scalar(found, found, AluOp.MUL, 1.0 / tile.shape[-1])
    nc.vector.tensor_tensor(spare, mean, AluOp.MUL, mean)
    nc.vector.tensor_tensor(root, root, AluOp.SUB, spare)
    nc.vector.tensor_scalar(root, root, AluOp.MAX, 0.0)
    yield
    nc.scalar.activate(root, root, Function.RSQRT, 1.0, eps)
    yield


@kernel
def batch_norm(
    nc: KernelBuilder, x: DramTensor, gain: DramTensor, bias: DramTensor, *, eps: float = 1e-5
) -> DramTensor:
    """``(x - mean) / sqrt(variance + eps) * gain + bias`` along the columns of x [R, C]; gain and
    bias [C]. The variance is that of the batch, divided by R."""
    rank(x, 2)
    rows, columns = x.shape
    is_shape(gain, columns)
    is_shape(bias, columns)
    out = nc.output(x.shape, x.dtype)

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (tile,), (found, vectors, line) = tiles, small
        mean, root, scale, offset = (pair[:, i : i + 1] for pair in (found, line) for i in (0, 1))
        nc.dma.load(tile, x, **_down(nc, panel, x))
        nc.dma.load(vectors[:, :1], gain, **panel.place(nc, gain))
        nc.dma.load(vectors[:, 1:], bias, **panel.place(nc, bias))
        yield from _standardize(nc, tile, found, offset, eps)
        nc.vector.tensor_tensor(scale, root, AluOp.MUL, vectors[:, :1])
        nc.vector.tensor_tensor(offset, mean, AluOp.MUL, scale)
        nc.vector.tensor_tensor(offset, vectors[:, 1:], AluOp.SUB, offset)
        yield
        nc.scalar.activate(tile, tile, Function.IDENTITY, scale, offset)
        nc.dma.store(tile, out, **_down(nc, panel, out))

    over_panels(nc, columns, rows, 1, 3, job, width=2)
    return out


@kernel
def batch_norm_grad(
    nc: KernelBuilder, x: DramTensor, gain: DramTensor, gradient: DramTensor, *, eps: float = 1e-5
) -> Any:
    """Gradients of `batch_norm` with respect to x, gain and bias.

    With h = x normalized, those of gain and bias are the sums of g * h and g along columns, and
    that of x is ``(g - mean(g) - h * mean(g * h)) * gain * root``.
    """
    dx, d_gain, d_bias = _gradients(nc, x, gain, gradient, 2)
    rows, columns = x.shape

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (h, g), (found, line, totals, shares) = tiles, small
        mean, root, scale, offset = (pair[:, i : i + 1] for pair in (found, line) for i in (0, 1))
        nc.dma.load(h, x, **_down(nc, panel, x))
        nc.dma.load(g, gradient, **_down(nc, panel, gradient))
        yield from _standardize(nc, h, found, offset, eps)
        nc.vector.copy(scale, root)
        nc.vector.tensor_tensor(offset, mean, AluOp.MUL, root, AluOp.MUL, -1.0)
        nc.vector.reduce(totals[:, :1], g, AluOp.ADD)
        yield
        nc.scalar.activate(h, h, Function.IDENTITY, scale, offset)
        sum_of_products(nc, totals[:, 1:], g, h)
        yield
        nc.dma.store(totals[:, :1], d_bias, **panel.place(nc, d_bias))
        nc.dma.store(totals[:, 1:], d_gain, **panel.place(nc, d_gain))
        nc.dma.load(scale, gain, **panel.place(nc, gain))
        nc.vector.tensor_tensor(scale, scale, AluOp.MUL, root)
        nc.vector.tensor_tensor(shares, totals, AluOp.MUL, scale, AluOp.MUL, -1.0 / rows)
        nc.vector.copy(offset, shares[:, :1])
        nc.vector.tensor_tensor(h, h, AluOp.MUL, shares[:, 1:])
        yield
        nc.scalar.activate(g, g, Function.IDENTITY, scale, offset)
        add(nc, g, h, g)
        nc.dma.store(g, dx, **_down(nc, panel, dx))

    over_panels(nc, columns, rows, 2, 4, job, width=2)
    return dx, d_gain, d_bias


@kernel
def layernorm(
    nc: KernelBuilder, x: DramTensor, gain: DramTensor, bias: DramTensor, *, eps: float = 1e-5
) -> DramTensor:
    """``(x - mean) / sqrt(variance + eps) * gain + bias`` along the rows of x [R, C]; gain and bias
    [C]."""
    return _forward(nc, x, gain, bias, eps)


@kernel
def layernorm_grad(
    nc: KernelBuilder, x: DramTensor, gain: DramTensor, gradient: DramTensor, *, eps: float = 1e-5
) -> Any:
    """Gradients of `layernorm` with respect to x, gain and bias."""
    return _backward(nc, x, gain, gradient, eps, centred=True)


@kernel
def rmsnorm(nc: KernelBuilder, x: DramTensor, gain: DramTensor, *, eps: float = 1e-5) -> DramTensor:
    """``x / sqrt(mean(x**2) + eps) * gain`` along the rows of x [R, C]; gain [C]."""
    return _forward(nc, x, gain, None, eps)


@kernel
def rmsnorm_grad(
    nc: KernelBuilder, x: DramTensor, gain: DramTensor, gradient: DramTensor, *, eps: float = 1e-5
) -> Any:
    """Gradients of `rmsnorm` with respect to x and gain."""
    return _backward(nc, x, gain, gradient, eps, centred=False)


def _with_bias(function: Kernel, gradient_of: Kernel) -> None:
    """Gives a norm with a bias the gradient that a kernel of (x, gain, gradient) finds."""

    def backward(kept: Any, gradient: Any, **options: Any) -> Any:
        x, gain, bias = kept
        dx, d_gain, d_bias = gradient_of(x, gain, gradient, **options)
        return dx, d_gain, d_bias.astype(bias.dtype)

    function.defvjp(
        lambda x, gain, bias, **options: (function(x, gain, bias, **options), (x, gain, bias)),
        backward,
    )


_with_bias(layernorm, layernorm_grad)
_with_bias(batch_norm, batch_norm_grad)
rmsnorm.defvjp(
    lambda x, gain, **options: (rmsnorm(x, gain, **options), (x, gain)),
    lambda kept, gradient, **options: rmsnorm_grad(*kept, gradient, **options),
)
