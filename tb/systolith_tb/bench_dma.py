"""Two DMA queues and a fetcher behind the AXI arbiters, against `systolith.golden.dma`.

DRAM is cocotbext-axi's slave over a numpy array (any pauses, error responses past its end), or, to
measure throughput, a pipelined model with a fixed latency.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter, deque
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiBus, AxiSlave
from systolith.golden import dither
from systolith.golden.dma import DmaFault, dma_store, execute, first_bad_burst
from systolith_hdl.config import get_config
from systolith_hdl.dma.accumulate import column_cycles
from systolith_hdl.dma.queue import DRAW_DELAY
from systolith_hdl.dma.rows import ROW_CYCLES
from systolith_hdl.formats import FLOATS, FORMATS, INTEGERS, DType
from systolith_hdl.isa import FaultCause, Opcode, Rounding, decode, encode
from systolith_hdl.ports import READ_LATENCY

from .stimulus import random_counter

CONFIG = get_config(os.environ.get("SYSTOLITH_BENCH_CONFIG", "nano"))
N = CONFIG.lanes
BEAT = CONFIG.axi_bytes
DEPTH = CONFIG.sbuf_depth
QUEUES = 2
FIRST_ENGINE = 3  #: number of the first queue's engine
REGION = 6 * 4096  #: bytes of DRAM that each queue has to itself
FETCHED = QUEUES * REGION  #: a page that only the fetcher reads
DRAM_BYTES = FETCHED + 4096
#: Cycles from an instruction's acceptance to `done` beside the beats and the memory's latency.
OVERHEAD = 20


@dataclasses.dataclass(frozen=True)
class Stalls:
    """Probabilities that a DRAM channel pauses, and that SBUF holds a request back, in a cycle."""

    source: float = 0.0
    sink: float = 0.0
    sbuf: float = 0.0


STALLS = {
    "none": Stalls(),
    "idle": Stalls(source=0.5),
    "backpressure": Stalls(sink=0.5, sbuf=0.5),
    "both": Stalls(source=0.3, sink=0.3, sbuf=0.3),
}


def random_words(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits with the corners of rounding among them."""
    words = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    plain = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
    words = np.where(rng.random(shape) < 0.4, plain, words)
    corners = np.array(
        [
            0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0x7F7FFFFF,
            0x7F7F7FFF, 0x7F7F8000, 0x00008000, 0x00018000, 0x00007FFF, 0x3F808000, 0x3F818000,
            0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x387FC001,  # FP16: overflow, tiny
            0x43E80000, 0x43E80001, 0x3A800000, 0x3A800001, 0x3C700000,  # E4M3
            0x476FFFFF, 0x47700000, 0x37000000, 0x37000001, 0x38200000,  # E5M2
        ],
        np.uint32,
    )  # fmt: skip
    return np.where(rng.random(shape) < 0.1, rng.choice(corners, shape), words)


