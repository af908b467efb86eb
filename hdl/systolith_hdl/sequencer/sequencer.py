"""The sequencer of one engine: fetch, check, wait, issue, signal."""

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import INSTRUCTION_BYTES, CoreConfig
from ..isa import (
    CONTROL,
    LOADS,
    MAX_WAITS,
    DmaBody,
    EngineKind,
    FaultCause,
    Header,
    Opcode,
    WaitMode,
    is_opcode,
)
from ..ports import IssuePort, axi4_read
from ..semaphores import Update, WaitPort
from .check import Check, Fault
from .fetch import Fetch

#: Instructions an engine may hold that are issued and not complete.
IN_FLIGHT = 8


class Completion(data.Struct):
    """What is left to do when an instruction completes."""

    pc: unsigned(32)
    order: unsigned(32)  # instructions issued before it
    sem: unsigned(6)
    amount: unsigned(8)


class Retire(wiring.Component):
    """Signals the semaphores of completed instructions, in order.

    Members
    -------
    issued : In(stream of Completion), one for each instruction handed to the engine
    done : In(1), the engine completed the oldest
    update : Out(stream of Update)
    completed : Out(1), high for a cycle for each instruction whose signal is applied
    empty : Out(1), nothing is in flight
    settled : Out(1), all that are done have been signalled: `oldest` is not done
    oldest : Out(Completion), valid while not empty
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "issued": In(stream.Signature(Completion)),
                "done": In(1),
                "update": Out(stream.Signature(Update)),
                "completed": Out(1),
                "empty": Out(1),
                "settled": Out(1),
                "oldest": Out(Completion),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queue = queue = fifo.SyncFIFO(
            width=Shape.cast(Completion).width, depth=IN_FLIGHT
        )
        finished = Signal(range(IN_FLIGHT + 1))  # done by the engine, not yet signalled
        head = data.View(Completion, queue.r_data)
        pop = Signal()
        m.d.comb += [
            queue.w_data.eq(self.issued.payload.as_value()),
            queue.w_en.eq(self.issued.valid),
            self.issued.ready.eq(queue.w_rdy),
            self.update.valid.eq(finished.any() & (head.amount != 0)),
            self.update.payload.sem.eq(head.sem),
            self.update.payload.value.eq(head.amount),
            pop.eq(finished.any() & ((head.amount == 0) | self.update.ready)),
            queue.r_en.eq(pop),
            self.completed.eq(pop),
            self.empty.eq(~queue.r_rdy),
            self.settled.eq(~finished.any()),
            self.oldest.eq(head),
        ]
        m.d.sync += finished.eq(finished + self.done - pop)
        return m


class Sequencer(wiring.Component):
    """Runs one engine's instruction stream.

    Members
    -------
    start : In(1), begins at `base`; only while `idle`
    halt : In(1), no further instruction is issued
    base : In(48)
    seed : In(32), passed on to the engine
    axi : Out(axi4_read), instruction fetch
    issue : Out(IssuePort)
    done_load : In(1), as IssuePort.done for LOAD_STATIONARY (tensor only, else unused)
    wait : Out(WaitPort), the wait which is next
    update : Out(stream of Update) x 3: own (what is in `isa.CONTROL`), retire, retire of loads
    overflow : In(1), the update taken the cycle before, whosever it is, overflowed its semaphore
    fault : Out({valid, pc, fault}), valid stays high once the engine stopped
    pc : Out(32), index in the stream of the oldest instruction that is not complete
    settled : Out(1), no instruction that the engine is done with waits to be counted complete
    completed : Out(3), instructions completed in this cycle, a bit each
    ended : Out(1), END is complete
    idle : Out(1), nothing fetched, waiting or in flight
    awake : Out(1), some register may change: low while an instruction waits, for a semaphore or
        for its engine, and nothing moves behind it

    An instruction passes fetch, check, wait and issue in order; it is issued as soon as its waits
    hold and the engine takes it. END, TEST and whatever else of `isa.CONTROL` signals wait until
    all before are complete; the loops themselves are executed by the fetch.
    """

    def __init__(self, config: CoreConfig, kind: EngineKind) -> None:
        self._config = config
        self._kind = kind
        super().__init__(
            {
                "start": In(1),
                "halt": In(1),
                "base": In(48),
                "seed": In(32),
                "axi": Out(axi4_read(config, id_width=0)),
                "issue": Out(IssuePort()),
                "done_load": In(1),
                "wait": Out(WaitPort()),
                "update": Out(stream.Signature(Update)).array(3),
                "overflow": In(1),
                "fault": Out(
                    data.StructLayout({"valid": unsigned(1), "pc": unsigned(32), "fault": Fault})
                ),
                "pc": Out(32),
                "settled": Out(1),
                "completed": Out(3),
                "ended": Out(1),
                "idle": Out(1),
                "awake": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        # Of the first instructions, those of the DMA queues are urgent: the others wait for data.
        if self._kind is EngineKind.DMA:
            fetch = Fetch(config, self._kind, depth=config.prefetch)
        else:
            fetch = Fetch(
                config,
                self._kind,
                depth=config.prefetch,
                ahead=min(2, config.prefetch),
                delay=2 * config.dma_queues,
            )
        m.submodules.fetch = fetch
        m.submodules.check = check = Check(config, self._kind)
        m.submodules.retire = retire = Retire()
        retires = [retire]
        if self._kind is EngineKind.TENSOR:
            m.submodules.retire_load = retire_load = Retire()
            retires.append(retire_load)
            m.d.comb += retire_load.done.eq(self.done_load)
        wiring.connect(m, fetch.axi, wiring.flipped(self.axi))
        for each, update in zip(retires, self.update[1:], strict=False):
            wiring.connect(m, each.update, wiring.flipped(update))

        running = Signal()
        faulted = Signal()
        overflowed = Signal()  # the signal of the cycle before
        stop = Signal()
        m.d.comb += [
            stop.eq(~running | self.halt | faulted | overflowed),
            fetch.start.eq(self.start),
            fetch.stop.eq(stop & ~self.start),
            fetch.base.eq(self.base),
            retire.done.eq(self.issue.done),
        ]

        # -- Fetch to check, which holds one instruction; what else is known of it goes along.
        fetched = Signal.like(fetch.instruction.payload, reset_less=True)
        m.d.comb += [
            check.instruction.payload.eq(fetch.instruction.payload.word),
            check.instruction.valid.eq(fetch.instruction.valid),
            fetch.instruction.ready.eq(check.instruction.ready),
        ]
        with m.If(check.instruction.valid & check.instruction.ready):
            m.d.sync += fetched.eq(fetch.instruction.payload)

        # -- Wait.
        word = Signal.like(check.checked.payload.word, reset_less=True)
        holding = Signal()
        pending = Signal(MAX_WAITS)
        here = Signal(32)  # index of the instruction in the wait stage
        order = Signal(32)  # how many went before it
        tested = Signal()  # it is a TEST whose word has come
        header = data.View(Header, word[:128])
        incoming = data.View(Header, check.checked.payload.word[:128])
        leave = Signal()
        is_end = header.opcode == Opcode.END
        is_test = (header.opcode == Opcode.TEST) & config.loops
        turn = [Const(1)]  # to which of `retires` it belongs
        if len(retires) > 1:
            is_load = is_opcode(header.opcode, LOADS, config)
            turn = [~is_load, is_load]

        m.d.comb += check.checked.ready.eq(stop | ~holding | leave)
        with m.If(leave):
            m.d.sync += [holding.eq(0), order.eq(order + 1), tested.eq(0)]
        # What was prefetched from behind END is dropped.
        with m.If(check.checked.valid & check.checked.ready & ~stop & ~(leave & is_end)):
            m.d.sync += here.eq(fetched.number)
            fault = Signal(Fault)
            illegal = check.checked.payload.fault
            m.d.comb += fault.eq(illegal)
            with m.If(fetched.error):
                m.d.comb += [
                    fault.cause.eq(FaultCause.FETCH_ERROR),
                    fault.address.eq(self.base + (fetched.number << 6)),
                ]
            with m.Elif((illegal.cause == FaultCause.NONE) & fetched.bad_loop):
                m.d.comb += fault.cause.eq(FaultCause.BAD_LOOP)
            with m.If(fault.cause != FaultCause.NONE):
                m.d.sync += [
                    faulted.eq(1),
                    self.fault.pc.eq(fetched.number),
                    self.fault.fault.eq(fault),
                ]
            with m.Else():
                m.d.sync += [
                    holding.eq(1),
                    word.eq(check.checked.payload.word),
                    pending.eq(Cat(w.mode != WaitMode.NONE for w in incoming.wait)),
                ]
        with m.If(stop & ~leave):
            m.d.sync += holding.eq(0)

        wait = Signal(header.wait[0].shape())
        slot = Signal(MAX_WAITS)  # one-hot: the lowest pending wait
        m.d.comb += slot.eq(pending & (~pending + 1))
        for index in range(MAX_WAITS):
            with m.If(slot[index]):
                m.d.comb += wait.eq(header.wait[index])
        acquire = wait.mode == WaitMode.ACQUIRE
        m.d.comb += [
            self.wait.sem.eq(wait.sem),
            self.wait.value.eq(wait.value),
            self.wait.acquire.eq(holding & ~stop & pending.any() & acquire),
        ]
        satisfied = holding & pending.any() & Mux(acquire, self.wait.taken, self.wait.holds)
        with m.If(satisfied):
            m.d.sync += pending.eq(pending & ~slot)

        # -- Issue.
        own = self.update[0]
        internal = is_opcode(header.opcode, CONTROL, config)
        signals = header.signal.amount != 0
        drained = Cat(each.empty for each in retires).all()
        queue_ready = Cat(
            each.issued.ready & mine for each, mine in zip(retires, turn, strict=True)
        ).any()
        go = Signal()
        m.d.comb += [
            go.eq(holding & ~pending.any() & ~stop),
            self.issue.instruction.valid.eq(go & ~internal & queue_ready),
            self.issue.instruction.payload.eq(word),
            self.issue.counter.eq(order),
            self.issue.seed.eq(self.seed),
            own.valid.eq(go & internal & signals & drained & (tested | ~is_test)),
            own.payload.sem.eq(header.signal.sem),
            own.payload.value.eq(header.signal.amount),
        ]
        settled = Mux(
            is_test & ~tested, 0, Mux(signals, drained & own.ready, drained | ~(is_end | is_test))
        )
        m.d.comb += leave.eq(
            go & Mux(internal, settled, queue_ready & self.issue.instruction.ready)
        )
        completion = Signal(Completion)
        m.d.comb += [
            completion.pc.eq(here),
            completion.order.eq(order),
            completion.sem.eq(header.signal.sem),
            completion.amount.eq(header.signal.amount),
        ]
        for target, mine in zip(retires, turn, strict=True):
            m.d.comb += [
                target.issued.payload.eq(completion),
                target.issued.valid.eq(leave & ~internal & mine),
            ]
        with m.If(leave):
            m.d.sync += fetch.issued.eq(1)
        with m.If(leave & is_end):
            m.d.sync += [self.ended.eq(1), running.eq(0)]

        # -- TEST: once everything before is complete, its word is read.
        test = data.View(DmaBody, word[128:])
        m.d.comb += [
            fetch.test.eq(go & is_test & ~tested & drained),
            fetch.test_address.eq(test.dram_base),
        ]
        with m.If(fetch.tested):
            m.d.sync += tested.eq(1)
            with m.If(fetch.test_error):
                beat = min(config.axi_bytes, INSTRUCTION_BYTES)
                m.d.sync += [
                    faulted.eq(1),
                    self.fault.pc.eq(here),
                    self.fault.fault.cause.eq(FaultCause.AXI_READ_ERROR),
                    self.fault.fault.address.eq(test.dram_base & -beat),
                ]

        # -- A signal that overflows its semaphore, which is known a cycle after it was taken. In
        # that cycle nothing goes on here, and no other fault is seen that came at the same time.
        signalled = Signal()
        signalled_pc = Signal(32, reset_less=True)
        signalled_sem = Signal(6, reset_less=True)
        taken = Cat(update.valid & update.ready for update in self.update)
        m.d.sync += signalled.eq(taken.any() & ~faulted & ~overflowed)
        for index, pc in enumerate([here, *(each.oldest.pc for each in retires)]):
            with m.If(taken[index]):
                m.d.sync += [
                    signalled_pc.eq(pc),
                    signalled_sem.eq(self.update[index].payload.sem),
                ]
        m.d.comb += [
            overflowed.eq(signalled & self.overflow),
            self.fault.valid.eq(faulted & ~overflowed),
        ]
        with m.If(overflowed):
            m.d.sync += [
                faulted.eq(1),
                self.fault.pc.eq(signalled_pc),
                self.fault.fault.cause.eq(FaultCause.SEMAPHORE_OVERFLOW),
                self.fault.fault.address.eq(signalled_sem),
            ]

        with m.If(self.start):
            m.d.sync += [
                running.eq(1),
                faulted.eq(0),
                self.fault.pc.eq(0),
                self.fault.fault.eq(0),
                here.eq(0),
                order.eq(0),
                tested.eq(0),
                self.ended.eq(0),
                fetch.issued.eq(0),
            ]
        oldest = retire.oldest.pc
        if len(retires) > 1:
            load_first = retire.empty | (
                ~retire_load.empty & (retire_load.oldest.order < retire.oldest.order)
            )
            oldest = Mux(load_first, retire_load.oldest.pc, oldest)
        m.d.comb += [
            self.completed.eq(Cat(leave & internal, *(each.completed for each in retires))),
            self.pc.eq(Mux(drained, here, oldest)),
            self.settled.eq(Cat(each.settled for each in retires).all() & ~overflowed),
            self.idle.eq(fetch.idle & check.idle & ~holding & drained & ~running & ~overflowed),
        ]

        # -- What can change a register here, in the fetch or in the check.
        m.d.comb += self.awake.eq(
            fetch.moves
            | check.moves
            | (stop & holding)
            | satisfied
            | leave
            | Cat(each.done | ~each.settled for each in retires).any()
            | signalled
        )
        return m
