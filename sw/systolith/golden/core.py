"""The golden core: every instruction in numpy, without a clock.

An engine executes an instruction whole, at the moment its waits are satisfied; engines take turns.
Any order that the semaphores allow is a legal one, and `Core` can be told to draw it at random.
When an engine faults, the others stop where they are.

An instruction reads all of its sources before it writes. The chip overlaps the two, so a
destination may be a source element for element (in place); any other overlap of the two is
undefined there.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from systolith_hdl.arith.dither import RANDOM_STREAM
from systolith_hdl.config import INSTRUCTION_BYTES, CoreConfig
from systolith_hdl.formats import FORMATS, INTEGERS, NARROW_FLOATS, DType
from systolith_hdl.isa import (
    CONTROL,
    INDEX_BITS,
    INDEX_REGISTERS,
    LOOP_DEPTH,
    MAX_WAITS,
    SPECS,
    TABLE_WORDS,
    AluOp,
    FaultCause,
    Function,
    Opcode,
    Rounding,
    RowSums,
    Space,
    WaitMode,
    add_indices,
    decode,
    engine_kind,
)

from systolith.errors import BackendError

from . import arithmetic, choose, dither, dma, exchange
from .activation import evaluate
from .arithmetic import Words
from .checker import Fault, check, operand_counts, operand_lanes, operand_strides, row_sums

MAX_SEMAPHORE = (1 << 16) - 1
#: words one operand may visit here; the chip has no limit, but no useful instruction is near it
MAX_WORDS = 1 << 28
_CACHE_LIMIT = 1 << 18  #: prepared instructions kept


class Observer(Protocol):
    """What follows an execution; see `systolith.golden.debugger`. It may raise to stop it."""

    def started(self) -> None:
        """Every engine starts."""

    def waited(self, engine: int, semaphore: int, value: int, acquire: bool) -> None:
        """A wait of an engine's next instruction holds."""

    def before(self, engine: int, pc: int, raw: bytes) -> None:
        """All waits hold: the instruction executes next."""

    def after(self, engine: int, pc: int, raw: bytes) -> None:
        """It executed, and will now signal."""

    def ended(self) -> None:
        """Every engine has ended, none with a fault."""


@dataclasses.dataclass(frozen=True)
class FaultRecord:
    """First fault since the start. `engine` is a number, `pc` an index into its stream."""

    engine: int
    pc: int
    cause: FaultCause
    address: int


@dataclasses.dataclass(slots=True)
class _Prepared:
    """An instruction ready to execute.

    `run` performs it; it returns a Fault when the bus refuses. None for what the sequencer itself
    executes.
    """

    fault: Fault | None = None
    raw: bytes = b""
    waits: tuple[tuple[int, WaitMode, int], ...] = ()
    signal: tuple[int, int] | None = None  #: (semaphore, amount)
    run: Callable[[], Fault | None] | None = None
    macs: int = 0
    #: opcode and fields of what the sequencer executes
    control: tuple[Opcode, dict[str, int]] | None = None
    #: an index register is to be added to an address
    indexed: bool = False


@dataclasses.dataclass(slots=True)
class _Sequencer:
    """What a stream's loops have come to.

    Parameters
    ----------
    indices : the index registers, modulo 2**32
    flag : what the last TEST found
    loops : open ones, [iterations left with this one, instruction after LOOP, indices before]
    """

    indices: list[int] = dataclasses.field(default_factory=lambda: [0] * INDEX_REGISTERS)
    flag: bool = False
    loops: list[tuple[int, int, list[int]]] = dataclasses.field(default_factory=list)

    def refuses(self, opcode: Opcode) -> bool:
        """Whether there are too many loops for a LOOP, or none for a NEXT."""
        if opcode is Opcode.LOOP:
            return len(self.loops) == LOOP_DEPTH
        return opcode is Opcode.NEXT and not self.loops

    def follow(self, opcode: Opcode, fields: dict[str, int], pc: int) -> int:
        """Executes LOOP or NEXT at `pc`; returns the pc of what follows."""
        if opcode is Opcode.LOOP:
            self.loops.append((fields["count"], pc + 1, list(self.indices)))
        elif opcode is Opcode.NEXT:
            left, first, before = self.loops.pop()
            if left > 1 and (self.flag or not fields["conditional"]):
                self.loops.append((left - 1, first, before))
                self.indices = [
                    (value + fields[f"steps.{i}"]) & 0xFFFFFFFF
                    for i, value in enumerate(self.indices)
                ]
                return first
            self.indices = before
        return pc + 1


