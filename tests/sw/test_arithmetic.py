"""The golden arithmetic against Berkeley SoftFloat, ml_dtypes and plain definitions."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import softfloatpy as sf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from systolith.golden import arithmetic
from systolith_hdl.formats import (
    CANONICAL_NAN,
    FORMATS,
    FP8_TYPES,
    INTEGERS,
    NARROW_FLOATS,
    DType,
)
from systolith_hdl.formats import WORDS as FORMATS_OF_WORDS
from systolith_hdl.isa import OPERATION_TYPES, REDUCTIONS, WORD_OPERATIONS, AluOp
from systolith_tb.stimulus import INTEGER_CORNERS

CORNERS = [
    0x00000000,  # zero
    0x00000001,  # least subnormal
    0x007FFFFF,  # largest subnormal
    0x00800000,  # least normal
    0x3F800000,  # one
    0x3F800001,
    0x3F7FFFFF,
    0x7F7FFFFF,  # largest
    0x7F800000,  # infinity
    0x7F800001,  # signalling NaN
    0x7FC00000,  # quiet NaN
    0x7FFFFFFF,
]
CORNERS += [corner | 1 << 31 for corner in CORNERS]
#: any bits, and exponents that meet often
WORDS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from(CORNERS),
    st.builds(
        lambda s, e, f: s << 31 | e << 23 | f,
        st.integers(0, 1),
        st.integers(120, 135),
        st.integers(0, 2**23 - 1),
    ),
    st.builds(lambda s, f: s << 31 | f, st.integers(0, 1), st.integers(0, 2**24)),
)
#: numbers of any type the tensor engine multiplies, as FP32: 10 bits of fraction hold them all
OPERANDS = st.one_of(WORDS, st.integers(0x32800000, 0x48000000)).flatmap(
    lambda w: st.sampled_from(
        [int(arithmetic.round_to(np.array([w], np.uint32), t)[0]) for t in NARROW_FLOATS]
    )
)


def words(values: object) -> np.ndarray:
    return np.asarray(values, np.uint32)


def soft(word: int) -> sf.Float32:
    return sf.Float32.from_bytes(int(word).to_bytes(4, "big"))


def from_soft(value: sf.Float32) -> int:
    word = int.from_bytes(value.to_bytes(), "big")
    return CANONICAL_NAN if word & 0x7FFFFFFF > 0x7F800000 else word


def is_nan(word: int) -> bool:
    return word & 0x7FFFFFFF > 0x7F800000


def truth(value: bool) -> int:
    return 0x3F800000 if value else 0


def order(word: int) -> int:
    """Position in the order of values, -0 before +0."""
    magnitude = word & 0x7FFFFFFF
    return -magnitude - 1 if word >> 31 else magnitude


def extreme(choose: Callable) -> Callable[[int, int], int]:
    def pick(a: int, b: int) -> int:
        return CANONICAL_NAN if is_nan(a) or is_nan(b) else choose(a, b, key=order)

    return pick


def nonzero(word: int) -> bool:
    return bool(word & 0x7FFFFFFF)


def modulo(a: int, b: int) -> int:
    """fmod by the remainder of IEEE 754, which is to the nearest multiple of b: one below zero has
    that of |b| added, which is exact."""
    size = soft(b & 0x7FFFFFFF)
    left = from_soft(sf.f32_rem(soft(a & 0x7FFFFFFF), size))
    if is_nan(left):
        return left
    return (from_soft(sf.f32_add(soft(left), size)) if left >> 31 else left) | a & 1 << 31


REFERENCE: dict[AluOp, Callable[[int, int], int]] = {
    AluOp.BYPASS: lambda a, b: a,
    AluOp.ADD: lambda a, b: from_soft(sf.f32_add(soft(a), soft(b))),
    AluOp.SUB: lambda a, b: from_soft(sf.f32_sub(soft(a), soft(b))),
    AluOp.RSUB: lambda a, b: from_soft(sf.f32_sub(soft(b), soft(a))),
    AluOp.MUL: lambda a, b: from_soft(sf.f32_mul(soft(a), soft(b))),
    AluOp.MAX: extreme(max),
    AluOp.MIN: extreme(min),
    AluOp.ABS_MAX: lambda a, b: extreme(max)(a & 0x7FFFFFFF, b & 0x7FFFFFFF),
    AluOp.EQ: lambda a, b: truth(bool(sf.f32_eq(soft(a), soft(b)))),
    AluOp.NE: lambda a, b: truth(not sf.f32_eq(soft(a), soft(b))),
    AluOp.LT: lambda a, b: truth(bool(sf.f32_lt(soft(a), soft(b)))),
    AluOp.LE: lambda a, b: truth(bool(sf.f32_le(soft(a), soft(b)))),
    AluOp.GT: lambda a, b: truth(bool(sf.f32_lt(soft(b), soft(a)))),
    AluOp.GE: lambda a, b: truth(bool(sf.f32_le(soft(b), soft(a)))),
    AluOp.LOGICAL_AND: lambda a, b: truth(nonzero(a) and nonzero(b)),
    AluOp.LOGICAL_OR: lambda a, b: truth(nonzero(a) or nonzero(b)),
    AluOp.LOGICAL_XOR: lambda a, b: truth(nonzero(a) != nonzero(b)),
    AluOp.BIT_AND: lambda a, b: a & b,
    AluOp.BIT_OR: lambda a, b: a | b,
    AluOp.BIT_XOR: lambda a, b: a ^ b,
    AluOp.SHIFT_LEFT: lambda a, b: a << min(b, 32) & 0xFFFFFFFF,
    AluOp.SHIFT_RIGHT: lambda a, b: a >> b,
    AluOp.SHIFT_RIGHT_SIGNED: lambda a, b: integer(a, True) >> b & 0xFFFFFFFF,
    AluOp.NEG: lambda a, b: CANONICAL_NAN if is_nan(a) else a ^ 1 << 31,
    AluOp.ABS: lambda a, b: CANONICAL_NAN if is_nan(a) else a & 0x7FFFFFFF,
    AluOp.SQUARE: lambda a, b: from_soft(sf.f32_mul(soft(a), soft(a))),
    AluOp.RELU: lambda a, b: CANONICAL_NAN if is_nan(a) else 0 if a >> 31 else a,
    AluOp.BIT_NOT: lambda a, b: a ^ 0xFFFFFFFF,
    AluOp.DIVIDE: lambda a, b: from_soft(sf.f32_div(soft(a), soft(b))),
    AluOp.MOD: modulo,
    AluOp.RECIPROCAL: lambda a, b: from_soft(sf.f32_div(soft(0x3F800000), soft(a))),
    AluOp.SQRT: lambda a, b: from_soft(sf.f32_sqrt(soft(a))),
    AluOp.RSQRT: lambda a, b: from_soft(sf.f32_div(soft(0x3F800000), sf.f32_sqrt(soft(a)))),
}


def integer(word: int, signed: bool) -> int:
    """The number that a word is."""
    return word - (1 << 32) * (signed and word >> 31)


#: the same of integers, as Python has them, before they are cut to 32 bits
INTEGER_REFERENCE: dict[AluOp, Callable[[int, int], int]] = {
    AluOp.BYPASS: lambda a, b: a,
    AluOp.ADD: lambda a, b: a + b,
    AluOp.SUB: lambda a, b: a - b,
    AluOp.RSUB: lambda a, b: b - a,
    AluOp.MUL: lambda a, b: a * b,
    AluOp.MAX: max,
    AluOp.MIN: min,
    AluOp.ABS_MAX: lambda a, b: max(abs(a), abs(b)),
    AluOp.EQ: lambda a, b: a == b,
    AluOp.NE: lambda a, b: a != b,
    AluOp.LT: lambda a, b: a < b,
    AluOp.LE: lambda a, b: a <= b,
    AluOp.GT: lambda a, b: a > b,
    AluOp.GE: lambda a, b: a >= b,
    AluOp.LOGICAL_AND: lambda a, b: a != 0 and b != 0,
    AluOp.LOGICAL_OR: lambda a, b: a != 0 or b != 0,
    AluOp.LOGICAL_XOR: lambda a, b: (a != 0) != (b != 0),
    AluOp.NEG: lambda a, b: -a,
    AluOp.ABS: lambda a, b: abs(a),
    AluOp.SQUARE: lambda a, b: a * a,
    AluOp.RELU: lambda a, b: max(a, 0),
    AluOp.DIVIDE: lambda a, b: math.trunc(Fraction(a, b)) if b else -1,
    AluOp.MOD: lambda a, b: a - b * math.trunc(Fraction(a, b)) if b else a,
}


def has(operation: AluOp, dtype: DType) -> bool:
    """Whether a type has an operation."""
    return dtype in OPERATION_TYPES.get(operation, FORMATS_OF_WORDS)


def reference(operation: AluOp, dtype: DType) -> Callable[[int, int], int]:
    """What an operation makes of two words of a type."""
    if dtype is DType.FP32 or operation in WORD_OPERATIONS:
        return REFERENCE[operation]
    signed = dtype is DType.INT32

    def step(a: int, b: int) -> int:
        result = INTEGER_REFERENCE[operation](integer(a, signed), integer(b, signed))
        return int(result) & 0xFFFFFFFF

    return step


def test_every_operation_has_a_reference() -> None:
    for dtype in FORMATS_OF_WORDS:
        wanted = {operation for operation in AluOp if has(operation, dtype)}
        fp32 = dtype is DType.FP32
        mine = set(REFERENCE if fp32 else INTEGER_REFERENCE)
        theirs = set(arithmetic.ALU if fp32 else arithmetic.INTEGER_ALU)
        assert mine | WORD_OPERATIONS == theirs | WORD_OPERATIONS == wanted


@pytest.mark.parametrize("dtype", FORMATS_OF_WORDS)
@pytest.mark.parametrize("operation", list(AluOp))
def test_alu_corners(operation: AluOp, dtype: DType) -> None:
    if not has(operation, dtype):
        return
    corners = np.concatenate([words(CORNERS), INTEGER_CORNERS])
    a, b = np.meshgrid(corners, corners)
    got = arithmetic.alu(operation, a, b, dtype)
    assert got.dtype == np.uint32
    step = reference(operation, dtype)
    want = [step(int(x), int(y)) for x, y in zip(a.flat, b.flat, strict=True)]
    np.testing.assert_array_equal(got.ravel(), words(want))


@settings(max_examples=600)
@given(
    st.sampled_from(list(AluOp)),
    st.sampled_from(FORMATS_OF_WORDS),
    st.lists(st.tuples(WORDS, WORDS | st.integers(0, 40)), min_size=1, max_size=40),
)
def test_alu(operation: AluOp, dtype: DType, pairs: list[tuple[int, int]]) -> None:
    assume(has(operation, dtype))
    a, b = words([p[0] for p in pairs]), words([p[1] for p in pairs])
    step = reference(operation, dtype)
    want = words([step(x, y) for x, y in pairs])
    np.testing.assert_array_equal(arithmetic.alu(operation, a, b, dtype), want)


@settings(max_examples=400)
@given(
    st.lists(WORDS, min_size=1, max_size=40),
    st.sampled_from([DType.INT32, DType.UINT32]),
    st.sampled_from(list(DType)),
)
def test_conversions_of_integers(row: list[int], given_type: DType, dtype: DType) -> None:
    """To integers modulo their size; to floats one rounding of the integer, as in a list of all
    numbers."""
    # Halfway between two narrow numbers, and one beside it, which two roundings would not see.
    ties = [
        (1 << top) + (1 << top - 1 - FORMATS[narrow].fraction) + beside
        for top in (15, 25, 30)
        for narrow in (DType.FP32, *NARROW_FLOATS)
        if top > FORMATS[narrow].fraction
        for beside in (-1, 0, 1)
    ]
    source = words([*row, *INTEGER_CORNERS.tolist(), *ties])
    got = arithmetic.convert(source, given_type, dtype)
    numbers = [integer(word, given_type is DType.INT32) for word in source.tolist()]
    if dtype in INTEGERS:
        bits = FORMATS[dtype].bits
        wrapped = [n & (1 << bits) - 1 for n in numbers]
        if dtype is not DType.UINT32:
            wrapped = [n - (1 << bits) * (n >> bits - 1) for n in wrapped]
        want = words([n & 0xFFFFFFFF for n in wrapped])
    elif dtype is DType.FP32:
        wide = [sf.Int64.from_bytes(n.to_bytes(8, "big", signed=True)) for n in numbers]
        want = words([from_soft(sf.i64_to_f32(n)) for n in wide])
    else:
        bits = nearest_of(np.array(numbers, np.float64), dtype)
        want = unpacked(bits, dtype)
    np.testing.assert_array_equal(got, want)


@settings(max_examples=400)
@given(
    st.lists(WORDS, min_size=1, max_size=40),
    st.sampled_from([DType.INT32, DType.UINT32, DType.INT8]),
)
def test_integers_of_any_float(row: list[int], dtype: DType) -> None:
    """Toward zero, within the range, NaN to 0."""
    ends = np.iinfo(FORMATS[dtype].numpy)
    near = np.array([ends.min - 1, ends.min, ends.max, ends.max + 1, 0.99, -0.99], np.float32)
    source = words([*row, *near.view(np.uint32), *CORNERS])
    want = []
    with np.errstate(invalid="ignore"):
        values = source.view(np.float32).astype(np.float64)
    for value in values.tolist():
        inside = 0 if math.isnan(value) else min(max(value, ends.min), ends.max)
        want.append(math.trunc(inside) & 0xFFFFFFFF)
    np.testing.assert_array_equal(arithmetic.convert(source, DType.FP32, dtype), words(want))


def nearest(source: np.ndarray, dtype: DType) -> np.ndarray:
    """`nearest_of` of FP32 words, NaNs canonical."""
    with np.errstate(invalid="ignore"):
        values = source.view(np.float32).astype(np.float64)
    bits = nearest_of(values, dtype, source >> 31)
    nan = (source & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, FORMATS[dtype].nan, bits).astype(bits.dtype)


def nearest_of(values: np.ndarray, dtype: DType, negative: np.ndarray | None = None) -> np.ndarray:
    """Bits of a type for numbers: the nearer of the two neighbours in a list of
    all numbers, of two as near the one with even bits; what is nearest to the number that would
    follow the largest overflows."""
    form = FORMATS[dtype]
    sign = 1 << form.bits - 1
    # Magnitudes ascend with their bits, so the place in the list is the bits.
    with np.errstate(all="ignore"):
        numbers = np.arange(sign, dtype=f"u{form.bytes}").view(form.numpy).astype(np.float64)
    numbers = numbers[: np.flatnonzero(np.isfinite(numbers))[-1] + 1]
    largest = len(numbers) - 1
    numbers = np.append(numbers, 2 * numbers[-1] - numbers[-2])
    with np.errstate(invalid="ignore"):
        value = np.minimum(np.abs(values), 1e300)
    high = np.clip(np.searchsorted(numbers, value), 1, largest + 1)
    below, above = value - numbers[high - 1], numbers[high] - value
    low_is_even = (high - 1) % 2 == 0
    bits = np.where((below < above) | ((below == above) & low_is_even), high - 1, high)
    overflow = bits > largest
    infinity = ((1 << form.exponent) - 1) << form.fraction
    negative = values < 0 if negative is None else negative
    bits = np.where(overflow, infinity, bits) + negative.astype(np.int64) * sign
    nan = overflow & (not form.infinite)
    return np.where(nan, form.nan, bits).astype(f"u{form.bytes}")


def rounding_cases(dtype: DType) -> np.ndarray:
    """Upper halves of all FP32 words with lower halves on both sides of every tie, all bits that
    decide among FP16's subnormals, and random words."""
    low = words([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    every = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16) | low
    rng = np.random.default_rng(dtype.value)
    near = rng.integers(0x32000000, 0x48000000, 200_000, dtype=np.uint32)
    near &= np.uint32(0xFFFFFFFF) << rng.integers(0, 20, near.size, dtype=np.uint32)
    anything = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    return np.concatenate([every.ravel(), near, near | np.uint32(1 << 31), anything])


@pytest.mark.parametrize("dtype", NARROW_FLOATS)
def test_rounding_to_the_nearest_number(dtype: DType) -> None:
    source = rounding_cases(dtype)
    bits = arithmetic.pack(source, dtype)
    np.testing.assert_array_equal(bits, nearest(source, dtype))
    # Rounding in place keeps the same number.
    np.testing.assert_array_equal(arithmetic.round_to(source, dtype), unpacked(bits, dtype))


def unpacked(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """FP32 words of packed numbers, NaNs canonical, by their definition in integers."""
    form = FORMATS[dtype]
    bits = bits.astype(np.int64)
    fraction = bits & (1 << form.fraction) - 1
    exponent = bits >> form.fraction & (1 << form.exponent) - 1
    scale = np.maximum(exponent, 1) - form.bias - form.fraction
    magnitude = np.ldexp((fraction + (exponent > 0) * (1 << form.fraction)).astype(float), scale)
    top = exponent == (1 << form.exponent) - 1
    if form.infinite:
        magnitude = np.where(top, np.where(fraction == 0, np.inf, np.nan), magnitude)
    else:
        magnitude = np.where(top & (fraction == (1 << form.fraction) - 1), np.nan, magnitude)
    value = np.where(bits >> form.bits - 1, -magnitude, magnitude).astype(np.float32)
    return arithmetic.canonical(value)


@pytest.mark.parametrize("dtype", NARROW_FLOATS)
def test_widening_every_number(dtype: DType) -> None:
    form = FORMATS[dtype]
    bits = np.arange(1 << form.bits).astype(f"u{form.bytes}")
    wide = arithmetic.unpack(bits, dtype)
    if dtype is DType.BF16:
        nan = arithmetic.is_nan(wide)
        np.testing.assert_array_equal(wide[nan] >> 16, bits[nan])
        wide = arithmetic.canonical(wide.view(np.float32))
    np.testing.assert_array_equal(wide, unpacked(bits, dtype))
    number = ~arithmetic.is_nan(wide)
    np.testing.assert_array_equal(arithmetic.pack(wide, dtype)[number], bits[number])
    assert set(arithmetic.pack(wide, dtype)[~number].tolist()) == {form.nan}


@pytest.mark.parametrize(
    ("dtype", "convert"), [(DType.BF16, sf.f32_to_bf16), (DType.FP16, sf.f32_to_f16)]
)
def test_rounding_equals_softfloat(dtype: DType, convert: Callable) -> None:
    source = rounding_cases(dtype)[::977]
    for word, bits in zip(source.tolist(), arithmetic.pack(source, dtype).tolist(), strict=True):
        if not is_nan(word):
            assert bits == int.from_bytes(convert(soft(word)).to_bytes(), "big")


def test_fp32_passes() -> None:
    source = words(CORNERS)
    for function in (arithmetic.round_to, arithmetic.pack, arithmetic.unpack):
        np.testing.assert_array_equal(function(source, DType.FP32), source)


def test_integers_move_as_they_are() -> None:
    source = words(CORNERS + [i % 2**32 for i in range(-300, 300)])
    for function in (arithmetic.pack, arithmetic.unpack):
        np.testing.assert_array_equal(function(source, DType.INT32), source)
        np.testing.assert_array_equal(function(source, DType.UINT32), source)
    bits = arithmetic.pack(source, DType.INT8)
    np.testing.assert_array_equal(bits.view(np.int8), source.view(np.int32).astype(np.int8))
    every = np.arange(-128, 128, dtype=np.int8)
    wide = arithmetic.unpack(every.view(np.uint8), DType.INT8)
    np.testing.assert_array_equal(wide.view(np.int32), every)
    # As operands: only the low 8 bits count.
    for above in (0, 0x12345600, 0xFFFFFF00):
        word = every.view(np.uint8).astype(np.uint32) | np.uint32(above)
        np.testing.assert_array_equal(
            arithmetic.operand(word, DType.INT8).view(np.float32), every.astype(np.float32)
        )


@settings(max_examples=500)
@given(st.one_of(WORDS, st.builds(lambda s, e, f: s << 31 | e << 23 | f, st.integers(0, 1),
                                  st.integers(125, 160), st.integers(0, 2**23 - 1))))  # fmt: skip
def test_integers_of_floats(word: int) -> None:
    got = int(arithmetic.to_int32(words([word])).view(np.int32)[0])
    if is_nan(word):
        assert got == 0
        return
    value = float(words([word]).view(np.float32)[0])
    if abs(value) < 2**31:
        assert got == math.trunc(value)
    else:
        assert got == (2**31 - 1 if value > 0 else -(2**31))


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 128), seed=st.integers(0, 2**32 - 1))
def test_a_tile_of_int8_is_exact(k: int, seed: int) -> None:
    """Up to 128 rows, the most an array has: as numpy's int32 product, the worst case too."""
    rng = np.random.default_rng(seed)
    w = rng.choice(np.array([-128, 127, 0, 1], np.int8), (k, 5))
    x = rng.integers(-128, 128, (k, 7)).astype(np.int8)
    w[:, 0], x[:, 0] = -128, -128
    tile = arithmetic.matmul(
        *(arithmetic.operand(v.view(np.uint8).astype(np.uint32), DType.INT8) for v in (w, x))
    )
    want = w.T.astype(np.int32) @ x.astype(np.int32)
    np.testing.assert_array_equal(arithmetic.to_int32(tile).view(np.int32), want)
    assert want[0, 0] == k << 14


