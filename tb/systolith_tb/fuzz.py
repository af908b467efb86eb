"""Random programs: legal ones that must do the same on the gates as in the golden model, and
illegal ones that must fault the same.

A `Case` is a list of instructions and loops in one order, without waits and signals. `program`
distributes them to the engines and orders with semaphores whatever touches the same words, so any
part of a case is a case again, which is what makes it possible to `shrink` one that fails.

Everything is drawn from `isa.SPECS` and judged by the golden checker, so an instruction added to
the instruction set is fuzzed without a change here.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from amaranth.hdl import Shape
from systolith.errors import DeviceFault, SystolithError
from systolith.golden import dma
from systolith.golden.checker import check, operand_counts
from systolith.golden.checks import Access, accesses
from systolith.golden.device import GoldenDevice
from systolith.kernel import KernelBuilder
from systolith.program import Program, Relocation, TensorInfo
from systolith.runtime.backend import Backend
from systolith.runtime.driver import Driver
from systolith.runtime.rtl import RtlBackend
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FORMATS, DType
from systolith_hdl.isa import (
    DMA_TYPES,
    DRAM_WRITERS,
    FIELDS,
    INDEX_REGISTERS,
    LOADS,
    LOOP_DEPTH,
    MAX_WAITS,
    SPECS,
    TABLE_WORDS,
    EngineKind,
    FaultCause,
    Opcode,
    Space,
    WaitMode,
    add_indices,
    decode,
    encode,
    engine_kind,
    legal_operations,
    operation_types,
)

from .stimulus import CORNERS, any_strides, nested_strides, place, random_counts, random_words

#: bytes of DRAM that transfers of a case touch
DATA_BYTES = 8192
#: steps of an instruction at most
STEPS = 48
#: cycles a program may take: above what loops of remainders of FP32 do
TIMEOUT = 1_000_000
#: words of SBUF and PSUM that most operands lie in, so that instructions meet
HOT_WORDS = 96
#: the last words of SBUF hold indices below ROWS and are never written
INDEX_WORDS = 16
ROWS = 8


class Instruction(NamedTuple):
    """One instruction of a case: the engine that runs it, and its fields but waits and signal."""

    engine: str
    opcode: Opcode
    fields: dict[str, int]


#: Index registers 1 to 3.
Registers = tuple[int, ...]
_ZERO: Registers = (0,) * INDEX_REGISTERS


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of one engine.

    Parameters
    ----------
    engine : that runs it
    count : iterations at most
    steps : added to the index registers by each
    conditional : over when the flag is not set, which a TEST in the body may do
    body : at least one element
    """

    engine: str
    count: int
    steps: Registers
    conditional: bool
    body: tuple[Instruction | Loop, ...]


Element = Instruction | Loop


