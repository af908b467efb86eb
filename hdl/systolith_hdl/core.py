"""The core and the chip: blocks placed and wired, nothing else."""

from amaranth.hdl import Cat, Module, ResetSignal, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .arith import engine_key
from .axi import AxiReadArbiter, AxiWriteArbiter, axi4_pins, axi_id_width, connect_pins
from .banked import BankedMemory
from .config import CoreConfig
from .dma.queue import DmaQueue
from .emit import Once, to_design, verilog_of
from .host import FaultRecord, HostPort
from .isa import FaultCause, engine_kind
from .ports import axi4_lite, axi4_read, axi4_write
from .psum import Psum
from .regs import MEMORIES
from .scalar.engine import ScalarEngine
from .semaphores import CountPort, SemaphoreFile
from .sequencer.sequencer import Sequencer
from .tensor.engine import TensorEngine
from .toolchain import cached, content_hash, sources_hash
from .vector.engine import VectorEngine

#: Cycles for which an engine without an instruction keeps its clock. What it had begun is finished
#: by then or goes on with the next instruction; without them that one could be later than it is on
#: an engine whose clock never stops, as what is prepared ahead of it would not be.
_SETTLE = 31


def gated_blocks(config: CoreConfig) -> dict[str, int]:
    """Blocks that need their clock only while a bit of `Core.awake` is high, by their path in the
    core, and which bit that is."""
    sequencers = [f"{name}_sequencer" for name in config.engines]
    places = [*sequencers, *config.engines, "read_arbiter", "write_arbiter"]
    bits = {block: bit for bit, block in enumerate(places)}
    # What answers an engine's reads stands still with it.
    for port, (engine, _) in enumerate(_sbuf_readers(config)):
        bits[f"sbuf.response{port}"] = bits[engine]
    for port, (engine, _) in enumerate(_PSUM_READERS, 1):  # 0 is the accumulator's
        bits[f"psum.memory.response{port}"] = bits[engine]
    return bits


#: What reads PSUM, in the order of its ports: engine, and the engine's port.
_PSUM_READERS = (
    ("vector", "src0_psum"),
    ("vector", "src1_psum"),
    ("scalar", "src0_psum"),
    ("scalar", "src1_psum"),
)


def _sbuf_readers(config: CoreConfig) -> list[tuple[str, str]]:
    """What reads SBUF, likewise."""
    readers = [
        ("tensor", "stationary"),
        ("tensor", "moving"),
        ("vector", "src0_sbuf"),
        ("vector", "src1_sbuf"),
        ("scalar", "src0_sbuf"),
        ("scalar", "src1_sbuf"),
        *((f"dma{index}", "read") for index in range(config.dma_queues)),
    ]
    if config.fp8_rate == 2:
        readers += [("tensor", "stationary_second"), ("tensor", "moving_second")]
    return readers


