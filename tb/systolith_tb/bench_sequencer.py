"""Sequencers and semaphores: order, waits, signals and every fault, against golden's checker."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, FallingEdge, RisingEdge
from cocotbext.axi import AxiReadBus, AxiSlaveRead
from systolith.golden.checker import check
from systolith_hdl.config import INSTRUCTION_BYTES
from systolith_hdl.isa import (
    CONTROL,
    INDEX_REGISTERS,
    LOADS,
    LOOP_DEPTH,
    FaultCause,
    Opcode,
    WaitMode,
    add_indices,
    decode,
    encode,
    engine_kind,
)

from .configs import bench_config
from .fuzz import draw_instruction, draw_loop, lines
from .stimulus import random_raw

CONFIG = bench_config()
KINDS = [engine_kind(name) for name in CONFIG.engines]
COUNT = len(KINDS)
STREAM_BYTES = 1 << 14
ZEROS = STREAM_BYTES * COUNT  #: where words are zero, behind the streams
INTERNAL = frozenset(opcode.value for opcode in CONTROL)


def loop_test(**options: Any) -> Any:
    """``cocotb.test``, of what cores without loops do not have."""
    return cocotb.test(**options) if CONFIG.loops else lambda function: function


class Memory:
    """DRAM with the streams; a read past its end is answered with an error."""

    def __init__(self) -> None:
        self.bytes = np.zeros(ZEROS + 64, np.uint8)

    async def read(self, address: int, length: int) -> bytes:
        if address + length > len(self.bytes):
            raise IndexError(address)
        return self.bytes[address : address + length].tobytes()


class Bench:
    """The sequencers with engines that take instructions and finish them after a while."""

    def __init__(self, dut: Any, *, pause: float = 0.0, delay: int = 0) -> None:
        self.dut = dut
        self.memory = Memory()
        self.delay = delay
        self.pause = pause
        self.issued: list[list[bytes]] = [[] for _ in range(COUNT)]
        self.counters: list[list[int]] = [[] for _ in range(COUNT)]
        self.completed = [0] * COUNT
        self.signalled: Counter[int] = Counter()
        self.taken: Counter[int] = Counter()
        self.bases = [STREAM_BYTES * e for e in range(COUNT)]

    async def reset(self) -> None:
        dut = self.dut
        dut.start.value = 0
        dut.halt.value = 0
        for e in range(COUNT):
            getattr(dut, f"finished__{e}").value = 0
            getattr(dut, f"done_load__{e}").value = 0
            getattr(dut, f"instruction__{e}__ready").value = 0
        Clock(dut.clk, 10, unit="ns").start()
        bus = AxiReadBus.from_prefix(dut, "m_axi")
        slave = AxiSlaveRead(bus, dut.clk, dut.rst, target=self.memory)
        slave.log.setLevel("WARNING")
        slave.ar_channel.set_pause_generator(self._pauses())
        slave.r_channel.set_pause_generator(self._pauses())
        await self.pulse_reset()
        for e in range(COUNT):
            cocotb.start_soon(self._engine(e))
        cocotb.start_soon(self._count())

    def _pauses(self) -> Any:
        while True:
            yield int(random.random() < self.pause)

    async def pulse_reset(self) -> None:
        self.dut.rst.value = 1
        await ClockCycles(self.dut.clk, 3)
        self.dut.rst.value = 0

    async def _count(self) -> None:
        while True:
            await RisingEdge(self.dut.clk)
            for e in range(COUNT):
                self.completed[e] += int(getattr(self.dut, f"completed__{e}").value).bit_count()

    async def _engine(self, e: int) -> None:
        """Takes instructions, at most 4 at once, and finishes each class in order."""
        dut = self.dut
        pending: dict[str, deque[tuple[int, bytes]]] = {"finished": deque(), "done_load": deque()}
        cycle = 0
        while True:
            await FallingEdge(dut.clk)
            room = sum(map(len, pending.values())) < 4
            getattr(dut, f"instruction__{e}__ready").value = int(
                room and random.random() >= self.pause
            )
            for name, queue in pending.items():
                finish = bool(queue) and cycle >= queue[0][0]
                getattr(dut, f"{name}__{e}").value = int(finish)
                if finish:
                    self.signal(queue.popleft()[1])
            await RisingEdge(dut.clk)
            cycle += 1
            if (
                getattr(dut, f"instruction__{e}__valid").value == 1
                and getattr(dut, f"instruction__{e}__ready").value == 1
            ):
                raw = int(getattr(dut, f"instruction__{e}__payload").value).to_bytes(64, "little")
                self._issue(e, raw)
                self.counters[e].append(int(getattr(dut, f"counter__{e}").value))
                name = "done_load" if Opcode(raw[0]) in LOADS else "finished"
                pending[name].append((cycle + random.randint(0, self.delay), raw))

    def _issue(self, e: int, raw: bytes) -> None:
        """An instruction may be issued only once what it waits for was signalled."""
        self.issued[e].append(raw)
        _, fields = decode(raw)
        for slot in range(3):
            mode = fields[f"wait.{slot}.mode"]
            sem, value = fields[f"wait.{slot}.sem"], fields[f"wait.{slot}.value"]
            if mode == WaitMode.ACQUIRE.value:
                self.taken[sem] += value
                assert self.signalled[sem] >= self.taken[sem], f"semaphore {sem} taken too early"
            elif mode == WaitMode.AT_LEAST.value:
                assert self.signalled[sem] >= value, f"issued before semaphore {sem} was {value}"

    def signal(self, raw: bytes) -> None:
        _, fields = decode(raw)
        self.signalled[fields["signal.sem"]] += fields["signal.amount"]

    def load(self, streams: list[list[bytes]]) -> None:
        for e, stream in enumerate(streams):
            raw = np.frombuffer(b"".join(stream), np.uint8)
            # Behind the end lies rubbish: it is prefetched and must do nothing.
            area = self.memory.bytes[STREAM_BYTES * e : STREAM_BYTES * (e + 1)]
            area[:] = 0xA5
            area[: len(raw)] = raw

    async def start(self) -> None:
        for e in range(COUNT):
            getattr(self.dut, f"base__{e}").value = self.bases[e]
            self.issued[e].clear()
            self.counters[e].clear()
            self.completed[e] = 0
        self.signalled.clear()
        self.taken.clear()
        self.dut.start.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.start.value = 0
        await RisingEdge(self.dut.clk)

    async def count(self, sem: int) -> int:
        """The count of a semaphore."""
        self.dut.semaphore__sem.value = sem
        await RisingEdge(self.dut.clk)
        return int(self.dut.semaphore__count.value)

    def high(self, name: str, e: int) -> bool:
        return bool(getattr(self.dut, f"{name}__{e}").value == 1)

    async def ended(self) -> None:
        """Waits until every stream has ended, and a little longer."""
        for _ in range(100_000):
            await RisingEdge(self.dut.clk)
            if all(self.high("ended", e) and self.high("idle", e) for e in range(COUNT)):
                break
        else:
            raise AssertionError("the program did not end")
        await ClockCycles(self.dut.clk, 3)


def sync_fields(e: int, totals: Counter[int], pools: Counter[int]) -> dict[str, Any]:
    """Random waits that hold once everything before in the global order is done, and a signal.

    Semaphores 0 to 7 only grow; semaphores 8 + e are taken from by engine e alone.
    """
    fields: dict[str, Any] = {}
    for slot in range(3):
        if random.random() < 0.4:
            if random.random() < 0.3 and pools[8 + e]:
                value = random.randint(0, pools[8 + e])
                pools[8 + e] -= value
                sem, mode = 8 + e, WaitMode.ACQUIRE
            else:
                sem, mode = random.randrange(8), WaitMode.AT_LEAST
                value = random.randint(0, totals[sem])
            fields |= {f"wait.{slot}.sem": sem, f"wait.{slot}.mode": mode}
            fields[f"wait.{slot}.value"] = value
    if random.random() < 0.7:
        amount = random.randint(1, 9)
        if random.random() < 0.5:
            sem = random.randrange(8)
            totals[sem] += amount
        else:
            sem = 8 + random.randrange(COUNT)
            pools[sem] += amount
        fields |= {"signal.sem": sem, "signal.amount": amount}
    return fields


async def random_programs(dut: Any, *, pause: float, delay: int, programs: int) -> None:
    bench = Bench(dut, pause=pause, delay=delay)
    await bench.reset()
    total = 0
    for _ in range(programs):
        streams: list[list[bytes]] = [[] for _ in range(COUNT)]
        totals: Counter[int] = Counter()
        pools: Counter[int] = Counter()
        for _ in range(120):
            e = random.randrange(COUNT)
            while True:
                raw = random_raw(KINDS[e], CONFIG, mutate=False)
                if check(raw, KINDS[e], CONFIG) is None:
                    break
            opcode, fields = decode(raw)
            fields |= sync_fields(e, totals, pools)
            streams[e].append(encode(opcode, fields))
        for e in range(COUNT):
            streams[e].append(encode(Opcode.END, {}))
        bench.load(streams)
        await bench.start()
        # When a NOP signals cannot be seen from outside: counted as if at once.
        for stream in streams:
            for raw in stream:
                if raw[0] == Opcode.NOP.value:
                    bench.signal(raw)
        await bench.ended()
        for e in range(COUNT):
            assert not bench.high("fault", e)
            issued = {pc: raw for pc, raw in enumerate(streams[e]) if raw[0] not in INTERNAL}
            assert bench.issued[e] == list(issued.values())
            assert bench.counters[e] == list(issued)
            assert bench.completed[e] == len(streams[e])
            total += len(bench.issued[e])
        for sem in range(CONFIG.semaphores):
            expected = totals[sem] + pools[sem]
            assert await bench.count(sem) == expected, f"semaphore {sem}"
    assert total > 50 * programs


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def programs_without_stalls(dut: Any) -> None:
    await random_programs(dut, pause=0.0, delay=0, programs=4)


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def programs_with_stalls(dut: Any) -> None:
    await random_programs(dut, pause=0.4, delay=40, programs=4)


@cocotb.test(timeout_time=200, timeout_unit="ms")
async def every_fault_as_golden_finds_it(dut: Any) -> None:
    """Random damaged instructions: same cause, place and address as golden's checker, and
    neither the faulty instruction nor anything after it is issued. Runs on until every cause was
    found five times, so that no seed can miss a rare one."""
    bench = Bench(dut)
    await bench.reset()
    seen: Counter[str] = Counter()
    causes = [cause.name for cause in list(FaultCause)[1:9]]
    rounds = 0
    while rounds < 100 or min(seen[cause] for cause in causes) < 5:
        rounds += 1
        assert rounds <= 1000, f"1000 rounds, and some cause is hardly found: {dict(seen)}"
        streams = []
        for kind in KINDS:
            stream = [random_raw(kind, CONFIG) for _ in range(6)]
            streams.append([*stream, encode(Opcode.END, {})])
        bench.load(streams)
        await bench.start()
        for _ in range(3000):
            await RisingEdge(dut.clk)
            if all(bench.high("ended", e) or bench.high("fault", e) for e in range(COUNT)):
                break
        else:
            raise AssertionError("an engine neither ended nor faulted")
        await ClockCycles(dut.clk, 20)
        for e, kind in enumerate(KINDS):
            issued = 0
            for pc, raw in enumerate(streams[e]):
                fault = check(raw, kind, CONFIG)
                if fault is not None:
                    assert bench.high("fault", e), f"golden faults at {pc}: {fault}"
                    cause = FaultCause(int(getattr(dut, f"cause__{e}").value))
                    what = f"{cause}, golden {fault} at {pc} {decode_safe(raw)}"
                    assert cause is fault.cause, what
                    assert int(getattr(dut, f"pc__{e}").value) == pc
                    address = getattr(dut, f"address__{e}").value.to_signed()
                    assert address == fault.address, f"{address}, golden {fault}"
                    seen[fault.cause.name] += 1
                    break
                if raw[0] == Opcode.END.value:
                    assert bench.high("ended", e)
                    break
                issued += raw[0] not in INTERNAL
            assert len(bench.issued[e]) == issued
        await bench.pulse_reset()
    dut._log.info("faults seen in %d rounds: %s", rounds, dict(seen))


def decode_safe(raw: bytes) -> object:
    try:
        return decode(raw)
    except ValueError:
        return raw.hex()


def executed(
    stream: list[bytes], memory: np.ndarray, *, whole: bool = False
) -> tuple[list[bytes], list[int], int]:
    """What a stream with loops issues, index registers added, with the counter of each, and how
    many instructions it executes: loops by recursion, unlike the golden model's. The words that
    TEST reads are those of `memory`, here the instructions; `whole` takes all for true."""
    issued: list[bytes] = []
    counters: list[int] = []
    count = 0
    flag = False

    def body(at: int, registers: list[int]) -> int:
        """Executes from `at` to the NEXT or END that ends the body; returns where that is."""
        nonlocal count, flag
        while True:
            opcode, fields = decode(stream[at])
            if opcode is Opcode.NEXT:
                return at
            raw = add_indices(stream[at], registers)
            if opcode not in CONTROL:
                issued.append(raw)
                counters.append(count)
            count += 1
            if opcode is Opcode.END:
                return at
            if opcode is Opcode.TEST:
                address = decode(raw)[1]["dram_base"] & ~3
                word = memory[address : address + 4].view(np.uint32)[0]
                flag = whole or bool(word & 0x7FFFFFFF)
            elif opcode is Opcode.LOOP:
                inner = list(registers)
                for _ in range(fields["count"]):
                    end = body(at + 1, inner)
                    count += 1
                    following = decode(stream[end])[1]
                    if following["conditional"] and not flag:
                        break
                    for i in range(INDEX_REGISTERS):
                        inner[i] += following[f"steps.{i}"]
                at = end
            at += 1

    body(0, [0] * INDEX_REGISTERS)
    return issued, counters, count


async def loops(dut: Any, *, pause: float, delay: int) -> None:
    """Random loops: what is issued, in which order and how often."""
    bench = Bench(dut, pause=pause, delay=delay)
    await bench.reset()
    repeated = ended_early = 0
    for _ in range(4):
        streams = []
        for engine in CONFIG.engines:
            elements = [
                draw_loop(CONFIG, engine) if random.random() < 0.5 else
                draw_instruction(CONFIG, engine)
                for _ in range(6)
            ]  # fmt: skip
            found = [line for element in elements for line in lines(element)]
            for opcode, fields in found:
                if opcode is Opcode.TEST and random.random() < 0.5:
                    fields |= {"dram_base": ZEROS, "dram_index": 0}
            streams.append([encode(*line) for line in [*found, (Opcode.END, {})]])
        bench.load(streams)
        await bench.start()
        await bench.ended()
        for e in range(COUNT):
            assert not bench.high("fault", e)
            issued, counters, count = executed(streams[e], bench.memory.bytes)
            assert bench.issued[e] == issued
            assert bench.counters[e] == counters
            assert bench.completed[e] == count
            repeated += count - len(streams[e])
            ended_early += count < executed(streams[e], bench.memory.bytes, whole=True)[2]
    assert repeated > 100 and ended_early > 0


@loop_test(timeout_time=50, timeout_unit="ms")
async def loops_without_stalls(dut: Any) -> None:
    await loops(dut, pause=0.0, delay=0)


@loop_test(timeout_time=50, timeout_unit="ms")
async def loops_with_stalls(dut: Any) -> None:
    await loops(dut, pause=0.4, delay=40)


@loop_test(timeout_time=5, timeout_unit="ms")
async def tests_of_indexed_words(dut: Any) -> None:
    """On every engine: TEST reads the word that its index register leads to, however far."""
    bench = Bench(dut)
    await bench.reset()
    words = [base + STREAM_BYTES // 2 for base in bench.bases]
    end = encode(Opcode.END, {})

    def walk(e: int, count: int, step: int) -> list[bytes]:
        return [
            encode(Opcode.LOOP, {"count": count}),
            encode(Opcode.TEST, {"dram_base": words[e], "dram_index": 2}),
            encode(Opcode.NEXT, {"steps.1": step, "conditional": 1}),
            end,
        ]

    bench.load([walk(e, 10, 8) for e in range(COUNT)])
    for e, word in enumerate(words):
        bench.memory.bytes[word + 8 * (e + 1) :][:8] = 0
    await bench.start()
    await bench.ended()
    # LOOP, a TEST and a NEXT for each word up to the zero, END.
    assert bench.completed == [2 + 2 * (e + 2) for e in range(COUNT)]

    far = 1 << 24
    bench.load([walk(e, 2, far) for e in range(COUNT)])
    await bench.start()
    for _ in range(3000):
        await RisingEdge(dut.clk)
        if all(bench.high("fault", e) for e in range(COUNT)):
            break
    await ClockCycles(dut.clk, 3)
    beat = min(CONFIG.axi_bytes, INSTRUCTION_BYTES)
    for e, word in enumerate(words):
        assert FaultCause(int(getattr(dut, f"cause__{e}").value)) is FaultCause.AXI_READ_ERROR
        assert int(getattr(dut, f"address__{e}").value) == (word + far) // beat * beat


@loop_test(timeout_time=5, timeout_unit="ms")
async def loops_that_do_not_match(dut: Any) -> None:
    """BAD_LOOP at the instruction that is one too many, and TEST of a word that does not exist."""
    bench = Bench(dut)
    await bench.reset()
    loop, following = encode(Opcode.LOOP, {"count": 2}), encode(Opcode.NEXT, {})
    end = encode(Opcode.END, {})
    far = encode(Opcode.TEST, {"dram_base": (1 << 40) + 67})
    deep = [loop] * (LOOP_DEPTH + 1)
    streams = [[*deep, end], [loop, following, following, end], [loop, far, following, end]]
    bench.load([*streams, *([[end]] * (COUNT - 3))])
    await bench.start()
    for _ in range(3000):
        await RisingEdge(dut.clk)
        if all(bench.high("fault", e) for e in range(3)):
            break
    await ClockCycles(dut.clk, 3)
    found = [
        (
            FaultCause(int(getattr(dut, f"cause__{e}").value)),
            int(getattr(dut, f"pc__{e}").value),
            int(getattr(dut, f"address__{e}").value),
        )
        for e in range(3)
    ]
    beat = min(CONFIG.axi_bytes, INSTRUCTION_BYTES)
    assert found == [
        (FaultCause.BAD_LOOP, LOOP_DEPTH, 0),
        (FaultCause.BAD_LOOP, 2, 0),
        (FaultCause.AXI_READ_ERROR, 1, ((1 << 40) + 67) // beat * beat),
    ]


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def overflow_comes_before_what_follows(dut: Any) -> None:
    """Known a cycle after its signal, an overflow is reported all the same instead of the fault of
    the next instruction, and instead of the end if it is END that signals. Both wait, until all
    behind them has been fetched."""
    bench = Bench(dut)
    await bench.reset()
    illegal = bytes([0xFF]) * INSTRUCTION_BYTES
    end = encode(Opcode.END, {})
    fields = {"wait.0.sem": 5, "wait.0.mode": WaitMode.AT_LEAST, "wait.0.value": 1}
    last = (
        [encode(Opcode.NOP, fields | {"signal.sem": 3, "signal.amount": 1}), illegal],
        [encode(Opcode.END, fields | {"signal.sem": 4, "signal.amount": 1})],
    )
    streams = [
        [encode(Opcode.NOP, {"signal.sem": 3 + e, "signal.amount": 255})] * 257 + tail
        for e, tail in enumerate(last)
    ]
    stride = INSTRUCTION_BYTES * 512
    bench.memory.bytes = np.zeros(stride * COUNT, np.uint8)
    later = [encode(Opcode.NOP, {})] * 400
    streams.append([*later, encode(Opcode.NOP, {"signal.sem": 5, "signal.amount": 1}), end])
    for e, stream in enumerate([*streams, *[[end]] * (COUNT - 3)]):
        raw = b"".join(stream)
        bench.memory.bytes[stride * e : stride * e + len(raw)] = np.frombuffer(raw, np.uint8)
    bench.bases = [stride * e for e in range(COUNT)]
    await bench.start()
    seen: dict[int, tuple[FaultCause, int, int]] = {}
    for _ in range(30_000):
        await FallingEdge(dut.clk)
        for e in (0, 1):
            if bench.high("fault", e) and e not in seen:  # what the core records
                seen[e] = (
                    FaultCause(int(getattr(dut, f"cause__{e}").value)),
                    int(getattr(dut, f"pc__{e}").value),
                    int(getattr(dut, f"address__{e}").value),
                )
        assert not (bench.high("ended", 1) and bench.high("idle", 1) and 1 not in seen)
        if len(seen) == 2:
            break
    assert seen == {e: (FaultCause.SEMAPHORE_OVERFLOW, 257, 3 + e) for e in (0, 1)}
    assert [await bench.count(sem) for sem in (3, 4)] == [65535, 65535]


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def overflow_and_fetch_error(dut: Any) -> None:
    bench = Bench(dut)
    await bench.reset()
    end = encode(Opcode.END, {})
    full = encode(Opcode.NOP, {"signal.sem": 3, "signal.amount": 255})
    stream = [full] * 257 + [encode(Opcode.NOP, {"signal.sem": 3, "signal.amount": 1}), end]
    bench.memory.bytes = np.zeros(1 << 17, np.uint8)
    bench.memory.bytes[: 64 * len(stream)] = np.frombuffer(b"".join(stream), np.uint8)
    bench.memory.bytes[-64:] = np.frombuffer(full, np.uint8)
    # Engine 1 runs off the end of DRAM after one instruction; the others end at once.
    at_end = (1 << 17) - 64
    empty = 64 * (len(stream) - 1)
    bench.bases = [0, at_end] + [empty] * (COUNT - 2)
    await bench.start()
    for _ in range(30_000):
        await RisingEdge(dut.clk)
        if bench.high("fault", 0) and bench.high("fault", 1):
            break
    cause = [FaultCause(int(getattr(dut, f"cause__{e}").value)) for e in (0, 1)]
    assert cause == [FaultCause.SEMAPHORE_OVERFLOW, FaultCause.FETCH_ERROR]
    # 255 from engine 1, so the 256 additions that fit end one earlier on engine 0.
    assert int(dut.pc__0.value) == 256 and int(dut.address__0.value) == 3
    assert int(dut.pc__1.value) == 1 and int(dut.address__1.value) == at_end + INSTRUCTION_BYTES
    assert await bench.count(3) == 65535
