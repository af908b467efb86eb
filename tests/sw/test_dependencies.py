"""Semaphores: random kernels run in any order the hardware may choose give the results of the
program order."""

import dataclasses
import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systolith.errors import KernelError, RaceError
from systolith.golden import Core
from systolith.golden.checker import operand_counts, operand_strides
from systolith.golden.debugger import Debugger
from systolith.kernel import (
    AluOp,
    DramTensor,
    DType,
    Function,
    KernelBuilder,
    Tile,
    View,
    builder,
)
from systolith.program import Program
from systolith_hdl.config import PRESETS, CoreConfig
from systolith_hdl.formats import FLOATS, FORMATS, FP8_TYPES, INTEGERS
from systolith_hdl.isa import DRAM_READERS, LOADS, SPECS, Opcode, WaitMode, decode
from systolith_tb.configs import NANO_FP8

NANO = PRESETS["nano"]
FOUR_QUEUES = dataclasses.replace(NANO, name="four", dma_queues=4)
STREAM_BASE = 1 << 14
#: of rows of the tensors; what loads bring into the first words of SBUF is there before, too
INDICES = np.array([2, 0, 3, 2, 1, 1, 0, 3], np.int32)


def random_program(rng: random.Random, calls: int, config: CoreConfig = NANO) -> Program:
    """A kernel of random instructions that collide often; each is labelled with its number."""
    nc = KernelBuilder(config, name="random")
    tensors = [nc.dram.tensor(f"t{i}", (4, 16), rng.choice((*FLOATS, *INTEGERS)))
               for i in range(3)]  # fmt: skip
    numbers = nc.dram.tensor("indices", kind="constant", data=INDICES)
    index = nc.sbuf.tile(2).view().astype(DType.INT32)
    sbuf = [nc.sbuf.tile(12) for _ in range(4)]
    psum = [nc.psum.tile(12) for _ in range(2)]

    def view(tiles: list[Tile], shape: tuple[int, ...], **options: int) -> View:
        tile = rng.choice(tiles)
        size = int(np.prod(shape))
        if rng.random() < 0.3 and size <= 6:
            strides = [2 * s for s in np.cumprod([1, *shape[:0:-1]])[::-1]]
            return tile.view(shape, strides, rng.randint(0, 12 - 2 * size + 1), **options)
        return tile.view(shape, offset=rng.randint(0, 12 - size), **options)

    def transfer(method: object, dram: DramTensor) -> None:
        columns = rng.randint(1, 8)
        dense = rng.random() < 0.5
        item = dram.itemsize
        method(  # type: ignore[operator]
            view(sbuf, (columns,)),
            dram,
            item * rng.randint(0, 8),
            [item if dense else 4 * item],
            16 * item if dense else item,
            queue=rng.choice((None, *range(config.dma_queues))),
            accumulate=rng.random() < 0.3,
        )

    def by_index(method: object, dram: DramTensor) -> None:
        if rng.random() < 0.3:
            nc.dma.load(index, numbers, 0, [4 * 4], 4, queue=rng.choice((None, 0)))
            return
        rows, columns = rng.choice(((1, 4), (3, 2), (5, 1), (6, 1)))
        method(  # type: ignore[operator]
            view(sbuf, (rows, columns)),
            dram,
            index,
            4 * dram.itemsize * rng.randint(0, 4 - columns),
            rng.choice((None, 4)),
            queue=rng.choice((None, *range(config.dma_queues))),
            accumulate=rng.random() < 0.3,
        )

    def call() -> None:
        shape = rng.choice(((4,), (2, 3), (8,), (2, 1, 2)))
        either = rng.choice((sbuf, psum))
        match rng.randrange(12):
            case 10:
                by_index(nc.dma.gather, rng.choice(tensors))
            case 11:
                by_index(nc.dma.scatter, rng.choice(tensors))
            case 0 | 1:
                transfer(nc.dma.load, rng.choice(tensors))
            case 2:
                transfer(nc.dma.store, rng.choice(tensors))
            case 3 if config.fp8_rate == 2 and rng.random() < 0.7:
                first, second = (view(sbuf, (4,)).astype(rng.choice(FP8_TYPES)) for _ in range(2))
                nc.tensor.load_stationary(first, second)
            case 4 | 5 if config.fp8_rate == 2 and rng.random() < 0.7:
                first, second = (view(sbuf, shape).astype(rng.choice(FP8_TYPES)) for _ in range(2))
                nc.tensor.matmul(view(psum, shape), first, rng.random() < 0.5, second)
            case 3:
                nc.tensor.load_stationary(view(sbuf, (4,)))
            case 4 | 5:
                nc.tensor.matmul(view(psum, shape), view(sbuf, shape), rng.random() < 0.5)
            case 6:
                nc.vector.tensor_tensor(
                    view(either, shape), view(psum, shape), AluOp.ADD, view(sbuf, shape)
                )
            case 7:
                nc.vector.reduce(view(sbuf, (2, 1)), view(either, (2, 4)), AluOp.MAX)
            case 8:
                nc.vector.memset(view(either, shape).astype(DType.BF16), rng.random())
            case 9:
                bias = view(sbuf, shape) if rng.random() < 0.5 else 0.5
                nc.scalar.activate(
                    view(sbuf, shape), view(either, shape), Function.IDENTITY, 0.5, bias
                )

    made = 0
    while made < calls:
        with nc.label(str(made)):
            try:
                call()
            except KernelError:  # an overlap, or a matmul too early: draw again
                continue
        made += 1
        if rng.random() < 0.05:
            tiles, memory = rng.choice(((sbuf, nc.sbuf), (psum, nc.psum)))
            index = rng.randrange(len(tiles))
            memory.free(tiles[index])
            tiles[index] = memory.tile(12)
    return nc.finish()


