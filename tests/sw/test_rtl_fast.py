"""The `rtl-fast` device: its cells equal the gates, and so do whole programs, to the cycle."""

import ctypes
import dataclasses
import itertools
import platform
import random
from typing import Any

import jax
import numpy as np
import pytest
import systolith
from systolith.errors import DeviceFault
from systolith.golden import arithmetic
from systolith.kernel import KernelBuilder
from systolith.program import Program
from systolith.runtime.driver import Driver
from systolith.runtime.rtl import FastRtlBackend, RtlBackend
from systolith.runtime.verilog import FAST_CELLS, with_fast_cells
from systolith.train import digits
from systolith_hdl.arith import FP32_LATENCY, SHORT_LATENCY, MulMode
from systolith_hdl.config import get_config
from systolith_hdl.formats import CANONICAL_NAN, FLOATS, NARROW_FLOATS, WORDS, DType
from systolith_hdl.isa import REDUCTIONS, AluOp, Function
from systolith_hdl.tensor import PAIR_MUL_LATENCY
from systolith_hdl.toolchain import ToolError
from systolith_tb.cells import run_cells
from systolith_tb.runner import seed_of_run

NANO = get_config("nano")
CYCLES = 600_000


#: zeros, subnormals, both ends of the normal range, around one, infinity, NaNs; without sign
CORNERS = [
    0, 1, 2, 0x3FFFFF, 0x400000, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFF, 0x1000000, 0x33800000,
    0x34000000, 0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FFFFFFF, 0x40000000,
    0x4B000001, 0x7EFFFFFF, 0x7F000000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF,
]  # fmt: skip


def signed(words: list[int]) -> list[int]:
    return [word | sign for word in words for sign in (0, 1 << 31)]


