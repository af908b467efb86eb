"""Steering of the lanes' accumulators: REDUCE and STATISTICS."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..isa import REDUCE_ACCUMULATORS
from .alu import ALU_LATENCY
from .lane import LANE_LATENCY, Second

#: Cycles REDUCE adds for each result: the accumulators drain, are combined and cleared.
REDUCE_CYCLES = LANE_LATENCY + ALU_LATENCY + 4
#: Cycles STATISTICS adds for each row, as it combines them but once.
STATISTICS_CYCLES = LANE_LATENCY + 3


class Steering(wiring.Component):
    """Tells the second ALU of all lanes what to work on, and when a result leaves it.

    Elements of REDUCE go to the accumulators in turn; after the last of a group it waits until all
    are in (LANE_LATENCY cycles), combines them in pairs, finishes, clears and opens again.

    Elements of STATISTICS enter twice, the second time to be squared, so the accumulators of even
    number hold sums, those of odd number sums of squares. Two of each finish, one after the other.

    Members
    -------
    enable : In(1), the lanes move
    enter : In(1), an element enters the lanes; only while `enable`
    reducing : In(1), elements are reduced in groups of `length` : In(16)
    twice : In(1), each enters twice; only while `reducing`
    again : Out(1), the one that enters next enters for the second time
    begin : In(1), an instruction begins
    closed : Out(1), a group is being finished: nothing may enter
    second, index, clear : Out, of the lanes
    arrived : Out(1), an element that is not reduced is at the second ALU
    result : Out(1), a result is at the lanes' output
    """

    enable: In(1)
    enter: In(1)
    reducing: In(1)
    twice: In(1)
    again: Out(1)
    length: In(16)
    begin: In(1)
    closed: Out(1)
    second: Out(Second)
    index: Out(2)
    clear: Out(1)
    arrived: Out(1)
    result: Out(1)

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # What enters travels to the second ALU, and from there to the output.
        entered = self.enter & ~self.reducing
        accumulate = self.enter & self.reducing
        slot = Signal(range(REDUCE_ACCUMULATORS))
        slot_there: Value = slot
        for stage in range(ALU_LATENCY):  # the last of the lanes' 1 + ALU_LATENCY comes below
            moved = Signal(4, name=f"steer{stage}")
            with m.If(self.enable):
                m.d.sync += moved.eq(Cat(entered, accumulate, slot_there))
            entered, accumulate, slot_there = moved[0], moved[1], moved[2:4]
        # What the second ALU works on next.
        second = Signal(Second)
        index = Signal(2)
        finish = Signal()
        result = Signal()
        with m.If(self.enable):
            m.d.sync += [
                self.second.eq(second),
                self.index.eq(index),
                self.arrived.eq(entered),
                result.eq(entered | finish),
            ]
        for stage in range(ALU_LATENCY):
            moved = Signal(name=f"result{stage}")
            with m.If(self.enable):
                m.d.sync += moved.eq(result)
            result = moved
        m.d.comb += self.result.eq(result)

        element = Signal(16)
        drain = Signal(range(16))
        # An accumulating slot without an element would add garbage: steer it to no accumulator.
        m.d.comb += [second.eq(Second.OPERAND), index.eq(slot_there)]
        with m.If(self.reducing & accumulate):
            m.d.comb += second.eq(Second.ACCUMULATE)
        with m.If(self.enable & self.closed):
            m.d.sync += drain.eq(drain + 1)
        with m.If(self.closed):
            combine = Mux(self.twice, Second.FINISH, Second.COMBINE)
            with m.Switch(drain):
                with m.Case(LANE_LATENCY - 1):
                    m.d.comb += [second.eq(combine), index.eq(0), finish.eq(self.twice)]
                with m.Case(LANE_LATENCY):
                    m.d.comb += [
                        second.eq(combine),
                        index.eq(Mux(self.twice, 1, 2)),
                        finish.eq(self.twice),
                    ]
                with m.Case(LANE_LATENCY + ALU_LATENCY + 1):
                    m.d.comb += [second.eq(Second.FINISH), index.eq(0), finish.eq(1)]
            with m.If(drain == Mux(self.twice, STATISTICS_CYCLES, REDUCE_CYCLES) - 1):
                m.d.comb += self.clear.eq(self.enable)
                with m.If(self.enable):
                    m.d.sync += self.closed.eq(0)
        with m.If(self.enter & self.reducing):
            m.d.sync += [slot.eq(slot + 1), self.again.eq(self.twice & ~self.again)]
            with m.If(self.again | ~self.twice):
                m.d.sync += element.eq(element + 1)
                with m.If(element == self.length - 1):
                    m.d.sync += [element.eq(0), slot.eq(0), self.closed.eq(1), drain.eq(0)]
        fresh = Signal()
        m.d.sync += fresh.eq(self.begin)
        with m.If(fresh):
            m.d.comb += self.clear.eq(1)  # the accumulators start from this instruction's identity
        return m
