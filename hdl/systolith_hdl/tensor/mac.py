"""The multiply-accumulate cell of the systolic array, and the number encoding inside the array."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..arith.fp32 import Raw, is_nan, raw_add, unpack_fp32
from ..arith.rounding import (
    EXP_BITS,
    RAW_BITS,
    RAW_INF,
    leading_zeros,
    saturate5,
    shift_right_sticky,
)

#: Cycles from the factors of a MAC to the product meeting the running sum.
MUL_LATENCY = 1
#: Cycles from the running sum entering a MAC to the sum leaving it: also the skew between rows.
ADD_LATENCY = 3


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
    zeros = Signal(4)
    exponent = Signal(signed(9))
    significand = Signal(SIGNIFICAND_BITS)
    m.d.comb += [
        subnormal.eq(field == 0),
        zeros.eq(leading_zeros(m, fraction)),
        # A subnormal fraction 1xx.. stands for exponent -127 when normalised, 01x.. for -128.
        exponent.eq(Mux(subnormal, -127 - zeros, field - 127)),
        significand.eq(Mux(subnormal, Cat(0, fraction) << zeros, Cat(fraction, 1))),
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

        # Multiply. `exponent` is the FP32 exponent of the product's top bit, biased.
        product = Signal(2 * SIGNIFICAND_BITS)
        exponent = Signal(signed(10))
        tiny = Signal()
        up = Signal()
        zero = Signal()
        m.d.comb += [
            product.eq(a.significand * w.significand),
            exponent.eq(a.exponent + w.exponent + 128),
            # Products below FP32's normal range are shifted down to exponent 1, where the rest of
            # the adder takes them for subnormals with a sticky bit; those above it keep their
            # exponent, since the sum may come back into range.
            tiny.eq(exponent <= 1),
            up.eq(~product[-1] & ~tiny),
            zero.eq(~(a.significand[-1] & w.significand[-1])),
        ]
        aligned = Signal(RAW_BITS - 1)
        down = Mux(tiny, saturate5((1 - exponent)[:EXP_BITS]), 0)[:5]
        m.d.comb += aligned.eq(
            shift_right_sticky(
                m,
                Cat(
                    Const(0, RAW_BITS - 1 - len(product)),
                    Mux(up, product << 1, product)[: len(product)],
                ),
                down,
            )
        )
        infinite = a.inf | w.inf
        addend = Signal(Raw, reset_less=True)
        nan = Signal(reset_less=True)
        with m.If(self.active):
            m.d.sync += [
                addend.sign.eq(a.sign ^ w.sign),
                addend.exponent.eq(
                    Mux(infinite, RAW_INF, Mux(tiny | zero, 1, (exponent - up)[:EXP_BITS]))
                ),
                addend.significand.eq(aligned),
                nan.eq(a.nan | w.nan | (infinite & zero)),
            ]
        with m.Else():
            # Adding -0 changes nothing, not even -0.
            m.d.sync += [
                addend.sign.eq(1),
                addend.exponent.eq(1),
                addend.significand.eq(0),
                nan.eq(0),
            ]

        # Accumulate.
        acc = Signal(Raw)
        m.d.comb += [
            acc.as_value().eq(unpack_fp32(self.acc)),
            self.o.eq(raw_add(m, en=Const(1), a=acc, b=addend, nan=nan | is_nan(self.acc))),
        ]
        return m
