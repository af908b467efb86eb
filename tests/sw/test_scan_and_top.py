"""SCAN, TOP and STATISTICS, as kernels use them, against numpy."""

from collections.abc import Callable

import numpy as np
import pytest
import systolith
from systolith.errors import KernelError, UndefinedError
from systolith.kernel import AluOp, DType, KernelBuilder, View
from systolith_hdl.isa import SCAN_ROWS, Opcode, decode

N = 4


def run(
    build: Callable[..., None], shape: tuple[int, ...], *arrays: np.ndarray, integer: bool = False
) -> np.ndarray:
    """Gives `build` a builder, an output view of `shape` and views that hold the arrays, which have
    partitions in front; returns what the output holds."""
    nc = KernelBuilder("nano")
    out = nc.dram.tensor("out", (N, *shape), DType.FP32, kind="output")
    views = []
    for number, array in enumerate(arrays):
        size = array[0].size
        given = nc.dram.tensor(f"x{number}", array.shape, array.dtype)
        view = nc.sbuf.tile(size).view(array.shape[1:])
        nc.dma.load(view, given, lane_stride=4 * size)
        views.append(view)
    target = nc.sbuf.tile(int(np.prod(shape))).view(shape)
    build(nc, target, *views)
    nc.dma.store(target, out, lane_stride=4 * int(np.prod(shape)))
    with systolith.Device("golden", config="nano", check=True) as device:
        loaded = device.driver.load(nc.finish())
        for number, array in enumerate(arrays):
            device.driver.write(loaded.tensors[f"x{number}"], array)
        loaded.run()
        return device.driver.read(loaded.tensors["out"])


RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (5, 9), (6, 9), (13, 9), (2, 3, 5), (2, 2, 7, 3)])
def test_cumulative(shape: tuple[int, ...]) -> None:
    """Any number of rows in any shape; numpy adds one by one, too."""
    x = normal(N, *shape)

    def sums(nc: KernelBuilder, dst: View, src: View) -> None:
        nc.vector.scan(dst, src, AluOp.ADD, 0.0)

    np.testing.assert_array_equal(run(sums, shape, x), np.cumsum(x, axis=-1, dtype=np.float32))

    def peaks(nc: KernelBuilder, dst: View, src: View) -> None:
        nc.vector.copy(dst, src)
        nc.vector.scan(dst, dst, AluOp.MAX, -np.inf)  # in place

    np.testing.assert_array_equal(run(peaks, shape, x), np.maximum.accumulate(x, axis=-1))


def test_linear_recurrence() -> None:
    a, b = normal(N, 7, 10), normal(N, 7, 10)

    def recur(nc: KernelBuilder, dst: View, a: View, b: View) -> None:
        nc.vector.scan(dst, a, AluOp.MUL, 0.5, AluOp.ADD, b)

    r = np.full((N, 7), 0.5, np.float32)
    expected = np.empty_like(a)
    for i in range(10):
        r = expected[..., i] = a[..., i] * r + b[..., i]
    np.testing.assert_array_equal(run(recur, (7, 10), a, b), expected)


def test_initial_values_of_each_row() -> None:
    x, first = normal(N, 8, 6), normal(N, 8, 1)

    def decay(nc: KernelBuilder, dst: View, x: View, first: View) -> None:
        nc.vector.scan(dst, x, AluOp.ADD, first, AluOp.MUL, 0.9)

    r = first[..., 0]
    expected = np.empty_like(x)
    for i in range(6):
        r = expected[..., i] = (x[..., i] + r) * np.float32(0.9)
    np.testing.assert_array_equal(run(decay, (8, 6), x, first), expected)

    def halves(nc: KernelBuilder, dst: View, x: View) -> None:
        # A long row in parts: each goes on from the last word of the one before.
        nc.vector.scan(dst[:, :3], x[:, :3], AluOp.ADD, 0.0)
        nc.vector.scan(dst[:, 3:], x[:, 3:], AluOp.ADD, dst[:, 2:3])

    np.testing.assert_array_equal(run(halves, (8, 6), x), np.cumsum(x, axis=-1, dtype=np.float32))


