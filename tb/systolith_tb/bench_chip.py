"""The whole chip, the driver over cocotbext-axi: random kernels against golden, faults, reset."""

from __future__ import annotations

import random
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from systolith.errors import DeviceFault, DeviceTimeout
from systolith.golden import arithmetic
from systolith.golden.device import GoldenDevice
from systolith.kernel import KernelBuilder, Table, View
from systolith.program import Program
from systolith.runtime.driver import Driver
from systolith_hdl.config import get_config
from systolith_hdl.formats import FLOATS, INTEGERS, NARROW_FLOATS, WORDS, DType
from systolith_hdl.isa import (
    DIVISIONS,
    OPERATION_TYPES,
    REDUCTIONS,
    AluOp,
    Function,
    Rounding,
    WaitMode,
)

from .device import CocotbBackend, run_driver
from .stimulus import random_table, random_words

CONFIG = get_config("nano")
N = CONFIG.lanes
#: operations of the first ALU, and of the second those that every type has
FIRST = sorted(set(AluOp) - DIVISIONS, key=lambda op: op.value)
SECOND = sorted(set(AluOp) - set(OPERATION_TYPES), key=lambda op: op.value)


def random_kernel(seed: int) -> Program:
    """A kernel that uses every engine: loads, matmuls, vector and scalar work, stores."""
    rng = random.Random(seed)
    nc = KernelBuilder(CONFIG, name=f"random{seed}")
    k, m, f = (rng.randint(1, 3 * N) for _ in range(3))
    types = (*FLOATS, *INTEGERS)
    w = nc.dram.tensor("w", (k, m), rng.choice(types), kind="input")
    x = nc.dram.tensor("x", (k, f), rng.choice(types), kind="input")

    def rounded(view: View) -> tuple[View, Rounding]:
        """A destination of a random type, and how it is rounded."""
        dtype = rng.choice([*FLOATS, *NARROW_FLOATS])
        stochastic = dtype is not DType.FP32 and rng.random() < 0.6
        return view.astype(dtype), Rounding.STOCHASTIC if stochastic else Rounding.NEAREST

    outputs = [nc.dram.tensor(f"y{i}", (m, f), rng.choice(types), kind="output") for i in range(4)]
    words = random_table(np.random.default_rng(seed), 16)
    Table("random", words, 16, 0.0, 0.0, 0.0).load(nc)  # CUSTOM is among the functions
    tiles_k = [(i, min(N, k - i)) for i in range(0, k, N)]
    tiles_m = [(i, min(N, m - i)) for i in range(0, m, N)]
    loaded = []
    for start, lanes in tiles_k:
        row = {}
        for name, tensor, columns in (("w", w, m), ("x", x, f)):
            tile = nc.sbuf.tile(columns)
            e = tensor.itemsize
            nc.dma.load(
                tile.view((columns,), lanes=lanes), tensor, start * columns * e, (e,), columns * e
            )
            row[name] = tile
        loaded.append((row, lanes))
    for start, lanes in tiles_m:
        acc = nc.psum.tile(f)
        for index, (row, rows) in enumerate(loaded):
            stationary = row["w"].view((lanes,), offset=start, lanes=rows)
            moving = row["x"].view((f,), lanes=rows)
            operands = (*NARROW_FLOATS, DType.INT8, DType.INT8)
            nc.tensor.load_stationary(stationary.astype(rng.choice(operands)))
            dtype = rng.choice(operands)
            integer = dtype is DType.INT8 and rng.random() < 0.7
            sums = acc.view((f,), lanes=lanes).astype(DType.INT32 if integer else DType.FP32)
            nc.tensor.matmul(sums, moving.astype(dtype), index > 0)
        tiles = [nc.sbuf.tile(f + 1) for _ in outputs]
        results = [tile.view((f,), lanes=lanes) for tile in tiles]
        sums = acc.view((f,), lanes=lanes)
        dst, rounding = rounded(results[0])
        nc.scalar.activate(
            dst, sums, rng.choice(list(Function)), scale=rng.uniform(-2, 2),
            bias=rng.uniform(-1, 1), rounding=rounding,
        )  # fmt: skip
        dst, rounding = rounded(results[1])
        nc.vector.tensor_tensor(
            dst, sums, rng.choice(SECOND), results[0], op0=rng.choice(FIRST),
            imm0=rng.uniform(-2, 2), rounding=rounding,
        )  # fmt: skip
        nc.vector.copy(results[3], sums)  # bit for bit, integers or not
        computes = rng.choice(WORDS)
        nc.vector.tensor_tensor(
            results[3].astype(rng.choice(WORDS)), sums.astype(computes), rng.choice(SECOND),
            results[0].astype(computes), op0=rng.choice(FIRST), imm0=rng.randint(0, 40),
        )  # fmt: skip
        nc.vector.scalar_tensor_tensor(
            results[3].astype(rng.choice(WORDS)), results[3].astype(computes), rng.choice(FIRST),
            results[1][:1].astype(computes), rng.choice(SECOND), sums.astype(computes),
        )  # fmt: skip
        dst, rounding = rounded(results[2])
        nc.vector.memset(dst, rng.uniform(-1, 1), rounding=rounding)
        nc.vector.copy_predicated(dst, results[0], results[1], rounding=rounding)
        total = nc.sbuf.tile(3)
        most, least, scale = (total.view((1,), offset=i, lanes=lanes) for i in range(3))
        dst, rounding = rounded(most)
        nc.vector.reduce(dst, results[1], rng.choice(list(REDUCTIONS)), rounding=rounding)
        dst, rounding = rounded(scale)
        nc.scalar.activate(
            dst, results[2], rng.choice(list(Function)), results[1], 0.5,
            rounding=rounding, sums="only",
        )  # fmt: skip
        dst, rounding = rounded(tiles[0].view((f + 1,), lanes=lanes))
        nc.scalar.activate(
            dst, results[2], Function.IDENTITY, scale, most, rounding=rounding, sums="behind"
        )
        nc.scalar.activate(least, tiles[0].view((1,), offset=f, lanes=lanes), Function.ABS)
        nc.vector.tensor_tensor(results[0], results[0], AluOp.ADD, least)
        for tensor, result in zip(outputs, results, strict=True):
            e = tensor.itemsize
            stochastic = tensor.dtype in NARROW_FLOATS and rng.random() < 0.6
            nc.dma.store(
                result, tensor, start * f * e, (e,), f * e,
                rounding=Rounding.STOCHASTIC if stochastic else Rounding.NEAREST,
            )  # fmt: skip
        nc.psum.free(acc)
        for tile in (*tiles, total):
            nc.sbuf.free(tile)
    return nc.finish()