def unroll(element: Element, registers: Registers = _ZERO) -> Iterator[Instruction]:
    """The instructions of an element as they execute, index registers added; of a loop that data
    may end, those of all its iterations."""
    if isinstance(element, Instruction):
        raw = add_indices(encode(element.opcode, element.fields), registers)
        yield Instruction(element.engine, *decode(raw))
        return
    for _ in range(element.count):
        for inner in element.body:
            yield from unroll(inner, registers)
        registers = tuple(r + s for r, s in zip(registers, element.steps, strict=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """A program before it is distributed.

    Parameters
    ----------
    config : of the core
    seed : of the data, the semaphores and the rounding
    elements : in an order in which they may execute
    """

    config: CoreConfig
    seed: int
    elements: tuple[Element, ...]

    def instructions(self) -> Iterator[Instruction]:
        """Every instruction that is in it, those of loops once."""
        todo = list(self.elements)
        while todo:
            element = todo.pop()
            if isinstance(element, Instruction):
                yield element
            else:
                todo += element.body


# -- instructions ------------------------------------------------------------------------------


def _any_value(name: str, opcode: Opcode) -> int:
    shape = Shape.cast(FIELDS[opcode][name][1])
    if shape.width == 32:
        # An immediate: a number, a corner or a small integer.
        return int(
            random.choice(
                (
                    int(np.float32(random.uniform(-3, 3)).view(np.uint32)),
                    int(random.choice(CORNERS)),
                    random.randrange(64),
                    random.getrandbits(32),
                )
            )
        ) - ((1 << 31) if shape.signed else 0)
    low = -(1 << (shape.width - 1)) if shape.signed else 0
    return random.randint(low, low + (1 << shape.width) - 1)


def _draw(config: CoreConfig, opcode: Opcode) -> dict[str, Any] | None:
    """Fields that are legal one by one; None if an operand found no place."""
    spec = SPECS[opcode]
    counts = random_counts(STEPS)
    if spec.indexed:
        counts[0] = min(counts[0], 12)
    fields: dict[str, Any] = {}
    for name in FIELDS[opcode]:
        head, _, tail = name.partition(".")
        if head in ("opcode", "wait", "signal") or name.endswith(("dram_index", ".index")):
            continue
        if head == "counts":
            fields[name] = counts[int(tail)]
        elif name in ("lanes", "columns"):
            whole = random.random() < 0.5
            fields[name] = config.lanes if whole else random.randint(1, config.lanes)
        elif name in ("op0", "op1"):
            fields[name] = random.choice(sorted(legal_operations(opcode, name, config)))
        elif name == "dram_dtype":
            fields[name] = random.choice(sorted(DMA_TYPES, key=lambda t: t.value)).value
        elif head in spec.operands and tail == "dtype":
            types = sorted(spec.operands[head][1], key=lambda t: t.value)
            fields[name] = random.choice(types).value
        elif head not in spec.operands and not name.startswith("dram") and name != "lane_stride":
            fields[name] = _any_value(name, opcode)
    fields |= {f"{name}.dtype": fields["src0.dtype"] for name in spec.alike}
    for operation, legal in operation_types(opcode, config).items():
        if fields["op1"] == operation.value:
            dtype = random.choice(sorted(legal, key=lambda t: t.value)).value
            fields |= {f"{name}.dtype": dtype for name in ("src0", *spec.alike)}
    if opcode is Opcode.MATMUL and fields["dst.dtype"] == DType.INT32.value:
        fields["src0.dtype"] = DType.INT8.value
    for name, limit in spec.limits.items():
        least, most = limit(fields.__getitem__, config)
        if not least <= fields[name] <= most or random.random() < 0.5:
            fields[name] = random.randint(least, min(most, least + config.lanes))
    counts = [fields.get(f"counts.{d}", 1) for d in range(4)]

    for operand, (spaces, _) in spec.operands.items():
        space = random.choice(sorted(spaces, key=lambda s: s.value))
        depth = config.psum_depth if space is Space.PSUM else config.sbuf_depth - INDEX_WORDS
        strides = random.choice((any_strides, lambda n: nested_strides(n)[0]))(counts)
        used = [f"{operand}.strides.{d}" in FIELDS[opcode] for d in range(4)]
        window = HOT_WORDS if random.random() < 0.8 else depth
        walked = operand_counts(opcode, operand, fields)
        ends = [n if here else 1 for n, here in zip(walked, used, strict=True)]
        base = place(strides, ends, 0, min(window, depth))
        if base is None:
            return None
        fields |= {f"{operand}.space": space.value, f"{operand}.base": base}
        fields |= {f"{operand}.strides.{d}": strides[d] for d in range(4) if used[d]}
    if "dst.base" in fields and random.random() < 0.3:
        # In place, as far as the format allows it.
        for source in ("src0", "src1"):
            for name in [name for name in fields if name.startswith(f"{source}.")]:
                twin = "dst" + name.removeprefix(source)
                if not name.endswith("dtype") and twin in fields and random.random() < 0.9:
                    fields[name] = fields[twin]
    if opcode is Opcode.TEST:
        fields["dram_base"] = random.randrange(DATA_BYTES - 4)
    elif "dram_base" in FIELDS[opcode]:
        size = FORMATS[DType(fields["dram_dtype"])].bytes
        lanes = fields["lanes"]
        inner = counts[3]
        lane_stride, inner_stride = random.choice(
            (
                (size, lanes * size),
                (inner * size, size),
                (size, random.randint(-64, 64)),
                (0, size),
                (random.randint(-80, 80), random.randint(-80, 80)),
            )
        )
        outer = [
            random.choice((0, size, inner * lanes * size, random.randint(-200, 200)))
            for _ in range(3)
        ]
        reach = counts
        if spec.indexed:
            outer[1:] = 0, 0
            reach = [ROWS, 1, 1, inner]
            last = (counts[0] - 1) // config.lanes  # word of the last index
            fields["rows"] = ROWS
            fields["index.base"] = config.sbuf_depth - 1 - random.randint(last, INDEX_WORDS - 1)
        strides = [*outer, inner_stride, lane_stride]
        base = place(strides, [*reach, lanes], 0, DATA_BYTES - size)
        if base is None:
            return None
        if size > 1 and random.random() < 0.9:
            strides = [s & ~1 for s in strides]
        names = [*(f"dram_strides.{d}" for d in range(4)), "lane_stride"]
        if spec.indexed:
            names = ["row_stride", "", "", "column_stride", "lane_stride"]
        fields["dram_base"] = base
        fields |= {name: stride for name, stride in zip(names, strides, strict=True) if name}
    return fields


def _addresses(access: Access) -> np.ndarray:
    """Word addresses of an operand, in the order of its steps."""
    found = np.full((), access.base, np.int64)
    for n, s in zip(access.counts, access.strides, strict=True):
        found = found[..., None] + np.arange(n) * s
    return found.ravel()


#: instructions that write an element after reading others of the same source
_MIXING = frozenset({Opcode.REDUCE, Opcode.STATISTICS, Opcode.SCAN, Opcode.TOP, Opcode.TRANSPOSE})


def _defined(config: CoreConfig, opcode: Opcode, fields: dict[str, int]) -> bool:
    """Whether the result is: a destination overlaps a source only element for element, and no
    indices."""
    indices = config.sbuf_depth - INDEX_WORDS
    if SPECS[opcode].indexed and fields["index.base"] < indices:
        return False
    found = list(accesses(opcode, fields, config.lanes))
    for target in found:
        if not target.writes:
            continue
        mine = _addresses(target)
        if target.space is Space.SBUF and mine.max() >= indices:
            return False
        for source in found:
            if source is target or source.space is not target.space:
                continue
            theirs = _addresses(source)
            if not np.intersect1d(mine, theirs).size:
                continue
            whole = opcode not in _MIXING and np.array_equal(mine, theirs)
            if not whole or np.unique(mine).size != mine.size:
                return False
    return True


def _dram_bytes(opcode: Opcode, fields: dict[str, int]) -> np.ndarray | None:
    """Bytes of the data that an instruction touches in DRAM, None if it is none."""
    if "dram_base" not in fields:
        return None
    if opcode is Opcode.TEST:
        return (fields["dram_base"] & ~3) + np.arange(4)
    size = FORMATS[DType(fields["dram_dtype"])].bytes
    if SPECS[opcode].indexed:  # any row
        found = np.full(1, fields["dram_base"], np.int64)
        for n, stride in (
            (fields["rows"], fields["row_stride"]),
            (fields["counts.3"], fields["column_stride"]),
            (fields["lanes"], fields["lane_stride"]),
        ):
            found = (found[:, None] + np.arange(n) * stride).ravel()
        found &= ~(size > 1)  # bit 0 of an address is ignored
    else:
        found = dma.element_addresses(fields).ravel()
    return np.unique(found[:, None] + np.arange(size))


def _legal(config: CoreConfig, element: Element, registers: Registers = _ZERO) -> bool:
    """Whether all that executes is legal and has a result that is defined."""
    for engine, opcode, fields in unroll(element, registers):
        if check(encode(opcode, fields), engine_kind(engine), config) is not None:
            return False
        touched = _dram_bytes(opcode, fields)
        if touched is not None and not (
            touched.size and touched[0] >= 0 and touched[-1] < DATA_BYTES
        ):
            return False
        if not _defined(config, opcode, fields):
            return False
    return True


def draw_instruction(
    config: CoreConfig, engine: str, contexts: Sequence[Registers] = (_ZERO,)
) -> Instruction:
    """A legal instruction for an engine, whose result is defined with all of these registers."""
    kind = engine_kind(engine)
    opcodes = [o for o, s in SPECS.items() if s.kind is kind and s.exists(config)]
    instruction = random.random() < 0.98 or not config.loops
    opcode = random.choice(opcodes) if instruction else Opcode.TEST
    while True:
        fields = _draw(config, opcode)
        if fields is None:
            continue
        if len(contexts) > 1:
            for name in FIELDS[opcode]:
                if name.endswith(("dram_index", ".index")) and random.random() < 0.6:
                    fields[name] = random.randint(1, INDEX_REGISTERS)
        found = Instruction(engine, opcode, decode(encode(opcode, fields))[1])
        if all(_legal(config, found, registers) for registers in contexts):
            return found


def draw_loop(
    config: CoreConfig, engine: str, contexts: Sequence[Registers] = (_ZERO,), level: int = 1
) -> Loop:
    """A loop whose body is legal with all of these registers before it; one inside of others from
    `level` 2 on."""
    count = random.randint(1, max(2, 6 // len(contexts)))
    steps = tuple(random.choice((0, 1, 2, -3, 8, random.randint(-20, 20))) for _ in _ZERO)
    inner = [
        tuple(r + i * s for r, s in zip(registers, steps, strict=True))
        for registers in contexts
        for i in range(count)
    ]
    conditional = random.random() < 0.2
    body: list[Element] = []
    if conditional:
        fields = {"dram_base": random.randrange(DATA_BYTES // 2, DATA_BYTES - 1024)}
        fields["dram_index"] = random.randint(0, INDEX_REGISTERS)
        body.append(Instruction(engine, Opcode.TEST, fields))
    for _ in range(random.randint(1, 3)):
        if level < LOOP_DEPTH and random.random() < 0.3:
            body.append(draw_loop(config, engine, inner, level + 1))
        else:
            body.append(draw_instruction(config, engine, inner))
    return Loop(engine, count, steps, conditional, tuple(body))


def draw_case(config: CoreConfig, seed: int, *, length: int = 40) -> Case:
    """The case of a seed: up to `length` instructions."""
    random.seed(seed)
    engines = list(config.engines)
    # Some cases leave an engine out, or let one do most of the work.
    weights = [random.choice((0.2, 1, 1, 3)) for _ in engines]
    order = random.choices(engines, weights, k=random.randint(length // 4, length))
    return Case(
        config,
        seed,
        tuple(
            draw_loop(config, engine)
            if random.random() < 0.1 and config.loops
            else draw_instruction(config, engine)
            for engine in order
        ),
    )


# -- programs ----------------------------------------------------------------------------------


class _Order:
    """Which earlier instructions each one has to wait for, by the words and bytes it touches.

    A stream is an engine, or "loads": the loads of the stationary operand, which complete in an
    order of their own.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.streams = [*config.engines, "loads"]
        count = len(self.streams)
        depths = {Space.SBUF: config.sbuf_depth, Space.PSUM: config.psum_depth}
        #: memory -> (last that wrote, last that read), as 1 + index in its stream
        self._words = {
            space: np.zeros((2, count, config.lanes, depth), np.int64)
            for space, depth in depths.items()
        }
        self._bytes = np.zeros((2, count, DATA_BYTES), np.int64)
        self._lanes = config.lanes
        self._counts = [0] * count

    def add(self, element: Element) -> tuple[set[str], dict[str, int]]:
        """Takes the next element; returns its streams, and stream -> how many elements of it must
        be complete before."""
        executed = list(unroll(element))
        names = {self._stream(instruction) for instruction in executed}
        for name in names:
            self._counts[self.streams.index(name)] += 1
        needed = np.zeros(len(self.streams), np.int64)
        for _, opcode, fields in executed:
            for access in accesses(opcode, fields, self._lanes):
                words = self._words[access.space][:, :, : access.lanes, _addresses(access)]
                needed = np.maximum(needed, (words if access.writes else words[:1]).max((0, 2, 3)))
            data = _dram_bytes(opcode, fields)
            if data is not None:
                found = self._bytes[:, :, data]
                store = opcode in DRAM_WRITERS
                needed = np.maximum(needed, (found if store else found[:1]).max((0, 2)))
        for instruction in executed:
            _, opcode, fields = instruction
            stream = self.streams.index(self._stream(instruction))
            count = self._counts[stream]
            for access in accesses(opcode, fields, self._lanes):
                memory = self._words[access.space]
                for kind, here in ((0, access.writes), (1, access.reads)):
                    if here:
                        memory[kind, stream, : access.lanes, _addresses(access)] = count
            data = _dram_bytes(opcode, fields)
            if data is not None:
                store = opcode in DRAM_WRITERS
                self._bytes[0 if store else 1, stream, data] = count
        return names, {other: int(at) for other, at in zip(self.streams, needed, strict=True) if at}

    @staticmethod
    def _stream(instruction: Instruction) -> str:
        return "loads" if instruction.opcode in LOADS else instruction.engine


class _Stream:
    """What becomes of one stream of `_Order`: when its instructions signal, and how."""

    def __init__(self, tokens: bool) -> None:
        self.tokens = tokens  #: ACQUIRE, a semaphore for each engine that waits; else AT_LEAST
        self.wanted: dict[int, set[str]] = collections.defaultdict(set)  #: index -> who waits


def program(case: Case) -> Program:
    """The program of a case. Waits are made by counting up (AT_LEAST) or by tokens (ACQUIRE), as
    the seed decides for each stream, with as many NOPs as waits and signals ask for."""
    config = case.config
    rng = random.Random(case.seed)
    order = _Order(config)
    streams = {name: _Stream(rng.random() < 0.4) for name in order.streams}
    engine_of = {name: "tensor" if name == "loads" else name for name in order.streams}

    # Who waits for what. What an engine has waited for holds for all that follow on it.
    known: dict[str, dict[str, int]] = {engine: {} for engine in config.engines}
    plan: list[tuple[Element, dict[str, int], dict[str, int]]] = []
    counts: collections.Counter[str] = collections.Counter()
    for element in case.elements:
        names, needed = order.add(element)
        engine = element.engine
        if counts and rng.random() < 0.1:  # an order that nothing asks for
            other = rng.choice(sorted(counts))
            needed[other] = max(needed.get(other, 0), rng.randint(1, counts[other]))
        counts.update(names)
        waits = {
            other: at
            for other, at in needed.items()
            if engine_of[other] != engine and known[engine].get(other, 0) < at
        }
        known[engine] |= waits
        for other, at in waits.items():
            streams[other].wanted[at].add(engine)
        plan.append((element, {name: counts[name] for name in sorted(names)}, waits))

    free = list(range(config.semaphores))
    rng.shuffle(free)
    semaphores: dict[tuple[str, str | None], int] = {}

    def semaphore(name: str, waiter: str) -> int:
        key = (name, waiter if streams[name].tokens else None)
        if key not in semaphores:
            semaphores[key] = free.pop()
        return semaphores[key]

    # Tokens take a semaphore for each pair: count up where there are not enough.
    pairs = [(n, w) for n, s in streams.items() for w in set().union(*s.wanted.values())]
    left = len(free) - len(streams)
    for name, stream in streams.items():
        mine = sum(1 for n, _ in pairs if n == name)
        stream.tokens = stream.tokens and mine <= left
        left -= mine if stream.tokens else 0

    placed: dict[str, list[tuple[Opcode, dict[str, Any]]]] = {e: [] for e in config.engines}
    totals: dict[int, int] = collections.Counter()  # semaphore -> signalled so far
    reached: dict[tuple[str, int], dict[str, int]] = {}  # (stream, index) -> waiter -> total
    taken: dict[tuple[str, str], int] = collections.Counter()  # tokens acquired

    for element, indices, waits in plan:
        engine = element.engine
        slots: list[dict[str, int]] = []
        for other, at in waits.items():
            total = reached[other, at][engine]
            mode, value = WaitMode.AT_LEAST, total
            if streams[other].tokens:
                mode, value = WaitMode.ACQUIRE, total - taken[other, engine]
                taken[other, engine] = total
            slots.append({"sem": semaphore(other, engine), "mode": mode.value, "value": value})
        rng.shuffle(slots)
        # An instruction has three slots, and sometimes leaves them to NOPs before it.
        while len(slots) > MAX_WAITS or (slots and rng.random() < 0.1):
            chunk, slots = slots[:MAX_WAITS], slots[MAX_WAITS:]
            placed[engine].append((Opcode.NOP, _wait_fields(chunk)))
        emitted = lines(element)
        emitted[0] = emitted[0][0], {**emitted[0][1], **_wait_fields(slots)}
        signals = []
        for name, index in indices.items():
            waiters = sorted(streams[name].wanted.get(index, ()))
            for target in sorted({semaphore(name, waiter) for waiter in waiters}):
                amount = rng.choice((1, 1, 2, 5))
                totals[target] += amount
                signals.append({"signal.sem": target, "signal.amount": amount})
            reached[name, index] = {w: totals[semaphore(name, w)] for w in waiters}
        rng.shuffle(signals)
        # Loads complete in an order of their own, so a semaphore of theirs is signalled by NOPs,
        # which signal when all before them are complete, as one that follows a loop.
        if signals and "loads" not in indices and len(emitted) == 1 and rng.random() < 0.9:
            emitted[0] = emitted[0][0], {**emitted[0][1], **signals.pop()}
        placed[engine] += [*emitted, *((Opcode.NOP, signal) for signal in signals)]

    origins = [
        (engine, at)
        for engine, found in placed.items()
        for at, (_, fields) in enumerate(found)
        if "dram_base" in fields
    ]
    encoded = {
        engine: b"".join(encode(opcode, fields) for opcode, fields in [*found, (Opcode.END, {})])
        for engine, found in placed.items()
    }
    return Program(
        name=f"case {case.seed}",
        config=config,
        streams=encoded,
        tensors=(TensorInfo("data", (DATA_BYTES,), DType.INT8, "input", 0),),
        relocations=tuple(Relocation(engine, at, 0) for engine, at in origins),
    )


def lines(element: Element) -> list[tuple[Opcode, dict[str, Any]]]:
    """The instructions of an element as they lie in a stream."""
    if isinstance(element, Instruction):
        return [(element.opcode, dict(element.fields))]
    steps: dict[str, Any] = {f"steps.{i}": step for i, step in enumerate(element.steps)}
    return [
        (Opcode.LOOP, {"count": element.count}),
        *(line for inner in element.body for line in lines(inner)),
        (Opcode.NEXT, {**steps, "conditional": int(element.conditional)}),
    ]


def _wait_fields(slots: Sequence[dict[str, int]]) -> dict[str, int]:
    return {f"wait.{i}.{name}": v for i, slot in enumerate(slots) for name, v in slot.items()}


# -- illegal programs --------------------------------------------------------------------------


def _break(raw: bytes, kind: EngineKind, config: CoreConfig) -> bytes | None:
    """The bytes with a field or a bit changed so that they are illegal; None if none was found."""
    opcode = Opcode(raw[0])
    for _ in range(50):
        word = int.from_bytes(raw, "little")
        if random.random() < 0.6:
            names = [n for n in FIELDS[opcode] if n != "opcode"]
            # Some kinds of fields are so few or so small that they are seldom hit.
            seldom = [
                n for n in names if n.endswith(("space", "dtype", "sem", "chip", "op0", "op1"))
            ]
            name = random.choice([*names, *(5 * seldom)])
            offset, shape = FIELDS[opcode][name]
            width = Shape.cast(shape).width
            mask = (1 << width) - 1
            word = word & ~(mask << offset) | random.getrandbits(width) << offset
        elif random.random() < 0.5:
            word ^= 1 << random.randrange(8 * len(raw))
        else:
            word = word & ~0xFF | random.randrange(256)
        changed = word.to_bytes(len(raw), "little")
        if check(changed, kind, config) is not None:
            return changed
    return None


def illegal_program(case: Case) -> Program:
    """The program of a case with one thing wrong: it must fault, the same wherever it runs."""
    random.seed(~case.seed)
    config = case.config
    good = program(case)
    kinds = ("instruction", "instruction", "instruction", "wait", "signal", "bus", "loop")
    kind = random.choice(kinds)
    if kind in ("signal", "loop"):
        # Too many signals of a semaphore that nothing else uses, or loops that do not match.
        used = {decode(raw)[1]["signal.sem"] for _, _, raw in good.instructions()}
        free = random.choice(sorted(set(range(config.semaphores)) - used))
        start = [encode(Opcode.NOP, {"signal.sem": free, "signal.amount": 255})] * 258
        if kind == "loop":
            start = [encode(Opcode.LOOP, {"count": 2})] * (LOOP_DEPTH + 1)
            if random.random() < 0.5:
                start = [*start[:1], encode(Opcode.NEXT, {}), encode(Opcode.NEXT, {})]
        engine = random.choice(config.engines)
        streams = {**good.streams, engine: b"".join(start) + good.streams[engine]}
        moved = tuple(
            dataclasses.replace(r, index=r.index + len(start)) if r.engine == engine else r
            for r in good.relocations
        )
        return dataclasses.replace(good, streams=streams, relocations=moved)
    if kind == "bus" and good.relocations:
        where = random.choice(good.relocations)
        fields = {"dram_base": (1 << 47) + 64 * random.randrange(64)}
        return good.with_fields(where.engine, where.index, fields)
    if kind == "wait":
        engine = random.choice(config.engines)
        index = random.randrange(good.count(engine))
        slot = {"sem": random.randrange(config.semaphores), "mode": 1, "value": 0xFFFF}
        # What waits in the first slot goes on waiting: the others may depend on its token.
        changed = {f"wait.{MAX_WAITS - 1}.{name}": value for name, value in slot.items()}
        return good.with_fields(engine, index, changed)
    while True:
        engine = random.choice(config.engines)
        index = random.randrange(good.count(engine))
        raw = good.instruction(engine, index)
        changed_raw = _break(raw, engine_kind(engine), config)
        last = index == good.count(engine) - 1
        if changed_raw is None or (last and changed_raw[0] != Opcode.END.value):
            continue
        stream = good.streams[engine]
        at = index * len(raw)
        streams = {**good.streams, engine: stream[:at] + changed_raw + stream[at + len(raw) :]}
        relocations = tuple(
            r
            for r in good.relocations
            if (r.engine, r.index) != (engine, index) or changed_raw[0] == raw[0]
        )
        return dataclasses.replace(good, streams=streams, relocations=relocations)


# -- running -----------------------------------------------------------------------------------


def _memories(config: CoreConfig, *, store: bool) -> Program:
    """Sets SBUF, PSUM, both stationary operands and the tables, or stores SBUF and PSUM."""
    nc = KernelBuilder(config, name="store memories" if store else "set memories")
    lanes, depth, sums = config.lanes, config.sbuf_depth, config.psum_depth
    kind: Literal["input", "output"] = "output" if store else "input"
    sbuf_tensor = nc.dram.tensor("sbuf", (depth, lanes), DType.FP32, kind=kind)
    psum_tensor = nc.dram.tensor("psum", (sums, lanes), DType.FP32, kind=kind)
    sbuf = nc.sbuf.tile(depth)
    psum = nc.psum.tile(sums)
    row = 4 * lanes
    if store:
        nc.dma.store(sbuf.view((depth,)), sbuf_tensor, 0, (row,), 4)
    for start in range(0, sums, depth):
        part = psum.view((min(depth, sums - start),), offset=start)
        piece = sbuf.view(part.shape)
        if store:
            nc.vector.copy(piece, part)
            nc.dma.store(piece, psum_tensor, start * row, (row,), 4)
        else:
            nc.dma.load(piece, psum_tensor, start * row, (row,), 4)
            if start == 0:
                # A load of N columns that a matmul takes over, and another: nothing is left of
                # what ran before.
                for _ in range(2):
                    nc.tensor.load_stationary(sbuf.view((lanes,)).astype(DType.BF16))
                    nc.tensor.matmul(psum.view((1,)), sbuf.view((1,)).astype(DType.BF16))
            nc.vector.copy(part, piece)
    if not store:
        nc.dma.load(sbuf.view((depth,)), sbuf_tensor, 0, (row,), 4)
        for start in range(0, TABLE_WORDS, depth):
            part = sbuf.view((min(depth, TABLE_WORDS - start),))
            nc.scalar.load_table(part, start)
    return nc.finish()


class Outcome(NamedTuple):
    """What a program left behind: memories by name, counters, and its fault if it had one."""

    state: dict[str, np.ndarray]
    fault: tuple[str, int, str, int] | None


class Rig:
    """A device that runs cases from a known state and shows all of its state after.

    Parameters
    ----------
    backend : the device
    watchdog : cycles
    """

    def __init__(self, backend: Backend, *, watchdog: int = 10_000) -> None:
        self.driver = Driver(backend, watchdog=watchdog)
        self.config = backend.config
        self._set = self.driver.load(_memories(self.config, store=False))
        self._store = self.driver.load(_memories(self.config, store=True))
        self.cycles = 0

    def run(self, made: Program, seed: int) -> Outcome:
        """Runs a program on the memories of a seed. After a fault the memories say nothing, as how
        far the other engines came is a matter of time."""
        driver = self.driver
        rng = np.random.default_rng(seed)
        for name in ("sbuf", "psum"):
            tensor = self._set.tensors[name]
            words = random_words(rng, tensor.shape)
            plain = rng.standard_normal(tensor.shape).astype(np.float32).view(np.uint32)
            words = np.where(rng.random(tensor.shape) < 0.3, words, plain)
            if name == "sbuf":
                words[-INDEX_WORDS:] = rng.integers(0, ROWS, (INDEX_WORDS, self.config.lanes))
            driver.write(tensor, words.view(np.float32))
        driver.run(self._set)
        loaded = driver.load(made)
        try:
            data = loaded.tensors["data"]
            content = rng.integers(-128, 128, data.shape, dtype=np.int8)
            # TEST tells words that are zero from others: there have to be both.
            content[np.repeat(rng.random(DATA_BYTES // 4) < 0.3, 4)] = 0
            driver.write(data, content)
            driver.seed = seed & 0xFFFFFFFF
            try:
                counters = driver.run(loaded, timeout=TIMEOUT)
            except DeviceFault as fault:
                return Outcome({}, (fault.engine, fault.pc, fault.cause, fault.address))
            state = {
                "data": driver.read(data),
                "semaphores": np.array(driver.semaphores()),
                "instructions": np.array(list(counters.instructions.values())),
                "macs": np.array([counters.macs]),
            }
            self.cycles += counters.cycles
            driver.run(self._store)
            for name in ("sbuf", "psum"):
                state[name] = driver.read(self._store.tensors[name]).view(np.uint32)
            return Outcome(state, None)
        finally:
            loaded.unload()


def difference(mine: Outcome, golden: Outcome) -> str | None:
    """What differs first, as text; None if nothing does."""
    if mine.fault != golden.fault:
        return f"fault {mine.fault}, golden {golden.fault}"
    for name, expected in golden.state.items():
        found = mine.state[name]
        if not np.array_equal(found, expected):
            at = tuple(int(i) for i in np.argwhere(found != expected)[0])
            form = "#010x" if name in ("sbuf", "psum") else "d"
            return (
                f"{name}{list(at)} is {int(found[at]):{form}}, golden {int(expected[at]):{form}} "
                f"({np.count_nonzero(found != expected)} words differ)"
            )
    return None


class Pair:
    """The gates and the golden model side by side; the latter looks for races as well."""

    def __init__(self, config: CoreConfig, mine: Backend) -> None:
        self.config = config
        self.mine = Rig(mine)
        scheduler = random.Random(0)
        self.golden = Rig(GoldenDevice(config, scheduler=scheduler, check="races"))

    @classmethod
    def of_gates(cls, config: CoreConfig, **options: Any) -> Pair:
        """With device `rtl`; options as its."""
        return cls(config, RtlBackend(config, **{"dram_bytes": 1 << 20, **options}))

    def compare(self, made: Program, seed: int) -> tuple[str | None, Outcome | None]:
        """Runs a program on both; returns what differs, None if nothing does, and what the golden
        model made of it, None if it or the gates refused."""
        outcomes = []
        for rig in (self.mine, self.golden):
            try:
                outcomes.append(rig.run(made, seed))
            except SystolithError as error:
                return f"{'gates' if rig is self.mine else 'golden'}: {error}", None
        return difference(*outcomes), outcomes[1]

    def legal(self, case: Case) -> str | None:
        """What is wrong with a legal case: a difference, or a fault."""
        found, outcome = self.compare(program(case), case.seed)
        if found is None and outcome is not None and outcome.fault is not None:
            return f"a legal program faulted: {outcome.fault}"
        return found

    def illegal(self, case: Case) -> tuple[str | None, str]:
        """What is wrong with the illegal program of a case, and the cause of its fault."""
        found, outcome = self.compare(illegal_program(case), case.seed)
        if found is not None or outcome is None:
            return found, ""
        if outcome.fault is None:
            return "an illegal program did not fault", ""
        return None, outcome.fault[2]

    def close(self) -> None:
        """Releases both."""
        self.mine.driver.close()
        self.golden.driver.close()


# -- shrinking ---------------------------------------------------------------------------------


def _simpler(element: Element) -> Iterator[Element]:
    """The element with something left out or one number made smaller."""
    if isinstance(element, Loop):
        if element.count > 1:
            for count in dict.fromkeys((1, element.count // 2)):
                yield dataclasses.replace(element, count=count)
        if element.conditional:
            yield dataclasses.replace(element, conditional=False)
        body = element.body
        for at, inner in enumerate(body):
            if len(body) > 1:
                yield dataclasses.replace(element, body=(*body[:at], *body[at + 1 :]))
            elif isinstance(inner, Loop) or not any(
                value for name, value in inner.fields.items() if name.endswith("index")
            ):
                yield inner
            for simpler in _simpler(inner):
                yield dataclasses.replace(element, body=(*body[:at], simpler, *body[at + 1 :]))
        return
    opcode, fields = element.opcode, element.fields
    for name, value in fields.items():
        head = name.partition(".")[0]
        if head in ("wait", "signal") or name.endswith((".space", ".dtype")):
            continue
        least = 1 if head in ("counts", "lanes", "columns") else 0
        for smaller in dict.fromkeys((least, value // 2)):
            if smaller != value and abs(smaller) <= abs(value):
                yield Instruction(element.engine, opcode, {**fields, name: smaller})


def shrink(case: Case, fails: Callable[[Case], bool], *, tries: int = 1000) -> Case:
    """The smallest case found that still fails: fewer elements first, then smaller ones.

    Parameters
    ----------
    fails : whether a case does
    tries : calls of `fails` at most
    """
    left = tries

    def keeps(elements: Sequence[Element]) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(dataclasses.replace(case, elements=tuple(elements)))

    found = list(case.elements)
    size = max(len(found) // 2, 1)
    while size:
        at = 0
        while at < len(found):
            fewer = found[:at] + found[at + size :]
            if keeps(fewer):
                found = fewer
            else:
                at += size
        size //= 2
    changed = True
    while changed and left > 0:
        changed = False
        for at, element in enumerate(found):
            for smaller in _simpler(element):
                if _legal(case.config, smaller) and keeps([*found[:at], smaller, *found[at + 1 :]]):
                    found[at] = smaller
                    changed = True
                    break
    return dataclasses.replace(case, elements=tuple(found))


def describe(case: Case, found: str) -> str:
    """A report of a failing case: what differs, and its program as text."""
    left = len(list(case.instructions()))
    return (
        f"config {case.config.name}, seed {case.seed}: {found}\n"
        f"{left} instructions are left of it:\n{program(case).disassemble()}"
    )


#: causes of faults that illegal programs have; no program makes its own fetch fail
CAUSES = frozenset(FaultCause) - {FaultCause.NONE, FaultCause.FETCH_ERROR}


@dataclasses.dataclass
class Tally:
    """What a run over many seeds met.

    Parameters
    ----------
    programs : legal and illegal
    cycles : of the legal ones, on the gates
    instructions : opcode -> how many, in legal programs
    faults : cause -> how many
    failures : reports of what differed, shrunk
    """

    programs: int = 0
    cycles: int = 0
    instructions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds what another run met."""
        self.programs += other.programs
        self.cycles += other.cycles
        self.instructions += other.instructions
        self.faults += other.faults
        self.failures += other.failures


def fuzz(pair: Pair, seeds: Sequence[int], *, illegal_every: int = 4) -> Tally:
    """Runs the case of every seed, and the illegal program of every few; shrinks what fails."""
    tally = Tally()
    before = pair.mine.cycles
    for number, seed in enumerate(seeds):
        case = draw_case(pair.config, seed)
        tally.programs += 1
        tally.instructions.update(i.opcode.name for i in case.instructions())
        found = pair.legal(case)
        if found is not None:
            least = shrink(case, lambda smaller: pair.legal(smaller) is not None)
            tally.failures.append(describe(least, pair.legal(least) or found))
        if number % illegal_every == 0:
            tally.programs += 1
            found, cause = pair.illegal(case)
            tally.faults[cause] += 1
            if found is not None:
                text = illegal_program(case).disassemble()
                tally.failures.append(f"illegal program of seed {seed}: {found}\n{text}")
    tally.cycles = pair.mine.cycles - before
    return tally
