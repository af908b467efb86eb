"""Bench of the random words of stochastic rounding, against golden."""

import random
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge
from systolith.golden import dither
from systolith_hdl.arith import DITHER_LATENCY, engine_key

from .clocking import start
from .numerics import unpack
from .stimulus import random_counter

LANES = 4


async def sequences(dut: Any, *, take: float, count: int) -> None:
    """Instructions of random length, many cut off before their first words are there; words are
    taken in a cycle with the probability `take`."""
    await start(dut)
    dut.start.value = 0
    dut.take.value = 0
    assert dut.valid.value == 0
    compared = 0
    for _ in range(count):
        seed = random.getrandbits(random.choice((2, 32)))
        counter = random_counter()
        engine = random.randrange(8)
        length = random.choice((0, 1, random.randint(1, 40)))
        wanted = dither.random_words(seed, counter, engine, elements=length + 1, lanes=LANES)
        dut.start.value = 1
        dut.seed.value, dut.counter.value = seed, counter
        dut.key.value = engine_key(engine)
        await FallingEdge(dut.clk)
        dut.start.value = 0
        for port in (dut.seed, dut.counter, dut.key):  # sampled with `start`
            port.value = random.getrandbits(32)
        if length == 0:
            for _ in range(random.randint(0, DITHER_LATENCY - 2)):
                assert dut.valid.value == 0
                await FallingEdge(dut.clk)
            continue
        for _ in range(DITHER_LATENCY - 1):
            assert dut.valid.value == 0
            await FallingEdge(dut.clk)
        taken = 0
        while taken < length:
            assert dut.valid.value == 1
            got = unpack(dut.words, np.uint32, LANES)
            assert (got == wanted[:, taken]).all(), f"element {taken}: {got}, {wanted[:, taken]}"
            now = random.random() < take
            dut.take.value = now
            await FallingEdge(dut.clk)
            taken += now
            compared += 1
        dut.take.value = 0
        for _ in range(random.randint(0, 3)):
            # Not taken, nothing moves.
            assert (unpack(dut.words, np.uint32, LANES) == wanted[:, length]).all()
            await FallingEdge(dut.clk)
    assert compared > 4 * count
    dut._log.info("compared %d columns", compared)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def every_cycle(dut: Any) -> None:
    await sequences(dut, take=1.0, count=300)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def now_and_then(dut: Any) -> None:
    await sequences(dut, take=0.4, count=150)
