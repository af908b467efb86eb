"""Functions of the user's own: tables made, loaded and applied."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from systolith.errors import KernelError, UndefinedError
from systolith.golden import GoldenDevice, arithmetic
from systolith.kernel import AluOp, DType, Function, KernelBuilder, Table, table
from systolith.runtime import Driver
from systolith_hdl.isa import TABLE_SEGMENTS, TABLE_WORDS

Real = Callable[[Any], Any]


def prelu(x: float) -> float:
    return x if x > 0 else 0.25 * x


def tanh_dx(x: float) -> float:
    return 1 / np.cosh(x) ** 2


def hard_sigmoid(x: float) -> float:
    return min(max(x / 6 + 0.5, 0.0), 1.0)


def bumps(x: float) -> float:
    return np.sin(3 * x) * np.exp(-x * x / 8)


def numbers(low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """Random FP32 numbers of every binade, the middle ones more densely, within (low, high)."""
    rng = np.random.default_rng(5)
    exponents = np.concatenate([np.arange(255).repeat(64), rng.integers(95, 145, 60_000)])
    bits = exponents << 23 | rng.integers(0, 1 << 23, exponents.size)
    y = np.concatenate([bits, bits | 1 << 31]).astype(np.uint32).view(np.float32)
    return y[(y > low) & (y < high)]


@pytest.mark.parametrize(
    ("f", "bounds"),
    [
        (prelu, {}),
        (tanh_dx, {}),
        (np.tanh, {"ulp": 0.8}),
        (np.tanh, {"ulp": 4}),
        (np.exp, {}),
        (np.expm1, {"ulp": 2}),
        (math.erfc, {}),
        (np.sinh, {}),
        (lambda x: 2.5, {}),
        (np.trunc, {"domain": (-4, 4), "absolute": 1e-9}),
        (hard_sigmoid, {"absolute": 1e-7}),
        (np.square, {"domain": (-100, 100), "absolute": 1e-12}),
        (np.log, {"domain": (2, 1000)}),
        (bumps, {"absolute": 1e-6}),
    ],
)
def test_errors_are_within_the_bounds(f: Real, bounds: dict[str, Any]) -> None:
    """Against numpy's float64, at numbers that the generator did not measure."""
    made = table(f, **bounds)
    y = numbers(*bounds.get("domain", ()))
    with np.errstate(all="ignore"):
        want = np.array([float(f(np.float64(x))) for x in y])
        rounded = want.astype(np.float32)
        ulp = np.maximum(np.abs(np.spacing(rounded)).astype(np.float64), 2.0**-149)
        got = made(y).astype(np.float64)
        error = np.abs(got - want)
        infinite = np.isinf(rounded) | np.isinf(got)
        fine = error <= np.maximum(bounds.get("ulp", 1) * ulp, bounds.get("absolute", 0) + ulp / 2)
        # a number next to the largest may round to infinity instead
        fine |= infinite & (made(y) == rounded) | (np.abs(want) > 3.4028e38) & (got * want > 0)
    assert fine.all(), (y[~fine][:4], got[~fine][:4], want[~fine][:4])
    # What it says of itself is near what is found here.
    finite = ~infinite & (np.abs(want) <= 16)
    print(f"{made}; here {error[finite].max():.3e}")
    assert error[finite].max() / 2 <= made.max_absolute <= 2 * error[finite].max()
    assert made.segments <= TABLE_SEGMENTS and made.first + len(made.words) == TABLE_WORDS
    assert f"{made.segments} of {TABLE_SEGMENTS} segments" in str(made)