class Core(wiring.Component):
    """Everything but the host port.

    Members
    -------
    start : In(1), starts all engines at `stream_base`, zeroes semaphores and counters; only while
        not `running`
    halt : In(1), stops issue and new DMA bursts, so that AXI drains
    stream_base : In(48) x engines
    watchdog, seed : In(32), as the registers
    axi_read, axi_write : Out, the AXI4 channels
    quiet : Out(1), no AXI transaction is offered or outstanding
    running, done, fault, cycles, macs, busy, conflicts, instructions : Out, as the registers
    semaphore : In(CountPort), the host's
    event : Out(1), high for a cycle when the program ends or faults
    awake : Out, the sequencers, the engines, and the arbiters of AXI: while a bit is low, a clock
        gate may stop the blocks that are its in `gated_blocks`, and nothing that can be seen
        changes
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        engines = len(config.engines)
        width = axi_id_width(config)
        super().__init__(
            {
                "start": In(1),
                "halt": In(1),
                "stream_base": In(48).array(engines),
                "watchdog": In(32),
                "seed": In(32),
                "axi_read": Out(axi4_read(config, id_width=width)),
                "axi_write": Out(axi4_write(config, id_width=width)),
                "quiet": Out(1),
                "running": Out(1),
                "done": Out(1),
                "event": Out(1),
                "fault": Out(FaultRecord),
                "cycles": Out(64),
                "macs": Out(64),
                "busy": Out(64).array(engines),
                "conflicts": Out(32).array(len(MEMORIES)),
                "instructions": Out(32).array(engines),
                "semaphore": In(CountPort()),
                "awake": Out(2 * engines + 2),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        kinds = [engine_kind(name) for name in config.engines]
        count = len(kinds)

        # -- Blocks.
        sequencers = []
        for name, kind in zip(config.engines, kinds, strict=True):
            m.submodules[f"{name}_sequencer"] = sequencer = Sequencer(config, kind)
            sequencers.append(sequencer)
        m.submodules.tensor = tensor = TensorEngine(config)
        vector_number, scalar_number = (config.engines.index(n) for n in ("vector", "scalar"))
        m.submodules.vector = vector = VectorEngine(config, number=vector_number)
        m.submodules.scalar = scalar = ScalarEngine(config, number=scalar_number)
        queues = []
        for index in range(config.dma_queues):
            m.submodules[f"dma{index}"] = queue = Once(DmaQueue(config), "dma_queue")
            m.d.comb += queue.key.eq(engine_key(config.engines.index(f"dma{index}")))
            queues.append(queue)
        m.submodules.semaphores = semaphores = SemaphoreFile(config, updates=3 * count, waits=count)
        engines = dict(zip(config.engines, (tensor, vector, scalar, *queues), strict=True))
        sbuf_reads = [getattr(engines[name], port) for name, port in _sbuf_readers(config)]
        psum_reads = [getattr(engines[name], port) for name, port in _PSUM_READERS]
        m.submodules.sbuf = sbuf = BankedMemory(
            config,
            depth=config.sbuf_depth,
            reads=len(sbuf_reads),
            writes=2 + len(queues),
        )
        m.submodules.psum = psum = Psum(config, reads=len(psum_reads), writes=2)
        m.submodules.read_arbiter = read_arbiter = AxiReadArbiter(
            config, requesters=count + len(queues), id_width=axi_id_width(config)
        )
        m.submodules.write_arbiter = write_arbiter = AxiWriteArbiter(
            config, requesters=len(queues), id_width=axi_id_width(config)
        )

        # -- Sequencers to engines.
        for sequencer, engine in zip(sequencers, engines.values(), strict=True):
            wiring.connect(m, sequencer.issue, engine.issue)
        m.d.comb += sequencers[0].done_load.eq(tensor.done_load)

        # -- Memories.
        sbuf_writes = [vector.dst_sbuf, scalar.dst_sbuf, *(queue.write for queue in queues)]
        psum_writes = [vector.dst_psum, scalar.dst_psum]
        for requesters, ports in (
            (sbuf_reads, sbuf.read),
            (sbuf_writes, sbuf.write),
            (psum_reads, psum.read),
            (psum_writes, psum.write),
        ):
            for requester, port in zip(requesters, ports, strict=True):
                wiring.connect(m, requester, port)
        wiring.connect(m, tensor.psum, psum.accumulate)

        # -- AXI.
        readers = [*(s.axi for s in sequencers), *(q.axi_read for q in queues)]
        for reader, port in zip(readers, read_arbiter.requester, strict=True):
            wiring.connect(m, reader, port)
        for queue, port in zip(queues, write_arbiter.requester, strict=True):
            wiring.connect(m, queue.axi_write, port)
        wiring.connect(m, read_arbiter.bus, wiring.flipped(self.axi_read))
        wiring.connect(m, write_arbiter.bus, wiring.flipped(self.axi_write))

        # -- Semaphores.
        m.d.comb += semaphores.clear.eq(self.start)
        for index, sequencer in enumerate(sequencers):
            for slot in range(3):
                wiring.connect(m, sequencer.update[slot], semaphores.update[3 * index + slot])
            wiring.connect(m, sequencer.wait, semaphores.wait[index])
            m.d.comb += sequencer.overflow.eq(semaphores.overflow)
        wiring.connect(m, wiring.flipped(self.semaphore), semaphores.read)

        # -- Faults: the first is recorded and stops issue everywhere.
        halt = Signal()
        watchdog_fired = Signal()
        m.d.comb += halt.eq(self.halt | self.fault.valid)
        reports = []  # (valid, engine, cause, pc, address), the most specific first
        for index, sequencer in enumerate(sequencers):
            fault = sequencer.fault
            reports.append((fault.valid, index, fault.fault.cause, fault.pc, fault.fault.address))
        for index, queue in enumerate(queues):
            place = count - len(queues) + index
            pc = sequencers[place].pc
            # Everything before the instruction that failed is done: once that has been signalled,
            # the oldest is the one.
            valid = queue.fault.valid & sequencers[place].settled
            reports.append((valid, place, queue.fault.cause, pc, queue.fault.address))
        ended = Signal(count)
        m.d.comb += ended.eq(Cat(s.ended for s in sequencers))
        for index in range(count):
            stuck = watchdog_fired & ~ended[index]
            reports.append((stuck, index, FaultCause.WATCHDOG, sequencers[index].pc, 0))
        record = Signal(FaultRecord)
        for valid, engine, cause, pc, address in reversed(reports):
            with m.If(valid):
                wide = Signal(signed(64), name="fault_address")
                m.d.comb += [
                    wide.eq(address),
                    record.valid.eq(1),
                    record.engine.eq(engine),
                    record.cause.eq(cause),
                    record.pc.eq(pc),
                    record.address.eq(wide),
                ]

        # -- State of the program.
        started = Signal()
        finish = Signal()
        m.d.comb += [
            finish.eq(started & ended.all() & Cat(s.idle for s in sequencers).all()),
            self.running.eq(started),
            self.event.eq(started & (finish | record.valid)),
        ]
        with m.If(self.start):
            m.d.sync += [started.eq(1), self.done.eq(0), self.fault.eq(0)]
        with m.Elif(started & record.valid):
            m.d.sync += [started.eq(0), self.fault.eq(record)]
        with m.Elif(finish):
            m.d.sync += [started.eq(0), self.done.eq(1)]

        for index, sequencer in enumerate(sequencers):
            m.d.comb += [
                sequencer.start.eq(self.start),
                sequencer.halt.eq(halt),
                sequencer.base.eq(self.stream_base[index]),
                sequencer.seed.eq(self.seed),
            ]
        for queue in queues:
            m.d.comb += queue.stop.eq(self.halt)

        # -- Watchdog.
        completed = Cat(s.completed for s in sequencers)
        moved = Cat(
            self.axi_read.r.valid & self.axi_read.r.ready,
            self.axi_write.w.valid & self.axi_write.w.ready,
            *(
                port.request.valid & port.request.ready
                for port in (*sbuf.read, *sbuf.write, *psum.read, *psum.write)
            ),
        )
        progress = Signal()
        m.d.sync += progress.eq(completed.any() | moved.any())
        still = Signal(32)
        with m.If(~started | progress):
            m.d.sync += still.eq(0)
        with m.Else():
            m.d.sync += still.eq(still + 1)
        m.d.comb += watchdog_fired.eq(started & (self.watchdog != 0) & (still >= self.watchdog))

        # -- Counters.
        with m.If(self.start):
            m.d.sync += [self.cycles.eq(0), self.macs.eq(0)]
            m.d.sync += [
                counter.eq(0) for counter in (*self.busy, *self.conflicts, *self.instructions)
            ]
        with m.Elif(started):
            m.d.sync += [self.cycles.eq(self.cycles + 1), self.macs.eq(self.macs + tensor.macs)]
            m.d.sync += [
                counter.eq(counter + memory.stalled)
                for counter, memory in zip(self.conflicts, (sbuf, psum), strict=True)
            ]
            for index, sequencer in enumerate(sequencers):
                done = sum(sequencer.completed[bit] for bit in range(3))
                m.d.sync += [
                    self.busy[index].eq(self.busy[index] + sequencer.issue.busy),
                    self.instructions[index].eq(self.instructions[index] + done),
                ]

        # -- Blocks whose clock is needed.
        engines_work = []
        for index, sequencer in enumerate(sequencers):
            works = sequencer.issue.instruction.valid | sequencer.issue.busy
            idle = Signal(range(_SETTLE + 1), name=f"idle{index}")
            with m.If(works):
                m.d.sync += idle.eq(0)
            with m.Elif(idle != _SETTLE):
                m.d.sync += idle.eq(idle + 1)
            engines_work.append(works | (idle != _SETTLE))
        m.d.comb += self.awake.eq(
            Cat(
                *(sequencer.awake for sequencer in sequencers),
                *engines_work,
                read_arbiter.outstanding | Cat(reader.ar.valid for reader in readers).any(),
                write_arbiter.outstanding | Cat(q.axi_write.aw.valid for q in queues).any(),
            )
        )

        m.d.comb += self.quiet.eq(
            ~read_arbiter.outstanding
            & ~write_arbiter.outstanding
            & ~self.axi_read.ar.valid
            & ~self.axi_write.aw.valid
            & ~self.axi_write.w.valid
            & ~Cat(reader.ar.valid for reader in readers).any()
            & ~Cat(queue.active | queue.axi_write.aw.valid for queue in queues).any()
        )
        return m


def axi4_lite_pins() -> wiring.Signature:
    """Pins of an AXI4-Lite subordinate under their names in the standard."""
    members = {}
    for name, payload in axi4_lite(address_bits=12).members.items():
        flow = In if payload.flow is Out else Out  # the signature is the manager's
        back = Out if flow is In else In
        for field, member in payload.signature.members["payload"].shape:
            members[f"{name}{field}"] = flow(member.shape)
        members[f"{name}valid"] = flow(1)
        members[f"{name}ready"] = back(1)
    return wiring.Signature(members)


class Chip(wiring.Component):
    """The chip: a core and its host port, with the pins of AXI4 and AXI4-Lite.

    Members
    -------
    m_axi_* : AXI4 manager to device DRAM
    s_axil_* : AXI4-Lite subordinate for the host
    irq : Out(1), high after a program ended or faulted, until IRQ_STATUS is cleared
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._pins = axi4_pins(config, id_width=axi_id_width(config))
        self._host_pins = axi4_lite_pins()
        members = {f"m_axi_{name}": member for name, member in self._pins.members.items()}
        members |= {f"s_axil_{name}": member for name, member in self._host_pins.members.items()}
        super().__init__({**members, "irq": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        core_reset = Signal()
        m.submodules.core = core = Once(Core(config), "core", reset=core_reset)
        m.submodules.host = host = HostPort(config)

        connect_pins(m, _Prefixed(self, "m_axi_"), read=core.axi_read, write=core.axi_write)
        host_pins = _Prefixed(self, "s_axil_")
        for name in ("aw", "w", "ar"):
            channel = getattr(host.axil, name)
            for field, _ in channel.payload.shape():
                m.d.comb += channel.payload[field].eq(getattr(host_pins, name + field))
            m.d.comb += [
                channel.valid.eq(getattr(host_pins, f"{name}valid")),
                getattr(host_pins, f"{name}ready").eq(channel.ready),
            ]
        for name in ("b", "r"):
            channel = getattr(host.axil, name)
            for field, _ in channel.payload.shape():
                m.d.comb += getattr(host_pins, name + field).eq(channel.payload[field])
            m.d.comb += [
                getattr(host_pins, f"{name}valid").eq(channel.valid),
                channel.ready.eq(getattr(host_pins, f"{name}ready")),
            ]

        # RESET waits until AXI has drained, then resets the core for one cycle.
        resetting = Signal()
        fire = Signal()
        m.d.comb += fire.eq(resetting & core.quiet)
        with m.If(host.reset):
            m.d.sync += resetting.eq(1)
        with m.Elif(fire):
            m.d.sync += resetting.eq(0)
        soft_reset = Signal()
        m.d.sync += soft_reset.eq(fire)
        idle = ~core.running & ~core.fault.valid & ~resetting & ~soft_reset
        m.d.comb += [
            core_reset.eq(ResetSignal() | soft_reset),
            core.halt.eq(resetting),
            core.start.eq(host.start & idle),
            core.watchdog.eq(host.watchdog),
            core.seed.eq(host.seed),
            host.running.eq(core.running),
            host.done.eq(core.done),
            host.resetting.eq(resetting | soft_reset),
            host.fault.eq(core.fault),
            host.event.eq(core.event),
            host.cycles.eq(core.cycles),
            host.macs.eq(core.macs),
            self.irq.eq(host.interrupt),
        ]
        for index in range(len(config.engines)):
            m.d.comb += [
                core.stream_base[index].eq(host.stream_base[index]),
                host.busy[index].eq(core.busy[index]),
                host.instructions[index].eq(core.instructions[index]),
            ]
        for memory in range(len(MEMORIES)):
            m.d.comb += host.conflicts[memory].eq(core.conflicts[memory])
        wiring.connect(m, host.semaphore, core.semaphore)
        return m


class _Prefixed:
    """Members of a component whose names begin with a prefix, by the rest of their names."""

    def __init__(self, component: wiring.Component, prefix: str) -> None:
        self._component = component
        self._prefix = prefix

    def __getattr__(self, name: str) -> object:
        return getattr(self._component, self._prefix + name)


def chip_design(config: CoreConfig) -> str:
    """`to_design` of the chip, under the name ``chip``; cached by the sources and the config."""
    return cached(
        f"design-{config.name}-{content_hash(sources_hash(), repr(config))}.il",
        lambda: to_design(Chip(config), "chip"),
    )


def chip_verilog(config: CoreConfig) -> str:
    """Verilog of the chip, module ``chip``; cached likewise."""
    return verilog_of(chip_design(config))
