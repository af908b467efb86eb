"""Races and uninitialised memory: what the golden device watches when it is asked to.

Two accesses to one word of SBUF or PSUM, or to one byte of DRAM, at least one of them a write, are
a *race* when neither happens before the other. An instruction happens before another one

- of its own engine that follows it: the hardware keeps those in order;
- that waited for a semaphore to reach a count it could not have reached without the former's
  signal;
- that something which it happens before happens before.

A signal says that its instruction is complete, and with it all earlier ones of its progress stream
(see `systolith.kernel.dependencies`). The order is known in vector clocks: how many instructions of
each stream are known to be complete. What is judged is the order that the semaphores force, not the
one in which this device happened to execute; where several streams signal one semaphore, the
signals made so far in this execution count.

A word never written since the start of the program is *undefined*, and so is what the vector and
scalar engines make of it, word by word: whole-tile instructions may compute lanes that nobody
reads. It is an error when the tensor engine takes it or DMA stores it; of other opcodes, at once.
So are words of the tables that LOAD_TABLE has not written, and it is an error to apply CUSTOM in a
partition where one that it may need is: a row of the directory, or a segment that one names. A race
may be the cause, so the first use of undefined memory is kept until the program has ended without
one.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FORMATS, DType
from systolith_hdl.isa import (
    DRAM_READERS,
    DRAM_WRITERS,
    LOADS,
    SEGMENT_WORDS,
    SPECS,
    TABLE_SEGMENTS,
    TABLE_WORDS,
    EngineKind,
    Function,
    Opcode,
    Space,
)
from systolith_hdl.scalar.tables import CUSTOM_ROWS, ENTRY, MAX_COUNT_LOG2, field_bits

from . import dma
from .checker import operand_counts, operand_lanes, operand_strides
from .marks import PASSES

#: opcodes whose result in an element depends on nothing but that element of their sources, which
#: broadcast: undefined words pass through
_LANEWISE = frozenset(
    {
        Opcode.TENSOR_TENSOR,
        Opcode.SCALAR_TENSOR_TENSOR,
        Opcode.TENSOR_SCALAR,
        Opcode.DROPOUT,
    }
)
#: opcodes that undefined words pass through
_PASSING = _LANEWISE | PASSES.keys()
_NEVER = 1  #: mark of a word never written; higher ones number the instruction that read such a one
_EVER = np.iinfo(np.int64).max
_CHUNK = 1 << 20  #: bytes by which what is known of DRAM grows, at least


class Access(NamedTuple):
    """The words that one operand of an instruction visits: [lanes, *counts]."""

    operand: str
    space: Space
    base: int
    lanes: int
    counts: tuple[int, ...]
    strides: tuple[int, ...]
    reads: bool
    writes: bool


class Step(NamedTuple):
    """One executed instruction: engine number and index in its stream."""

    engine: int
    pc: int


class Race(Exception):
    """Two accesses that nothing orders. `place` names the first word or byte they share."""

    def __init__(self, first: Step, operand: str, place: str, wrote: bool, writes: bool) -> None:
        super().__init__(place)
        self.first = first
        self.operand = operand
        self.place = place
        self.wrote = wrote
        self.writes = writes


class Undefined(NamedTuple):
    """An instruction, `user`, uses a word or byte never written, or what `reader` made of it."""

    user: Step
    operand: str
    place: str
    reader: Step


def accesses(opcode: Opcode, fields: dict[str, int], lanes: int) -> Iterator[Access]:
    """The words of SBUF and PSUM that an instruction reads and writes, operand by operand, sources
    first, in a core of so many lanes. One that writes only some elements counts as writing all, one
    that reads some partitions as reading those below, too."""
    if SPECS[opcode].indexed:
        full, rest = divmod(fields["counts.0"], lanes)
        for first, columns, used in ((0, full, lanes), (full, 1, rest)):
            if columns and used:
                base = fields["index.base"] + first
                shape = (1, 1, 1, columns), (0, 0, 0, 1)
                yield Access("index", Space.SBUF, base, used, *shape, True, False)
    for name in sorted(SPECS[opcode].operands, key=lambda name: name == "dst"):
        accumulate = opcode is not Opcode.SCAN and bool(fields.get("accumulate"))
        # A store that adds leaves the sums in its source, too.
        writes = name == "dst" or (name == "local" and (opcode in DRAM_READERS or accumulate))
        reads = not writes or accumulate
        yield Access(
            name,
            Space(fields[f"{name}.space"]),
            fields[f"{name}.base"],
            operand_lanes(opcode, name, fields, lanes),
            tuple(operand_counts(opcode, name, fields)),
            tuple(operand_strides(name, fields)),
            reads,
            writes,
        )


class Clocks:
    """Which instructions are known to be complete, as vector clocks over the progress streams.

    Stream e is engine e, without the LOAD_STATIONARYs of the tensor engine, which are the last one.
    """

    def __init__(self, config: CoreConfig) -> None:
        engines = len(config.engines)
        self.streams = engines + 1
        self._tensor = config.engines.index("tensor")
        self._loads = engines
        #: engine -> how many instructions of each stream are complete when it issues the next
        self._known = np.zeros((engines, self.streams), np.int64)
        #: stream -> its instructions
        self.history: list[list[Step]] = [[] for _ in range(self.streams)]
        #: semaphore -> stream -> (sum of its signals up to this one, what is complete then)
        self._signals: dict[int, dict[int, list[tuple[int, np.ndarray]]]] = {}
        self._acquired: dict[int, int] = {}

    def waited(self, engine: int, semaphore: int, value: int, acquire: bool) -> None:
        """An engine saw a semaphore at `value` or above, and took that many if it acquired."""
        streams = self._signals.get(semaphore, {})
        # What had to be signalled in all: what others took was there before, too.
        level = value + self._acquired.get(semaphore, 0)
        total = sum(signals[-1][0] for signals in streams.values())
        for signals in streams.values():
            needed = level - (total - signals[-1][0])
            if needed > 0:
                at = bisect.bisect_left(signals, needed, key=operator.itemgetter(0))
                np.maximum(self._known[engine], signals[at][1], out=self._known[engine])
        if acquire:
            self._acquired[semaphore] = self._acquired.get(semaphore, 0) + value

    def issue(self, step: Step, opcode: Opcode) -> tuple[int, np.ndarray, np.ndarray]:
        """The next instruction of an engine: (its stream, what it may rely on, what is complete
        when it is)."""
        engine = step.engine
        stream = self._loads if opcode in LOADS else engine
        self.history[stream].append(step)
        complete = self._known[engine].copy()
        mine = [engine, self._loads] if engine == self._tensor else [engine]
        relied = complete.copy()
        relied[mine] = _EVER
        # A MATMUL starts after the loads before it; NOP and END end after everything before them.
        ends = mine if opcode not in LOADS else [self._loads]
        complete[ends] = [len(self.history[other]) for other in ends]
        return stream, relied, complete

    def signal(self, semaphore: int, amount: int, stream: int, complete: np.ndarray) -> None:
        """An instruction of a stream signals."""
        signals = self._signals.setdefault(semaphore, {}).setdefault(stream, [])
        before = signals[-1][0] if signals else 0
        signals.append((before + amount, complete))


class _Words:
    """Who read and wrote the words of SBUF or PSUM last, and which are undefined.

    Members
    -------
    read, written : int32 [streams, lanes, depth]: number of the last instruction, from 1
    undefined : uint32 [lanes, depth]: 0 where a word is defined
    """

    def __init__(self, streams: int, lanes: int, depth: int) -> None:
        self.read = np.zeros((streams, lanes, depth), np.int32)
        self.written = np.zeros((streams, lanes, depth), np.int32)
        self.undefined = np.full((lanes, depth), _NEVER, np.uint32)

    @staticmethod
    def window(array: np.ndarray, access: Access) -> np.ndarray:
        """The elements of `array`, [..., lanes, depth], that an access visits."""
        used = [4 * s if n > 1 else 0 for s, n in zip(access.strides, access.counts, strict=True)]
        outer = array.shape[:-2]
        return np.ndarray(
            (*outer, access.lanes, *access.counts),
            array.dtype,
            buffer=array.data,
            offset=4 * access.base,
            strides=(*array.strides[:-1], *used),
        )


class _Bytes:
    """The same of DRAM, byte by byte; grows with the addresses and the streams that use it.

    Members
    -------
    streams : those that have used it; row i of `read` and `written` is that of streams[i]
    """

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.read = np.zeros((0, 0), np.int32)
        self.written = np.zeros((0, 0), np.int32)
        self.undefined = np.zeros(0, bool)

    def row(self, stream: int) -> int:
        """The row of a stream."""
        if stream not in self.streams:
            self.streams.append(stream)
            self.read = np.pad(self.read, ((0, 1), (0, 0)))
            self.written = np.pad(self.written, ((0, 1), (0, 0)))
        return self.streams.index(stream)

    def reach(self, size: int) -> None:
        """Makes room for addresses below `size`."""
        have = self.undefined.size
        if size <= have:
            return
        size = max(size, 2 * have, _CHUNK)
        for name in ("read", "written", "undefined"):
            old = getattr(self, name)
            new = np.zeros((*old.shape[:-1], size), old.dtype)
            new[..., :have] = old
            setattr(self, name, new)


def _place(space: Space, access: Access, index: tuple[int, ...]) -> str:
    word = access.base + sum(i * s for i, s in zip(index[1:], access.strides, strict=True))
    return f"word {word} of partition {index[0]} of {space.name}"


class Checks:
    """Follows one execution from its start; raises `Race`.

    Parameters
    ----------
    config : of the core
    memories : what SBUF and PSUM hold, uint32 [lanes, depth]; only looked at
    tables : those of CUSTOM, uint32 [lanes, TABLE_WORDS]; likewise
    undefined : byte ranges of DRAM that hold nothing when the program starts

    Members
    -------
    used : the first use of undefined memory, if there was one
    """

    def __init__(
        self,
        config: CoreConfig,
        memories: Mapping[Space, np.ndarray],
        tables: np.ndarray,
        undefined: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._lanes = config.lanes
        self._memories = memories
        self._tables = tables
        self._unloaded = np.ones(tables.shape, bool)
        self.used: Undefined | None = None
        self.clocks = Clocks(config)
        streams = self.clocks.streams
        self._words = {
            Space.SBUF: _Words(streams, config.lanes, config.sbuf_depth),
            Space.PSUM: _Words(streams, config.lanes, config.psum_depth),
        }
        self._dram = _Bytes()
        for start, stop in undefined:
            self._dram.reach(stop)
            self._dram.undefined[start:stop] = True
        #: instructions that read undefined words first, and the words' places
        self._origins: list[tuple[Step, str]] = []
        self._origin: int | None = None
        self._issued: tuple[int, np.ndarray] | None = None

    def before(self, step: Step, opcode: Opcode, fields: dict[str, int], dram_bytes: int) -> None:
        """An instruction executes: everything it waited for has been given to `clocks`."""
        stream, relied, complete = self.clocks.issue(step, opcode)
        self._issued = stream, complete
        number = len(self.clocks.history[stream])
        self._origin = None
        marks: dict[str, np.ndarray] = {}
        held: dict[str, np.ndarray] = {}
        elements = self._dram_elements(opcode, fields, dram_bytes)
        for access in accesses(opcode, fields, self._lanes):
            words = self._words[access.space]
            self._order(words, access, relied)
            if access.reads:
                found = words.window(words.undefined, access)
                if found.any():
                    if opcode not in _PASSING:
                        self._use(step, access, found)
                    never = found == _NEVER
                    if never.any():
                        found = np.where(never, self._mark(step, access, never), found)
                marks[access.operand] = found
                held[access.operand] = words.window(self._memories[access.space], access)
                words.window(words.read, access)[stream] = number
            if access.writes:
                words.window(words.written, access)[stream] = number
                self._define(words, access, opcode, fields, marks, held)
        self._follow_tables(step, opcode, fields)
        if elements is not None:
            accumulate = bool(fields.get("accumulate"))
            self._transfer(step, opcode, accumulate, elements, stream, number, relied)

    def define_everything(self) -> None:
        """Takes whatever the memories hold now as written, by the host perhaps."""
        for words in self._words.values():
            words.undefined[:] = 0
        self._dram.undefined[:] = False
        self._unloaded[:] = False

    def after(self, fields: dict[str, int]) -> None:
        """The instruction last given to `before` is complete."""
        assert self._issued is not None
        if fields["signal.amount"]:
            self.clocks.signal(fields["signal.sem"], fields["signal.amount"], *self._issued)

    # -- tables --------------------------------------------------------------------------------

    def _follow_tables(self, step: Step, opcode: Opcode, fields: dict[str, int]) -> None:
        """What LOAD_TABLE defines, and the use of what it has not."""
        if opcode is Opcode.LOAD_TABLE:
            first = fields["first"]
            self._unloaded[: fields["lanes"], first : first + fields["counts.3"]] = False
            return
        applies = SPECS[opcode].kind is EngineKind.SCALAR
        if not applies or fields["op0"] != Function.CUSTOM.value or self.used is not None:
            return
        directory = SEGMENT_WORDS * TABLE_SEGMENTS
        for lane in range(fields["lanes"]):
            unloaded = self._unloaded[lane]
            if not unloaded.any():
                continue
            needed = np.zeros(TABLE_WORDS, bool)
            needed[directory : directory + CUSTOM_ROWS] = True
            if not (needed & unloaded).any():
                for word in self._tables[lane, needed].tolist():
                    entry = field_bits(ENTRY, word)
                    count = 1 << min(entry["log2_count"], MAX_COUNT_LOG2)
                    named = (entry["base"] + np.arange(count)) % TABLE_SEGMENTS
                    needed.reshape(-1, SEGMENT_WORDS)[named] = True
            found = np.flatnonzero(needed & unloaded)
            if found.size:
                place = f"word {found[0]} of the table of partition {lane}"
                self.used = Undefined(step, "op0", place, step)
                return

    # -- words ---------------------------------------------------------------------------------

    def _order(self, words: _Words, access: Access, relied: np.ndarray) -> None:
        clock = relied.reshape(-1, *(1,) * (1 + len(access.counts)))
        kinds = [(words.written, True)] + ([(words.read, False)] if access.writes else [])
        for last, wrote in kinds:
            window = words.window(last, access)
            late = window > clock
            if late.any():
                index = tuple(int(i) for i in np.argwhere(late)[0])
                first = self.clocks.history[index[0]][int(window[index]) - 1]
                place = _place(access.space, access, index[1:])
                raise Race(first, access.operand, place, wrote, access.writes)

    def _mark(self, step: Step, access: Access, found: np.ndarray) -> int:
        """The mark of words that this instruction makes of undefined ones."""
        if self._origin is None:
            index = np.argwhere(found)[0]
            self._origins.append((step, _place(access.space, access, tuple(map(int, index)))))
            self._origin = len(self._origins) + _NEVER
        return self._origin

    def _use(self, step: Step, access: Access, found: np.ndarray) -> None:
        if self.used is None:
            index = tuple(int(i) for i in np.argwhere(found)[0])
            mark = int(found[index])
            origin = step, _place(access.space, access, index)
            if mark != _NEVER:
                origin = self._origins[mark - _NEVER - 1]
            self.used = Undefined(step, access.operand, origin[1], origin[0])

    @staticmethod
    def _define(
        words: _Words,
        access: Access,
        opcode: Opcode,
        fields: dict[str, int],
        marks: dict[str, np.ndarray],
        held: dict[str, np.ndarray],
    ) -> None:
        """What a destination is after the instruction, from its fields and the marks and words of
        its sources."""
        dst = words.window(words.undefined, access)
        result = np.zeros_like(dst)
        if opcode in PASSES:
            result[...] = PASSES[opcode](
                {**fields, "core_lanes": words.undefined.shape[0]}, {**marks, "dst": dst}, held
            )
        elif opcode in _LANEWISE:
            for found in marks.values():
                np.maximum(result, found, out=result)
        dst[...] = result

    # -- DRAM ----------------------------------------------------------------------------------

    def _dram_elements(
        self, opcode: Opcode, fields: dict[str, int], dram_bytes: int
    ) -> np.ndarray | None:
        """The bytes that an instruction touches; None if there are none, or some do not exist."""
        if "dram_base" not in fields:
            return None
        if opcode is Opcode.TEST:
            size, found = 4, np.array([fields["dram_base"] & ~3])
        else:
            size = FORMATS[DType(fields["dram_dtype"])].bytes
            rows = dma.rows(opcode, self._memories[Space.SBUF], fields)
            try:
                found = np.concatenate([dma.element_addresses(row).ravel() for row in rows])
            except dma.DmaFault:
                return None  # an index names no row
        if int(found.max()) + size > dram_bytes:
            return None  # the bus refuses it
        return (found[:, None] + np.arange(size)).ravel()

    def _transfer(
        self,
        step: Step,
        opcode: Opcode,
        accumulate: bool,
        touched: np.ndarray,
        stream: int,
        number: int,
        relied: np.ndarray,
    ) -> None:
        dram = self._dram
        row = dram.row(stream)
        relied = relied[dram.streams, None]
        dram.reach(int(touched.max()) + 1)
        store = opcode in DRAM_WRITERS
        for last, wrote in [(dram.written, True)] + ([(dram.read, False)] if store else []):
            found = last[:, touched]
            late = found > relied
            if late.any():
                other, at = (int(i) for i in np.argwhere(late)[0])
                culprit = self.clocks.history[dram.streams[other]][int(found[other, at]) - 1]
                raise Race(culprit, "dram", f"byte {int(touched[at]):#x} of DRAM", wrote, store)
        undefined = dram.undefined[touched]
        if undefined.any() and self.used is None and (accumulate or not store):
            at = int(touched[int(np.argmax(undefined))])
            self.used = Undefined(step, "dram", f"byte {at:#x} of DRAM", step)
        if store:
            dram.written[row, touched] = number
            dram.undefined[touched] = False
            return
        dram.read[row, touched] = number
