"""Arithmetic as the core does it, on numpy arrays of 32-bit words.

Every function takes and returns ``uint32`` arrays that hold the bits of FP32 values, or of 32-bit
integers where it says so. Rounding is to nearest even, subnormals are kept, overflow gives
infinity, and whatever is NaN comes out as `CANONICAL_NAN`. Only BYPASS and the operations on words
pass a NaN on as it is. Integers are calculated modulo 2**32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from systolith_hdl.formats import CANONICAL_NAN, FORMATS, INTEGERS, WORDS, DType
from systolith_hdl.isa import REDUCE_ACCUMULATORS, REDUCTIONS, AluOp

Words = np.ndarray[Any, np.dtype[np.uint32]]

_ABS = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_NAN = np.uint32(CANONICAL_NAN)
_ONE = np.uint32(0x3F800000)
_ZERO = np.uint32(0)


def _quiet(function: Callable[..., Words]) -> Callable[..., Words]:
    """IEEE-754 flags are not kept, so numpy should not warn of them."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Words:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return wrapped


def floats(words: Words) -> np.ndarray:
    """The same bits as float32."""
    return words.view(np.float32)


def is_nan(words: Words) -> np.ndarray:
    """Which words hold a NaN."""
    return (words & _ABS) > _INFINITY


def canonical(values: np.ndarray) -> Words:
    """Bits of a float32 array, every NaN replaced by the canonical one."""
    nan = values != values
    words = np.asarray(values).view(np.uint32)
    return np.where(nan, _NAN, words) if nan.any() else words


@_quiet
def round_to(words: Words, dtype: DType, random: Words | None = None) -> Words:
    """Rounds FP32 to a narrow float and returns that value as FP32 again; FP32 itself returns
    the words as they are. To nearest even, or stochastically with the `random` words."""
    if dtype is DType.FP32:
        return words
    if random is not None:
        return _round_stochastic(words, dtype, random)
    return canonical(floats(words).astype(FORMATS[dtype].numpy).astype(np.float32))


def _round_stochastic(words: Words, dtype: DType, random: Words) -> Words:
    """Rounds FP32 to a narrow float: up in magnitude if the part of the number that the type does
    not hold, plus as many of the low bits of `random`, reaches one unit of the type.

    A number below 2**-9 of the type's smallest becomes zero: its part would need more than 32
    random bits. (Not to BF16, which needs 16 at any magnitude.)
    """
    form = FORMATS[dtype]
    words, random = np.broadcast_arrays(words, random)
    exponent = np.maximum((words >> 23) & 0xFF, 1).astype(np.int64)
    hidden = ((words >> 23) & 0xFF != 0).astype(np.uint64) << np.uint64(23)
    significand = (words & 0x7FFFFF).astype(np.uint64) | hidden
    least = 127 + 1 - form.bias  # FP32's exponent field of the type's smallest normal number
    dropped = np.uint64(23 - form.fraction) + np.maximum(least - exponent, 0).astype(np.uint64)
    cut = np.minimum(dropped, np.uint64(32))
    noise = random & ((np.uint64(1) << cut) - np.uint64(1))
    kept = np.where(dropped > 32, np.uint64(0), (significand + noise) >> cut)
    # kept units of 2**(exponent - 150 + cut): few bits, exact in float64.
    value = np.ldexp(kept.astype(np.float64), (exponent - 150).astype(int) + cut.astype(int))
    largest = np.uint32(form.largest).view(np.float32)
    value = np.where(value > largest, np.inf if form.infinite else np.nan, value)
    special = (words & _ABS) >= _INFINITY
    value = np.where(special, np.inf if form.infinite else np.nan, value)
    signed = np.where(words >> 31 == 1, -value, value).astype(np.float32)
    return np.where(is_nan(words), _NAN, canonical(signed))


def operand(words: Words, dtype: DType) -> Words:
    """What the tensor engine makes of words of a type, as FP32: floats rounded to it; of INT8 the
    low 8 bits as a number."""
    if dtype is DType.INT8:
        return words.astype(np.int8).astype(np.float32).view(np.uint32)
    return round_to(words, dtype)


