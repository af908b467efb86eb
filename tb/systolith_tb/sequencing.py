"""A design for the bench of the sequencers: all of a core's, with their semaphores, no engines."""

from amaranth.hdl import Module, Value, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from systolith_hdl.axi import AxiReadArbiter, axi4_pins, axi_id_width
from systolith_hdl.config import CoreConfig
from systolith_hdl.isa import INSTRUCTION_BITS, engine_kind
from systolith_hdl.semaphores import CountPort, SemaphoreFile
from systolith_hdl.sequencer.sequencer import Sequencer


class Sequencing(wiring.Component):
    """Sequencers of a core, their fetch merged onto AXI read pins; engines are the bench's.

    Members are those of `Sequencer`, flattened, one element for each engine; `semaphore` is the
    bench's own.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._kinds = [engine_kind(name) for name in config.engines]
        count = len(self._kinds)
        pins = axi4_pins(config, id_width=axi_id_width(config)).members
        super().__init__(
            {
                "start": In(1),
                "halt": In(1),
                "base": In(48).array(count),
                "instruction": Out(stream.Signature(unsigned(INSTRUCTION_BITS))).array(count),
                "counter": Out(32).array(count),
                "finished": In(1).array(count),
                "done_load": In(1).array(count),
                "fault": Out(1).array(count),
                "cause": Out(8).array(count),
                "pc": Out(32).array(count),
                "address": Out(64).array(count),
                "completed": Out(3).array(count),
                "ended": Out(1).array(count),
                "idle": Out(1).array(count),
                "semaphore": In(CountPort()),
                **{f"m_axi_{n}": member for n, member in pins.items() if n[:2] in ("ar", "ri", "rd",
                   "rr", "rl", "rv")},
            }
        )  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        count = len(self._kinds)
        m.submodules.semaphores = semaphores = SemaphoreFile(config, updates=3 * count, waits=count)
        m.submodules.arbiter = arbiter = AxiReadArbiter(
            config, requesters=count, id_width=axi_id_width(config)
        )
        ar, r = arbiter.bus.ar, arbiter.bus.r
        for field, _ in ar.payload.shape():
            m.d.comb += getattr(self, f"m_axi_ar{field}").eq(ar.payload[field])
        for field, _ in r.payload.shape():
            m.d.comb += r.payload[field].eq(getattr(self, f"m_axi_r{field}"))
        m.d.comb += [
            self.m_axi_arvalid.eq(ar.valid),
            ar.ready.eq(self.m_axi_arready),
            r.valid.eq(self.m_axi_rvalid),
            self.m_axi_rready.eq(r.ready),
            semaphores.clear.eq(self.start),
        ]
        for index, kind in enumerate(self._kinds):
            m.submodules[f"sequencer{index}"] = sequencer = Sequencer(config, kind)
            wiring.connect(m, sequencer.axi, arbiter.requester[index])
            for update in range(3):
                wiring.connect(m, sequencer.update[update], semaphores.update[3 * index + update])
            wiring.connect(m, sequencer.issue.instruction, wiring.flipped(self.instruction[index]))
            fault = sequencer.fault
            m.d.comb += [
                sequencer.start.eq(self.start),
                sequencer.halt.eq(self.halt),
                sequencer.base.eq(self.base[index]),
                self.counter[index].eq(sequencer.issue.counter),
                sequencer.issue.done.eq(self.finished[index]),
                sequencer.done_load.eq(self.done_load[index]),
                sequencer.overflow.eq(semaphores.overflow),
                self.fault[index].eq(fault.valid),
                self.cause[index].eq(Value.cast(fault.fault.cause)),
                self.pc[index].eq(fault.pc),
                self.address[index].eq(fault.fault.address),
                self.completed[index].eq(sequencer.completed),
                self.ended[index].eq(sequencer.ended),
                self.idle[index].eq(sequencer.idle),
            ]
            wiring.connect(m, sequencer.wait, semaphores.wait[index])
        wiring.connect(m, wiring.flipped(self.semaphore), semaphores.read)
        return m