@pytest.mark.parametrize("slope", [0.25, 0.125, 0.01, 1.5])
def test_a_parametric_relu_takes_two_lines(slope: float) -> None:
    """A segment for each side, beside those of zeros, infinities and NaN. It is exact where the
    product is; elsewhere it is the nearest number, but next to a tie."""
    slope = float(np.float32(slope))
    made = table(lambda x: x if x > 0 else slope * x, ulp=0.75)
    assert made.segments == 7
    y = numbers()
    exact = np.where(y > 0, y, y.astype(np.float64) * slope)
    got = made(y).astype(np.float64)
    if slope in (0.25, 0.125, 1.5):
        np.testing.assert_array_equal(got, exact.astype(np.float32))
    assert made.max_ulp < 0.51
    assert made(np.array([0, -0.0, np.inf, -np.inf], np.float32)).tobytes() == (
        np.array([0, -0.0, np.inf, -np.inf], np.float32).tobytes()
    )


def test_special_values() -> None:
    y = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-42, 3e38], np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(table(np.tanh)(y)[[0, 1, 3, 4]], [1, -1, 0, -0.0])
        assert np.signbit(table(np.tanh)(y))[4]
        np.testing.assert_array_equal(table(np.exp)(y), [np.inf, 0, np.nan, 1, 1, 1, np.inf])
        outside = table(np.log, domain=(2, 8))(y)
    assert np.isnan(outside).all()