@_quiet
def to_integer(words: Words, dtype: DType) -> Words:
    """Integers of FP32 numbers, rounded toward zero; the nearest end of the type's range for what
    is outside of it, 0 for NaN."""
    ends = np.iinfo(FORMATS[dtype].numpy)
    values = np.trunc(floats(words).astype(np.float64))
    inside = np.clip(np.where(np.isnan(values), 0.0, values), float(ends.min), float(ends.max))
    return inside.astype(np.int64).astype(np.uint32)


def to_int32(words: Words) -> Words:
    """`to_integer` of INT32."""
    return to_integer(words, DType.INT32)


def from_integer(words: Words, given: DType, *, odd: bool = False) -> Words:
    """FP32 of integers, to nearest even. With `odd` to odd: toward zero, and where that is not
    exact the last bit is set. Rounded further to a narrow type, to nearest, that gives what one
    rounding of the integer gives (docs/numerics.md)."""
    values = words.view(FORMATS[given].numpy).astype(np.float64)  # exact
    nearest = values.astype(np.float32)
    if not odd:
        return nearest.view(np.uint32)
    far = np.abs(nearest.astype(np.float64)) > np.abs(values)
    toward_zero = nearest.view(np.uint32) - far.astype(np.uint32)
    inexact = nearest.astype(np.float64) != values
    return toward_zero | inexact.astype(np.uint32)


def convert(words: Words, given: DType, dtype: DType, random: Words | None = None) -> Words:
    """Words of type `given`, one of `WORDS`, as the vector engine writes them in type `dtype`."""
    if given is DType.FP32:
        return to_integer(words, dtype) if dtype in INTEGERS else round_to(words, dtype, random)
    if dtype is DType.INT8:
        return words.astype(np.int8).astype(np.int32).view(np.uint32)
    if dtype in INTEGERS:
        return words
    return round_to(from_integer(words, given, odd=dtype is not DType.FP32), dtype, random)


@_quiet
def pack(words: Words, dtype: DType, random: Words | None = None) -> np.ndarray:
    """Rounds FP32 to a narrow float, as `round_to` does; returns its bits, every NaN the canonical
    one of the type. FP32, INT32 and UINT32 return the words as they are, INT8 their low 8 bits."""
    if dtype in WORDS:
        return words
    if dtype is DType.INT8:
        return words.astype(np.uint8)
    form = FORMATS[dtype]
    if random is not None:
        words = _round_stochastic(words, dtype, random)
    values = floats(words).astype(form.numpy)
    bits = values.view(f"u{form.bytes}")
    return np.where(values != values, bits.dtype.type(form.nan), bits)


@_quiet
def unpack(bits: np.ndarray, dtype: DType) -> Words:
    """Words of packed elements: exact. A NaN of FP16 or FP8 becomes the canonical one, FP32 and
    BF16 keep their bits. Integers stay integers."""
    if dtype in WORDS:
        return bits
    if dtype is DType.INT8:
        return bits.view(np.int8).astype(np.int32).view(np.uint32)
    if dtype is DType.BF16:
        return bits.astype(np.uint32) << np.uint32(16)
    return canonical(bits.view(FORMATS[dtype].numpy).astype(np.float32))


@_quiet
def add(a: Words, b: Words) -> Words:
    return canonical(floats(a) + floats(b))


@_quiet
def sub(a: Words, b: Words) -> Words:
    return canonical(floats(a) - floats(b))


@_quiet
def mul(a: Words, b: Words) -> Words:
    return canonical(floats(a) * floats(b))


def _key(words: Words) -> np.ndarray:
    """Signed integers in the order of the values, -0 just below +0."""
    signed = words.view(np.int32)
    return signed ^ ((signed >> 31) & 0x7FFFFFFF)