@dataclasses.dataclass
class Instruction:
    """One instruction with the exact words it touches."""

    order: int
    engine: str
    stream: str
    opcode: Opcode
    fields: dict[str, int]
    raw: bytes
    reads: set[tuple[str, int]]
    writes: set[tuple[str, int]]


def walk(base: int, counts: list[int], strides: list[int]) -> set[int]:
    return {
        base + sum(i * s for i, s in zip(index, strides, strict=True))
        for index in itertools.product(*(range(n) for n in counts))
    }


def decoded(program: Program) -> list[Instruction]:
    """All instructions but END, in the order of the calls that made them, NOPs before theirs."""
    found = []
    for engine, index, raw in program.instructions():
        opcode, fields = decode(raw)
        if opcode is Opcode.END:
            continue
        reads: set[tuple[str, int]] = set()
        writes: set[tuple[str, int]] = set()
        for name in SPECS[opcode].operands:
            space = "psum" if fields[f"{name}.space"] else "sbuf"
            words = walk(
                fields[f"{name}.base"],
                operand_counts(opcode, name, fields),
                operand_strides(name, fields),
            )
            adds = "dram_base" in fields and fields["accumulate"]
            writing = name == "dst" or opcode in DRAM_READERS or adds
            (writes if writing else reads).update((space, word) for word in words)
        if fields.get("columns") and fields["accumulate"]:
            reads |= writes
        if "dram_base" in fields:
            size = FORMATS[DType(fields["dram_dtype"])].bytes
            bases = {fields["dram_base"]}
            if "rows" in fields:
                picked = INDICES[: fields["counts.0"]].tolist()
                reads |= {("sbuf", i // 4 + fields["index.base"]) for i in range(len(picked))}
                bases = {fields["dram_base"] + i * fields["row_stride"] for i in picked}
                counts = [fields["lanes"], fields["counts.3"]]
                strides = [fields["lane_stride"], fields["column_stride"]]
            else:
                counts = [fields["lanes"], *(fields[f"counts.{i}"] for i in range(4))]
                strides = [fields["lane_stride"], *(fields[f"dram_strides.{i}"] for i in range(4))]
            starts = {start for base in bases for start in walk(base, counts, strides)}
            touched = {("dram", start + i) for start in starts for i in range(size)}
            (reads if opcode in DRAM_READERS else writes).update(touched)
        stream = "loads" if opcode in LOADS else engine
        label = program.debug_info(engine, index).label
        assert label is not None
        found.append(Instruction(int(label), engine, stream, opcode, fields, raw, reads, writes))
    return sorted(found, key=lambda i: i.order)


def waits_of(fields: dict[str, int]) -> list[tuple[int, int]]:
    found = []
    for slot in range(3):
        mode = fields[f"wait.{slot}.mode"]
        assert mode in (WaitMode.NONE.value, WaitMode.AT_LEAST.value)
        if mode:
            found.append((fields[f"wait.{slot}.sem"], fields[f"wait.{slot}.value"]))
    return found


def unordered(program: Program, *, exact: bool = True) -> list[tuple[Instruction, Instruction]]:
    """Conflicting instructions of different engines that the waits alone do not order. With
    `exact` also asserts that no wait or signal is superfluous.

    What is known complete when an instruction issues is a bit set over all instructions.
    """
    instructions = decoded(program)
    signallers: dict[int, list[int]] = {}
    known: dict[str, int] = {}  # engine -> complete when it issues next
    at_issue: list[int] = []
    streams: dict[str, int] = {}  # instructions so far
    complete: list[int] = []  # what is complete once that instruction is
    waited: set[int] = set()
    for number, instruction in enumerate(instructions):
        targets = [signallers[sem][value - 1] for sem, value in waits_of(instruction.fields)]
        waited.update(targets)
        before = known.get(instruction.engine, 0)
        for target in targets:
            others = before
            for other in targets:
                if other != target:
                    others |= complete[other]
            assert not (exact and others >> target & 1), "superfluous wait"
        for target in targets:
            before |= complete[target]
        known[instruction.engine] = before
        at_issue.append(before)
        stream = streams.get(instruction.stream, 0) | 1 << number
        if instruction.opcode is not Opcode.NOP:
            streams[instruction.stream] = stream
        done = before | stream
        if instruction.opcode in (Opcode.MATMUL, Opcode.MATMUL_PAIR):
            done |= streams.get("loads", 0)
        complete.append(done)
        if instruction.fields["signal.amount"]:
            assert instruction.fields["signal.amount"] == 1
            signallers.setdefault(instruction.fields["signal.sem"], []).append(number)
    if exact:
        assert waited == set(itertools.chain(*signallers.values())), "superfluous signal"
    found = []
    for late, early in ((a, b) for a in range(len(instructions)) for b in range(a)):
        x, y = instructions[early], instructions[late]
        if x.engine != y.engine and (x.writes & (y.reads | y.writes) or x.reads & y.writes):
            if not at_issue[late] >> early & 1:
                found.append((x, y))
    return found


def verify_order(program: Program) -> None:
    """Proves from the waits alone that conflicting instructions of different engines are ordered,
    and that no wait or signal is superfluous."""
    for x, y in unordered(program):
        raise AssertionError(f"{x.order} and {y.order} are not ordered")


def memories(seed: int, program: Program, scheduler: random.Random | None) -> Core:
    generator = np.random.default_rng(seed)
    dram = generator.integers(0, 256, 1 << 17).astype(np.uint8)
    core = Core(program.config, dram, scheduler=scheduler)
    for memory in (core.sbuf, core.psum):
        memory[:] = generator.standard_normal(memory.shape).astype(np.float32).view(np.uint32)
    core.sbuf[:, :2] = INDICES.reshape(2, 4).T
    for name, raw in program.constants.items():
        at = program.tensor(name).address
        core.dram[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
    return core


def verify_results(program: Program, seed: int, runs: int = 3) -> None:
    """Runs the program under random schedules and compares with its calls one after the other."""
    reference = memories(seed, program, None)
    for instruction in decoded(program):
        assert reference.execute(instruction.raw, instruction.engine) is None
    for run in range(runs):
        core = memories(seed, program, random.Random(seed + run) if run else None)
        bases = []
        end = STREAM_BASE
        for stream in program.streams.values():
            bases.append(end)
            core.dram[end : end + len(stream)] = np.frombuffer(stream, np.uint8)
            end += len(stream)
        core.start(bases)
        core.run()
        assert core.fault is None
        np.testing.assert_array_equal(core.sbuf, reference.sbuf)
        np.testing.assert_array_equal(core.psum, reference.psum)
        np.testing.assert_array_equal(core.dram[:STREAM_BASE], reference.dram[:STREAM_BASE])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), calls=st.integers(1, 60))
def test_random_kernels(seed: int, calls: int) -> None:
    program = random_program(random.Random(seed), calls)
    verify_order(program)
    verify_results(program, seed)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_kernels_with_four_queues(seed: int) -> None:
    program = random_program(random.Random(seed), 60, FOUR_QUEUES)
    verify_order(program)
    verify_results(program, seed, runs=2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_kernels_with_pairs(seed: int) -> None:
    program = random_program(random.Random(seed), 60, NANO_FP8)
    verify_order(program)
    verify_results(program, seed, runs=2)


@pytest.mark.parametrize("engine", ["vector", "scalar", "tensor", "dma0", "dma1"])
def test_the_proof_fails_without_the_waits(engine: str) -> None:
    """The checks above would notice a missing wait on any engine."""
    program = random_program(random.Random(5), 200)
    stream = np.frombuffer(program.streams[engine], np.uint8).copy().reshape(-1, 64)
    # The wait slots are bits 32 to 103 of the header.
    assert stream[:, 4:13].any()
    stream[:, 4:13] = 0
    broken = dataclasses.replace(
        program, streams=dict(program.streams) | {engine: stream.tobytes()}
    )
    with pytest.raises(AssertionError):
        verify_order(broken)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), calls=st.integers(2, 60), data=st.data())
