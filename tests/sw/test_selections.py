"""Affine numbers and selections of the vector engine, as kernels use them."""

from collections.abc import Callable

import numpy as np
import pytest
import systolith
from systolith.errors import KernelError, UndefinedError
from systolith.kernel import AluOp, DType, KernelBuilder, View

N = 4
COLUMNS = 12


def run(
    build: Callable[[KernelBuilder, View, View], None], x: np.ndarray, *, integer: bool = False
) -> np.ndarray:
    """Gives `build` a builder, a tile that holds x and an output tile; returns what that holds."""
    nc = KernelBuilder("nano")
    kind = DType.INT32 if integer else DType.FP32
    given = nc.dram.tensor("x", x.shape, x.dtype)
    out = nc.dram.tensor("out", (N, COLUMNS), kind, kind="output")
    source, target = nc.sbuf.tile(x.shape[1]).view(), nc.sbuf.tile(COLUMNS).view()
    nc.dma.load(source, given, lane_stride=4 * x.shape[1])
    build(nc, source, target.astype(kind))
    nc.dma.store(target, out, lane_stride=4 * COLUMNS)
    with systolith.Device("golden", config="nano", check=True) as device:
        loaded = device.driver.load(nc.finish())
        device.driver.write(loaded.tensors["x"], x)
        loaded.run()
        return device.driver.read(loaded.tensors["out"])


X = np.random.default_rng(0).normal(size=(N, COLUMNS)).astype(np.float32)
X[0, :4] = 0.0, -0.0, np.nan, np.inf
ROW, COLUMN = np.indices((N, COLUMNS))


