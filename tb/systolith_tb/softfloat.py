"""The floating-point cells in gates against Berkeley SoftFloat, on constructed classes of cases.

SoftFloat (`softfloatpy`) is the reference: `f32_add`, `f32_mul`, and for the MAC `f32_mul_add`,
whose single rounding of ``acc + a * w`` is what the MAC promises for operands of narrow types.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import softfloatpy
from systolith_hdl.formats import NARROW_FLOATS

from systolith_tb.cells import fp32_results, mac_results
from systolith_tb.numerics import canonical, double, random_words, round_to

#: FP32 words of the operands of some cases, one array for each operand.
Operands = tuple[np.ndarray, ...]
#: Draws as many words of one kind.
Words = Callable[[np.random.Generator, int], np.ndarray]
Make = Callable[[np.random.Generator, int], Operands]

_SIGN = np.uint32(1 << 31)
_INFINITY = np.uint32(0x7F800000)


# --- pieces ---------------------------------------------------------------------------------


def _uniform(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 1 << 32, count, dtype=np.uint32)


def _signs(rng: np.random.Generator, count: int) -> np.ndarray:
    return _uniform(rng, count) & _SIGN


def _exponents(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """Random sign and fraction, exponent field from `low` to `high`."""
    field = rng.integers(low, high + 1, count, dtype=np.uint32) << 23
    return field | (_uniform(rng, count) & np.uint32(0x807FFFFF))


def _odd(rng: np.random.Generator, bits: np.ndarray | int, count: int) -> np.ndarray:
    """Odd integers of exactly as many bits, as float64."""
    top = np.int64(1) << (np.broadcast_to(bits, count).astype(np.int64) - 1)
    return (rng.integers(0, top, count) | top | 1).astype(np.float64)


def _words(values: np.ndarray) -> np.ndarray:
    """Of float64 numbers that FP32 has."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32).view(np.uint32)


def _choose(rng: np.random.Generator, *choices: np.ndarray) -> np.ndarray:
    return np.choose(rng.integers(0, len(choices), len(choices[0])), choices)


def _with(rng: np.random.Generator, special: Words, *operands: np.ndarray) -> Operands:
    """Puts a special word into one operand of each case, sometimes into several; each its own, as
    infinities of both signs meet in no other way."""
    placed = []
    count = len(operands[0])
    where = rng.integers(0, len(operands), count)
    for index, operand in enumerate(operands):
        here = (where == index) | (rng.random(count) < 0.1)
        placed.append(np.where(here, special(rng, count), operand))
    return tuple(placed)


def _infinities(rng: np.random.Generator, count: int) -> np.ndarray:
    return _signs(rng, count) | _INFINITY


def _nans(rng: np.random.Generator, count: int) -> np.ndarray:
    """Quiet and signaling ones with any payload."""
    payload = rng.integers(1, 1 << 23, count, dtype=np.uint32)
    return _signs(rng, count) | _INFINITY | payload


def _steps(rng: np.random.Generator, count: int, most: int = 3) -> np.ndarray:
    return rng.integers(-most, most + 1, count).astype(np.uint32)


# --- additions ------------------------------------------------------------------------------


def _add_tie(rng: np.random.Generator, count: int) -> Operands:
    """One number, and an odd multiple of half a unit of it."""
    exponent = rng.integers(-124, 100, count)
    a = np.ldexp(rng.integers(1 << 23, 1 << 24, count).astype(np.float64), exponent)
    b = np.ldexp(_odd(rng, rng.integers(1, 24, count), count), exponent - 1)
    a, b = _words(a) | _signs(rng, count), _words(b) | _signs(rng, count)
    return tuple(np.where(rng.random(count) < 0.5, (a, b), (b, a)))


def _add_near_tie(rng: np.random.Generator, count: int) -> Operands:
    """The same, missed by the least that the smaller operand allows."""
    a, b = _add_tie(rng, count)
    smaller = (a & ~_SIGN) < (b & ~_SIGN)
    step = np.where(rng.random(count) < 0.5, 1, -1).astype(np.uint32)
    return np.where(smaller, a + step, a), np.where(smaller, b, b + step)


def _add_cancel(rng: np.random.Generator, count: int) -> Operands:
    a = _choose(rng, _exponents(rng, 0, 254, count), _exponents(rng, 0, 30, count))
    near = (a + _steps(rng, count)) ^ _SIGN
    wide = (a + (_uniform(rng, count) >> rng.integers(8, 31, count, dtype=np.uint32))) ^ _SIGN
    return a, _choose(rng, near, wide)