def test_the_race_detector_finds_what_the_proof_finds(
    seed: int, calls: int, data: st.DataObject
) -> None:
    """Some waits less, and the golden device reports a race exactly if there is one, in whatever
    order it executes the instructions; and the two that it names are one."""
    program = random_program(random.Random(seed), calls)
    slots = [
        (engine, index, slot)
        for engine, index, raw in program.instructions()
        for slot in range(3)
        if decode(raw)[1][f"wait.{slot}.mode"]
    ]
    for engine, index, slot in slots:
        if data.draw(st.integers(0, 9)) == 0:
            gone = {f"wait.{slot}.{part}": 0 for part in ("sem", "mode", "value")}
            program = program.with_fields(engine, index, gone)
    races = {
        frozenset({f"{x.engine} {x.order}", f"{y.engine} {y.order}"})
        for x, y in unordered(program, exact=False)
    }
    core = memories(seed, program, random.Random(seed))
    core.observer = debugger = Debugger(core, check=True)
    bases = []
    end = STREAM_BASE
    for stream in program.streams.values():
        bases.append(end)
        core.dram[end : end + len(stream)] = np.frombuffer(stream, np.uint8)
        end += len(stream)
    debugger.describe(program, {tensor.name: tensor.address for tensor in program.tensors})
    core.start(bases)
    assert debugger.checks is not None
    debugger.checks.define_everything()  # the kernels compute on what they find
    if not races:
        core.run()
        assert core.fault is None
        return
    with pytest.raises(RaceError) as caught:
        core.run()
    named = []
    for text in (caught.value.first, caught.value.second):
        engine, index = re.match(r"(\w+)\[(\d+)\] ", text).groups()  # type: ignore[union-attr]
        named.append(f"{engine} {program.debug_info(engine, int(index)).label}")
    assert frozenset(named) in races


