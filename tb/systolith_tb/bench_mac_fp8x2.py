"""Bench of the MAC for pairs of FP8 numbers, many copies side by side, against numpy."""

import itertools
import os

import cocotb
import numpy as np
from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from systolith_hdl.emit import Once
from systolith_hdl.formats import FORMATS, NARROW_FLOATS, DType
from systolith_hdl.tensor import ADD_LATENCY, PAIR_MUL_LATENCY, MacFp8x2
from systolith_hdl.tensor.mac import OPERAND_BITS
from systolith_hdl.tensor.mac_fp8x2 import SECOND_BITS, recode_factor

from systolith_tb.bench_mac import random_operands
from systolith_tb.clocking import start
from systolith_tb.numerics import (
    CORNERS,
    canonical,
    mac,
    numpy_rng,
    pack,
    pair_mac,
    random_words,
    round_to,
    unpack,
)

#: MACs side by side in `MacFp8x2Bench`.
COPIES = 16
_LATENCY = PAIR_MUL_LATENCY + ADD_LATENCY
_WORDS = data.ArrayLayout(unsigned(32), COPIES)
#: Every number of both types as FP32 words, NaNs canonical: 256 of each.
FP8_WORDS = np.concatenate(
    [
        canonical(
            np.arange(256, dtype=np.uint8).view(FORMATS[t].numpy).astype(np.float32).view(np.uint32)
        )
        for t in (DType.FP8_E4M3, DType.FP8_E5M2)
    ]
)


class MacFp8x2Bench(wiring.Component):
    """`COPIES` MACs; all inputs of an operation are given in the same cycle.

    Members
    -------
    a0, a1, w0, w1 : In, FP32 words of narrow floats; of a1 and w1, of FP8
    a_pair, w_pair, active : In, a bit for each copy
    acc : In, FP32 words
    o : Out, PAIR_MUL_LATENCY + ADD_LATENCY cycles later
    """

    a0: In(_WORDS)
    a1: In(_WORDS)
    w0: In(_WORDS)
    w1: In(_WORDS)
    a_pair: In(COPIES)
    w_pair: In(COPIES)
    active: In(COPIES)
    acc: In(_WORDS)
    o: Out(_WORDS)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        acc = self.acc
        for stage in range(PAIR_MUL_LATENCY):
            later = Signal.like(self.acc, name=f"acc{stage}")
            m.d.sync += later.eq(acc)
            acc = later
        for i in range(COPIES):
            m.submodules[f"mac{i}"] = mac = Once(MacFp8x2(), "mac_fp8x2")
            for factor, first, second, pair in (
                (mac.a, self.a0, self.a1, self.a_pair),
                (mac.w, self.w0, self.w1, self.w_pair),
            ):
                words = first[i][-OPERAND_BITS:], second[i][-SECOND_BITS:]
                m.d.comb += factor.as_value().eq(recode_factor(m, *words, pair[i]))
            m.d.comb += [
                mac.active.eq(self.active[i]),
                mac.acc.eq(acc[i]),
                self.o[i].eq(mac.o),
            ]
        return m


async def compare(dut, factors: list[np.ndarray], flags: np.ndarray, acc: np.ndarray) -> None:
    """Runs operations through the MACs and checks each result.

    Parameters
    ----------
    factors : words of a0, a1, w0, w1
    flags : bit 0: a is a pair, bit 1: w is, bit 2: takes part
    acc : words, NaNs canonical
    """
    pad = -len(acc) % COPIES
    a0, a1, w0, w1 = (np.pad(words, (0, pad)) for words in factors)
    acc, flags = np.pad(acc, (0, pad)), np.pad(flags, (0, pad))
    a_pair, w_pair, active = (flags >> bit & 1 for bit in range(3))

    results = []
    batches = len(acc) // COPIES
    for cycle in range(batches + _LATENCY):
        await FallingEdge(dut.clk)
        if cycle >= _LATENCY:
            results.append(unpack(dut.o, np.uint32, COPIES))
        if cycle < batches:
            chunk = slice(cycle * COPIES, (cycle + 1) * COPIES)
            for name, words in (("a0", a0), ("a1", a1), ("w0", w0), ("w1", w1), ("acc", acc)):
                getattr(dut, name).value = pack(words[chunk])
            for name, bits in (("a_pair", a_pair), ("w_pair", w_pair), ("active", active)):
                getattr(dut, name).value = pack(np.packbits(bits[chunk], bitorder="little"))
    got = np.concatenate(results)
    sums = np.where(a_pair & w_pair, pair_mac(acc, (a0, a1), (w0, w1)), mac(acc, a0, w0))
    wanted = np.where(active, sums, acc)
    wrong = np.flatnonzero(got != wanted)
    assert len(got) == len(acc)
    assert not len(wrong), (
        f"{len(wrong)} of {len(acc)} wrong, first "
        f"acc={acc[wrong[0]]:08x} a={a0[wrong[0]]:08x},{a1[wrong[0]]:08x} "
        f"w={w0[wrong[0]]:08x},{w1[wrong[0]]:08x} flags={flags[wrong[0]]}: "
        f"got {got[wrong[0]]:08x}, wanted {wanted[wrong[0]]:08x}"
    )
    cocotb.log.info("compared %d MACs", len(acc))