def test_full_groups_are_one_instruction() -> None:
    nc = KernelBuilder("nano")
    x = nc.sbuf.tile(20 * 3).view((20, 3))
    nc.vector.scan(x, x, AluOp.ADD, 0.0)
    counts = [
        [fields[f"counts.{d}"] for d in range(4)]
        for _, _, raw in nc.finish().instructions()
        for opcode, fields in [decode(raw)]
        if opcode is Opcode.SCAN
    ]
    assert counts == [[1, 3, 3, SCAN_ROWS], [1, 1, 3, 2]]


@pytest.mark.parametrize("kept", range(1, 9))
@pytest.mark.parametrize("largest", [True, False])
def test_top(kept: int, largest: bool) -> None:
    x = np.round(normal(N, 3, 20) * 3)  # with many equal ones
    x[0, 0, [3, 7]] = np.nan
    x[1, 0, :2] = np.inf, -np.inf
    x[2, 1] = [0.0, -0.0] * 10

    def find(nc: KernelBuilder, dst: View, src: View) -> None:
        nc.vector.top(dst, src, largest=largest)

    found = run(find, (3, kept, 2), x)
    values, indices = found[..., 0], found[..., 1].view(np.int32)
    key = np.clip(x if largest else -x, *(np.finfo(np.float32).min, np.finfo(np.float32).max))
    key = np.where(np.isnan(x), np.inf, key).astype(np.float64)
    less = 1e-9 if largest else -1e-9
    key[(x == 0) & np.signbit(x)] -= less  # -0 is less than +0
    expected = np.argsort(-key, axis=-1, kind="stable")[..., :kept]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=-1))


def test_maximum_and_index() -> None:
    x = normal(N, 5, 30)

    def find(nc: KernelBuilder, dst: View, src: View) -> None:
        nc.vector.top(dst, src)

    for shape in ((5, 1, 2), (5, 2)):
        found = run(find, shape, x).reshape(N, 5, 2)
        np.testing.assert_array_equal(found[..., 0], x.max(axis=-1))
        np.testing.assert_array_equal(found[..., 1].view(np.int32), x.argmax(axis=-1))


def test_statistics() -> None:
    """Mean and variance from the two sums, against float64; what NaN and infinity do."""
    x = normal(N, 5, 300) + 0.5
    x[0, 1, 7], x[1, 2, 9] = np.nan, -np.inf

    def sums(nc: KernelBuilder, dst: View, src: View) -> None:
        nc.vector.statistics(dst, src)

    found = run(sums, (5, 2), x)
    special = found[[0, 1], [1, 2]].tolist()
    assert np.isnan(special[0]).all() and special[1] == [-np.inf, np.inf]
    x[0, 1, 7] = x[1, 2, 9] = 0.0
    found = run(sums, (5, 2), x).astype(np.float64) / x.shape[-1]
    wide = x.astype(np.float64)
    for mine, want in (
        (found[..., 0], wide.mean(axis=-1)),
        (found[..., 1] - found[..., 0] ** 2, wide.var(axis=-1)),
    ):
        error = np.abs(mine / want - 1).max()
        print(f"error {error:.1e}")
        assert error < 1e-6


def test_statistics_of_integers() -> None:
    """Exact, modulo 2**32, and in any type that the sums are written in."""
    nc = KernelBuilder("nano")
    given = nc.dram.tensor("x", (N, 40), DType.INT32)
    out = nc.dram.tensor("out", (N, 2), DType.INT32, kind="output")
    src = nc.sbuf.tile(40).view().astype(DType.INT32)
    dst = nc.sbuf.tile(2).view().astype(DType.INT32)
    nc.dma.load(src, given, lane_stride=160)
    nc.vector.statistics(dst, src)
    nc.dma.store(dst, out, lane_stride=8)
    x = RNG.integers(-(2**31), 2**31, (N, 40)).astype(np.int32)
    with systolith.Device("golden", config="nano", check=True) as device:
        loaded = device.driver.load(nc.finish())
        device.driver.write(loaded.tensors["x"], x)
        loaded.run()
        found = device.driver.read(loaded.tensors["out"])
    wide = x.astype(object)
    want = np.stack([wide.sum(axis=-1), (wide * wide).sum(axis=-1)], axis=-1) % (1 << 32)
    np.testing.assert_array_equal(found.view(np.uint32), want.astype(np.uint32))


