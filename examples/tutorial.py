"""The kernels of docs/tutorial.md, from a vector add to fused attention.

    python examples/tutorial.py [--device rtl] [--config nano]

Each is compared with numpy, and its cycles are printed (the device "golden" has no clock).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import systolith
from systolith import kernels
from systolith.kernel import AluOp, DType, Function

FP32 = 4  # bytes


@systolith.kernel
def add_one_tile(nc, x, y):
    out = nc.output(x.shape, x.dtype)
    n, (rows, columns) = nc.config.lanes, x.shape
    a, b = nc.sbuf.tile(columns).view(), nc.sbuf.tile(columns).view()
    for row in range(0, rows, n):
        place = {"base_offset_bytes": row * columns * FP32, "lane_stride": columns * FP32}
        nc.dma.load(a, x, **place)
        nc.dma.load(b, y, **place)
        nc.vector.tensor_tensor(a, a, AluOp.ADD, b)
        nc.dma.store(a, out, **place)
    return out


@systolith.kernel
def add_in_turns(nc, x, y):
    out = nc.output(x.shape, x.dtype)
    n, (rows, columns) = nc.config.lanes, x.shape
    tiles = [(nc.sbuf.tile(columns).view(), nc.sbuf.tile(columns).view()) for _ in range(3)]
    for turn, row in enumerate(range(0, rows, n)):
        a, b = tiles[turn % 3]
        place = {"base_offset_bytes": row * columns * FP32, "lane_stride": columns * FP32}
        nc.dma.load(a, x, **place)
        nc.dma.load(b, y, **place)
        nc.vector.tensor_tensor(a, a, AluOp.ADD, b)
        nc.dma.store(a, out, **place)
    return out


@systolith.kernel
def add_long(nc, x, y):
    out = nc.output(x.shape, x.dtype)
    n, size, count = nc.config.lanes, math.prod(x.shape), 128
    tiles = [(nc.sbuf.tile(count).view(), nc.sbuf.tile(count).view()) for _ in range(3)]
    for turn, first in enumerate(range(0, size, n * count)):
        a, b = tiles[turn % 3]
        # Neighbours in DRAM go to neighbouring partitions, N after N to the next word.
        place = {
            "base_offset_bytes": first * FP32,
            "dram_strides": (n * FP32,),
            "lane_stride": FP32,
        }
        nc.dma.load(a, x, **place)
        nc.dma.load(b, y, **place)
        nc.vector.tensor_tensor(a, a, AluOp.ADD, b)
        nc.dma.store(a, out, **place)
    return out


@systolith.kernel
def product_by_tiles(nc, a, b):
    (rows, depth), columns = a.shape, b.shape[1]
    out = nc.output((rows, columns), DType.FP32)
    n = nc.config.lanes
    for row in range(0, rows, n):
        for column in range(0, columns, n):
            sums, result = nc.psum.tile(n), nc.sbuf.tile(n)
            for k in range(0, depth, n):
                left, right = nc.sbuf.tile(n), nc.sbuf.tile(n)
                # Partition k holds a[row:, k], and b[k, column:].
                start = (row * depth + k) * FP32
                nc.dma.load(left.view(), a, start, (depth * FP32,), FP32)
                nc.dma.load(right.view(), b, (k * columns + column) * FP32, None, columns * FP32)
                nc.tensor.load_stationary(left.view())
                nc.tensor.matmul(sums.view(), right.view(), accumulate=k > 0)
                nc.sbuf.free(left)
                nc.sbuf.free(right)
            nc.vector.copy(result.view(), sums.view())
            nc.dma.store(result.view(), out, (row * columns + column) * FP32, None, columns * FP32)
            nc.psum.free(sums)
            nc.sbuf.free(result)
    return out


@systolith.kernel
def product_by_panels(nc, a, b):
    (rows, depth), columns = a.shape, b.shape[1]
    out = nc.output((rows, columns), DType.FP32)
    n = nc.config.lanes
    tiles = depth // n
    left, right = nc.sbuf.tile(tiles * rows), nc.sbuf.tile(tiles * columns)
    # K across partitions, N rows after N rows: all of both in one transfer each.
    nc.dma.load(left.view((tiles, rows)), a, 0, (n * FP32, depth * FP32), FP32)
    nc.dma.load(right.view((tiles, columns)), b, 0, (n * columns * FP32, FP32), columns * FP32)
    for block in range(rows // n):
        sums, result = nc.psum.tile(columns), nc.sbuf.tile(columns)
        for k in range(tiles):
            nc.tensor.load_stationary(left.view(n, offset=k * rows + block * n))
            moving = right.view(columns, offset=k * columns)
            nc.tensor.matmul(sums.view(), moving, accumulate=k > 0)
        nc.vector.copy(result.view(), sums.view())
        nc.dma.store(result.view(), out, block * n * columns * FP32, None, columns * FP32)
    return out


@systolith.kernel
def softmax(nc, x):
    out = nc.output(x.shape, x.dtype)
    n, (rows, columns) = nc.config.lanes, x.shape
    for row in range(0, rows, n):
        place = {"base_offset_bytes": row * columns * FP32, "lane_stride": columns * FP32}
        tile, top, total = (nc.sbuf.tile(size).view() for size in (columns, 1, 1))
        nc.dma.load(tile, x, **place)
        nc.vector.reduce(top, tile, AluOp.MAX)
        nc.vector.tensor_scalar(top, top, AluOp.MUL, -1.0)
        nc.scalar.activate(tile, tile, Function.EXP, bias=top)  # exp(tile - maximum)
        nc.vector.reduce(total, tile, AluOp.ADD)
        nc.scalar.activate(total, total, Function.RECIPROCAL)
        nc.vector.tensor_tensor(tile, tile, AluOp.MUL, total)
        nc.dma.store(tile, out, **place)
    return out


def attention_in_three(q, k, v):
    """Three kernels; the scores go through DRAM twice."""
    scores = kernels.matmul(q, k, transpose_b=True)
    weights = softmax(scores * (1.0 / math.sqrt(q.shape[1])))
    return product_by_panels(weights, v)


def queries(nc, q, k, v, out, keys, values, identity, block):
    """Attention of the queries `block` to `block + N`; yields where it waits for an engine."""
    n, depth = nc.config.lanes, q.shape[1]
    count = k.shape[0]
    query, weights = nc.sbuf.tile(n), nc.sbuf.tile(count)
    scores, turned, sums = nc.psum.tile(count), nc.psum.tile(count), nc.psum.tile(depth)
    top, total, result = (nc.sbuf.tile(size).view() for size in (1, 1, depth))

    # scores[i, j] = q[i] . k[j], query i in partition i.
    start = block * depth * FP32
    nc.dma.load(query.view(lanes=depth), q, start, (depth * FP32,), FP32)
    nc.tensor.load_stationary(query.view(lanes=depth))
    nc.tensor.matmul(scores.view(), keys.view(lanes=depth))
    yield

    # weights = exp((scores - maximum) / sqrt(depth)); their sums are divided by at the end.
    scale = 1.0 / math.sqrt(depth)
    nc.vector.reduce(top, scores.view(), AluOp.MAX)
    nc.vector.tensor_scalar(top, top, AluOp.MUL, -scale)
    yield
    nc.scalar.activate(weights.view(), scores.view(), Function.EXP, scale, top)
    yield

    # Keys must lie across partitions: a product with the identity transposes N x N weights.
    for j in range(0, count, n):
        nc.tensor.load_stationary(weights.view(n, offset=j))
        nc.tensor.matmul(turned.view(n, offset=j), identity)
    nc.vector.reduce(total, weights.view(), AluOp.ADD)
    yield
    nc.scalar.activate(weights.view(), turned.view(), Function.IDENTITY)
    yield
    for j in range(0, count, n):
        nc.tensor.load_stationary(weights.view(n, offset=j))
        moving = values.view(depth, offset=j // n * depth)
        nc.tensor.matmul(sums.view(), moving, accumulate=j > 0)
    nc.scalar.activate(total, total, Function.RECIPROCAL)
    yield
    nc.vector.tensor_tensor(result, sums.view(), AluOp.MUL, total)
    nc.dma.store(result, out, start, lane_stride=depth * FP32)
    for tile in (query, weights, top.tile, total.tile, result.tile):
        nc.sbuf.free(tile)
    for tile in (scores, turned, sums):
        nc.psum.free(tile)


def prepare(nc, q, k, v):
    """What all queries share: the result, keys [D, S], values [S, D], the identity."""
    n, depth, count = nc.config.lanes, q.shape[1], k.shape[0]
    out = nc.output(q.shape, q.dtype)
    keys, values = nc.sbuf.tile(count), nc.sbuf.tile(count // n * depth)
    nc.dma.load(keys.view(lanes=depth), k, 0, (depth * FP32,), FP32)
    strides = n * depth * FP32, FP32
    nc.dma.load(values.view((count // n, depth)), v, 0, strides, depth * FP32)
    ones = nc.dram.tensor("identity", kind="constant", data=np.eye(n, dtype=np.float32))
    identity = nc.sbuf.tile(n).view()
    nc.dma.load(identity, ones, lane_stride=n * FP32)
    return out, keys, values, identity


@systolith.kernel
def attention_fused(nc, q, k, v):
    shared = prepare(nc, q, k, v)
    for block in range(0, q.shape[0], nc.config.lanes):
        for _ in queries(nc, q, k, v, *shared, block):
            pass
    return shared[0]


@systolith.kernel
def attention_in_turns(nc, q, k, v):
    shared = prepare(nc, q, k, v)
    n = nc.config.lanes
    for block in range(0, q.shape[0], 2 * n):
        pair = [queries(nc, q, k, v, *shared, start) for start in (block, block + n)]
        while pair:
            pair = [one for one in pair if next(one, "done") != "done"]
    return shared[0]


Step = tuple[str, Callable[..., Any], tuple[np.ndarray, ...], np.ndarray, float]


def steps() -> Iterator[Step]:
    """(name, function, arrays, what it should give, largest error) of each step."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        # Numbers that bfloat16 has: products round their operands to it.
        return rng.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)

    x, y = array(64, 32), array(64, 32)
    for add in (add_one_tile, add_in_turns, add_long):
        yield add.name, add, (x, y), x + y, 0.0
    a, b = array(32, 32), array(32, 32)
    for product in (product_by_tiles, product_by_panels):
        yield product.name, product, (a, b), a @ b, 1e-5
    e = np.exp(x - x.max(axis=1, keepdims=True))
    yield softmax.name, softmax, (x,), e / e.sum(axis=1, keepdims=True), 1e-6
    q, k, v = array(32, 4), array(32, 4), array(32, 4)
    scores = np.exp(q @ k.T / 2.0)
    result = scores @ v / scores.sum(axis=1, keepdims=True)
    for attention in (attention_in_three, attention_fused, attention_in_turns):
        yield attention.__name__, attention, (q, k, v), result, 0.01
    yield "library", lambda q, k, v: kernels.attention(q, k, v), (q, k, v), result, 0.01


def measure(device: systolith.Device) -> dict[str, int | None]:
    """Runs every step; returns its cycles, None on a device without a clock."""
    cycles = {}
    for name, function, arrays, wanted, error in steps():
        run = systolith.jit(function, device=device)
        np.testing.assert_allclose(run(*arrays), wanted, rtol=0, atol=error, err_msg=name)
        cycles[name] = run.stats()["cycles"]
    return cycles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="golden", choices=("golden", "rtl", "rtl-fast"))
    parser.add_argument("--config", default="nano")
    options = parser.parse_args()
    with systolith.Device(options.device, config=options.config) as device:
        for name, cycles in measure(device).items():
            print(f"{name:20} {'' if cycles is None else f'{cycles:,}'}")


if __name__ == "__main__":
    main()
