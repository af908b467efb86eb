"""Counting semaphores shared by all sequencers."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .banked import RoundRobin
from .config import CoreConfig

MAX_COUNT = 0xFFFF


class Update(data.Struct):
    """Adds `value` to a semaphore, or subtracts it. Only those that wait subtract."""

    sem: unsigned(6)
    value: unsigned(16)
    subtract: unsigned(1)


class CountPort(wiring.Signature):
    """The count of one semaphore, seen from who asks.

    Members
    -------
    sem : Out(6), which; one that does not exist has any count
    count : In(16), in the same cycle
    """

    def __init__(self) -> None:
        super().__init__({"sem": Out(6), "count": In(16)})


class SemaphoreFile(wiring.Component):
    """Holds the counts and applies one update per cycle, round-robin among the requesters.

    The counts are words of a memory, so that who wants to know one has a wire for each of its bits
    and not for each bit of all.

    Members
    -------
    update : In(stream of Update) x requesters. An update is applied in the cycle it is taken and
        seen in `read` the cycle after. A subtraction is taken only while it is `allowed`.
    allowed : In(requesters), the requester finds the count in `read` large enough for what it
        wants to subtract. As one update is applied a cycle, two requesters can never take the same
        units.
    read : In(CountPort) x readers
    overflow : Out(requesters): high in the cycle an addition of that requester is taken that would
        pass 65535; it is not applied.
    clear : In(1), zeroes all counts
    """

    def __init__(self, config: CoreConfig, *, requesters: int, readers: int) -> None:
        self._requesters = requesters
        self._semaphores = config.semaphores
        super().__init__(
            {
                "update": In(stream.Signature(Update)).array(requesters),
                "allowed": In(requesters),
                "read": In(CountPort()).array(readers),
                "overflow": Out(requesters),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # A semaphore that was not updated since `clear` counts 0, whatever is in the memory.
        updated = Signal(self._semaphores)
        m.submodules.counts = counts = memory.Memory(
            shape=unsigned(16), depth=self._semaphores, init=[]
        )

        def count_of(sem: Value) -> Value:
            port = counts.read_port(domain="comb")
            m.d.comb += port.addr.eq(sem)
            return Mux(updated.bit_select(sem, 1), port.data, 0)

        for read in self.read:
            m.d.comb += read.count.eq(count_of(read.sem))

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
            old.eq(count_of(chosen.sem)),
            new.eq(Mux(chosen.subtract, old - chosen.value, old + chosen.value)),
        ]
        too_large = new[16] & ~chosen.subtract
        m.d.comb += self.overflow.eq(Mux(too_large, arbiter.grants, 0))
        write = counts.write_port()
        m.d.comb += [
            write.addr.eq(chosen.sem),
            write.data.eq(new),
            write.en.eq(arbiter.grants.any() & ~too_large),
        ]
        with m.If(write.en):
            m.d.sync += updated.bit_select(chosen.sem, 1).eq(1)
        with m.If(self.clear):
            m.d.sync += updated.eq(0)
        return m