@settings(max_examples=300)
@given(
    operation=st.sampled_from(sorted(REDUCTIONS, key=lambda op: op.value)),
    dtype=st.sampled_from(FORMATS_OF_WORDS),
    row=st.lists(WORDS, min_size=1, max_size=23),
)
def test_reduce(operation: AluOp, dtype: DType, row: list[int]) -> None:
    step = reference(operation, dtype)
    acc = [REDUCTIONS[operation][dtype]] * 4
    for i, word in enumerate(row):
        acc[i % 4] = step(acc[i % 4], word)
    want = step(step(acc[0], acc[1]), step(acc[2], acc[3]))
    got = arithmetic.reduce_last(operation, words([row, row]), dtype)
    np.testing.assert_array_equal(got, words([want, want]))


@settings(max_examples=300)
@given(k=st.integers(1, 6), m=st.integers(1, 3), f=st.integers(1, 3), data=st.data())
def test_matmul_is_a_chain_of_single_roundings(k: int, m: int, f: int, data: st.DataObject) -> None:
    w = np.array(data.draw(st.lists(OPERANDS, min_size=k * m, max_size=k * m)), np.uint32)
    x = np.array(data.draw(st.lists(OPERANDS, min_size=k * f, max_size=k * f)), np.uint32)
    w, x = w.reshape(k, m), x.reshape(k, f)
    got = arithmetic.matmul(w, x)
    for i in range(m):
        for j in range(f):
            acc = soft(0)
            for step in range(k):
                # A fused multiply-add of FP32 rounds once, and every operand is an FP32 number.
                acc = sf.f32_mul_add(soft(int(w[step, i])), soft(int(x[step, j])), acc)
            assert int(got[i, j]) == from_soft(acc)


