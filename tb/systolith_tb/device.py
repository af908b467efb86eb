"""The `cocotb` device: the driver on the chip inside a simulation, AXI by cocotbext-axi."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from cocotb.clock import Clock
from cocotb.task import bridge, resume
from cocotb.triggers import ClockCycles, First, RisingEdge
from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiSlave
from systolith.runtime.backend import SharedDram
from systolith_hdl.config import CoreConfig


class Dram:
    """Device DRAM as cocotbext-axi sees it; an access outside is answered with an error."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    async def read(self, address: int, length: int) -> bytes:
        if address + length > len(self.words):
            raise IndexError(address)
        return self.words[address : address + length].tobytes()

    async def write(self, address: int, data: bytes) -> None:
        if address + len(data) > len(self.words):
            raise IndexError(address)
        self.words[address : address + len(data)] = np.frombuffer(data, np.uint8)


class CocotbBackend(SharedDram):
    """The chip under cocotb behind the device interface (`systolith.runtime.backend.Backend`).

    Parameters
    ----------
    dut : a `systolith_hdl.core.Chip`
    pause : probability that an AXI channel pauses in a cycle

    Its methods block, so the driver runs in a thread: ``await run_driver(function, backend)``.
    """

    def __init__(
        self, dut: Any, config: CoreConfig, *, dram_bytes: int = 1 << 20, pause: float = 0.0
    ) -> None:
        self.config = config
        self.dram = np.zeros(dram_bytes, np.uint8)
        self._dut = dut
        Clock(dut.clk, 10, unit="ns").start()
        self._host = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        memory = AxiSlave(
            AxiBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, target=Dram(self.dram)
        )
        for half in (memory.write_if, memory.read_if, self._host.write_if, self._host.read_if):
            half.log.setLevel("WARNING")
        if pause:
            write, read = memory.write_if, memory.read_if
            for channel in (
                write.aw_channel, write.w_channel, write.b_channel, read.ar_channel, read.r_channel,
                self._host.write_if.aw_channel, self._host.write_if.w_channel,
                self._host.read_if.r_channel,
            ):  # fmt: skip
                channel.set_pause_generator(self._pauses(pause))

    @staticmethod
    def _pauses(probability: float) -> Any:
        while True:
            yield int(random.random() < probability)

    async def start(self) -> None:
        """Resets the chip."""
        self._dut.rst.value = 1
        await ClockCycles(self._dut.clk, 3)
        self._dut.rst.value = 0
        await ClockCycles(self._dut.clk, 2)

    @resume
    async def read_register(self, address: int) -> int:
        return int(await self._host.read_dword(address))

    @resume
    async def write_register(self, address: int, value: int) -> None:
        await self._host.write_dword(address, value)

    @resume
    async def run(self, max_cycles: int | None) -> bool:
        if self._dut.irq.value != 1:
            limit = 1_000_000 if max_cycles is None else min(max_cycles, 1_000_000)
            await First(RisingEdge(self._dut.irq), ClockCycles(self._dut.clk, limit))
        return bool(self._dut.irq.value == 1)

    def close(self) -> None:
        """Nothing to release: the simulation ends with the test."""


async def run_driver(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs code that uses the driver in a thread of its own while the simulation goes on."""
    return await bridge(function)(*arguments)
