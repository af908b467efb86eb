"""Stochastic rounding: its definition, its statistics, and its way through builder and compiler."""

import importlib.util
import itertools
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from scipy import stats
from systolith.errors import UnsupportedError
from systolith.golden.arithmetic import round_to
from systolith.golden.dither import random_words
from systolith.kernel import AluOp, DType, Function, KernelBuilder, Rounding
from systolith_hdl.formats import CANONICAL_NAN, FORMATS, NARROW_FLOATS
from systolith_hdl.isa import decode

NAN = CANONICAL_NAN
BF16 = ml_dtypes.bfloat16
#: a p-value below this is no accident; the seeds are fixed, so no run is unlucky
LEAST_P = 1e-5


# --- the definition ---------------------------------------------------------------------------


def word_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def spacing(magnitude: Fraction, fraction_bits: int, least_exponent: int) -> Fraction:
    """Distance of a format's numbers at `magnitude`, as if its range had no upper end."""
    exponent = least_exponent
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - fraction_bits)


def rounded_exactly(word: int, dtype: DType, random: int) -> int:
    """The definition in docs/numerics.md, in fractions."""
    form = FORMATS[dtype]
    sign = word & 1 << 31
    value = float(np.uint32(word).view(np.float32))
    infinity = sign | 0x7F800000 if form.infinite else NAN
    if np.isnan(value):
        return NAN
    if np.isinf(value):
        return infinity
    magnitude = abs(Fraction(value))
    unit = spacing(magnitude, form.fraction, 1 - form.bias)
    bits = (unit / spacing(magnitude, 23, -126)).numerator.bit_length() - 1
    below = magnitude // unit * unit
    part = (magnitude - below) / unit
    up = bits <= 32 and part + Fraction(random % (1 << bits), 1 << bits) >= 1
    result = below + unit if up else below
    if result > Fraction(float(np.uint32(form.largest).view(np.float32))):
        return infinity
    return sign | word_of(float(result))


def words_around(dtype: DType, rng: np.random.Generator, count: int) -> np.ndarray:
    """FP32 words of all exponents, most of them in and around the range of a type."""
    form = FORMATS[dtype]
    low, high = 127 - form.bias - form.fraction - 12, 127 + form.bias + 2
    near = rng.integers(max(low, 0), min(high, 255) + 1, count, dtype=np.uint32)
    field = np.where(rng.random(count) < 0.2, rng.integers(0, 256, count, dtype=np.uint32), near)
    fraction = rng.integers(0, 1 << 23, count, dtype=np.uint32)
    few = np.uint32(0x7FFFFF) << rng.integers(0, 24, count, dtype=np.uint32) & np.uint32(0x7FFFFF)
    fraction = np.where(rng.random(count) < 0.5, fraction & few, fraction)
    sign = rng.integers(0, 2, count, dtype=np.uint32) << np.uint32(31)
    return (sign | field.astype(np.uint32) << np.uint32(23) | fraction).astype(np.uint32)


@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=lambda dtype: dtype.name)
def test_rounding_is_that_of_exact_fractions(dtype: DType) -> None:
    rng = np.random.default_rng(dtype.value)
    words = words_around(dtype, rng, 4000)
    random = rng.integers(0, 1 << 32, len(words), dtype=np.uint32)
    random[rng.random(len(random)) < 0.1] = 0xFFFFFFFF
    random[rng.random(len(random)) < 0.1] = 0
    got = round_to(words, dtype, random)
    for word, noise, result in zip(words.tolist(), random.tolist(), got.tolist(), strict=True):
        wanted = rounded_exactly(word, dtype, noise)
        assert result == wanted, f"{word:08x} with {noise:08x}: {result:08x}, not {wanted:08x}"


