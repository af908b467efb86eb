"""Counting semaphores shared by all sequencers."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .banked import RoundRobin
from .config import CoreConfig

MAX_COUNT = 0xFFFF


class Update(data.Struct):
    """Adds `value` to a semaphore, or subtracts it. Only those that wait subtract."""

    sem: unsigned(6)
    value: unsigned(16)
    subtract: unsigned(1)


class SemaphoreFile(wiring.Component):
    """Holds the counts and applies one update per cycle, round-robin among the requesters.

    Members
    -------
    update : In(stream of Update) x requesters. An update is applied in the cycle it is taken and
        seen in `values` the cycle after. A subtraction is taken only while it is `allowed`.
    allowed : In(requesters), the requester finds the count in `values` large enough for what it
        wants to subtract. As one update is applied a cycle, two requesters can never take the same
        units.
    values : Out(16) x semaphores
    overflow : Out(requesters): high in the cycle an addition of that requester is taken that would
        pass 65535; it is not applied.
    clear : In(1), zeroes all counts
    """

    def __init__(self, config: CoreConfig, *, requesters: int) -> None:
        self._requesters = requesters
        super().__init__(
            {
                "update": In(stream.Signature(Update)).array(requesters),
                "allowed": In(requesters),
                "values": Out(16).array(config.semaphores),
                "overflow": Out(requesters),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        values = Array(self.values)
        m.submodules.arbiter = arbiter = RoundRobin(self._requesters)
        m.d.comb += arbiter.requests.eq(
            Cat(
                update.valid & (~update.payload.subtract | allowed)
                for update, allowed in zip(self.update, self.allowed, strict=True)
            )
        )

        chosen = Signal(Update)
        for index, update in enumerate(self.update):
            m.d.comb += update.ready.eq(arbiter.grants[index])
            with m.If(arbiter.grants[index]):
                m.d.comb += chosen.eq(update.payload)
        old = Signal(16)
        new = Signal(17)
        m.d.comb += [
            old.eq(values[chosen.sem]),
            new.eq(Mux(chosen.subtract, old - chosen.value, old + chosen.value)),
        ]
        too_large = new[16] & ~chosen.subtract
        m.d.comb += self.overflow.eq(Mux(too_large, arbiter.grants, 0))
        with m.If(arbiter.grants.any() & ~too_large):
            m.d.sync += values[chosen.sem].eq(new[:16])
        with m.If(self.clear):
            m.d.sync += [value.eq(0) for value in self.values]
        return m
