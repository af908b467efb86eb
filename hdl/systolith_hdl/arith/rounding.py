"""Rounding and the pieces around it, shared by every floating-point cell.

Inside a cell a magnitude is (exponent, significand): `RAW_BITS` of significand with the binary
point below its top bit, and the biased exponent that a set top bit would have. The exponent is a
bit wider than FP32's and counts on past 254, so infinity is nothing but a very large exponent
(`RAW_INF`) and overflow is found once, at the end.

The adder and what it is made of take an `Encoding`. The chip has FP32 only; the same generators
at the widths of FP8 make adders that are small enough to be proven (tests/hdl/test_formal.py).
"""

from __future__ import annotations

import dataclasses

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Widths of an IEEE-754 encoding (subnormals, infinities, NaNs) and of a cell that adds in it.

    Parameters
    ----------
    exponent : bits, 3 or more
    fraction : bits, 2 or more
    """

    exponent: int
    fraction: int

    @property
    def bits(self) -> int:
        """Of a word."""
        return 1 + self.exponent + self.fraction

    @property
    def raw_bits(self) -> int:
        """1 carry bit, the significand with its leading one, then guard, round and sticky."""
        return 1 + (1 + self.fraction) + 3

    @property
    def exp_bits(self) -> int:
        """Of an exponent inside a cell."""
        return self.exponent + 1

    @property
    def raw_inf(self) -> int:
        """Exponent of infinity: what its field, followed by a 0 instead of a 1, would be with one
        bit more."""
        return (1 << self.exp_bits) - 2

    @property
    def shift_bits(self) -> int:
        """Of a distance that saturates, the largest meaning "past everything"."""
        return (self.raw_bits - 1).bit_length()

    @property
    def infinity(self) -> int:
        """Word of positive infinity."""
        return (1 << self.exponent) - 1 << self.fraction

    @property
    def nan(self) -> int:
        """Word of the canonical NaN: quiet, positive, payload zero."""
        return self.infinity | 1 << self.fraction - 1


FP32 = Encoding(exponent=8, fraction=23)

#: 1 carry bit, 24 bits of significand, then guard, round and sticky.
RAW_BITS = FP32.raw_bits
#: Exponents inside a cell: the product of the two largest bf16 numbers has 382.
EXP_BITS = FP32.exp_bits
#: Exponent of infinity. Adding two infinities carries into 511, which still fits; taking any finite
#: number away leaves 509 at least.
RAW_INF = FP32.raw_inf


def leading_zeros(m: Module, value: Value) -> Value:
    """Returns the number of zeros above the highest set bit of `value`.

    A zero `value` counts as having a set bit below its lowest, so its width must not be a power of
    two if it can be zero.
    """
    levels = (len(value) - 1).bit_length()
    missing = (1 << levels) - len(value)
    rest: Value = Cat(Const((1 << missing) - 1, missing), value)
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


def normalize(
    m: Module,
    value: Value,
    *,
    top: int | None = None,
    look: int | None = None,
    forced: tuple[Value, Value] | None = None,
    early: bool = False,
) -> tuple[Value, Value]:
    """Returns `value` shifted left until its highest bit is set, and by how much; a zero by any
    number of places.

    Each level of the shift looks at what the levels before have left, so the last zero is counted
    as the shift ends.

    Parameters
    ----------
    top : bits of `value`, if not all, of which the highest is to be set; those above are shifted
        along
    look : how many of these, from the highest on, the highest set bit may be; all if None
    forced : where the first is high, the shift is the second instead
    early : a carry chain finds the highest set bit, so the count is there before the shift begins;
        faster and larger
    """
    top = len(value) if top is None else top
    look = top if look is None else look
    highest = Signal(look)  # one-hot: bit i after i zeros
    if early:
        looked = value[top - look : top][::-1]
        m.d.comb += highest.eq(looked & -looked)
    kept = value
    places: list[Value] = []
    for bit in reversed(range((look - 1).bit_length())):
        if early:
            more = Cat(highest[place] for place in range(look) if place >> bit & 1).any()
        else:
            more = ~kept[max(top - (1 << bit), 0) : top].any()
        if forced is not None:
            more = Mux(forced[0], forced[1][bit], more)
        place = Signal(name=f"place_{bit}")
        shifted = Signal(len(value), name=f"normal_{bit}")
        m.d.comb += [
            place.eq(more),
            # Written so that none of it turns into a reset of the register behind.
            shifted.eq(
                (kept & (~place).replicate(len(kept)))
                | ((kept << (1 << bit))[: len(kept)] & place.replicate(len(kept)))
            ),
        ]
        kept = shifted
        places.insert(0, place)
    return kept, Cat(places)


def shift_right_sticky(m: Module, value: Value, amount: Value) -> Value:
    """Returns ``value >> amount`` with everything shifted out or-ed into bit 0.

    `amount` saturates: with 5 bits 31 must mean "31 or more", so `value` has at most 31 bits.
    """
    assert len(value) < 1 << len(amount)
    kept: Value = value
    lost: Value = Const(0, 1)
    for bit in reversed(range(len(amount))):
        places = min(1 << bit, len(value))
        shifted = Signal(len(value), name=f"shifted_{bit}")
        sticky = Signal(name=f"sticky_{bit}")
        m.d.comb += [
            shifted.eq(kept >> Cat(Const(0, bit), amount[bit])),
            sticky.eq(lost | (amount[bit] & kept[:places].any())),
        ]
        kept, lost = shifted, sticky
    return Cat(kept[0] | lost, kept[1:])


def saturate(amount: Value, bits: int) -> Value:
    """Returns an unsigned `amount` in as many bits, all ones if it is larger."""
    return Mux(amount[bits:] != 0, (1 << bits) - 1, amount[:bits])[:bits]


def saturate5(amount: Value) -> Value:
    """Returns an unsigned `amount` in 5 bits, 31 if it is larger."""
    return saturate(amount, 5)


def pack(
    m: Module, encoding: Encoding, *, sign: Value, exponent: Value, raw: Value, nan: Value
) -> Value:
    """Rounds to nearest even and encodes; every corner case is decided here. For FP32:

    Parameters
    ----------
    sign : of the result, if it is not NaN
    exponent : `EXP_BITS`; one less than the biased exponent that bit 27 of `raw` has when it is set
    raw : `RAW_BITS`; bits 27 to 4 are the significand, bit 3 is half a unit of it, and bits 2 to 0
        are below that. If bit 27 is clear the value is subnormal (exponent 0) or zero.
    nan : the result is NaN, whatever the rest says
    """
    fraction = encoding.fraction
    top = raw[-1]
    round_up = Signal()
    packed = Signal(fraction + encoding.exp_bits)
    # The rounding carry runs from fraction to exponent, so the next binade, the step from
    # subnormal to normal and the step to infinity come by themselves.
    m.d.comb += [
        round_up.eq(raw[3] & (raw[4] | (raw[:3] != 0))),
        packed.eq(
            Cat(raw[4:-1], Mux(top, exponent, 0)[: encoding.exp_bits])
            + Cat(round_up, Const(0, fraction - 1), top)
        ),
    ]
    return finish(m, encoding, packed, sign=sign, zero=Const(0), inf=Const(0), nan=nan)


def finish(
    m: Module,
    encoding: Encoding,
    packed: Value,
    *,
    sign: Value,
    zero: Value,
    inf: Value,
    nan: Value,
) -> Value:
    """Encodes what is rounded.

    Parameters
    ----------
    packed : fraction and, above it, the exponent's field with one bit more
    sign : of the result, if it is not NaN
    zero, inf, nan : it is that, whatever `packed` says; at most one of `zero` and the others
    """
    fraction, magnitude_bits = encoding.fraction, encoding.bits - 1
    field = packed[fraction:magnitude_bits]
    special = Signal()
    m.d.comb += special.eq(inf | nan | packed[-1] | field.all())
    # Written so that none of it turns into a reset of the register behind, which would be slower.
    clear = Mux(special, 0, Const((1 << fraction) - 1, fraction))
    keep = Mux(zero, 0, Const((1 << encoding.exponent) - 1, encoding.exponent))
    infinity = Mux(special, Const((1 << encoding.exponent) - 1, encoding.exponent), 0)
    return Cat(
        (packed[:fraction] & clear) | Cat(Const(0, fraction - 1), nan),
        (field & keep) | infinity,
        sign & ~nan,
    )


def pack_fp32(m: Module, *, sign: Value, exponent: Value, raw: Value, nan: Value) -> Value:
    """`pack` for FP32."""
    return pack(m, FP32, sign=sign, exponent=exponent, raw=raw, nan=nan)
