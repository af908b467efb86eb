"""Softmax and cross-entropy along rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Function, RowSums

from ..kernel import DramTensor, KernelBuilder, View
from ..kernel.function import kernel
from .tiles import Panel, add, over_panels, rank, same, sum_of_products

register_exclusion(__file__)


def _exponentials(nc: KernelBuilder, tile: View, top: View) -> Iterator[None]:
    """tile = exp(tile - maximum of its row), with the sum of each row behind it, for which `tile`
    has an element more than the row; top = -maximum."""
    values = tile.first(tile.shape[-1] - 1)
    nc.vector.reduce(top, values, AluOp.MAX)
    nc.vector.tensor_scalar(top, top, AluOp.MUL, -1.0)
    yield
    nc.scalar.activate(tile, values, Function.EXP, bias=top, sums=RowSums.BEHIND)


@kernel
def softmax(nc: KernelBuilder, x: DramTensor) -> DramTensor:
    """``exp(x - max) / sum(exp(x - max))`` along the rows of x [R, C]."""
    rank(x, 2)
    rows, columns = x.shape
    out = nc.output(x.shape, x.dtype)

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (whole,), (top,) = tiles, small
        tile, total = whole.first(columns), whole.last(1)
        nc.dma.load(tile, x, **panel.place(nc, x))
        yield from _exponentials(nc, whole, top)
        nc.scalar.activate(total, total, Function.RECIPROCAL)
        yield
        nc.vector.tensor_tensor(tile, tile, AluOp.MUL, total)
        nc.dma.store(tile, out, **panel.place(nc, out))

    over_panels(nc, rows, columns + 1, 1, 1, job)
    return out


@kernel
def softmax_grad(nc: KernelBuilder, y: DramTensor, gradient: DramTensor) -> DramTensor:
    """Gradient of `softmax` from its result and that of it: ``y * (g - sum(y * g))``."""
    rank(y, 2)
    same(y, gradient)
    rows, columns = y.shape
    out = nc.output(y.shape, y.dtype)

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (tile, other), (total,) = tiles, small
        nc.dma.load(tile, y, **panel.place(nc, y))
        nc.dma.load(other, gradient, **panel.place(nc, gradient))
        sum_of_products(nc, total, tile, other)
        yield
        nc.vector.tensor_scalar(total, total, AluOp.MUL, -1.0)
        yield
        add(nc, other, other, total)
        yield
        nc.vector.tensor_tensor(other, other, AluOp.MUL, tile)
        nc.dma.store(other, out, **panel.place(nc, out))

    over_panels(nc, rows, columns, 2, 1, job)
    return out


def _softmax_forward(x: Any) -> Any:
    y = softmax(x)
    return y, y


softmax.defvjp(_softmax_forward, lambda y, gradient: (softmax_grad(y, gradient),))


def _losses(
    nc: KernelBuilder, logits: DramTensor, labels: DramTensor, *, keep: bool
) -> tuple[DramTensor, ...]:
    """The losses of `cross_entropy`, and with `keep` the logarithm of each row's sum."""
    rank(logits, 2)
    rank(labels, 2)
    same(logits, labels)
    rows, columns = logits.shape
    out = nc.output((rows,), DType.FP32)
    sums = nc.output((rows,), DType.FP32) if keep else None

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (whole, label), (top, weight, dot) = tiles, small
        tile, total, label = whole.first(columns), whole.last(1), label.first(columns)
        nc.dma.load(tile, logits, **panel.place(nc, logits))
        nc.dma.load(label, labels, **panel.place(nc, labels))
        nc.vector.reduce(weight, label, AluOp.ADD)
        sum_of_products(nc, dot, label, tile)
        yield from _exponentials(nc, whole, top)
        nc.scalar.activate(total, total, Function.LOG)
        yield
        nc.vector.tensor_tensor(total, total, AluOp.SUB, top)
        if sums is not None:
            nc.dma.store(total, sums, **panel.place(nc, sums))
        nc.vector.tensor_tensor(weight, weight, AluOp.MUL, total)
        nc.vector.tensor_tensor(weight, weight, AluOp.SUB, dot)
        nc.dma.store(weight, out, **panel.place(nc, out))

    over_panels(nc, rows, columns + 1, 2, 3, job)
    return (out,) if sums is None else (out, sums)


@kernel
def cross_entropy(nc: KernelBuilder, logits: DramTensor, labels: DramTensor) -> Any:
    """``-sum(labels * log_softmax(logits))`` of each row: [R, C] twice to [R], float32.

    Labels are weights, one-hot for plain classes.
    """
    return _losses(nc, logits, labels, keep=False)


@kernel
def cross_entropy_forward(nc: KernelBuilder, logits: DramTensor, labels: DramTensor) -> Any:
    """`cross_entropy`, and the logarithm of the sum of exponentials of each row."""
    return _losses(nc, logits, labels, keep=True)


@kernel
def cross_entropy_grad(
    nc: KernelBuilder,
    logits: DramTensor,
    labels: DramTensor,
    sums: DramTensor,
    gradient: DramTensor,
) -> DramTensor:
    """Gradient with respect to the logits: ``(softmax(logits) * sum(labels) - labels) * g``.

    `sums` is from `cross_entropy_forward`, `gradient` [R] is that of the losses.
    """
    rank(logits, 2)
    same(logits, labels)
    rank(sums, 1)
    same(sums, gradient)
    rows, columns = logits.shape
    out = nc.output(logits.shape, logits.dtype)

    def job(panel: Panel, tiles: list[View], small: list[View]) -> Iterator[None]:
        (tile, label), (total, scale, weight) = tiles, small
        nc.dma.load(total, sums, **panel.place(nc, sums))
        nc.dma.load(scale, gradient, **panel.place(nc, gradient))
        nc.dma.load(tile, logits, **panel.place(nc, logits))
        nc.dma.load(label, labels, **panel.place(nc, labels))
        nc.vector.tensor_scalar(total, total, AluOp.MUL, -1.0)
        nc.vector.reduce(weight, label, AluOp.ADD)
        yield
        nc.scalar.activate(tile, tile, Function.EXP, bias=total)
        yield
        nc.vector.tensor_tensor(tile, tile, AluOp.MUL, weight)
        yield
        add(nc, tile, label, tile, scale=-1.0)
        yield
        nc.vector.tensor_tensor(tile, tile, AluOp.MUL, scale)
        nc.dma.store(tile, out, **panel.place(nc, out))

    over_panels(nc, rows, columns, 2, 3, job)
    return out


def _cross_entropy_forward(logits: Any, labels: Any) -> Any:
    loss, sums = cross_entropy_forward(logits, labels)
    return loss, (logits, labels, sums)


def _cross_entropy_backward(kept: Any, gradient: Any) -> Any:
    logits, labels, sums = kept
    # What nobody asks for is never computed: the gradient of the labels is plain arithmetic.
    of_labels = (sums[:, None] - logits) * gradient[:, None]
    return (
        cross_entropy_grad(logits, labels, sums, gradient),
        of_labels.astype(labels.dtype),
    )


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