def _add_far(rng: np.random.Generator, count: int) -> Operands:
    """Exponents 20 to 40 apart, where the smaller operand turns into guard and sticky bits."""
    a = _exponents(rng, 60, 254, count)
    b = (a & _INFINITY) - (rng.integers(20, 41, count, dtype=np.uint32) << 23)
    return a, b | (_uniform(rng, count) & np.uint32(0x807FFFFF))


def _add_overflow(rng: np.random.Generator, count: int) -> Operands:
    a = _choose(rng, _exponents(rng, 250, 254, count), 0x7F7FFFFF ^ (_steps(rng, count) & 3))
    b = _choose(rng, _exponents(rng, 228, 254, count), _exponents(rng, 253, 254, count))
    return a.astype(np.uint32), np.where(rng.random(count) < 0.8, b & ~_SIGN | (a & _SIGN), b)


ADDITIONS: dict[str, Make] = {
    "uniform bits": lambda r, n: (_uniform(r, n), _uniform(r, n)),
    "mixed, corners": lambda r, n: (random_words(r, n), random_words(r, n)),
    "subnormal": lambda r, n: (_exponents(r, 0, 2, n), _exponents(r, 0, 25, n)),
    "exact tie": _add_tie,
    "next to a tie": _add_near_tie,
    "cancellation": _add_cancel,
    "far apart": _add_far,
    "overflow": _add_overflow,
    "zero": lambda r, n: _with(r, _signs, _uniform(r, n), _uniform(r, n)),
    "infinity": lambda r, n: _with(r, _infinities, _uniform(r, n), _uniform(r, n)),
    "NaN": lambda r, n: _with(r, _nans, _uniform(r, n), _uniform(r, n)),
}


# --- products -------------------------------------------------------------------------------


def _product_range(low: int, high: int) -> Make:
    """Pairs whose exponent fields add up to 127 + `low` to 127 + `high`."""

    def make(rng: np.random.Generator, count: int) -> Operands:
        total = rng.integers(low, high + 1, count) + 127
        first = rng.integers(np.maximum(0, total - 254), np.minimum(254, total) + 1)
        fields = first.astype(np.uint32), (total - first).astype(np.uint32)
        a, b = (f << 23 | (_uniform(rng, count) & np.uint32(0x807FFFFF)) for f in fields)
        return a, b

    return make


def _mul_tie(rng: np.random.Generator, count: int) -> Operands:
    """12 by 13 bits, both odd: a product of 25 bits lies halfway; so does one of any length whose
    last bit is 2**-150."""
    a, b = _odd(rng, 12, count), _odd(rng, 13, count)
    exponents = rng.integers(-60, 50, count), rng.integers(-60, 50, count)
    normal = tuple(_words(np.ldexp(x, e)) for x, e in zip((a, b), exponents, strict=True))
    bits = rng.integers(1, 13, (2, count))
    split = rng.integers(-140, 0, count)
    low = (
        _words(np.ldexp(_odd(rng, bits[0], count), split)),
        _words(np.ldexp(_odd(rng, bits[1], count), -150 - split)),
    )
    where = rng.random(count) < 0.5
    x, y = (np.where(where, n, m) | _signs(rng, count) for n, m in zip(normal, low, strict=True))
    return x, y


def _mul_near_tie(rng: np.random.Generator, count: int) -> Operands:
    a, b = _mul_tie(rng, count)
    return a + np.where(rng.random(count) < 0.5, 1, -1).astype(np.uint32), b


PRODUCTS: dict[str, Make] = {
    "uniform bits": ADDITIONS["uniform bits"],
    "mixed, corners": ADDITIONS["mixed, corners"],
    "subnormal result": _product_range(-30, 2),
    "subnormal operand": lambda r, n: (_exponents(r, 0, 0, n), _exponents(r, 100, 254, n)),
    "exact tie": _mul_tie,
    "next to a tie": _mul_near_tie,
    "overflow": _product_range(250, 258),
    "zero": ADDITIONS["zero"],
    "infinity": lambda r, n: _with(r, _infinities, random_words(r, n), random_words(r, n)),
    "NaN": ADDITIONS["NaN"],
}


# --- multiply-accumulate: (acc, a, w) -------------------------------------------------------


