"""Golden model of the scalar engine's functions.

The definition is the procedure in `systolith_hdl.scalar.tables`; this is that procedure on numpy
arrays of int64. No intermediate exceeds 63 bits. The tables of CUSTOM may hold any words, so what
the lane keeps in fewer bits is cut to those; with the committed tables nothing is ever lost.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt
from amaranth.lib import data
from systolith_hdl.formats import CANONICAL_NAN
from systolith_hdl.isa import SEGMENT_WORDS, TABLE_ROWS, TABLE_SEGMENTS, TABLE_WORDS, Function
from systolith_hdl.scalar import tables as T

Bits = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]

_CHUNK = 1 << 16  #: elements evaluated at a time, so that the intermediates stay in the cache


@dataclasses.dataclass(frozen=True)
class _Fields:
    segment: dict[str, Ints]
    entry: dict[str, Ints]
    exp2: dict[str, Ints]


@functools.lru_cache(64)
def _custom_fields(table: bytes) -> _Fields:
    """The fields of the words of one partition's table."""
    words = np.frombuffer(table, np.uint32)
    parts = words[: SEGMENT_WORDS * TABLE_SEGMENTS].view(np.uint64).reshape(-1, SEGMENT_WORDS // 2)

    def column(halves: npt.NDArray[np.uint64], field: data.Field) -> Ints:
        spare = 64 - field.width
        # No field is in two halves.
        moved = halves[:, field.offset // 64] << np.uint64(spare - field.offset % 64)
        if getattr(field.shape, "signed", False):
            return moved.view(np.int64) >> spare
        return (moved >> np.uint64(spare)).view(np.int64)

    rows = words[-TABLE_ROWS:].astype(np.uint64)[:, None]
    entry = {str(name): column(rows, field) for name, field in T.ENTRY}
    return _Fields(
        segment={str(name): column(parts, field) for name, field in T.SEGMENT},
        entry={**entry, "base": entry["base"] % TABLE_SEGMENTS},
        exp2=_fields().exp2,
    )


def _columns(layout: object, words: tuple[int, ...]) -> dict[str, Ints]:
    rows = [T.field_bits(layout, word) for word in words]  # type: ignore[arg-type]
    return {name: np.array([row[name] for row in rows], np.int64) for name in rows[0]}


@functools.cache
def _fields() -> _Fields:
    content = T.tables()
    return _Fields(
        segment=_columns(T.SEGMENT, content.segments),
        entry=_columns(T.ENTRY, content.directory),
        exp2=_columns(T.EXP2_ENTRY, content.exp2),
    )


@functools.cache
def _control(function: Function) -> tuple[dict[str, int], Ints]:
    word = T.tables().controls[function]
    control = T.field_bits(T.CONTROL, word)
    pages = T.CONTROL["pages"].shape
    width = pages.elem_shape.width
    bases = [control["pages"] >> i * width & (1 << width) - 1 for i in range(pages.length)]
    return control, np.array(bases, np.int64)


def _top_bit(x: Ints) -> Ints:
    """Number of the highest bit set, 0 <= x < 2**53; -1 for 0."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1


def evaluate(function: Function, y: Bits, table: Bits | None = None) -> Bits:
    """Applies a function of the scalar engine to FP32 bit patterns, bit for bit as the chip does.

    `y` has any shape; so has the result. `y` is what is left after scale and bias. `table` are the
    words of a partition's table, by which CUSTOM is evaluated; by default zeros, as at power-up.
    """
    y = np.asarray(y, np.uint32)
    fields = _fields()
    if function is Function.CUSTOM:
        words = np.zeros(TABLE_WORDS, np.uint32) if table is None else table
        fields = _custom_fields(words.tobytes())
    flat = y.reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, _CHUNK):
        piece = slice(start, start + _CHUNK)
        out[piece] = _evaluate(function, fields, flat[piece].astype(np.int64))
    return out.reshape(y.shape)


def _cut(x: Ints, bits: int) -> Ints:
    """The number that the lowest bits are."""
    return x << 64 - bits >> 64 - bits


def _evaluate(function: Function, fields: _Fields, y: Ints) -> Ints:
    control, pages = _control(function)

    # 1. Reduce
    sign, biased, fraction = y >> 31, y >> 23 & 255, y & 0x7FFFFF
    center_bits = np.where(sign, control["center_negative"], control["center_positive"])
    centered = ((biased == 126) & (center_bits & 1 != 0)) | ((biased == 127) & (center_bits >= 2))
    hidden = np.where(biased == 0, 0, 1 << T.MANTISSA)
    # 25 bits, the top one worth 2**exponent
    magnitude = (fraction | hidden) << 1
    exponent = np.maximum(biased, 1) - 127
    difference = np.where(biased == 127, magnitude, magnitude >> 1) - control["center"]
    below = centered & (difference < 0)
    magnitude = np.where(centered, np.abs(difference), magnitude)
    exponent = np.where(centered, 0, exponent)
    top = _top_bit(magnitude)
    k = exponent + np.where(magnitude == 0, T.ZERO_TOP, top - T.CENTER_FRACTION)
    m = (magnitude << T.CENTER_FRACTION - np.maximum(top, 0)) >> 1 & (1 << T.MANTISSA) - 1
    page = np.where(centered, 2 + below, sign)
    if control["turn"]:
        turned = (biased >= 126) & (biased < 255)
        quadrant, distance = _turn(np.where(turned, biased, 126), fraction)
        quadrant += control["quarter"]
        distance = np.where(quadrant & 1, (1 << T.DISTANCE) - 1 - distance, distance)
        drop = _top_bit(distance >> 27) + 27 - T.MANTISSA
        k = np.where(turned, drop + T.MANTISSA - T.DISTANCE, k)
        m = np.where(turned, distance >> drop & (1 << T.MANTISSA) - 1, m)
        page = np.where(turned, T.TURN_PAGE, page)
        sign = sign & (1 - control["quarter"]) ^ np.where(turned, quadrant >> 1 & 1, 0)

    # 2. Directory
    column = k & 1 if control["parity"] else k
    low, span = control["low"], control["span"]
    row = np.clip(column - low + T.ROW_LOW, T.ROW_UNDER, T.ROW_LOW + span)
    row = np.where(magnitude == 0, T.ROW_ZERO, row)
    row = np.where(biased == 255, T.ROW_LOW + span + 1, row)
    address = np.where((biased == 255) & (fraction != 0), T.NAN_ADDRESS, pages[page] + row)
    log2_count = fields.entry["log2_count"][address]
    split = m << log2_count
    index = fields.entry["base"][address] + (split >> T.MANTISSA & (1 << T.MAX_COUNT_LOG2) - 1)
    index %= len(fields.segment["c0"])
    t = split & (1 << T.MANTISSA) - 1

    # 3. Polynomial
    segment = {name: values[index] for name, values in fields.segment.items()}
    p2 = _cut(segment["c2"] + (segment["c3"] * (t >> 5) >> 18), T.SEGMENT["c2"].width)
    p1 = _cut(segment["c1"] + (p2 * t >> T.MANTISSA), T.P0_BITS)
    p0 = segment["c0"] + (p1 * t >> T.MANTISSA) + np.where(segment["log"], k * T.LN2, 0)
    p0 = _cut(p0, T.P0_BITS)

    # 4. Result
    f = p0 & (1 << T.FIXED) - 1
    low_bits = T.FIXED - T.EXP2_SEGMENTS_LOG2
    u = f & (1 << low_bits) - 1
    exp2 = {name: values[f >> low_bits] for name, values in fields.exp2.items()}
    square = (u >> 8) * (u >> 8) >> 12
    power = (1 << T.FIXED) + exp2["c0"] + (exp2["c1"] * u + (exp2["c2"] * square << 7) >> low_bits)
    is_power = segment["exp2"] != 0
    value = np.where(is_power, power, np.abs(p0))
    unit = np.where(is_power, (p0 >> T.FIXED) - T.FIXED, 0) + segment["exponent"]
    scaling = (k, -k, k >> 1, -(k >> 1), 2 * k)[control["scaling"]]
    unit += np.where(segment["relative"], scaling, 0)
    negative = segment["negate"] ^ (~is_power & (p0 < 0)) ^ (sign & control["odd"])
    bits = _round(value, unit) | negative << 31
    return np.where(segment["nan"], CANONICAL_NAN, bits)


def _turn(biased: Ints, fraction: Ints) -> tuple[Ints, Ints]:
    """Quarters of a turn in |y| >= 1/2: the whole ones modulo 4, and `DISTANCE` bits behind."""
    pieces = np.array(T.TWO_OVER_PI, np.int64)
    mantissa = fraction | 1 << T.MANTISSA
    kept = T.PIECE - 2  # bits of the distance in `total`, below the quadrant
    rest = T.DISTANCE - kept  # and in `low`: what was shifted out of `total`
    total, low = np.zeros_like(fraction), np.zeros_like(fraction)
    for number in reversed(range(T.PIECES)):
        low = (total & (1 << T.PIECE) - 1) << rest - T.PIECE | low >> T.PIECE
        total = (total >> T.PIECE) + mantissa * pieces[biased - 126 + T.PIECE * number]
    return total >> kept & 3, (total & (1 << kept) - 1) << rest | low


def _round(value: Ints, unit: Ints) -> Ints:
    """Returns the FP32 bits, without sign, of value * 2**unit, value < 2**36, to nearest even."""
    top = _top_bit(value)
    # the least significant bit kept: 24 bits, or the subnormal grid
    drop = np.maximum(top - 23, -149 - unit)
    wide = value << np.clip(-drop, 0, 26)
    drop = np.clip(drop, 0, 40)
    kept = wide >> drop
    rest = wide & (np.int64(1) << drop) - 1
    half = np.int64(1) << drop >> 1
    kept += (drop > 0) & ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    # kept has its hidden bit worth 1 in the exponent field; 0 if subnormal
    biased = np.maximum(top + unit + 126, 0)
    return np.where(value == 0, 0, np.minimum((np.minimum(biased, 255) << 23) + kept, 0x7F800000))
