"""The multiply-accumulate cell of the systolic array, and the number encoding inside the array."""

import dataclasses

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..arith.fp32 import Addend, add, unpack
from ..arith.rounding import EXP_BITS, normalize

#: Cycles from the factors of a MAC to the product meeting the running sum.
MUL_LATENCY = 1
#: Cycles from the running sum entering a MAC to the sum leaving it: also the skew between rows.
ADD_LATENCY = 4
#: Steps of `add` after which a MAC has a register; the last is at its end.
CUTS = ("swap", "sum", "level1")
assert len(CUTS) + 1 == ADD_LATENCY


#: Bits of an operand's significand: those of FP16, the operand type with most.
SIGNIFICAND_BITS = 11
#: An operand on its way to the array is an FP32 word without the fraction bits that no operand type
#: has: sign, exponent and 10 bits of fraction.
OPERAND_BITS = 1 + 8 + SIGNIFICAND_BITS - 1


class Narrow(data.Struct):
    """A number as it travels in the array: value = significand / 2**10 * 2**exponent.

    Operands are recoded once, at the array's edge, so that no MAC has to look at subnormals. The
    encoding holds every number of every operand type (BF16, FP16, FP8, INT8), so all PEs are one
    design and any two types can be multiplied.
    """

    sign: unsigned(1)
    #: of the normalised number: -133 (the smallest bf16 subnormal) to 127
    exponent: signed(9)
    #: 1024 to 2047; 0 means zero, and only then is the top bit clear
    significand: unsigned(SIGNIFICAND_BITS)
    inf: unsigned(1)
    nan: unsigned(1)


def recode(m: Module, word: Value) -> Value:
    """Returns the bits of the `Narrow` equal to an operand of `OPERAND_BITS`. Combinational."""
    assert len(word) == OPERAND_BITS
    fraction, field = word[: SIGNIFICAND_BITS - 1], word[SIGNIFICAND_BITS - 1 : -1]
    subnormal = Signal()
    exponent = Signal(signed(9))
    # A subnormal's fraction 1xx.. moves up by one place, 01x.. by two.
    significand, places = normalize(m, Cat(fraction, ~subnormal))
    m.d.comb += [
        subnormal.eq(field == 0),
        exponent.eq(Cat(field[0] | subnormal, field[1:]) - 127 - places),
    ]
    special = field == 0xFF
    return Cat(
        word[-1], exponent, significand, special & (fraction == 0), special & (fraction != 0)
    )


class Mac(wiring.Component):
    """``o = acc + a * w``, rounded once to FP32, to nearest even.

    The product is exact: its significand has 22 bits. Subnormals are kept, overflow gives infinity,
    every NaN result is 0x7FC00000. In numpy: ``float32(float64(acc) + float64(a) * float64(w))``.

    The cell never stalls. `a`, `w` and `active` are sampled in cycle t, `acc` in cycle
    t + MUL_LATENCY; `o` holds the result in cycle t + MUL_LATENCY + ADD_LATENCY. One result per
    cycle.

    Members
    -------
    a, w : In(Narrow), factors
    active : In(1), low adds nothing: `acc` comes out as it went in, whatever `a` and `w` hold
    acc : In(32), FP32; a NaN must be the canonical one
    o : Out(32), registered
    """

    a: In(Narrow)
    w: In(Narrow)
    active: In(1)
    acc: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a, w = self.a, self.w

        # Multiply. The product is not normalised: its top bit may be clear. `exponent` is the FP32
        # exponent of that bit, biased, also where it is outside of FP32's range.
        exponent = Signal(signed(EXP_BITS + 1))
        zero = Signal()
        infinite = Signal()
        m.d.comb += [
            exponent.eq(a.exponent + w.exponent + 128),
            zero.eq(~(a.significand[-1] & w.significand[-1])),
            infinite.eq(a.inf | w.inf),
        ]
        addend = Addend(
            sign=Signal(name="sign", reset_less=True),
            exponent=Signal(signed(EXP_BITS + 1), name="exponent_1", reset_less=True),
            significand=Signal(2 * SIGNIFICAND_BITS, name="significand", reset_less=True),
            inf=Signal(name="inf", reset_less=True),
            nan=Signal(name="nan", reset_less=True),
        )
        with m.If(self.active):
            m.d.sync += [
                addend.sign.eq(a.sign ^ w.sign),
                addend.exponent.eq(Mux(zero, 0, exponent)),
                addend.significand.eq(a.significand * w.significand),
                addend.inf.eq(infinite),
                addend.nan.eq(a.nan | w.nan | (infinite & zero)),
            ]
        with m.Else():
            # Adding -0 changes nothing, not even -0.
            m.d.sync += [
                addend.sign.eq(1),
                addend.exponent.eq(0),
                addend.significand.eq(0),
                addend.inf.eq(0),
                addend.nan.eq(0),
            ]
        product = dataclasses.replace(addend, significand=Cat(Const(0, 2), addend.significand))

        # Accumulate.
        acc = unpack(m, self.acc)
        m.d.comb += self.o.eq(add(m, en=Const(1), a=acc, b=product, lead=1, cuts=CUTS))
        return m