def vectors(rng: np.random.Generator) -> np.ndarray:
    """Inputs of `run_cells` [CYCLES, 8]: corners first, then random."""

    def words(count: int) -> np.ndarray:
        return rng.integers(0, 1 << 32, count, dtype=np.uint32)

    control = (rng.random(CYCLES) < 0.8) | (rng.random(CYCLES) < 0.9).astype(np.uint32) << 1
    a, b, acc = words(CYCLES), words(CYCLES), words(CYCLES)
    # Near in exponent, so that sums cancel and products leave the range.
    near = rng.random(CYCLES) < 0.5
    b = np.where(near, (a + ((words(CYCLES) % 64 - 32) << 23)) ^ (words(CYCLES) >> 12), b)
    b = np.where(rng.random(CYCLES) < 0.25, (0x3F800000 << 1) - (a & 0x7FFFFFFF) + b % 64, b)
    # Any FP32 words will do as operands: the array takes 10 bits of their fractions, as FP16 has.
    # Some have the exponents of FP16, some the fractions of BF16 or FP8.
    mac_a, mac_w = words(CYCLES), words(CYCLES)
    for factor in (mac_a, mac_w):
        inside = rng.random(CYCLES) < 0.3
        scaled = (factor & 0x807FFFFF) | (words(CYCLES) % 46 + 100) << 23
        factor[inside] = scaled[inside]
        factor &= np.uint32(0xFFFFFFFF) << rng.choice(np.array([13, 16, 20, 21], np.uint32), CYCLES)
    # A running sum near the product's exponent.
    exponent = ((mac_a >> 23) & 0xFF) + ((mac_w >> 23) & 0xFF) - 127 + words(CYCLES) % 60 - 30
    close = np.clip(exponent.view(np.int32), 0, 255).astype(np.uint32) << 23
    acc = np.where(rng.random(CYCLES) < 0.7, (acc & 0x807FFFFF) | close, acc)
    # Negated product: exact cancellation, or all but.
    exact = -(mac_a.view(np.float32).astype(np.float64) * mac_w.view(np.float32).astype(np.float64))
    cancel = exact.astype(np.float32).view(np.uint32)
    acc = np.where(rng.random(CYCLES) < 0.1, cancel ^ (words(CYCLES) % 3), acc)

    pairs = np.array(list(itertools.product(signed(CORNERS), repeat=2)), np.uint32)
    a[: len(pairs)], b[: len(pairs)] = pairs[:, 0], pairs[:, 1]
    narrow = sorted({word & 0xFFFFE000 for word in signed(CORNERS)})
    triples = np.array(
        list(itertools.product(narrow, [*narrow, 0x10000, 0x2000, 0x80010000], signed(CORNERS))),
        np.uint32,
    )
    mac_a[: len(triples)], mac_w[: len(triples)] = triples[:, 0], triples[:, 1]
    # The running sum meets its factors one cycle later.
    acc[1 : len(triples) + 1] = triples[:, 2]
    control[: len(pairs)] |= 1
    control[: len(triples)] |= 2
    assert len(triples) < CYCLES / 2
    # Half of the rest are pairs, of FP8 numbers.
    pair = np.zeros(CYCLES, np.uint32)
    pair[len(triples) :] = np.where(rng.random(CYCLES - len(triples)) < 0.5, 3, 0)
    pair[len(triples) :] ^= rng.choice(np.array([0, 0, 1, 2], np.uint32), CYCLES - len(triples))
    fp8 = np.concatenate(
        [
            arithmetic.unpack(np.arange(256, dtype=np.uint8), dtype)
            for dtype in (DType.FP8_E4M3, DType.FP8_E5M2)
        ]
    )
    pair_a, pair_w = rng.choice(fp8, CYCLES), rng.choice(fp8, CYCLES)
    for bit, factor in ((1, mac_a), (2, mac_w)):
        factor[pair & bit != 0] = rng.choice(fp8, np.count_nonzero(pair & bit))
    control |= pair << 2
    # Products and shifts of integers, many of them by what is left in the word.
    mode = rng.integers(0, len(MulMode), CYCLES, dtype=np.uint32)
    control |= mode << 4
    b = np.where((mode > 1) & (rng.random(CYCLES) < 0.8), b % 40, b)
    # Running sums near a pair, or all but its negative. It comes three cycles after its factors.
    x, w, y, v = (words.view(np.float32) for words in (mac_a, mac_w, pair_a, pair_w))
    cancel = (-(x * w + y * v)).view(np.uint32)[:-PAIR_MUL_LATENCY]
    chosen = (pair[:-PAIR_MUL_LATENCY] == 3) & (rng.random(len(cancel)) < 0.3)
    chosen[: len(triples)] = False
    changed = cancel ^ (words(len(cancel)) >> rng.integers(6, 32, len(cancel), dtype=np.uint32))
    acc[PAIR_MUL_LATENCY:][chosen] = changed[chosen]
    # The chip's sums hold no NaN but the canonical one; the cells are equal for any.
    inputs = np.stack([control, a, b, mac_a, mac_w, acc, pair_a, pair_w], 1)
    return np.ascontiguousarray(inputs.astype(np.uint32))


NAMES = ("fp32_add", "fp32_mul", "mac_narrow", "mac_fp8x2", "word_mul", "fp32_add_short")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_cells_equal_the_gates_in_every_cycle() -> None:
    inputs = vectors(np.random.default_rng(seed_of_run()))
    gates, fast = run_cells(inputs, fast=False), run_cells(inputs, fast=True)
    for index, name in enumerate(NAMES):
        wrong = np.flatnonzero(gates[:, index] != fast[:, index])
        assert not len(wrong), (
            f"{name}: {len(wrong)} differ, the first in cycle {wrong[0]}: gates "
            f"{gates[wrong[0], index]:#x}, fast {fast[wrong[0], index]:#x}; the inputs up to it: "
            f"{[[hex(x) for x in row] for row in inputs[max(0, wrong[0] - 4) : wrong[0] + 1]]}"
        )
    # Both could be wrong in the same way only where numpy is, too.
    enabled = np.flatnonzero(inputs[:, 0] & 1)
    a, b = (inputs[enabled, i].view(np.float32) for i in (1, 2))
    for index, value, latency in (
        (0, a + b, FP32_LATENCY),
        (1, a * b, FP32_LATENCY),
        (5, a + b, SHORT_LATENCY),
    ):
        expected = np.where(np.isnan(value), CANONICAL_NAN, value.view(np.uint32))
        # Seen in the cycle of the third (or second) enabled edge after, before that edge.
        np.testing.assert_array_equal(fast[enabled[latency:], index], expected[:-latency])
    assert (fast[:, 0] == CANONICAL_NAN).sum() > 100
    assert len(np.unique(fast[:, 2])) > CYCLES / 4
    assert len(np.unique(fast[:, 3])) > CYCLES / 4


