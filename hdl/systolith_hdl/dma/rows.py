"""Row by row: GATHER, SCATTER and stores that add as the loads and stores of their rows."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..isa import DRAM_WRITERS, INSTRUCTION_BITS, SPECS, Opcode, is_opcode
from ..ports import READ_LATENCY, ReadPort, split_words
from .runs import ADDRESS_BITS

_INDEXED = frozenset(opcode for opcode, spec in SPECS.items() if spec.indexed)
#: Bits of an index that are multiplied in a cycle.
_PART = 16
#: Cycles from one row of an instruction to the next, at least: its index is asked for, arrives
#: after `READ_LATENCY`, is multiplied in two parts and added up, and the row is given.
ROW_CYCLES = 5 + READ_LATENCY


class RowSplitter(wiring.Component):
    """Splits an instruction with indices into rows, and a store that adds into loads that add and
    stores, one of each for a row; others pass, without a delay, as one row.

    Members
    -------
    instruction : In(stream of 512 bits); one that is split is taken with its last row
    idle : In(1), everything given before is complete, and so is what it wrote to SBUF: indices are
        read only then
    row : Out(stream of {dram_base, local_base, store, accumulate, single, final}): where a row
        begins, and whether it is stored, or loaded and added; what else there is to know of it is
        in the instruction. `single`: count 0 of the row is 1, not that of the instruction; `final`:
        it is the instruction's last
    read : Out(ReadPort) of SBUF, for indices
    splitting : Out(1), an instruction that is split has begun and is not taken yet
    bad : Out(1), an index is not below `rows`: nothing more is given until reset
    index : Out(32), that index, valid with `bad`

    Throughput: a row every `ROW_CYCLES` cycles if SBUF does not stall; one that is loaded and
    stored takes a cycle more.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        super().__init__(
            {
                "instruction": In(stream.Signature(unsigned(INSTRUCTION_BITS))),
                "idle": In(1),
                "row": Out(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "dram_base": unsigned(ADDRESS_BITS),
                                "local_base": unsigned(24),
                                "store": unsigned(1),
                                "accumulate": unsigned(1),
                                "single": unsigned(1),
                                "final": unsigned(1),
                            }
                        )
                    )
                ),
                "read": Out(ReadPort(config, config.sbuf_depth)),
                "splitting": Out(1),
                "bad": Out(1),
                "index": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        log_lanes = config.lanes.bit_length() - 1
        instruction = data.View(SPECS[Opcode.GATHER].layout, self.instruction.payload)
        body = instruction.body
        row = self.row.payload
        opcode, accumulate = instruction.header.opcode, instruction.header.accumulate
        indexed = is_opcode(opcode, _INDEXED, config)
        writes = is_opcode(opcode, DRAM_WRITERS, config)
        split = Signal()
        twice = Signal()  # rows are loaded, then stored
        loaded = Signal()  # this one is

        number = Signal(16)  # of the row
        local_base = Signal(24, reset_less=True)
        base = Signal(ADDRESS_BITS, reset_less=True)
        index = self.index
        part = Signal(_PART)
        product = Signal(signed(_PART + 1 + 32), reset_less=True)
        m.d.comb += [
            twice.eq(writes & accumulate),
            split.eq(indexed | twice),
            row.dram_base.eq(Mux(split, base, body.dram_base)),
            row.local_base.eq(Mux(split, local_base, body.local.base)),
            row.store.eq(writes & (~twice | loaded)),
            row.accumulate.eq(accumulate & ~row.store),
            row.single.eq(split),
            row.final.eq(~split | ((number == body.counts[0] - 1) & (loaded | ~twice))),
            self.read.request.payload.eq(body.index.base + (number >> log_lanes)),
            self.instruction.ready.eq(self.row.ready & self.row.valid & row.final),
        ]
        m.d.sync += product.eq(Cat(part, Const(0, 1)).as_signed() * body.row_stride)
        words = split_words(m, self.read.response.payload, name="word")
        with m.FSM() as fsm:
            with m.State("START"):
                with m.If(~split):
                    m.d.comb += self.row.valid.eq(self.instruction.valid)
                with m.Elif(self.instruction.valid & self.idle):
                    m.d.sync += [number.eq(0), local_base.eq(body.local.base)]
                    m.next = "ASK"
            with m.State("ASK"):
                # Without indices, rows are those of the table from the first on.
                m.d.comb += self.read.request.valid.eq(indexed)
                m.d.sync += index.eq(number)
                with m.If(~indexed):
                    m.next = "UPPER"
                with m.Elif(self.read.request.ready):
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.sync += index.eq(Array(words)[number[:log_lanes]])
                with m.If(self.read.response.valid):
                    m.next = "UPPER"
            with m.State("UPPER"):
                m.d.comb += part.eq(index[_PART:])
                m.next = "LOWER"
                with m.If(indexed & (index >= body.rows)):
                    m.next = "BAD"
            with m.State("LOWER"):
                m.d.comb += part.eq(index[:_PART])
                m.d.sync += base.eq(body.dram_base + (product << _PART))
                m.next = "ADD"
            with m.State("ADD"):
                m.d.sync += base.eq(base + product)
                m.next = "GIVE"
            with m.State("GIVE"):
                m.d.comb += self.row.valid.eq(self.instruction.valid)
                with m.If(self.row.valid & self.row.ready):
                    m.d.sync += loaded.eq(twice & ~loaded)
                    with m.If(~twice | loaded):
                        m.d.sync += [
                            number.eq(number + 1),
                            local_base.eq(local_base + body.local.strides[0]),
                        ]
                        m.next = "ASK"
                    with m.If(row.final):
                        m.next = "START"
            with m.State("BAD"):
                m.d.comb += self.bad.eq(1)
        m.d.comb += self.splitting.eq(~fsm.ongoing("START"))
        return m
