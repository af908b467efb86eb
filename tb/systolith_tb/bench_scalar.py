"""Benches of the scalar engine: the lane alone, and the engine between modelled memories."""

import dataclasses
import os
import random
from collections import deque
from collections.abc import Callable

import cocotb
import numpy as np
from amaranth.hdl import Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly
from systolith.golden import arithmetic, dither
from systolith.golden.activation import evaluate
from systolith_hdl.config import get_config
from systolith_hdl.emit import Once
from systolith_hdl.formats import FLOATS, DType
from systolith_hdl.isa import (
    SPECS,
    TABLE_WORDS,
    AluOp,
    EngineKind,
    Function,
    Opcode,
    Rounding,
    RowSums,
    Space,
    encode,
)
from systolith_hdl.ports import READ_LATENCY
from systolith_hdl.scalar import tables as T
from systolith_hdl.scalar.engine import FIXED_CYCLES, ROW_CYCLES, SUM_CYCLES, TABLE_CYCLES
from systolith_hdl.scalar.lane import (
    FUNCTION_LATENCY,
    LANE_LATENCY,
    SHARING,
    TURN_CYCLES,
    CustomTable,
    FunctionTables,
    ScalarLane,
    Turning,
)

from systolith_tb.stimulus import random_counter, random_table

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
    # near multiples of pi / 2, the largest numbers among them
    *(0x3FC90FDA, 0x3FC90FDB, 0x40490FDB, 0x4096CBE4, 0x56C6ED64, 0x6F79BE45, 0x7F7FFFFF),
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
    function: Function, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, tables: np.ndarray
) -> np.ndarray:
    """What elements [..., lanes] come to, from golden arithmetic; `tables` are those of the
    lanes."""
    y = arithmetic.add(arithmetic.mul(x, scale), bias)
    results = [evaluate(function, y[..., lane], table) for lane, table in enumerate(tables)]
    return np.stack(results, axis=-1)


def _pack(words: np.ndarray) -> int:
    return int.from_bytes(words.astype("<u4").tobytes(), "little")


def _unpack(handle: object, count: int) -> np.ndarray:
    value = int(handle.value)  # type: ignore[attr-defined]
    return np.frombuffer(value.to_bytes(4 * count, "little"), "<u4")


class LaneBench(wiring.Component):
    """`COPIES` lanes side by side; members as those of `ScalarLane` and `CustomTable`, one word for
    each copy."""

    en: In(1)
    control: In(T.CONTROL)
    turning: In(Turning)
    custom: In(1)
    write: In(1)
    address: In(range(TABLE_WORDS))
    word: In(data.ArrayLayout(unsigned(32), COPIES))
    x: In(data.ArrayLayout(unsigned(32), COPIES))
    scale: In(data.ArrayLayout(unsigned(32), COPIES))
    bias: In(data.ArrayLayout(unsigned(32), COPIES))
    o: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for i in range(COPIES):
            m.submodules += (cell := Once(ScalarLane(), "scalar_lane"))
            user = i % SHARING
            if user == 0:
                m.submodules += (lookup := Once(FunctionTables(), "function_tables"))
                m.d.comb += lookup.en.eq(self.en)
            m.submodules += (own := Once(CustomTable(), "custom_table"))
            m.d.comb += [
                own.write.eq(self.write),
                own.address.eq(self.address),
                own.word.eq(self.word[i]),
                own.en.eq(self.en),
                own.custom.eq(self.custom),
                own.row.eq(cell.row),
                own.index.eq(cell.index),
                own.shared_entry.eq(getattr(lookup, f"entry{user}")),
                own.shared_segment.eq(getattr(lookup, f"segment{user}")),
                getattr(lookup, f"row{user}").eq(cell.row),
                cell.entry.eq(own.entry),
                getattr(lookup, f"index{user}").eq(cell.index),
                cell.segment.eq(own.segment),
                getattr(lookup, f"weight{user}").eq(cell.weight),
                cell.piece.eq(getattr(lookup, f"piece{user}")),
                cell.turning.eq(self.turning),
                cell.en.eq(self.en),
                cell.control.eq(self.control),
                cell.x.eq(self.x[i]),
                cell.scale.eq(self.scale[i]),
                cell.bias.eq(self.bias[i]),
                self.o[i].eq(cell.o),
            ]
        return m


