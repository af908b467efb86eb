"""Rounding and the pieces around it, shared by every floating-point cell.

Inside a cell a magnitude is (exponent, significand): `RAW_BITS` of significand with the binary
point below its top bit, and the biased exponent that a set top bit would have. The exponent is a
bit wider than FP32's and counts on past 254, so infinity is nothing but a very large exponent
(`RAW_INF`) and overflow is found once, at the end.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value

from ..formats import CANONICAL_NAN

#: 1 carry bit, 24 bits of significand, then guard, round and sticky.
RAW_BITS = 28
#: Exponents inside a cell: the product of the two largest bf16 numbers has 382.
EXP_BITS = 9
#: Exponent of infinity. Adding two infinities carries into 511, which still fits; taking any finite
#: number away leaves 509 at least.
RAW_INF = 510


def leading_zeros(m: Module, value: Value) -> Value:
    """Returns the number of zeros above the highest set bit of `value`.

    Up to 31 for up to 32 bits. A zero `value` counts as having a set bit below its lowest, so its
    width must not be a power of two if it can be zero.
    """
    levels = (len(value) - 1).bit_length()
    rest: Value = Cat(Const(-1, (1 << levels) - len(value)), value)
    count: list[Value] = []
    for half in (1 << level for level in reversed(range(levels))):
        is_zero = Signal(name=f"lz_{half}")
        kept = Signal(half, name=f"lz_rest_{half}")
        m.d.comb += [
            is_zero.eq(rest[half:] == 0),
            kept.eq(Mux(is_zero, rest[:half], rest[half:])),
        ]
        count.append(is_zero)
        rest = kept
    return Cat(*reversed(count))


def shift_right_sticky(m: Module, value: Value, amount: Value) -> Value:
    """Returns ``value >> amount`` with everything shifted out or-ed into bit 0.

    `amount` has 5 bits and saturates: 31 must mean "31 or more", so `value` has at most 31 bits.
    """
    assert len(amount) == 5 and len(value) <= 31
    shifted = Signal(len(value) + 31, name="sticky_shifted")
    m.d.comb += shifted.eq(Cat(Const(0, 31), value) >> amount)
    return Cat(shifted[31] | (shifted[:31] != 0), shifted[32:])


def saturate5(amount: Value) -> Value:
    """Returns an unsigned `amount` in 5 bits, 31 if it is larger."""
    return Mux(amount[5:] != 0, 31, amount[:5])[:5]


def pack_fp32(m: Module, *, sign: Value, exponent: Value, raw: Value, nan: Value) -> Value:
    """Rounds to nearest even and encodes as FP32; every corner case is decided here.

    Parameters
    ----------
    sign : of the result, if it is not NaN
    exponent : `EXP_BITS`; one less than the biased exponent that bit 27 of `raw` has when it is set
    raw : `RAW_BITS`; bits 27 to 4 are the significand, bit 3 is half a unit of it, and bits 2 to 0
        are below that. If bit 27 is clear the value is subnormal (exponent 0) or zero.
    nan : the result is NaN, whatever the rest says
    """
    top = raw[27]
    round_up = Signal()
    packed = Signal(23 + EXP_BITS)
    # The rounding carry runs from fraction to exponent, so the next binade, the step from
    # subnormal to normal and the step to infinity come by themselves.
    m.d.comb += [
        round_up.eq(raw[3] & (raw[4] | (raw[:3] != 0))),
        packed.eq(
            Cat(raw[4:27], Mux(top, exponent, 0)[:EXP_BITS]) + Cat(round_up, Const(0, 22), top)
        ),
    ]
    overflow = packed[31] | (packed[23:31] == 0xFF)
    finite = Mux(overflow, 0x7F800000, packed[:31])[:31]
    return Mux(nan, CANONICAL_NAN, Cat(finite, sign))[:32]
