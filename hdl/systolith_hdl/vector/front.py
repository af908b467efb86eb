"""What comes before the ALUs of a lane: which word they are given."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from ..arith.fp32 import is_nan
from ..formats import ONE

#: An integer v of 32 bits becomes the nearest FP32 number in the two ALUs of a lane, with one
#: rounding: with its halves in the low bits of numbers so large that these have the right weight,
#: ``a = 2**39 + 2**16 * (v // 2**16 + 2**15)`` and ``b = 2**23 + v % 2**16``, it is
#: ``(a - (2**39 + 2**31 + 2**23)) + b``, of which the difference is exact.
HIGH_HALF = 0x5300
LOW_HALF = 0x4B00
HALVES_OFFSET = 0x53008080


class Data(enum.Enum, shape=3):
    """What an element may be, if its condition holds."""

    #: the word of src0
    SRC0 = 0
    #: the word of src1
    SRC1 = 1
    #: the affine number, as an integer
    NUMBER = 2
    #: the affine number, in two halves that the ALUs make a float of
    HALVES = 3
    #: a word that another unit gives
    FOUND = 4
    #: the random word
    RANDOM = 5
    #: a number from 1 to 2, without 2, that the random word's upper bits make
    UNIFORM = 6


class Condition(enum.Enum, shape=3):
    """When an element is what `Data` says; else it is `otherwise`."""

    ALWAYS = 0
    NEVER = 1
    #: the affine number compares with zero as `holds` says
    NUMBER = 2
    #: the word of src0, as a float, does
    SRC0 = 3
    #: the index lies within the lane's bounds
    RANGE = 4
    #: the random word is at least `threshold`
    RANDOM = 5


class FrontLane(wiring.Component):
    """One lane's choice of operands, with its affine number and its bounds.

    Members
    -------
    data : In(Data)
    condition : In(Condition)
    holds : In(4), whether a comparison with zero holds for a number below zero, for zero, for one
        above, for NaN
    otherwise : In(32)
    index : In(16), of the element in the innermost dimension
    bounds : In(2), bit 0 takes src1 as the lower bound of the index, bit 1 as the upper one
    start : In(1), the affine number becomes `base` : In(32)
    step : In(1), where `chosen` : In(1), the affine number grows by `increment` : In(32)
    load : In(1), the affine number becomes src1: the lane's scalar
    threshold : In(32)
    src0, src1, found, random : In(32)
    initial : In(1), `y` is src1; else, with `scalar` : In(1), the scalar; else `imm0` : In(32)
    predicated : In(1), `b` is src0; else, with `tensor` : In(1), src1; else `imm1` : In(32)
    a, y, b : Out(32), operands of the element, in the same cycle

    The affine number and the bounds are registers; everything else is combinational.
    """

    data: In(Data)
    condition: In(Condition)
    holds: In(4)
    otherwise: In(32)
    index: In(16)
    bounds: In(2)
    start: In(1)
    base: In(32)
    step: In(1)
    chosen: In(1)
    increment: In(32)
    load: In(1)
    src0: In(32)
    src1: In(32)
    found: In(32)
    random: In(32)
    threshold: In(32)
    initial: In(1)
    scalar: In(1)
    imm0: In(32)
    predicated: In(1)
    tensor: In(1)
    imm1: In(32)
    a: Out(32)
    y: Out(32)
    b: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()

        number = Signal(32, reset_less=True)
        with m.If(self.start):
            m.d.sync += number.eq(self.base)
        with m.Elif(self.load):
            m.d.sync += number.eq(self.src1)
        with m.Elif(self.step):
            m.d.sync += number.eq(number + Mux(self.chosen, self.increment, 0))

        # An index has 16 bits: bounds are kept within 0 to 2**16.
        bound = Signal(17)
        m.d.comb += bound.eq(Mux(self.src1[16:].any(), 1 << 16, self.src1[:16]))
        with m.If(self.src1[31]):
            m.d.comb += bound.eq(0)
        low, high = Signal(17, reset_less=True), Signal(17, reset_less=True)
        for place, kept in enumerate((low, high)):
            with m.If(self.bounds[place]):
                m.d.sync += kept.eq(bound)

        with_number = self.condition == Condition.NUMBER
        magnitude = self.src0[:31]
        zero = Mux(with_number, ~number.any(), ~magnitude.any())
        nan = is_nan(self.src0) & ~with_number
        negative = Mux(with_number, number[31], self.src0[31]) & ~zero & ~nan
        compared = (Cat(negative, zero, ~(negative | zero | nan), nan) & self.holds).any()

        met = Signal()
        with m.Switch(self.condition):
            with m.Case(Condition.ALWAYS):
                m.d.comb += met.eq(1)
            with m.Case(Condition.NUMBER, Condition.SRC0):
                m.d.comb += met.eq(compared)
            with m.Case(Condition.RANGE):
                m.d.comb += met.eq((self.index >= low) & (self.index < high))
            with m.Case(Condition.RANDOM):
                m.d.comb += met.eq(self.random >= self.threshold)

        word = Signal(32)
        with m.Switch(self.data):
            with m.Case(Data.SRC0):
                m.d.comb += word.eq(self.src0)
            with m.Case(Data.SRC1):
                m.d.comb += word.eq(self.src1)
            with m.Case(Data.NUMBER):
                m.d.comb += word.eq(number)
            with m.Case(Data.HALVES):
                m.d.comb += word.eq(Cat(number[16:31], ~number[31], Const(HIGH_HALF, 16)))
            with m.Case(Data.FOUND):
                m.d.comb += word.eq(self.found)
            with m.Case(Data.RANDOM):
                m.d.comb += word.eq(self.random)
            with m.Case(Data.UNIFORM):
                m.d.comb += word.eq(Cat(self.random[9:], Const(ONE >> 23, 9)))
        m.d.comb += [
            self.a.eq(Mux(met, word, self.otherwise)),
            self.y.eq(Mux(self.initial, self.src1, Mux(self.scalar, number, self.imm0))),
        ]

        with m.If(self.predicated):
            m.d.comb += self.b.eq(self.src0)
        with m.Elif(self.tensor):
            m.d.comb += self.b.eq(self.src1)
        with m.Elif(self.data == Data.HALVES):
            m.d.comb += self.b.eq(Cat(number[:16], Const(LOW_HALF, 16)))
        with m.Else():
            m.d.comb += self.b.eq(self.imm1)
        return m