def _turning(cycle: int) -> int:
    """`Turning` in an enabled cycle, where elements enter in cycles 0, TURN_CYCLES, ..."""
    step = (cycle - (LANE_LATENCY - FUNCTION_LATENCY)) % TURN_CYCLES
    pieces = 1 <= step <= T.PIECES
    return (
        (step == 0) | pieces << 1 | (step == 1) << 2
        | (step > T.PIECES) << 3 | (step == T.PIECES + 1) << 4
    )  # fmt: skip


@cocotb.test(timeout_time=100, timeout_unit="ms")
async def lane(dut) -> None:
    """Every function on $SYSTOLITH_VECTORS random words each and all corners, `en` going low at
    random; CUSTOM by the tables after power-up, and by another one in each lane. Most have scale 1
    and bias -0, so that y is the word itself."""
    rng = np.random.default_rng(random.getrandbits(32))
    count = int(os.environ.get("SYSTOLITH_VECTORS", "16384"))
    Clock(dut.clk, 10, unit="ns").start()
    dut.rst.value = 0
    compared = 0
    tables = np.zeros((COPIES, TABLE_WORDS), np.uint32)
    dut.write.value = 0
    for function in [*Function, Function.CUSTOM]:
        if dut.custom.value.is_resolvable and dut.custom.value:
            tables = np.array([random_table(rng) for _ in range(COPIES)])
            for address in rng.permutation(TABLE_WORDS).tolist():
                await FallingEdge(dut.clk)
                dut.write.value = 1
                dut.address.value = address
                dut.word.value = _pack(tables[:, address])
            await FallingEdge(dut.clk)
            dut.write.value = 0
        dut.custom.value = function is Function.CUSTOM
        x = np.concatenate([CORNERS, random_words(rng, count)])
        x = np.pad(x, (0, -len(x) % COPIES))
        plain = rng.integers(0, 4, len(x)) != 0
        plain[: len(CORNERS)] = True
        scale = np.where(plain, _ONE, random_words(rng, len(x))).astype(np.uint32)
        bias = np.where(plain, 1 << 31, random_words(rng, len(x))).astype(np.uint32)
        dut.control.value = T.tables().controls[function]

        got: list[np.ndarray] = []
        turns = bool(T.field_bits(T.CONTROL, T.tables().controls[function])["turn"])
        interval = TURN_CYCLES if turns else 1
        pipeline: deque[bool] = deque([False] * (LANE_LATENCY + TURN_CYCLES * turns))
        sent, batches, cycle = 0, len(x) // COPIES, 0
        while len(got) < batches:
            await FallingEdge(dut.clk)
            enable = random.random() < 0.9
            dut.en.value = enable
            if not enable:
                continue
            if pipeline.popleft():
                got.append(_unpack(dut.o, COPIES))
            # What the engine drives: of no meaning for other functions.
            dut.turning.value = _turning(cycle) if turns else random.getrandbits(5)
            cycle += 1
            enters = sent < batches and (cycle - 1) % interval == 0
            pipeline.append(enters)
            if enters:
                chunk = slice(sent * COPIES, (sent + 1) * COPIES)
                dut.x.value = _pack(x[chunk])
                dut.scale.value = _pack(scale[chunk])
                dut.bias.value = _pack(bias[chunk])
                sent += 1
        result = np.concatenate(got)
        rows = [words.reshape(-1, COPIES) for words in (x, scale, bias)]
        wanted = reference(function, rows[0], rows[1], rows[2], tables).reshape(-1)
        wrong = np.flatnonzero(result != wanted)
        assert not len(wrong), (
            f"{function.name}: {len(wrong)} of {len(x)} wrong, first x={x[wrong[0]]:08x} "
            f"scale={scale[wrong[0]]:08x} bias={bias[wrong[0]]:08x}: got "
            f"{result[wrong[0]]:08x}, wanted {wanted[wrong[0]]:08x}"
        )
        compared += len(x)
    assert compared > len(Function) * count
    cocotb.log.info("compared %d elements", compared)


#: Configuration of the engine bench.
CONFIG = get_config("nano")
_DEPTH = {Space.SBUF: CONFIG.sbuf_depth, Space.PSUM: CONFIG.psum_depth}


