"""The multiply-accumulate cell of cores with ``fp8_rate`` 2: two FP8 products in a cycle, or one of
any other operands."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..arith.fp32 import Addend, add, unpack
from ..arith.rounding import (
    EXP_BITS,
    RAW_BITS,
    normalize,
    saturate5,
    shift_right_sticky,
)
from .mac import CUTS, OPERAND_BITS, SIGNIFICAND_BITS, Narrow, recode

#: Cycles from the factors of a `MacFp8x2` to their product or pair meeting the running sum.
PAIR_MUL_LATENCY = 3
#: The second operand of a pair on its way to the array: the upper bits of an FP32 word that hold
#: sign, exponent and the 3 bits of fraction that FP8 has at most.
SECOND_BITS = 1 + 8 + 3


class Fp8(data.Struct):
    """An FP8 number as it travels in the array: value = significand / 2**3 * 2**exponent."""

    sign: unsigned(1)
    #: of the normalised number: -16 (the smallest E5M2 subnormal) to 15
    exponent: signed(5)
    #: 8 to 15; 0 means zero, and only then is the top bit clear
    significand: unsigned(4)
    inf: unsigned(1)
    nan: unsigned(1)


_FP8_BITS = 12
#: Bits of a `Narrow` that an FP8 number leaves free: the upper 4 of its exponent, which repeat the
#: bit below them, and the lower 7 of its significand, which are zero.
_FREE_EXPONENT = slice(6, 10)
_FREE_SIGNIFICAND = slice(10, 17)


class Factor(data.Struct):
    """What a PE multiplies: one number of any operand type, or a pair of FP8 numbers.

    The first number of a pair is a `Narrow`; the second lies in the bits that FP8 leaves free in
    it, and one more.
    """

    bits: unsigned(23)
    more: unsigned(1)
    pair: unsigned(1)


def first_of(factor: data.View) -> data.View:
    """The number, or the first of the pair, as `Narrow`."""
    bits, pair = factor.bits, factor.pair
    return data.View(
        data.Layout.cast(Narrow),
        Cat(
            bits[: _FREE_EXPONENT.start],
            Mux(pair, bits[_FREE_EXPONENT.start - 1].replicate(4), bits[_FREE_EXPONENT]),
            bits[_FREE_SIGNIFICAND] & ~pair.replicate(7),
            bits[_FREE_SIGNIFICAND.stop :],
        ),
    )


def halves_of(factor: data.View) -> tuple[data.View, data.View]:
    """Both numbers of a pair as `Fp8`."""
    bits = factor.bits
    layout = data.Layout.cast(Fp8)
    first = Cat(bits[: _FREE_EXPONENT.start], bits[_FREE_SIGNIFICAND.stop :])
    second = Cat(bits[_FREE_EXPONENT], bits[_FREE_SIGNIFICAND], factor.more)
    return data.View(layout, first), data.View(layout, second)


def recode_factor(m: Module, word: Value, second: Value, pair: Value) -> Value:
    """Returns the bits of the `Factor` of an operand of `OPERAND_BITS`, or of it and a second one
    of `SECOND_BITS`; both then hold FP8 numbers. Combinational."""
    assert len(word) == OPERAND_BITS and len(second) == SECOND_BITS
    narrow = Signal(23)
    # All numbers of FP8 are normal in FP32: what is not has to be zero.
    fraction, field = second[:3], second[3:11]
    special = field == 0xFF
    half = Signal(_FP8_BITS)
    m.d.comb += [
        narrow.eq(recode(m, word)),
        half.eq(
            Cat(
                second[11],
                (field[:5] + 1)[:5],  # less the bias of 127
                Mux(field == 0, 0, Cat(fraction, 1)),
                special & (fraction == 0),
                special & (fraction != 0),
            )
        ),
    ]
    free = len(narrow[_FREE_EXPONENT])
    return Cat(
        narrow[: _FREE_EXPONENT.start],
        Mux(pair, half[:free], narrow[_FREE_EXPONENT]),
        Mux(pair, half[free:-1], narrow[_FREE_SIGNIFICAND]),
        narrow[_FREE_SIGNIFICAND.stop :],
        half[-1],
        pair,
    )


class _Product(data.Struct):
    """Product of two FP8 numbers: value = significand / 2**7 * 2**(exponent - 32)."""

    #: top bit set, or 0
    significand: unsigned(8)
    #: 0 to 63; 0 if the product is zero
    exponent: unsigned(6)
    #: infinite, so larger than all others
    inf: unsigned(1)


def _product(m: Module, a: data.View, w: data.View, *, name: str) -> tuple[Signal, Value, Value]:
    """Returns the `_Product` of two `Fp8`, its sign, and whether it is NaN."""
    significand = Signal(8, name=f"{name}_significand")
    zero = Signal(name=f"{name}_zero")
    product = Signal(_Product, name=name)
    top = significand[-1]
    m.d.comb += [
        significand.eq(a.significand * w.significand),
        zero.eq(~(a.significand[-1] & w.significand[-1])),
        product.significand.eq(Mux(top, significand, significand << 1)),
        product.exponent.eq(Mux(zero, 0, a.exponent + w.exponent + 32 + top)),
        product.inf.eq(a.inf | w.inf),
    ]
    return product, a.sign ^ w.sign, a.nan | w.nan | (product.inf & zero)


class MacFp8x2(wiring.Component):
    """``o = acc + a * w``, or of pairs ``o = acc + (a0 * w0 + a1 * w1)``.

    The first is what `Mac` computes. The second rounds twice to FP32, to nearest even: the sum of
    the two products, which are exact, and its sum with `acc`. In numpy, the products being
    ``float64``: ``acc + float32(a0 * w0 + a1 * w1)``. Where one of `a` and `w` is a pair and the
    other is not, the second number of the pair counts for nothing.

    The cell never stalls. `a`, `w` and `active` are sampled in cycle t, `acc` in cycle
    t + PAIR_MUL_LATENCY; `o` holds the result in cycle t + PAIR_MUL_LATENCY + ADD_LATENCY. One
    result per cycle.

    Members
    -------
    a, w : In(Factor)
    active : In(1), low adds nothing: `acc` comes out as it went in, whatever `a` and `w` hold
    acc : In(32), FP32; a NaN must be the canonical one
    o : Out(32), registered
    """

    a: In(Factor)
    w: In(Factor)
    active: In(1)
    acc: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # One adder and one register for the significand serve both: a single product passes
        # through them as the smaller of two numbers, the larger being zero, and is not shifted.

        # -- Stage 1: multiply. Of a single product see `Mac`.
        pair = self.a.pair & self.w.pair
        a, w = first_of(self.a), first_of(self.w)
        product = Signal(2 * SIGNIFICAND_BITS)
        exponent = Signal(signed(EXP_BITS + 1))
        zero = Signal()
        infinite = a.inf | w.inf
        m.d.comb += [
            product.eq(a.significand * w.significand),
            exponent.eq(a.exponent + w.exponent + 128),
            zero.eq(~(a.significand[-1] & w.significand[-1])),
        ]

        (a0, a1), (w0, w1) = halves_of(self.a), halves_of(self.w)
        p0, sign0, nan0 = _product(m, a0, w0, name="p0")
        p1, sign1, nan1 = _product(m, a1, w1, name="p1")
        swap = Signal()
        big, small = Signal(_Product), Signal(_Product)
        distance = Signal(6)
        m.d.comb += [
            swap.eq(p0.as_value() < p1.as_value()),
            big.eq(Mux(swap, p1, p0)),
            small.eq(Mux(swap, p0, p1)),
            # Of no meaning if there is an infinity.
            distance.eq(big.exponent - small.exponent),
        ]

        pair_1 = Signal(reset_less=True)
        big_1 = Signal(8, reset_less=True)
        small_1 = Signal(2 * SIGNIFICAND_BITS, reset_less=True)
        shift_1 = Signal(5, reset_less=True)
        exponent_1 = Signal(signed(EXP_BITS + 1), reset_less=True)
        sign_1 = Signal(reset_less=True)
        subtract_1 = Signal(reset_less=True)
        inf_1 = Signal(reset_less=True)
        nan_1 = Signal(reset_less=True)
        with m.If(~self.active):
            # Adding -0 changes nothing, not even -0.
            m.d.sync += [
                pair_1.eq(0),
                big_1.eq(0),
                small_1.eq(0),
                shift_1.eq(0),
                exponent_1.eq(0),
                sign_1.eq(1),
                subtract_1.eq(0),
                inf_1.eq(0),
                nan_1.eq(0),
            ]
        with m.Elif(pair):
            m.d.sync += [
                pair_1.eq(1),
                big_1.eq(big.significand),
                small_1.eq(Cat(Const(0, 14), small.significand)),
                shift_1.eq(saturate5(distance)),
                # 127 - 32; finite ones stay below 256.
                exponent_1.eq(big.exponent + 95),
                sign_1.eq(Mux(swap, sign1, sign0)),
                subtract_1.eq((sign0 ^ sign1) & ~big.inf),
                inf_1.eq(big.inf),
                nan_1.eq(nan0 | nan1 | (p0.inf & p1.inf & (sign0 ^ sign1))),
            ]
        with m.Else():
            m.d.sync += [
                pair_1.eq(0),
                big_1.eq(0),
                small_1.eq(product),
                shift_1.eq(0),
                exponent_1.eq(Mux(zero, 0, exponent)),
                sign_1.eq(a.sign ^ w.sign),
                subtract_1.eq(0),
                inf_1.eq(infinite),
                nan_1.eq(a.nan | w.nan | (infinite & zero)),
            ]

        # -- Stage 2: align and add, as in `add`. Only the upper bits are those of a pair.
        aligned = Signal(RAW_BITS - 1)
        low = len(small_1) - 8
        m.d.comb += aligned.eq(
            shift_right_sticky(m, Cat(Const(0, RAW_BITS - 9), small_1[low:]), shift_1)
            | Cat(Const(0, RAW_BITS - 9 - low), small_1[:low])
        )
        total = Cat(subtract_1, Const(0, RAW_BITS - 9), big_1, 0) + Cat(
            subtract_1, aligned ^ subtract_1.replicate(RAW_BITS - 1), subtract_1
        )
        sum_2 = Signal(RAW_BITS, reset_less=True)
        pair_2 = Signal(reset_less=True)
        exponent_2 = Signal(signed(EXP_BITS + 1), reset_less=True)
        sign_2 = Signal(reset_less=True)
        subtract_2 = Signal(reset_less=True)
        inf_2 = Signal(reset_less=True)
        nan_2 = Signal(reset_less=True)
        m.d.sync += [
            sum_2.eq(total[1 : RAW_BITS + 1]),
            pair_2.eq(pair_1),
            exponent_2.eq(exponent_1),
            sign_2.eq(sign_1),
            subtract_2.eq(subtract_1),
            inf_2.eq(inf_1),
            nan_2.eq(nan_1),
        ]

        # -- Stage 3: normalise and round the sum of a pair. Products one binade apart at most
        #    cancel to a number of few bits, all of them in the upper 10; others lose two places at
        #    most. A single product only moves past the carry, by one place.
        nothing = Signal()
        round_up = Signal()
        rounded = Signal(25)
        normal, zeros = normalize(m, sum_2, look=10, forced=(~pair_2, Const(1, 4)))
        m.d.comb += [
            nothing.eq(pair_2 & ~normal[-1]),
            round_up.eq(pair_2 & normal[3] & (normal[4] | (normal[:3] != 0))),
            rounded.eq(normal[4:] + round_up),
        ]
        addend = Addend(
            sign=Signal(name="sign", reset_less=True),
            exponent=Signal(signed(EXP_BITS + 1), name="exponent_3", reset_less=True),
            significand=Signal(24, name="significand", reset_less=True),
            inf=Signal(name="inf", reset_less=True),
            nan=Signal(name="nan", reset_less=True),
        )
        m.d.sync += [
            # x - x is +0; -0 + -0 keeps its sign.
            addend.sign.eq(sign_2 & ~(subtract_2 & nothing)),
            addend.exponent.eq(
                Mux(nothing, 0, Mux(pair_2, exponent_2 + 1 + rounded[-1] - zeros, exponent_2))
            ),
            addend.significand.eq(Cat(rounded[:23], rounded[23] | rounded[24])),
            addend.inf.eq(inf_2),
            addend.nan.eq(nan_2),
        ]

        # -- Accumulate.
        acc = unpack(m, self.acc)
        m.d.comb += self.o.eq(add(m, en=Const(1), a=acc, b=addend, lead=1, cuts=CUTS))
        return m