def random_sums(rng: np.random.Generator, addend: np.ndarray) -> np.ndarray:
    """Running sums for addends: a third nearly cancels, a third is far below or above, the rest is
    anything."""
    count = len(addend)
    kind = rng.integers(0, 3, count)
    step = rng.integers(-3, 4, count).astype(np.uint32)
    scale = (rng.integers(-40, 41, count) << 23).astype(np.uint32)
    acc = np.where(kind == 0, (addend ^ np.uint32(1 << 31)) + step, random_words(rng, count))
    return canonical(np.where(kind == 1, addend + scale, acc).astype(np.uint32))


_NOTHING = np.uint32(1 << 31)  # -0: added, it changes nothing


@cocotb.test(timeout_time=1000, timeout_unit="ms")
async def every_product(dut) -> None:
    """Every FP8 number times every other, of both types, first and second of a pair, beside
    products near and far."""
    rng = numpy_rng()
    await start(dut)
    a, w = (grid.ravel() for grid in np.meshgrid(FP8_WORDS, FP8_WORDS))
    beside_a, beside_w = rng.choice(FP8_WORDS, len(a)), rng.choice(FP8_WORDS, len(a))
    # A third negates the product or doubles it, by exchanging the factors or flipping a sign.
    kind = rng.integers(0, 6, len(a))
    beside_a = np.where(kind == 0, w ^ _NOTHING, np.where(kind == 1, w, beside_a))
    beside_w = np.where(kind <= 1, a, beside_w)
    swap = rng.random(len(a)) < 0.5
    factors = [
        np.where(swap, beside_a, a),
        np.where(swap, a, beside_a),
        np.where(swap, beside_w, w),
        np.where(swap, w, beside_w),
    ]
    nothing = np.full(len(a), _NOTHING)
    await compare(dut, factors, np.full(len(a), 7), nothing)


@cocotb.test(timeout_time=1000, timeout_unit="ms")
async def pairs(dut) -> None:
    """Random pairs of all numbers and of special ones, and running sums near and far."""
    rng = numpy_rng()
    await start(dut)
    count = int(os.environ.get("SYSTOLITH_VECTORS", "60000"))
    # Zeros, infinity, NaN, ones, the largest and the smallest, in every combination.
    some = np.array([0x00, 0x38, 0x7E, 0x7F, 0x01], np.uint8).view(FORMATS[DType.FP8_E4M3].numpy)
    more = np.array([0x01, 0x7B, 0x7C], np.uint8).view(FORMATS[DType.FP8_E5M2].numpy)
    special = np.concatenate([some.astype(np.float32), more.astype(np.float32)])
    special = canonical(np.concatenate([special, -special]).astype(np.float32).view(np.uint32))
    cross = np.array(list(itertools.product(special, repeat=4)), np.uint32)
    factors = [np.concatenate([cross[:, i], rng.choice(FP8_WORDS, count)]) for i in range(4)]
    addend = pair_mac(
        np.full(len(factors[0]), _NOTHING), (factors[0], factors[1]), (factors[2], factors[3])
    )
    acc = random_sums(rng, addend)
    acc[: len(cross)] = canonical(rng.choice(CORNERS, len(cross)))
    await compare(dut, factors, np.full(len(acc), 7), acc)


@cocotb.test(timeout_time=1000, timeout_unit="ms")
async def modes(dut) -> None:
    """Single numbers of every type, pairs, one beside the other, and rows that take no part, in
    turns."""
    rng = numpy_rng()
    await start(dut)
    count = int(os.environ.get("SYSTOLITH_VECTORS", "60000"))
    corners = np.unique(np.concatenate([round_to(CORNERS, dtype) for dtype in NARROW_FLOATS]))
    single = [
        np.concatenate([random_operands(rng, count // 2), rng.choice(corners, count // 2)])
        for _ in range(2)
    ]
    flags = rng.integers(0, 8, count) | (rng.random(count) < 0.8) * 4
    a0 = np.where(flags & 1, rng.choice(FP8_WORDS, count), single[0])
    w0 = np.where(flags & 2, rng.choice(FP8_WORDS, count), rng.permutation(single[1]))
    a1, w1 = rng.choice(FP8_WORDS, count), rng.choice(FP8_WORDS, count)
    acc = random_sums(rng, mac(np.full(count, _NOTHING), a0, w0))
    await compare(dut, [a0, a1, w0, w1], flags, acc)
