"""Loops of kernels: one copy of the instructions, affine addresses, ends that depend on data."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest
from systolith.errors import DeviceFault, KernelError, RaceError
from systolith.golden import GoldenDevice
from systolith.kernel import AluOp, DType, KernelBuilder, View
from systolith.program import Program, Relocation
from systolith.runtime.driver import Counters, Driver
from systolith.runtime.rtl import RtlBackend
from systolith_hdl.config import PRESETS
from systolith_hdl.isa import Function, Opcode, decode, encode

NANO = PRESETS["nano"]
N = NANO.lanes
F32 = DType.FP32


@pytest.fixture(scope="module", params=["golden", "rtl"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    if request.param == "rtl":
        backend: RtlBackend | GoldenDevice = RtlBackend(NANO)
    else:
        backend = GoldenDevice(NANO, check=True, scheduler=random.Random(1))
    with Driver(backend, watchdog=5000) as driver:
        yield driver


def run(driver: Driver, program: Program, **inputs: np.ndarray) -> tuple[np.ndarray, Counters]:
    """Output y of a program."""
    loaded = driver.load(program)
    for name, value in inputs.items():
        driver.write(loaded.tensors[name], value)
    counters = driver.run(loaded)
    y = driver.read(loaded.tensors["y"])
    loaded.unload()
    return y, counters


def instructions(program: Program) -> int:
    return sum(program.count(engine) for engine in program.streams)


def gemm(tiles_m: int, tiles_k: int, tiles_f: int, width: int = 8) -> Program:
    """y = w.T @ x in three nested loops."""
    nc = KernelBuilder(NANO, name="gemm")
    m, k, f = tiles_m * N, tiles_k * N, tiles_f * width
    w = nc.dram.tensor("w", (k, m), F32)
    x = nc.dram.tensor("x", (k, f), F32)
    y = nc.dram.tensor("y", (m, f), F32, kind="output")
    stationary, moving, out = nc.sbuf.tile(N), nc.sbuf.tile(width), nc.sbuf.tile(width)
    sums = nc.psum.tile(width)
    with nc.loop(tiles_m, name="m") as i, nc.loop(tiles_f, name="f") as j:
        nc.vector.memset(sums.view(), 0.0)
        with nc.loop(tiles_k, name="k") as step:
            row = 4 * N * step
            nc.dma.load(stationary.view(), w, row * m + 4 * N * i, (4,), 4 * m)
            nc.dma.load(moving.view(), x, row * f + 4 * width * j, (4,), 4 * f)
            nc.tensor.load_stationary(stationary.view().astype(DType.BF16))
            nc.tensor.matmul(sums.view(), moving.view().astype(DType.BF16), accumulate=True)
        nc.vector.copy(out.view(), sums.view())
        nc.dma.store(out.view(), y, 4 * N * f * i + 4 * width * j, (4,), 4 * f)
    return nc.finish()


@pytest.mark.parametrize("tiles", [(1, 1, 1), (2, 1, 3), (3, 5, 2)])
def test_matmul(driver: Driver, tiles: tuple[int, int, int]) -> None:
    """Three nested loops on four engines give the product."""
    rng = np.random.default_rng(sum(tiles))
    program = gemm(*tiles)
    w = rng.integers(-4, 5, (tiles[1] * N, tiles[0] * N)).astype(np.float32)
    x = rng.integers(-4, 5, (tiles[1] * N, tiles[2] * 8)).astype(np.float32)
    y, counters = run(driver, program, w=w, x=x)
    assert np.array_equal(y, w.T @ x)
    assert counters.macs == w.size * x.shape[1]


def test_size_does_not_depend_on_counts() -> None:
    """A program of a thousand tiles has as many instructions as one of a single tile."""
    assert instructions(gemm(1, 1, 1)) == instructions(gemm(10, 10, 10)) < 80


def test_views_step(driver: Driver) -> None:
    """Tiles indexed by loop indices, in place, forwards and backwards, sharing registers."""
    nc = KernelBuilder(NANO)
    x = nc.dram.tensor("x", (6, 4, N), F32)
    y = nc.dram.tensor("y", (6, 4, N), F32, kind="output")
    tile, back = nc.sbuf.tile(24), nc.sbuf.tile(24)
    nc.dma.load(tile.view(), x, 0, (4 * N,), 4)
    rows = tile.view((6, 4))
    with nc.loop(6) as i:
        nc.vector.tensor_scalar(rows[i], rows[i], AluOp.ADD, 1.0)
        nc.scalar.activate(back.view((6, 4))[5 - i], rows[i], Function.IDENTITY, scale=2.0)
        with nc.loop(2) as j:
            half = back.view((2,), offset=20 - 4 * i + 2 * j)
            nc.vector.tensor_scalar(half, half, AluOp.MUL, 3.0)
    with nc.loop(3):
        nc.vector.tensor_scalar(back.view(), back.view(), AluOp.ADD, 1.0)
    nc.dma.store(back.view(), y, 0, (4 * N,), 4)
    given = np.arange(6 * 4 * N, dtype=np.float32).reshape(6, 4, N)
    got, _ = run(driver, nc.finish(), x=given)
    assert np.array_equal(got, (given[::-1] + 1) * 6 + 3)


def test_a_loop_that_data_ends(driver: Driver) -> None:
    """Each lane halves until all are below one: as often as the largest needs, and no further."""
    nc = KernelBuilder(NANO)
    x = nc.dram.tensor("x", (N,), F32)
    y = nc.dram.tensor("y", (N,), F32, kind="output")
    flag = nc.dram.tensor("flag", (N,), F32, kind="scratch")
    tile, above = nc.sbuf.tile(1), nc.sbuf.tile(1)
    nc.dma.load(tile.view(), x, 0, (4,), 4)
    with nc.loop(100, goes_on=(flag, 0)):
        nc.vector.tensor_scalar(tile.view(), tile.view(), AluOp.MUL, 0.5)
        nc.vector.tensor_scalar(above.view(), tile.view(), AluOp.GE, 1.0)
        nc.dma.store(above.view(), flag, 0, (4,), 4)
    nc.dma.store(tile.view(), y, 0, (4,), 4)
    program = nc.finish()
    for largest in (40.0, 1.5, 0.25, 3e30):
        given = np.array([largest, 1.0, 2.0, -7.0], np.float32)
        times = 1
        while largest * 0.5**times >= 1.0 and times < 100:
            times += 1
        got, _ = run(driver, program, x=given)
        assert np.array_equal(got, given * np.float32(0.5) ** times)


def regression(steps: int, rate: float, least: float) -> Program:
    """Trains w of ``x @ w = t``, a batch of N rows each step, until the squared error of a batch is
    below `least`: y = w, and the errors of all steps."""
    nc = KernelBuilder(NANO, name="regression")
    x = nc.dram.tensor("x", (steps, N, N), F32)  # step, row, feature
    t = nc.dram.tensor("t", (steps, N), F32)
    errors = nc.dram.tensor("errors", (steps,), F32, kind="output")
    y = nc.dram.tensor("y", (N,), F32, kind="output")
    flag = nc.dram.tensor("flag", (1,), F32, kind="scratch")
    rows, features = nc.sbuf.tile(N), nc.sbuf.tile(N)
    w, ones, target, error = (nc.sbuf.tile(1) for _ in range(4))
    sums = nc.psum.tile(3)
    predicted, gradient = (sums.view((1,), offset=i) for i in range(2))
    total = sums.view((1,), offset=2, lanes=1)
    result, above = (nc.sbuf.tile(1).view(lanes=1) for _ in range(2))

    def product(out: View, stationary: View, moving: View) -> None:
        nc.tensor.load_stationary(stationary.astype(DType.BF16))
        nc.tensor.matmul(out, moving.astype(DType.BF16))

    nc.vector.memset(w.view(), 0.0)
    nc.vector.memset(ones.view(), 1.0)
    with nc.loop(steps, goes_on=(flag, 0)) as step:
        nc.dma.load(features.view(), x, 4 * N * N * step, (4 * N,), 4)  # a partition a feature
        nc.dma.load(rows.view(), x, 4 * N * N * step, (4,), 4 * N)  # a partition a row
        nc.dma.load(target.view(), t, 4 * N * step, (4,), 4)
        product(predicted, features.view(), w.view())
        nc.vector.tensor_tensor(error.view(), predicted, AluOp.SUB, target.view())
        product(gradient, rows.view(), error.view())
        nc.vector.tensor_scalar(gradient, gradient, AluOp.MUL, -rate)
        nc.vector.tensor_tensor(w.view(), w.view(), AluOp.ADD, gradient)
        nc.vector.tensor_tensor(error.view(), error.view(), AluOp.MUL, error.view())
        product(total, ones.view(), error.view())
        nc.vector.copy(result, total)
        nc.vector.tensor_scalar(above, total, AluOp.GE, least)
        nc.dma.store(result, errors, 4 * step, (4,), 4)
        nc.dma.store(above, flag, 0, (4,), 4)
    nc.dma.store(w.view(), y, 0, (4,), 4)
    return nc.finish()


def test_training_without_the_host(driver: Driver) -> None:
    """One program trains until its error is small, step for step as numpy does, and stops."""
    steps, rate, least = 60, 0.125, 1e-4
    rng = np.random.default_rng(6)
    x = rng.choice(np.float32([-1, 0, 1]), (steps, N, N))
    t = x @ np.float32([1, -2, 0.5, 3])

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(a), np.float32)
        for k, factor in enumerate(b.astype(ml_dtypes.bfloat16).astype(np.float32)):
            sums += a[:, k] * factor
        return sums

    w, wanted = np.zeros(N, np.float32), [np.float32(math.inf)]
    for rows, targets in zip(x, t, strict=True):
        if wanted[-1] < least:
            break
        error = product(rows, w) - targets
        w = w + product(rows.T, error) * np.float32(-rate)
        wanted.append(product(np.ones((1, N), np.float32), error * error)[0])
    done = len(wanted) - 1
    assert 5 < done < steps and wanted[-1] < least < wanted[1]

    program = regression(steps, rate, least)
    loaded = driver.load(program)
    driver.write(loaded.tensors["x"], x)
    driver.write(loaded.tensors["t"], t)
    counters = driver.run(loaded)
    np.testing.assert_array_equal(driver.read(loaded.tensors["errors"])[:done], wanted[1:])
    np.testing.assert_array_equal(driver.read(loaded.tensors["y"]), w)
    loaded.unload()
    assert counters.macs == done * (2 * N * N + N)
    assert instructions(program) == instructions(regression(6, rate, least))


def test_a_word_that_does_not_exist(driver: Driver) -> None:
    """A TEST outside of DRAM faults at its instruction."""
    nc = KernelBuilder(NANO)
    flag = nc.dram.tensor("y", (4,), F32, kind="output")
    tile = nc.sbuf.tile(4)
    with nc.loop(3, goes_on=(flag, 4)):
        nc.vector.memset(tile.view(), 1.0)
    program = nc.finish()
    at = next(
        index
        for engine, index, raw in program.instructions()
        if engine == "vector" and decode(raw)[0] is Opcode.TEST
    )
    with pytest.raises(DeviceFault) as raised:
        run(driver, program.with_fields("vector", at, {"dram_base": (1 << 40) + 4}))
    fault = raised.value
    assert (fault.engine, fault.pc, fault.cause) == ("vector", at, "AXI_READ_ERROR")
    assert fault.instruction is not None
    word = int(fault.instruction.partition("TEST word=")[2], 16)
    assert word > 1 << 40 and fault.address == word - word % NANO.axi_bytes


def test_a_race_for_the_flag_is_found() -> None:
    """A TEST and a store of its word that nothing orders."""
    nc = KernelBuilder(NANO)
    flag = nc.dram.tensor("y", (N,), F32, kind="output")
    nc.dma.store(nc.sbuf.tile(1).view(), flag, 0, (4,), 4)
    program = nc.finish()
    test = encode(Opcode.TEST, {"dram_base": 4})
    streams = {**program.streams, "vector": test + program.streams["vector"]}
    relocations = (*program.relocations, Relocation("vector", 0, 0))
    program = dataclasses.replace(program, streams=streams, relocations=relocations, debug={})
    with Driver(GoldenDevice(NANO, check="races")) as driver:
        with pytest.raises(RaceError, match="byte 4 of tensor 'y'") as raised:
            run(driver, program)
    assert "TEST word=" in str(raised.value) and "DMA_STORE" in str(raised.value)


def test_one_engine_needs_no_barrier() -> None:
    """A loop of one engine is its LOOP, its body and its NEXT."""
    nc = KernelBuilder(NANO)
    tile = nc.sbuf.tile(8)
    with nc.loop(8) as i:
        nc.vector.memset(tile.view((1,), offset=i), 1.0)
    with nc.loop(5):
        pass  # nothing to repeat
    program = nc.finish()
    names = [decode(program.instruction("vector", i))[0].name for i in range(5)]
    assert names == ["LOOP", "MEMSET", "NEXT", "NOP", "END"]
    assert instructions(program) == 5 + len(NANO.engines) - 1
    assert "dst=sbuf.fp32@0+r1[" in program.disassemble()


def in_loop(body: Callable[[KernelBuilder, object], object]) -> Callable[[], object]:
    def build() -> object:
        nc = KernelBuilder(NANO)
        with nc.loop(4, name="i") as i:
            return body(nc, i)

    return build


def escaped() -> None:
    nc = KernelBuilder(NANO)
    tile = nc.sbuf.tile(8)
    with nc.loop(4, name="i") as i:
        nc.vector.memset(tile.view((1,), offset=i), 0.0)
    nc.vector.memset(tile.view((1,), offset=i), 0.0)


def freed() -> None:
    nc = KernelBuilder(NANO)
    tile = nc.sbuf.tile(8, name="mine")
    with nc.loop(4):
        nc.vector.memset(tile.view(), 0.0)
        nc.sbuf.free(tile)


def registers(nc: KernelBuilder, i: object) -> None:
    tile = nc.sbuf.tile(64)
    for step in (1, 2, 3, 4):
        nc.vector.memset(tile.view((1,), offset=step * i), 0.0)  # type: ignore[operator]


def deep(nc: KernelBuilder, i: object) -> None:
    with nc.loop(2), nc.loop(2), nc.loop(2):
        pass


def overlapping(nc: KernelBuilder, i: object) -> None:
    tile = nc.sbuf.tile(64)
    nc.vector.copy(tile.view((4,), offset=i), tile.view((4,), offset=i * 2))  # type: ignore


def unaligned(nc: KernelBuilder, i: object) -> None:
    x = nc.dram.tensor("x", (64,), F32)
    nc.dma.load(nc.sbuf.tile(1).view(), x, i * 2)  # type: ignore[operator]


def outside(nc: KernelBuilder, i: object) -> None:
    x = nc.dram.tensor("x", (8,), F32)
    nc.dma.load(nc.sbuf.tile(2).view(), x, i * 12)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (escaped, "i is used outside of its loop"),
        (freed, "'mine' .* was made before the loop and freed in it"),
        (in_loop(registers), "engine vector step in more than 3 different ways"),
        (in_loop(deep), "loops 4 deep need 39 semaphores, the core has 32"),
        (in_loop(overlapping), "step differently with the loops"),
        (in_loop(unaligned), "a step of base_offset_bytes = 2 is not a multiple of the 4 bytes"),
        (in_loop(outside), "reaches bytes 0 to 43 of the 32"),
        (in_loop(lambda nc, i: nc.sbuf.tile(3).view((1,), offset=i)), "reaches columns 0 to 3"),
        (in_loop(lambda nc, i: nc.sbuf.tile(3).view()[i]), "outside a dimension of 3"),
        (in_loop(lambda nc, i: nc.sbuf.tile(3).view((1,), offset=0.5)), "must be an integer"),
        (in_loop(lambda nc, i: "a" if i else "b"), "Python cannot branch on it"),
        (in_loop(lambda nc, i: i > 2), "Python cannot compare it"),
        (in_loop(lambda nc, i: range(i)), "it is no plain integer"),
        (in_loop(lambda nc, i: nc.finish()), "loop i is still open"),
        (lambda: KernelBuilder(NANO).loop(0).__enter__(), "a loop has 1 to 4294967295 iterations"),
    ],
)
def test_refusals(build: Callable[[], object], message: str) -> None:
    """What a loop cannot do is said at the user's statement."""
    with pytest.raises(KernelError, match=message) as raised:
        build()
    assert __file__.rsplit("/", 1)[1] in str(raised.value)