#: What dst walks in place of the innermost count.
_RESULTS: dict[RowSums, Callable[[int], int]] = {
    RowSums.NONE: lambda count: count,
    RowSums.BEHIND: lambda count: count + 1,
    RowSums.ONLY: lambda count: 1,
}


@dataclasses.dataclass
class Job:
    """One instruction, the number of those before it, the cycles it takes when nothing stalls, and
    what it has to write: (space, address, mask, column) in order."""

    word: int
    counter: int
    cycles: int
    writes: list[tuple[Space, int, int, tuple[int, ...]]]


class Memories:
    """The words of SBUF and PSUM, [column, lane], and a model of the ports on them.

    A port is ready in a cycle with the probability `ready`; reads answer after READ_LATENCY.
    """

    def __init__(self, dut: object, rng: np.random.Generator, *, reads: float, writes: float):
        self.words = {
            space: random_words(rng, depth * CONFIG.lanes).reshape(depth, CONFIG.lanes)
            for space, depth in _DEPTH.items()
        }
        self.written: list[tuple[Space, int, int, tuple[int, ...]]] = []
        self._reads, self._writes = reads, writes
        self._ports = {
            (name, space): {
                field: getattr(dut, f"{name}_{space.name.lower()}__{field}")
                for field in (
                    ("request__valid", "request__ready", "request__payload")
                    + (("response__valid", "response__payload") if name != "dst" else ())
                )
            }
            for name in ("src0", "src1", "dst")
            for space in Space
        }
        self._flying = {key: deque([None] * READ_LATENCY) for key in self._ports}

    def drive(self) -> None:
        """Sets what the memories put on the ports in this cycle."""
        for (name, _), port in self._ports.items():
            chance = self._writes if name == "dst" else self._reads
            port["request__ready"].value = random.random() < chance
            if name != "dst":
                column = self._flying[name, _].popleft()
                port["response__valid"].value = column is not None
                garbage = random.getrandbits(32 * CONFIG.lanes)
                port["response__payload"].value = garbage if column is None else _pack(column)

    def observe(self) -> None:
        """Takes the requests of this cycle: reads see the writes of earlier cycles only."""
        for (name, space), port in self._ports.items():
            if name != "dst":
                column = None
                if port["request__valid"].value and port["request__ready"].value:
                    column = self.words[space][int(port["request__payload"].value)].copy()
                self._flying[name, space].append(column)
        for (name, space), port in self._ports.items():
            if name == "dst" and port["request__valid"].value and port["request__ready"].value:
                payload = int(port["request__payload"].value)
                address = payload >> 33 * CONFIG.lanes
                mask = payload >> 32 * CONFIG.lanes & (1 << CONFIG.lanes) - 1
                column = [payload >> 32 * i & 0xFFFFFFFF for i in range(CONFIG.lanes)]
                self.written.append(_masked(space, address, mask, column))
                for i in range(CONFIG.lanes):
                    if mask >> i & 1:
                        self.words[space][address, i] = column[i]


def _masked(
    space: Space, address: int, mask: int, column: object
) -> tuple[Space, int, int, tuple[int, ...]]:
    """A write with the lanes that are not written zeroed."""
    words = tuple(int(w) if mask >> i & 1 else 0 for i, w in enumerate(column))  # type: ignore[arg-type, var-annotated]
    return space, address, mask, words


def _operand(counts: list[int], space: Space, upper: bool) -> tuple[dict[str, int], np.ndarray]:
    """A random access pattern in one half of a memory: its fields and its addresses in order."""
    half = _DEPTH[space] // 2
    while True:
        strides = [random.choice((0, 1, 2, 5, 7, -1, -3, random.randint(-40, 40))) for _ in counts]
        steps = np.zeros(counts, np.int64)
        for axis, stride in enumerate(strides):
            shape = [1] * len(counts)
            shape[axis] = counts[axis]
            steps = steps + stride * np.arange(counts[axis]).reshape(shape)
        if steps.max() - steps.min() < half:
            break
    base = random.randint(-int(steps.min()), half - 1 - int(steps.max())) + upper * half
    fields = {"base": base, "space": space.value}
    fields.update({f"strides.{i}": stride for i, stride in enumerate(strides)})
    return fields, steps.ravel() + base


