"""Loops of an instruction stream, and the index registers that make its addresses move."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..isa import (
    INDEX_REGISTERS,
    INSTRUCTION_BITS,
    LOOP_DEPTH,
    SPECS,
    EngineKind,
    IndexedField,
    LoopBody,
    NextBody,
    Opcode,
    indexed_fields,
)

_BODY = 128
_Indices = data.ArrayLayout(unsigned(32), INDEX_REGISTERS)


class _Open(data.Struct):
    """An open loop."""

    left: unsigned(32)  # iterations, with the one that runs
    first: unsigned(32)  # instruction after its LOOP
    indices: _Indices  # what the registers were before it


class Loops(wiring.Component):
    """Executes LOOP and NEXT as they arrive from DRAM, and adds index registers to addresses.

    Parameters
    ----------
    kind : of the engine, whose instructions' addresses are those that count

    Members
    -------
    start : In(1), a stream begins: no loop is open, the registers are zero, the flag is clear
    valid : In(1), `word` is the next instruction of the stream
    word : In(512 bits)
    number : Out(32 bits), index of `word` in its stream
    indexed : Out(512 bits), `word` with the index registers added
    jump : Out(1), with `valid`: what follows is instruction `target`, not the next one
    target : Out(32 bits)
    bad : Out(1), `word` is a LOOP inside of LOOP_DEPTH others or a NEXT without one; does nothing
    flag : In(1) and flag_valid : In(1), what a TEST found

    Outputs depend on `word` in the same cycle. One instruction per cycle; the loops that are open
    are kept in a memory of LOOP_DEPTH words, which is read in that cycle too. Without
    `config.loops` it only counts.
    """

    def __init__(self, config: CoreConfig, kind: EngineKind) -> None:
        self._config = config
        self._kind = kind
        super().__init__(
            {
                "start": In(1),
                "valid": In(1),
                "word": In(INSTRUCTION_BITS),
                "number": Out(32),
                "indexed": Out(INSTRUCTION_BITS),
                "jump": Out(1),
                "target": Out(32),
                "bad": Out(1),
                "flag": In(1),
                "flag_valid": In(1),
            }
        )

    def _fields(self) -> dict[IndexedField, list[Opcode]]:
        """The address fields of this engine's instructions -> the opcodes that have them."""
        found: dict[IndexedField, list[Opcode]] = {}
        for opcode, spec in SPECS.items():
            if spec.kind in (None, self._kind) and spec.exists(self._config):
                for field in indexed_fields(opcode):
                    found.setdefault(field, []).append(opcode)
        return found

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if not self._config.loops:  # without LOOP and NEXT the index registers stay zero
            with m.If(self.start):
                m.d.sync += self.number.eq(0)
            with m.Elif(self.valid):
                m.d.sync += self.number.eq(self.number + 1)
            m.d.comb += self.indexed.eq(self.word)
            return m
        opcode = self.word[:8]
        indices = Signal(_Indices)
        number = Signal(32)
        depth = Signal(range(LOOP_DEPTH + 1))
        flag = Signal()

        m.submodules.open = cells = memory.Memory(shape=_Open, depth=LOOP_DEPTH, init=[])
        write, read = cells.write_port(), cells.read_port(domain="comb")
        innermost = read.data
        loop = data.View(LoopBody, self.word[_BODY:])
        following = data.View(NextBody, self.word[_BODY:])
        is_loop, is_next = opcode == Opcode.LOOP, opcode == Opcode.NEXT
        opens = is_loop & (depth != LOOP_DEPTH)
        closes = is_next & (depth != 0)
        again = (innermost.left > 1) & (~following.conditional | flag)
        m.d.comb += [
            self.number.eq(number),
            self.bad.eq((is_loop & ~opens) | (is_next & ~closes)),
            self.jump.eq(closes & again),
            self.target.eq(innermost.first),
            read.addr.eq((depth - 1)[: len(read.addr)]),
            write.addr.eq(Mux(opens, depth, depth - 1)[: len(write.addr)]),
            write.en.eq(self.valid & (opens | (closes & again))),
            write.data.left.eq(Mux(opens, loop.count, innermost.left - 1)),
            write.data.first.eq(Mux(opens, number + 1, innermost.first)),
            write.data.indices.eq(Mux(opens, indices.as_value(), innermost.indices.as_value())),
        ]
        with m.If(self.flag_valid):
            m.d.sync += flag.eq(self.flag)
        with m.If(self.valid):
            m.d.sync += number.eq(Mux(self.jump, self.target, number + 1))
            with m.If(opens):
                m.d.sync += depth.eq(depth + 1)
            with m.Elif(closes & again):
                m.d.sync += [
                    indices[i].eq(indices[i] + following.steps[i]) for i in range(INDEX_REGISTERS)
                ]
            with m.Elif(closes):
                m.d.sync += [depth.eq(depth - 1), indices.eq(innermost.indices)]
        with m.If(self.start):
            m.d.sync += [number.eq(0), depth.eq(0), indices.eq(0), flag.eq(0)]

        # Opcodes may have fields of different width in one place: one adder, and a carry out of a
        # narrow field ends there.
        m.d.comb += self.indexed.eq(self.word)
        places: dict[int, list[tuple[IndexedField, Value]]] = {}
        for field, opcodes in self._fields().items():
            here = Cat(opcode == code.value for code in opcodes).any()
            places.setdefault(field.base, []).append((field, here))
        for base, fields in places.items():
            value = Signal(signed(32), name=f"index{base}")
            for field, here in fields:
                with m.Switch(Mux(here, self.word[field.index : field.index + 2], 0)):
                    for register in range(INDEX_REGISTERS):
                        with m.Case(register + 1):
                            m.d.comb += value.eq(indices[register])
            end = base + max(field.width for field, _ in fields)
            m.d.comb += self.indexed[base:end].eq(self.word[base:end] + value)
            for field, here in fields:
                beyond = slice(base + field.width, end)
                if beyond.start < end:
                    with m.If(here):
                        m.d.comb += self.indexed[beyond].eq(self.word[beyond])
        return m
