"""Bench of the MAC, many copies side by side, against numpy."""

import os

import cocotb
import numpy as np
from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from systolith_hdl.emit import Once
from systolith_hdl.formats import NARROW_FLOATS, DType
from systolith_hdl.tensor import ADD_LATENCY, MUL_LATENCY, Mac
from systolith_hdl.tensor.mac import OPERAND_BITS, recode

from systolith_tb.clocking import start
from systolith_tb.numerics import (
    CORNERS,
    canonical,
    mac,
    numpy_rng,
    pack,
    random_words,
    round_to,
    unpack,
)

#: MACs side by side in `MacBench`.
COPIES = 16


class MacBench(wiring.Component):
    """`COPIES` MACs; all inputs of an operation are given in the same cycle.

    Members
    -------
    a, w : In, FP32 words of narrow floats
    active : In, a bit for each copy
    acc : In, FP32 words
    o : Out, MUL_LATENCY + ADD_LATENCY cycles later
    """

    a: In(data.ArrayLayout(unsigned(32), COPIES))
    w: In(data.ArrayLayout(unsigned(32), COPIES))
    active: In(COPIES)
    acc: In(data.ArrayLayout(unsigned(32), COPIES))
    o: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        acc = Signal.like(self.acc)
        m.d.sync += acc.eq(self.acc)
        for i in range(COPIES):
            m.submodules[f"mac{i}"] = mac = Once(Mac(), "mac_narrow")
            m.d.comb += [
                mac.a.as_value().eq(recode(m, self.a[i][-OPERAND_BITS:])),
                mac.w.as_value().eq(recode(m, self.w[i][-OPERAND_BITS:])),
                mac.active.eq(self.active[i]),
                mac.acc.eq(acc[i]),
                self.o[i].eq(mac.o),
            ]
        return m


def random_operands(rng: np.random.Generator, count: int) -> np.ndarray:
    """FP32 words of random numbers of all operand types, most of them not zero in their type."""
    words = random_words(rng, count)
    inside = (rng.integers(100, 146, count, dtype=np.uint32) << 23) | (words & 0x807FFFFF)
    candidates = [round_to(words, DType.BF16), round_to(inside, DType.BF16)]
    candidates += [round_to(inside, dtype) for dtype in NARROW_FLOATS]
    return np.choose(rng.integers(0, len(candidates), count), candidates)


@cocotb.test(timeout_time=100, timeout_unit="ms")
async def mac_vectors(dut) -> None:
    """Random and corner operands, near cancellation, and rows that take no part."""
    rng = numpy_rng()
    count = int(os.environ.get("SYSTOLITH_VECTORS", "100000"))
    corners = np.unique(np.concatenate([round_to(CORNERS, dtype) for dtype in NARROW_FLOATS]))
    cross = [g.ravel() for g in np.meshgrid(corners, corners, CORNERS[::7])]
    cross_a, cross_w = cross[:2]
    a = np.concatenate([cross_a, random_operands(rng, count)])
    w = np.concatenate([cross_w, random_operands(rng, count)])
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
        f"{len(wrong)} of {len(a)} wrong, first acc={acc[wrong[0]]:08x} a={a[wrong[0]]:08x} "
        f"w={w[wrong[0]]:08x} active={active[wrong[0]]}: got {got[wrong[0]]:08x}, "
        f"wanted {wanted[wrong[0]]:08x}"
    )
    cocotb.log.info("compared %d MACs", len(a))