def test_more_waits_than_slots() -> None:
    """Five engines read what one then writes: a NOP carries the waits that do not fit."""
    nc = KernelBuilder(FOUR_QUEUES)
    tile, psum = nc.sbuf.tile(4), nc.psum.tile(4)
    tensors = [nc.dram.tensor(f"y{q}", (4, 4), DType.FP32, kind="output") for q in range(4)]
    nc.tensor.load_stationary(tile.view())
    nc.tensor.matmul(psum.view(), tile.view())
    nc.scalar.activate(nc.sbuf.tile(4).view(), tile.view(), Function.EXP)
    for queue, tensor in enumerate(tensors):
        nc.dma.store(tile.view(), tensor, lane_stride=16, queue=queue)
    nc.vector.memset(tile.view(), 0)
    program = nc.finish()
    opcodes = [decode(program.instruction("vector", i))[0] for i in range(program.count("vector"))]
    assert opcodes == [Opcode.NOP, Opcode.MEMSET, Opcode.END]
    fields = [decode(program.instruction("vector", i))[1] for i in range(2)]
    # The MATMUL implies the LOAD_STATIONARY before it: six waits, not seven.
    assert [len(waits_of(f)) for f in fields] == [3, 3]
    assert len(program.debug["vector"]) == 3


def test_waits_are_pruned() -> None:
    """A chain over three engines needs one wait per link, and repeated use of one result none."""
    nc = KernelBuilder("nano")
    x = nc.dram.tensor("x", (4, 8), DType.FP32)
    a, b, c = (nc.sbuf.tile(8) for _ in range(3))
    nc.dma.load(a.view(), x, lane_stride=32)
    nc.vector.tensor_scalar(b.view(), a.view(), AluOp.MUL, 2.0)
    nc.scalar.activate(c.view(), b.view(), Function.EXP, bias=a.view())
    nc.vector.tensor_tensor(b.view(), a.view(), AluOp.ADD, c.view())
    nc.vector.tensor_tensor(b.view(), a.view(), AluOp.ADD, c.view())
    program = nc.finish()
    counts = {
        engine: [
            len(waits_of(decode(program.instruction(engine, i))[1]))
            for i in range(program.count(engine))
        ]
        for engine in ("dma0", "vector", "scalar")
    }
    assert counts == {"dma0": [0, 0], "vector": [1, 1, 0, 0], "scalar": [1, 0]}