@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=lambda dtype: dtype.name)
def test_what_the_type_holds_stays(dtype: DType) -> None:
    """Numbers of the type, infinities and NaN are the same whatever the random word."""
    form = FORMATS[dtype]
    bits = np.arange(1 << form.bits, dtype=np.uint32).astype(f"u{form.bytes}")
    with np.errstate(all="ignore"):
        words = bits.view(form.numpy).astype(np.float32).view(np.uint32)
    for noise in (0, 0xFFFFFFFF, 0x12345678):
        random = np.full(len(words), noise, np.uint32)
        assert (round_to(words, dtype, random) == round_to(words, dtype)).all()


def test_every_number_has_its_ends() -> None:
    """With no noise everything goes down, with the most everything goes up that is no number of
    the type; below 2**-9 of the smallest number all is zero; past the largest it overflows."""
    ones, none = np.array([0xFFFFFFFF], np.uint32), np.array([0], np.uint32)
    for dtype in NARROW_FLOATS:
        form = FORMATS[dtype]
        largest = float(np.uint32(form.largest).view(np.float32))
        smallest = 2.0 ** (1 - form.bias - form.fraction)

        def one(value: float, random: np.ndarray, dtype: DType = dtype) -> float:
            word = np.array([np.float32(value)]).view(np.uint32)
            return float(round_to(word, dtype, random).view(np.float32)[0])

        just_above = float(np.nextafter(np.float32(largest), np.float32(np.inf)))
        assert one(just_above, none) == largest
        beyond = one(just_above, ones)
        assert beyond == np.inf if form.infinite else np.isnan(beyond)
        if dtype is not DType.BF16:  # FP32 itself ends there
            assert one(smallest * 2.0**-9, ones) == smallest
            assert one(smallest * 2.0**-9, none) == 0.0
            assert one(smallest * 2.0**-9 * 0.999, ones) == 0.0
        assert one(1.0 + 2.0**-20, ones) == 1.0 + 2.0**-form.fraction
        assert one(-1.0 - 2.0**-20, ones) == -1.0 - 2.0**-form.fraction
        assert one(-1.0 - 2.0**-20, none) == -1.0
        assert np.signbit(one(-smallest / 4, none))


# --- statistics -------------------------------------------------------------------------------

LANES, ELEMENTS = 16, 2048


def noise(number: int) -> np.ndarray:
    """Random words of one instruction, [LANES * ELEMENTS]."""
    return random_words(7, number, number % 3, elements=ELEMENTS, lanes=LANES).ravel()


@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=lambda dtype: dtype.name)
def test_the_mean_is_the_number(dtype: DType) -> None:
    """2**16 roundings each of many numbers, subnormal ones and some below the smallest among them:
    only the two neighbours appear, each as often as it has to for the mean to be the number."""
    form = FORMATS[dtype]
    rng = np.random.default_rng(1)
    smallest = 2.0 ** (1 - form.bias - form.fraction)
    least = 2.0 ** (1 - form.bias)
    values = [
        *(rng.uniform(1, 2, 12) * 2.0 ** rng.integers(-5, 6, 12)),
        *(rng.uniform(0, 1, 12) * least),
        *(smallest * part for part in (0.9, 0.5, 0.3, 1 / 3, 0.01, 2.0**-7)),
        *(1 + 2.0**-form.fraction * part for part in (0.5, 0.25, 2.0**-6, 1 - 2.0**-7)),
    ]
    scores = []
    for number, value in enumerate(values):
        x = np.float32(value if number % 2 else -value)
        random = np.concatenate([noise(2 * number), noise(2 * number + 1)])
        word = np.full(random.size, x.view(np.uint32))
        results = round_to(word, dtype, random).view(np.float32).astype(np.float64)
        found, counts = np.unique(np.abs(results), return_counts=True)
        magnitude = abs(Fraction(float(x)))
        unit = spacing(magnitude, form.fraction, 1 - form.bias)
        below = magnitude // unit * unit
        assert set(map(Fraction, found.tolist())) <= {below, below + unit}
        part = float((magnitude - below) / unit)
        up = int(counts[[Fraction(f) == below + unit for f in found.tolist()]].sum())
        deviation = (random.size * part * (1 - part)) ** 0.5
        if deviation < 3:  # too rare for a normal distribution
            assert abs(up - random.size * part) < 12
            continue
        scores.append((up - random.size * part) / deviation)
        # The same, of the mean itself.
        error = float(np.mean(np.abs(results))) - float(magnitude)
        assert abs(error) < 4.5 * float(unit) * deviation / random.size
    assert len(scores) > 20
    assert stats.chi2.sf(np.square(scores).sum(), len(scores)) > LEAST_P