@pytest.mark.parametrize(
    ("f", "bounds", "message"),
    [
        (np.sin, {}, r"neither constant nor a multiple of y for y above 2\*\*31: give a domain"),
        (np.square, {"domain": (-9, 9)}, r"below 2\*\*-28: give an absolute error bound"),
        (np.sin, {"domain": (-8, 8)}, "more than 256 segments between 2 and 4: give a larger"),
        (
            np.sin,
            {"domain": (-64, 64), "absolute": 1e-6},
            r"needs \d+ segments for 1 ULP or \S+; 512 are there: give a larger error bound",
        ),
        (
            lambda x: np.log(3 - x),
            {"domain": (0, 3.5), "absolute": 1e-6},
            "not finite everywhere between 2 and 4",
        ),
        (math.cosh, {}, r"overflows: use functions of numpy"),
        (lambda x: float(abs(x - 1.095) < 0.02), {"absolute": 1e-3}, "bends too sharply"),
        (np.tanh, {"ulp": 0.6}, "ulp must be at least 0.75, not 0.6"),
        (np.tanh, {"absolute": -1}, "absolute must be 0 or more"),
        (np.tanh, {"domain": (1, 1)}, "a domain from 1.0 to 1.0 is empty"),
    ],
)
def test_what_does_not_fit_is_refused(f: Real, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        table(f, **bounds)


# -- on devices ----------------------------------------------------------------------------------


def program(tables: list[Table], lanes: int | None = None, load: bool = True) -> Any:
    """Applies one table after the other to the same numbers."""
    nc = KernelBuilder("nano")
    x = nc.dram.tensor("x", (24, 4), DType.FP32)
    tile = nc.sbuf.tile(24).view()
    nc.dma.load(tile, x, 0, (16,), 4)
    for number, made in enumerate(tables):
        out = nc.dram.tensor(f"y{number}", (24, 4), DType.FP32, kind="output")
        if load:
            made.load(nc)
        result = nc.sbuf.tile(24).view()
        nc.scalar.activate(result, tile, Function.CUSTOM)
        nc.dma.store(result, out, 0, (16,), 4)
    return nc.finish()


def run(driver: Driver, made: Any, x: np.ndarray) -> list[np.ndarray]:
    loaded = driver.load(made)
    driver.write(loaded.tensors["x"], x)
    loaded.run()
    names = [tensor.name for tensor in made.tensors if tensor.kind == "output"]
    found = [driver.read(loaded.tensors[name]) for name in names]
    loaded.unload()
    return found


X = np.random.default_rng(3).normal(0, 3, (24, 4)).astype(np.float32)


def test_tables_follow_each_other_and_stay() -> None:
    """Each is what CUSTOM is until the next is loaded, from one program to the next, over a reset
    too. At power-up the tables are zero, and so is the result."""
    driver = Driver(GoldenDevice("nano"))
    tables = [table(np.tanh), table(prelu), table(tanh_dx)]
    (nothing,) = run(driver, program(tables[:1], load=False), X)
    assert not nothing.any()
    for made, got in zip(tables, run(driver, program(tables), X), strict=True):
        np.testing.assert_array_equal(got, made(X))
    driver.reset()
    (got,) = run(driver, program(tables[:1], load=False), X)
    np.testing.assert_array_equal(got, tables[-1](X))


def test_partitions_may_have_different_functions() -> None:
    """A table loaded into the first partitions alone."""
    nc = KernelBuilder("nano")
    x = nc.dram.tensor("x", (24, 4), DType.FP32)
    y = nc.dram.tensor("y", (24, 4), DType.FP32, kind="output")
    tanh, other = table(np.tanh), table(prelu)
    tanh.load(nc)
    words = nc.dram.tensor("words", data=other.words.view(np.int32), kind="constant")
    tile = nc.sbuf.tile(len(other.words)).view(lanes=2).astype(DType.INT32)
    nc.dma.load(tile, words)
    nc.scalar.load_table(tile, other.first)
    data = nc.sbuf.tile(24).view()
    nc.dma.load(data, x, 0, (16,), 4)
    nc.scalar.activate(data, data, Function.CUSTOM)
    nc.dma.store(data, y, 0, (16,), 4)
    (got,) = run(Driver(GoldenDevice("nano", check=True)), nc.finish(), X)
    np.testing.assert_array_equal(got[:, :2], other(X[:, :2]))
    np.testing.assert_array_equal(got[:, 2:], tanh(X[:, 2:]))


@pytest.mark.parametrize("keep", ["directory", "segments"])
def test_a_table_not_loaded_is_undefined(keep: str) -> None:
    """Also in part: the whole directory and every segment that it names are needed."""
    made = table(prelu)
    checked = Driver(GoldenDevice("nano", check=True))
    with pytest.raises(UndefinedError, match="word 2048 of the table of partition 0 was never"):
        run(checked, program([made], load=False), X)
    run(checked, program([made]), X)
    with pytest.raises(UndefinedError):  # what a program before has loaded does not count
        run(checked, program([made], load=False), X)

    segments = 4 * made.segments
    first, words = made.first, made.words[:segments]
    if keep == "directory":
        first, words = made.first + segments, made.words[segments:]
    part = Table("part", words, made.segments, 0.0, 0.0, 0.0)
    nc = KernelBuilder("nano")
    tensor = nc.dram.tensor("words", data=words.view(np.int32), kind="constant")
    tile = nc.sbuf.tile(len(words)).view().astype(DType.INT32)
    nc.dma.load(tile, tensor)
    nc.scalar.load_table(tile, first)
    nc.vector.memset(tile.astype(DType.FP32), 1.0)
    nc.scalar.activate(tile.astype(DType.FP32), tile.astype(DType.FP32), Function.CUSTOM)
    place = "word 2048" if keep == "segments" else f"word {part.first - segments}"
    with pytest.raises(UndefinedError, match=f"{place} of the table of partition 0"):
        Driver(GoldenDevice("nano", check=True)).load(nc.finish()).run()


def test_words_of_a_table_must_be_written_and_fit() -> None:
    nc = KernelBuilder("nano")
    tile = nc.sbuf.tile(64)
    nc.scalar.load_table(tile.view((8,)).astype(DType.INT32))
    with pytest.raises(UndefinedError, match="was never written"):
        Driver(GoldenDevice("nano", check=True)).load(nc.finish()).run()
    nc = KernelBuilder("nano")
    tile = nc.sbuf.tile(64)
    with pytest.raises(KernelError, match="words 2170 to 2177 do not exist: a table has 2176"):
        nc.scalar.load_table(tile.view((8,)), 2170)
    with pytest.raises(KernelError, match="must lie at one stride"):
        nc.scalar.load_table(tile.view((4, 4), (16, 1)))


@pytest.mark.parametrize("kind", ["golden", "rtl", "rtl-fast"])
def test_in_jit_with_a_gradient(kind: str) -> None:
    """Two functions among compiled operations; their gradients; the same bits on the gates."""
    softsign = systolith.nn.tabulated(
        lambda x: x / (1 + np.abs(x)), lambda x: 1 / (1 + np.abs(x)) ** 2, absolute=1e-9
    )
    leaky = systolith.nn.tabulated(prelu, lambda x: 1.0 if x > 0 else 0.25)

    def fn(x: Any, v: Any) -> Any:
        return jnp.sum(leaky(softsign(x * 2.0) - 0.1)) + jnp.sum(softsign(v) ** 2)

    def reference(x: Any, v: Any) -> Any:
        def sign(x: Any) -> Any:
            return x / (1 + jnp.abs(x))

        y = sign(x * 2.0) - 0.1
        return jnp.sum(jnp.where(y > 0, y, 0.25 * y)) + jnp.sum(sign(v) ** 2)

    rng = np.random.default_rng(8)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((7, 9), (11,))]

    def results(kind: str, **options: Any) -> list[np.ndarray]:
        with systolith.Device(kind, config="nano", **options) as device:
            step = systolith.jit(jax.value_and_grad(fn, argnums=(0, 1)), device=device)
            value, gradients = step(*arrays)
            return [np.asarray(value), *map(np.asarray, gradients)]

    found = results("golden", check=True)
    if kind != "golden":
        for mine, theirs in zip(results(kind), found, strict=True):
            assert mine.tobytes() == theirs.tobytes()
        return
    value, gradients = jax.value_and_grad(reference, argnums=(0, 1))(*arrays)
    for mine, theirs in zip(found, [value, *gradients], strict=True):
        error = float(np.abs(mine - np.asarray(theirs)).max())
        print(f"error {error:.1e}")
        assert error < 4e-6


