"""Bench of the floating-point cells, many copies side by side, against numpy and SoftFloat."""

import os
import random
from collections import deque

import cocotb
import numpy as np
import softfloatpy
from amaranth.hdl import Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge
from systolith_hdl.arith import FP32_LATENCY, Fp32Add, Fp32Mul, MulMode
from systolith_hdl.emit import Once

from systolith_tb.numerics import CORNERS, canonical, numpy_rng, pack, random_words, unpack

#: Copies of each cell: this many vectors in a cycle.
COPIES = 16


class ArithBench(wiring.Component):
    """`COPIES` adders and multipliers, without and with integers, fed with the same vectors.

    Members
    -------
    en : In(1)
    a, b : In, one FP32 word for each copy
    mode : In(MulMode), of the multipliers with integers
    total, product, word : Out, `FP32_LATENCY` enabled cycles later
    """

    mode: In(MulMode)
    word: Out(data.ArrayLayout(unsigned(32), COPIES))

    en: In(1)
    a: In(data.ArrayLayout(unsigned(32), COPIES))
    b: In(data.ArrayLayout(unsigned(32), COPIES))
    total: Out(data.ArrayLayout(unsigned(32), COPIES))
    product: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for i in range(COPIES):
            for cell, output in (
                (Once(Fp32Add(), "fp32_add"), self.total),
                (Once(Fp32Mul(), "fp32_mul"), self.product),
                (words := Once(Fp32Mul(words=True), "word_mul"), self.word),
            ):
                m.submodules += cell
                m.d.comb += [
                    cell.en.eq(self.en),
                    cell.a.eq(self.a[i]),
                    cell.b.eq(self.b[i]),
                    output[i].eq(cell.o),
                ]
            m.d.comb += words.mode.eq(self.mode)
        return m


def words_of(mode: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What the multiplier with integers makes of words, by its modes."""
    wide, places = a.astype(np.uint64), np.minimum(b, 32).astype(np.uint64)
    signed = a.view(np.int32).astype(np.int64) >> places.astype(np.int64)
    with np.errstate(all="ignore"):
        product = canonical((a.view(np.float32) * b.view(np.float32)).view(np.uint32))
    choices = [product, wide * b.astype(np.uint64), wide << places, wide >> places, signed]
    return np.choose(mode, [(c.astype(np.uint64) & 0xFFFFFFFF).astype(np.uint32) for c in choices])


def random_pairs(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random operands, a quarter of which nearly cancel, and all pairs of corners before them."""
    a, b = random_words(rng, count), random_words(rng, count)
    close = rng.integers(0, 4, count) == 0
    step = rng.integers(-3, 4, count).astype(np.uint32)
    b = np.where(close, (a + step) ^ np.uint32(1 << 31), b)
    cross_a, cross_b = (grid.ravel() for grid in np.meshgrid(CORNERS, CORNERS))
    return np.concatenate([cross_a, a]), np.concatenate([cross_b, b])


def softfloat(operation: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Berkeley SoftFloat's result for each pair of words, NaNs made canonical."""
    function = getattr(softfloatpy, operation)
    make = softfloatpy.Float32.from_bytes
    to_words = [
        int.from_bytes(function(make(x), make(y)).to_bytes(), "big")
        for x, y in zip(
            (x.to_bytes(4, "big") for x in a.tolist()),
            (y.to_bytes(4, "big") for y in b.tolist()),
            strict=True,
        )
    ]
    return canonical(np.array(to_words, np.uint32))


def _check(what: str, a: np.ndarray, b: np.ndarray, got: np.ndarray, wanted: np.ndarray) -> None:
    wrong = np.flatnonzero(got != wanted)
    if len(wrong):
        i = wrong[0]
        raise AssertionError(
            f"{what}: {len(wrong)} of {len(got)} wrong, first a={a[i]:08x} b={b[i]:08x}: "
            f"got {got[i]:x}, wanted {wanted[i]:x}"
        )


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def cells(dut) -> None:
    """Sums and products of $SYSTOLITH_VECTORS random pairs and all pairs of corners,
    with `en` going low at random."""
    rng = numpy_rng()
    a, b = random_pairs(rng, int(os.environ.get("SYSTOLITH_VECTORS", "100000")))
    pad = -len(a) % COPIES
    a, b = np.pad(a, (0, pad)), np.pad(b, (0, pad))
    # Products of integers and shifts between those of FP32, and amounts that shift.
    modes = rng.integers(0, len(MulMode), len(a) // COPIES)
    mode = np.repeat(modes, COPIES)
    amounts = (mode > 1) & (rng.random(len(b)) < 0.8)
    b = np.where(amounts, rng.integers(0, 40, len(b)), b).astype(np.uint32)

    Clock(dut.clk, 10, unit="ns").start()
    dut.rst.value = 0
    totals: list[np.ndarray] = []
    products: list[np.ndarray] = []
    words: list[np.ndarray] = []
    pipeline: deque[bool] = deque([False] * FP32_LATENCY)
    sent, batches = 0, len(a) // COPIES
    while len(totals) < batches:
        await FallingEdge(dut.clk)
        enable = random.random() < 0.9
        dut.en.value = enable
        if sent < batches:
            chunk = slice(sent * COPIES, (sent + 1) * COPIES)
            dut.a.value = pack(a[chunk])
            dut.b.value = pack(b[chunk])
            dut.mode.value = int(modes[sent])
        if pipeline[0] and enable:
            totals.append(unpack(dut.total, np.uint32, COPIES))
            products.append(unpack(dut.product, np.uint32, COPIES))
            words.append(unpack(dut.word, np.uint32, COPIES))
        if enable:
            pipeline.popleft()
            pipeline.append(sent < batches)
            sent += 1
    total, product = np.concatenate(totals), np.concatenate(products)

    with np.errstate(all="ignore"):
        fa, fb = a.view(np.float32), b.view(np.float32)
        _check("sum, numpy", a, b, total, canonical((fa + fb).view(np.uint32)))
        _check("product, numpy", a, b, product, canonical((fa * fb).view(np.uint32)))
    _check("word, numpy", a, b, np.concatenate(words), words_of(mode, a, b))
    _check("sum, SoftFloat", a, b, total, softfloat("f32_add", a, b))
    _check("product, SoftFloat", a, b, product, softfloat("f32_mul", a, b))
    cocotb.log.info("compared %d vectors", len(a))
