"""FP32 adder and multiplier: pipelined, one result per cycle, IEEE-754 in every corner.

The adder can be generated for any `Encoding`; the chip has it in FP32.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .rounding import (
    EXP_BITS,
    FP32,
    RAW_BITS,
    RAW_INF,
    Encoding,
    leading_zeros,
    pack,
    pack_fp32,
    saturate,
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


def raw_layout(encoding: Encoding) -> data.StructLayout:
    """What `Raw` is for FP32."""
    return data.StructLayout(
        {
            "sign": unsigned(1),
            "exponent": unsigned(encoding.exp_bits),
            "significand": unsigned(encoding.raw_bits - 1),
        }
    )


def unpack(word: Value, encoding: Encoding) -> Value:
    """Returns the bits of a `raw_layout` holding the word, which must not be NaN (see `is_nan`)."""
    fraction, exponent = word[: encoding.fraction], word[encoding.fraction : -1]
    subnormal = exponent == 0
    special = exponent == (1 << encoding.exponent) - 1
    # 255 turns into RAW_INF and 0 into 1: only the two end bits change.
    widened = Cat((exponent[0] | subnormal) & ~special, exponent[1:], special)
    return Cat(word[-1], widened, Const(0, 3), fraction, ~subnormal)


def unpack_fp32(word: Value) -> Value:
    """Returns the bits of a `Raw` holding the FP32 word, which must not be NaN (see `is_nan`)."""
    return unpack(word, FP32)


def is_nan(word: Value, encoding: Encoding = FP32) -> Value:
    """1 if the word is a NaN."""
    return word[:-1] > encoding.infinity


def raw_add(
    m: Module, *, en: Value, a: Value, b: Value, nan: Value, encoding: Encoding = FP32
) -> Value:
    """Adds two `Raw` numbers and rounds once to FP32: the three-stage core of every adder.

    Stage 1 puts the larger magnitude first, stage 2 aligns and adds, stage 3 normalises and rounds.

    Parameters
    ----------
    en : freezes all three stages when low
    a, b : `Raw`. A sticky bit may be set only in an operand whose exponent is 1 (a product that was
        shifted down into the subnormal range), because a sum of such is never shifted up again.
    nan : an operand is NaN
    encoding : if not FP32, `a` and `b` are of its `raw_layout` and the result has its bits

    Returns
    -------
    32-bit register, three enabled cycles after `a` and `b`
    """
    raw_bits, exp_bits, shift_bits = encoding.raw_bits, encoding.exp_bits, encoding.shift_bits
    layout = raw_layout(encoding)

    # Stage 1
    swap = Signal()
    big, small = Signal(layout), Signal(layout)
    distance = Signal(exp_bits)
    m.d.comb += [
        swap.eq(Cat(a.significand, a.exponent) < Cat(b.significand, b.exponent)),
        big.eq(Mux(swap, b, a)),
        small.eq(Mux(swap, a, b)),
        distance.eq(big.exponent - small.exponent),
    ]
    big_1 = Signal(layout, reset_less=True)
    small_1 = Signal(raw_bits - 1, reset_less=True)
    shift_1 = Signal(shift_bits, reset_less=True)
    subtract_1 = Signal(reset_less=True)
    nan_1 = Signal(reset_less=True)

    # Stage 2
    aligned = Signal(raw_bits - 1)
    sum_2 = Signal(raw_bits, reset_less=True)
    exponent_2 = Signal(exp_bits, reset_less=True)
    sign_2 = Signal(reset_less=True)
    subtract_2 = Signal(reset_less=True)
    nan_2 = Signal(reset_less=True)
    m.d.comb += aligned.eq(shift_right_sticky(m, small_1, shift_1))
    # One adder for both: subtracting adds the complement, and the carry-in comes from a pair of
    # ones below bit 0.
    total = Cat(subtract_1, big_1.significand, 0) + Cat(
        subtract_1, aligned ^ subtract_1.replicate(raw_bits - 1), subtract_1
    )

    # Stage 3
    zeros, shift, raw = Signal(shift_bits), Signal(shift_bits), Signal(raw_bits)
    m.d.comb += [
        zeros.eq(leading_zeros(m, sum_2)),
        # Not further than exponent 1: what is left of the top bit then is a subnormal.
        shift.eq(Mux(zeros < exponent_2, zeros, exponent_2)),
        raw.eq(sum_2 << shift),
    ]
    output = Signal(encoding.bits, reset_less=True)

    with m.If(en):
        m.d.sync += [
            big_1.eq(big),
            small_1.eq(small.significand),
            shift_1.eq(saturate(distance, shift_bits)),
            subtract_1.eq(a.sign ^ b.sign),
            nan_1.eq(
                nan
                | (
                    (a.exponent == encoding.raw_inf)
                    & (b.exponent == encoding.raw_inf)
                    & (a.sign ^ b.sign)
                )
            ),
            sum_2.eq(total[1 : raw_bits + 1]),
            exponent_2.eq(big_1.exponent),
            sign_2.eq(big_1.sign),
            subtract_2.eq(subtract_1),
            nan_2.eq(nan_1),
            output.eq(
                pack(
                    m,
                    encoding,
                    # x - x is +0; -0 + -0 keeps its sign.
                    sign=sign_2 & ~(subtract_2 & (sum_2 == 0)),
                    exponent=(exponent_2 - shift)[:exp_bits],
                    raw=raw,
                    nan=nan_2,
                )
            ),
        ]
    return output


class Adder(wiring.Component):
    """``o = a + b`` in an encoding, rounded to nearest even.

    Subnormals are kept, overflow gives infinity, every NaN result is the canonical one. To
    subtract, flip the top bit of an operand. Latency `FP32_LATENCY` enabled cycles; one result per
    enabled cycle.

    Parameters
    ----------
    encoding : of `a`, `b` and `o`

    Members
    -------
    en : In(1), low freezes every stage
    a, b : In, sampled in each enabled cycle
    o : Out, registered
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        bits = encoding.bits
        super().__init__({"en": In(1), "a": In(bits), "b": In(bits), "o": Out(bits)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        encoding = self._encoding
        a, b = Signal(raw_layout(encoding)), Signal(raw_layout(encoding))
        m.d.comb += [
            a.as_value().eq(unpack(self.a, encoding)),
            b.as_value().eq(unpack(self.b, encoding)),
        ]
        nan = is_nan(self.a, encoding) | is_nan(self.b, encoding)
        m.d.comb += self.o.eq(raw_add(m, en=self.en, a=a, b=b, nan=nan, encoding=encoding))
        return m


class Fp32Add(Adder):
    """The `Adder` for FP32: words of 32 bits, NaN results 0x7FC00000."""

    def __init__(self) -> None:
        super().__init__(FP32)


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
