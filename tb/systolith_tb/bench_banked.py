"""The banked memory and its controller: contents, order, latency, fairness and throughput.

The design under test has 4 read and 3 write ports and the banks of the configuration; port 0 of
each has priority if ``SYSTOLITH_BENCH_PRIORITY`` is 1; ``SYSTOLITH_BENCH_DEPTH`` is its depth, 128
by default.
"""

from __future__ import annotations

import os
import random
from collections import deque
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge
from systolith_hdl.ports import READ_LATENCY

from .configs import bench_config

CONFIG = bench_config()
N = CONFIG.lanes
BANKS = CONFIG.banks
DEPTH = int(os.environ.get("SYSTOLITH_BENCH_DEPTH", "128"))
READS, WRITES = 4, 3
PRIORITY = os.environ.get("SYSTOLITH_BENCH_PRIORITY") == "1"
#: What the memory holds: kept over resets, so over the tests of one simulation as well.
WORDS = np.zeros((DEPTH, N), np.uint64)


class Scoreboard:
    """Drives every port and holds each answer against a plain array."""

    def __init__(self, dut: Any) -> None:
        self.dut = dut
        self.words = WORDS
        self.expected: list[deque[tuple[int, int]]] = [deque() for _ in range(READS)]
        self.compared = 0
        self.written = 0
        self.waits: list[int] = []
        self.cycle = 0

    async def reset(self) -> None:
        Clock(self.dut.clk, 10, unit="ns").start()
        self.dut.rst.value = 1
        for index in range(READS):
            getattr(self.dut, f"read__{index}__request__valid").value = 0
        for index in range(WRITES):
            getattr(self.dut, f"write__{index}__request__valid").value = 0
        await ClockCycles(self.dut.clk, 3)
        self.dut.rst.value = 0

    async def run(self, cycles: int, idle: float, addresses: Any) -> None:
        """Keeps every port requesting with probability 1 - idle; an offered request stays."""
        dut = self.dut
        reading: list[int | None] = [None] * READS
        writing: list[int | None] = [None] * WRITES
        age = [0] * (READS + WRITES)
        for step in range(cycles + 50):
            for index in range(READS):
                if reading[index] is None and step < cycles and random.random() >= idle:
                    reading[index] = addresses()
                port = f"read__{index}__request__"
                getattr(dut, port + "valid").value = int(reading[index] is not None)
                getattr(dut, port + "payload").value = reading[index] or 0
            for index in range(WRITES):
                if writing[index] is None and step < cycles and random.random() >= idle:
                    writing[index] = random.getrandbits(33 * N) | addresses() << 33 * N
                port = f"write__{index}__request__"
                getattr(dut, port + "valid").value = int(writing[index] is not None)
                getattr(dut, port + "payload").value = writing[index] or 0
            await RisingEdge(dut.clk)
            self.cycle += 1
            for index in range(READS):
                port = f"read__{index}__"
                if getattr(dut, port + "response__valid").value == 1:
                    assert self.expected[index], f"read port {index} answers what was not asked"
                    due, value = self.expected[index].popleft()
                    assert self.cycle == due, f"answer {self.cycle - due} cycles late"
                    assert int(getattr(dut, port + "response__payload").value) == value
                    self.compared += 1
                elif self.expected[index]:
                    assert self.expected[index][0][0] > self.cycle, f"read port {index} lost one"
                if reading[index] is None:
                    continue
                if getattr(dut, port + "request__ready").value == 1:
                    column = self.words[reading[index]]
                    value = sum(int(word) << (32 * lane) for lane, word in enumerate(column))
                    self.expected[index].append((self.cycle + READ_LATENCY, value))
                    reading[index] = None
                    self.waits.append(age[index])
                    age[index] = 0
                else:
                    age[index] += 1
                    assert not (PRIORITY and index == 0), "the priority port was held back"
            for index in range(WRITES):
                request = writing[index]
                if request is None:
                    continue
                if getattr(dut, f"write__{index}__request__ready").value == 1:
                    for lane in range(N):
                        if request >> (32 * N + lane) & 1:
                            word = request >> (32 * lane) & 0xFFFFFFFF
                            self.words[request >> 33 * N, lane] = word
                    self.written += 1
                    writing[index] = None
                    self.waits.append(age[READS + index])
                    age[READS + index] = 0
                else:
                    age[READS + index] += 1
                    assert not (PRIORITY and index == 0), "the priority port was held back"
        assert not any(self.expected), "requests without an answer"
        assert all(r is None for r in (*reading, *writing)), "requests never accepted"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def random_traffic(dut: Any) -> None:
    board = Scoreboard(dut)
    await board.reset()
    for idle in (0.0, 0.5, 0.9):
        await board.run(1500, idle, lambda: random.randrange(DEPTH))
    assert board.compared > 3000 and board.written > 2000


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def one_bank_is_shared_fairly(dut: Any) -> None:
    board = Scoreboard(dut)
    await board.reset()
    bank = random.randrange(BANKS)
    # A priority port that never pauses starves the rest, on purpose.
    idle = 0.5 if PRIORITY else 0.0
    await board.run(1000, idle, lambda: bank + BANKS * random.randrange(DEPTH // BANKS))
    assert board.compared > 400
    if not PRIORITY:
        assert max(board.waits) <= max(READS, WRITES) - 1, "a port waited longer than a round"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def streams_run_together_at_full_rate(dut: Any) -> None:
    """As many ports as there are banks walk consecutive words: after the first conflicts none is
    ever held back."""
    board = Scoreboard(dut)
    await board.reset()
    cycles = 400
    position = {f"read__{index}__request": 0 for index in range(min(READS, BANKS))}
    position |= {f"write__{index}__request": 0 for index in range(min(WRITES, BANKS))}
    for step in range(cycles):
        for name, word in position.items():
            getattr(dut, f"{name}__valid").value = 1
            place = 33 * N if name.startswith("write") else 0  # of the address
            getattr(dut, f"{name}__payload").value = word % DEPTH << place
        await RisingEdge(dut.clk)
        for name in position:
            if getattr(dut, f"{name}__ready").value == 1:
                position[name] += 1
            else:
                assert step < 2 * (READS + WRITES), f"{name} held back in cycle {step}"
    assert sum(position.values()) >= len(position) * (cycles - READS)