def _from_key(keys: np.ndarray) -> Words:
    """The words that `_key` gave these integers for."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(np.uint32)


def _either_nan(a: Words, b: Words, result: Words) -> Words:
    return np.where(is_nan(a) | is_nan(b), _NAN, result)


def maximum(a: Words, b: Words) -> Words:
    """The larger; +0 is larger than -0."""
    return _either_nan(a, b, np.where(_key(a) >= _key(b), a, b))


def minimum(a: Words, b: Words) -> Words:
    """The smaller; -0 is smaller than +0."""
    return _either_nan(a, b, np.where(_key(a) <= _key(b), a, b))


def abs_max(a: Words, b: Words) -> Words:
    """The larger of the absolute values."""
    return _either_nan(a, b, np.maximum(a & _ABS, b & _ABS))


def truth(condition: np.ndarray) -> Words:
    """1.0 where true, 0.0 elsewhere."""
    return np.where(condition, _ONE, _ZERO)


def nonzero(words: Words, dtype: DType = DType.FP32) -> np.ndarray:
    """Which words of a type are not zero: of FP32 neither +0 nor -0; NaN is not zero."""
    return (words & _ABS if dtype is DType.FP32 else words) != 0


def _shift(shift: Callable[..., Words]) -> Callable[[Words, Words], Words]:
    """A shift of words, which numpy leaves undefined from 32 places on."""
    # Two of 31 places at most, together any number from 0 to 32 and more.
    return lambda a, b: shift(shift(a, np.minimum(b, 31)), np.minimum(np.maximum(b, 31) - 31, 1))


def _signed_right(a: Words, b: Words) -> Words:
    return (a.view(np.int32) >> b.astype(np.int32)).view(np.uint32)


@_quiet
def divide(a: Words, b: Words) -> Words:
    return canonical(floats(a) / floats(b))


@_quiet
def modulo(a: Words, b: Words) -> Words:
    """C's fmod, which is exact."""
    return canonical(np.fmod(floats(a), floats(b)))


@_quiet
def square_root(a: Words) -> Words:
    return canonical(np.sqrt(floats(a)))


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers, toward zero; all bits set where b is 0."""
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    size = np.abs(wide_a) // np.where(b == 0, 1, np.abs(wide_b))
    result = np.where((wide_a < 0) == (wide_b < 0), size, -size)
    return np.where(b == 0, -1, result).astype(np.uint32)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What the quotient leaves; a where b is 0."""
    left = a.astype(np.uint32) - _quotient(a, b) * b.astype(np.uint32)
    return np.where(b == 0, a.astype(np.uint32), left)


#: operations on words, whatever they hold
_WORD_ALU: dict[AluOp, Callable[[Words, Words], Words]] = {
    AluOp.BYPASS: lambda a, b: a,
    AluOp.BIT_AND: lambda a, b: a & b,
    AluOp.BIT_OR: lambda a, b: a | b,
    AluOp.BIT_XOR: lambda a, b: a ^ b,
    AluOp.BIT_NOT: lambda a, b: ~a,
    AluOp.SHIFT_LEFT: _shift(np.left_shift),
    AluOp.SHIFT_RIGHT: _shift(np.right_shift),
    AluOp.SHIFT_RIGHT_SIGNED: _shift(_signed_right),
}

#: what `a op b` is of integers, on arrays of their own type; compares give bools
INTEGER_ALU: dict[AluOp, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    AluOp.ADD: np.add,
    AluOp.SUB: np.subtract,
    AluOp.RSUB: lambda a, b: b - a,
    AluOp.MUL: np.multiply,
    AluOp.MAX: np.maximum,
    AluOp.MIN: np.minimum,
    # As unsigned numbers: the absolute value of -2**31 is 2**31.
    AluOp.ABS_MAX: lambda a, b: np.maximum(np.abs(a).view(np.uint32), np.abs(b).view(np.uint32)),
    AluOp.EQ: np.equal,
    AluOp.NE: np.not_equal,
    AluOp.LT: np.less,
    AluOp.LE: np.less_equal,
    AluOp.GT: np.greater,
    AluOp.GE: np.greater_equal,
    AluOp.LOGICAL_AND: np.logical_and,
    AluOp.LOGICAL_OR: np.logical_or,
    AluOp.LOGICAL_XOR: np.logical_xor,
    AluOp.NEG: lambda a, b: 0 - a,
    AluOp.ABS: lambda a, b: np.abs(a),
    AluOp.SQUARE: lambda a, b: a * a,
    AluOp.RELU: lambda a, b: np.maximum(a, 0),
    AluOp.DIVIDE: _quotient,
    AluOp.MOD: _remainder,
}

