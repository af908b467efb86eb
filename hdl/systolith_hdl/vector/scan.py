"""Pacing of SCAN: when an element may enter the lanes, and what it meets there."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..isa import SCAN_ROWS
from .lane import LOOP_LATENCY

assert SCAN_ROWS <= LOOP_LATENCY


class Scan(wiring.Component):
    """Lets each row's next element come to the first ALU in the cycle in which its last result
    leaves the lanes, LOOP_LATENCY = 6 cycles after the element before it, and the rows in turn in
    between.

    Members
    -------
    begin : In(1), an instruction begins
    scanning : In(1), it is a SCAN of `rows` : In(16) rows of `length` : In(16) elements each, and
        then of others
    offered : In(1), the sources' columns are there; `last` : In(1), they are the last ones
    moving : In(1), the lanes move
    entered : In(1), an element entered
    hold : Out(1), the lanes must not move: the element whose turn it is has not come
    turn : Out(1), an element may enter
    first : Out(1), it is the first of its row
    """

    begin: In(1)
    scanning: In(1)
    rows: In(16)
    length: In(16)
    offered: In(1)
    last: In(1)
    moving: In(1)
    entered: In(1)
    hold: Out(1)
    turn: Out(1)
    first: Out(1)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        slot = Signal(range(LOOP_LATENCY))
        element = Signal(16)
        over = Signal()
        m.d.comb += [
            self.turn.eq(~self.scanning | (slot < self.rows)),
            self.hold.eq(self.scanning & self.turn & ~over & ~self.offered),
            self.first.eq(element == 0),
        ]
        with m.If(self.scanning & self.moving):
            m.d.sync += slot.eq(Mux(slot == LOOP_LATENCY - 1, 0, slot + 1))
        with m.If(self.scanning & self.entered):
            m.d.sync += over.eq(self.last)
            with m.If(slot == self.rows - 1):
                m.d.sync += element.eq(Mux(element == self.length - 1, 0, element + 1))
        with m.If(self.begin):
            m.d.sync += [slot.eq(0), element.eq(0), over.eq(0)]
        return m