class Dram:
    """Memory behind cocotbext-axi's slave; an access past its end is answered with an error."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.bytes = random_words(rng, (DRAM_BYTES // 4,)).view(np.uint8)

    async def read(self, address: int, length: int) -> bytes:
        if address + length > DRAM_BYTES:
            raise IndexError(address)
        return self.bytes[address : address + length].tobytes()

    async def write(self, address: int, data: bytes) -> None:
        if address + len(data) > DRAM_BYTES:
            raise IndexError(address)
        self.bytes[address : address + len(data)] = np.frombuffer(data, np.uint8)


class PipelinedDram:
    """DRAM that takes a burst per cycle and answers it `latency` cycles later, a beat per cycle.

    Counts its data beats and the bursts by length.
    """

    def __init__(self, dut: Any, memory: np.ndarray, *, latency: int) -> None:
        self.dut = dut
        self.memory = memory
        self.latency = latency
        self.beats = 0
        self.bursts: Counter[int] = Counter()
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        dut = self.dut
        reads: deque[tuple[int, int, int, bool]] = deque()  # due, id, address, last
        writes: deque[tuple[int, int, int]] = deque()
        answers: deque[tuple[int, int]] = deque()
        offered = answering = False
        cycle = written = 0
        for name in ("awready", "wready", "arready"):
            getattr(dut, f"m_axi__{name}").value = 1
        dut.m_axi__rvalid.value = 0
        dut.m_axi__bvalid.value = 0
        dut.m_axi__rresp.value = 0
        dut.m_axi__bresp.value = 0
        while True:
            await RisingEdge(dut.clk)
            cycle += 1
            if offered and int(dut.m_axi__rready.value):
                reads.popleft()
                self.beats += 1
            if answering and int(dut.m_axi__bready.value):
                answers.popleft()
            if int(dut.m_axi__arvalid.value):
                number, length = int(dut.m_axi__arid.value), int(dut.m_axi__arlen.value) + 1
                address = int(dut.m_axi__araddr.value)
                self.bursts[length] += 1
                due = cycle + self.latency
                reads.extend(
                    (due, number, address + i * BEAT, i == length - 1) for i in range(length)
                )
            if int(dut.m_axi__awvalid.value):
                length = int(dut.m_axi__awlen.value) + 1
                self.bursts[length] += 1
                writes.append((int(dut.m_axi__awid.value), int(dut.m_axi__awaddr.value), length))
            if int(dut.m_axi__wvalid.value):
                self.beats += 1
                number, address, length = writes[0]
                data = int(dut.m_axi__wdata.value).to_bytes(BEAT, "little")
                strobe = int(dut.m_axi__wstrb.value)
                for lane in range(BEAT):
                    if strobe >> lane & 1:
                        self.memory[address + written * BEAT + lane] = data[lane]
                written += 1
                assert int(dut.m_axi__wlast.value) == (written == length)
                if written == length:
                    written = 0
                    writes.popleft()
                    answers.append((cycle + self.latency, number))
            offered = bool(reads) and reads[0][0] <= cycle
            dut.m_axi__rvalid.value = int(offered)
            if offered:
                _, number, address, last = reads[0]
                dut.m_axi__rid.value = number
                dut.m_axi__rlast.value = int(last)
                dut.m_axi__rdata.value = int.from_bytes(
                    self.memory[address : address + BEAT].tobytes(), "little"
                )
            answering = bool(answers) and answers[0][0] <= cycle
            dut.m_axi__bvalid.value = int(answering)
            if answering:
                dut.m_axi__bid.value = answers[0][1]


class Queue:
    """One queue's sequencer and SBUF."""

    def __init__(self, dut: Any, number: int, rng: np.random.Generator) -> None:
        self.dut = dut
        self.number = number
        self.words = random_words(rng, (N, DEPTH))
        self.stall = 0.0
        self.done = 0
        self.waited = 0  #: cycles until the last instruction was taken
        self.seed = random.getrandbits(32)
        self.pin("issue__seed").value = self.seed
        for name in ("issue__instruction__valid", "stop", "read__response__valid"):
            self.pin(name).value = 0
        for name in ("read__request__ready", "write__request__ready"):
            self.pin(name).value = 0
        cocotb.start_soon(self._memory())

    def pin(self, name: str) -> Any:
        first, _, rest = name.partition("__")
        return getattr(self.dut, f"{first}__{self.number}" + (f"__{rest}" if rest else ""))

    async def _memory(self) -> None:
        read_valid, read_ready = self.pin("read__request__valid"), self.pin("read__request__ready")
        read_address = self.pin("read__request__payload")
        response_valid, response = (
            self.pin("read__response__valid"),
            self.pin("read__response__payload"),
        )
        write_valid = self.pin("write__request__valid")
        write_ready = self.pin("write__request__ready")
        write_payload = self.pin("write__request__payload")
        done = self.pin("issue__done")
        may_read = may_write = False
        pipe: deque[bytes | None] = deque([None] * (READ_LATENCY - 1))
        while True:
            await RisingEdge(self.dut.clk)
            self.done += int(done.value)
            taken = None
            if may_read and int(read_valid.value):
                taken = self.words[:, int(read_address.value)].tobytes()
            if may_write and int(write_valid.value):
                payload = int(write_payload.value)
                for lane in range(N):
                    if payload >> (32 * N + lane) & 1:
                        word = payload >> (32 * lane) & 0xFFFFFFFF
                        self.words[lane, payload >> 33 * N] = word
            pipe.append(taken)
            arriving = pipe.popleft()
            response_valid.value = int(arriving is not None)
            if arriving is not None:
                response.value = int.from_bytes(arriving, "little")
            may_read = random.random() >= self.stall
            may_write = random.random() >= self.stall
            read_ready.value = int(may_read)
            write_ready.value = int(may_write)

    async def offer(self, raw: bytes, counter: int = 0) -> None:
        """Has one instruction taken, the one after `counter` others."""
        self.pin("issue__counter").value = counter
        self.pin("issue__instruction__payload").value = int.from_bytes(raw, "little")
        self.pin("issue__instruction__valid").value = 1
        self.waited = 0
        while True:
            await RisingEdge(self.dut.clk)
            self.waited += 1
            if int(self.pin("issue__instruction__ready").value):
                break
        self.pin("issue__instruction__valid").value = 0

    def random(self, fields: dict[str, int], counter: int) -> np.ndarray | None:
        """The words by which a store rounds, if it does so stochastically."""
        if not fields.get("rounding"):
            return None
        elements = int(np.prod([fields[f"counts.{d}"] for d in range(4)]))
        engine = FIRST_ENGINE + self.number
        return dither.random_words(
            self.seed, counter, engine, elements=elements, lanes=fields["lanes"]
        )

    async def execute(self, raw: bytes, counter: int = 0) -> int:
        """Executes one instruction; returns cycles from the one after acceptance to `done`."""
        before = self.done
        await self.offer(raw, counter)
        cycles = 0
        while self.done == before:
            await RisingEdge(self.dut.clk)
            cycles += 1
        assert self.done == before + 1
        return cycles