def load_table(
    memory: dict[Space, np.ndarray], tables: np.ndarray, first: int, columns: int, lanes: int
) -> Job:
    """A LOAD_TABLE of random words, applied to `tables`, [lanes, words]."""
    space = random.choice(list(Space))
    pattern, addresses = _operand([1, 1, 1, columns], space, upper=False)
    fields: dict[str, object] = {"lanes": lanes, "first": first, "src0.dtype": DType.INT32}
    fields.update({f"src0.{key}": value for key, value in pattern.items()})
    fields.update({f"counts.{i}": columns if i == 3 else 1 for i in range(4)})
    words = memory[space][addresses]
    tables[:lanes, first : first + columns] = words[:, :lanes].T
    word = int.from_bytes(encode(Opcode.LOAD_TABLE, fields), "little")
    return Job(word, random_counter(), columns + TABLE_CYCLES, [])


def random_job(
    memory: dict[Space, np.ndarray], tables: np.ndarray, rng: np.random.Generator, seed: int
) -> Job:
    """Draws an instruction and applies it to `memory` and `tables`."""
    opcode = random.choice([op for op, spec in SPECS.items() if spec.kind is EngineKind.SCALAR])
    if opcode is Opcode.LOAD_TABLE:
        length = random.choice((1, 2, 5, 40))
        first = random.randint(0, TABLE_WORDS - length)
        return load_table(memory, tables, first, length, random.randint(1, CONFIG.lanes))
    counts = [random.choice((1, 1, 2, 3)), random.choice((1, 2)), random.choice((1, 1, 4)), 0]
    counts[3] = random.choice((1, 2, 3, 7, 16))
    function = random.choice([*Function, *[Function.CUSTOM] * 5])
    lanes = random.choice((CONFIG.lanes, random.randint(1, CONFIG.lanes)))
    dtype = random.choice((DType.FP32, *FLOATS))
    sums = random.choice([RowSums.NONE, *RowSums])
    walked = {"src0": counts, "dst": [*counts[:3], _RESULTS[sums](counts[3])]}
    if opcode is not Opcode.ACTIVATE:
        walked["src1"] = [*counts[:3], 2] if opcode is Opcode.ACTIVATE_ROWS else counts
    fields: dict[str, object] = {"op0": function, "op1": sums, "lanes": lanes}
    fields.update({f"counts.{i}": count for i, count in enumerate(counts)})
    addresses, spaces = {}, {}
    for name, walk in walked.items():
        spaces[name] = random.choice(list(Space))
        pattern, addresses[name] = _operand(walk, spaces[name], name == "dst")
        fields.update({f"{name}.{key}": value for key, value in pattern.items()})
    fields["dst.dtype"] = dtype
    rounding = random.choice(list(Rounding))
    fields["rounding"] = rounding
    counter = random_counter()

    x = memory[spaces["src0"]][addresses["src0"]]
    plain = random.random() < 0.5
    scale = np.full_like(x, _ONE if plain else int(random_words(rng, 1)[0]))
    bias = np.full_like(x, 1 << 31 if plain else int(random_words(rng, 1)[0]))
    if "src1" in walked:
        second = memory[spaces["src1"]][addresses["src1"]]
        if opcode is Opcode.ACTIVATE_ROWS:
            pairs = second.reshape(-1, 2, CONFIG.lanes).repeat(counts[3], axis=0)
            scale, bias = pairs[:, 0], pairs[:, 1]
        elif opcode is Opcode.ACTIVATE_TENSOR_SCALE:
            scale = second
        else:
            bias = second
    if opcode in (Opcode.ACTIVATE, Opcode.ACTIVATE_TENSOR_BIAS):
        fields["imm0"] = int(scale[0, 0])
    if opcode is Opcode.ACTIVATE_TENSOR_SCALE:
        fields["imm0"] = int(bias[0, 0])
    if opcode is Opcode.ACTIVATE:
        fields["imm1"] = int(bias[0, 0])
    word = int.from_bytes(encode(opcode, fields), "little")

    result = reference(function, x, scale, bias, tables).reshape(-1, counts[3], CONFIG.lanes)
    totals = arithmetic.reduce_last(AluOp.ADD, np.moveaxis(result, 1, 2))[:, None, :]
    written = totals if sums is RowSums.ONLY else result
    noise = None
    if rounding is Rounding.STOCHASTIC:
        number = CONFIG.engines.index("scalar")
        elements = len(addresses["dst"])
        noise = dither.random_words(seed, counter, number, elements=elements, lanes=CONFIG.lanes)
        noise = noise.T.reshape(len(written), -1, CONFIG.lanes)[:, : written.shape[1]]
    written = arithmetic.round_to(written, dtype, noise)
    if sums is RowSums.BEHIND:
        written = np.concatenate([written, totals], axis=1)
    mask = (1 << lanes) - 1
    writes = []
    columns = written.reshape(-1, CONFIG.lanes)
    for address, column in zip(addresses["dst"].tolist(), columns, strict=True):
        memory[spaces["dst"]][address, :lanes] = column[:lanes]
        writes.append(_masked(spaces["dst"], address, mask, column))
    turns = function in (Function.SIN, Function.COS)
    cycles = (len(x) * TURN_CYCLES + 1 if turns else len(x)) + FIXED_CYCLES
    cycles += len(result) * SUM_CYCLES * (sums is not RowSums.NONE)
    cycles += (1 if turns else len(result)) * ROW_CYCLES * (opcode is Opcode.ACTIVATE_ROWS)
    return Job(word, counter, cycles, writes)


