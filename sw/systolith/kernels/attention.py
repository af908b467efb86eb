"""Attention, forward and backward, without the matrix of all scores ever being whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Function, Space

from ..kernel import DramTensor, KernelBuilder, Tile, View
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import Ring, in_turns, is_shape, load_across, parts, rank, same, store_across

register_exclusion(__file__)

_BF16 = DType.BF16


class _Head(NamedTuple):
    """Sizes of the problem, and where one head lies in the tensors, in elements."""

    queries: int
    keys: int
    depth: int
    pitch: int  #: from one query or key to the next
    q: int  #: first element of q
    k: int  #: first element of k
    sums: int  #: the sum of the first query
    sums_pitch: int


def _heads(q: DramTensor, k: DramTensor, v: DramTensor, count: int, causal: bool) -> list[_Head]:
    """Checks the arguments; returns the heads."""
    for tensor in (q, k, v):
        rank(tensor, 2, 3)
    same(k, v)
    if len(q.shape) == 3 and count != 1:
        refuse(f"{q} has its heads in its first dimension, which heads={count} does not name")
    if len(q.shape) != len(k.shape) or (1, *q.shape)[-3::2] != (1, *k.shape)[-3::2]:
        refuse(f"{q} and {k} differ in heads or depth")
    queries, keys, columns = q.shape[-2], k.shape[-2], q.shape[-1]
    if count < 1 or columns % count:
        refuse(f"the {columns} columns of {q} are not those of {count} heads")
    if causal and keys < queries:
        refuse(f"causal attention of {queries} queries needs as many keys, not {keys}")
    if len(q.shape) == 3:
        return [
            _Head(
                queries, keys, columns, columns,
                i * queries * columns, i * keys * columns, i * queries, 1,
            )
            for i in range(q.shape[0])
        ]  # fmt: skip
    depth = columns // count
    return [
        _Head(queries, keys, depth, columns, i * depth, i * depth, i, count) for i in range(count)
    ]


def _sums_shape(q: DramTensor, heads: int) -> tuple[int, ...]:
    """Of the logarithms of sums: one for each query and head."""
    return (q.shape[0], heads) if heads > 1 else q.shape[:-1]


class _Block(NamedTuple):
    """N queries or less: the first, how many, and how many keys the last of them sees."""

    first: int
    size: int
    visible: int


def _blocks(head: _Head, lanes: int, causal: bool) -> Iterator[_Block]:
    for first, count in parts(head.queries, lanes):
        seen = first + count + head.keys - head.queries if causal else head.keys
        yield _Block(first, count, seen)


def _hide(nc: KernelBuilder, scores: View, block: _Block, start: int) -> None:
    """Sets the scores of keys that a query does not see yet to -infinity; `start` is the first
    key."""
    # Of the last `size` keys that the block sees, the first query sees one, the last all.
    diagonal = block.visible - block.size
    low, high = max(diagonal, start), start + scores.shape[0]
    if low < high:
        part = scores[low - start : high - start]
        nc.vector.affine_select(
            part, part, AluOp.GE, -math.inf, steps=(-1,), base=diagonal - low, lane_step=1
        )


def _turn(nc: KernelBuilder, turned: Tile, weights: View) -> None:
    """Puts keys across partitions, N at a time: block i lies at word ``i * weights.lanes``."""
    (count,), n, lanes = weights.shape, nc.config.lanes, weights.lanes
    full, rest = divmod(count, n)
    if full:
        blocks = weights[: full * n].reshape(full, n)
        nc.vector.transpose(turned.view((full, lanes), lanes=n), blocks)
    if rest:
        block = turned.view(lanes, offset=full * lanes, lanes=rest)
        nc.vector.transpose(block, weights[full * n :])


def _across(head: _Head, first: int, count: int, k: bool) -> dict[str, int]:
    """Where `count` queries or keys lie with their depth across partitions."""
    start = (head.k if k else head.q) + first * head.pitch
    return {
        "offset": start, "rows": head.depth, "columns": count,
        "row_step": 1, "column_step": head.pitch,
    }  # fmt: skip


def _along(head: _Head, first: int, count: int, k: bool) -> dict[str, int]:
    """Where `count` queries or keys lie with themselves across partitions."""
    start = (head.k if k else head.q) + first * head.pitch
    return {
        "offset": start, "rows": count, "columns": head.depth,
        "row_step": head.pitch, "column_step": 1,
    }  # fmt: skip


def _scores(
    nc: KernelBuilder, dst: View, still: Tile, moving: Tile, head: _Head, apart: int, start: int
) -> None:
    """dst[i, j] = sum over the depth of still[d, i] * moving[d, start + j], both with the depth
    across partitions; the blocks of `moving` lie `apart` words apart."""
    for tile, (_, lanes) in enumerate(parts(head.depth, nc.config.lanes)):
        nc.tensor.load_stationary(
            still.view(dst.lanes, offset=tile * dst.lanes, lanes=lanes).astype(_BF16)
        )
        nc.tensor.matmul(
            dst,
            moving.view(dst.shape, offset=tile * apart + start, lanes=lanes).astype(_BF16),
            accumulate=tile > 0,
        )


class _Workspace:
    """What one block of queries is worked on with."""

    def __init__(self, nc: KernelBuilder, queries: int, chunk: int, depth: int) -> None:
        self.queries = nc.sbuf.tile(queries)
        self.weights, self.turned = nc.sbuf.tile(chunk), nc.sbuf.tile(chunk)
        self.scores = nc.psum.tile(chunk)
        self.result, self.sums = nc.sbuf.tile(depth), nc.psum.tile(depth)
        self.small = [nc.sbuf.tile(1) for _ in range(5)]


class _GradientWorkspace:
    """The same for the gradient."""

    def __init__(self, nc: KernelBuilder, queries: int, chunk: int, depth: int) -> None:
        self.q_across, self.g_across = nc.sbuf.tile(queries), nc.sbuf.tile(queries)
        self.q_along, self.g_along, self.result = (nc.sbuf.tile(depth) for _ in range(3))
        self.psums = [nc.psum.tile(chunk) for _ in range(2)]
        self.turned = nc.sbuf.tile(chunk)
        self.of_key, self.of_value = (
            nc.psum.tile(chunk // nc.config.lanes * depth) for _ in range(2)
        )
        self.of_query = nc.psum.tile(depth)
        self.weights = [nc.sbuf.tile(chunk) for _ in range(2)]
        self.small = [nc.sbuf.tile(1) for _ in range(2)]


def _attend(
    nc: KernelBuilder,
    q: DramTensor,
    k: DramTensor,
    v: DramTensor,
    causal: bool,
    scale: float | None,
    heads: int,
    *,
    keep: bool,
) -> tuple[DramTensor, ...]:
    """`attention`, and with `keep` the logarithm of the sum of each query's exponentials."""
    all_heads = _heads(q, k, v, heads, causal)
    head = all_heads[0]
    scale = 1.0 / math.sqrt(head.depth) if scale is None else scale
    if scale <= 0:
        refuse(f"scale must be positive, not {scale}")
    out = nc.output(q.shape, q.dtype)
    sums = nc.output(_sums_shape(q, heads), DType.FP32) if keep else None
    n, depth = nc.config.lanes, head.depth
    tiles = -(-depth // n)
    # Keys that are worked on at once.
    room = (nc.config.psum_depth // 2 - depth) // n
    if room < 1:
        refuse(f"a depth of {depth} is more than PSUM holds")
    chunk = n * min(room, 16, -(-head.keys // n))
    # All keys and values of a head stay if they take no more than half of SBUF.
    words = tiles * head.keys + -(-head.keys // n) * depth
    stays = words <= nc.config.sbuf_depth // 2
    span = head.keys if stays else chunk
    rings = [Ring(nc, Space.SBUF, tiles * span), Ring(nc, Space.SBUF, -(-span // n) * depth)]
    slots = [_Workspace(nc, tiles * n, chunk, depth) for _ in range(2)]

    def fetch(head: _Head, first: int, count: int, keys: Tile, values: Tile) -> None:
        load_across(nc, keys, k, **_across(head, first, count, True))
        load_across(nc, values, v, **_along(head, first, count, True))

    def job(
        head: _Head, keys: Tile, values: Tile, block: _Block, slot: _Workspace
    ) -> Iterator[None]:
        """The results of one block of queries."""
        lanes = block.size
        load_across(nc, slot.queries, q, **_across(head, block.first, lanes, False))
        top, total, new, minus, part = (tile.view(lanes=lanes) for tile in slot.small)
        result, sum_ = (tile.view(lanes=lanes) for tile in (slot.result, slot.sums))
        for start, count in parts(block.visible, chunk):
            if not stays:
                fetch(head, start, count, keys, values)
            apart, at = (head.keys, start) if stays else (count, 0)
            scores = slot.scores.view(count, lanes=lanes)
            _scores(nc, scores, slot.queries, keys, head, apart, at)
            yield
            if causal:
                _hide(nc, scores, block, start)
            # The running maximum.
            nc.vector.reduce(new, scores, AluOp.MAX)
            if start:
                nc.vector.tensor_tensor(new, new, AluOp.MAX, top, AluOp.MUL, scale)
            else:
                nc.vector.tensor_scalar(new, new, AluOp.MUL, scale)
            nc.vector.tensor_scalar(minus, new, AluOp.MUL, -1.0)
            yield
            # Rounded as the product takes them, so that weights add up to one.
            weights = slot.weights.view(count, lanes=lanes)
            nc.scalar.activate(weights.astype(_BF16), scores, Function.EXP, scale, minus)
            yield
            _turn(nc, slot.turned, weights)
            yield
            nc.vector.reduce(part, weights, AluOp.ADD)
            if start:
                # What the sums so far shrink by.
                nc.scalar.activate(top, top, Function.EXP, bias=minus)
                nc.vector.tensor_tensor(total, total, AluOp.MUL, top)
                nc.vector.tensor_tensor(total, total, AluOp.ADD, part)
                nc.vector.tensor_tensor(result, result, AluOp.MUL, top)
            else:
                nc.vector.copy(total, part)
            nc.vector.copy(top, new)
            yield
            first_value = start // n if stays else 0
            for i, (_, used) in enumerate(parts(count, n)):
                nc.tensor.load_stationary(
                    slot.turned.view(lanes, offset=i * lanes, lanes=used).astype(_BF16)
                )
                nc.tensor.matmul(
                    sum_,
                    values.view(depth, offset=(first_value + i) * depth, lanes=used).astype(_BF16),
                    accumulate=i > 0,
                )
            yield
            if start:
                nc.vector.tensor_tensor(result, result, AluOp.ADD, sum_)
            else:
                nc.vector.copy(result, sum_)
        nc.scalar.activate(part, total, Function.RECIPROCAL)
        nc.vector.tensor_tensor(result, result, AluOp.MUL, part)
        start, item = (head.q + block.first * head.pitch) * out.itemsize, out.itemsize
        nc.dma.store(result, out, start, lane_stride=head.pitch * item)
        if sums is not None:
            nc.scalar.activate(total, total, Function.LOG)
            nc.vector.tensor_tensor(total, total, AluOp.ADD, top)
            place = head.sums + block.first * head.sums_pitch
            nc.dma.store(total, sums, place * 4, lane_stride=head.sums_pitch * 4)

    def streamed(
        head: _Head, block: _Block, stream: tuple[_Workspace, Tile, Tile]
    ) -> Iterator[None]:
        slot, keys, values = stream
        return job(head, keys, values, block, slot)

    for head in all_heads:
        blocks = list(_blocks(head, n, causal))
        if stays:
            keys, values = (ring.take() for ring in rings)
            fetch(head, 0, head.keys, keys, values)
            in_turns(blocks, slots, functools.partial(job, head, keys, values))
        else:
            # Each of the two has keys and values of its own, a chunk at a time.
            streams = [(slot, rings[0].take(), rings[1].take()) for slot in slots]
            in_turns(blocks, streams, functools.partial(streamed, head))
    return (out,) if sums is None else (out, sums)


@kernel
def attention(
    nc: KernelBuilder,
    q: DramTensor,
    k: DramTensor,
    v: DramTensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    heads: int = 1,
) -> Any:
    """``softmax(q @ k.T * scale) @ v``: q [T, D], k and v [S, D], or all of them [heads, ...].

    Works on blocks of N queries and a chunk of keys at a time, with the running maximum and sum of
    an online softmax. Operands of products are rounded to bfloat16.

    Parameters
    ----------
    causal : query i sees keys 0 to i + S - T
    scale : default 1 / sqrt(D)
    heads : side by side in the columns of q, k and v of rank 2, D of each
    """
    return _attend(nc, q, k, v, causal, scale, heads, keep=False)


@kernel
def attention_forward(
    nc: KernelBuilder,
    q: DramTensor,
    k: DramTensor,
    v: DramTensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    heads: int = 1,
) -> Any:
    """`attention`, and of each query the logarithm of its sum of exponentials, for the gradient."""
    return _attend(nc, q, k, v, causal, scale, heads, keep=True)


@kernel
def attention_grad(
    nc: KernelBuilder,
    q: DramTensor,
    k: DramTensor,
    v: DramTensor,
    out: DramTensor,
    sums: DramTensor,
    gradient: DramTensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    heads: int = 1,
) -> Any:
    """Gradients of `attention` with respect to q, k and v.

    `out` and `sums` are from `attention_forward`, `gradient` is that of `out`. The weights are
    computed again, chunk by chunk. Keys, values and the sums of their gradients stay in SBUF.
    """
    all_heads = _heads(q, k, v, heads, causal)
    head = all_heads[0]
    same(q, out, gradient)
    is_shape(sums, *_sums_shape(q, heads))
    scale = 1.0 / math.sqrt(head.depth) if scale is None else scale
    dq, dk, dv = (nc.output(tensor.shape, tensor.dtype) for tensor in (q, k, v))
    n, depth = nc.config.lanes, head.depth
    tiles, key_blocks = -(-depth // n), -(-head.keys // n)
    room = (nc.config.psum_depth - 2 * depth) // (2 * (2 * n + 2 * depth))
    if room < 1:
        refuse(f"a depth of {depth} is more than PSUM holds")
    chunk = n * min(room, 16, key_blocks)
    keys_across, values_across = (nc.sbuf.tile(tiles * head.keys) for _ in range(2))
    keys_along = nc.sbuf.tile(key_blocks * depth)
    of_keys, of_values = (nc.sbuf.tile(key_blocks * depth) for _ in range(2))
    slots = [_GradientWorkspace(nc, tiles * n, chunk, depth) for _ in range(2)]

    def job(head: _Head, block: _Block, slot: _GradientWorkspace) -> Iterator[None]:
        """The gradient of one block of queries, and its part of those of keys and values."""
        lanes = block.size
        for tile, tensor, how in (
            (slot.q_across, q, _across), (slot.g_across, gradient, _across),
            (slot.q_along, q, _along), (slot.g_along, gradient, _along), (slot.result, out, _along),
        ):  # fmt: skip
            load_across(nc, tile, tensor, **how(head, block.first, lanes, False))
        queries, slope, result = (
            tile.view(lanes=lanes) for tile in (slot.q_along, slot.g_along, slot.result)
        )
        minus, dot = (tile.view(lanes=lanes) for tile in slot.small)
        place = head.sums + block.first * head.sums_pitch
        nc.dma.load(minus, sums, place * 4, lane_stride=head.sums_pitch * 4)
        nc.vector.tensor_scalar(minus, minus, AluOp.MUL, -1.0)
        nc.vector.tensor_tensor(result, result, AluOp.MUL, slope)
        nc.vector.reduce(dot, result, AluOp.ADD)
        of_query = slot.of_query.view(lanes=lanes)
        for start, count in parts(block.visible, chunk):
            scores, slopes = (tile.view(count, lanes=lanes) for tile in slot.psums)
            weights, changes = (tile.view(count, lanes=lanes) for tile in slot.weights)
            _scores(nc, scores, slot.q_across, keys_across, head, head.keys, start)
            _scores(nc, slopes, slot.g_across, values_across, head, head.keys, start)
            yield
            if causal:
                _hide(nc, scores, block, start)
            nc.scalar.activate(weights, scores, Function.EXP, scale, minus)
            # Gradient of the scores: weights * (slopes - dot) * scale.
            nc.vector.tensor_tensor(changes, slopes, AluOp.SUB, dot)
            yield
            nc.vector.tensor_tensor(changes, changes, AluOp.MUL, weights, AluOp.MUL, scale)
            yield
            for i, (key, used) in enumerate(parts(count, n)):
                nc.tensor.load_stationary(weights[key : key + used].astype(_BF16))
                nc.tensor.matmul(
                    slot.of_value.view(depth, offset=i * depth, lanes=used), slope.astype(_BF16)
                )
                nc.tensor.load_stationary(changes[key : key + used].astype(_BF16))
                nc.tensor.matmul(
                    slot.of_key.view(depth, offset=i * depth, lanes=used), queries.astype(_BF16)
                )
            _turn(nc, slot.turned, changes)
            yield
            # Whole blocks of keys in one instruction, then what is left.
            full, rest = divmod(count, n)
            for first, size, used in ((0, full, n), (full, 1, rest)):
                if size and used:
                    at = (start // n + first) * depth
                    for total, psum in ((of_values, slot.of_value), (of_keys, slot.of_key)):
                        view = total.view(size * depth, offset=at, lanes=used)
                        part = psum.view(size * depth, offset=first * depth, lanes=used)
                        nc.vector.tensor_tensor(view, view, AluOp.ADD, part)
            yield
            for i, (_, used) in enumerate(parts(count, n)):
                nc.tensor.load_stationary(
                    slot.turned.view(lanes, offset=i * lanes, lanes=used).astype(_BF16)
                )
                values = keys_along.view(depth, offset=(start // n + i) * depth, lanes=used)
                nc.tensor.matmul(of_query, values.astype(_BF16), accumulate=start + i > 0)
            yield
        # The product of gradient and result is not needed any more: its tile takes the gradient.
        nc.vector.copy(result, of_query)
        start, item = (head.q + block.first * head.pitch) * dq.itemsize, dq.itemsize
        nc.dma.store(result, dq, start, lane_stride=head.pitch * item)

    for head in all_heads:
        load_across(nc, keys_across, k, **_across(head, 0, head.keys, True))
        load_across(nc, values_across, v, **_across(head, 0, head.keys, True))
        load_across(nc, keys_along, k, **_along(head, 0, head.keys, True))
        nc.vector.memset(of_keys.view(), 0.0)
        nc.vector.memset(of_values.view(), 0.0)
        in_turns(list(_blocks(head, n, causal)), slots, functools.partial(job, head))
        for tile, tensor in ((of_keys, dk), (of_values, dv)):
            store_across(
                nc, tile, tensor, offset=head.k, rows=head.keys, columns=depth,
                row_step=head.pitch,
            )  # fmt: skip
    return dq, dk, dv


def _attention_forward(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, sums = attention_forward(q, k, v, **options)
    return out, (q, k, v, out, sums)


attention.defvjp(
    _attention_forward,
    lambda kept, gradient, **options: attention_grad(*kept, gradient, **options),
)