@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=lambda dtype: dtype.name)
def test_rounding_up_is_as_frequent_as_the_part_is_large(dtype: DType) -> None:
    """Different numbers, sorted into bins by the part that the type does not hold."""
    rng = np.random.default_rng(2)
    random = np.concatenate([noise(number) for number in range(16)])
    words = rng.uniform(1, 2, random.size).astype(np.float32).view(np.uint32)
    cut = 23 - FORMATS[dtype].fraction
    part = (words & ((1 << cut) - 1)) / (1 << cut)
    up = round_to(words, dtype, random) > words
    bins = np.minimum((part * 64).astype(int), 63)
    score = 0.0
    for number in range(64):
        here = bins == number
        expected, variance = part[here].sum(), (part[here] * (1 - part[here])).sum()
        score += (up[here].sum() - expected) ** 2 / variance
    assert LEAST_P < stats.chi2.sf(score, 64) < 1 - LEAST_P


def contingency(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of two fields of 4 bits being uniform and independent."""
    counts = np.bincount((a.ravel().astype(np.int64) << 4) | b.ravel(), minlength=256)
    expected = a.size / 256
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), 255))


def test_words_are_independent() -> None:
    """Neighbours in every direction: lanes, elements, instructions, engines, seeds, and runs of
    the same program (seed and counter both one more). The low bits, those that round to BF16, and
    the high ones."""
    counters, engines, seeds = range(12), range(5), range(6)
    words = np.array(
        [
            [[random_words(s, c, e, elements=256, lanes=16) for e in engines] for c in counters]
            for s in seeds
        ]
    )  # [seed, counter, engine, lane, element]
    assert np.unique(words).size > 0.98 * words.size
    tests: list[tuple[np.ndarray, np.ndarray]] = []
    for axis, steps in enumerate(((1, 2), (1, 2, 4), (1, 3), (1, 2, 8), (1, 2, 4, 16))):
        moved = np.moveaxis(words, axis, 0)
        tests += [(moved[:-step], moved[step:]) for step in steps]
    tests += [
        (words[:-1, :-1], words[1:, 1:]),
        (words[:-1, 1:], words[1:, :-1]),
        (words[:, :, :, :-1, :-1], words[:, :, :, 1:, 1:]),
        (words[:, :-1, :, :, 1:], words[:, 1:, :, :, :-1]),
    ]
    values = []
    for (a, b), shift_a, shift_b in itertools.product(tests, (0, 12, 28), (0, 12, 28)):
        values.append(contingency(a >> shift_a & 15, b >> shift_b & 15))
    # Fields of one word.
    values += [contingency(words >> i & 15, words >> j & 15) for i, j in ((0, 4), (8, 12), (0, 28))]
    assert min(values) > LEAST_P / 10
    # They are p-values: uniform themselves.
    assert stats.kstest(values, "uniform").pvalue > LEAST_P
    for bit in range(32):
        ones = int((words >> bit & 1).sum())
        assert abs(ones - words.size / 2) < 5 * (words.size / 4) ** 0.5


def test_bits_that_depend_on_one_input_bit() -> None:
    """Seeds and counters that differ in a single bit give words that differ in half of theirs."""
    base = random_words(0x1234, 56, 1, elements=1024, lanes=8)
    for bit in range(32):
        for other in (
            random_words(0x1234 ^ 1 << bit, 56, 1, elements=1024, lanes=8),
            random_words(0x1234, 56 ^ 1 << bit, 1, elements=1024, lanes=8),
        ):
            differ = float(np.bitwise_count(base ^ other).mean())
            assert abs(differ - 16) < 0.3, f"bit {bit}: {differ}"


# --- builder ----------------------------------------------------------------------------------


def rounding_kernel(rounding: Any) -> Any:
    """y = x rounded to bfloat16 by the vector and by the scalar engine, and sums of rows."""
    nc = KernelBuilder("nano", name="rounding")
    x = nc.dram.tensor("x", (4, 64), DType.FP32)
    outs = [nc.dram.tensor(name, (4, 64), DType.FP32, kind="output") for name in ("v", "s")]
    total = nc.dram.tensor("t", (4, 1), DType.FP32, kind="output")
    tile, v, s = (nc.sbuf.tile(64).view() for _ in range(3))
    t = nc.sbuf.tile(1).view()
    nc.dma.load(tile, x, lane_stride=256)
    nc.vector.copy(v.astype(DType.BF16), tile, rounding=rounding)
    nc.scalar.activate(s.astype(DType.BF16), tile, Function.IDENTITY, 1.0, -0.0, rounding=rounding)
    nc.vector.reduce(t.astype(DType.FP8_E4M3), tile, AluOp.ADD, rounding=rounding)
    for view, tensor, stride in ((v, outs[0], 256), (s, outs[1], 256), (t, total, 4)):
        nc.dma.store(view, tensor, lane_stride=stride)
    return nc.finish()


def run_kernel(device: systolith.Device, program: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    loaded = device.driver.load(program)
    device.driver.write(loaded.tensors["x"], x)
    loaded.run()
    found = {name: device.driver.read(loaded.tensors[name]) for name in ("v", "s", "t")}
    loaded.unload()
    return found


def counter_of(program: Any, engine: str, number: int = 0) -> int:
    """Index in its stream of an engine's n-th instruction that rounds stochastically."""
    stream = program.streams[engine]
    found = [
        at // 64
        for at in range(0, len(stream), 64)
        if decode(stream[at : at + 64])[1].get("rounding") == Rounding.STOCHASTIC.value
    ]
    return found[number]


def test_a_kernel_rounds_as_documented() -> None:
    """Each result follows from seed, engine, instruction, element and lane by the definition; each
    run has a seed of its own, and the same seed gives the same bits."""
    x = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    program = rounding_kernel("stochastic")
    assert program.streams == rounding_kernel(Rounding.STOCHASTIC).streams
    with systolith.Device("golden", config="nano", seed=40) as device:
        engines = device.config.engines
        runs = [run_kernel(device, program, x) for _ in range(3)]
        assert device.seed == 43
        device.seed = 41
        again = run_kernel(device, program, x)
    for name in again:
        assert (again[name] == runs[1][name]).all()
        assert (runs[0][name] != runs[1][name]).any()
    for seed, run in enumerate(runs, start=40):
        for name, engine in (("v", "vector"), ("s", "scalar")):
            counter = counter_of(program, engine)
            random = random_words(seed, counter, engines.index(engine), elements=64, lanes=4)
            wanted = round_to(x.view(np.uint32), DType.BF16, random)
            assert (run[name].view(np.uint32) == wanted).all()
        counter = counter_of(program, "vector", 1)
        random = random_words(seed, counter, engines.index("vector"), elements=1, lanes=4)
        sums = np.zeros((4, 4), np.float32)
        for column in range(64):
            sums[:, column % 4] += x[:, column]
        total = (sums[:, :1] + sums[:, 1:2]) + (sums[:, 2:3] + sums[:, 3:])
        wanted = round_to(total.view(np.uint32), DType.FP8_E4M3, random)
        assert (run["t"].view(np.uint32) == wanted).all()


def test_memset_and_predicated_copy_round_too() -> None:
    nc = KernelBuilder("nano", name="others")
    y = nc.dram.tensor("y", (4, 512), DType.FP32, kind="output")
    z = nc.dram.tensor("z", (4, 512), DType.FP32, kind="output")
    a, b, c = (nc.sbuf.tile(512).view() for _ in range(3))
    narrow = DType.FP8_E5M2
    nc.vector.memset(a.astype(narrow), 1.1, rounding="stochastic")
    nc.vector.memset(b, 1.1)
    nc.vector.memset(c, 0.0)
    nc.vector.copy_predicated(c.astype(narrow), b, b, rounding="stochastic")
    nc.dma.store(a, y, lane_stride=2048)
    nc.dma.store(c, z, lane_stride=2048)
    with systolith.Device("golden", config="nano") as device:
        loaded = device.driver.load(nc.finish())
        loaded.run()
        results = [device.driver.read(loaded.tensors[name]) for name in ("y", "z")]
    for result in results:
        assert set(np.unique(result)) == {1.0, 1.25}
        assert abs(result.mean() - 1.1) < 0.02
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize("kind", ["golden", "rtl"])
def test_stores_round_as_documented(kind: str) -> None:
    """Columns count in the order of the counts whatever the mode of the store; what has no narrow
    float takes no part."""
    lanes, tensors = 4, {}
    nc = KernelBuilder("nano", name="stores")
    x = nc.dram.tensor("x", (lanes, 60), DType.FP32)
    tile = nc.sbuf.tile(60)
    nc.dma.load(tile.view(), x, lane_stride=240)
    for dtype in NARROW_FLOATS:
        item = FORMATS[dtype].bytes
        # Rows of lanes, columns of lanes, single elements; a walk of two dimensions out of order.
        for mode, strides, lane in (
            ("turned", (12 * item, item), 60 * item),
            ("columns", (48 * item, 4 * item), item),
            ("single", (96 * item, 8 * item), 2 * item),
        ):
            name = f"{dtype.name}_{mode}"
            tensors[name] = dtype, strides, lane
            nc.dram.tensor(name, (480,), dtype, kind="output")
            store = nc.dram.tensors[-1]
            view = tile.view((5, 12), (1, 5))
            nc.dma.store(view, store, 0, strides, lane, rounding="stochastic")
    program = nc.finish()
    values = np.random.default_rng(4).normal(size=(lanes, 60)).astype(np.float32)
    with systolith.Device(kind, config="nano", seed=9) as device:
        loaded = device.driver.load(program)
        device.driver.write(loaded.tensors["x"], values)
        loaded.run()
        engine = device.config.engines.index("dma1")
        found = {name: device.driver.read(loaded.tensors[name]) for name in tensors}
    i, j, lane_number = np.ix_(range(5), range(12), range(lanes))
    words = values.view(np.uint32)[:, (i + 5 * j)[..., 0].ravel()]
    for number, (name, (dtype, strides, lane)) in enumerate(tensors.items()):
        item = FORMATS[dtype].bytes
        counter = counter_of(program, "dma1", number)
        random = random_words(9, counter, engine, elements=60, lanes=lanes)
        wanted = round_to(words, dtype, random).view(np.float32)
        at = (i * strides[0] + j * strides[1] + lane_number * lane) // item
        got = found[name].astype(np.float32)[at.reshape(60, lanes)].T
        assert (got == wanted).all(), name
        assert (got != round_to(words, dtype).view(np.float32)).any(), name


# --- compiler ---------------------------------------------------------------------------------


def compiled(fn: Any, *args: Any, seed: int = 0, config: str = "nano", **options: Any) -> Any:
    """One call on the golden device; its results as numpy arrays."""
    with systolith.Device("golden", config=config, seed=seed) as device:
        return jax.tree.map(np.asarray, systolith.jit(fn, device=device, **options)(*args))


FLOAT_TYPES = [FORMATS[dtype].numpy.name for dtype in NARROW_FLOATS]


@pytest.mark.parametrize("kind", FLOAT_TYPES)
def test_results_of_a_narrow_type_are_neighbours_with_the_right_mean(kind: str) -> None:
    """Conversions, elementwise results, functions, reductions and products."""
    rng = np.random.default_rng(5)
    x = rng.uniform(0.5, 2, (40, 24)).astype(np.float32)
    w = rng.uniform(0.1, 0.3, (24, 16)).astype(np.float32)
    narrow = np.dtype(kind)

    def fn(x: Any, w: Any) -> Any:
        return {
            "convert": x.astype(kind),
            "product": (x * 1.5).astype(kind),
            "tanh": jnp.tanh(x).astype(kind),
            "sum": x.sum(axis=1).astype(kind),
            "all": x.mean().astype(kind),
            "matmul": (x @ w).astype(kind),
            "t": x.T.astype(kind),
        }

    def wide(x: Any, w: Any) -> Any:
        return {
            "convert": x,
            "product": x * 1.5,
            "tanh": jnp.tanh(x),
            "sum": x.sum(axis=1),
            "all": x.mean(),
            "matmul": x @ w,
            "t": x.T,
        }

    exact = compiled(wide, x, w)
    nearest = compiled(fn, x, w)
    runs = []
    with systolith.Device("golden", config="nano", seed=9) as device:
        run = systolith.jit(fn, device=device, rounding="stochastic")
        for _ in range(24):
            runs.append(jax.tree.map(np.asarray, run(x, w)))
    assert runs[0].keys() == exact.keys()
    for name, value in exact.items():
        # The operands of the product were rounded to nearest: the FP32 sum is the same.
        assert (nearest[name] == value.astype(narrow)).all()
        results = np.array([r[name].astype(np.float64) for r in runs])
        form = FORMATS[next(d for d in NARROW_FLOATS if FORMATS[d].numpy.name == kind)]
        exponent = np.maximum(np.floor(np.log2(np.abs(value.astype(np.float64)))), 1 - form.bias)
        unit = 2.0 ** (exponent - form.fraction)
        assert (np.abs(results - value) < unit).all()
        errors = (results - value) / unit
        if value.size > 1:
            assert (results != results[0]).any()
        if value.size > 100:
            deviation = (errors.var() / errors.size) ** 0.5
            assert abs(errors.mean()) < 5 * deviation, name


def test_same_seed_same_bits() -> None:
    x = np.random.default_rng(6).normal(size=(30, 30)).astype(np.float32)

    def fn(x: Any) -> Any:
        return (x * 3).astype(jnp.bfloat16)

    first, again, other = (compiled(fn, x, seed=seed, rounding="stochastic") for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    with systolith.Device("golden", config="nano", seed=1) as device:
        run = systolith.jit(fn, device=device, rounding="stochastic")
        results = [np.asarray(run(x)) for _ in range(2)]
    assert (results[0] == first).all() and (results[1] == other).all()


def test_nothing_is_rounded_twice() -> None:
    """What is narrow already goes through copies, transposes, reshapes, DRAM and choices as it is,
    and equal operations round once."""
    x = np.random.default_rng(7).normal(size=(24, 20)).astype(np.float32)

    def fn(x: Any) -> Any:
        y = (x * 1.7).astype(jnp.bfloat16)
        again = (x * 1.7).astype(jnp.bfloat16)
        wide = y.astype(jnp.float32)
        return {
            "y": y,
            "again": again,
            "wide": wide,
            "turned": y.T,
            "shape": y.reshape(20, 24),
            "part": y[3:, 2:9],
            "choice": jnp.where(x > 0, y, -y),
            "less": wide - x * 1.7,
        }

    found = compiled(fn, x, rounding="stochastic")
    y = found["y"]
    assert (found["again"] == y).all() and (found["wide"] == y.astype(np.float32)).all()
    assert (found["turned"] == y.T).all() and (found["shape"] == y.reshape(20, 24)).all()
    assert (found["part"] == y[3:, 2:9]).all()
    assert (found["choice"] == np.where(x > 0, y, -y)).all()
    scaled = x * np.float32(1.7)
    assert (found["less"] == y.astype(np.float32) - scaled).all()
    assert (y != scaled.astype(BF16)).any()


def test_every_partition_has_the_same_scalar() -> None:
    """A scalar or vector kept whole in every partition is rounded once, not once in each."""
    x = np.random.default_rng(8).uniform(1, 2, (16, 12)).astype(np.float32)
    v = np.random.default_rng(9).uniform(1, 2, 12).astype(np.float32)

    def fn(x: Any, v: Any) -> Any:
        mean = x.mean().astype(jnp.bfloat16)
        vector = (v * 1.1).astype(jnp.float8_e5m2)
        ones = x * 0.0 + 1.0
        return mean, ones * mean.astype(jnp.float32), vector, ones * vector.astype(jnp.float32)

    for seed in range(12):
        mean, everywhere, vector, rows = compiled(fn, x, v, seed=seed, rounding="stochastic")
        assert (everywhere == mean.astype(np.float32)).all()
        assert (rows == vector.astype(np.float32)).all()


def test_only_narrow_results_change() -> None:
    """A function of float32 arrays is the same program either way, and products round their
    operands to nearest."""
    rng = np.random.default_rng(10)
    x, w = (rng.normal(size=(20, 20)).astype(np.float32) for _ in range(2))

    def fn(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w) * 2

    with systolith.Device("golden", config="nano") as device:
        programs = [
            systolith.jit(fn, device=device, rounding=rounding).compile(x, w).program
            for rounding in ("nearest", "stochastic")
        ]
    assert programs[0].streams == programs[1].streams
    assert [program.metadata["rounding"] for program in programs] == ["nearest", "stochastic"]


def test_products_of_float32_operands_keep_their_parts() -> None:
    """The BF16 parts that `matmul="float32"` makes of operands are rounded to nearest."""
    rng = np.random.default_rng(11)
    x, w = (rng.normal(size=(12, 12)).astype(np.float32) for _ in range(2))

    def fn(x: Any, w: Any) -> Any:
        product = x @ w
        return product, product.astype(jnp.bfloat16)

    results = [compiled(fn, x, w, rounding=r, matmul="float32") for r in ("nearest", "stochastic")]
    assert (results[0][0] == results[1][0]).all()
    assert (results[0][1] != results[1][1]).any()


def test_options_that_do_not_exist() -> None:
    with systolith.Device("golden", config="nano") as device:
        with pytest.raises(UnsupportedError, match=r"rounding='up'.*nearest, stochastic"):
            systolith.jit(lambda x: x, device=device, rounding="up")


# --- training ---------------------------------------------------------------------------------


def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "stochastic_rounding.py"
    spec = importlib.util.spec_from_file_location("stochastic_rounding_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_small_updates_of_bfloat16_weights(tmp_path: Path) -> None:
    """To nearest they are lost; stochastically the loss falls as with float32 weights."""
    module = example()
    runs = {name: module.train(*way, epochs=5, rate=0.003) for name, way in module.WAYS.items()}
    wide, nearest, stochastic = (run.epoch_losses for run in runs.values())
    fall = wide[0] - wide[-1]
    assert fall > 0.05
    assert nearest[0] - nearest[-1] < 0.35 * fall
    assert abs((stochastic[0] - stochastic[-1]) - fall) < 0.1 * fall
    module.plot(runs, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_training_on_the_gates_has_the_same_bits() -> None:
    module = example()
    runs = {
        kind: module.train(
            "bfloat16", "stochastic", device=kind, config="nano", epochs=1, steps=4, seed=2**32 - 2
        )
        for kind in ("golden", "rtl")
    }
    other = module.train("bfloat16", "stochastic", config="nano", epochs=1, steps=4, seed=5)
    golden, rtl = runs["golden"], runs["rtl"]
    assert golden.losses == rtl.losses
    for name, value in golden.params.items():
        assert (value.view(np.uint16) == rtl.params[name].view(np.uint16)).all()
    assert (golden.params["w1"] != other.params["w1"]).any()