async def _engine(dut: object, *, reads: float, writes: float, issue: float, jobs: int) -> None:
    """Runs random instructions and compares every write, the final memories and, when nothing
    stalls, the cycles from taken to done."""
    rng = np.random.default_rng(random.getrandbits(32))
    stalls = reads < 1 or writes < 1
    memories = Memories(dut, rng, reads=reads, writes=writes)
    model = {space: words.copy() for space, words in memories.words.items()}
    Clock(dut.clk, 10, unit="ns").start()
    dut.rst.value = 1
    dut.issue__instruction__valid.value = 0
    seed = random.getrandbits(32)
    dut.issue__seed.value = seed
    for _ in range(3):
        await FallingEdge(dut.clk)
        memories.drive()
        await ReadOnly()
        memories.observe()
    await FallingEdge(dut.clk)
    memories.drive()
    dut.rst.value = 0
    await ReadOnly()
    memories.observe()

    tables = np.zeros((CONFIG.lanes, TABLE_WORDS), np.uint32)
    half = TABLE_WORDS // 2
    # A reset leaves the tables of the test before.
    waiting = [load_table(model, tables, start, half, CONFIG.lanes) for start in (0, half)]
    waiting += [random_job(model, tables, rng, seed) for _ in range(jobs - len(waiting))]
    expected = [write for job in waiting for write in job.writes]
    running: Job | None = None
    offered: Job | None = None
    cycle = taken_at = finished = written = 0
    while waiting or offered or running:
        await FallingEdge(dut.clk)
        if offered is None and waiting and random.random() < issue:
            offered = waiting.pop(0)
        dut.issue__instruction__valid.value = offered is not None
        dut.issue__instruction__payload.value = offered.word if offered else random.getrandbits(512)
        dut.issue__counter.value = offered.counter if offered else random.getrandbits(32)
        memories.drive()
        await ReadOnly()
        assert bool(dut.issue__busy.value) == (running is not None)
        memories.observe()
        if dut.issue__done.value:
            assert running is not None
            finished += 1
            written += len(running.writes)
            assert len(memories.written) == written  # all of its writes, and no other's
            if not stalls:
                assert cycle - taken_at == running.cycles
            running = None
        if offered and dut.issue__instruction__ready.value:
            assert running is None
            running, offered, taken_at = offered, None, cycle
        cycle += 1
    for got, wanted in zip(memories.written, expected, strict=True):
        assert got == wanted, f"wrote {got}, wanted {wanted}"
    assert finished == jobs
    for space in Space:
        assert (memories.words[space] == model[space]).all()
    cocotb.log.info("compared %d columns of %d instructions", len(expected), jobs)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def engine_free(dut) -> None:
    """Nothing stalls: bits and cycles."""
    await _engine(dut, reads=1, writes=1, issue=1, jobs=120)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def engine_idle(dut) -> None:
    """The memories hold reads back, instructions come late."""
    await _engine(dut, reads=0.6, writes=1, issue=0.1, jobs=40)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def engine_backpressure(dut) -> None:
    """The memories hold writes back."""
    await _engine(dut, reads=1, writes=0.5, issue=1, jobs=40)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def engine_stalls(dut) -> None:
    """Everything stalls."""
    await _engine(dut, reads=0.5, writes=0.5, issue=0.5, jobs=40)