def run_on(driver: Driver, program: Program, seed: int) -> dict[str, Any]:
    """Runs a program on random inputs; returns its outputs, and the counters without time."""
    rng = np.random.default_rng(seed)
    loaded = driver.load(program)
    for tensor in (loaded.tensors["w"], loaded.tensors["x"]):
        words = random_words(rng, tensor.shape)
        # Mostly plain numbers: a NaN in every column would hide everything else.
        plain = rng.standard_normal(tensor.shape).astype(np.float32).view(np.uint32)
        words = np.where(rng.random(tensor.shape) < 0.05, words, plain)
        raw = arithmetic.pack(words, tensor.dtype)
        area = driver.backend.dram[tensor.address : tensor.address + tensor.nbytes]
        area[:] = np.frombuffer(raw.tobytes(), np.uint8)
    counters = driver.run(loaded)
    found: dict[str, Any] = {
        name: driver.backend.dram[t.address : t.address + t.nbytes].copy()
        for name, t in loaded.tensors.items()
    }
    found["instructions"] = counters.instructions
    found["macs"] = counters.macs
    if counters.cycles:
        assert max(counters.busy.values()) <= counters.cycles
        assert min(counters.busy["tensor"], counters.busy["dma0"]) > 0
    loaded.unload()
    return found