#: what `a op b` is of FP32
ALU: dict[AluOp, Callable[[Words, Words], Words]] = {
    **_WORD_ALU,
    AluOp.ADD: add,
    AluOp.SUB: sub,
    AluOp.RSUB: lambda a, b: sub(b, a),
    AluOp.MUL: mul,
    AluOp.MAX: maximum,
    AluOp.MIN: minimum,
    AluOp.ABS_MAX: abs_max,
    AluOp.EQ: lambda a, b: truth(floats(a) == floats(b)),
    AluOp.NE: lambda a, b: truth(floats(a) != floats(b)),
    AluOp.LT: lambda a, b: truth(floats(a) < floats(b)),
    AluOp.LE: lambda a, b: truth(floats(a) <= floats(b)),
    AluOp.GT: lambda a, b: truth(floats(a) > floats(b)),
    AluOp.GE: lambda a, b: truth(floats(a) >= floats(b)),
    AluOp.LOGICAL_AND: lambda a, b: truth(nonzero(a) & nonzero(b)),
    AluOp.LOGICAL_OR: lambda a, b: truth(nonzero(a) | nonzero(b)),
    AluOp.LOGICAL_XOR: lambda a, b: truth(nonzero(a) ^ nonzero(b)),
    AluOp.NEG: lambda a, b: canonical(-floats(a)),
    AluOp.ABS: lambda a, b: canonical(np.abs(floats(a))),
    AluOp.SQUARE: lambda a, b: mul(a, a),
    AluOp.RELU: lambda a, b: maximum(a, np.zeros_like(a)),
    AluOp.DIVIDE: divide,
    AluOp.MOD: modulo,
    AluOp.RECIPROCAL: lambda a, b: divide(np.full_like(a, _ONE), a),
    AluOp.SQRT: lambda a, b: square_root(a),
    AluOp.RSQRT: lambda a, b: divide(np.full_like(a, _ONE), square_root(a)),
}

#: reductions of words, in any order
_WORD_REDUCTIONS = {
    AluOp.BIT_AND: np.bitwise_and,
    AluOp.BIT_OR: np.bitwise_or,
    AluOp.BIT_XOR: np.bitwise_xor,
}
#: reductions of integers, in any order
_INTEGER_REDUCTIONS: dict[AluOp, Callable[..., np.ndarray]] = {
    AluOp.ADD: np.add.reduce,
    AluOp.MUL: np.multiply.reduce,
    AluOp.MAX: np.max,
    AluOp.MIN: np.min,
    AluOp.ABS_MAX: lambda a, axis: np.abs(a).view(np.uint32).max(axis=axis),
}


#: reductions that pick an element: (choice among keys, what is done to the words before)
_EXTREMES: dict[AluOp, tuple[Callable[..., np.ndarray], Callable[[Words], Words]]] = {
    AluOp.MAX: (np.max, lambda words: words),
    AluOp.MIN: (np.min, lambda words: words),
    AluOp.ABS_MAX: (np.max, lambda words: words & _ABS),
}


def alu(operation: AluOp, a: Words, b: Words, dtype: DType = DType.FP32) -> Words:
    """`a operation b` of words of a type, one of `WORDS`, element by element; the arrays
    broadcast."""
    with np.errstate(all="ignore"):
        if dtype is DType.FP32 or operation in _WORD_ALU:
            return ALU[operation](a, b)
        kind = FORMATS[dtype].numpy
        result = INTEGER_ALU[operation](a.view(kind), b.view(kind))
        return result.astype(np.uint32) if result.dtype == np.bool_ else result.view(np.uint32)


@_quiet
def reduce_last(operation: AluOp, words: Words, dtype: DType = DType.FP32) -> Words:
    """Reduces the last axis of words of a type the way REDUCE does; the axis is dropped.

    Element i goes to accumulator i mod 4, in order; the result is
    (acc0 op acc1) op (acc2 op acc3).
    """
    if operation in _WORD_REDUCTIONS:
        return _WORD_REDUCTIONS[operation].reduce(words, axis=-1)
    if dtype is not DType.FP32:
        numbers = np.ascontiguousarray(words).view(FORMATS[dtype].numpy)
        # numpy would sum in 64 bits; nothing is lost by that.
        return _INTEGER_REDUCTIONS[operation](numbers, axis=-1).astype(np.uint32)
    if operation in _EXTREMES:
        # The order of values is total and a NaN stays, so the grouping does not matter.
        choose, prepare = _EXTREMES[operation]
        nan = is_nan(words).any(axis=-1)
        return np.where(nan, _NAN, _from_key(choose(_key(prepare(words)), axis=-1)))
    combine: np.ufunc = np.add if operation is AluOp.ADD else np.multiply
    start = np.uint32(REDUCTIONS[operation][dtype]).view(np.float32)
    acc0, acc1, acc2, acc3 = _chains(combine, start, floats(words), REDUCE_ACCUMULATORS)
    return canonical(combine(combine(acc0, acc1), combine(acc2, acc3)))


