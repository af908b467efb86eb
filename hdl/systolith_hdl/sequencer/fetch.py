"""Instruction fetch."""

from amaranth.hdl import Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import INSTRUCTION_BYTES, CoreConfig
from ..isa import INSTRUCTION_BITS, EngineKind, Opcode
from ..ports import axi4_read
from ..queue import queue_of
from .loops import Loops

_OFFSET_BITS = (INSTRUCTION_BYTES - 1).bit_length()


class Fetched(data.Struct):
    """An instruction as it comes from DRAM.

    Fields
    ------
    word : with index registers added
    number : its index in the stream
    error : it came with an error response
    bad_loop : it opens or closes a loop that it may not
    """

    word: unsigned(INSTRUCTION_BITS)
    number: unsigned(32)
    error: unsigned(1)
    bad_loop: unsigned(1)


class Fetch(wiring.Component):
    """Prefetches one engine's stream from DRAM, in the order in which its loops execute it.

    Parameters
    ----------
    depth : instructions held or on their way
    ahead : the same before the first `issued`, so that an engine that waits leaves the bus to the
        others
    delay : cycles from `start` to the first request

    Members
    -------
    start : In(1), begins at `base`; only while `idle`
    issued : In(1), an instruction has been issued since `start`
    stop : In(1), no further request is made and what is buffered or arrives is dropped
    base : In(48), a multiple of 64
    axi : Out(axi4_read): a burst of 64 bytes for each instruction, a beat for each TEST
    instruction : Out(stream of Fetched)
    test : In(1), the last instruction given is a TEST whose turn it is; until `tested`
    test_address : In(48), where its word lies; the two lowest bits are ignored
    tested : Out(1), high for a cycle when its word has come
    test_error : Out(1), with `tested`: it came with an error response
    idle : Out(1), nothing is outstanding
    moves : Out(1), some register may change

    A loop goes on, or ends, when its NEXT arrives, so that the next iteration is fetched while
    instructions before it execute. What was requested from behind the NEXT is dropped when it
    jumps: the first instruction of an iteration arrives a latency of DRAM after the NEXT. Behind a
    TEST nothing is fetched until its word has come.
    """

    def __init__(
        self,
        config: CoreConfig,
        kind: EngineKind,
        *,
        depth: int = 4,
        ahead: int | None = None,
        delay: int = 0,
    ) -> None:
        self._config = config
        self._kind = kind
        self._depth = depth
        self._ahead = depth if ahead is None else ahead
        self._delay = delay
        super().__init__(
            {
                "start": In(1),
                "issued": In(1),
                "stop": In(1),
                "base": In(48),
                "axi": Out(axi4_read(config, id_width=0)),
                "instruction": Out(stream.Signature(Fetched)),
                "test": In(1),
                "test_address": In(48),
                "tested": Out(1),
                "test_error": Out(1),
                "idle": Out(1),
                "moves": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self._config.axi_bytes
        beats = max(INSTRUCTION_BYTES // bus, 1)
        beat_bytes = min(bus, INSTRUCTION_BYTES)

        m.submodules.loops = loops = Loops(self._config, self._kind)
        m.submodules.buffer = buffer = queue_of(Fetched.as_shape().size, self._depth)
        running = Signal()
        address = Signal(48, reset_less=True)  # of the next request
        free = Signal(range(self._depth + 1), init=self._depth)
        kept = self._depth - self._ahead
        reserve = Mux(self.issued, 0, kept) if kept else 0
        waiting = Signal(range(self._delay + 1))
        outstanding = Signal(range(self._depth + 1))
        stale = Signal(
            range(self._depth + 1)
        )  # of those on their way, how many a jump made useless
        testing = Signal()  # nothing is fetched: a TEST has come
        asked = Signal()  # its word is on its way

        with m.If(self.start):
            m.d.sync += [running.eq(1), waiting.eq(self._delay)]
        with m.Else():
            with m.If(self.stop):
                m.d.sync += running.eq(0)
            with m.If(waiting != 0):
                m.d.sync += waiting.eq(waiting - 1)

        ar, r = self.axi.ar, self.axi.r
        # A request once offered stays: `offered` and `offer` hold it through a stop or a jump.
        offered = Signal()
        offer = Signal(48, reset_less=True)
        offer_test = Signal()
        m.d.comb += [
            ar.valid.eq(offered),
            ar.payload.addr.eq(offer),
            ar.payload.len.eq(Mux(offer_test, 0, beats - 1)),
            ar.payload.size.eq((beat_bytes - 1).bit_length()),
            ar.payload.burst.eq(1),
        ]
        requested = ar.valid & ar.ready
        turn = Signal()  # what follows is fetched from elsewhere, or not yet
        can_request = running & ~self.stop & (waiting == 0) & (free > Mux(offered, 1, 0) + reserve)
        can_fetch = can_request & ~testing & ~turn
        can_test = can_request & testing & self.test & ~asked & ~offered & (outstanding == 0)
        with m.If(requested):
            m.d.sync += offered.eq(0)
        with m.If(~self.start & (~offered | requested)):
            with m.If(can_fetch):
                m.d.sync += [
                    offered.eq(1),
                    offer.eq(address),
                    offer_test.eq(0),
                    address.eq(address + INSTRUCTION_BYTES),
                ]
            with m.Elif(can_test):
                low = (beat_bytes - 1).bit_length()
                m.d.sync += [
                    offered.eq(1),
                    offer.eq(self.test_address >> low << low),
                    offer_test.eq(1),
                    asked.eq(1),
                ]

        # Beats to instructions. A bus wider than an instruction carries it in one half.
        m.d.comb += r.ready.eq(1)
        arrived = r.valid & r.payload.last
        error = Signal()
        bad = r.payload.resp != 0
        with m.If(r.valid):
            m.d.sync += error.eq(Mux(r.payload.last, 0, error | bad))
        dropping = self.stop | ~running
        taken = arrived & ~dropping & (stale == 0) & ~asked
        word: Value
        if beats > 1:
            partial = Signal(INSTRUCTION_BITS - 8 * bus, reset_less=True)
            word = Signal(INSTRUCTION_BITS)
            m.d.comb += word.eq((r.payload.data << len(partial)) | partial)
            with m.If(r.valid):
                m.d.sync += partial.eq(word[8 * bus :])
        elif bus == INSTRUCTION_BYTES:
            word = r.payload.data
        else:
            half = (self.base[_OFFSET_BITS:] + loops.number)[0]
            word = Mux(half, r.payload.data[INSTRUCTION_BITS:], r.payload.data[:INSTRUCTION_BITS])

        # A NEXT that jumps, or a TEST, makes useless what was requested from behind it.
        is_test = (word[:8] == Opcode.TEST) & self._config.loops
        following = loops.number + 1
        m.d.comb += [
            loops.start.eq(self.start),
            loops.valid.eq(taken),
            loops.word.eq(word),
            turn.eq(taken & (loops.jump | is_test)),
        ]
        after = outstanding + requested - arrived
        with m.If(self.start):
            m.d.sync += [address.eq(self.base), stale.eq(0), testing.eq(0), asked.eq(0)]
        with m.Elif(turn):
            m.d.sync += [
                address.eq(self.base + (Mux(loops.jump, loops.target, following) << _OFFSET_BITS)),
                stale.eq(after + (offered & ~requested)),
                testing.eq(is_test),
            ]
        with m.Elif(arrived & (stale != 0)):
            m.d.sync += stale.eq(stale - 1)

        # The word of a TEST.
        found = self.test_address[2 : (bus - 1).bit_length()]
        flag = r.payload.data.word_select(found, 32)[:31].any()
        come = asked & arrived
        m.d.comb += [
            self.tested.eq(come & ~dropping),
            self.test_error.eq(error | bad),
            loops.flag.eq(flag),
            loops.flag_valid.eq(self.tested),
        ]
        with m.If(come):
            m.d.sync += [asked.eq(0), testing.eq(0)]

        fetched = Signal(Fetched)
        m.d.comb += [
            fetched.word.eq(loops.indexed),
            fetched.number.eq(loops.number),
            fetched.error.eq(error | bad),
            fetched.bad_loop.eq(loops.bad),
            buffer.w_en.eq(taken),
            buffer.w_data.eq(fetched),
            self.instruction.valid.eq(buffer.r_rdy & ~dropping),
            self.instruction.payload.eq(buffer.r_data),
            buffer.r_en.eq(self.instruction.ready | dropping),
            self.idle.eq(~running & ~offered & (outstanding == 0) & ~buffer.r_rdy),
        ]
        left = buffer.r_rdy & buffer.r_en
        dropped = arrived & ~taken
        m.d.sync += [
            free.eq(free - requested + left + dropped),
            outstanding.eq(after),
        ]
        m.d.comb += self.moves.eq(
            self.start
            | (waiting != 0)
            | requested
            | (~offered & (can_fetch | can_test))
            | r.valid
            | left
            | (self.stop & running)
        )
        return m