def test_iota() -> None:
    def numbers(nc: KernelBuilder, _: View, dst: View) -> None:
        nc.vector.iota(dst.reshape(3, 4), steps=(-1000, 7), base=-3, lane_step=100)

    expected = -3 + 100 * ROW - 1000 * (COLUMN // 4) + 7 * (COLUMN % 4)
    np.testing.assert_array_equal(run(numbers, X, integer=True), expected)
    np.testing.assert_array_equal(run(numbers, X), expected.astype(np.float32))

    def large(nc: KernelBuilder, _: View, dst: View) -> None:
        nc.vector.iota(dst, steps=(32767,), base=(1 << 31) - 1, lane_step=-32768)

    expected = ((1 << 31) - 1 + 32767 * COLUMN - 32768 * ROW).astype(np.int64).astype(np.int32)
    assert (expected < 0).any() and (expected > 0).any()
    np.testing.assert_array_equal(run(large, X, integer=True), expected)
    np.testing.assert_array_equal(run(large, X), expected.astype(np.float32))


def test_causal_mask() -> None:
    """Queries on partitions, keys along the words: what is in the future becomes -infinity."""

    def mask(nc: KernelBuilder, src: View, dst: View) -> None:
        nc.vector.affine_select(dst, src, AluOp.GE, float("-inf"), steps=(-1,), base=2, lane_step=1)

    np.testing.assert_array_equal(run(mask, X), np.where(COLUMN <= 2 + ROW, X, -np.inf))


@pytest.mark.parametrize("comparison", [AluOp.EQ, AluOp.NE, AluOp.LT, AluOp.LE, AluOp.GT, AluOp.GE])
def test_select(comparison: AluOp) -> None:
    def gated(nc: KernelBuilder, src: View, dst: View) -> None:
        other = nc.sbuf.tile(COLUMNS).view()
        nc.vector.iota(other, steps=(1,))
        nc.vector.select(dst, src, other, 0.1, comparison)

    holds = {
        "EQ": X == 0, "NE": X != 0, "LT": X < 0, "LE": X <= 0, "GT": X > 0, "GE": X >= 0
    }[comparison.name]  # fmt: skip
    expected = np.where(holds, COLUMN, np.float32(0.1)).astype(np.float32)
    np.testing.assert_array_equal(run(gated, X), expected)


def test_range_select() -> None:
    """Bounds of each partition, some of them outside of the row or in the wrong order."""
    bounds = np.array([[2, 7], [-5, 4], [9, 100], [5, 5]], np.int32)
    x = np.concatenate([bounds, X.view(np.int32)], axis=1)

    def window(nc: KernelBuilder, src: View, dst: View) -> None:
        nc.vector.range_select(dst, src[2:], src[:2].astype(DType.INT32), -1e30)

    low, high = bounds[:, :1], bounds[:, 1:]
    expected = np.where((low <= COLUMN) & (high > COLUMN), X, np.float32(-1e30))
    np.testing.assert_array_equal(run(window, x), expected)
    # Longer than any row can be, and as far from it as a word can hold.
    x[:, :2] = [[-(1 << 31), (1 << 31) - 1], [0, 1 << 16], [1 << 16, 1 << 20], [3, -4]]
    low, high = x[:, :1], x[:, 1:2]
    expected = np.where((low <= COLUMN) & (high > COLUMN), X, np.float32(-1e30))
    np.testing.assert_array_equal(run(window, x), expected)


def test_undefined_words_that_are_not_chosen() -> None:
    """A mask makes padding that was never written defined, and nothing else does."""

    def program(nc: KernelBuilder, limit: int) -> None:
        out = nc.dram.tensor("out", (N, COLUMNS), DType.FP32, kind="output")
        half, dst = nc.sbuf.tile(COLUMNS).view(), nc.sbuf.tile(COLUMNS).view()
        bounds = nc.sbuf.tile(2).view().astype(DType.INT32)
        nc.vector.memset(half[:6], 1.0)
        nc.vector.iota(bounds, steps=(limit,))
        nc.vector.range_select(dst, half, bounds, 2.0)
        nc.vector.affine_select(half, half, AluOp.LT, 2.0, steps=(1,), base=-limit)
        nc.vector.select(dst, half, dst, 0.0)
        nc.dma.store(dst, out, lane_stride=4 * COLUMNS)

    def execute(limit: int) -> np.ndarray:
        nc = KernelBuilder("nano")
        program(nc, limit)
        with systolith.Device("golden", config="nano", check=True) as device:
            loaded = device.driver.load(nc.finish())
            loaded.run()
            return device.driver.read(loaded.tensors["out"])

    np.testing.assert_array_equal(execute(6), np.where(COLUMN < 6, 1.0, 2.0))
    with pytest.raises(UndefinedError):
        execute(7)


REFUSED: dict[str, tuple[Callable[[KernelBuilder, View, View], object], str]] = {
    "steps": (
        lambda nc, a, b: nc.vector.iota(b, steps=(1, 2)),
        r"2 steps for a dst of shape \(12,\)",
    ),
    "large step": (
        lambda nc, a, b: nc.vector.iota(b, steps=(1 << 15,)),
        "a step = 32768 does not fit 16 bits with a sign",
    ),
    "large base": (
        lambda nc, a, b: nc.vector.iota(b, steps=(1,), base=1 << 31),
        "base = 2147483648 does not fit 32 bits",
    ),
    "type": (
        lambda nc, a, b: nc.vector.iota(b.astype(DType.BF16), steps=(1,)),
        "dst of iota must be FP32 or INT32, not BF16",
    ),
    "fill": (
        lambda nc, a, b: nc.vector.affine_select(b, a, AluOp.GE, 0.1, steps=(1,)),
        "fill = 0.1 is not a bfloat16 number",
    ),
    "comparison": (
        lambda nc, a, b: nc.vector.select(b, a, a, 0.0, AluOp.ADD),
        "comparison must be one of .*, not ADD",
    ),
    "bounds": (
        lambda nc, a, b: nc.vector.range_select(b, a, a[:3], 0.0),
        r"bounds must be a view of shape \(2,\)",
    ),
    "bounds of another type": (
        lambda nc, a, b: nc.vector.range_select(b, a, a[:2], 0.0),
        "bounds must be INT32, not FP32",
    ),
    "bounds in the way": (
        lambda nc, a, b: nc.vector.range_select(b, a, b[:2].astype(DType.INT32), 0.0),
        "dst and bounds overlap",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    nc = KernelBuilder("nano")
    a, b = (nc.sbuf.tile(COLUMNS).view() for _ in range(2))
    with pytest.raises(KernelError, match=message):
        call(nc, a, b)