def test_shapes_types_and_what_has_no_gradient() -> None:
    bounds: dict[str, Any] = {"absolute": 1e-9, "domain": (-64, 64)}
    square, made = systolith.nn.tabulated(np.square, **bounds), table(np.square, **bounds)
    with systolith.Device("golden", config="nano", check=True) as device:
        for shape in ((), (1,), (4,), (2500,), (3, 5)):
            x = np.random.default_rng(1).uniform(-8, 8, shape).astype(np.float32)
            got = np.asarray(systolith.jit(square, device=device)(x))
            assert got.shape == shape
            np.testing.assert_array_equal(got, made(x))
        half = np.linspace(-4, 4, 33).astype(np.float16)
        got = np.asarray(systolith.jit(square, device=device)(half))
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, made(half).astype(np.float16))
        alone = square.on(device)(np.full((2, 3, 4), 3, np.float32))
        assert (np.asarray(alone) == 9).all()
        with pytest.raises(systolith.SystolithError, match="gradient"):
            systolith.jit(jax.grad(lambda x: jnp.sum(square(x))), device=device)(half)


def test_vector_and_scalar_engines_beside_it() -> None:
    """CUSTOM with scales, biases, sums and a narrow destination, like any other function."""
    made = table(tanh_dx)
    nc = KernelBuilder("nano")
    x = nc.dram.tensor("x", (24, 4), DType.FP32)
    y = nc.dram.tensor("y", (25, 4), DType.FP32, kind="output")
    made.load(nc)
    tile, result = nc.sbuf.tile(24).view(), nc.sbuf.tile(25).view()
    nc.dma.load(tile, x, 0, (16,), 4)
    nc.scalar.activate(result.astype(DType.BF16), tile, Function.CUSTOM, 0.5, 1.0, sums="behind")
    nc.vector.tensor_scalar(result, result, AluOp.MUL, 1.0)
    nc.dma.store(result, y, 0, (16,), 4)
    (got,) = run(Driver(GoldenDevice("nano", check=True)), nc.finish(), X)
    values = made(X * np.float32(0.5) + np.float32(1))
    rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got[:24], rounded)
    # Of what was not rounded yet, in the order of REDUCE.
    totals = arithmetic.reduce_last(AluOp.ADD, values.T.copy().view(np.uint32))
    np.testing.assert_array_equal(got[24], totals.view(np.float32))
