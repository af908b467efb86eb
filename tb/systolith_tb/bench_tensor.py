"""Bench of the tensor engine with PSUM, against numpy."""

import os
import random
from collections import deque
from collections.abc import Callable

import cocotb
import numpy as np
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge, ReadOnly
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FP8_TYPES, NARROW_FLOATS, DType
from systolith_hdl.isa import LOADS, SPECS, Opcode, Space
from systolith_hdl.ports import READ_LATENCY, IssuePort, ReadPort, WritePort
from systolith_hdl.psum import ACCUMULATE_LATENCY, Psum
from systolith_hdl.tensor import TensorEngine, matmul_latency

from systolith_tb.clocking import start
from systolith_tb.configs import bench_config
from systolith_tb.numerics import (
    add,
    numpy_rng,
    operand,
    pack,
    random_values,
    round_to,
    tile,
    to_int32,
    unpack,
)


def sbuf_ports(config: CoreConfig) -> list[str]:
    """Read ports of the engine."""
    seconds = ["stationary_second", "moving_second"] if config.fp8_rate == 2 else []
    return ["stationary", "moving", *seconds]


class TensorBench(wiring.Component):
    """Tensor engine and PSUM; the bench plays SBUF, the sequencer and the other engines."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        reads = sbuf_ports(config)
        super().__init__(
            {
                "issue": In(IssuePort()),
                "done_load": Out(1),
                **{name: Out(ReadPort(config, config.sbuf_depth)) for name in reads},
                "psum_read": In(ReadPort(config, config.psum_depth)),
                "psum_write": In(WritePort(config, config.psum_depth)),
                "macs": Out(16),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.tensor = tensor = TensorEngine(self._config)
        m.submodules.psum = psum = Psum(self._config, reads=1, writes=1)
        wiring.connect(m, wiring.flipped(self.issue), tensor.issue)
        for name in sbuf_ports(self._config):
            wiring.connect(m, getattr(tensor, name), wiring.flipped(getattr(self, name)))
        wiring.connect(m, tensor.psum, psum.accumulate)
        wiring.connect(m, wiring.flipped(self.psum_read), psum.read[0])
        wiring.connect(m, wiring.flipped(self.psum_write), psum.write[0])
        m.d.comb += [self.done_load.eq(tensor.done_load), self.macs.eq(tensor.macs)]
        return m


class SbufPort:
    """Plays SBUF towards one read port: refuses at random, answers after READ_LATENCY."""

    def __init__(self, dut, name: str, memory: np.ndarray, stall: float) -> None:
        self._dut = dut
        self._name = name
        self._memory = memory
        self._stall = stall
        self._answers: deque[int | None] = deque([None] * READ_LATENCY)

    def _port(self, name: str) -> object:
        return getattr(self._dut, f"{self._name}__{name}")

    def drive(self) -> None:
        """Drives one cycle: its answer and whether a request is taken."""
        answer = self._answers.popleft()
        self._port("response__valid").value = answer is not None
        if answer is not None:
            self._port("response__payload").value = pack(self._memory[:, answer])
        self._ready = random.random() >= self._stall
        self._port("request__ready").value = self._ready

    def sample(self) -> None:
        """Looks at the request of the cycle, once everything has settled."""
        taken = self._ready and int(self._port("request__valid").value)
        self._answers.append(int(self._port("request__payload").value) if taken else None)


class TensorDriver:
    """Runs the bench a cycle at a time: instructions in, done pulses counted."""

    def __init__(self, dut, sbuf: np.ndarray, *, stall: float = 0.0, idle: float = 0.0) -> None:
        self.dut = dut
        self.cycle = 0
        self.loads_done = self.matmuls_done = 0
        self.taken_at: list[int] = []
        self.done_at: list[int] = []
        self.macs: list[int] = []
        self.queue: deque[int] = deque()
        self._idle = idle
        self._offered = False
        self._ports = [SbufPort(dut, n, sbuf, stall) for n in sbuf_ports(self._config)]
        dut.psum_read__request__valid.value = 0
        dut.psum_write__request__valid.value = 0
        dut.issue__instruction__valid.value = 0
        for name in sbuf_ports(self._config):
            getattr(dut, f"{name}__request__ready").value = 0
            getattr(dut, f"{name}__response__valid").value = 0

    async def step(self) -> None:
        """One cycle."""
        dut = self.dut
        await FallingEdge(dut.clk)
        self.cycle += 1
        for port in self._ports:
            port.drive()
        if self.queue and (self._offered or random.random() >= self._idle):
            self._offered = True
            dut.issue__instruction__valid.value = 1
            dut.issue__instruction__payload.value = self.queue[0]
        else:
            dut.issue__instruction__valid.value = 0
        await ReadOnly()
        for port in self._ports:
            port.sample()
        if self._offered and int(dut.issue__instruction__ready.value):
            self.queue.popleft()
            self._offered = False
            self.taken_at.append(self.cycle)
        if int(dut.issue__done.value):
            self.matmuls_done += 1
            self.done_at.append(self.cycle)
        self.loads_done += int(dut.done_load.value)
        self.macs.append(int(dut.macs.value))

    async def until(self, condition: Callable[[], bool], patience: int = 1000) -> None:
        """Steps until `condition` holds; fails if nothing happens for `patience` cycles."""
        seen, since = None, 0
        while not condition():
            await self.step()
            state = (len(self.taken_at), self.loads_done, self.matmuls_done, sum(self.macs[-1:]))
            since = since + 1 if state == seen and not state[-1] else 0
            seen = state
            assert since < patience, "the tensor engine hangs"

    async def write_psum(self, words: np.ndarray) -> None:
        """Fills PSUM, words of shape (lanes, depth), through the write port."""
        request = self.dut.psum_write__request__payload
        layout = WritePort(self._config, self._config.psum_depth).members["request"]
        shape = layout.signature.members["payload"].shape
        for address in range(words.shape[1]):
            await FallingEdge(self.dut.clk)
            request.value = (
                (address << shape["address"].offset)
                | (pack(words[:, address]) << shape["data"].offset)
                | (((1 << words.shape[0]) - 1) << shape["mask"].offset)
            )
            self.dut.psum_write__request__valid.value = 1
        await FallingEdge(self.dut.clk)
        self.dut.psum_write__request__valid.value = 0

    async def read_psum(self, first: int, count: int) -> np.ndarray:
        """Reads `count` columns; the first request is made in the next cycle."""
        columns = []
        await FallingEdge(self.dut.clk)
        for index in range(count + READ_LATENCY):
            self.dut.psum_read__request__valid.value = index < count
            self.dut.psum_read__request__payload.value = first + min(index, count - 1)
            await ReadOnly()
            if index >= READ_LATENCY:
                assert int(self.dut.psum_read__response__valid.value)
                columns.append(
                    unpack(self.dut.psum_read__response__payload, np.uint32, self._config.lanes)
                )
            await FallingEdge(self.dut.clk)
            self.cycle += 1
        self.dut.psum_read__request__valid.value = 0
        return np.stack(columns, axis=1)

    @property
    def _config(self) -> CoreConfig:
        return bench_config()


def instruction(
    opcode: Opcode,
    *,
    counts: tuple[int, ...],
    src: tuple[int, tuple[int, ...]],
    dst: tuple[int, tuple[int, ...]] = (0, (0, 0, 0, 0)),
    lanes: int,
    columns: int = 0,
    accumulate: bool = False,
    dtype: DType = DType.BF16,
    second: tuple[int, tuple[int, ...]] = (0, (0, 0, 0, 0)),
    second_type: DType = DType.FP8_E4M3,
    dst_dtype: DType = DType.FP32,
) -> int:
    """Encodes one tensor instruction; `dtype` is that of the operand it reads, `second` and
    `second_type` are of the other operand of a pair."""

    def fields(base: int, strides: tuple[int, ...], space: Space, dtype: DType) -> dict:
        return {"base": base, "strides": list(strides), "space": space, "dtype": dtype}

    body: dict[str, object] = {
        "counts": list(counts),
        "src0": fields(*src, Space.SBUF, dtype),
    }
    if SPECS[opcode].pairs:
        body["src1"] = fields(*second, Space.SBUF, second_type)
    if opcode not in LOADS:
        body |= {"dst": fields(*dst, Space.PSUM, dst_dtype), "columns": columns}
    header = {"opcode": opcode, "lanes": lanes, "accumulate": int(accumulate)}
    return SPECS[opcode].layout.const({"header": header, "body": body}).as_value().value


def addresses(counts: tuple[int, ...], base: int, strides: tuple[int, ...]) -> np.ndarray:
    """Word addresses of an access pattern, in order."""
    index = np.indices(counts).reshape(4, -1)
    return base + (np.array(strides)[:, None] * index).sum(axis=0)


def random_pattern(
    rng: np.random.Generator, depth: int, limit: int, *, repeat: bool
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Random counts (product at most `limit`), base and strides that stay within `depth`."""
    while True:
        counts = tuple(int(c) for c in rng.integers(1, 5, 4))
        if np.prod(counts) <= limit:
            break
    low = 0 if repeat else 1
    while True:
        strides = tuple(int(s) for s in rng.choice([-9, -1, low, 1, 2, 8, 17], 4))
        offsets = addresses(counts, 0, strides)
        if offsets.max() - offsets.min() < depth:
            base = int(rng.integers(-offsets.min(), depth - offsets.max()))
            return counts, base, strides


