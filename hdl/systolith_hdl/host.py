"""The host port: AXI4-Lite registers, made from `regs.REGISTERS`."""

from amaranth.hdl import Cat, Module, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from . import regs
from .config import CoreConfig
from .isa import ISA_VERSION
from .ports import axi4_lite
from .semaphores import CountPort

_OKAY, _SLVERR = 0, 2


class FaultRecord(data.Struct):
    """The first fault since START."""

    valid: unsigned(1)
    engine: unsigned(8)
    cause: unsigned(8)
    pc: unsigned(32)
    address: unsigned(64)


class HostPort(wiring.Component):
    """Registers of the chip, as `regs` documents them.

    Members
    -------
    axil : In(axi4_lite); an access takes 2 cycles; an address without a register, or a write to
        one that is read-only, is answered SLVERR
    start, reset : Out(1), high for a cycle when CONTROL is written so
    interrupt : Out(1)
    event : In(1), high for a cycle when a program ended or faulted
    watchdog, seed : Out(32);  stream_base : Out(64) x engines
    running, done, resetting, fault, cycles, macs, busy, conflicts, instructions : In, read-only
        values
    semaphore : Out(CountPort), that which is being read
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        engines = len(config.engines)
        super().__init__(
            {
                "axil": In(axi4_lite(address_bits=regs.ADDRESS_BITS)),
                "start": Out(1),
                "reset": Out(1),
                "interrupt": Out(1),
                "event": In(1),
                "watchdog": Out(32),
                "seed": Out(32),
                "stream_base": Out(64).array(engines),
                "running": In(1),
                "done": In(1),
                "resetting": In(1),
                "fault": In(FaultRecord),
                "cycles": In(64),
                "macs": In(64),
                "busy": In(64).array(engines),
                "conflicts": In(32).array(len(regs.MEMORIES)),
                "instructions": In(32).array(engines),
                "semaphore": Out(CountPort()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        engines = range(len(config.engines))
        interrupt_status = Signal()
        interrupt_enable = Signal(init=regs.REGISTERS["IRQ_ENABLE"].reset)
        watchdog = Signal(32, init=regs.REGISTERS["WATCHDOG"].reset)
        seed = Signal(32, init=regs.REGISTERS["SEED"].reset)
        m.d.comb += [
            self.watchdog.eq(watchdog),
            self.seed.eq(seed),
            self.interrupt.eq(interrupt_status & interrupt_enable),
        ]

        def packed(register: str, **values: object) -> Signal:
            word = Signal(32, name=register.lower())
            for name, value in values.items():
                place = regs.field(register, name)
                m.d.comb += word[place.offset : place.offset + place.width].eq(value)
            return word

        #: what each register reads as: one value, or one for each element
        readable = {
            "ID": regs.MAGIC,
            "ISA_VERSION": ISA_VERSION,
            "CONFIG_HASH": config.hash,
            "STATUS": packed(
                "STATUS",
                RUNNING=self.running,
                DONE=self.done,
                FAULT=self.fault.valid,
                RESETTING=self.resetting,
            ),
            "IRQ_ENABLE": interrupt_enable,
            "IRQ_STATUS": interrupt_status,
            "FAULT_INFO": packed("FAULT_INFO", CAUSE=self.fault.cause, ENGINE=self.fault.engine),
            "FAULT_PC": self.fault.pc,
            "FAULT_ADDRESS": self.fault.address,
            "WATCHDOG": watchdog,
            "SEED": seed,
            "CYCLES": self.cycles,
            "MACS": self.macs,
            "STREAM_BASE": [self.stream_base[e] for e in engines],
            "BUSY": [self.busy[e] for e in engines],
            "CONFLICTS": list(self.conflicts),
            "INSTRUCTIONS": [self.instructions[e] for e in engines],
            "SEMAPHORE": [self.semaphore.count] * config.semaphores,
            "CONTROL": 0,
        }
        assert readable.keys() == regs.REGISTERS.keys()

        # -- Reads.
        ar, r = self.axil.ar, self.axil.r
        m.d.comb += [
            ar.ready.eq(~r.valid | r.ready),
            self.semaphore.sem.eq((ar.payload.addr - regs.address("SEMAPHORE")) >> 2),
        ]
        with m.If(r.ready):
            m.d.sync += r.valid.eq(0)
        with m.If(ar.valid & ar.ready):
            m.d.sync += [r.valid.eq(1), r.payload.data.eq(0), r.payload.resp.eq(_SLVERR)]
            with m.Switch(ar.payload.addr[2:]):
                for name, register in regs.REGISTERS.items():
                    values = readable[name]
                    elements = values if isinstance(values, list) else [values]
                    assert len(elements) == register.count(config)
                    for index, element in enumerate(elements):
                        for word in range(register.words):
                            with m.Case(regs.address(name, index, word) >> 2):
                                part = element if isinstance(element, int) else element >> 32 * word
                                m.d.sync += [
                                    r.payload.data.eq(part),
                                    r.payload.resp.eq(_OKAY),
                                ]

        # -- Writes: address and data are taken together.
        aw, w, b = self.axil.aw, self.axil.w, self.axil.b
        write = Signal()
        m.d.comb += [
            write.eq(aw.valid & w.valid & (~b.valid | b.ready)),
            aw.ready.eq(write),
            w.ready.eq(write),
        ]
        with m.If(b.ready):
            m.d.sync += b.valid.eq(0)
        enables = Cat(bit.replicate(8) for bit in w.payload.strb)

        def merged(old: Value) -> Value:
            return (old & ~enables) | (w.payload.data & enables)

        with m.If(write):
            m.d.sync += [b.valid.eq(1), b.payload.resp.eq(_SLVERR)]
            with m.Switch(aw.payload.addr[2:]):
                for name, register in regs.REGISTERS.items():
                    if register.access == "ro":
                        continue
                    for index in range(register.count(config)):
                        for word in range(register.words):
                            with m.Case(regs.address(name, index, word) >> 2):
                                m.d.sync += b.payload.resp.eq(_OKAY)
                                if name == "CONTROL":
                                    asked = w.payload.data & enables
                                    m.d.comb += [
                                        self.start.eq(asked[regs.field(name, "START").offset]),
                                        self.reset.eq(asked[regs.field(name, "RESET").offset]),
                                    ]
                                elif name == "IRQ_STATUS":
                                    with m.If((w.payload.data & enables)[0]):
                                        m.d.sync += interrupt_status.eq(0)
                                elif name == "IRQ_ENABLE":
                                    m.d.sync += interrupt_enable.eq(merged(interrupt_enable)[0])
                                elif name == "WATCHDOG":
                                    m.d.sync += watchdog.eq(merged(watchdog))
                                elif name == "SEED":
                                    m.d.sync += seed.eq(merged(seed))
                                elif name == "STREAM_BASE":
                                    half = self.stream_base[index][32 * word : 32 * word + 32]
                                    m.d.sync += half.eq(merged(half))
                                else:
                                    raise AssertionError(f"no hardware for register {name}")
        with m.If(self.reset):
            m.d.sync += interrupt_status.eq(0)
        with m.Elif(self.event):
            m.d.sync += interrupt_status.eq(1)
        return m
