"""Queues of words."""

from amaranth.hdl import Module, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out


class Slot(wiring.Component):
    """A queue of one word, in flip-flops; members as those of `amaranth.lib.fifo.SyncFIFO`.

    Throughput: a word in two cycles, as it is taken before the next is.
    """

    def __init__(self, width: int) -> None:
        super().__init__(
            {
                "w_data": In(width),
                "w_en": In(1),
                "w_rdy": Out(1),
                "r_data": Out(width),
                "r_en": In(1),
                "r_rdy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        held = Signal(self.w_data.shape(), reset_less=True)
        m.d.comb += [self.w_rdy.eq(~self.r_rdy), self.r_data.eq(held)]
        with m.If(self.w_en & self.w_rdy):
            m.d.sync += [held.eq(self.w_data), self.r_rdy.eq(1)]
        with m.Elif(self.r_en):
            m.d.sync += self.r_rdy.eq(0)
        return m


def queue_of(width: int, depth: int) -> fifo.SyncFIFO | Slot:
    """A queue of `depth` words: distributed RAM, which an FPGA has less of than of flip-flops, or
    for one word a `Slot`."""
    return fifo.SyncFIFO(width=width, depth=depth) if depth > 1 else Slot(width)
