"""Between integers and FP32. Combinational."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..formats import FORMATS, DType
from .fp32 import is_nan
from .rounding import normalize

_BIAS = FORMATS[DType.FP32].bias


class WidenInt8(wiring.Component):
    """The FP32 word of an INT8 number: exact.

    Members
    -------
    bits : In(8), two's complement
    o : Out(32)
    """

    bits: In(8)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sign = self.bits[-1]
        magnitude = Signal(8)  # -128 has one that only fits unsigned
        m.d.comb += magnitude.eq(Mux(sign, -self.bits, self.bits))
        leading, zeros = normalize(m, magnitude)
        number = Cat(Const(0, 23 - 7), leading[:7], (_BIAS + 7 - zeros)[:8], sign)
        m.d.comb += self.o.eq(Mux(magnitude == 0, 0, number))
        return m


class Fp32ToInt32(wiring.Component):
    """Makes an integer of an FP32 number, rounded toward zero; what is outside the range becomes
    the end nearest to it, NaN becomes 0.

    Members
    -------
    word : In(32), FP32
    o : Out(32), two's complement, still to be added:
    carry : Out(1); the integer is ``o + carry``, which an adder that follows takes for nothing
    """

    word: In(32)
    o: Out(32)
    carry: Out(1)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        fraction, exponent, sign = self.word[:23], self.word[23:31], self.word[31]
        nan = is_nan(self.word)
        # The significand with its leading one at 2**31: exponents 31 to 1 below that leave bits.
        magnitude = Signal(31)
        small = Signal()
        large = Signal()
        shift = Signal(5)
        m.d.comb += [
            small.eq(exponent < _BIAS),
            large.eq(exponent >= _BIAS + 31),
            shift.eq(_BIAS + 31 - exponent),
            magnitude.eq(
                Mux(large, (1 << 31) - 1, Cat(Const(0, 8), fraction, Const(1, 1)) >> shift)
            ),
        ]
        # -x is ~x + 1; at the lower end of the range ~x alone is it.
        negative = sign & ~small & ~nan
        m.d.comb += [
            self.o.eq(Cat(Mux(small | nan, 0, magnitude)[:31] ^ negative.replicate(31), negative)),
            self.carry.eq(negative & ~large),
        ]
        return m
