"""Two-layer perceptrons whose hidden layer never leaves the chip."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Function, Space

from .. import nn
from ..kernel import DramTensor, KernelBuilder, Tile, View
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import Ring, is_shape, load_across, parts, rank

register_exclusion(__file__)

_BF16 = DType.BF16


class _Layers:
    """What both kinds have in common: panels of rows of x, and blocks of N hidden units."""

    def __init__(
        self, nc: KernelBuilder, x: DramTensor, up: DramTensor, down: DramTensor, gates: int
    ) -> None:
        for tensor in (x, up, down):
            rank(tensor, 2)
        self.nc = nc
        self.rows, self.inputs = x.shape
        self.hidden, self.outputs = down.shape
        is_shape(up, self.inputs, self.hidden)
        self.out = nc.output((self.rows, self.outputs), x.dtype)
        n = nc.config.lanes
        self.out_blocks = -(-self.outputs // n)
        self.in_tiles = -(-self.inputs // n)
        # Of each row PSUM holds the results, and hidden units twice.
        fit = nc.config.psum_depth // (self.out_blocks + 2 * gates)
        if fit < 1:
            refuse(f"{self.outputs} outputs of a row are more than PSUM holds")
        space = nc.config.sbuf_depth // 2 // (2 * self.in_tiles + 2 * gates + 4)
        self.width = max(1, min(self.rows, fit, space))
        self.x = x
        self._inputs = Ring(nc, Space.SBUF, self.in_tiles * self.width)
        self._up = Ring(nc, Space.SBUF, self.in_tiles * n, 2 * gates)
        self._down = Ring(nc, Space.SBUF, self.outputs)
        self._sums = nc.psum.tile(self.out_blocks * self.width)
        self._hidden_psum = Ring(nc, Space.PSUM, self.width, 2 * gates)
        self._hidden = Ring(nc, Space.SBUF, self.width, 2 * gates)
        self._results = Ring(nc, Space.SBUF, self.width, 3)
        #: first hidden unit and their view
        self._pending: tuple[int, View] | None = None

    def load(self, row: int, rows: int) -> Tile:
        """Rows of x, with the inputs across partitions."""
        tile = self._inputs.take()
        load_across(
            self.nc, tile, self.x, offset=row * self.inputs, rows=self.inputs, columns=rows,
            row_step=1, column_step=self.inputs,
        )  # fmt: skip
        return tile

    def product(self, weights: DramTensor, first: int, units: int, x: Tile, rows: int) -> View:
        """Hidden units ``x @ weights`` in PSUM, units across partitions."""
        tile = self._up.take()
        load_across(
            self.nc, tile, weights, offset=first, rows=self.inputs, columns=units,
            row_step=self.hidden, column_step=1,
        )  # fmt: skip
        psum = self._hidden_psum.take().view(rows, lanes=units)
        for i, (_, lanes) in enumerate(parts(self.inputs, self.nc.config.lanes)):
            self.nc.tensor.load_stationary(
                tile.view(units, offset=i * units, lanes=lanes).astype(_BF16)
            )
            self.nc.tensor.matmul(
                psum, x.view(rows, offset=i * rows, lanes=lanes).astype(_BF16), accumulate=i > 0
            )
        return psum

    def hidden_tile(self, units: int, rows: int) -> View:
        """Room for hidden units in SBUF."""
        return self._hidden.take().view(rows, lanes=units)

    def add(self, weights: DramTensor, first: int, hidden: View) -> None:
        """Adds what these hidden units, from `first` on, contribute to the results: after the
        products of the next ones, so that the array need not wait for the function."""
        self.finish(weights)
        self._pending = first, hidden

    def finish(self, weights: DramTensor) -> None:
        """Adds what is left of `add`."""
        if self._pending is None:
            return
        first, hidden = self._pending
        self._pending = None
        rows, units = hidden.shape[0], hidden.lanes
        tile = self._down.take()
        self.nc.dma.load(
            tile.view(self.outputs, lanes=units), weights,
            first * self.outputs * weights.itemsize,
            lane_stride=self.outputs * weights.itemsize,
        )  # fmt: skip
        for block, (start, lanes) in enumerate(parts(self.outputs, self.nc.config.lanes)):
            self.nc.tensor.load_stationary(
                tile.view(lanes, offset=start, lanes=units).astype(_BF16)
            )
            self.nc.tensor.matmul(
                self._sums.view(rows, offset=block * self.width, lanes=lanes),
                hidden.astype(_BF16),
                accumulate=first > 0,
            )

    def store(self, row: int, rows: int, bias: Tile | None) -> None:
        """Stores the results of these rows."""
        item = self.out.itemsize
        for block, (start, lanes) in enumerate(parts(self.outputs, self.nc.config.lanes)):
            sums = self._sums.view(rows, offset=block * self.width, lanes=lanes)
            result = self._results.take().view(rows, lanes=lanes)
            if bias is None:
                self.nc.vector.copy(result, sums)
            else:
                added = bias.view(1, offset=block, lanes=lanes)
                self.nc.vector.tensor_tensor(result, sums, AluOp.ADD, added)
            self.nc.dma.store(
                result, self.out, (row * self.outputs + start) * item,
                (self.outputs * item,), item,
            )  # fmt: skip


def _column(nc: KernelBuilder, vector: DramTensor) -> Tile:
    """A vector across partitions: element i in partition i % N, word i // N."""
    size = vector.shape[0]
    tile = nc.sbuf.tile(-(-size // nc.config.lanes))
    load_across(nc, tile, vector, offset=0, rows=size, columns=1, row_step=1, column_step=1)
    return tile


@kernel
def gelu_mlp(
    nc: KernelBuilder,
    x: DramTensor,
    up: DramTensor,
    up_bias: DramTensor,
    down: DramTensor,
    down_bias: DramTensor,
) -> DramTensor:
    """``gelu(x @ up + up_bias) @ down + down_bias``: x [R, I], up [I, H], down [H, O].

    Operands of products are rounded to bfloat16.
    """
    layers = _Layers(nc, x, up, down, 1)
    is_shape(up_bias, layers.hidden)
    is_shape(down_bias, layers.outputs)
    biases, last = _column(nc, up_bias), _column(nc, down_bias)
    n = nc.config.lanes
    for row, rows in parts(layers.rows, layers.width):
        tile = layers.load(row, rows)
        for first, units in parts(layers.hidden, n):
            sums = layers.product(up, first, units, tile, rows)
            hidden = layers.hidden_tile(units, rows)
            bias = biases.view(1, offset=first // n, lanes=units)
            nc.scalar.activate(hidden, sums, Function.GELU, bias=bias)
            layers.add(down, first, hidden)
        layers.finish(down)
        layers.store(row, rows, last)
    return layers.out


@kernel
def swiglu_mlp(
    nc: KernelBuilder, x: DramTensor, gate: DramTensor, up: DramTensor, down: DramTensor
) -> DramTensor:
    """``(silu(x @ gate) * (x @ up)) @ down``: x [R, I], gate and up [I, H], down [H, O].

    silu(a) is a * sigmoid(a). Operands of products are rounded to bfloat16.
    """
    layers = _Layers(nc, x, up, down, 2)
    is_shape(gate, layers.inputs, layers.hidden)
    for row, rows in parts(layers.rows, layers.width):
        tile = layers.load(row, rows)
        for first, units in parts(layers.hidden, nc.config.lanes):
            gates = layers.product(gate, first, units, tile, rows)
            values = layers.product(up, first, units, tile, rows)
            hidden, product = (layers.hidden_tile(units, rows) for _ in range(2))
            nc.scalar.activate(hidden, gates, Function.SIGMOID)
            nc.vector.tensor_tensor(product, gates, AluOp.MUL, values)
            nc.vector.tensor_tensor(hidden, hidden, AluOp.MUL, product)
            layers.add(down, first, hidden)
        layers.finish(down)
        layers.store(row, rows, None)
    return layers.out


def _gelu_reference(x: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
    return nn.gelu(x @ up + up_bias) @ down + down_bias


def _swiglu_reference(x: Any, gate: Any, up: Any, down: Any) -> Any:
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _by_reference(reference: Any) -> Any:
    """A backward rule: that of a JAX function, compiled; the hidden layer is computed again."""

    def backward(kept: Any, gradient: Any) -> Any:
        result, pull = jax.vjp(reference, *kept)
        return pull(gradient.astype(jnp.result_type(result)))

    return backward


gelu_mlp.defvjp(lambda *arrays: (gelu_mlp(*arrays), arrays), _by_reference(_gelu_reference))
swiglu_mlp.defvjp(lambda *arrays: (swiglu_mlp(*arrays), arrays), _by_reference(_swiglu_reference))
