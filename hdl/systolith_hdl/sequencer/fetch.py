"""Instruction fetch."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import INSTRUCTION_BYTES, CoreConfig
from ..isa import INSTRUCTION_BITS
from ..ports import axi4_read


class Fetch(wiring.Component):
    """Prefetches one engine's stream from DRAM.

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
    axi : Out(axi4_read): a burst of 64 bytes for each instruction
    instruction : Out(stream of {word, error}); `error` marks an error response
    idle : Out(1), nothing is outstanding
    """

    def __init__(
        self, config: CoreConfig, *, depth: int = 4, ahead: int | None = None, delay: int = 0
    ) -> None:
        self._config = config
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
                "instruction": Out(
                    stream.Signature(
                        data.StructLayout(
                            {"word": unsigned(INSTRUCTION_BITS), "error": unsigned(1)}
                        )
                    )
                ),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self._config.axi_bytes
        beats = max(INSTRUCTION_BYTES // bus, 1)
        beat_bytes = min(bus, INSTRUCTION_BYTES)

        m.submodules.buffer = buffer = fifo.SyncFIFO(width=INSTRUCTION_BITS + 1, depth=self._depth)
        running = Signal()
        address = Signal(48)
        free = Signal(range(self._depth + 1), init=self._depth)
        kept = self._depth - self._ahead
        reserve = Mux(self.issued, 0, kept) if kept else 0
        waiting = Signal(range(self._delay + 1))
        outstanding = Signal(range(self._depth + 1))

        with m.If(self.start):
            m.d.sync += [running.eq(1), address.eq(self.base), waiting.eq(self._delay)]
        with m.Else():
            with m.If(self.stop):
                m.d.sync += running.eq(0)
            with m.If(waiting != 0):
                m.d.sync += waiting.eq(waiting - 1)

        ar, r = self.axi.ar, self.axi.r
        # A request once offered stays: `offered` holds it through a stop.
        offered = Signal()
        m.d.comb += [
            ar.valid.eq(offered),
            ar.payload.addr.eq(address),
            ar.payload.len.eq(beats - 1),
            ar.payload.size.eq(beat_bytes.bit_length() - 1),
            ar.payload.burst.eq(1),
        ]
        requested = ar.valid & ar.ready
        can_request = running & ~self.stop & (waiting == 0) & (free > Mux(offered, 1, 0) + reserve)
        with m.If(requested):
            m.d.sync += [address.eq(address + INSTRUCTION_BYTES), offered.eq(can_request)]
        with m.Elif(~offered):
            m.d.sync += offered.eq(can_request & ~self.start)

        # Beats to instructions. A bus wider than an instruction carries it in one half.
        m.d.comb += r.ready.eq(1)
        arrived = r.valid & r.payload.last
        error = Signal()
        bad = r.payload.resp != 0
        with m.If(r.valid):
            m.d.sync += error.eq(Mux(r.payload.last, 0, error | bad))
        word: Value
        if beats > 1:
            partial = Signal(INSTRUCTION_BITS - 8 * bus)
            word = Cat(partial, r.payload.data)
            with m.If(r.valid):
                m.d.sync += partial.eq(word[8 * bus :])
        elif bus == INSTRUCTION_BYTES:
            word = r.payload.data
        else:
            half = Signal()
            with m.If(self.start):
                m.d.sync += half.eq(self.base[6])
            with m.Elif(arrived):
                m.d.sync += half.eq(~half)
            word = Mux(half, r.payload.data[INSTRUCTION_BITS:], r.payload.data[:INSTRUCTION_BITS])

        dropping = self.stop | ~running
        m.d.comb += [
            buffer.w_en.eq(arrived & ~dropping),
            buffer.w_data.eq(Cat(word, error | bad)),
            self.instruction.valid.eq(buffer.r_rdy & ~dropping),
            self.instruction.payload.word.eq(buffer.r_data[:INSTRUCTION_BITS]),
            self.instruction.payload.error.eq(buffer.r_data[INSTRUCTION_BITS]),
            buffer.r_en.eq(self.instruction.ready | dropping),
            self.idle.eq(~running & ~offered & (outstanding == 0) & ~buffer.r_rdy),
        ]
        left = buffer.r_rdy & buffer.r_en
        dropped = arrived & dropping
        m.d.sync += [
            free.eq(free - requested + left + dropped),
            outstanding.eq(outstanding + requested - arrived),
        ]
        return m
