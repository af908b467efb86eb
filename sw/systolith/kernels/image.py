"""Convolution and pooling of images, channels across partitions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.source_info_util import register_exclusion
from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Space

from ..kernel import DramTensor, KernelBuilder, Tile, View
from ..kernel.function import kernel
from ..kernel.source import refuse
from .tiles import Ring, is_shape, parts, rank

register_exclusion(__file__)

_PIECES = 4  #: parts of an image that are loaded, and convolved, one after the other


class _Images(NamedTuple):
    """Sizes of a stack of images [batch, height, width, channels], as they lie in DRAM, and of the
    windows that go over them."""

    batch: int
    height: int
    width: int
    channels: int
    window: tuple[int, int]
    stride: int
    padding: int

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding - self.window[0]) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding - self.window[1]) // self.stride + 1

    @property
    def padded_width(self) -> int:
        return self.width + 2 * self.padding

    @property
    def padded_size(self) -> int:
        return (self.height + 2 * self.padding) * self.padded_width

    def load(
        self, nc: KernelBuilder, tile: Tile, x: DramTensor, image: int, first: int, lanes: int
    ) -> None:
        """One image's channels from `first` on, with zeros around it."""
        if self.padding:
            nc.vector.memset(tile.view(lanes=lanes), 0.0)
        # In pieces, so that work on the first rows begins before the last are there.
        for row, rows in parts(self.height, -(-self.height // _PIECES)):
            view, place = self._inside(tile, x, image, first, lanes, row, rows)
            nc.dma.load(view, x, **place)

    def store(
        self, nc: KernelBuilder, tile: Tile, out: DramTensor, image: int, first: int, lanes: int
    ) -> None:
        """Stores an image's channels from `first` on, without what is around it."""
        view, place = self._inside(tile, out, image, first, lanes, 0, self.height)
        nc.dma.store(view, out, **place)

    def _inside(
        self,
        tile: Tile,
        tensor: DramTensor,
        image: int,
        first: int,
        lanes: int,
        row: int,
        rows: int,
    ) -> tuple[View, dict[str, Any]]:
        """Rows of an image: the view of its tile, and where they lie in DRAM."""
        item, p = tensor.itemsize, self.padding
        view = tile.view(
            (rows, self.width), (self.padded_width, 1),
            offset=(p + row) * self.padded_width + p, lanes=lanes,
        )  # fmt: skip
        start = ((image * self.height + row) * self.width * self.channels + first) * item
        return view, {
            "base_offset_bytes": start,
            "dram_strides": (self.width * self.channels * item, self.channels * item),
            "lane_stride": item,
        }

    def tap(self, tile: Tile, i: int, j: int, row: int, rows: int, lanes: int) -> View:
        """What windows of `rows` rows of results, from `row` on, have at (i, j)."""
        return tile.view(
            (rows, self.out_width), (self.stride * self.padded_width, self.stride),
            offset=(row * self.stride + i) * self.padded_width + j, lanes=lanes,
        )  # fmt: skip

    def taps(self) -> Iterator[tuple[int, int]]:
        """All (i, j) of a window."""
        for i in range(self.window[0]):
            for j in range(self.window[1]):
                yield i, j

    def results(self, tensor: DramTensor, image: int, row: int, first: int) -> dict[str, Any]:
        """Where results of rows from `row` on, of channels from `first` on, lie in a tensor, as
        arguments of a transfer."""
        item = tensor.itemsize
        channels = tensor.shape[-1]
        start = (image * self.out_height + row) * self.out_width * channels + first
        return {
            "base_offset_bytes": start * item,
            "dram_strides": (self.out_width * channels * item, channels * item),
            "lane_stride": item,
        }


def _images(
    nc: KernelBuilder,
    x: DramTensor,
    size: tuple[int, int] | None,
    window: tuple[int, int],
    stride: int | None,
    padding: int = 0,
) -> _Images:
    """Checks x, [batch, height, width, channels], or [batch * height * width, channels] with
    `size` (height, width). `stride` defaults to the window's height."""
    stride = window[0] if stride is None else stride
    rank(x, 2, 4)
    if len(x.shape) == 4:
        batch, height, width, channels = x.shape
    else:
        if size is None:
            refuse(f"{x} is a matrix: its images need a size=(height, width)")
        pixels, channels = x.shape
        height, width = size
        if height < 1 or width < 1 or pixels % (height * width):
            refuse(f"{x} is not made of images of {height} x {width}")
        batch = pixels // (height * width)
    if stride < 1 or padding < 0 or min(window) < 1:
        refuse(
            f"window {window} and stride {stride} must be positive, padding {padding} not negative"
        )
    images = _Images(batch, height, width, channels, window, stride, padding)
    if height + 2 * padding < window[0] or width + 2 * padding < window[1]:
        refuse(f"a window of {window} is larger than the image of {height} x {width}")
    if images.padded_size > nc.config.sbuf_depth // 3:
        refuse(
            f"an image of {height} x {width} does not fit: with padding it has "
            f"{images.padded_size} words per partition, SBUF {nc.config.sbuf_depth}"
        )
    return images


def _result(nc: KernelBuilder, x: DramTensor, images: _Images, channels: int) -> DramTensor:
    shape: tuple[int, ...] = (images.batch, images.out_height, images.out_width, channels)
    if len(x.shape) == 2:
        shape = (images.batch * images.out_height * images.out_width, channels)
    return nc.output(shape, x.dtype)


@kernel
def conv2d(
    nc: KernelBuilder,
    x: DramTensor,
    weights: DramTensor,
    *,
    window: tuple[int, int],
    size: tuple[int, int] | None = None,
    stride: int = 1,
    padding: int = 0,
) -> DramTensor:
    """Convolution (without flipping) of images x [batch, height, width, channels] by weights
    [window height * window width * channels, outputs].

    In `jit`, where arrays have two dimensions, x is [batch * height * width, channels] with
    ``size=(height, width)``, and the result likewise. Operands are rounded to bfloat16. An image of
    N channels lies in SBUF once; each tap of the window is a view of it.
    """
    images = _images(nc, x, size, window, stride, padding)
    rank(weights, 2)
    outputs = weights.shape[1]
    taps, channels = window[0] * window[1], images.channels
    is_shape(weights, taps * channels, outputs)
    out = _result(nc, x, images, outputs)
    n, item = nc.config.lanes, weights.itemsize
    groups = parts(channels, n)
    width = images.out_width
    if width > nc.config.psum_depth // 2:
        refuse(f"a row of {width} results is more than half of PSUM holds")
    rows = min(-(-images.out_height // _PIECES), nc.config.psum_depth // 2 // width)
    # Weights [channels of a group, taps * outputs] stay.
    kept = []
    for first, lanes in groups:
        tile = nc.sbuf.tile(taps * outputs)
        nc.dma.load(
            tile.view((taps, outputs), lanes=lanes), weights, first * outputs * item,
            (channels * outputs * item, item), outputs * item,
        )  # fmt: skip
        kept.append(tile)
    ring = Ring(nc, Space.SBUF, images.padded_size, 2 * len(groups))
    sums = Ring(nc, Space.PSUM, rows * width)
    results = Ring(nc, Space.SBUF, rows * width)
    for image in range(images.batch):
        tiles = []
        for first, lanes in groups:
            tiles.append(ring.take())
            images.load(nc, tiles[-1], x, image, first, lanes)
        for row, count in parts(images.out_height, rows):
            for start, used in parts(outputs, n):
                psum = sums.take().view((count, width), lanes=used)
                more = False
                for (_, lanes), tile, weight in zip(groups, tiles, kept, strict=True):
                    for tap, (i, j) in enumerate(images.taps()):
                        nc.tensor.load_stationary(
                            weight.view(used, offset=tap * outputs + start, lanes=lanes)
                            .astype(DType.BF16)
                        )  # fmt: skip
                        moving = images.tap(tile, i, j, row, count, lanes).astype(DType.BF16)
                        nc.tensor.matmul(psum, moving, accumulate=more)
                        more = True
                done = results.take().view((count, width), lanes=used)
                nc.vector.copy(done, psum)
                nc.dma.store(done, out, **images.results(out, image, row, start))
    return out


def _pool(
    nc: KernelBuilder,
    x: DramTensor,
    window: tuple[int, int],
    size: tuple[int, int] | None,
    stride: int | None,
    op: AluOp,
    factor: float,
) -> DramTensor:
    """`op` over the windows, times `factor`."""
    images = _images(nc, x, size, window, stride)
    out = _result(nc, x, images, images.channels)
    ring = Ring(nc, Space.SBUF, images.padded_size)
    height, width = images.out_height, images.out_width
    results = Ring(nc, Space.SBUF, height * width)
    for image in range(images.batch):
        for first, lanes in parts(images.channels, nc.config.lanes):
            tile = ring.take()
            images.load(nc, tile, x, image, first, lanes)
            done = results.take().view((height, width), lanes=lanes)
            views = [images.tap(tile, i, j, 0, height, lanes) for i, j in images.taps()]
            nc.vector.copy(done, views[0])
            for view in views[1:]:
                nc.vector.tensor_tensor(done, done, op, view)
            if factor != 1.0:
                nc.vector.tensor_scalar(done, done, AluOp.MUL, factor)
            nc.dma.store(done, out, **images.results(out, image, 0, first))
    return out


@kernel
def max_pool(
    nc: KernelBuilder,
    x: DramTensor,
    *,
    window: tuple[int, int],
    size: tuple[int, int] | None = None,
    stride: int | None = None,
) -> DramTensor:
    """The largest element of each window of images [batch, height, width, channels]; `size` as of
    `conv2d`, `stride` defaults to the window's height."""
    return _pool(nc, x, window, size, stride, AluOp.MAX, 1.0)


@kernel
def avg_pool(
    nc: KernelBuilder,
    x: DramTensor,
    *,
    window: tuple[int, int],
    size: tuple[int, int] | None = None,
    stride: int | None = None,
) -> DramTensor:
    """The mean of each window; see `max_pool`."""
    return _pool(nc, x, window, size, stride, AluOp.ADD, 1.0 / (window[0] * window[1]))


@kernel
def conv2d_grad(
    nc: KernelBuilder,
    x: DramTensor,
    weights: DramTensor,
    gradient: DramTensor,
    *,
    window: tuple[int, int],
    size: tuple[int, int] | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Any:
    """Gradients of `conv2d` with respect to x and the weights.

    That of an image is summed in PSUM, each tap of the window onto a strided view of it, so PSUM
    must hold an image with its padding. That of the weights has pixels across partitions, a
    row's N at a time.
    """
    images = _images(nc, x, size, window, stride, padding)
    rank(weights, 2)
    outputs, channels = weights.shape[1], images.channels
    is_shape(weights, images.window[0] * images.window[1] * channels, outputs)
    _is_result(gradient, x, images, outputs)
    dx, dw = nc.output(x.shape, x.dtype), nc.output(weights.shape, weights.dtype)
    _of_images(nc, images, weights, gradient, dx)
    _of_weights(nc, images, x, gradient, dw)
    return dx, dw


def _of_images(
    nc: KernelBuilder, images: _Images, weights: DramTensor, gradient: DramTensor, dx: DramTensor
) -> None:
    """The gradient of the images."""
    n, item = nc.config.lanes, weights.itemsize
    outputs, channels = weights.shape[1], images.channels
    height, width = images.out_height, images.out_width
    if images.padded_size > nc.config.psum_depth:
        refuse(
            f"the gradient of an image of {images.height} x {images.width} does not fit: with "
            f"padding it has {images.padded_size} words per partition, PSUM {nc.config.psum_depth}"
        )
    taps = list(images.taps())
    groups = parts(outputs, n)
    # Weights [outputs of a group, taps * channels] stay.
    kept = []
    for first, lanes in groups:
        kept.append(nc.sbuf.tile(len(taps) * channels))
        nc.dma.load(kept[-1].view(lanes=lanes), weights, first * item, (outputs * item,), item)
    slopes = Ring(nc, Space.SBUF, height * width, 2 * len(groups))
    results = Ring(nc, Space.SBUF, images.padded_size)
    sums = nc.psum.tile(images.padded_size)
    for image in range(images.batch):
        tiles = []
        for first, lanes in groups:
            tiles.append(slopes.take())
            view = tiles[-1].view((height, width), lanes=lanes)
            nc.dma.load(view, gradient, **images.results(gradient, image, 0, first))
        for start, used in parts(channels, n):
            nc.vector.memset(sums.view(lanes=used), 0.0)
            for (_, lanes), tile, weight in zip(groups, tiles, kept, strict=True):
                for tap, (i, j) in enumerate(taps):
                    still = weight.view(used, offset=tap * channels + start, lanes=lanes)
                    nc.tensor.load_stationary(still.astype(DType.BF16))
                    nc.tensor.matmul(
                        images.tap(sums, i, j, 0, height, used),
                        tile.view((height, width), lanes=lanes).astype(DType.BF16),
                        accumulate=True,
                    )
            result = results.take()
            nc.vector.copy(result.view(lanes=used), sums.view(lanes=used))
            images.store(nc, result, dx, image, start, used)
    for tile in (*kept, *slopes.tiles, *results.tiles):
        nc.sbuf.free(tile)
    nc.psum.free(sums)


def _of_weights(
    nc: KernelBuilder, images: _Images, x: DramTensor, gradient: DramTensor, dw: DramTensor
) -> None:
    """The gradient of the weights."""
    n, s, p = nc.config.lanes, images.stride, images.padding
    outputs, channels = dw.shape[1], images.channels
    groups = parts(channels, n)
    rows = min(images.out_height, nc.config.sbuf_depth // 4 // (channels + outputs))
    if rows < 1:
        refuse(f"pixels of {channels} channels and {outputs} outputs do not fit into SBUF")
    pixels, slopes = Ring(nc, Space.SBUF, rows * channels), Ring(nc, Space.SBUF, rows * outputs)
    sums = [Ring(nc, Space.PSUM, outputs) for _ in groups]
    results = Ring(nc, Space.SBUF, outputs)
    for tap, (i, j) in enumerate(images.taps()):
        # Results whose window has (i, j) inside the image: others meet zeros.
        top, bottom = _reach(images.height, images.out_height, i, s, p)
        left, right = _reach(images.width, images.out_width, j, s, p)
        totals = [ring.take() for ring in sums]
        more = False
        for image in range(images.batch):
            for down, count in parts(max(0, bottom - top), rows):
                for across, lanes in parts(max(0, right - left), n):
                    row, column = top + down, left + across
                    tile, slope = pixels.take(), slopes.take()
                    start = (image * images.height + row * s + i - p) * images.width
                    start = (start + column * s + j - p) * channels
                    step = s * images.width * channels
                    nc.dma.load(
                        tile.view((count, channels), lanes=lanes), x, start * x.itemsize,
                        (step * x.itemsize, x.itemsize), s * channels * x.itemsize,
                    )  # fmt: skip
                    item = gradient.itemsize
                    start = (image * images.out_height + row) * images.out_width + column
                    nc.dma.load(
                        slope.view((count, outputs), lanes=lanes), gradient,
                        start * outputs * item,
                        (images.out_width * outputs * item, item), outputs * item,
                    )  # fmt: skip
                    for line in range(count):
                        moving = slope.view(outputs, offset=line * outputs, lanes=lanes)
                        for (first, used), total in zip(groups, totals, strict=True):
                            still = tile.view(used, offset=line * channels + first, lanes=lanes)
                            nc.tensor.load_stationary(still.astype(DType.BF16))
                            nc.tensor.matmul(
                                total.view(lanes=used), moving.astype(DType.BF16), accumulate=more
                            )
                        more = True
        for (first, used), total in zip(groups, totals, strict=True):
            result = results.take().view(lanes=used)
            if more:
                nc.vector.copy(result, total.view(lanes=used))
            else:
                nc.vector.memset(result, 0.0)
            start = (tap * channels + first) * outputs * dw.itemsize
            nc.dma.store(result, dw, start, lane_stride=outputs * dw.itemsize)


def _reach(size: int, results: int, tap: int, stride: int, padding: int) -> tuple[int, int]:
    """The first result whose window has its element `tap` inside the image, and the first after
    those."""
    first = -(-max(0, padding - tap) // stride)
    last = (size - 1 + padding - tap) // stride
    return first, min(results, last + 1)


def _is_result(gradient: DramTensor, x: DramTensor, images: _Images, channels: int) -> None:
    pixels = images.batch, images.out_height, images.out_width
    is_shape(gradient, *((math.prod(pixels),) if len(x.shape) == 2 else pixels), channels)


def _pool_grad(
    nc: KernelBuilder,
    x: DramTensor,
    gradient: DramTensor,
    window: tuple[int, int],
    size: tuple[int, int] | None,
    stride: int | None,
    *,
    largest: bool,
) -> DramTensor:
    """Spreads the gradient over the windows: evenly, or to the first largest element of each."""
    images = _images(nc, x, size, window, stride)
    _is_result(gradient, x, images, images.channels)
    out = nc.output(x.shape, x.dtype)
    height, width = images.out_height, images.out_width
    taps = list(images.taps())
    sums, slopes = Ring(nc, Space.SBUF, images.padded_size), Ring(nc, Space.SBUF, height * width)
    if largest:
        pixels = Ring(nc, Space.SBUF, images.padded_size, 1)
        top, taken, chosen = (nc.sbuf.tile(height * width).view((height, width)) for _ in range(3))
    for image in range(images.batch):
        for first, lanes in parts(images.channels, nc.config.lanes):
            total, slope = sums.take(), slopes.take().view((height, width), lanes=lanes)
            nc.dma.load(slope, gradient, **images.results(gradient, image, 0, first))
            nc.vector.memset(total.view(lanes=lanes), 0.0)
            spread = [images.tap(total, i, j, 0, height, lanes) for i, j in taps]
            if not largest:
                nc.vector.tensor_scalar(slope, slope, AluOp.MUL, 1.0 / len(taps))
                for view in spread:
                    nc.vector.tensor_tensor(view, view, AluOp.ADD, slope)
            else:
                tile = pixels.take()
                images.load(nc, tile, x, image, first, lanes)
                views = [images.tap(tile, i, j, 0, height, lanes) for i, j in taps]
                most, done, here = (v.with_lanes(lanes) for v in (top, taken, chosen))
                nc.vector.copy(most, views[0])
                for view in views[1:]:
                    nc.vector.tensor_tensor(most, most, AluOp.MAX, view)
                nc.vector.memset(done, 0.0)
                for view, part in zip(views, spread, strict=True):
                    nc.vector.tensor_tensor(here, view, AluOp.EQ, most)
                    nc.vector.tensor_tensor(here, here, AluOp.GT, done)  # and none was before
                    nc.vector.tensor_tensor(done, done, AluOp.MAX, here)
                    nc.vector.tensor_tensor(here, here, AluOp.MUL, slope)
                    nc.vector.tensor_tensor(part, part, AluOp.ADD, here)
            images.store(nc, total, out, image, first, lanes)
    return out


@kernel
def max_pool_grad(
    nc: KernelBuilder,
    x: DramTensor,
    gradient: DramTensor,
    *,
    window: tuple[int, int],
    size: tuple[int, int] | None = None,
    stride: int | None = None,
) -> DramTensor:
    """Gradient of `max_pool`: each window's goes to the first of its largest elements."""
    return _pool_grad(nc, x, gradient, window, size, stride, largest=True)


@kernel
def avg_pool_grad(
    nc: KernelBuilder,
    x: DramTensor,
    gradient: DramTensor,
    *,
    window: tuple[int, int],
    size: tuple[int, int] | None = None,
    stride: int | None = None,
) -> DramTensor:
    """Gradient of `avg_pool`; of x the shape and type count."""
    return _pool_grad(nc, x, gradient, window, size, stride, largest=False)


conv2d.defvjp(
    lambda x, weights, **options: (conv2d(x, weights, **options), (x, weights)),
    lambda kept, gradient, **options: conv2d_grad(*kept, gradient, **options),
)
max_pool.defvjp(
    lambda x, **options: (max_pool(x, **options), x),
    lambda x, gradient, **options: (max_pool_grad(x, gradient, **options),),
)
avg_pool.defvjp(
    lambda x, **options: (avg_pool(x, **options), x),
    lambda x, gradient, **options: (avg_pool_grad(x, gradient, **options),),
)
