"""Benches of the random words of stochastic rounding, against golden: `every_cycle` and
`now_and_then` of `Dither`, `stream_*` of `DitherStream`."""

import random
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, ReadOnly
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


async def stream(dut: Any, *, offer: float, take: float) -> None:
    """Elements of instruction after instruction, offered and taken with these probabilities."""
    await start(dut)
    seed, engine = random.getrandbits(32), random.randrange(8)
    dut.seed.value, dut.key.value = seed, engine_key(engine)
    elements: list[tuple[int, int]] = []
    wanted = []
    for _ in range(60):
        counter, length = random_counter(), random.choice((1, 2, random.randint(1, 40)))
        elements += [(counter, element) for element in range(length)]
        words = dither.random_words(seed, counter, engine, elements=length, lanes=LANES)
        wanted += list(words.T)
    sent = taken = cycles = 0
    dut.element__valid.value = dut.words__ready.value = 0
    offered = False
    while taken < len(wanted):
        offered = sent < len(elements) and (offered or random.random() < offer)
        dut.element__valid.value = offered
        if offered:
            counter, element = elements[sent]
            dut.element__payload.value = counter | element << 32
        ready = random.random() < take
        dut.words__ready.value = ready
        await ReadOnly()
        if dut.words__valid.value:
            got = unpack(dut.words__payload, np.uint32, LANES)
            assert (got == wanted[taken]).all(), f"column {taken}: {got}, {wanted[taken]}"
            taken += ready
        if offered and dut.element__ready.value:
            sent += 1
            offered = False
        await FallingEdge(dut.clk)
        cycles += 1
    assert sent == len(elements)
    dut.element__valid.value = 0
    if offer == take == 1.0:
        assert cycles == len(elements) + DITHER_LATENCY


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def stream_at_full_rate(dut: Any) -> None:
    await stream(dut, offer=1.0, take=1.0)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def stream_with_stalls(dut: Any) -> None:
    for probability in (0.3, 0.8):
        await stream(dut, offer=0.5, take=probability)
