"""Clock and reset of a bench."""

from cocotb.clock import Clock
from cocotb.triggers import FallingEdge


async def start(dut) -> None:
    """Starts the clock and resets."""
    Clock(dut.clk, 10, unit="ns").start()
    dut.rst.value = 1
    await FallingEdge(dut.clk)
    await FallingEdge(dut.clk)
    dut.rst.value = 0