def random_kernel(seed: int) -> Program:
    """Loads, matmuls, vector and scalar instructions and stores of random shapes and operations."""
    rng = random.Random(seed)
    nc = KernelBuilder(NANO, name=f"random{seed}")
    n = NANO.lanes
    k, f = rng.randint(n + 1, 3 * n), rng.randint(2, 40)
    w = nc.dram.tensor("w", (k, n), DType.FP32, kind="input")
    x = nc.dram.tensor("x", (k, f), DType.FP32, kind="input")
    outputs = [nc.dram.tensor(f"y{i}", (n, f), DType.FP32, kind="output") for i in range(4)]
    sums = nc.psum.tile(f).view()
    for start in range(0, k, n):
        rows = min(n, k - start)
        w_tile, x_tile = (nc.sbuf.tile(c).view(lanes=rows) for c in (n, f))
        nc.dma.load(w_tile, w, start * n * 4, (4,), n * 4)
        nc.dma.load(x_tile, x, start * f * 4, (4,), f * 4)
        operands = (*NARROW_FLOATS, DType.INT8, DType.INT8)
        nc.tensor.load_stationary(w_tile.astype(rng.choice(operands)))
        dtype = rng.choice(operands)
        integer = dtype is DType.INT8 and rng.random() < 0.5
        nc.tensor.matmul(
            sums.astype(DType.INT32) if integer else sums, x_tile.astype(dtype), start > 0
        )
    tiles = [nc.sbuf.tile(f).view() for _ in outputs]
    nc.vector.tensor_scalar(tiles[0], sums, AluOp.MUL, rng.uniform(-2, 2))
    for index in range(1, len(tiles)):
        nc.scalar.activate(
            tiles[index],
            tiles[index - 1],
            rng.choice(list(Function)),
            scale=rng.uniform(-2, 2),
            bias=rng.uniform(-1, 1),
        )
        nc.vector.tensor_tensor(
            tiles[index].astype(rng.choice(FLOATS)),
            tiles[index],
            rng.choice([AluOp.ADD, AluOp.SUB, AluOp.MUL, AluOp.MAX]),
            sums,
            op0=rng.choice([AluOp.ADD, AluOp.MUL]),
            imm0=rng.uniform(-2, 2),
        )
    total = nc.sbuf.tile(1).view()
    nc.vector.reduce(total, tiles[1], rng.choice(list(REDUCTIONS)))
    computes = rng.choice(WORDS)
    nc.vector.tensor_tensor(
        tiles[3].astype(rng.choice(WORDS)),
        tiles[3].astype(computes),
        rng.choice([AluOp.ADD, AluOp.MUL, AluOp.SHIFT_RIGHT_SIGNED]),
        sums.astype(computes),
        op0=rng.choice([AluOp.SHIFT_LEFT, AluOp.MUL, AluOp.MAX]),
        imm0=rng.randint(-3, 9),
    )
    for tensor, tile in zip(outputs, tiles, strict=True):
        nc.dma.store(tile, tensor, 0, (4,), f * 4)
    return nc.finish()


