"""Sums of rows: what one lane of the scalar engine adds up along the innermost dimension."""

from amaranth.hdl import Array, Const, Module, Signal
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from ..arith import FP32_LATENCY, Fp32Add
from ..emit import Once
from ..isa import REDUCE_ACCUMULATORS


class Adding(enum.Enum, shape=2):
    """What the adder works on."""

    #: accumulator[index] + x
    ELEMENT = 0
    #: accumulator[index] + accumulator[index + 1]
    COMBINE = 1
    #: accumulator[0] + accumulator[2]
    FINISH = 2


class RowSum(wiring.Component):
    """One FP32 adder and the accumulators of REDUCE.

    Members
    -------
    en : In(1), low freezes everything
    x : In(32), FP32
    adding : In(Adding) and index : In(2), what enters the adder
    store : In(4), the accumulators that become the adder's result
    clear : In(1), all accumulators become +0
    o : Out(32), the adder's result, FP32_LATENCY = 3 enabled cycles after its operands

    A result is back in its accumulator one cycle after it leaves the adder: 4 accumulators used in
    turn sustain one element per enabled cycle.
    """

    en: In(1)
    x: In(32)
    adding: In(Adding)
    index: In(2)
    store: In(REDUCE_ACCUMULATORS)
    clear: In(1)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        assert REDUCE_ACCUMULATORS == FP32_LATENCY + 1
        m.submodules.add = add = Once(Fp32Add(), "fp32_add")
        accumulators = Array(Signal(32, name=f"accumulator{i}") for i in range(REDUCE_ACCUMULATORS))
        m.d.comb += [add.en.eq(self.en), add.a.eq(accumulators[self.index]), self.o.eq(add.o)]
        with m.Switch(self.adding):
            with m.Case(Adding.ELEMENT):
                m.d.comb += add.b.eq(self.x)
            with m.Case(Adding.COMBINE):
                m.d.comb += add.b.eq(accumulators[self.index | Const(1, 2)])
            with m.Case(Adding.FINISH):
                m.d.comb += add.b.eq(accumulators[2])
        with m.If(self.en):
            for number, accumulator in enumerate(accumulators):
                with m.If(self.clear):
                    m.d.sync += accumulator.eq(0)
                with m.Elif(self.store[number]):
                    m.d.sync += accumulator.eq(add.o)
        return m
