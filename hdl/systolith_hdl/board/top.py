"""The chip with everything that a board without DRAM of its own needs around it."""

from amaranth.hdl import ClockDomain, ClockSignal, Module, ResetSignal, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..axi import axi_id_width
from ..config import CoreConfig
from ..core import Chip
from .bridge import Bridge
from .ram import AxiRam
from .uart import UartReceiver, UartTransmitter

DRAM_BYTES = 1 << 16
#: Of everything on the board: what the pin of its clock is divided down to, by a power of two.
CLOCK_HZ = 12_500_000
BAUD = 500_000
#: Cycles that the reset lasts after the FPGA has been configured.
_RESET_CYCLES = 16


class Board(wiring.Component):
    """A chip, its DRAM in block RAM, and the bridge from a serial line to both.

    Parameters
    ----------
    dram_bytes : a multiple of 4096
    clock_hz, baud : of the clock and of the line; at least 4 clocks per bit
    silence : cycles without a byte after which the line is silent, see `Bridge`; a tenth of a
        second by default

    Members
    -------
    rx, tx : In(1), Out(1), the serial line
    irq : Out(1), interrupt of the chip
    """

    def __init__(
        self,
        config: CoreConfig,
        *,
        dram_bytes: int = DRAM_BYTES,
        clock_hz: int = CLOCK_HZ,
        baud: int = BAUD,
        silence: int | None = None,
    ) -> None:
        self._config = config
        self._dram_bytes = dram_bytes
        self._clock_hz = clock_hz
        self._divisor = round(clock_hz / baud)
        self._silence = clock_hz // 10 if silence is None else silence
        if self._silence < 10 * self._divisor:
            raise ValueError(f"silence must be at least that of a byte, not {silence!r} cycles")
        super().__init__({"rx": In(1), "tx": Out(1), "irq": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.chip = chip = Chip(self._config)
        m.submodules.ram = ram = AxiRam(
            self._config, size=self._dram_bytes, id_width=axi_id_width(self._config)
        )
        m.submodules.bridge = bridge = Bridge(
            dram_bytes=self._dram_bytes, clock_hz=self._clock_hz, silence=self._silence
        )
        m.submodules.receiver = receiver = UartReceiver(divisor=self._divisor)
        m.submodules.transmitter = transmitter = UartTransmitter(divisor=self._divisor)
        m.d.comb += [
            receiver.rx.eq(self.rx),
            self.tx.eq(transmitter.tx),
            self.irq.eq(chip.irq),
        ]
        wiring.connect(m, receiver.byte, bridge.received)
        wiring.connect(m, bridge.sent, transmitter.byte)
        wiring.connect(m, bridge.memory, ram.host)
        wiring.connect(m, ram.read, bridge.read)
        to_pins(m, chip, "m_axi_", ram.axi, manager=True)
        to_pins(m, chip, "s_axil_", bridge.axil, manager=False)
        return m


class PoweredBoard(wiring.Component):
    """`Board` with the clock pin of the board, and a reset when it is switched on.

    Parameters
    ----------
    divider : of the pin's clock, by which it is CLOCK_HZ: a power of two

    Members
    -------
    clk, rx, tx, irq : pins
    """

    clk: In(1)
    rx: In(1)
    tx: Out(1)
    irq: Out(1)

    def __init__(self, config: CoreConfig, *, divider: int) -> None:
        if divider < 1 or divider & (divider - 1):
            raise ValueError(f"divider must be a power of two, not {divider!r}")
        self._config = config
        self._divider = divider
        super().__init__()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.domains.sync = ClockDomain("sync")
        m.domains.start = ClockDomain("start", reset_less=True)
        m.submodules.board = board = Board(self._config)
        clock: Value = self.clk
        if self._divider > 1:
            m.domains.pin = ClockDomain("pin", reset_less=True)
            divided = Signal(range(self._divider))
            m.d.comb += ClockSignal("pin").eq(self.clk)
            m.d.pin += divided.eq(divided + 1)
            clock = divided[-1]
        left = Signal(range(_RESET_CYCLES), init=_RESET_CYCLES - 1)
        with m.If(left != 0):
            m.d.start += left.eq(left - 1)
        m.d.comb += [
            ClockSignal("sync").eq(clock),
            ClockSignal("start").eq(clock),
            ResetSignal("sync").eq(left != 0),
            board.rx.eq(self.rx),
            self.tx.eq(board.tx),
            self.irq.eq(board.irq),
        ]
        return m


def to_pins(m: Module, chip, prefix: str, bus, *, manager: bool) -> None:
    """Connects the channels of `bus` to the chip's pins of that prefix, of which the chip is the
    manager or not."""
    for name in ("aw", "w", "b", "ar", "r"):
        channel = getattr(bus, name)

        def pin(field: str, name: str = name) -> object:
            return getattr(chip, prefix + name + field)

        from_chip = (name in ("aw", "w", "ar")) == manager
        pairs = [(channel.payload[field], pin(field)) for field, _ in channel.payload.shape()]
        pairs.append((channel.valid, pin("valid")))
        back = (pin("ready"), channel.ready)
        for inside, outside in (*pairs, back):
            m.d.comb += inside.eq(outside) if from_chip else outside.eq(inside)