def random_second(
    rng: np.random.Generator, depth: int, counts: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Random base and strides of a second operand."""
    strides = tuple(int(s) for s in rng.choice([-9, -1, 0, 1, 2, 8, 17], 4))
    offsets = addresses(counts, 0, strides)
    return int(rng.integers(-offsets.min(), depth - offsets.max())), strides


async def run_random(
    dut, *, stall: float, idle: float, special: bool, interrupt: bool = False
) -> None:
    """Random instructions against golden; all of PSUM they may reach is compared at the end.

    With `interrupt`, other instructions are under way before and a reset cuts them short.
    """
    config = bench_config()
    lanes = config.lanes
    rng = numpy_rng()
    sbuf = random_values(rng, (lanes, config.sbuf_depth), special)
    # Full range as INT8, too: the low bits of plain numbers would often be zero.
    sbuf ^= rng.integers(0, 1 << 8, sbuf.shape, dtype=np.uint32)
    window = 64  # few addresses, so that matmuls meet in PSUM
    psum = random_values(rng, (lanes, window), special)
    await start(dut)
    driver = TensorDriver(dut, sbuf, stall=stall, idle=idle)
    await driver.write_psum(psum)
    if interrupt:
        load = instruction(
            Opcode.LOAD_STATIONARY, counts=(1, 1, 1, lanes), src=(0, (0, 0, 0, 1)), lanes=lanes
        )
        matmul = instruction(
            Opcode.MATMUL,
            counts=(1, 1, 1, lanes + 1),
            src=(0, (0, 0, 0, 1)),
            dst=(window, (0, 0, 0, 1)),
            lanes=lanes,
            columns=lanes,
        )
        driver.queue.extend([load, matmul] * 10)
        for _ in range(random.randrange(20, 20 + 5 * lanes)):
            await driver.step()
        await FallingEdge(dut.clk)
        dut.rst.value = 1
        await FallingEdge(dut.clk)
        dut.rst.value = 0
        driver = TensorDriver(dut, sbuf, stall=stall, idle=idle)

    stationary, stationary_second = np.zeros((2, lanes, lanes), np.uint32)
    pairs = np.zeros(lanes, bool)  # columns of the stationary operand
    loads = matmuls = macs = written_words = integers = 0
    for _ in range(int(os.environ.get("SYSTOLITH_INSTRUCTIONS", "300"))):
        pair = config.fp8_rate == 2 and bool(rng.random() < 0.6)
        dtype = random.choice((*NARROW_FLOATS, DType.INT8, DType.INT8))
        second_type = random.choice(FP8_TYPES)
        if pair:
            dtype = random.choice(FP8_TYPES)
        if not loads or rng.random() < 0.4:
            counts, base, strides = random_pattern(rng, config.sbuf_depth, lanes, repeat=True)
            rows = lanes if not loads or rng.random() < 0.5 else int(rng.integers(1, lanes + 1))
            if not loads:
                counts, base, strides = (1, 1, 1, lanes), 0, (0, 0, 0, 1)
            second = random_second(rng, config.sbuf_depth, counts)
            source = addresses(counts, base, strides)
            # Rows beyond K become zero; other columns keep the last load that had them.
            columns = len(source)
            stationary[:, :columns] = stationary_second[:, :columns] = 0
            stationary[:rows, :columns] = operand(sbuf[:rows, source], dtype)
            pairs[:columns] = pair
            if pair:
                words = sbuf[:rows, addresses(counts, *second)]
                stationary_second[:rows, :columns] = round_to(words, second_type)
            driver.queue.append(
                instruction(
                    Opcode.LOAD_STATIONARY_PAIR if pair else Opcode.LOAD_STATIONARY,
                    counts=counts,
                    src=(base, strides),
                    lanes=rows,
                    dtype=dtype,
                    second=second,
                    second_type=second_type,
                )
            )
            loads += 1
            continue
        counts, src_base, src_strides = random_pattern(rng, config.sbuf_depth, 40, repeat=True)
        second = random_second(rng, config.sbuf_depth, counts)
        while True:
            dst_strides = tuple(int(s) for s in rng.choice([-3, 0, 1, 1, 2, 5], 4))
            offsets = addresses(counts, 0, dst_strides)
            if offsets.max() - offsets.min() < window:
                break
        dst_base = int(rng.integers(-offsets.min(), window - offsets.max()))
        rows = int(rng.integers(1, lanes + 1))
        columns = int(rng.integers(1, lanes + 1))
        accumulate = bool(rng.random() < 0.6)
        source = addresses(counts, src_base, src_strides)
        moving = operand(sbuf[:, source], dtype)
        sums = tile(stationary[:, :columns], moving, rows)
        if pair:
            words = round_to(sbuf[:, addresses(counts, *second)], second_type)
            both = tile(
                stationary[:, :columns], moving, rows, (stationary_second[:, :columns], words)
            )
            sums = np.where(pairs[:columns, None], both, sums)
        # Integers of any sums: mostly exact ones, fractions and large numbers among them.
        integer = dtype is DType.INT8 and random.random() < 0.7
        if integer:
            sums = to_int32(sums)
        for f, address in enumerate(dst_base + offsets):
            old = psum[:columns, address]
            total = old + sums[:, f] if integer else add(old, sums[:, f])
            psum[:columns, address] = total if accumulate else sums[:, f]
        driver.queue.append(
            instruction(
                Opcode.MATMUL_PAIR if pair else Opcode.MATMUL,
                counts=counts,
                src=(src_base, src_strides),
                dst=(dst_base, dst_strides),
                lanes=rows,
                columns=columns,
                accumulate=accumulate,
                dtype=dtype,
                dst_dtype=DType.INT32 if integer else DType.FP32,
                second=second,
                second_type=second_type,
            )
        )
        matmuls += 1
        integers += integer
        macs += rows * columns * len(source) * (1 + pair)
        written_words += columns * len(source)
    await driver.until(lambda: driver.matmuls_done == matmuls and driver.loads_done == loads)
    await driver.step()
    assert not int(dut.issue__busy.value)
    assert not driver.queue and sum(driver.macs) == macs and 0 < integers < matmuls
    got = await driver.read_psum(0, window)
    wrong = np.argwhere(got != psum)
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} words wrong, first lane {wrong[0][0]} word {wrong[0][1]}: "
        f"got {got[tuple(wrong[0])]:08x}, wanted {psum[tuple(wrong[0])]:08x}"
    )
    cocotb.log.info(
        "%d loads, %d matmuls (%d of integers), %d sums; compared %d words in %d cycles",
        *(loads, matmuls, integers, written_words, got.size, driver.cycle),
    )


async def latency(dut) -> None:
    """A lone matmul takes the cycles stated; its last write is visible right after `done`; the
    other lanes keep their values."""
    config = bench_config()
    lanes = config.lanes
    rng = numpy_rng()
    sbuf = random_values(rng, (lanes, config.sbuf_depth), False)
    psum = random_values(rng, (lanes, 32), False)
    await start(dut)
    driver = TensorDriver(dut, sbuf)
    await driver.write_psum(psum)
    load = instruction(
        Opcode.LOAD_STATIONARY, counts=(1, 1, 1, lanes), src=(8, (0, 0, 0, 1)), lanes=lanes
    )
    driver.queue.append(load)
    await driver.until(lambda: driver.loads_done == 1)
    for done, width in enumerate((1, 2, 7, 20), 1):
        driver.queue.append(
            instruction(
                Opcode.MATMUL,
                counts=(1, 1, 1, width),
                src=(40, (0, 0, 0, 1)),
                dst=(3, (0, 0, 0, 1)),
                lanes=lanes,
                columns=lanes - 1,
                accumulate=True,
            )
        )
        while driver.matmuls_done < done:
            await driver.step()
        assert driver.done_at[-1] - driver.taken_at[-1] == width + 4 + matmul_latency(config)
        assert int(dut.issue__busy.value)
        stationary = round_to(sbuf[:, 8 : 8 + lanes], DType.BF16)
        sums = tile(stationary, round_to(sbuf[:, 40 : 40 + width], DType.BF16), lanes)
        psum[: lanes - 1, 3 : 3 + width] = add(psum[: lanes - 1, 3 : 3 + width], sums[:-1])
        last = await driver.read_psum(3 + width - 1, 1)
        assert (last[:, 0] == psum[:, 3 + width - 1]).all()
        assert not int(dut.issue__busy.value)
        assert (await driver.read_psum(0, 32) == psum).all()


async def throughput(dut) -> None:
    """Matmuls of N + 1 columns and more, each with a load of its own, run without a bubble; so do
    short ones without loads; and one address is accumulated every ACCUMULATE_LATENCY + 1 cycles."""
    config = bench_config()
    lanes = config.lanes
    sbuf = np.zeros((lanes, config.sbuf_depth), np.uint32)
    await start(dut)
    driver = TensorDriver(dut, sbuf)

    def matmul(width: int, *, accumulate: bool = False, stride: int = 1, pair: bool = False) -> int:
        return instruction(
            Opcode.MATMUL_PAIR if pair else Opcode.MATMUL,
            counts=(1, 1, 1, width),
            src=(40, (0, 0, 0, 1)),
            dtype=DType.FP8_E4M3 if pair else DType.BF16,
            second=(80, (0, 0, 0, 1)),
            dst=(3, (0, 0, 0, stride)),
            lanes=lanes,
            columns=lanes,
            accumulate=accumulate,
        )

    load = instruction(
        Opcode.LOAD_STATIONARY, counts=(1, 1, 1, lanes), src=(8, (0, 0, 0, 1)), lanes=lanes
    )

    async def cycles_between(program: list[int], count: int) -> int:
        driver.macs.clear()
        driver.matmuls_done = 0
        driver.queue.extend(program)
        await driver.until(lambda: driver.matmuls_done == count)
        active = np.flatnonzero(driver.macs)
        return int(active[-1] - active[0] + 1)

    for width in (lanes + 1, lanes + 2, 3 * lanes):
        assert await cycles_between([load, matmul(width)] * 20, 20) == 20 * width, width
    for width in (1, 2, 3, lanes):
        assert await cycles_between([matmul(width)] * 20, 20) == 20 * width, width
    spaced = (ACCUMULATE_LATENCY + 1) * 9 + 1
    assert await cycles_between([matmul(10, accumulate=True, stride=0)], 1) == spaced
    width = ACCUMULATE_LATENCY + 1
    assert await cycles_between([matmul(width, accumulate=True)] * 20, 20) == 20 * width
    if config.fp8_rate == 1:
        return
    load_pair = instruction(
        Opcode.LOAD_STATIONARY_PAIR,
        counts=(1, 1, 1, lanes),
        src=(8, (0, 0, 0, 1)),
        lanes=lanes,
        dtype=DType.FP8_E5M2,
        second=(20, (0, 0, 0, 1)),
    )
    for width in (lanes + 1, lanes + 2, 3 * lanes):
        program = [load_pair, matmul(width, pair=True), load, matmul(width)] * 10
        assert await cycles_between(program, 20) == 20 * width, width
    for width in (1, 2, 3, lanes):
        program = [matmul(width, pair=index % 3 > 0) for index in range(20)]
        assert await cycles_between(program, 20) == 20 * width, width


def _engine_test(name: str, run: Callable, **options: object) -> None:
    async def test(dut) -> None:
        await run(dut, **options)

    test.__name__ = test.__qualname__ = name
    globals()[name] = cocotb.test(timeout_time=10, timeout_unit="ms")(test)


_engine_test("engine_latency", latency)
_engine_test("engine_throughput", throughput)
_engine_test("engine_no_stalls", run_random, stall=0.0, idle=0.0, special=False)
_engine_test("engine_special", run_random, stall=0.0, idle=0.0, special=True)
_engine_test("engine_idle", run_random, stall=0.0, idle=0.8, special=False)
_engine_test("engine_stalls", run_random, stall=0.5, idle=0.2, special=True)
_engine_test("engine_reset", run_random, stall=0.0, idle=0.0, special=False, interrupt=True)