def test_undefined_words() -> None:
    """One in a row leaves what comes after it in a scan undefined, and all that TOP finds there,
    and both of its sums."""

    def execute(build: Callable[[KernelBuilder, View, View], View]) -> None:
        nc = KernelBuilder("nano")
        out = nc.dram.tensor("out", (N, 4), DType.FP32, kind="output")
        x, y = nc.sbuf.tile(16).view((2, 8)), nc.sbuf.tile(16).view((2, 8))
        nc.vector.memset(x[0], 1.0)
        nc.vector.memset(x[1, :4], 1.0)
        nc.dma.store(build(nc, x, y), out, lane_stride=16)
        with systolith.Device("golden", config="nano", check=True) as device:
            device.driver.load(nc.finish()).run()

    def scan(nc: KernelBuilder, x: View, y: View, start: int) -> View:
        nc.vector.scan(y, x, AluOp.ADD, 0.0)
        return y[1, start : start + 4]

    def top(nc: KernelBuilder, x: View, y: View, row: int) -> View:
        nc.vector.top(y[:, :4], x)
        return y[row, :4]

    def statistics(nc: KernelBuilder, x: View, y: View, row: int) -> View:
        nc.vector.statistics(y[:, :2], x)
        nc.vector.memset(y[row, 2:4], 0.0)
        return y[row, :4]

    execute(lambda nc, x, y: statistics(nc, x, y, 0))
    with pytest.raises(UndefinedError):
        execute(lambda nc, x, y: statistics(nc, x, y, 1))
    execute(lambda nc, x, y: scan(nc, x, y, 0))
    execute(lambda nc, x, y: top(nc, x, y, 0))
    with pytest.raises(UndefinedError):
        execute(lambda nc, x, y: scan(nc, x, y, 1))
    with pytest.raises(UndefinedError):
        execute(lambda nc, x, y: top(nc, x, y, 1))


REFUSED: dict[str, tuple[Callable[[KernelBuilder, View, View], object], str]] = {
    "operation": (
        lambda nc, a, b: nc.vector.scan(b, a, AluOp.EQ, 0.0),
        "op0 must be one of .*, not EQ",
    ),
    "no b": (
        lambda nc, a, b: nc.vector.scan(b, a, AluOp.MUL, 0.0, AluOp.ADD),
        "op1 = ADD needs b",
    ),
    "number b": (
        lambda nc, a, b: nc.vector.scan(b, a, AluOp.MUL, 0.0, AluOp.ADD, 1.0),
        "with a number for b, the initial value must be a view",
    ),
    "two views": (
        lambda nc, a, b: nc.vector.scan(b, a, AluOp.MUL, a[:, :1], AluOp.ADD, a),
        "with an initial value from a view, b must be a number",
    ),
    "long initial": (
        lambda nc, a, b: nc.vector.scan(b, a, AluOp.MUL, a),
        "innermost dimension of initial must be 1",
    ),
    "shapes": (
        lambda nc, a, b: nc.vector.scan(b, a[:, :4], AluOp.ADD, 0.0),
        "shape mismatch: src0",
    ),
    "too many": (
        lambda nc, a, b: nc.vector.top(b.reshape(2, 10, 2), a),
        r"up to 8 pairs .* shape \(2, 'k', 2\), not \(2, 10, 2\)",
    ),
    "odd": (lambda nc, a, b: nc.vector.top(b[:, :3], a), r"not \(2, 3\)"),
    "sums": (
        lambda nc, a, b: nc.vector.statistics(b[:, :1], a),
        r"statistics of shape \(2, 20\) need a dst of shape \(2, 2\), not \(2, 1\)",
    ),
    "lanes": (
        lambda nc, a, b: nc.vector.statistics(b[:, :2].with_lanes(2), a),
        "dst has 2 lanes and src0 has 4",
    ),
    "short": (
        lambda nc, a, b: nc.vector.top(b[:, :8], a[:, :3]),
        "4 of 3 words cannot be found",
    ),
    "bent": (
        lambda nc, a, b: nc.vector.top(b.tile.view((2, 2, 2), (20, 4, 1)), a),
        "pairs of dst must lie at one stride",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    nc = KernelBuilder("nano")
    a, b = (nc.sbuf.tile(40).view((2, 20)) for _ in range(2))
    with pytest.raises(KernelError, match=message):
        call(nc, a, b)