def run_kernel(driver: Driver, seed: int) -> dict[str, Any]:
    """Runs a random kernel on random inputs; returns outputs and all counters."""
    rng = np.random.default_rng(seed)
    loaded = driver.load(random_kernel(seed))
    for name in ("w", "x"):
        tensor = loaded.tensors[name]
        values = rng.standard_normal(tensor.shape) * 2.0 ** rng.integers(-70, 60, tensor.shape)
        driver.write(tensor, values.astype(np.float32))
    found: dict[str, Any] = dataclasses.asdict(driver.run(loaded))
    for name, tensor in loaded.tensors.items():
        found[name] = driver.read(tensor).tobytes()
    loaded.unload()
    return found


def test_random_kernels_equal_the_gates() -> None:
    draw = random.Random(seed_of_run())
    seeds = [draw.getrandbits(32) for _ in range(8)]
    with Driver(RtlBackend(NANO)) as gates, Driver(FastRtlBackend(NANO)) as fast:
        for seed in seeds:
            mine, expected = run_kernel(fast, seed), run_kernel(gates, seed)
            assert mine == expected, f"kernel {seed}"
            assert min(mine["cycles"], mine["macs"], *mine["busy"].values()) > 0


def test_training_equals_the_gates() -> None:
    """Three steps: same state, same losses, same CYCLES, MACS, BUSY and INSTRUCTIONS."""
    data = digits.load()
    results = []
    for kind in ("rtl", "rtl-fast"):
        with systolith.Device(kind, "nano") as device:
            step = systolith.jit(digits.make_step(1e-3), device=device)
            state: Any = digits.initial_state(0, 0.15)
            found: list[Any] = []
            for i in range(3):
                images, labels = (x[32 * i :][:32] for x in (data.train_images, data.train_labels))
                state, loss = step(state, images, labels)
                found += [np.asarray(loss).tobytes(), step.stats()]
                found += [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
            results.append(found)
    assert results[0] == results[1]


#: value of C's FE_TOWARDZERO
_TOWARD_ZERO = {"x86_64": 0xC00, "aarch64": 0xC00000}


@pytest.mark.skipif(platform.machine() not in _TOWARD_ZERO, reason="FE_TOWARDZERO unknown")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="fesetround in another library")
def test_the_callers_rounding_mode_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library in the process may have changed how its threads round."""
    libm = ctypes.CDLL("libm.so.6")
    mode = _TOWARD_ZERO[platform.machine()]
    with Driver(FastRtlBackend(NANO)) as driver:
        expected = run_kernel(driver, 1)
        run = driver.backend.run

        def run_rounding_toward_zero(max_cycles: int | None) -> bool:
            before = libm.fegetround()
            assert libm.fesetround(mode) == 0
            try:
                ended = run(max_cycles)
                assert libm.fegetround() == mode
                return ended
            finally:
                libm.fesetround(before)

        monkeypatch.setattr(driver.backend, "run", run_rounding_toward_zero)
        assert run_kernel(driver, 1) == expected


def test_faults_as_the_gates() -> None:
    records = []
    for backend in (RtlBackend(NANO), FastRtlBackend(NANO)):
        with Driver(backend, watchdog=5000) as driver:
            program = random_kernel(3).with_fields("vector", 1, {"src0.base": NANO.sbuf_depth - 1})
            loaded = driver.load(program)
            with pytest.raises(DeviceFault) as caught:
                driver.run(loaded)
            fault = caught.value
            records.append((fault.engine, fault.pc, fault.cause, fault.address))
            records.append(backend.simulated_cycles)
    assert records[:2] == records[2:]


def test_cells_that_do_not_fit_are_refused() -> None:
    cells = FAST_CELLS.read_text()
    gates = "module fp32_add(a, clk);\n  input [31:0] a;\n  input clk;\nendmodule\n"
    with pytest.raises(ToolError, match="ports of fp32_add"):
        with_fast_cells(gates, cells)
    with pytest.raises(ToolError, match="2 times"):
        with_fast_cells(gates + gates, cells)
    untouched = "module other(clk);\n  input clk;\nendmodule\n"
    assert with_fast_cells(untouched, cells).endswith(untouched)