def narrow(rng: np.random.Generator, words: np.ndarray) -> np.ndarray:
    """FP32 words rounded to a narrow type each, in any of which a number is one as well."""
    return _choose(rng, *(round_to(words, dtype) for dtype in NARROW_FLOATS))


def _factors(rng: np.random.Generator, count: int) -> Operands:
    """Finite operands of all types, few of them zero."""
    a, w = (_exponents(rng, 112, 140, count) for _ in range(2))
    wide = [_exponents(rng, 1, 253, count) & np.uint32(0xFFFF0000) for _ in range(2)]
    pick = rng.random(count) < 0.3
    return np.where(pick, wide[0], narrow(rng, a)), np.where(pick, wide[1], narrow(rng, w))


def _mac_mixed(rng: np.random.Generator, count: int) -> Operands:
    acc = canonical(random_words(rng, count))
    return acc, narrow(rng, random_words(rng, count)), narrow(rng, random_words(rng, count))


def _mac_uniform(rng: np.random.Generator, count: int) -> Operands:
    """BF16 patterns, every FP32 pattern as the sum."""
    operands = (_uniform(rng, count) & np.uint32(0xFFFF0000) for _ in range(2))
    return canonical(_uniform(rng, count)), *operands


def _mac_types(rng: np.random.Generator, count: int) -> Operands:
    """A sum that the product meets in the middle of its bits."""
    a, w = _factors(rng, count)
    with np.errstate(all="ignore"):
        product = _words(double(a) * double(w))
    shift = (rng.integers(-30, 31, count) << 23).astype(np.uint32)
    return canonical((product + shift) ^ (_uniform(rng, count) & np.uint32(0x807FFFFF))), a, w


