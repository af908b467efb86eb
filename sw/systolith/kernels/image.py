"""Convolution and pooling of images, channels across partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
        item, p = x.itemsize, self.padding
        if p:
            nc.vector.memset(tile.view(lanes=lanes), 0.0)
        # In pieces, so that work on the first rows begins before the last are there.
        for row, rows in parts(self.height, -(-self.height // _PIECES)):
            nc.dma.load(
                tile.view(
                    (rows, self.width), (self.padded_width, 1),
                    offset=(p + row) * self.padded_width + p, lanes=lanes,
                ),
                x,
                ((image * self.height + row) * self.width * self.channels + first) * item,
                (self.width * self.channels * item, self.channels * item),
                item,
            )  # fmt: skip

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

    def store(
        self,
        nc: KernelBuilder,
        view: View,
        out: DramTensor,
        image: int,
        row: int,
        first: int,
        channels: int,
    ) -> None:
        """Results of rows from `row` on, of channels from `first` on."""
        item = out.itemsize
        start = (image * self.out_height + row) * self.out_width * channels + first
        nc.dma.store(
            view, out, start * item, (self.out_width * channels * item, channels * item), item
        )


def _images(
    nc: KernelBuilder,
    x: DramTensor,
    size: tuple[int, int] | None,
    window: tuple[int, int],
    stride: int,
    padding: int,
) -> _Images:
    """Checks x, [batch, height, width, channels], or [batch * height * width, channels] with
    `size` (height, width)."""
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
        refuse(f"window {window}, stride {stride} and padding {padding} must be positive")
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
                images.store(nc, done, out, image, row, start, outputs)
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
    images = _images(nc, x, size, window, window[0] if stride is None else stride, 0)
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
            images.store(nc, done, out, image, 0, first, images.channels)
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
