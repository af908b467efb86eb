"""Bench of the divider, many copies side by side, against the golden model."""

import os

import cocotb
import numpy as np
from amaranth.hdl import Cat, Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from systolith.golden import arithmetic
from systolith_hdl.arith.divide import (
    DIVIDE_CYCLES,
    DIVIDE_INTEGER_CYCLES,
    DIVIDE_SUBNORMAL_CYCLES,
    Divide,
)
from systolith_hdl.emit import Once
from systolith_hdl.formats import INFINITY, DType
from systolith_hdl.isa import AluOp

from systolith_tb.clocking import start
from systolith_tb.numerics import CORNERS, numpy_rng, pack, random_words, unpack
from systolith_tb.stimulus import INTEGER_CORNERS

#: Copies: this many results at a time.
COPIES = 64


class DivideBench(wiring.Component):
    """`COPIES` dividers that start together.

    Members
    -------
    step, start, op, dtype : In
    a, b : In, one word for each copy
    busy : Out(1), one of them is
    o : Out
    """

    step: In(1)
    start: In(1)
    op: In(6)
    dtype: In(DType)
    a: In(data.ArrayLayout(unsigned(32), COPIES))
    b: In(data.ArrayLayout(unsigned(32), COPIES))
    busy: Out(1)
    o: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cells = []
        for i in range(COPIES):
            m.submodules[f"divide{i}"] = cell = Once(Divide(), "divide")
            cells.append(cell)
            m.d.comb += [
                cell.step.eq(self.step),
                cell.start.eq(self.start),
                cell.op.eq(self.op),
                cell.dtype.eq(self.dtype),
                cell.a.eq(self.a[i]),
                cell.b.eq(self.b[i]),
                self.o[i].eq(cell.o),
            ]
        m.d.comb += self.busy.eq(Cat(cell.busy for cell in cells).any())
        return m


def near(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Operands whose quotients lie near the ends of FP32's range and among its subnormals, some of
    them with few bits, so that quotients are exact or ties."""
    a, b = (rng.integers(0, 1 << 32, count, dtype=np.uint32) for _ in "ab")
    distance = rng.choice([-152, -149, -127, -126, 127, 0], count)
    exponent = (b >> 23 & 0xFF).astype(np.int64) + distance
    a = a & 0x807FFFFF | (np.clip(exponent, 0, 254).astype(np.uint32) << 23)
    few = np.uint32(0xFFFFFFFF) << rng.integers(0, 23, count, dtype=np.uint32)
    a, b = (np.where(rng.random(count) < 0.5, word & few, word) for word in (a, b))
    return a, b


def modulo_cycles(a: np.ndarray, b: np.ndarray, result: np.ndarray) -> int:
    """What the longest of these remainders of FP32 takes."""
    one, other, left = (np.maximum(x >> 23 & 0xFF, 1).astype(int) for x in (a, b, result))
    at_once = (result & 0x7FFFFFFF > INFINITY) | (one < other)
    shifts = np.where(result & 0x7FFFFFFF, other - left, 0)
    return int(np.where(at_once, 1, 36 + one - other + shifts).max())


@cocotb.test(timeout_time=100, timeout_unit="ms")
async def results(dut) -> None:
    """Every operation on all pairs of corners and $SYSTOLITH_VECTORS random pairs, with `step` low
    now and then, within the cycles stated."""
    rng = numpy_rng()
    count = int(os.environ.get("SYSTOLITH_VECTORS", "1200"))
    cases = [(op, DType.FP32) for op in DIVIDE_CYCLES]
    for dtype in (DType.INT32, DType.UINT32):
        cases += [(AluOp.DIVIDE, dtype), (AluOp.MOD, dtype)]
    await start(dut)
    compared, longest = 0, {case: 0 for case in cases}
    for op, dtype in cases:
        corners = CORNERS if dtype is DType.FP32 else INTEGER_CORNERS
        grid = [g.ravel() for g in np.meshgrid(corners, corners)]
        if dtype is DType.FP32:
            others = near(rng, count)
        else:
            sizes = rng.integers(0, 32, (2, count), np.uint32)
            one, other = rng.integers(0, 1 << 32, (2, count), np.uint32) >> sizes
            others = one, np.where(rng.random(count) < 0.5, other, -other)
        a, b = (
            np.concatenate([g, random_words(rng, count // 2), x])
            for g, x in zip(grid, others, strict=True)
        )
        pad = -len(a) % COPIES
        a, b = np.pad(a, (0, pad)), np.pad(b, (0, pad))
        dut.op.value, dut.dtype.value = op.value, dtype.value
        wanted = arithmetic.alu(op, a, b, dtype)
        for first in range(0, len(a), COPIES):
            chunk = slice(first, first + COPIES)
            await FallingEdge(dut.clk)
            dut.a.value, dut.b.value = pack(a[chunk]), pack(b[chunk])
            dut.start.value, dut.step.value = 1, 1
            steps = 0
            while True:
                await FallingEdge(dut.clk)
                steps += int(dut.step.value)
                dut.start.value = 0
                if dut.busy.value == 0:
                    break
                dut.step.value = int(rng.random() < 0.95)
                # This one counts in the cycle of `start` alone.
                dut.a.value = 0
            got = unpack(dut.o, np.uint32, COPIES)
            wrong = np.flatnonzero(got != wanted[chunk])
            assert not len(wrong), (
                f"{op.name} {dtype.name} of {a[chunk][wrong[0]]:08x} and "
                f"{b[chunk][wrong[0]]:08x}: got {got[wrong[0]]:08x}, wanted "
                f"{wanted[chunk][wrong[0]]:08x}; {len(wrong)} of {COPIES} wrong"
            )
            fields = np.concatenate([a[chunk], b[chunk]]) >> 23 & 0xFF
            limit = DIVIDE_INTEGER_CYCLES
            if dtype is DType.FP32:
                limit = DIVIDE_CYCLES[op]
                if op is not AluOp.MOD and (fields == 0).any():
                    limit += DIVIDE_SUBNORMAL_CYCLES
                else:
                    longest[op, dtype] = max(longest[op, dtype], steps)
            if dtype is DType.FP32 and op is AluOp.MOD:
                assert steps == modulo_cycles(a[chunk], b[chunk], wanted[chunk])
                longest[op, dtype] = max(longest[op, dtype], steps)
            assert steps <= limit, f"{op.name} {dtype.name}: {steps} cycles"
            if dtype is not DType.FP32:
                assert steps == limit
            compared += COPIES
    for op, cycles in DIVIDE_CYCLES.items():
        assert longest[op, DType.FP32] == cycles, f"{op.name}: {longest[op, DType.FP32]} cycles"
    cocotb.log.info("compared %d results", compared)