def _repeats(counts: Sequence[int], strides: Sequence[int], width: int = 1) -> bool:
    """Whether two steps of a pattern may touch the same unit, each step covering `width`.

    False is certain; True is when the strides do not nest.
    """
    reach = width - 1
    for stride, count in sorted((abs(s), n) for s, n in zip(strides, counts, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (count - 1)
    return False


def _computes(fields: dict[str, int]) -> DType:
    """The type in which an instruction of the vector engine computes."""
    return DType(fields["src0.dtype"])


class _Pattern:
    """The words one operand visits: reads and writes arrays of shape (lanes, *counts)."""

    def __init__(
        self, memory: Words, base: int, counts: list[int], strides: list[int], lanes: int
    ) -> None:
        if math.prod(counts) * lanes > MAX_WORDS:
            raise BackendError(f"an instruction of counts {counts} is too large for this device")
        depth = memory.shape[1]
        used = [4 * s if n > 1 else 0 for s, n in zip(strides, counts, strict=True)]
        self._memory = memory
        self._lanes = lanes
        self._window: Words = np.ndarray(
            (lanes, *counts),
            np.uint32,
            buffer=memory.data,
            offset=4 * base,
            strides=(4 * depth, *used),
        )
        #: word addresses in order if some repeat: numpy may write a window in any order
        self.repeated: np.ndarray | None = None
        if _repeats(counts, strides):
            addresses = np.full((), base, np.int64)
            for n, s in zip(counts, strides, strict=True):
                addresses = addresses[..., None] + np.arange(n) * s
            if np.unique(addresses).size != addresses.size:
                self.repeated = addresses.ravel()

    def read(self) -> Words:
        """A copy of the words."""
        return self._window.copy()

    def write(self, words: Words, where: np.ndarray | None = None) -> None:
        """Writes the words (those where `where` is set); the last of a repeated one stays."""
        if self.repeated is None:
            if where is None:
                self._window[...] = words
            else:
                np.copyto(self._window, words, where=where)
            return
        words = np.broadcast_to(words, self._window.shape).reshape(self._lanes, -1)
        for lane in range(self._lanes):
            chosen = slice(None) if where is None else where.reshape(self._lanes, -1)[lane]
            self._memory[lane, self.repeated[chosen]] = words[lane, chosen]


class Weights:
    """A stationary operand.

    Members
    -------
    words : uint32 [2, K, M], first and second numbers
    pairs : bool [M], which columns are pairs; of the others the second numbers count for nothing
    """

    def __init__(self, lanes: int) -> None:
        self.words: Words = np.zeros((2, lanes, lanes), np.uint32)
        self.pairs = np.zeros(lanes, bool)

    def load(self, operands: Sequence[Words]) -> None:
        """Takes the words [K, M] of one operand, or of the two of a pair; rows from K on become
        zero, columns from M on stay."""
        rows, columns = operands[0].shape
        self.words[:, :, :columns] = 0
        self.words[: len(operands), :rows, :columns] = operands
        self.pairs[:columns] = len(operands) == 2

    def assign(self, other: Weights) -> None:
        """Becomes equal to another."""
        self.words[:] = other.words
        self.pairs[:] = other.pairs


class Core:
    """State and execution of one core.

    Parameters
    ----------
    config : sizes
    dram : uint8, used as is, not copied
    scheduler : draws the next engine; None lets them take turns

    Members
    -------
    sbuf, psum : uint32 [lanes, depth]; zero at first, kept over runs and resets
    tables : uint32 [lanes, TABLE_WORDS], of CUSTOM; likewise
    stationary, weights : `Weights` of the tensor engine: what the last loads left in the
        background, and what MATMULs use; the first MATMUL after a load takes over the former.
        Kept over runs and resets, but a load that no MATMUL took over is forgotten by a reset
    semaphores, pc, instructions, macs : counts since the start
    seed : of stochastic rounding
    running, fault : state
    observer : told of everything that executes, if there is one
    """

    def __init__(
        self, config: CoreConfig, dram: np.ndarray, *, scheduler: random.Random | None = None
    ) -> None:
        self.config = config
        self.dram = dram
        self.scheduler = scheduler
        self.sbuf: Words = np.zeros((config.lanes, config.sbuf_depth), np.uint32)
        self.psum: Words = np.zeros((config.lanes, config.psum_depth), np.uint32)
        self.tables: Words = np.zeros((config.lanes, TABLE_WORDS), np.uint32)
        self.stationary = Weights(config.lanes)
        self.weights = Weights(config.lanes)
        self.seed = 0
        self.observer: Observer | None = None
        self._issued = (0, 0)  # engine and index of the instruction that executes
        self._kinds = [engine_kind(engine) for engine in config.engines]
        #: (engine kind, 64 bytes) -> what they do to this core
        self._cache: dict[tuple[object, bytes], _Prepared] = {}
        self.reset()

    # -- control -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Stops everything; memories keep their values, all other state is as after power-on."""
        engines = len(self.config.engines)
        self._fresh = False
        self.running = False
        self.fault: FaultRecord | None = None
        self._bases = [0] * engines
        self._clear()

    def _clear(self) -> None:
        engines = len(self.config.engines)
        self.semaphores = [0] * self.config.semaphores
        self.pc = [0] * engines
        self.instructions = [0] * engines
        self.macs = 0
        self._ended = [False] * engines
        self._next: list[_Prepared | None] = [None] * engines
        self._slot = [0] * engines  # wait slots of the next instruction that have held already
        self._sequencers = [_Sequencer() for _ in range(engines)]

    def start(self, bases: list[int], *, seed: int = 0) -> None:
        """Starts every engine at its byte address; zeroes semaphores and counters. `seed` is that
        of stochastic rounding."""
        self.seed = seed
        self._bases = [base & ~(INSTRUCTION_BYTES - 1) for base in bases]
        self._clear()
        self.fault = None
        self.running = True
        if self.observer is not None:
            self.observer.started()

    def run(self, max_steps: int | None = None, *, watchdog: bool = True) -> int:
        """Executes until every engine ended, one faulted, or `max_steps` instructions are done.

        When no engine can go on, the lowest-numbered one that has not ended gets a WATCHDOG
        fault, or, without `watchdog`, everything just stays as it is. Returns the number of
        instructions executed.
        """
        steps = 0
        while self.running and (max_steps is None or steps < max_steps):
            moved = False
            for engine in self._turns():
                if self._ended[engine] or not self.running:
                    continue
                if max_steps is not None and steps >= max_steps:
                    return steps
                if self._step(engine):
                    moved = True
                    steps += 1
            if all(self._ended):
                self.running = False
                if self.observer is not None:
                    self.observer.ended()
            elif not moved and self.running:
                if not watchdog:
                    break
                self._stop(self._ended.index(False), Fault(FaultCause.WATCHDOG))
        return steps

    def _turns(self) -> list[int]:
        engines = list(range(len(self._ended)))
        if self.scheduler is not None:
            # Bursts of one engine, with the others in random order, reach more interleavings.
            self.scheduler.shuffle(engines)
            engines = [engines[0]] * self.scheduler.randrange(4) + engines
        return engines

    def _stop(self, engine: int, fault: Fault) -> None:
        """Records the fault and stops every engine where it is."""
        self.fault = FaultRecord(engine, self.pc[engine], fault.cause, fault.address)
        self.running = False

    def _step(self, engine: int) -> bool:
        """Executes the next instruction of an engine; False if it still has to wait."""
        prepared = self._next[engine]
        if prepared is None:
            address = self._bases[engine] + INSTRUCTION_BYTES * self.pc[engine]
            if address + INSTRUCTION_BYTES > len(self.dram):
                self._stop(engine, Fault(FaultCause.FETCH_ERROR, address))
                return True
            raw = self.dram[address : address + INSTRUCTION_BYTES].tobytes()
            prepared = self._lookup(engine, raw)
            if prepared.indexed:
                prepared = self._lookup(engine, add_indices(raw, self._sequencers[engine].indices))
            self._next[engine] = prepared
        if prepared.fault is not None:
            self._stop(engine, prepared.fault)
            return True
        sequencer = self._sequencers[engine]
        if prepared.control is not None and sequencer.refuses(prepared.control[0]):
            self._stop(engine, Fault(FaultCause.BAD_LOOP))
            return True
        semaphores = self.semaphores
        while self._slot[engine] < len(prepared.waits):
            sem, mode, value = prepared.waits[self._slot[engine]]
            if semaphores[sem] < value:
                return False
            if mode is WaitMode.ACQUIRE:
                semaphores[sem] -= value
            self._slot[engine] += 1
            if self.observer is not None:
                self.observer.waited(engine, sem, value, mode is WaitMode.ACQUIRE)
        if self.observer is not None:
            self.observer.before(engine, self.pc[engine], prepared.raw)
        if prepared.run is not None:
            self._issued = (engine, self.instructions[engine])
            fault = prepared.run()
            if fault is not None:
                self._stop(engine, fault)
                return True
        following = self.pc[engine] + 1
        if prepared.control is not None:
            opcode, fields = prepared.control
            if opcode is Opcode.TEST:
                fault = self._test(sequencer, fields["dram_base"] & ~3)
                if fault is not None:
                    self._stop(engine, fault)
                    return True
            following = sequencer.follow(opcode, fields, self.pc[engine])
        if self.observer is not None:
            self.observer.after(engine, self.pc[engine], prepared.raw)
        self.macs += prepared.macs
        self.instructions[engine] += 1
        if prepared.signal is not None:
            sem, amount = prepared.signal
            if semaphores[sem] + amount > MAX_SEMAPHORE:
                self._stop(engine, Fault(FaultCause.SEMAPHORE_OVERFLOW, sem))
                return True
            semaphores[sem] += amount
        self._ended[engine] = prepared.raw[0] == Opcode.END.value
        self.pc[engine] = following
        self._slot[engine] = 0
        self._next[engine] = None
        return True

    def _test(self, sequencer: _Sequencer, address: int) -> Fault | None:
        """Sets the flag by the word at a byte address, a multiple of 4."""
        if address + 4 > len(self.dram):
            beat = min(self.config.axi_bytes, INSTRUCTION_BYTES)
            return Fault(FaultCause.AXI_READ_ERROR, address // beat * beat)
        word = int.from_bytes(self.dram[address : address + 4].tobytes(), "little")
        sequencer.flag = bool(word & 0x7FFFFFFF)
        return None

    def execute(self, raw: bytes, engine: str, *, counter: int = 0) -> Fault | None:
        """Executes one instruction at once, without its waits and signal; returns its fault.

        For comparing a single engine with this model; counts nothing. `counter` is the number of
        instructions before it in its stream.
        """
        number = self.config.engines.index(engine)
        prepared = self._lookup(number, raw)
        if prepared.fault is not None or prepared.run is None:
            return prepared.fault
        self._issued = (number, counter)
        return prepared.run()

    # -- instructions --------------------------------------------------------------------------

    def _lookup(self, engine: int, raw: bytes) -> _Prepared:
        key = (self._kinds[engine], raw)
        prepared = self._cache.get(key)
        if prepared is None:
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            prepared = self._cache[key] = self._prepare(engine, raw)
        return prepared

    def _prepare(self, engine: int, raw: bytes) -> _Prepared:
        # It may be legal or not only with its index registers.
        indexed = bool(int.from_bytes(raw, "little") & INDEX_BITS.get(raw[0], 0))
        fault = check(raw, self._kinds[engine], self.config)
        if fault is not None:
            return _Prepared(fault=fault, indexed=indexed)
        opcode, fields = decode(raw)
        prepared = _Prepared(raw=raw, indexed=indexed)
        slots = (
            tuple(fields[f"wait.{i}.{part}"] for part in ("sem", "mode", "value"))
            for i in range(MAX_WAITS)
        )
        prepared.waits = tuple((sem, WaitMode(mode), value) for sem, mode, value in slots if mode)
        if fields["signal.amount"]:
            prepared.signal = (fields["signal.sem"], fields["signal.amount"])
        if opcode in CONTROL:
            prepared.control = opcode, fields
            return prepared
        maker = _MAKERS[opcode]
        prepared.run = maker(self, opcode, fields)
        if "columns" in fields:
            columns = math.prod(fields[f"counts.{i}"] for i in range(4))
            products = 2 if SPECS[opcode].pairs else 1
            prepared.macs = fields["lanes"] * fields["columns"] * columns * products
        return prepared

    def _pattern(self, opcode: Opcode, name: str, fields: dict[str, int]) -> _Pattern:
        memory = self.psum if fields[f"{name}.space"] == Space.PSUM.value else self.sbuf
        return _Pattern(
            memory,
            fields[f"{name}.base"],
            operand_counts(opcode, name, fields),
            operand_strides(name, fields),
            operand_lanes(opcode, name, fields, self.config.lanes),
        )

    def _random(self, lanes: int, counts: Sequence[int]) -> Words:
        """Random words [lanes, *counts] of the executing instruction's result columns."""
        engine, counter = self._issued
        words = dither.random_words(
            self.seed, counter, engine, elements=math.prod(counts), lanes=lanes
        )
        return words.reshape(lanes, *counts)

    def _writer(
        self, opcode: Opcode, fields: dict[str, int], given: DType = DType.FP32
    ) -> Callable[..., None]:
        """Writes words of type `given` to dst in its type; `behind`, if any, is one more element of
        each row, and stays as it is."""
        pattern = self._pattern(opcode, "dst", fields)
        dtype = DType(fields["dst.dtype"])
        lanes = operand_lanes(opcode, "dst", fields, self.config.lanes)
        shape = lanes, operand_counts(opcode, "dst", fields)
        rounding = Rounding(fields.get("rounding", 0))
        stochastic = rounding is Rounding.STOCHASTIC and dtype in NARROW_FLOATS

        def write(
            words: Words, where: np.ndarray | None = None, behind: Words | None = None
        ) -> None:
            if dtype is not given:
                random = self._random(*shape) if stochastic else None
                if random is not None and behind is not None:
                    random = random[..., :-1]
                words = arithmetic.convert(words, given, dtype, random)
            if behind is not None:
                words = np.concatenate([words, behind], axis=-1)
            pattern.write(words, where)

        return write

    def _operands(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], list[Words]]:
        """Reads the tensor engine's operand, or both of a pair: [K, columns] each."""
        sources = [
            (self._pattern(opcode, name, fields), DType(fields[f"{name}.dtype"]))
            for name in ("src0", "src1")
            if f"{name}.dtype" in fields
        ]
        rows = fields["lanes"]

        def read() -> list[Words]:
            return [
                arithmetic.operand(source.read(), dtype).reshape(rows, -1)
                for source, dtype in sources
            ]

        return read

    def _load_stationary(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        read = self._operands(opcode, fields)

        def run() -> None:
            self.stationary.load(read())
            self._fresh = True

        return run

    def _matmul(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        rows, columns = fields["lanes"], fields["columns"]
        read = self._operands(opcode, fields)
        dst = self._pattern(opcode, "dst", fields)
        shape = (columns, *operand_counts(opcode, "dst", fields))
        accumulate = bool(fields["accumulate"])
        integer = DType(fields["dst.dtype"]) is DType.INT32
        add: Callable[[Words, Words], Words] = np.add if integer else arithmetic.add

        def run() -> None:
            moving = read()
            if self._fresh:
                self.weights.assign(self.stationary)
                self._fresh = False
            first, second = self.weights.words[:, :rows, :columns]
            pairs = self.weights.pairs[:columns] & (len(moving) == 2)
            if not pairs.any():
                tile = arithmetic.matmul(first, moving[0])
            elif pairs.all():
                tile = arithmetic.matmul_pairs((first, second), (moving[0], moving[1]))
            else:
                tile = arithmetic.matmul(first, moving[0])
                both = first[:, pairs], second[:, pairs]
                tile[pairs] = arithmetic.matmul_pairs(both, (moving[0], moving[1]))
            if integer:
                tile = arithmetic.to_int32(tile)
            if not accumulate:
                dst.write(tile.reshape(shape))
            elif dst.repeated is None:
                dst.write(add(dst.read(), tile.reshape(shape)))
            else:
                for step, address in enumerate(dst.repeated):
                    word = self.psum[:columns, address]
                    self.psum[:columns, address] = add(word, tile[:, step])

        return run

    def _first_stage(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], Words]:
        """src0 op0 imm0 of the vector engine."""
        source = self._pattern(opcode, "src0", fields)
        operation = AluOp(fields["op0"])
        immediate = np.full(1, fields["imm0"], np.uint32)
        if operation is AluOp.BYPASS:
            return source.read
        dtype = _computes(fields)
        return lambda: arithmetic.alu(operation, source.read(), immediate, dtype)

    def _tensor_tensor(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        first = self._first_stage(opcode, fields)
        second = self._pattern(opcode, "src1", fields)
        operation, dtype = AluOp(fields["op1"]), _computes(fields)
        write = self._writer(opcode, fields, dtype)
        return lambda: write(arithmetic.alu(operation, first(), second.read(), dtype))

    def _scalar_tensor_tensor(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        sources = [self._pattern(opcode, name, fields) for name in ("src0", "scalar", "src1")]
        op0, op1, dtype = AluOp(fields["op0"]), AluOp(fields["op1"]), _computes(fields)
        write = self._writer(opcode, fields, dtype)

        def run() -> None:
            x, s, y = (source.read() for source in sources)
            write(arithmetic.alu(op1, arithmetic.alu(op0, x, s, dtype), y, dtype))

        return run

    def _tensor_scalar(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        first = self._first_stage(opcode, fields)
        operation, dtype = AluOp(fields["op1"]), _computes(fields)
        immediate = np.full(1, fields["imm1"], np.uint32)
        write = self._writer(opcode, fields, dtype)
        return lambda: write(arithmetic.alu(operation, first(), immediate, dtype))

    def _reduce(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        first = self._first_stage(opcode, fields)
        operation, dtype = AluOp(fields["op1"]), _computes(fields)
        write = self._writer(opcode, fields, dtype)
        return lambda: write(arithmetic.reduce_last(operation, first(), dtype)[..., None])

    def _statistics(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        dtype = _computes(fields)
        write = self._writer(opcode, fields, dtype)
        return lambda: write(arithmetic.statistics(source.read(), dtype))

    def _memset(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        value = np.full(1, fields["imm0"], np.uint32)
        integer = DType(fields["dst.dtype"]) in INTEGERS
        write = self._writer(opcode, fields, DType.INT32 if integer else DType.FP32)
        return lambda: write(value)

    def _copy_predicated(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        mask = self._pattern(opcode, "src0", fields)
        source = self._pattern(opcode, "src1", fields)
        dtype = _computes(fields)
        write = self._writer(opcode, fields, dtype)
        return lambda: write(source.read(), arithmetic.nonzero(mask.read(), dtype))

    def _iota(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        numbers = choose.affine(fields, operand_counts(opcode, "dst", fields))
        integer = DType(fields["dst.dtype"]) is DType.INT32
        words = (numbers if integer else numbers.astype(np.float32)).view(np.uint32)
        pattern = self._pattern(opcode, "dst", fields)
        return lambda: pattern.write(words)

    def _affine_select(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        numbers = choose.affine(fields, operand_counts(opcode, "dst", fields))
        chosen = choose.affine_compares(AluOp(fields["op0"]), numbers)
        source = self._pattern(opcode, "src0", fields)
        fill = np.uint32(fields["fill"] << 16)
        write = self._writer(opcode, fields)
        return lambda: write(np.where(chosen, source.read(), fill))

    def _select(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        condition = self._pattern(opcode, "src0", fields)
        source = self._pattern(opcode, "src1", fields)
        operation, otherwise = AluOp(fields["op0"]), np.uint32(fields["imm0"])
        write = self._writer(opcode, fields)

        def run() -> None:
            chosen = choose.compares(operation, condition.read())
            write(np.where(chosen, source.read(), otherwise))

        return run

    def _range_select(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        bounds = self._pattern(opcode, "src1", fields)
        lanes, otherwise = fields["lanes"], np.uint32(fields["imm0"])
        write = self._writer(opcode, fields)

        def run() -> None:
            chosen = choose.within(bounds.read().reshape(lanes, 2), fields["counts.3"])
            write(np.where(chosen[:, None, None, None], source.read(), otherwise))

        return run

    def _scan(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        second = self._pattern(opcode, "src1", fields)
        op0, op1 = AluOp(fields["op0"]), AluOp(fields["op1"])
        immediate = np.full(1, fields["imm0"], np.uint32)
        write = self._writer(opcode, fields)

        def run() -> None:
            a, b = source.read(), second.read()
            steps = a.shape[3]
            if fields["accumulate"]:
                r, following = b[:, :, :, 0], [immediate] * steps
            else:
                r, following = immediate, [b[:, :, :, step] for step in range(steps)]
            found = np.empty_like(a)
            for step in range(steps):
                r = arithmetic.alu(op0, a[:, :, :, step], r)
                r = found[:, :, :, step] = arithmetic.alu(op1, r, following[step])
            write(found)

        return run

    def _top(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        pattern = self._pattern(opcode, "dst", fields)
        smallest = AluOp(fields["op0"]) is AluOp.MIN

        def run() -> None:
            words, indices = arithmetic.top(source.read(), fields["kept"], smallest=smallest)
            pairs = np.stack([indices, words], axis=-1)[..., ::-1, :]
            pattern.write(pairs.reshape(*pairs.shape[:-2], -1))

        return run

    def _transpose(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        write = self._writer(opcode, fields)
        return lambda: write(source.read().swapaxes(0, -1))

    def _shuffle(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        chosen = exchange.shuffle_sources(fields, self.config.lanes)
        write = self._writer(opcode, fields)
        return lambda: write(source.read()[chosen])

    def _drawer(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], Words]:
        """Draws the random words of RANDOM and DROPOUT: [lanes, *counts]."""
        lanes, counts = fields["lanes"], operand_counts(opcode, "dst", fields)

        def draw() -> Words:
            words = dither.random_words(
                self.seed, fields["key"], RANDOM_STREAM, elements=math.prod(counts), lanes=lanes
            )
            return words.reshape(lanes, *counts)

        return draw

    def _fill_random(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        draw = self._drawer(opcode, fields)
        pattern = self._pattern(opcode, "dst", fields)
        if DType(fields["dst.dtype"]) is DType.INT32:
            return lambda: pattern.write(draw())

        def run() -> None:
            uniform = (draw() >> 9).astype(np.float32) * np.float32(2**-23)
            pattern.write(uniform.view(np.uint32))

        return run

    def _dropout(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        draw = self._drawer(opcode, fields)
        source = self._pattern(opcode, "src0", fields)
        scale = np.full(1, fields["imm0"], np.uint32)
        write = self._writer(opcode, fields)

        def run() -> None:
            kept = np.where(draw() >= fields["threshold"], source.read(), np.uint32(0))
            write(arithmetic.mul(kept, scale))

        return run

    def _activate(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        function = Function(fields["op0"])
        sums = row_sums(opcode, fields)
        write = self._writer(opcode, fields)
        immediates = [np.full(1, fields.get(name, 0), np.uint32) for name in ("imm0", "imm1")]
        second = None
        if opcode is not Opcode.ACTIVATE:
            second = self._pattern(opcode, "src1", fields)

        def scale_and_bias() -> Sequence[Words]:
            if second is None:
                return immediates
            words = second.read()
            if opcode is Opcode.ACTIVATE_ROWS:
                return words[..., :1], words[..., 1:]
            if opcode is Opcode.ACTIVATE_TENSOR_SCALE:
                return words, immediates[0]
            return immediates[0], words

        def run() -> None:
            scale, bias = scale_and_bias()
            y = arithmetic.add(arithmetic.mul(source.read(), scale), bias)
            results = self._apply(function, y)
            if sums is RowSums.NONE:
                write(results)
                return
            totals = arithmetic.reduce_last(AluOp.ADD, results)[..., None]
            if sums is RowSums.ONLY:
                write(totals)
            else:
                write(results, behind=totals)

        return run

    def _apply(self, function: Function, y: Words) -> Words:
        """A function of [lanes, *counts], by the tables of the lanes if it is CUSTOM."""
        if function is not Function.CUSTOM:
            return evaluate(function, y)
        lanes = y.shape[0]
        tables, which = np.unique(self.tables[:lanes], axis=0, return_inverse=True)
        results = np.empty_like(y)
        for number, table in enumerate(tables):
            mine = which.reshape(-1) == number
            results[mine] = evaluate(function, y[mine], table)
        return results

    def _load_table(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], None]:
        source = self._pattern(opcode, "src0", fields)
        lanes, first = fields["lanes"], fields["first"]
        words = slice(first, first + fields["counts.3"])

        def run() -> None:
            self.tables[:lanes, words] = source.read().reshape(lanes, -1)

        return run

    def _dma(self, opcode: Opcode, fields: dict[str, int]) -> Callable[[], Fault | None]:
        if SPECS[opcode].indexed or fields["accumulate"]:
            return self._dma_by_definition(opcode, fields)
        load = opcode is Opcode.DMA_LOAD
        local = self._pattern(opcode, "local", fields)
        dtype = DType(fields["dram_dtype"])
        size = FORMATS[dtype].bytes
        counts = [fields["lanes"], *operand_counts(opcode, "local", fields)]
        strides = [fields["lane_stride"], *(fields[f"dram_strides.{i}"] for i in range(4))]
        base = low = high = fields["dram_base"]
        for count, stride in zip(counts, strides, strict=True):
            reach = (count - 1) * stride
            low, high = low + min(reach, 0), high + max(reach, 0)
        if (
            low < 0
            or high + size > len(self.dram)
            or (size > 1 and any(value % 2 for value in (base, *strides)))
            or (local.repeated is not None if load else _repeats(counts, strides, size))
        ):
            return self._dma_by_definition(opcode, fields)

        # The same with strided windows: no index arrays.
        window = np.ndarray(
            counts,
            np.dtype(f"<u{size}"),
            buffer=self.dram.data,
            offset=base,
            strides=strides,
        )

        draw = self._draw(fields)

        def run() -> None:
            if load:
                local.write(arithmetic.unpack(window, dtype))
            else:
                window[...] = arithmetic.pack(local.read(), dtype, draw())

        return run

    def _draw(self, fields: dict[str, int]) -> Callable[[], Words | None]:
        """Draws the random words [lanes, *counts] of a DMA instruction, None if it needs none."""
        stochastic = (
            Rounding(fields.get("rounding", 0)) is Rounding.STOCHASTIC
            and DType(fields["dram_dtype"]) in NARROW_FLOATS
        )
        counts = [fields[f"counts.{i}"] for i in range(4)]
        return lambda: self._random(fields["lanes"], counts) if stochastic else None

    def _dma_by_definition(
        self, opcode: Opcode, fields: dict[str, int]
    ) -> Callable[[], Fault | None]:
        draw = self._draw(fields)

        def run() -> Fault | None:
            random = draw()
            flat = None if random is None else random.reshape(fields["lanes"], -1)
            try:
                dma.execute(opcode, self.dram, self.sbuf, fields, flat)
            except dma.DmaFault as fault:
                return Fault(fault.cause, fault.address)
            return None

        return run


_MAKERS: dict[Opcode, Callable[[Core, Opcode, dict[str, int]], Callable[[], Fault | None]]] = {
    Opcode.LOAD_STATIONARY: Core._load_stationary,
    Opcode.MATMUL: Core._matmul,
    Opcode.LOAD_STATIONARY_PAIR: Core._load_stationary,
    Opcode.MATMUL_PAIR: Core._matmul,
    Opcode.TENSOR_TENSOR: Core._tensor_tensor,
    Opcode.SCALAR_TENSOR_TENSOR: Core._scalar_tensor_tensor,
    Opcode.TENSOR_SCALAR: Core._tensor_scalar,
    Opcode.REDUCE: Core._reduce,
    Opcode.STATISTICS: Core._statistics,
    Opcode.MEMSET: Core._memset,
    Opcode.COPY_PREDICATED: Core._copy_predicated,
    Opcode.IOTA: Core._iota,
    Opcode.AFFINE_SELECT: Core._affine_select,
    Opcode.SELECT: Core._select,
    Opcode.RANGE_SELECT: Core._range_select,
    Opcode.SCAN: Core._scan,
    Opcode.TOP: Core._top,
    Opcode.TRANSPOSE: Core._transpose,
    Opcode.SHUFFLE: Core._shuffle,
    Opcode.RANDOM: Core._fill_random,
    Opcode.DROPOUT: Core._dropout,
    Opcode.ACTIVATE: Core._activate,
    Opcode.ACTIVATE_TENSOR_BIAS: Core._activate,
    Opcode.ACTIVATE_TENSOR_SCALE: Core._activate,
    Opcode.ACTIVATE_ROWS: Core._activate,
    Opcode.LOAD_TABLE: Core._load_table,
    Opcode.DMA_LOAD: Core._dma,
    Opcode.DMA_STORE: Core._dma,
    Opcode.GATHER: Core._dma,
    Opcode.SCATTER: Core._dma,
}