def _chains(
    combine: np.ufunc, start: np.float32, values: np.ndarray, count: int
) -> list[np.ndarray]:
    """What accumulators become to which the elements of the last axis go in turn."""
    found = []
    for i in range(count):
        part = values[..., i::count]
        # `accumulate` goes element by element, where `reduce` would sum in pairs. It begins with
        # the first element instead of the start value, which matters for a sum of -0 only: so the
        # start value is added last.
        chain = combine.accumulate(part, axis=-1)[..., -1] if part.shape[-1] else start
        found.append(combine(start, chain))
    return found


@_quiet
def statistics(words: Words, dtype: DType = DType.FP32) -> Words:
    """The sum of the last axis and that of its squares, in its place: what STATISTICS gives."""
    sums = []
    for terms in (words, alu(AluOp.SQUARE, words, words, dtype)):
        if dtype is DType.FP32:
            acc0, acc1 = _chains(np.add, np.float32(0), floats(terms), REDUCE_ACCUMULATORS // 2)
            sums.append(canonical(acc0 + acc1))
        else:
            sums.append(reduce_last(AluOp.ADD, terms, dtype))
    return np.stack(sums, axis=-1)


def top(words: Words, kept: int, *, smallest: bool) -> tuple[Words, Words]:
    """The `kept` largest or smallest of the last axis, the greatest or the least first, and their
    indices. A NaN comes before any number; of equal words, the one of the lower index."""
    keys = _key(words).astype(np.int64)
    keys = np.where(is_nan(words), 1 << 32, -keys if smallest else keys)
    indices = np.argsort(-keys, axis=-1, kind="stable")[..., :kept]
    found = np.take_along_axis(words, indices, axis=-1)
    return np.where(is_nan(found), _NAN, found), indices.astype(np.uint32)


def _safe(words: Words) -> bool:
    """True if all values are zero or within 2**-62 to 2**63: products of two are exact in FP32."""
    exponent = (words >> 23) & 0xFF
    return bool((((exponent >= 65) & (exponent <= 189)) | ((words & _ABS) == 0)).all())


@_quiet
def matmul(stationary: Words, moving: Words) -> Words:
    """One tile: out[m, f] is the chain ``acc = fp32(acc + stationary[k, m] * moving[k, f])`` in
    the order of k, from +0.0, each product exact and each step rounded once.

    Parameters
    ----------
    stationary : [K, M] FP32 words that hold values of narrow floats or INT8
    moving : [K, F], likewise
    """
    w, x = floats(stationary), floats(moving)
    if _safe(stationary) and _safe(moving):
        # The products have up to 22 significant bits and are normal: FP32 holds them exactly.
        products = w[:, :, None] * x[:, None, :]
        total = np.zeros(products.shape[1:], np.float32)
        for product in products:
            total += product
        return canonical(total)
    # FP64 holds every product exactly. Its sum with an FP32 number rounds to 53 bits first, which
    # is innocuous (docs/numerics.md).
    acc = np.zeros((w.shape[1], x.shape[1]), np.float32)
    for k in range(w.shape[0]):
        exact = w[k].astype(np.float64)[:, None] * x[k].astype(np.float64)[None, :]
        acc = (acc.astype(np.float64) + exact).astype(np.float32)
    return canonical(acc)


@_quiet
def matmul_pairs(stationary: tuple[Words, Words], moving: tuple[Words, Words]) -> Words:
    """One tile of pairs: out[m, f] is the chain ``acc = fp32(acc + fp32(w0[k, m] * x0[k, f] +
    w1[k, m] * x1[k, f]))`` in the order of k, from +0.0, each product exact.

    Parameters
    ----------
    stationary : (w0, w1), each [K, M] FP32 words that hold FP8 numbers
    moving : (x0, x1), each [K, F], likewise
    """
    # FP8 has 4 significant bits and exponents from -16 to 15: FP32 holds the products.
    products = [
        floats(w)[:, :, None] * floats(x)[:, None, :]
        for w, x in zip(stationary, moving, strict=True)
    ]
    total = np.zeros(products[0].shape[1:], np.float32)
    for pair in products[0] + products[1]:
        total += pair
    return canonical(total)
