"""TRANSPOSE and SHUFFLE, as kernels use them, against numpy."""

from collections.abc import Callable

import numpy as np
import pytest
import systolith
from systolith.errors import KernelError, UndefinedError
from systolith.kernel import DType, KernelBuilder, View

RNG = np.random.default_rng(2)


def run(
    build: Callable[[KernelBuilder, View, View], None],
    x: np.ndarray,
    shape: tuple[int, ...],
    *,
    config: str = "nano",
) -> np.ndarray:
    """Gives `build` a builder, a view that holds x, [lanes, ...], and one for the result, of
    `shape`, [lanes, ...]; returns what that holds."""
    nc = KernelBuilder(config)
    given = nc.dram.tensor("x", x.shape, x.dtype)
    out = nc.dram.tensor("out", shape, x.dtype, kind="output")
    source = nc.sbuf.tile(x[0].size).view(x.shape[1:], lanes=len(x))
    target = nc.sbuf.tile(int(np.prod(shape[1:]))).view(shape[1:], lanes=shape[0])
    nc.dma.load(source, given, lane_stride=4 * x[0].size)
    build(nc, source, target)
    nc.dma.store(target, out, lane_stride=4 * int(np.prod(shape[1:])))
    with systolith.Device("golden", config=config, check=True) as device:
        loaded = device.driver.load(nc.finish())
        device.driver.write(loaded.tensors["x"], x)
        loaded.run()
        return device.driver.read(loaded.tensors["out"])


@pytest.mark.parametrize("lanes", range(1, 5))
@pytest.mark.parametrize("columns", range(1, 5))
@pytest.mark.parametrize("blocks", [(), (3,), (2, 3)])
def test_transpose(lanes: int, columns: int, blocks: tuple[int, ...]) -> None:
    x = RNG.integers(0, 1 << 31, (lanes, *blocks, columns), np.int32)

    def turn(nc: KernelBuilder, src: View, dst: View) -> None:
        nc.vector.transpose(dst.astype(DType.INT32), src.astype(DType.INT32))

    found = run(turn, x, (columns, *blocks, lanes))
    np.testing.assert_array_equal(found, x.swapaxes(0, -1))


def test_transpose_rounds() -> None:
    x = RNG.normal(size=(4, 4)).astype(np.float32)

    def turn(nc: KernelBuilder, src: View, dst: View) -> None:
        nc.vector.transpose(dst.astype(DType.BF16), src)

    bits = x.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)
    np.testing.assert_array_equal(run(turn, x, (4, 4)), nearest.view(np.float32).T)


@pytest.mark.parametrize(
    "config,select",
    [
        ("nano", (3, 0, 0, 2)),
        ("nano", (1, 0)),
        ("small", (1, 0)),
        ("small", (2, 2, 0, 1)),
        ("medium", (7, 6, 5, 4, 3, 2, 1, 1)),
        ("medium", (3, 2, 1, 0)),
    ],
)
def test_shuffle(config: str, select: tuple[int, ...]) -> None:
    lanes = {"nano": 4, "small": 8, "medium": 16}[config]
    x = RNG.normal(size=(lanes, 5)).astype(np.float32)

    def move(nc: KernelBuilder, src: View, dst: View) -> None:
        nc.vector.shuffle(dst, src, select)

    groups = x.reshape(-1, len(select), 5)[:, list(select)]
    np.testing.assert_array_equal(run(move, x, x.shape, config=config), groups.reshape(x.shape))


@pytest.mark.parametrize("lane", range(4))
def test_broadcast_lane(lane: int) -> None:
    """The lanes of the destination may be more than those of the source."""
    x = RNG.normal(size=(lane + 1, 6)).astype(np.float32)

    def spread(nc: KernelBuilder, src: View, dst: View) -> None:
        nc.vector.broadcast_lane(dst, src, lane)

    np.testing.assert_array_equal(run(spread, x, (4, 6)), np.tile(x[lane], (4, 1)))


def test_undefined_words_keep_to_their_lanes() -> None:
    """What was never written goes where the instruction moves it, and nowhere else."""

    def execute(build: Callable[[KernelBuilder, View, View], View]) -> None:
        nc = KernelBuilder("nano")
        out = nc.dram.tensor("out", (4, 4), DType.FP32, kind="output")
        x, y = nc.sbuf.tile(4).view(), nc.sbuf.tile(4).view()
        nc.vector.memset(x.with_lanes(3), 1.0)
        stored = build(nc, x, y)
        nc.dma.store(stored, out, lane_stride=16)
        with systolith.Device("golden", config="nano", check=True) as device:
            device.driver.load(nc.finish()).run()

    def turned(nc: KernelBuilder, x: View, y: View, columns: int) -> View:
        nc.vector.transpose(y, x)
        return y[:columns]

    def shuffled(nc: KernelBuilder, x: View, y: View, select: tuple[int, ...]) -> View:
        nc.vector.shuffle(y, x, select)
        return y

    execute(lambda nc, x, y: turned(nc, x, y, 3))
    execute(lambda nc, x, y: shuffled(nc, x, y, (0, 1, 2, 2)))
    with pytest.raises(UndefinedError):
        execute(lambda nc, x, y: turned(nc, x, y, 4))
    with pytest.raises(UndefinedError):
        execute(lambda nc, x, y: shuffled(nc, x, y, (0, 3, 2, 2)))


REFUSED: dict[str, tuple[Callable[[KernelBuilder, View, View], object], str]] = {
    "blocks": (
        lambda nc, a, b: nc.vector.transpose(b[:, :3], a),
        r"need a dst of shape \(2, 4\) in 4 lanes, not \(2, 3\) in 4",
    ),
    "lanes": (
        lambda nc, a, b: nc.vector.transpose(b, a.with_lanes(3)),
        r"need a dst of shape \(2, 3\) in 4 lanes, not \(2, 4\) in 4",
    ),
    "in place": (lambda nc, a, b: nc.vector.transpose(a[::-1], a), "overlap"),
    "group": (lambda nc, a, b: nc.vector.shuffle(b, a, (0, 1, 2)), "of 2, 4 or 8 lanes, 4 at most"),
    "large group": (lambda nc, a, b: nc.vector.shuffle(b, a, range(8)), "4 at most"),
    "outside": (lambda nc, a, b: nc.vector.shuffle(b, a, (0, 1, 2, 4)), "each less than that"),
    "missing lane": (
        lambda nc, a, b: nc.vector.shuffle(b, a.with_lanes(2), (0, 0, 2, 2)),
        "lane 2 is wanted of 2",
    ),
    "no lane": (
        lambda nc, a, b: nc.vector.broadcast_lane(b, a.with_lanes(2), 2),
        "src0 has no lane 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    nc = KernelBuilder("nano")
    a, b = (nc.sbuf.tile(8).view((2, 4)) for _ in range(2))
    with pytest.raises(KernelError, match=message):
        call(nc, a, b)