@pytest.mark.parametrize("dtype", NARROW_FLOATS)
def test_both_matmul_paths_agree(dtype: DType) -> None:
    """Values near one take the FP32 path; a single tiny one takes the whole tile off it."""
    rng = np.random.default_rng(1)
    kind = FORMATS[dtype].numpy
    for _ in range(20):
        w = rng.standard_normal((16, 8)).astype(np.float16).astype(np.float32)
        x = rng.standard_normal((16, 5)).astype(kind).astype(np.float32)
        fast = arithmetic.matmul(w.view(np.uint32), x.view(np.uint32))
        wide = np.concatenate([x, np.full((16, 1), 2.0**-120, np.float32)], axis=1)
        assert not arithmetic._safe(wide.view(np.uint32))
        slow = arithmetic.matmul(w.view(np.uint32), wide.view(np.uint32))
        np.testing.assert_array_equal(fast, slow[:, :5])


@given(st.lists(WORDS, min_size=1, max_size=8))
def test_safe_products_are_exact(row: list[int]) -> None:
    values = words(row) & np.uint32(0xFFFFE000)
    if arithmetic._safe(values):
        floats = arithmetic.floats(values)
        for a in floats:
            for b in floats:
                exact = float(a) * float(b)
                assert float(a * b) == exact and not math.isinf(exact)


