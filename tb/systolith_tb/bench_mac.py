"""Bench of the MAC, many copies side by side, against numpy."""

import os

import cocotb
import numpy as np
from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from systolith_hdl.emit import Once
from systolith_hdl.tensor import ADD_LATENCY, MUL_LATENCY, Mac
from systolith_hdl.tensor.mac import recode_bf16

from systolith_tb.clocking import start
from systolith_tb.numerics import (
    CORNERS,
    canonical,
    mac,
    numpy_rng,
    pack,
    random_words,
    to_bf16,
    unpack,
)

#: MACs side by side in `MacBench`.
COPIES = 16


class MacBench(wiring.Component):
    """`COPIES` MACs; all inputs of an operation are given in the same cycle.

    Members
    -------
    a, w : In, bf16 words
    active : In, a bit for each copy
    acc : In, FP32 words
    o : Out, MUL_LATENCY + ADD_LATENCY cycles later
    """

    a: In(data.ArrayLayout(unsigned(16), COPIES))
    w: In(data.ArrayLayout(unsigned(16), COPIES))
    active: In(COPIES)
    acc: In(data.ArrayLayout(unsigned(32), COPIES))
    o: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        acc = Signal.like(self.acc)
        m.d.sync += acc.eq(self.acc)
        for i in range(COPIES):
            m.submodules[f"mac{i}"] = mac = Once(Mac(), "mac_bf16")
            m.d.comb += [
                mac.a.as_value().eq(recode_bf16(m, self.a[i])),
                mac.w.as_value().eq(recode_bf16(m, self.w[i])),
                mac.active.eq(self.active[i]),
                mac.acc.eq(acc[i]),
                self.o[i].eq(mac.o),
            ]
        return m


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def mac_vectors(dut) -> None:
    """Random and corner operands, near cancellation, and rows that take no part."""
    rng = numpy_rng()
    count = int(os.environ.get("SYSTOLITH_VECTORS", "100000"))
    corners = np.unique(np.concatenate([CORNERS >> 16, to_bf16(CORNERS)])).astype(np.uint16)
    cross = [g.ravel() for g in np.meshgrid(corners, corners, CORNERS[::3])]
    a = np.concatenate([cross[0], (random_words(rng, count) >> 16).astype(np.uint16)])
    w = np.concatenate([cross[1], (random_words(rng, count) >> 16).astype(np.uint16)])
    acc = random_words(rng, count)
    # A third of the sums nearly cancel, a third has a product far below or above the sum.
    product = mac(np.full(count, 1 << 31, np.uint32), a[-count:], w[-count:])
    kind = rng.integers(0, 3, count)
    step = rng.integers(-3, 4, count).astype(np.uint32)
    acc = np.where(kind == 0, (product ^ np.uint32(1 << 31)) + step, acc)
    scale = (rng.integers(-40, 41, count) << 23).astype(np.uint32)
    acc = np.where(kind == 1, product + scale, acc)
    acc = canonical(np.concatenate([cross[2], acc]).astype(np.uint32))
    pad = -len(a) % COPIES
    a, w, acc = np.pad(a, (0, pad)), np.pad(w, (0, pad)), np.pad(acc, (0, pad))
    active = rng.integers(0, 16, len(a)) != 0

    await start(dut)
    results = []
    batches = len(a) // COPIES
    for cycle in range(batches + MUL_LATENCY + ADD_LATENCY):
        await FallingEdge(dut.clk)
        if cycle >= MUL_LATENCY + ADD_LATENCY:
            results.append(unpack(dut.o, np.uint32, COPIES))
        if cycle < batches:
            chunk = slice(cycle * COPIES, (cycle + 1) * COPIES)
            dut.a.value = pack(a[chunk])
            dut.w.value = pack(w[chunk])
            dut.acc.value = pack(acc[chunk])
            dut.active.value = pack(np.packbits(active[chunk], bitorder="little"))
    got = np.concatenate(results)
    wanted = np.where(active, mac(acc, a, w), acc)
    wrong = np.flatnonzero(got != wanted)
    assert len(got) == len(a)
    assert not len(wrong), (
        f"{len(wrong)} of {len(a)} wrong, first acc={acc[wrong[0]]:08x} a={a[wrong[0]]:04x} "
        f"w={w[wrong[0]]:04x} active={active[wrong[0]]}: got {got[wrong[0]]:08x}, "
        f"wanted {wanted[wrong[0]]:08x}"
    )
    cocotb.log.info("compared %d MACs", len(a))