def test_dram_hazards() -> None:
    """A load after a store to the same bytes waits for it; other bytes do not matter."""
    nc = KernelBuilder("nano")
    x = nc.dram.tensor("x", (2, 4, 8), DType.FP32, kind="scratch")
    a, b, c = (nc.sbuf.tile(8) for _ in range(3))
    nc.dma.store(a.view(), x, 0, lane_stride=32)
    nc.dma.load(b.view(), x, 128, lane_stride=32)
    nc.dma.load(c.view(), x, 0, lane_stride=32)
    program = nc.finish()
    waits = [waits_of(decode(program.instruction("dma0", i))[1]) for i in range(2)]
    assert [len(w) for w in waits] == [0, 1]


def test_semaphores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert builder.MAX_SEMAPHORE == 65535
    monkeypatch.setattr(builder, "MAX_SEMAPHORE", 40)

    def build(signals: int) -> Program:
        nc = KernelBuilder("nano")
        a, b = nc.sbuf.tile(1), nc.sbuf.tile(1)
        with nc.label(source="loop.py:3"):
            for _ in range(signals):
                nc.vector.copy(b.view(), a.view())
                nc.scalar.activate(a.view(), b.view(), Function.IDENTITY)
        return nc.finish()

    build(40)
    with pytest.raises(KernelError, match=r"loop\.py:3: the semaphore of vector would pass 40"):
        build(41)