def fp8_numbers() -> np.ndarray:
    """Every finite FP8 number, of both types, as FP32."""
    numbers = [
        np.arange(256, dtype=np.uint8).view(FORMATS[t].numpy).astype(np.float32) for t in FP8_TYPES
    ]
    return np.unique([x for x in np.concatenate(numbers) if np.isfinite(x)])


def test_every_sum_of_two_fp8_products_rounds_once() -> None:
    """Products are exact in FP32, so their FP32 sum is rounded once; and rounding the FP64 sum to
    FP32 gives the same, for every pair of products there is."""
    numbers = fp8_numbers()
    exact = np.unique(np.outer(numbers, numbers).astype(np.float64))
    assert (numbers.astype(np.float64)[:, None] * numbers == np.outer(numbers, numbers)).all()
    products = exact.astype(np.float32)
    assert len(products) > 2900 and (products == exact).all()
    for product in products:
        twice = (np.float64(product) + exact).astype(np.float32)
        assert ((product + products).view(np.uint32) == twice.view(np.uint32)).all()


@settings(max_examples=300)
@given(k=st.integers(1, 6), m=st.integers(1, 3), f=st.integers(1, 3), data=st.data())
def test_pairs_are_a_chain_of_two_roundings(k: int, m: int, f: int, data: st.DataObject) -> None:
    def operand(columns: int) -> np.ndarray:
        dtype = data.draw(st.sampled_from(FP8_TYPES))
        row = st.lists(st.integers(0, 255), min_size=k * columns, max_size=k * columns)
        bits = np.array(data.draw(row), np.uint8).reshape(k, columns)
        return arithmetic.unpack(bits, dtype)

    w, x = (operand(m), operand(m)), (operand(f), operand(f))
    found = arithmetic.matmul_pairs(w, x)
    for column in range(m):
        for row in range(f):
            acc = soft(0)
            for step in range(k):
                p, q = (
                    sf.f32_mul(soft(w[i][step, column]), soft(x[i][step, row])) for i in range(2)
                )
                acc = sf.f32_add(acc, sf.f32_add(p, q))
            assert found[column, row] == from_soft(acc)
