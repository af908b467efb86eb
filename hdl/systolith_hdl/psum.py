"""PSUM: the tensor engine's accumulator memory."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .arith import FP32_LATENCY, Fp32Add, Fp32ToInt32
from .banked import BankedMemory
from .config import CoreConfig
from .emit import Once, side_by_side
from .ports import READ_LATENCY, ReadPort, WritePort, column_shape, split_words

#: Cycles from a column arriving at PSUM to its write. A column accumulating onto the same address
#: must arrive more than this many cycles after it (the tensor engine sees to it).
ACCUMULATE_LATENCY = READ_LATENCY + FP32_LATENCY


def accumulate_tag(config: CoreConfig) -> data.StructLayout:
    """What PSUM has to know of a column: word address, whether it is added or overwrites, whether
    its words become integers, number of lanes (the low ones) that are written, and whether it is
    the last of its matmul."""
    return data.StructLayout(
        {
            "address": unsigned(Shape.cast(range(config.psum_depth)).width),
            "accumulate": unsigned(1),
            "integer": unsigned(1),
            "columns": unsigned(8),
            "last": unsigned(1),
        }
    )


class AccumulatePort(wiring.Signature):
    """Columns of sums from the tensor engine to PSUM, seen from the engine. Never held back.

    Members
    -------
    valid : Out(1), a column is there
    tag : Out(accumulate_tag)
    data : Out, N FP32 words
    done : In(1), high for one cycle when the column marked `last` is written: reads accepted in
        later cycles see it. ACCUMULATE_LATENCY cycles after `valid`.
    """

    def __init__(self, config: CoreConfig) -> None:
        super().__init__(
            {
                "valid": Out(1),
                "tag": Out(accumulate_tag(config)),
                "data": Out(column_shape(config)),
                "done": In(1),
            }
        )


class Lane(wiring.Component):
    """What one partition does with the words that come from the array.

    Members
    -------
    word : In(32), FP32
    integer : In(1), sampled with `word`: it is made an INT32 number first, and INT32 numbers are
        added, modulo 2**32
    accumulate, old : In(1), In(32), READ_LATENCY cycles after `word`: what it is added to
    o : Out(32), ACCUMULATE_LATENCY cycles after `word`
    """

    word: In(32)
    integer: In(1)
    accumulate: In(1)
    old: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # Integers take the registers of floats while the read is on its way, and an adder of their
        # own after that.
        m.submodules.convert = convert = Fp32ToInt32()
        m.d.comb += convert.word.eq(self.word)
        word = Mux(self.integer, convert.o, self.word)
        carry, integer = convert.carry, self.integer
        for stage in range(ACCUMULATE_LATENCY):
            integer_next = Signal(name=f"integer{stage}", reset_less=True)
            m.d.sync += integer_next.eq(integer)
            integer = integer_next
        for stage in range(READ_LATENCY):
            word_next = Signal(32, name=f"word{stage}", reset_less=True)
            carry_next = Signal(name=f"carry{stage}", reset_less=True)
            m.d.sync += [word_next.eq(word), carry_next.eq(carry)]
            word, carry = word_next, carry_next

        # Overwriting adds to -0, which changes nothing, so both take the same time and the writes
        # stay in order.
        m.submodules.add = add = Once(Fp32Add(), "fp32_add")
        m.d.comb += [
            add.en.eq(1),
            add.a.eq(Mux(self.accumulate, self.old, 1 << 31)),
            add.b.eq(word),
        ]
        total = (Mux(self.accumulate, self.old, 0) + word + carry)[:32]
        for stage in range(FP32_LATENCY):
            total_next = Signal(32, name=f"total{stage}", reset_less=True)
            m.d.sync += total_next.eq(total)
            total = total_next
        m.d.comb += self.o.eq(Mux(integer, total, add.o))
        return m


class Psum(wiring.Component):
    """N partitions x banks of FP32 or INT32 words with read-add-write at the memory.

    Parameters
    ----------
    reads, writes : numbers of ports for the other engines

    Members
    -------
    accumulate : In(AccumulatePort), one column per cycle: word = column, or word = word + column
        rounded to nearest even; or the same with integers, see `Lane`. Its accesses go before
        those of all other ports, in order.
    read : In(ReadPort) x reads
    write : In(WritePort) x writes
    stalled : Out(1), a request of another port was held back
    """

    def __init__(self, config: CoreConfig, *, reads: int, writes: int) -> None:
        self._config = config
        super().__init__(
            {
                "accumulate": In(AccumulatePort(config)),
                "read": In(ReadPort(config, config.psum_depth)).array(reads),
                "write": In(WritePort(config, config.psum_depth)).array(writes),
                "stalled": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        reads, writes = list(self.read), list(self.write)
        m.submodules.memory = memory = BankedMemory(
            config,
            depth=config.psum_depth,
            reads=1 + len(reads),
            writes=1 + len(writes),
            priority=True,
        )
        for port, inner in zip(reads, list(memory.read)[1:], strict=True):
            wiring.connect(m, wiring.flipped(port), inner)
        for port, inner in zip(writes, list(memory.write)[1:], strict=True):
            wiring.connect(m, wiring.flipped(port), inner)
        m.d.comb += self.stalled.eq(memory.stalled)

        # Read.
        column = self.accumulate
        m.d.comb += [
            memory.read[0].request.valid.eq(column.valid & column.tag.accumulate),
            memory.read[0].request.payload.eq(column.tag.address),
        ]
        valid, tag = column.valid, column.tag
        valids, tags = [], []
        for stage in range(ACCUMULATE_LATENCY):
            valid_next = Signal(name=f"valid{stage}")
            tag_next = Signal(accumulate_tag(config), name=f"tag{stage}", reset_less=True)
            m.d.sync += [valid_next.eq(valid), tag_next.eq(tag)]
            valid, tag = valid_next, tag_next
            valids.append(valid)
            tags.append(tag)

        # Add, write.
        old = split_words(m, memory.read[0].response.payload, name="old")
        new = split_words(m, column.data, name="new")
        write = memory.write[0].request
        m.submodules.lanes = cells = side_by_side(
            Lane(), "psum_lane", config.lanes, shared=("integer", "accumulate")
        )
        m.d.comb += [
            cells.integer.eq(column.tag.integer),
            cells.accumulate.eq(tags[READ_LATENCY - 1].accumulate),
            *(cells.word[number].eq(new[number]) for number in range(config.lanes)),
            *(cells.old[number].eq(old[number]) for number in range(config.lanes)),
            write.valid.eq(valid),
            write.payload.address.eq(tag.address),
            write.payload.data.as_value().eq(Cat(cells.o)),
            write.payload.mask.eq(Cat(number < tag.columns for number in range(config.lanes))),
            column.done.eq(valid & tag.last),
        ]
        return m
