"""Queues of words, with the members of `amaranth.lib.fifo.SyncFIFO`."""

from amaranth.hdl import Module, Mux, ShapeLike, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out


def queue_members(shape: ShapeLike) -> dict[str, wiring.Member]:
    """Members of a queue of words of a shape."""
    return {
        "w_data": In(shape),
        "w_en": In(1),
        "w_rdy": Out(1),
        "r_data": Out(shape),
        "r_en": In(1),
        "r_rdy": Out(1),
    }


class Slot(wiring.Component):
    """A queue of one word, in flip-flops.

    Throughput: a word in two cycles, as it is taken before the next is.
    """

    def __init__(self, width: int) -> None:
        super().__init__(queue_members(width))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        held = Signal(self.w_data.shape(), reset_less=True)
        m.d.comb += [self.w_rdy.eq(~self.r_rdy), self.r_data.eq(held)]
        with m.If(self.w_en & self.w_rdy):
            m.d.sync += [held.eq(self.w_data), self.r_rdy.eq(1)]
        with m.Elif(self.r_en):
            m.d.sync += self.r_rdy.eq(0)
        return m


class Direct(wiring.Component):
    """A queue through which a word passes in the cycle in which it comes, if none is before it."""

    def __init__(self, width: int, depth: int) -> None:
        self._depth = depth
        super().__init__(queue_members(width))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.waiting = waiting = queue_of(len(self.w_data), self._depth)
        m.d.comb += [
            self.w_rdy.eq(waiting.w_rdy),
            self.r_rdy.eq(waiting.r_rdy | self.w_en),
            self.r_data.eq(Mux(waiting.r_rdy, waiting.r_data, self.w_data)),
            waiting.r_en.eq(self.r_en),
            waiting.w_data.eq(self.w_data),
            waiting.w_en.eq(self.w_en & (waiting.r_rdy | ~self.r_en)),
        ]
        return m


def queue_of(width: int, depth: int) -> fifo.SyncFIFO | Slot:
    """A queue of `depth` words: distributed RAM, which an FPGA has less of than of flip-flops, or
    for one word a `Slot`."""
    return fifo.SyncFIFO(width=width, depth=depth) if depth > 1 else Slot(width)