async def start(dut: Any, *, slave: bool = True, stalls: Stalls = STALLS["none"]) -> tuple:
    """Starts clock and models, resets; returns (dram, queues, slave)."""
    rng = np.random.default_rng(random.getrandbits(32))
    Clock(dut.clk, 10, unit="ns").start()
    dut.rst.value = 1
    dut.fetch__ar__valid.value = 0
    dut.fetch__r__ready.value = 0
    for pin in ("awready", "wready", "arready", "rvalid", "bvalid"):
        getattr(dut, f"m_axi__{pin}").value = 0
    dram = Dram(rng)
    queues = [Queue(dut, number, rng) for number in range(QUEUES)]
    axi = None
    if slave:
        axi = AxiSlave(AxiBus.from_prefix(dut, "m_axi_"), dut.clk, dut.rst, target=dram)
        for channel in (axi.write_if.b_channel, axi.read_if.r_channel):
            channel.set_pause_generator(_pauses(stalls.source))
        for channel in (axi.write_if.aw_channel, axi.write_if.w_channel, axi.read_if.ar_channel):
            channel.set_pause_generator(_pauses(stalls.sink))
        for interface in (axi.write_if, axi.read_if):
            interface.log.setLevel("ERROR")
        for channel in (
            axi.write_if.aw_channel,
            axi.write_if.w_channel,
            axi.write_if.b_channel,
            axi.read_if.ar_channel,
            axi.read_if.r_channel,
        ):
            channel.log.setLevel("ERROR")
    for queue in queues:
        queue.stall = stalls.sbuf
    await ClockCycles(dut.clk, 4)
    dut.rst.value = 0
    await RisingEdge(dut.clk)
    return dram, queues, axi


def _pauses(probability: float) -> Any:
    while True:
        yield random.random() < probability


TYPES = (*FLOATS, *INTEGERS)

MODES = (
    "merged",
    "columns",
    "turned",
    "single",
    "broadcast",
    "broadcast_single",
    "overlapping",
    "one_lane",
    "anything",
)


