"""Delay lines: the skew and deskew of the array."""

import re

from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from ..emit import Once

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
        # Not reset either, or what is inside would change its order. Whatever it wakes up with, it
        # is in step after one round of its bits.
        slot = Signal(range(slots), reset_less=True)
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


#: Module name of `skew`: bits of a word, number of words, first delay, what each adds.
SKEW_NAME = re.compile(r"skew_(\d+)x(\d+)_(\d+)(p|m)(\d+)")


def skew_delays(name: str) -> tuple[int, list[int]] | None:
    """Bits of a word and cycles of each from the name of a module of `skew`; None if it is none."""
    found = SKEW_NAME.fullmatch(name)
    if found is None:
        return None
    width, count, first, step = (int(found[group]) for group in (1, 2, 3, 5))
    sign = 1 if found[4] == "p" else -1
    return width, [first + sign * step * word for word in range(count)]


class _Skew(wiring.Component):
    """See `skew`."""

    def __init__(self, width: int, delays: list[int]) -> None:
        self._width = width
        self._delays = delays
        super().__init__({"i": In(width).array(len(delays)), "o": Out(width).array(len(delays))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for word, cycles in enumerate(self._delays):
            m.submodules[f"word{word}"] = delay = Once(
                Delay(width=self._width, cycles=cycles), f"delay_{self._width}x{cycles}"
            )
            m.d.comb += [delay.i.eq(self.i[word]), self.o[word].eq(delay.o)]
        return m


def skew(width: int, count: int, *, first: int, step: int) -> Once:
    """Words side by side, word k delayed by ``first + k * step`` cycles, emitted once: see `Delay`.

    Parameters
    ----------
    width : bits of each word
    count : of words, members ``i[0]`` and ``o[0]`` to ``i[count - 1]`` and ``o[count - 1]``
    """
    name = f"skew_{width}x{count}_{first}{'p' if step >= 0 else 'm'}{abs(step)}"
    found = skew_delays(name)
    assert found is not None
    return Once(_Skew(*found), name)
