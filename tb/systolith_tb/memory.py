"""Models of the banked memories for benches of one engine."""

from __future__ import annotations

import random
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge
from systolith_hdl.ports import READ_LATENCY


class MemoryModel:
    """Serves the read and write ports of one engine from a numpy array, as `BankedMemory` would.

    Parameters
    ----------
    dut : the engine
    words : uint32 [lanes, depth], read and written in place
    reads, writes : names of the ports
    stall : probability that a port holds a request back in a cycle

    Counts accesses in `reads_done` and `writes_done`.
    """

    def __init__(
        self,
        dut: Any,
        words: np.ndarray,
        *,
        reads: list[str],
        writes: list[str],
        stall: float = 0.0,
    ) -> None:
        self.dut = dut
        self.words = words
        self.stall = stall
        self.reads_done = 0
        self.writes_done = 0
        self._reads = reads
        self._writes = writes
        cocotb.start_soon(self._run())

    def _handle(self, port: str, name: str) -> Any:
        return getattr(self.dut, f"{port}__{name}")

    async def _run(self) -> None:
        lanes, depth = self.words.shape
        pipeline: dict[str, list[int | None]] = {
            port: [None] * (READ_LATENCY - 1) for port in self._reads
        }
        for port in self._reads:
            self._handle(port, "response__valid").value = 0
        while True:
            await FallingEdge(self.dut.clk)
            for port in (*self._reads, *self._writes):
                self._handle(port, "request__ready").value = int(random.random() >= self.stall)
            await RisingEdge(self.dut.clk)
            for port in self._reads:
                taken = None
                if (
                    self._handle(port, "request__valid").value == 1
                    and self._handle(port, "request__ready").value == 1
                ):
                    address = int(self._handle(port, "request__payload").value)
                    assert address < depth, f"{port} reads word {address} of {depth}"
                    column = self.words[:, address]
                    taken = int.from_bytes(column.astype("<u4").tobytes(), "little")
                    self.reads_done += 1
                pipeline[port].append(taken)
                answer = pipeline[port].pop(0)
                self._handle(port, "response__valid").value = int(answer is not None)
                if answer is not None:
                    self._handle(port, "response__payload").value = answer
            for port in self._writes:
                if (
                    self._handle(port, "request__valid").value == 1
                    and self._handle(port, "request__ready").value == 1
                ):
                    payload = int(self._handle(port, "request__payload").value)
                    address = payload >> 33 * lanes
                    assert address < depth, f"{port} writes word {address} of {depth}"
                    for lane in range(lanes):
                        if payload >> (32 * lanes + lane) & 1:
                            self.words[lane, address] = payload >> (32 * lane) & 0xFFFFFFFF
                    self.writes_done += 1
