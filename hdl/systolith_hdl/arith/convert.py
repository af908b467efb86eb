"""From what the vector engine computes in to the type of its destination."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..formats import FORMATS, INTEGERS, DType
from .fp32 import is_nan
from .rounding import leading_zeros

#: Enabled cycles from a word to the converted one.
CONVERT_LATENCY = 2

_BIAS = FORMATS[DType.FP32].bias


class ConvertWord(wiring.Component):
    """Makes an integer of an FP32 word, or FP32 of an integer, or an INT8 number of an integer.

    FP32 becomes an integer toward zero; what is outside the type's range the end nearest to it,
    NaN 0. An integer becomes FP32 to nearest even, or, for a narrow destination, to odd: toward
    zero, and where that is not exact the last bit is set, so that `RoundNarrow` behind rounds as
    if it saw the integer itself. Of integers INT8 takes the low 8 bits, with their sign.

    Members
    -------
    en : In(1), low freezes it
    word : In(32)
    given : In(DType), FP32, INT32 or UINT32, steady
    dtype : In(DType), of the destination, steady. What it makes of a type that needs no
        conversion is not defined
    o : Out(32), CONVERT_LATENCY = 2 enabled cycles later

    One shifter serves all: to normalise an integer, and, with its bits reversed, to bring the
    significand of an FP32 number down to the integer part.
    """

    en: In(1)
    word: In(32)
    given: In(DType)
    dtype: In(DType)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        word, sign = self.word, self.word[31]
        from_fp32 = self.given == DType.FP32
        to_integer = Cat(self.dtype == each for each in INTEGERS).any()

        # Stage 1: what is shifted, and how far.
        magnitude = Signal(32)
        negative = Signal()
        zeros = Signal(5)
        m.d.comb += [
            negative.eq(sign & (self.given == DType.INT32)),
            magnitude.eq((word ^ negative.replicate(32)) + negative),
            # A zero counts as 31 zeros and a one.
            zeros.eq(leading_zeros(m, Cat(Const(1, 1), magnitude[1:]))),
        ]
        exponent = word[23:31]
        nan = is_nan(word)
        top = Signal(8)  # the exponent from which on a number is outside the range
        end = Signal(32)  # of the range; the lower end is its complement
        with m.Switch(self.dtype):
            with m.Case(DType.INT8):
                m.d.comb += [top.eq(_BIAS + 7), end.eq(0x7F)]
            with m.Case(DType.UINT32):
                m.d.comb += [top.eq(_BIAS + 32), end.eq(0xFFFFFFFF)]
            with m.Default():
                m.d.comb += [top.eq(_BIAS + 31), end.eq(0x7FFFFFFF)]
        unsigned = self.dtype == DType.UINT32
        small = (exponent < _BIAS) | nan | (sign & unsigned)
        large = exponent >= top
        significand = Cat(Const(0, 8), word[:23], Const(1, 1))
        integer = Mux(from_fp32, Mux(small, 0, Mux(large, end, significand)), word[:8].as_signed())

        before = Signal(32)
        amount = Signal(5)
        flip = Signal()
        carry = Signal()
        zero = Signal()
        with m.If(self.en):
            m.d.sync += [
                before.eq(Mux(to_integer, integer[:32][::-1], magnitude)),
                amount.eq(
                    Mux(
                        to_integer,
                        Mux(from_fp32 & ~large, (_BIAS + 31 - exponent)[:5], 0),
                        zeros,
                    )
                ),
                # -x is ~x + 1; the lower end of the range is ~end.
                flip.eq(Mux(to_integer, from_fp32 & sign & ~small, negative)),
                carry.eq(sign & ~small & ~large & from_fp32),
                zero.eq(magnitude == 0),
            ]

        # Stage 2: shift; then one adder rounds, or negates.
        shifted = Signal(32)
        m.d.comb += shifted.eq((before << amount)[:32])
        kept, lost = shifted[8:31], shifted[:8]
        narrow = self.dtype != DType.FP32
        number = Cat(
            kept[0] | (narrow & lost.any()), kept[1:], Mux(zero, 0, (_BIAS + 31 - amount)[:8])
        )
        up = ~narrow & lost[7] & (kept[0] | lost[:7].any())
        addend: Value = Mux(
            to_integer,
            shifted[::-1] ^ flip.replicate(32),
            Cat(number, Const(0, 1)),
        )
        total = Signal(32)
        m.d.comb += total.eq(addend + Mux(to_integer, carry, up))
        with m.If(self.en):
            m.d.sync += self.o.eq(Cat(total[:31], Mux(to_integer, total[31], flip)))
        return m