async def random_kernels(dut: Any, *, pause: float, count: int) -> None:
    backend = CocotbBackend(dut, CONFIG, pause=pause)
    await backend.start()
    rounding_seed = random.getrandbits(32)
    golden = Driver(GoldenDevice("nano"), seed=rounding_seed)

    def body() -> int:
        driver = Driver(backend, seed=rounding_seed)
        compared = 0
        for _ in range(count):
            seed = random.getrandbits(32)
            program = random_kernel(seed)
            mine, expected = run_on(driver, program, seed), run_on(golden, program, seed)
            assert mine.keys() == expected.keys()
            for name, value in expected.items():
                same = np.array_equal(mine[name], value) if isinstance(value, np.ndarray) else (
                    mine[name] == value
                )  # fmt: skip
                assert same, f"kernel {seed}: {name} differs from golden"
                compared += 1
        return compared

    assert await run_driver(body) == 9 * count


@cocotb.test(timeout_time=50, timeout_unit="ms")
async def kernels_without_stalls(dut: Any) -> None:
    await random_kernels(dut, pause=0.0, count=3)


@cocotb.test(timeout_time=50, timeout_unit="ms")
async def kernels_with_stalls(dut: Any) -> None:
    await random_kernels(dut, pause=0.3, count=3)


def broken_kernel(kind: str) -> Program:
    """A small kernel that faults, made by changing one that does not."""
    nc = KernelBuilder(CONFIG, name=kind)
    x = nc.dram.tensor("x", (N, 8), DType.FP32, kind="input")
    y = nc.dram.tensor("y", (N, 8), DType.FP32, kind="output")
    tile = nc.sbuf.tile(8)
    nc.dma.load(tile.view((8,)), x, 0, (4,), 32)
    nc.vector.tensor_scalar(tile.view((8,)), tile.view((8,)), AluOp.ADD, 1.0)
    nc.dma.store(tile.view((8,)), y, 0, (4,), 32)
    broken: dict[str, tuple[str, dict[str, Any]]] = {
        "deadlock": (
            "vector",
            {"wait.0.sem": 15, "wait.0.mode": WaitMode.AT_LEAST, "wait.0.value": 9},
        ),
        "bounds": ("vector", {"src0.base": CONFIG.sbuf_depth - 3}),
        "dram": ("dma0", {"dram_strides.3": 1 << 28}),
    }
    engine, changes = broken[kind]
    return nc.finish().with_fields(engine, 0, changes)


@cocotb.test(timeout_time=50, timeout_unit="ms")
async def faults_leave_the_device_usable(dut: Any) -> None:
    backend = CocotbBackend(dut, CONFIG)
    await backend.start()

    def body() -> int:
        driver = Driver(backend, watchdog=3000)
        golden = Driver(GoldenDevice("nano"), watchdog=3000)
        seen = 0
        for kind, cause in (
            ("deadlock", "WATCHDOG"),
            ("bounds", "OUT_OF_BOUNDS"),
            ("dram", "AXI_READ_ERROR"),
        ):
            records = []
            for device in (driver, golden):
                loaded = device.load(broken_kernel(kind))
                try:
                    device.run(loaded, timeout=100_000)
                except DeviceFault as fault:
                    assert fault.cause == cause
                    assert fault.instruction is not None
                    records.append((fault.engine, fault.pc, fault.cause, fault.address))
                loaded.unload()
                seed = random.getrandbits(32)
                run_on(device, random_kernel(seed), seed)
            assert len(records) == 2, f"{kind} did not fault on both"
            assert records[0] == records[1], f"{kind}: {records}"
            seen += 1
        loaded = driver.load(broken_kernel("deadlock"))
        driver._write("WATCHDOG", 0)
        try:
            driver.run(loaded, timeout=2000)
        except DeviceTimeout:
            seen += 1
        loaded.unload()
        seed = random.getrandbits(32)
        assert run_on(driver, random_kernel(seed), seed)["macs"] > 0
        return seen

    assert await run_driver(body) == 4


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def host_port_refuses_what_it_does_not_have(dut: Any) -> None:
    backend = CocotbBackend(dut, CONFIG)
    await backend.start()
    host = backend._host
    assert (await host.read(0xFFC, 4)).resp == 2
    assert (await host.write(0x000, b"\0\0\0\0")).resp == 2
    assert (await host.read(0x000, 4)).resp == 0
    for _ in range(10):
        await RisingEdge(dut.clk)
        assert dut.irq.value == 0
