"""FP32 adder and multiplier: pipelined, one result per cycle, IEEE-754 in every corner."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .rounding import (
    EXP_BITS,
    RAW_BITS,
    RAW_INF,
    leading_zeros,
    pack_fp32,
    saturate5,
    shift_right_sticky,
)

#: Enabled cycles from the operands of an FP32 cell to its result.
FP32_LATENCY = 3


class Raw(data.Struct):
    """Unpacked operand of an addition: value = significand / 2**26 * 2**(exponent - 127)."""

    sign: unsigned(1)
    #: 1 to 382, or RAW_INF for infinity. 1 if the top bit of the significand is clear.
    exponent: unsigned(EXP_BITS)
    #: 24 bits, then guard, round and sticky
    significand: unsigned(RAW_BITS - 1)


def unpack_fp32(word: Value) -> Value:
    """Returns the bits of a `Raw` holding the FP32 word, which must not be NaN (see `is_nan`)."""
    exponent = word[23:31]
    subnormal = exponent == 0
    special = exponent == 0xFF
    # 255 turns into RAW_INF and 0 into 1: only the two end bits change.
    widened = Cat((exponent[0] | subnormal) & ~special, exponent[1:], special)
    return Cat(word[31], widened, Const(0, 3), word[:23], ~subnormal)


def is_nan(word: Value) -> Value:
    """1 if the FP32 word is a NaN."""
    return word[:31] > 0x7F800000


def raw_add(m: Module, *, en: Value, a: Value, b: Value, nan: Value) -> Value:
    """Adds two `Raw` numbers and rounds once to FP32: the three-stage core of every adder.

    Stage 1 puts the larger magnitude first, stage 2 aligns and adds, stage 3 normalises and rounds.

    Parameters
    ----------
    en : freezes all three stages when low
    a, b : `Raw`. A sticky bit may be set only in an operand whose exponent is 1 (a product that was
        shifted down into the subnormal range), because a sum of such is never shifted up again.
    nan : an operand is NaN

    Returns
    -------
    32-bit register, three enabled cycles after `a` and `b`
    """
    # Stage 1
    swap = Signal()
    big, small = Signal(Raw), Signal(Raw)
    distance = Signal(EXP_BITS)
    m.d.comb += [
        swap.eq(Cat(a.significand, a.exponent) < Cat(b.significand, b.exponent)),
        big.eq(Mux(swap, b, a)),
        small.eq(Mux(swap, a, b)),
        distance.eq(big.exponent - small.exponent),
    ]
    big_1 = Signal(Raw, reset_less=True)
    small_1 = Signal(RAW_BITS - 1, reset_less=True)
    shift_1 = Signal(5, reset_less=True)
    subtract_1 = Signal(reset_less=True)
    nan_1 = Signal(reset_less=True)

    # Stage 2
    aligned = Signal(RAW_BITS - 1)
    sum_2 = Signal(RAW_BITS, reset_less=True)
    exponent_2 = Signal(EXP_BITS, reset_less=True)
    sign_2 = Signal(reset_less=True)
    subtract_2 = Signal(reset_less=True)
    nan_2 = Signal(reset_less=True)
    m.d.comb += aligned.eq(shift_right_sticky(m, small_1, shift_1))
    # One adder for both: subtracting adds the complement, and the carry-in comes from a pair of
    # ones below bit 0.
    total = Cat(subtract_1, big_1.significand, 0) + Cat(
        subtract_1, aligned ^ subtract_1.replicate(RAW_BITS - 1), subtract_1
    )

    # Stage 3
    zeros, shift, raw = Signal(5), Signal(5), Signal(RAW_BITS)
    m.d.comb += [
        zeros.eq(leading_zeros(m, sum_2)),
        # Not further than exponent 1: what is left of the top bit then is a subnormal.
        shift.eq(Mux(zeros < exponent_2, zeros, exponent_2)),
        raw.eq(sum_2 << shift),
    ]
    output = Signal(32, reset_less=True)

    with m.If(en):
        m.d.sync += [
            big_1.eq(big),
            small_1.eq(small.significand),
            shift_1.eq(saturate5(distance)),
            subtract_1.eq(a.sign ^ b.sign),
            nan_1.eq(nan | ((a.exponent == RAW_INF) & (b.exponent == RAW_INF) & (a.sign ^ b.sign))),
            sum_2.eq(total[1 : RAW_BITS + 1]),
            exponent_2.eq(big_1.exponent),
            sign_2.eq(big_1.sign),
            subtract_2.eq(subtract_1),
            nan_2.eq(nan_1),
            output.eq(
                pack_fp32(
                    m,
                    # x - x is +0; -0 + -0 keeps its sign.
                    sign=sign_2 & ~(subtract_2 & (sum_2 == 0)),
                    exponent=(exponent_2 - shift)[:EXP_BITS],
                    raw=raw,
                    nan=nan_2,
                )
            ),
        ]
    return output


class Fp32Add(wiring.Component):
    """``o = a + b`` in FP32, rounded to nearest even.

    Subnormals are kept, overflow gives infinity, every NaN result is 0x7FC00000. To subtract, flip
    bit 31 of an operand. Latency `FP32_LATENCY` enabled cycles; one result per enabled cycle.

    Members
    -------
    en : In(1), low freezes every stage
    a, b : In(32), sampled in each enabled cycle
    o : Out(32), registered
    """

    en: In(1)
    a: In(32)
    b: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a, b = Signal(Raw), Signal(Raw)
        m.d.comb += [
            a.as_value().eq(unpack_fp32(self.a)),
            b.as_value().eq(unpack_fp32(self.b)),
        ]
        m.d.comb += self.o.eq(raw_add(m, en=self.en, a=a, b=b, nan=is_nan(self.a) | is_nan(self.b)))
        return m


class Fp32Mul(wiring.Component):
    """``o = a * b`` in FP32, rounded to nearest even.

    Subnormals are kept, overflow gives infinity, every NaN result is 0x7FC00000. Latency
    `FP32_LATENCY` enabled cycles; one result per enabled cycle.

    Members
    -------
    en : In(1), low freezes every stage
    a, b : In(32), sampled in each enabled cycle
    o : Out(32), registered
    """

    en: In(1)
    a: In(32)
    b: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # Stage 1: normalise. Two subnormals multiply to less than a quarter of the smallest
        # subnormal, which rounds to zero, so one shifter is enough.
        swap = Signal()
        x, y = Signal(31), Signal(31)
        m.d.comb += [
            swap.eq(self.a[23:31] == 0),
            x.eq(Mux(swap, self.b, self.a)[:31]),
            y.eq(Mux(swap, self.a, self.b)[:31]),
        ]
        y_subnormal = Signal()
        zeros = Signal(5)
        m.d.comb += [
            y_subnormal.eq(y[23:31] == 0),
            # Of the fraction below an absent leading one: a fraction 1xx.. moves up by one.
            zeros.eq(Mux(y_subnormal, leading_zeros(m, y[:23]) + 1, 0)),
        ]
        infinite = (x[23:31] == 0xFF) | (y[23:31] == 0xFF)
        zero = (x[23:31] == 0) | (y == 0)
        sum_1 = Signal(signed(EXP_BITS + 1), reset_less=True)
        x_1, y_1 = Signal(24, reset_less=True), Signal(24, reset_less=True)
        sign_1 = Signal(reset_less=True)
        nan_1 = Signal(reset_less=True)
        infinite_1 = Signal(reset_less=True)
        zero_1 = Signal(reset_less=True)

        # Stage 2: multiply. Bits below the 28 that rounding looks at only count as sticky.
        product = Signal(48)
        m.d.comb += product.eq(x_1 * y_1)
        raw_2 = Signal(RAW_BITS, reset_less=True)
        exponent_2 = Signal(EXP_BITS, reset_less=True)
        shift_2 = Signal(5, reset_less=True)
        sign_2 = Signal(reset_less=True)
        nan_2 = Signal(reset_less=True)

        # Stage 3: shift down into the subnormal range, or up by the one place that the product of
        # two numbers in [1, 2) can lack, and round.
        down, raw = Signal(RAW_BITS), Signal(RAW_BITS)
        up = Signal()
        m.d.comb += [
            down.eq(shift_right_sticky(m, raw_2, shift_2)),
            up.eq(~down[27] & (exponent_2 != 0)),
            raw.eq(Mux(up, down << 1, down)),
        ]

        with m.If(self.en):
            m.d.sync += [
                x_1.eq(Cat(x[:23], 1)),
                y_1.eq(Cat(y[:23], ~y_subnormal) << zeros),
                sum_1.eq(x[23:31] + Cat(y[23] | y_subnormal, y[24:31]) - zeros - 127),
                sign_1.eq(self.a[31] ^ self.b[31]),
                nan_1.eq(is_nan(self.a) | is_nan(self.b) | (infinite & zero)),
                infinite_1.eq(infinite),
                zero_1.eq(zero),
                raw_2.eq(Mux(zero_1, 0, Cat(product[:21] != 0, product[21:]))),
                exponent_2.eq(Mux(infinite_1, RAW_INF, Mux(sum_1 < 0, 0, sum_1[:EXP_BITS]))),
                shift_2.eq(Mux(~infinite_1 & (sum_1 < 0), saturate5((-sum_1)[: EXP_BITS + 1]), 0)),
                sign_2.eq(sign_1),
                nan_2.eq(nan_1),
                self.o.eq(
                    pack_fp32(
                        m,
                        sign=sign_2,
                        exponent=(exponent_2 - up)[:EXP_BITS],
                        raw=raw,
                        nan=nan_2,
                    )
                ),
            ]
        return m
