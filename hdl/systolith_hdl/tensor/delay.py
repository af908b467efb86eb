"""Delay lines: the skew and deskew of the array."""

from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

#: Longest delay made of registers; above it a ring in a memory takes their place.
_REGISTERS = 3


class Delay(wiring.Component):
    """Delays `i` by `cycles`. Not reset: after a reset what was inside still comes out, in order.

    Members
    -------
    i : In(width)
    o : Out(width), the value `i` had `cycles` cycles ago
    """

    def __init__(self, *, width: int, cycles: int) -> None:
        if width < 1 or cycles < 0:
            raise ValueError(f"a delay needs width >= 1 and cycles >= 0, not {width}, {cycles}")
        self._width = width
        self._cycles = cycles
        super().__init__({"i": In(width), "o": Out(width)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self._cycles <= _REGISTERS:
            last = self.i
            for stage in range(self._cycles):
                register = Signal(self._width, name=f"stage{stage}", reset_less=True)
                m.d.sync += register.eq(last)
                last = register
            m.d.comb += self.o.eq(last)
            return m
        # The slot that is about to be written is read first; the read register adds a cycle.
        slots = self._cycles - 1
        ring: memory.Memory = memory.Memory(shape=unsigned(self._width), depth=slots, init=[])
        m.submodules.ring = ring
        read, write = ring.read_port(), ring.write_port()
        slot = Signal(range(slots))
        with m.If(slot == slots - 1):
            m.d.sync += slot.eq(0)
        with m.Else():
            m.d.sync += slot.eq(slot + 1)
        m.d.comb += [
            read.addr.eq(slot),
            read.en.eq(1),
            write.addr.eq(slot),
            write.en.eq(1),
            write.data.eq(self.i),
            self.o.eq(read.data),
        ]
        return m
