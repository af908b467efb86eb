"""The vector engine against golden: random instructions, special values, stalls, cycle counts."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Shape
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge
from systolith.golden.checker import operand_counts
from systolith.golden.core import Core
from systolith_hdl.arith import CONVERT_LATENCY
from systolith_hdl.arith.divide import (
    DIVIDE_CYCLES,
    DIVIDE_INTEGER_CYCLES,
    DIVIDE_SUBNORMAL_CYCLES,
)
from systolith_hdl.config import get_config
from systolith_hdl.formats import INTEGERS, WORDS, DType
from systolith_hdl.isa import (
    DIVISIONS,
    FIELDS,
    OPERATION_TYPES,
    SPECS,
    AluOp,
    EngineKind,
    Opcode,
    Rounding,
    Space,
    decode,
    encode,
    legal_operations,
)
from systolith_hdl.vector.engine import (
    FIXED_CYCLES,
    REDUCE_CYCLES,
    STATISTICS_CYCLES,
    fixed_cycles,
)
from systolith_hdl.vector.lane import LOOP_LATENCY

from .memory import MemoryModel
from .stimulus import (
    CORNERS,
    INTEGER_CORNERS,
    operand_fields,
    random_counter,
    random_counts,
    random_words,
)

CONFIG = get_config(os.environ.get("SYSTOLITH_BENCH_CONFIG", "nano"))
N = CONFIG.lanes
READS = ("src0_sbuf", "src1_sbuf")
PSUM_READS = ("src0_psum", "src1_psum")


class Bench:
    """The engine, its memories and a golden core that starts from the same words."""

    def __init__(self, dut: Any, stall: float) -> None:
        self.dut = dut
        rng = np.random.default_rng(random.getrandbits(32))
        self.golden = Core(CONFIG, np.zeros(1 << 20, np.uint8))
        self.golden.sbuf[:] = random_words(rng, self.golden.sbuf.shape)
        self.golden.psum[:] = random_words(rng, self.golden.psum.shape)
        for memory in (self.golden.sbuf, self.golden.psum):  # bounds of RANGE_SELECT, for one
            small = rng.integers(-3, 20, memory.shape).astype(np.int32).view(np.uint32)
            memory[:] = np.where(rng.random(memory.shape) < 0.1, small, memory)
        self.sbuf = MemoryModel(
            dut, self.golden.sbuf.copy(), reads=list(READS), writes=["dst_sbuf"], stall=stall
        )
        self.psum = MemoryModel(
            dut, self.golden.psum.copy(), reads=list(PSUM_READS), writes=["dst_psum"], stall=stall
        )
        self.done = 0

    async def reset(self) -> None:
        Clock(self.dut.clk, 10, unit="ns").start()
        self.dut.issue__instruction__valid.value = 0
        self.dut.rst.value = 1
        await ClockCycles(self.dut.clk, 3)
        self.dut.rst.value = 0

    async def run(self, instructions: list[bytes], idle: float = 0.0) -> list[int]:
        """Issues instructions one after the other, with a random seed and counters; returns the
        cycles each took, from being taken to `done`."""
        dut = self.dut
        counters = [random_counter() for _ in instructions]
        queue = list(zip(instructions, counters, strict=True))
        self.golden.seed = random.getrandbits(32)
        dut.issue__seed.value = self.golden.seed
        taken: list[int] = []
        took: list[int] = []
        cycle = 0
        while len(took) < len(instructions):
            offer = bool(queue) and random.random() >= idle
            dut.issue__instruction__valid.value = int(offer)
            if offer:
                raw, counter = queue[0]
                dut.issue__instruction__payload.value = int.from_bytes(raw, "little")
                dut.issue__counter.value = counter
            else:
                dut.issue__counter.value = random.getrandbits(32)
            await RisingEdge(dut.clk)
            cycle += 1
            if dut.issue__done.value == 1:
                took.append(cycle - taken[len(took)])
            if offer and dut.issue__instruction__ready.value == 1:
                taken.append(cycle)
                queue.pop(0)
        dut.issue__instruction__valid.value = 0
        for _ in range(20):
            await RisingEdge(dut.clk)
            assert dut.issue__done.value == 0, "more instructions done than were issued"
        assert dut.issue__busy.value == 0
        for raw, counter in zip(instructions, counters, strict=True):
            fault = self.golden.execute(raw, "vector", counter=counter)
            assert fault is None, f"golden faults: {fault}"
        self.done += len(instructions)
        return took

    def compare(self) -> None:
        for name, mine, golden in (
            ("SBUF", self.sbuf.words, self.golden.sbuf),
            ("PSUM", self.psum.words, self.golden.psum),
        ):
            wrong = np.argwhere(mine != golden)
            if len(wrong):
                lane, word = wrong[0]
                raise AssertionError(
                    f"{name}[{lane}, {word}] is {mine[lane, word]:#010x}, golden "
                    f"{golden[lane, word]:#010x}; {len(wrong)} words differ"
                )


OPCODES = [opcode for opcode, spec in SPECS.items() if spec.kind is EngineKind.VECTOR]


def random_number(shape: Any) -> int:
    """A number that a field holds: small or any."""
    cast = Shape.cast(shape)
    low = -(1 << cast.width - 1) if cast.signed else 0
    high = low + (1 << cast.width) - 1
    return random.choice((0, random.randint(max(low, -9), min(9, high)), random.randint(low, high)))


def random_instruction() -> bytes:
    """A legal vector instruction whose destination does not overlap its sources."""
    opcode = random.choice(OPCODES)
    spec = SPECS[opcode]
    counts = random_counts(60)
    fields: dict[str, Any] = {f"counts.{d}": counts[d] for d in range(4)}
    fields["lanes"] = random.randint(1, N)
    for name, limit in spec.limits.items():
        least, most = limit(fields.__getitem__, CONFIG)
        fields[name] = random.randint(least, most) if most < 60 else max(least, fields[name])
    half, psum_half = CONFIG.sbuf_depth // 2, CONFIG.psum_depth // 2
    sources = {Space.SBUF: (half, 2 * half), Space.PSUM: (psum_half, 2 * psum_half)}
    targets = {Space.SBUF: (0, half), Space.PSUM: (0, psum_half)}
    regions = {name: sources for name in spec.operands} | {"dst": targets}
    for name in spec.operands:
        walked = operand_counts(opcode, name, fields)
        found = operand_fields(CONFIG, name, walked, regions=regions[name], nested=name == "dst")
        fields |= {field: value for field, value in found.items() if field in FIELDS[opcode]}
        types = sorted(spec.operands[name][1], key=lambda dtype: dtype.value)
        fields[f"{name}.dtype"] = random.choice([*types, types[0]])
    computes = fields.get("src0.dtype", DType.FP32)
    fields |= {f"{name}.dtype": computes for name in spec.alike}
    rng = np.random.default_rng(random.getrandbits(32))
    for name, (_, shape) in FIELDS[opcode].items():
        if name in ("op0", "op1"):
            legal = sorted(legal_operations(opcode, name, CONFIG))
            legal = [code for code in legal if computes in OPERATION_TYPES.get(AluOp(code), WORDS)]
            fields[name] = random.choice(legal)
        elif name == "rounding":
            fields[name] = random.choice(list(Rounding))
        elif name.startswith("imm"):
            fields[name] = int(random_words(rng, (1,))[0])
        elif name not in fields and name.partition(".")[0] not in ("opcode", "signal", "wait"):
            fields[name] = random_number(shape)
    return encode(opcode, fields)


def division(raw: bytes) -> int:
    """Most cycles that each column takes in the divider; 0 if the instruction does not divide."""
    _, fields = decode(raw)
    operation = AluOp(fields.get("op1", 0))
    if operation not in DIVISIONS:
        return 0
    if DType(fields["src0.dtype"]) is not DType.FP32:
        return DIVIDE_INTEGER_CYCLES
    return DIVIDE_CYCLES[operation] + DIVIDE_SUBNORMAL_CYCLES


def convert_cycles(raw: bytes) -> int:
    """Cycles that an instruction takes to convert its results, if it does."""
    _, fields = decode(raw)
    dst = DType(fields["dst.dtype"])
    computes = DType(fields["src0.dtype"]) if "src0.dtype" in fields else dst
    integer = computes in INTEGERS
    return CONVERT_LATENCY * (integer != (dst in INTEGERS) or dst is DType.INT8)


async def random_instructions(dut: Any, count: int, stall: float, idle: float) -> None:
    bench = Bench(dut, stall)
    await bench.reset()
    for _ in range(count // 10):
        await bench.run([random_instruction() for _ in range(10)], idle)
        bench.compare()
    assert bench.done == count
    assert bench.sbuf.writes_done + bench.psum.writes_done > count


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def without_stalls(dut: Any) -> None:
    await random_instructions(dut, 300, 0.0, 0.0)


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def with_idle(dut: Any) -> None:
    await random_instructions(dut, 100, 0.0, 0.9)


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def with_stalls(dut: Any) -> None:
    await random_instructions(dut, 150, 0.4, 0.3)


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def sums_of_plain_numbers(dut: Any) -> None:
    """Numbers of one size, of which each order of additions has another sum, with stalls."""
    bench = Bench(dut, 0.3)
    await bench.reset()
    half = CONFIG.sbuf_depth // 2
    numbers = np.random.default_rng(random.getrandbits(32)).standard_normal((N, half))
    for words in (bench.sbuf.words, bench.golden.sbuf):
        words[:, half : 2 * half] = numbers.astype(np.float32).view(np.uint32)
    for length in range(1, 30):
        fields = {
            "counts.0": 1, "counts.1": 1, "counts.2": 3, "counts.3": length, "lanes": N,
            "src0.base": half, "src0.strides.2": length, "src0.strides.3": 1,
            "dst.strides.2": 2,
        }  # fmt: skip
        reduce = encode(Opcode.REDUCE, {**fields, "op1": AluOp.ADD})
        statistics = encode(Opcode.STATISTICS, {**fields, "dst.base": 6, "dst.strides.3": 1})
        await bench.run([reduce, statistics], 0.2)
        bench.compare()


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def every_operation_on_every_pair_of_corners(dut: Any) -> None:
    bench = Bench(dut, 0.0)
    await bench.reset()
    for dtype in WORDS:
        corners = CORNERS if dtype is DType.FP32 else INTEGER_CORNERS
        # A pair in each lane.
        columns = -(-(len(corners) ** 2) // N)
        a, b = (
            np.resize(x.ravel(), columns * N).reshape(N, columns)
            for x in np.meshgrid(corners, corners)
        )
        for words in (bench.sbuf.words, bench.golden.sbuf):
            words[:, :columns] = a
            words[:, columns : 2 * columns] = b
        for op in AluOp:
            if dtype not in OPERATION_TYPES.get(op, WORDS):
                continue
            fields = {
                "counts.0": 1, "counts.1": 1, "counts.2": 1, "counts.3": columns, "lanes": N,
                "src0.strides.3": 1, "src0.dtype": dtype,
                "src1.base": columns, "src1.strides.3": 1, "src1.dtype": dtype,
                "dst.base": 2 * columns, "dst.strides.3": 1, "dst.dtype": dtype,
                "op1": op,
            }  # fmt: skip
            await bench.run([encode(Opcode.TENSOR_TENSOR, fields)])
            bench.compare()


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def cycles(dut: Any) -> None:
    """The latencies the engine states, without stalls."""
    bench = Bench(dut, 0.0)
    await bench.reset()
    compared = set()
    for _ in range(250):
        raw = random_instruction()
        word = int.from_bytes(raw, "little")
        counts = [word >> (128 + 16 * d) & 0xFFFF for d in range(4)]
        (took,) = await bench.run([raw])
        opcode = Opcode(word & 0xFF)
        columns = math.prod(counts)
        took -= convert_cycles(raw)
        fixed = fixed_cycles(opcode, CONFIG)
        rows = columns // counts[3]
        if opcode is Opcode.REDUCE:
            assert took <= columns + FIXED_CYCLES + rows * REDUCE_CYCLES
            continue
        if division(raw):
            assert took <= columns * (1 + division(raw)) + fixed
            continue
        if opcode is Opcode.SCAN:
            columns = LOOP_LATENCY * (rows - 1) + counts[3]
        elif opcode is Opcode.STATISTICS:
            columns = 2 * columns + STATISTICS_CYCLES * rows
        elif opcode is Opcode.TOP:
            columns += 2 * decode(raw)[1]["kept"] * rows
        elif opcode is Opcode.TRANSPOSE:
            turned = decode(raw)[1]["lanes"]
            columns = counts[3] + (rows - 1) * max(counts[3], turned) + turned + 1
        if "src0" not in SPECS[opcode].operands:
            assert took <= columns + fixed
        else:
            assert took == columns + fixed, f"{opcode.name}: {took} cycles for {columns} columns"
            compared.add(opcode)
    assert len(compared) == sum("src0" in SPECS[opcode].operands for opcode in OPCODES) - 1
    bench.compare()
