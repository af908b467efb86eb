"""Bench of `systolith_hdl.board.AxiRam`: AXI by cocotbext-axi, the host beside it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, ReadOnly, RisingEdge
from cocotbext.axi import AxiBurstType, AxiBus, AxiMaster, AxiResp

SIZE = int(os.environ.get("SYSTOLITH_BENCH_SIZE", 4096))
BEAT = int(os.environ.get("SYSTOLITH_BENCH_BEAT", 8))


def pauses(probability: float) -> Iterator[int]:
    while True:
        yield int(random.random() < probability)


async def begin(dut: Any, *, pause: float) -> AxiMaster:
    Clock(dut.clk, 10, unit="ns").start()
    dut.host__valid.value = 0
    axi = AxiMaster(AxiBus.from_prefix(dut, "s_axi"), dut.clk, dut.rst)
    for half in (axi.write_if, axi.read_if):
        half.log.setLevel("WARNING")
    if pause:
        write, read = axi.write_if, axi.read_if
        for channel in (
            write.aw_channel, write.w_channel, write.b_channel, read.ar_channel, read.r_channel
        ):  # fmt: skip
            channel.set_pause_generator(pauses(pause))
    dut.rst.value = 1
    await ClockCycles(dut.clk, 3)
    dut.rst.value = 0
    await ClockCycles(dut.clk, 1)
    return axi


async def host(dut: Any, word: int, data: int | None) -> int:
    """An access of the host; returns what it reads."""
    dut.host__valid.value = 1
    dut.host__payload.value = word | (data is not None) << WORD_BITS | (data or 0) << WORD_BITS + 1
    while True:
        await ReadOnly()
        taken = dut.host__ready.value == 1
        await RisingEdge(dut.clk)
        if taken:
            break
    dut.host__valid.value = 0
    await ReadOnly()
    assert dut.read__valid.value == (data is None)
    got = int(dut.read__payload.value)
    await RisingEdge(dut.clk)
    return got


WORD_BITS = (SIZE // 4 - 1).bit_length()


async def mixed(dut: Any, *, pause: float) -> None:
    """AXI and host at random, each in a half of its own of every 64 bytes: a model per byte."""
    axi = await begin(dut, pause=pause)
    memory = np.zeros(SIZE, np.uint8)
    await axi.write(0, bytes(SIZE))
    compared = 0

    async def of_axi() -> None:
        nonlocal compared
        for _ in range(80):
            # Write strobes of any kind at the ends; at most to the end of the first half.
            block = random.randrange(SIZE // 64) * 64
            start = random.randrange(32)
            count = random.randrange(1, 33 - start)
            data = random.randbytes(count)
            response = await axi.write(block + start, data)
            assert response.resp == AxiResp.OKAY
            memory[block + start :][:count] = np.frombuffer(data, np.uint8)
            block = random.randrange(SIZE // 64) * 64
            got = await axi.read(block, 32)
            assert got.resp == AxiResp.OKAY
            assert got.data == memory[block : block + 32].tobytes()
            compared += 32

    async def of_host() -> None:
        nonlocal compared
        for _ in range(300):
            word = random.randrange(SIZE // 64) * 16 + 8 + random.randrange(8)
            data = random.getrandbits(32)
            await host(dut, word, data)
            memory[4 * word :][:4] = np.frombuffer(data.to_bytes(4, "little"), np.uint8)
            word = random.randrange(SIZE // 4)
            if word % 16 >= 8:
                got = await host(dut, word, None)
                assert got == int.from_bytes(memory[4 * word :][:4].tobytes(), "little")
                compared += 4
            await ClockCycles(dut.clk, random.randrange(1, 4))

    tasks = [cocotb.start_soon(of_axi()), cocotb.start_soon(of_host())]
    for task in tasks:
        await task
    assert compared > 80 * 32 + 400
    whole = await axi.read(0, SIZE)
    assert whole.data == memory.tobytes()


@cocotb.test()
async def without_pauses(dut: Any) -> None:
    await mixed(dut, pause=0.0)


@cocotb.test()
async def with_pauses(dut: Any) -> None:
    await mixed(dut, pause=0.4)


@cocotb.test()
async def outside(dut: Any) -> None:
    """Beats past the end are answered with an error and write nothing."""
    axi = await begin(dut, pause=0.0)
    await axi.write(0, bytes(SIZE))
    end = SIZE - 4 * BEAT
    wanted = bytes(range(1, 4 * BEAT + 1))
    for address in (SIZE, 1 << 20, 1 << 47):
        response = await axi.write(address, bytes([7]) * 2 * BEAT)
        assert response.resp == AxiResp.DECERR
        assert (await axi.read(address, BEAT)).resp == AxiResp.DECERR
    assert (await axi.write(end, wanted)).resp == AxiResp.OKAY
    got = await axi.read(0, SIZE)
    assert got.resp == AxiResp.OKAY and got.data == bytes(end) + wanted


@cocotb.test()
async def rate(dut: Any) -> None:
    """A burst of reads moves a beat per cycle, the first one 2 cycles after its address."""
    axi = await begin(dut, pause=0.0)
    cocotb.start_soon(axi.read(0, 16 * BEAT, burst=AxiBurstType.INCR))
    accepted, beats = None, []
    for cycle in range(60):
        await ReadOnly()
        if dut.s_axi_arvalid.value == 1 and dut.s_axi_arready.value == 1:
            accepted = cycle
        if dut.s_axi_rvalid.value == 1 and dut.s_axi_rready.value == 1:
            beats.append(cycle)
        await RisingEdge(dut.clk)
    assert accepted is not None
    assert beats == list(range(accepted + 2, accepted + 18))