def _odd_factors(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd integers of up to 8 or 11 bits (BF16, FP16), as float64."""
    most = rng.choice((8, 11), count)
    a, w = (_odd(rng, rng.integers(1, most + 1), count) for _ in range(2))
    return a, w


def _mac_tie(rng: np.random.Generator, count: int, missed: bool = False) -> Operands:
    """An odd product, and a sum whose unit is twice the product's; or a product and an odd
    multiple of half a unit of it."""
    a, w = _odd_factors(rng, count)
    exponent = rng.integers(-12, 13, (2, count))
    last = exponent.sum(0)
    further = rng.integers(2, 25, count) if missed else 1
    acc = np.ldexp(rng.integers(1 << 23, 1 << 24, count).astype(np.float64), last + further)
    # The lowest bit of a product of p bits as FP32 is 2**(last + p - 24).
    bits = np.frexp(a * w)[1]
    small = np.ldexp(_odd(rng, rng.integers(1, 12, count), count), last + bits - 25)
    if missed:
        small *= 1 + np.ldexp(1.0, -rng.integers(12, 14, count))
    acc = np.where(rng.random(count) < 0.5, acc, small)
    words = (_words(np.ldexp(x, e)) for x, e in zip((a, w), exponent, strict=True))
    return tuple(x | _signs(rng, count) for x in (_words(acc), *words))


def _mac_cancel(rng: np.random.Generator, count: int) -> Operands:
    a, w = _factors(rng, count)
    with np.errstate(all="ignore"):
        product = _words(double(a) * double(w))
    return canonical((product + _steps(rng, count)) ^ _SIGN), a, w


def _mac_subnormal(rng: np.random.Generator, count: int) -> Operands:
    a, w = _product_range(-35, 3)(rng, count)
    mask = np.uint32(0xFFFF0000)
    acc = _choose(rng, _exponents(rng, 0, 0, count), _exponents(rng, 0, 25, count))
    return acc, a & mask, w & mask


def _mac_overflow(rng: np.random.Generator, count: int) -> Operands:
    """Near the largest number; products beyond it may come back by a sum of the other sign."""
    a, w = _product_range(249, 262)(rng, count)
    mask = np.uint32(0xFFFF0000)
    return _exponents(rng, 250, 254, count), a & mask, w & mask


def _mac_special(special: Words) -> Make:
    def make(rng: np.random.Generator, count: int) -> Operands:
        a, w = _factors(rng, count)
        # In the array every NaN is the canonical one.
        words = _with(rng, special, _uniform(rng, count), a, w)
        return tuple(canonical(operand) for operand in words)

    return make


MACS: dict[str, Make] = {
    "uniform bits": _mac_uniform,
    "mixed, corners": _mac_mixed,
    "all types": _mac_types,
    "subnormal": _mac_subnormal,
    "exact tie": _mac_tie,
    "next to a tie": lambda r, n: _mac_tie(r, n, missed=True),
    "cancellation": _mac_cancel,
    "overflow": _mac_overflow,
    "zero": _mac_special(_signs),
    "infinity": _mac_special(_infinities),
    "NaN": _mac_special(_nans),
}


# --- comparison -----------------------------------------------------------------------------


def _adder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return fp32_results(a, b)[0]


def _multiplier(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return fp32_results(a, b)[1]


def softfloat(function: Callable, *operands: np.ndarray) -> np.ndarray:
    """SoftFloat's result for each case, NaNs made canonical."""
    make = softfloatpy.Float32.from_bytes
    columns = []
    for words in operands:
        raw = words.astype(">u4").tobytes()
        columns.append([make(raw[i : i + 4]) for i in range(0, len(raw), 4)])
    found = b"".join([result.to_bytes() for result in map(function, *columns)])
    return canonical(np.frombuffer(found, ">u4").astype(np.uint32))


@dataclasses.dataclass(frozen=True)
class Operation:
    """One cell.

    Parameters
    ----------
    classes : how to make cases of each class
    gates, reference : results for operands, of the cell and of SoftFloat
    terms : what is added up for operands, as exact float64 numbers
    """

    classes: dict[str, Make]
    gates: Callable[..., np.ndarray]
    reference: Callable[..., np.ndarray]
    terms: Callable[..., tuple[np.ndarray, ...]]


def _exact_sum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and its error, both in float64 (Knuth's TwoSum)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


OPERATIONS: dict[str, Operation] = {
    "add": Operation(
        ADDITIONS,
        _adder,
        lambda a, b: softfloat(softfloatpy.f32_add, a, b),
        lambda a, b: (double(a), double(b)),
    ),
    "multiply": Operation(
        PRODUCTS,
        _multiplier,
        lambda a, b: softfloat(softfloatpy.f32_mul, a, b),
        lambda a, b: (double(a) * double(b),),
    ),
    "multiply-accumulate": Operation(
        MACS,
        mac_results,
        lambda acc, a, w: softfloat(softfloatpy.f32_mul_add, a, w, acc),
        lambda acc, a, w: (double(acc), double(a) * double(w)),
    ),
}


def observed(operation: Operation, operands: Operands, result: np.ndarray) -> dict[str, int]:
    """What came of some cases, so that a class proves to be what its name says."""
    magnitude = result & ~_SIGN
    finite_in = np.all([(x & _INFINITY) != _INFINITY for x in operands], axis=0)
    with np.errstate(all="ignore"):
        terms = operation.terms(*operands)
        exact, error = _exact_sum(*terms) if len(terms) == 2 else (terms[0], 0.0)
        rounded = exact.astype(np.float32)
        lost = exact - rounded
        other = np.nextafter(rounded, np.where(lost > 0, np.inf, -np.inf).astype(np.float32))
        tie = (error == 0) & (lost != 0) & (np.abs(other - exact) == np.abs(lost))
        cancelled = np.abs(exact) < np.max(np.abs(terms), axis=0) * 2.0**-10
    return {
        "NaN": int((magnitude > _INFINITY).sum()),
        "overflow": int((finite_in & (magnitude == _INFINITY)).sum()),
        "subnormal": int(((magnitude > 0) & (magnitude < 1 << 23)).sum()),
        "zero": int((magnitude == 0).sum()),
        "tie": int(tie.sum()),
        "cancelled": int((finite_in & cancelled).sum()),
    }


def compare(name: str, kind: str, seed: int, count: int) -> dict[str, int]:
    """Runs one class of one operation.

    Returns
    -------
    ``cases``, ``mismatches`` and what `observed` counts. Prints the first mismatches.
    """
    operation = OPERATIONS[name]
    order = list(operation.classes).index(kind)
    rng = np.random.default_rng([seed, list(OPERATIONS).index(name), order])
    operands = operation.classes[kind](rng, count)
    operands = tuple(np.ascontiguousarray(x, np.uint32) for x in operands)
    got, wanted = operation.gates(*operands), operation.reference(*operands)
    wrong = np.flatnonzero(got != wanted)
    for i in wrong[:3]:
        words = " ".join(f"{x[i]:08x}" for x in operands)
        print(f"{name}, {kind}: {words}: gates {got[i]:08x}, SoftFloat {wanted[i]:08x}")
    found = {"cases": len(got), "mismatches": len(wrong)}
    return found | observed(operation, operands, wanted)