def make(
    mode: str, *, low: int, high: int, columns: int = 200, opcode: Opcode | None = None
) -> tuple[Opcode, dict[str, Any]]:
    """Draws an instruction of a mode whose elements lie in bytes low to high - 1."""
    while True:
        size_of = random.choice(TYPES)
        size = FORMATS[size_of].bytes
        lanes = random.choice([N, N, random.randint(1, N)])
        if mode == "one_lane":
            lanes = 1
        inner = random.choice([1, 2, N, 2 * N, random.randint(1, columns)])
        counts = [1, 1, 1, inner]
        for d in random.sample(range(3), 3):
            counts[d] = random.randint(1, max(1, min(4, columns // int(np.prod(counts)))))
        if random.random() < 0.05:
            counts = [1, 1, 1, 1]

        # A stride of anything: mostly of whole elements, sometimes only of halfwords, or odd.
        def anything(size: int = size) -> int:
            unit = random.choice([size, size, size, 2, 1])
            return random.randint(-300 // unit, 300 // unit) * unit

        strides = [anything() for _ in range(4)]
        lane_stride = anything()
        if mode in ("merged", "columns", "one_lane"):
            lane_stride = size if mode != "one_lane" else lane_stride
            if mode != "columns":
                strides[3] = lanes * size
        elif mode in ("turned", "broadcast"):
            strides[3] = size
            lane_stride = random.choice([-1, 1]) * random.choice(
                [N * size, inner * size, inner * size + 2, 3 * N * size, 1000]
            )
        elif mode == "overlapping":
            strides[3] = size
            lane_stride = random.choice([-1, 1]) * random.randint(0, N) * size
        if mode.startswith("broadcast"):
            lane_stride = 0
        if mode == "merged" and random.random() < 0.5:
            # Passes follow each other too.
            strides[2] = counts[3] * strides[3]

        reach = [
            (c - 1) * s for c, s in zip([*counts, lanes], [*strides, lane_stride], strict=True)
        ]
        before = -sum(min(r, 0) for r in reach)
        after = sum(max(r, 0) for r in reach) + size
        if before + after > high - low:
            continue
        base = random.randint(low + before, high - after)
        base &= ~1 if random.random() < 0.1 else -size
        if base < low + before:
            continue

        local = [0, 0, 0, random.choice([1, 1, 2, 3, -1])]
        for d in (2, 1, 0):
            local[d] = local[d + 1] * counts[d + 1]
        if random.random() < 0.2:
            local = [random.randint(-5, 5) for _ in range(4)]
        reach = [(c - 1) * s for c, s in zip(counts, local, strict=True)]
        before = -sum(min(r, 0) for r in reach)
        after = sum(max(r, 0) for r in reach) + 1
        if before + after > DEPTH:
            continue
        fields: dict[str, Any] = {
            "lanes": lanes,
            "local.base": random.randint(before, DEPTH - after),
            "dram_base": base,
            "lane_stride": lane_stride,
            "dram_dtype": size_of,
        }
        for d in range(4):
            fields |= {
                f"counts.{d}": counts[d],
                f"local.strides.{d}": local[d],
                f"dram_strides.{d}": strides[d],
            }
        opcode = opcode or random.choice([Opcode.DMA_LOAD, Opcode.DMA_STORE])
        fields["accumulate"] = int(random.random() < 0.3)
        if opcode is Opcode.DMA_STORE:
            fields["rounding"] = random.choice(list(Rounding))
        return opcode, fields


#: Opcodes with indices -> those of their rows.
INDEXED = {Opcode.GATHER: Opcode.DMA_LOAD, Opcode.SCATTER: Opcode.DMA_STORE}
#: SBUF from this word on is kept for indices.
INDEX_BASE = DEPTH - 64


def make_indexed(
    mode: str, queue: Queue, *, low: int, high: int, opcode: Opcode, columns: int = 40
) -> dict[str, Any]:
    """Draws a GATHER or SCATTER whose rows are of a mode and lie in bytes low to high - 1, and
    places its indices in the queue's SBUF."""
    while True:
        _, row = make(mode, low=low, high=high, columns=columns, opcode=INDEXED[opcode])
        counts = random.choice([1, N - 1, N, 2 * N + 1, random.randint(1, 20)])
        if row["accumulate"]:
            counts = min(counts, 6)
        fields: dict[str, Any] = {
            name: row[name]
            for name in ("lanes", "local.base", "dram_base", "lane_stride", "dram_dtype")
        }
        fields |= {
            "counts.0": counts,
            "counts.1": 1,
            "counts.2": 1,
            "counts.3": row["counts.3"],
            "local.strides.3": row["local.strides.3"],
            "local.strides.0": random.choice([row["counts.3"], random.randint(-9, 9)]),
            "column_stride": row["dram_strides.3"],
            "accumulate": row["accumulate"],
        }
        if opcode is Opcode.SCATTER:
            fields["rounding"] = row["rounding"]
        # A row's own extent, and rows as far apart as there is room for, or over each other.
        strides = {fields["column_stride"]: row["counts.3"], fields["lane_stride"]: row["lanes"]}
        size = FORMATS[row["dram_dtype"]].bytes
        reach = [(n - 1) * s for s, n in strides.items()]
        first = row["dram_base"] + sum(min(r, 0) for r in reach)
        last = row["dram_base"] + sum(max(r, 0) for r in reach) + size
        fields["rows"] = random.choice([1, 2, 5, 30])
        room = max((high - last) // fields["rows"], 0)
        fields["row_stride"] = random.choice([0, room, -((first - low) // fields["rows"]), size])
        fields["row_stride"] = int(fields["row_stride"] / size) * size
        top = (fields["rows"] - 1) * fields["row_stride"]
        if min(first, first + top) < low or max(last, last + top) > high:
            continue
        fields["index.base"] = random.randint(INDEX_BASE, DEPTH - -(-counts // N))
        # Whatever is written has to keep off the indices.
        reach = [(counts - 1) * fields["local.strides.0"]]
        reach.append((row["counts.3"] - 1) * row["local.strides.3"])
        bottom = row["local.base"] + sum(min(r, 0) for r in reach)
        if bottom < 0 or row["local.base"] + sum(max(r, 0) for r in reach) >= INDEX_BASE:
            continue
        place_indices(queue, fields)
        return fields


def place_indices(queue: Queue, fields: dict[str, Any]) -> None:
    """Draws the indices of a GATHER or SCATTER into the queue's SBUF; many are drawn twice."""
    for i in range(fields["counts.0"]):
        place = i % N, fields["index.base"] + i // N
        queue.words[place] = random.randrange(fields["rows"])


async def check(queue: Queue, dram: Dram, opcode: Opcode, fields: dict[str, Any]) -> int:
    """Executes an instruction and compares SBUF and the queue's part of DRAM with golden."""
    raw = encode(opcode, fields)
    low, high = queue.number * REGION, (queue.number + 1) * REGION
    memory, words = dram.bytes.copy(), queue.words.copy()
    counter = random_counter()
    execute(opcode, memory, words, decode(raw)[1], queue.random(decode(raw)[1], counter))
    cycles = await queue.execute(raw, counter)
    bad = np.argwhere(queue.words != words)
    assert not len(bad), f"{opcode.name} {fields}: SBUF differs at (lane, address) {bad[:4]}"
    changed = np.flatnonzero(dram.bytes[low:high] != memory[low:high]) + low
    assert not len(changed), f"{opcode.name} {fields}: DRAM differs at bytes {changed[:4]}"
    return cycles


async def fetch(dut: Any, dram: Dram, stop: list[bool]) -> int:
    """Fetches 64 bytes over and over through the arbiter and compares them; returns how often."""
    fetched = 0
    while not stop:
        address = FETCHED + random.randrange(4096 // 64) * 64
        length, size = 64 // BEAT - 1, BEAT.bit_length() - 1
        dut.fetch__ar__payload.value = address | length << 48 | size << 56 | 1 << 59
        dut.fetch__ar__valid.value = 1
        while True:
            await RisingEdge(dut.clk)
            if int(dut.fetch__ar__ready.value):
                break
        dut.fetch__ar__valid.value = 0
        dut.fetch__r__ready.value = 1
        data = b""
        last = 0
        while not last:
            await RisingEdge(dut.clk)
            if int(dut.fetch__r__valid.value):
                beat = int(dut.fetch__r__payload.value)
                data += (beat & ((1 << 8 * BEAT) - 1)).to_bytes(BEAT, "little")
                last = beat >> (8 * BEAT + 2)
        dut.fetch__r__ready.value = 0
        assert data == dram.bytes[address : address + 64].tobytes()
        fetched += 1
        await ClockCycles(dut.clk, random.randint(1, 20))
    return fetched


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(stall=list(STALLS))
async def random_instructions(dut: Any, stall: str) -> None:
    """Both queues and the fetcher at once, every mode, against golden after each instruction."""
    dram, queues, axi = await start(dut, stalls=STALLS[stall])
    compared: Counter[tuple[str, str]] = Counter()
    added: Counter[str] = Counter()

    async def work(queue: Queue) -> None:
        low = queue.number * REGION
        for mode in [*MODES, *random.choices(MODES, k=5)]:
            for opcode in (Opcode.DMA_LOAD, Opcode.DMA_STORE):
                _, fields = make(mode, low=low, high=low + REGION, columns=160 // N, opcode=opcode)
                await check(queue, dram, opcode, fields)
                compared[mode, opcode.name] += 1
                added[opcode.name] += fields["accumulate"]
            for opcode in INDEXED:
                fields = make_indexed(mode, queue, low=low, high=low + REGION, opcode=opcode)
                await check(queue, dram, opcode, fields)
                compared[mode, opcode.name] += 1
                added[opcode.name] += fields["accumulate"]

    stop: list[bool] = []
    fetcher = cocotb.start_soon(fetch(dut, dram, stop))
    workers = [cocotb.start_soon(work(queue)) for queue in queues]
    for worker in workers:
        await worker
    stop.append(True)
    assert await fetcher > 10
    await ClockCycles(dut.clk, 20)
    opcodes = [*INDEXED, *INDEXED.values()]
    assert all(added[opcode.name] for opcode in opcodes)
    assert set(compared) == {(mode, opcode.name) for mode in MODES for opcode in opcodes}
    assert [queue.done for queue in queues] == [compared.total() // QUEUES] * QUEUES
    for queue in queues:
        assert not int(queue.pin("issue__busy").value) and not int(queue.pin("active").value)
        assert not int(queue.pin("fault__valid").value)
    assert not int(dut.outstanding_reads.value) and not int(dut.outstanding_writes.value)
    channels = (axi.write_if.aw_channel, axi.write_if.w_channel, axi.read_if.ar_channel)
    assert all(channel.empty() for channel in channels)


def _fields(mode: str, dtype: DType, columns: int, base: int) -> dict[str, Any]:
    """A well-formed copy of `columns` columns of N lanes; `base` may be unaligned."""
    size = FORMATS[dtype].bytes
    strides = {
        "merged": (N * size, size),
        "columns": (N * size + 4 * BEAT, size),
        "turned": (size, columns * size),
        "single": (2 * size, columns * 2 * size),
    }[mode]
    return {
        "lanes": N,
        "counts.0": 1,
        "counts.1": 1,
        "counts.2": 1,
        "counts.3": columns,
        "local.base": 0,
        "local.strides.3": 1,
        "dram_base": base,
        "dram_strides.3": strides[0],
        "lane_stride": strides[1],
        "dram_dtype": dtype,
    }


def run_beats(mode: str, dtype: DType, columns: int, base: int, *, store: bool) -> int:
    """Beats that the runs of `_fields` touch: the cycles its data takes at least. A load does not
    read that again in which the row of a turned tile ended, unless there is nothing else to read.
    """
    size = FORMATS[dtype].bytes
    fields = _fields(mode, dtype, columns, base)
    step, lane = fields["dram_strides.3"], fields["lane_stride"]
    if mode == "merged":
        runs = [(base, columns * N * size)]
    elif mode == "columns":
        runs = [(base + c * step, N * size) for c in range(columns)]
    elif mode == "turned":
        runs = [
            (base + c * size + row * lane, min(N, columns - c) * size)
            for c in range(0, columns, N)
            for row in range(N)
        ]
    else:
        runs = [(base + c * step + row * lane, size) for c in range(columns) for row in range(N)]
    beats = sum((a + n - 1) // BEAT - a // BEAT + 1 for a, n in runs)
    if mode == "turned" and not store:
        beats -= sum(a % BEAT != 0 and a % BEAT + n > BEAT for a, n in runs[N:])
    return beats


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(latency=[10, 100])
@cocotb.parametrize(rounding=list(Rounding))
async def throughput(dut: Any, latency: int, rounding: Rounding) -> None:
    """One beat per cycle (elements of one byte: one row), in every mode and at any alignment,
    through the memory's latency, however stores round."""
    dram, queues, _ = await start(dut, slave=False)
    model = PipelinedDram(dut, dram.bytes, latency=latency)
    queue = queues[0]
    checked = 0
    for mode in ("merged", "columns", "turned", "single"):
        for dtype in (DType.FP32, DType.BF16, DType.FP8_E4M3):
            size = FORMATS[dtype].bytes
            for base in (0, 2 * size + min(size, 2)):
                for opcode in (Opcode.DMA_LOAD, Opcode.DMA_STORE):
                    columns = 32 * N if mode != "single" else 8 * N
                    columns = min(columns, 20_000 // (12 * N))
                    fields = _fields(mode, dtype, columns, base)
                    store = opcode is Opcode.DMA_STORE
                    beats = run_beats(mode, dtype, columns, base, store=store)
                    if store:
                        fields["rounding"] = rounding
                    model.beats = 0
                    model.bursts.clear()
                    cycles = await check(queue, dram, opcode, fields)
                    assert model.beats == beats
                    # What 64 bursts in flight can move in one round trip; 2 cycles per arbiter
                    # stage and the queue's own registers come on top of the latency.
                    bursts = model.bursts.total()
                    rows = columns if mode == "merged" else 0  # at least a cycle each
                    limit = max(beats, rows, bursts * (latency + 14) / 64)
                    dut._log.info(
                        f"{mode} {dtype.name} {opcode.name} at {base}, latency {latency}: "
                        f"{cycles} cycles, {beats} beats, {bursts} bursts, limit {limit:.0f}"
                    )
                    fill = 2 * N  # a tile is filled before it is drained
                    draw = DRAW_DELAY if rounding is Rounding.STOCHASTIC else 0
                    assert cycles <= limit * 1.03 + latency + OVERHEAD + fill + draw
                    if mode == "merged" and base == 0:
                        assert model.bursts[16] == beats // 16
                    checked += 1
    assert checked == 48


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(rounding=list(Rounding))
async def stores_follow_stores(dut: Any, rounding: Rounding) -> None:
    """Stores of different sizes, one right after the other: a beat per cycle all the while, each
    with random words of its own."""
    dram, queues, _ = await start(dut, slave=False)
    PipelinedDram(dut, dram.bytes, latency=20)
    queue = queues[0]
    memory = dram.bytes.copy()
    beats = at = 0
    raws = []
    for counter in range(40):
        columns = random.choice([N, 2 * N, random.randint(1, 3 * N)])
        fields = _fields("merged", DType.BF16, columns, at)
        fields |= {"rounding": rounding, "local.base": random.randrange(DEPTH - columns)}
        raws.append(encode(Opcode.DMA_STORE, fields))
        decoded = decode(raws[-1])[1]
        dma_store(memory, queue.words, decoded, queue.random(decoded, counter))
        at += columns * N * 2
        beats += columns * N * 2 // BEAT
    cycles = 0

    async def count() -> None:
        nonlocal cycles
        while queue.done < len(raws):
            await RisingEdge(dut.clk)
            cycles += 1

    counting = cocotb.start_soon(count())
    for counter, raw in enumerate(raws):
        await queue.offer(raw, counter)
    await counting
    assert (dram.bytes == memory).all()
    draw = DRAW_DELAY if rounding is Rounding.STOCHASTIC else 0
    dut._log.info(f"{rounding.name}: {cycles} cycles, {beats} beats")
    assert cycles <= beats + 20 + OVERHEAD + draw


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(opcode=list(INDEXED))
async def indexed_throughput(dut: Any, opcode: Opcode) -> None:
    """Rows follow each other at a beat per cycle, or one every `ROW_CYCLES`."""
    dram, queues, _ = await start(dut, slave=False)
    latency = 20
    model = PipelinedDram(dut, dram.bytes, latency=latency)
    queue = queues[0]
    checked = 0
    for columns in (1, 2, 4, 8, 32):
        count = min(40, (DEPTH - 64) // columns)
        item = 4 * N * columns
        fields = {
            "lanes": N, "counts.0": count, "counts.1": 1, "counts.2": 1, "counts.3": columns,
            "local.strides.0": columns, "local.strides.3": 1, "index.base": INDEX_BASE,
            "row_stride": item, "rows": REGION // item, "column_stride": 4 * N, "lane_stride": 4,
            "dram_dtype": DType.FP32,
        }  # fmt: skip
        place_indices(queue, fields)
        model.beats = 0
        cycles = await check(queue, dram, opcode, fields)
        beats = count * item // BEAT
        assert model.beats == beats
        limit = max(beats, ROW_CYCLES * count)
        total = cycles + queue.waited
        dut._log.info(f"{opcode.name} of {item} bytes: {total} cycles, {beats} beats")
        assert limit <= total <= limit + latency + OVERHEAD + ROW_CYCLES + 2 * N
        checked += 1
    assert checked == 5


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(dtype=[DType.FP32, DType.INT32, DType.BF16])
async def accumulation(dut: Any, dtype: DType) -> None:
    """A column every `column_cycles` cycles; rows of one index are all added, each waited for."""
    dram, queues, _ = await start(dut, slave=False)
    latency = 20
    PipelinedDram(dut, dram.bytes, latency=latency)
    queue = queues[0]
    wait = latency + OVERHEAD + 2 * N
    fields = _fields("merged", dtype, 16, 0) | {"accumulate": 1}
    cycles = await check(queue, dram, Opcode.DMA_LOAD, fields)
    dut._log.info(f"16 columns added to SBUF: {cycles} cycles")
    assert 16 * column_cycles(N) <= cycles <= 16 * column_cycles(N) + wait
    # All rows are one, and what comes to it are their sums.
    item = FORMATS[dtype].bytes
    fields = {
        "lanes": N, "counts.0": 7, "counts.1": 1, "counts.2": 1, "counts.3": 8, "accumulate": 1,
        "local.strides.0": 8, "local.strides.3": 1, "index.base": INDEX_BASE, "dram_base": 64,
        "row_stride": 8 * N * item, "rows": 9, "column_stride": N * item, "lane_stride": item,
        "dram_dtype": dtype,
    }  # fmt: skip
    for indices in ([5] * 7, [3, 4, 3, 3, 0, 8, 4]):
        for i, index in enumerate(indices):
            queue.words[i % N, INDEX_BASE + i // N] = index
        cycles = await check(queue, dram, Opcode.SCATTER, fields)
        cycles += queue.waited
        dut._log.info(f"7 rows of {8 * N * item} bytes added to DRAM: {cycles} cycles")
        assert 7 * 8 * column_cycles(N) <= cycles
        assert cycles <= 7 * (8 * (column_cycles(N) + 4 * N // BEAT) + 2 * wait + ROW_CYCLES)
    # The same without indices: what lies apart, and one row again and again.
    for stride in (8 * N * item, 0):
        plain = _fields("merged", dtype, 8, 0) | {"accumulate": 1, "counts.0": 5}
        plain |= {"local.strides.0": 8, "dram_strides.0": stride}
        await check(queue, dram, Opcode.DMA_STORE, plain)


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(stall=["none", "both"])
async def indices_of_the_instruction_before(dut: Any, stall: str) -> None:
    """Indices that a load just brings, right before the instruction that needs them, and what a
    GATHER brings stored right after it."""
    dram, queues, _ = await start(dut, stalls=STALLS[stall])
    queue = queues[0]
    numbers = dram.bytes[:4096].view(np.uint32)
    for _ in range(6):
        numbers[:] = np.random.default_rng(random.getrandbits(32)).integers(0, 9, 1024)
        count, table = random.randint(1, 3 * N), random.choice([0, 8192])
        load = {
            "lanes": N, "counts.0": 1, "counts.1": 1, "counts.2": 1, "counts.3": -(-count // N),
            "local.base": INDEX_BASE, "local.strides.3": 1, "dram_strides.3": 4 * N,
            "dram_base": 0, "lane_stride": 4, "dram_dtype": DType.INT32,
        }  # fmt: skip
        # The second takes its indices from what the first has gathered.
        gather = {
            "lanes": N, "counts.0": count, "counts.1": 1, "counts.2": 1, "counts.3": 2,
            "local.base": 8, "local.strides.0": 2, "local.strides.3": 1, "dram_base": table,
            "row_stride": 4 * N, "rows": 9, "column_stride": 4 * N, "lane_stride": 4,
            "dram_dtype": DType.INT32, "index.base": INDEX_BASE,
        }  # fmt: skip
        if table == 0:
            second = gather | {"index.base": 8, "local.base": 400, "counts.0": min(count, 2 * N)}
        else:
            second = gather | {"dram_base": 0, "local.base": 400}
        scatter = second | {"local.base": 400, "dram_base": 12288}
        work = [
            (Opcode.DMA_LOAD, load),
            (Opcode.GATHER, gather),
            (Opcode.GATHER, second),
            (Opcode.SCATTER, scatter),
            (Opcode.DMA_LOAD, load | {"dram_base": 12288, "local.base": 300}),
        ]
        memory, words = dram.bytes.copy(), queue.words.copy()
        before = queue.done
        for opcode, fields in work:
            execute(opcode, memory, words, decode(encode(opcode, fields))[1])
        for opcode, fields in work:
            await queue.offer(encode(opcode, fields))
        while queue.done < before + len(work):
            await RisingEdge(dut.clk)
        assert (queue.words == words).all() and (dram.bytes == memory).all()
        await ClockCycles(dut.clk, 3)
        assert queue.done == before + len(work)


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(opcode=list(INDEXED), stall=["none", "both"])
async def bad_indices(dut: Any, opcode: Opcode, stall: str) -> None:
    """An index outside the table: the rows before it are moved, no others; then nothing is taken
    any more, no burst is left, and the other queue works. So it is if a row leaves DRAM."""
    outside = 0
    for mode in MODES:
        dram, queues, _ = await _restart(dut, STALLS[stall])
        queue, other = queues
        fields = make_indexed(mode, queue, low=0, high=REGION, opcode=opcode)
        at = random.randrange(fields["counts.0"])
        leaves = mode == "columns" and fields["row_stride"] != 0
        if leaves and opcode is Opcode.SCATTER:
            # Rows after one that the bus refuses may have been stored: let there be none.
            at = fields["counts.0"] - 1
        place = at % N, fields["index.base"] + at // N
        wrong = fields["rows"] + random.choice([0, 1, 100, (1 << 31) - fields["rows"]])
        queue.words[place] = random.choice([wrong, (1 << 32) - 1])
        if leaves:
            # An index of the table, but of a row that DRAM does not have.
            queue.words[place] = 1 << 31
            fields["rows"] = (1 << 32) - 1
        raw = encode(opcode, fields)
        decoded = decode(raw)[1]
        memory, words = dram.bytes.copy(), queue.words.copy()
        try:
            execute(opcode, memory, words, decoded, queue.random(decoded, 5))
            raise AssertionError("golden finds nothing wrong")
        except DmaFault as fault:
            cause, address = fault.cause, fault.address
        outside += cause is FaultCause.OUT_OF_BOUNDS
        offering = cocotb.start_soon(queue.offer(raw, 5))
        for _ in range(20_000):
            await RisingEdge(dut.clk)
            if int(queue.pin("fault__valid").value) and not int(queue.pin("active").value):
                break
        else:
            raise AssertionError("no fault, or bursts left in flight")
        assert int(queue.pin("fault__cause").value) == cause.value
        assert int(queue.pin("fault__address").value) == address, fields
        await ClockCycles(dut.clk, 4)
        assert queue.done == 0 and not int(queue.pin("issue__instruction__ready").value)
        assert (queue.words == words).all() and (dram.bytes == memory).all()
        assert not int(dut.outstanding_reads.value) and not int(dut.outstanding_writes.value)
        opcode_, more = make("turned", low=REGION, high=2 * REGION, columns=20)
        await check(other, dram, opcode_, more)
        assert queue.done == 0 and other.done == 1
        offering.cancel()
        queue.pin("issue__instruction__valid").value = 0
    assert outside >= len(MODES) - 1


@cocotb.test(timeout_time=1_000, timeout_unit="us")
@cocotb.parametrize(opcode=["DMA_LOAD", "DMA_STORE"], stall=["none", "both"])
async def error_responses(dut: Any, opcode: str, stall: str) -> None:
    """Accesses that leave DRAM: fault record as golden, bursts finished, no more done."""
    operation = Opcode[opcode]
    for mode in MODES:
        dram, queues, _ = await _restart(dut, STALLS[stall])
        queue, other = queues
        while True:
            # Half of the room past the end; what must not be written is the fetcher's page.
            _, fields = make(
                mode,
                low=DRAM_BYTES - REGION,
                high=DRAM_BYTES + REGION,
                columns=60,
                opcode=operation,
            )
            fields["accumulate"] = 0
            raw = encode(operation, fields)
            store = operation is Opcode.DMA_STORE
            address = first_bad_burst(decode(raw)[1], DRAM_BYTES, N, store=store)
            if address is not None:
                break
        await queue.offer(raw)
        for _ in range(20_000):
            await RisingEdge(dut.clk)
            if int(queue.pin("fault__valid").value) and not int(queue.pin("active").value):
                break
        else:
            raise AssertionError("no fault, or bursts left in flight")
        cause = FaultCause.AXI_WRITE_ERROR if store else FaultCause.AXI_READ_ERROR
        assert int(queue.pin("fault__cause").value) == cause.value
        assert int(queue.pin("fault__address").value) == address, fields
        # The arbiters are idle, the queue takes nothing more, and the other one still works.
        await ClockCycles(dut.clk, 4)
        assert not int(dut.outstanding_reads.value) and not int(dut.outstanding_writes.value)
        queue.pin("issue__instruction__valid").value = 1
        opcode_, fields = make("turned", low=REGION, high=2 * REGION, columns=20)
        await check(other, dram, opcode_, fields)
        assert queue.done == 0 and other.done == 1
        assert int(queue.pin("issue__busy").value)
        assert not int(queue.pin("active").value)
        queue.pin("issue__instruction__valid").value = 0


_models: list[Any] = []


async def _restart(dut: Any, stalls: Stalls) -> tuple:
    """`start` once per test, then a reset with fresh queues' counters and memories."""
    if not _models or _models[0] is not dut or _models[2] is not stalls:
        _models[:] = [dut, await start(dut, stalls=stalls), stalls]
        return _models[1]
    dut.rst.value = 1
    await ClockCycles(dut.clk, 4)
    dut.rst.value = 0
    await RisingEdge(dut.clk)
    for queue in _models[1][1]:
        queue.done = 0
    return _models[1]


@cocotb.test(timeout_time=1_000, timeout_unit="us")
async def stops(dut: Any) -> None:
    """`stop` lets the bursts in flight finish, issues no more, and nothing is lost."""
    dram, queues, _ = await start(dut, stalls=STALLS["both"])
    queue = queues[0]
    stopped = 0

    async def interrupt() -> None:
        nonlocal stopped
        while True:
            await ClockCycles(dut.clk, random.randint(5, 60))
            queue.pin("stop").value = 1
            await ClockCycles(dut.clk, 2)
            for _ in range(2000):
                if not int(queue.pin("active").value):
                    break
                await RisingEdge(dut.clk)
            else:
                raise AssertionError("bursts left in flight")
            await ClockCycles(dut.clk, 10)
            assert not int(dut.outstanding_reads.value) and not int(dut.outstanding_writes.value)
            stopped += 1
            queue.pin("stop").value = 0

    task = cocotb.start_soon(interrupt())
    for mode in MODES:
        opcode, fields = make(mode, low=0, high=REGION, columns=60)
        await check(queue, dram, opcode, fields)
    task.cancel()
    assert queue.done == len(MODES) and stopped > 10
