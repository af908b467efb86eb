"""Benches of the scalar engine: the lane alone, and the engine between banked memories."""

import os
import random
from collections import deque

import cocotb
import numpy as np
from amaranth.hdl import Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge
from systolith.golden import arithmetic
from systolith.golden.activation import evaluate
from systolith_hdl.banked import BankedMemory
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.emit import Once
from systolith_hdl.formats import DType
from systolith_hdl.isa import INSTRUCTION_BITS, Function, Opcode, Space, encode
from systolith_hdl.ports import IssuePort, ReadPort, WritePort
from systolith_hdl.scalar import tables as T
from systolith_hdl.scalar.engine import FIXED_CYCLES, ScalarEngine
from systolith_hdl.scalar.lane import LANE_LATENCY, ScalarLane

#: Lanes of the lane bench: this many vectors in a cycle.
COPIES = 4

_ONE = 0x3F800000
#: Bit patterns of the corners, signs apart: zero, subnormals, binades around one and two, the
#: limits of every function's domain and their neighbours, infinity and NaNs.
_MAGNITUDES = [
    *(0x00000000, 0x00000001, 0x00000002, 0x00000003, 0x00200000, 0x00400000, 0x007FFFFF),
    *(0x00800000, 0x00800001, 0x00FFFFFF, 0x7E800000, 0x7EFFFFFF, 0x7F000000, 0x7F7FFFFF),
    *(0x3E800000, 0x3EFFFFFF, 0x3F000000, 0x3F000001, 0x3F7FFFFF, 0x3F800000, 0x3F800001),
    *(0x3FFFFFFF, 0x40000000, 0x3F407568, 0x3F407569, 0x3F40756A, 0x3F40756B, 0x3F40756C),
    *(0x42B17217, 0x42B17218, 0x42CFF1B4, 0x42CFF1B5, 0x42AEAC4F, 0x42AEAC50, 0x41102CB3),
    *(0x40000001, 0x40B00000, 0x41600000, 0x41633333, 0x41800000, 0x42800000, 0x43000000),
    *(0x32FFFFFF, 0x33000000, 0x33800000, 0x34000000, 0x7F800000, 0x7F800001, 0x7FC00000),
    0x7FFFFFFF,
]
CORNERS = np.array([m | s for m in _MAGNITUDES for s in (0, 1 << 31)], np.uint32)


def random_words(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random FP32 words: uniform bits, the binades where functions bend, and corners."""
    uniform = rng.integers(0, 1 << 32, count, dtype=np.uint32)
    middle = (rng.integers(100, 136, count, dtype=np.uint32) << 23) | (uniform & 0x807FFFFF)
    near = (rng.integers(124, 131, count, dtype=np.uint32) << 23) | (uniform & 0x807FFFFF)
    low = (rng.integers(0, 4, count, dtype=np.uint32) << 23) | (uniform & 0x807FFFFF)
    center = rng.choice(np.array([0x3F800000, 0x3F40756A], np.uint32), count)
    close = (center + (uniform >> 8 & 0x1FFF) - 0x1000) | (uniform & 1 << 31)
    kinds = [uniform, middle, near, near, low, close, rng.choice(CORNERS, count)]
    return np.choose(rng.integers(0, len(kinds), count), kinds).astype(np.uint32)


def reference(
    function: Function, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, *, bf16: bool
) -> np.ndarray:
    """What an element comes to, from golden arithmetic."""
    y = arithmetic.add(arithmetic.mul(x, scale), bias)
    result = evaluate(function, y)
    return arithmetic.round_bf16(result) if bf16 else result


def _pack(words: np.ndarray) -> int:
    return int.from_bytes(words.astype("<u4").tobytes(), "little")


def _unpack(handle: object, count: int) -> np.ndarray:
    value = int(handle.value)  # type: ignore[attr-defined]
    return np.frombuffer(value.to_bytes(4 * count, "little"), "<u4")


class LaneBench(wiring.Component):
    """`COPIES` lanes side by side; members as those of `ScalarLane`, one word for each copy."""

    en: In(1)
    control: In(T.CONTROL)
    bf16: In(1)
    x: In(data.ArrayLayout(unsigned(32), COPIES))
    scale: In(data.ArrayLayout(unsigned(32), COPIES))
    bias: In(data.ArrayLayout(unsigned(32), COPIES))
    o: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for i in range(COPIES):
            m.submodules += (cell := Once(ScalarLane(), "scalar_lane"))
            m.d.comb += [
                cell.en.eq(self.en),
                cell.control.eq(self.control),
                cell.bf16.eq(self.bf16),
                cell.x.eq(self.x[i]),
                cell.scale.eq(self.scale[i]),
                cell.bias.eq(self.bias[i]),
                self.o[i].eq(cell.o),
            ]
        return m


@cocotb.test(timeout_time=100, timeout_unit="ms")
async def lane(dut) -> None:
    """Every function on $SYSTOLITH_VECTORS random words each and all corners, `en` going low at
    random. Most have scale 1 and bias -0, so that y is the word itself."""
    rng = np.random.default_rng(random.getrandbits(32))
    count = int(os.environ.get("SYSTOLITH_VECTORS", "16384"))
    Clock(dut.clk, 10, unit="ns").start()
    dut.rst.value = 0
    compared = 0
    for function in Function:
        x = np.concatenate([CORNERS, random_words(rng, count)])
        x = np.pad(x, (0, -len(x) % COPIES))
        plain = rng.integers(0, 4, len(x)) != 0
        plain[: len(CORNERS)] = True
        scale = np.where(plain, _ONE, random_words(rng, len(x))).astype(np.uint32)
        bias = np.where(plain, 1 << 31, random_words(rng, len(x))).astype(np.uint32)
        bf16 = random.random() < 0.25
        dut.control.value = T.tables().controls[function]
        dut.bf16.value = bf16

        got: list[np.ndarray] = []
        pipeline: deque[bool] = deque([False] * LANE_LATENCY)
        sent, batches = 0, len(x) // COPIES
        while len(got) < batches:
            await FallingEdge(dut.clk)
            enable = random.random() < 0.9
            dut.en.value = enable
            if not enable:
                continue
            if pipeline.popleft():
                got.append(_unpack(dut.o, COPIES))
            pipeline.append(sent < batches)
            if sent < batches:
                chunk = slice(sent * COPIES, (sent + 1) * COPIES)
                dut.x.value = _pack(x[chunk])
                dut.scale.value = _pack(scale[chunk])
                dut.bias.value = _pack(bias[chunk])
            sent += 1
        result = np.concatenate(got)
        wanted = reference(function, x, scale, bias, bf16=bf16)
        wrong = np.flatnonzero(result != wanted)
        assert not len(wrong), (
            f"{function.name}: {len(wrong)} of {len(x)} wrong, first x={x[wrong[0]]:08x} "
            f"scale={scale[wrong[0]]:08x} bias={bias[wrong[0]]:08x}: got "
            f"{result[wrong[0]]:08x}, wanted {wanted[wrong[0]]:08x}"
        )
        compared += len(x)
    assert compared > len(Function) * count
    cocotb.log.info("compared %d elements", compared)
