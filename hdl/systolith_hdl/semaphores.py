"""Counting semaphores shared by all sequencers."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .banked import RoundRobin, one_hot_mux
from .config import CoreConfig

MAX_COUNT = 0xFFFF


class Update(data.Struct):
    """Adds `value` to a semaphore."""

    sem: unsigned(6)
    value: unsigned(16)


class WaitPort(wiring.Signature):
    """A semaphore, seen from who waits for it.

    Members
    -------
    sem : Out(6), which
    value : Out(16), how many units there have to be
    acquire : Out(1), as soon as there are, they are to be taken; not an offer that must stand
    holds : In(1), there are, in this cycle
    taken : In(1), they are taken in this cycle
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "sem": Out(6),
                "value": Out(16),
                "acquire": Out(1),
                "holds": In(1),
                "taken": In(1),
            }
        )


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
    """Holds the counts and applies one change per cycle, round-robin among the additions and among
    the subtractions: an addition if there is one, unless a subtraction gave way to one the cycle
    before. So none waits for ever, and an addition never depends on what a wait finds.

    The counts are words of a memory, so that who wants to know one has a wire for each of its bits
    and not for each bit of all. What a subtraction leaves is worked out for each who waits, as that
    is what says whether the wait holds; so choosing among them comes last.

    Members
    -------
    update : In(stream of Update) x updates. An addition is applied in the cycle it is taken and
        seen the cycle after.
    wait : In(WaitPort) x waits. A subtraction likewise. As there is one change a cycle, no unit is
        taken twice.
    read : In(CountPort)
    overflow : Out(1): the addition taken the cycle before would have passed 65535; it was not
        applied.
    clear : In(1), zeroes all counts
    """

    def __init__(self, config: CoreConfig, *, updates: int, waits: int) -> None:
        self._semaphores = config.semaphores
        super().__init__(
            {
                "update": In(stream.Signature(Update)).array(updates),
                "wait": In(WaitPort()).array(waits),
                "read": In(CountPort()),
                "overflow": Out(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # A semaphore that was not changed since `clear` counts 0, whatever is in the memory.
        changed = Signal(self._semaphores)
        m.submodules.counts = counts = memory.Memory(
            shape=unsigned(16), depth=self._semaphores, init=[]
        )

        def count_of(sem: Value) -> Value:
            port = counts.read_port(domain="comb")
            m.d.comb += port.addr.eq(sem)
            return Mux(changed.bit_select(sem, 1), port.data, 0)

        m.d.comb += self.read.count.eq(count_of(self.read.sem))

        # -- Additions: one is chosen, then added.
        m.submodules.updates = updates = RoundRobin(len(self.update))
        add = Signal()
        addition = Signal(Update)
        total = Signal(17)
        m.d.comb += [
            updates.requests.eq(Cat(update.valid for update in self.update)),
            updates.hold.eq(~add),
            addition.eq(one_hot_mux(updates.grants, [u.payload.as_value() for u in self.update])),
            total.eq(count_of(addition.sem) + addition.value),
        ]
        for update, grant in zip(self.update, updates.grants, strict=True):
            m.d.comb += update.ready.eq(grant & add)

        # -- Subtractions: all are worked out, then one is chosen.
        m.submodules.waits = waits = RoundRobin(len(self.wait))
        take = Signal()
        m.d.comb += [
            waits.requests.eq(Cat(wait.acquire & wait.holds for wait in self.wait)),
            waits.hold.eq(~take),
        ]
        differences = []
        for index, (wait, grant) in enumerate(zip(self.wait, waits.grants, strict=True)):
            difference = Signal(17, name=f"difference{index}")
            m.d.comb += [
                difference.eq(count_of(wait.sem) - wait.value),
                wait.holds.eq(~difference[16]),
                wait.taken.eq(grant & take),
            ]
            differences.append(difference[:16])
        left = one_hot_mux(waits.grants, differences)
        taken_sem = one_hot_mux(waits.grants, [wait.sem for wait in self.wait])

        gave_way = Signal()
        m.d.comb += [
            add.eq(updates.requests.any() & ~gave_way),
            take.eq(waits.requests.any() & ~add),
        ]
        m.d.sync += gave_way.eq(waits.requests.any() & add)
        write = counts.write_port()
        m.d.comb += [
            write.addr.eq(Mux(take, taken_sem, addition.sem)),
            write.data.eq(Mux(take, left, total)),
            write.en.eq(take | (add & ~total[16])),
        ]
        m.d.sync += self.overflow.eq(add & total[16])
        with m.If(take | add):  # what overflows has been changed before
            m.d.sync += changed.bit_select(write.addr, 1).eq(1)
        with m.If(self.clear):
            m.d.sync += changed.eq(0)
        return m
