"""What stands beside the chip on a board: the serial line's ends, and the RAM behind AXI."""

import random
from collections.abc import Callable

import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.sim import Simulator
from systolith_hdl.axi import axi4_pins
from systolith_hdl.board import AxiRam, UartReceiver, UartTransmitter
from systolith_hdl.board.top import to_pins
from systolith_hdl.config import get_config
from systolith_tb.runner import run_bench, seed_of_run


def received(receiver: UartReceiver, line: Callable[[int], int], cycles: int) -> list[int | None]:
    """The bytes that a receiver gets of a line, None for one with an error."""
    got: list[int | None] = []

    async def bench(context) -> None:
        context.set(receiver.rx, 1)
        await context.tick().repeat(4)
        for cycle in range(cycles):
            context.set(receiver.rx, line(cycle))
            await context.tick()
            if context.get(receiver.byte.valid):
                payload = context.get(receiver.byte.payload)
                got.append(None if payload.error else payload.data)

    simulate(receiver, bench)
    return got


def simulate(component: wiring.Component, bench: Callable) -> None:
    simulator = Simulator(component)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def frame(byte: int) -> list[int]:
    return [0, *(byte >> bit & 1 for bit in range(8)), 1]


@pytest.mark.parametrize("divisor", [4, 8, 25])
@pytest.mark.parametrize("speed", [0.97, 1.0, 1.03])
def test_receiver(divisor: int, speed: float) -> None:
    """Bytes close behind each other, from senders that are too slow or too fast."""
    if divisor < 8 and speed != 1.0:
        divisor, speed = 9, 1 + 1.02 * (speed - 1)
    random.seed(seed_of_run())
    data = [0x00, 0xFF, 0x55, 0xAA, *(random.getrandbits(8) for _ in range(20))]
    bits = [bit for byte in data for bit in frame(byte)] + [1] * 20
    period = divisor * speed
    cycles = int(period * (len(bits) - 1))
    assert received(UartReceiver(divisor=divisor), lambda c: bits[int(c / period)], cycles) == data


def test_receiver_errors() -> None:
    """A byte without a stop bit is marked; glitches and a line that stays low give nothing more."""
    bits = [*frame(0x41)[:9], 0, 0, 0, 1, 1, *frame(0x42), *[0] * 40, 1, 1, *frame(0x43), 1, 1]
    line = [bit for bit in bits for _ in range(8)]
    line[13 * 8 + 2 : 13 * 8 + 4] = [0, 0]  # too short for a start bit
    got = received(UartReceiver(divisor=8), lambda c: line[c], len(line))
    assert got == [None, 0x42, None, 0x43]


@pytest.mark.parametrize("divisor", [4, 8, 25])
def test_transmitter(divisor: int) -> None:
    """The line shows each bit for `divisor` cycles, without gaps as long as there are bytes."""
    random.seed(seed_of_run())
    data = [0x00, 0xFF, 0x55, *(random.getrandbits(8) for _ in range(5))]
    transmitter = UartTransmitter(divisor=divisor)
    line: list[int] = []
    left = list(data)

    async def bench(context) -> None:
        for _ in range(10 * divisor * len(data) + 3 * divisor):
            context.set(transmitter.byte.valid, bool(left))
            context.set(transmitter.byte.payload, left[0] if left else 0)
            if left and context.get(transmitter.byte.ready):
                left.pop(0)
            await context.tick()
            line.append(context.get(transmitter.tx))

    simulate(transmitter, bench)
    bits = [bit for byte in data for bit in frame(byte)]
    assert line[: 10 * divisor * len(data)] == [bit for bit in bits for _ in range(divisor)]
    assert set(line[10 * divisor * len(data) :]) == {1}


# What is refused is never used.
@pytest.mark.filterwarnings("ignore::amaranth.hdl.UnusedElaboratable")
def test_bad_parameters() -> None:
    for part in (UartReceiver, UartTransmitter):
        with pytest.raises(ValueError, match="at least 4 clocks per bit, not 3"):
            part(divisor=3)
    with pytest.raises(ValueError, match="multiple of 4096 bytes, not 6000"):
        AxiRam(get_config("nano"), size=6000, id_width=2)


class RamBench(wiring.Component):
    """The RAM with the pins of AXI4."""

    def __init__(self, config_name: str, size: int) -> None:
        self._ram = AxiRam(get_config(config_name), size=size, id_width=3)
        pins = axi4_pins(get_config(config_name), id_width=3)
        ram = self._ram.signature.members
        super().__init__(
            {
                **{f"s_axi_{name}": member.flip() for name, member in pins.members.items()},
                "host": ram["host"],
                "read": ram["read"],
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.ram = self._ram
        wiring.connect(m, wiring.flipped(self.host), self._ram.host)
        wiring.connect(m, self._ram.read, wiring.flipped(self.read))
        to_pins(m, self, "s_axi_", self._ram.axi, manager=True)
        return m


@pytest.mark.parametrize(("name", "size"), [("nano", 4096), ("medium", 8192)])
def test_axi_ram(name: str, size: int) -> None:
    ran = run_bench(
        RamBench(name, size),
        f"axi_ram_{name}",
        "systolith_tb.bench_ram",
        env={
            "SYSTOLITH_BENCH_SIZE": str(size),
            "SYSTOLITH_BENCH_BEAT": str(get_config(name).axi_bytes),
        },
    )
    assert ran == 4
