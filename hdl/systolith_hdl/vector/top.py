"""The largest elements of a row, with their indices: TOP."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..arith.fp32 import is_nan
from ..config import CoreConfig
from ..emit import side_by_side
from ..formats import CANONICAL_NAN
from ..isa import MAX_KEPT
from ..ports import column_shape

#: Numbers as unsigned keys of the same order: those below zero have all their bits turned over, the
#: others the sign alone. A NaN has the key of the canonical one, above all others.
_NAN_KEY = CANONICAL_NAN | 1 << 31


def _turned(word: Value, negative: Value) -> Value:
    """Key of a word, or word of a key."""
    return word ^ Cat(negative.replicate(31), Const(1, 1))


class TopLane(wiring.Component):
    """One lane's largest (or smallest) words so far, in order: the last entry holds the least.

    Members
    -------
    smallest : In(1), the order is the other way round: the smallest words are kept
    used : In(8), entries in use: the last ones
    take : In(1), a word enters: `word` : In(32), with `index` : In(16)
    shift : In(1), the last entry goes, all others move up by one and leave empty ones behind
    value : In(1), shows the word of the last entry, else its index
    o : Out(32), combinational

    A word goes before the entries that are less, so of equal ones the first stays first. Each entry
    has a comparator, so a word enters per cycle. All entries are empty, and less than any word, at
    first and after as many shifts as are in use.
    """

    smallest: In(1)
    used: In(MAX_KEPT)
    take: In(1)
    word: In(32)
    index: In(16)
    shift: In(1)
    value: In(1)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        nan = is_nan(self.word)
        key = Signal(32)
        turned = _turned(self.word, self.word[31]) ^ self.smallest.replicate(32)
        m.d.comb += key.eq(Mux(nan, _NAN_KEY, turned))

        above: Value = Const(0, 1)
        last_key: Value = Const(0, 32)
        last_index: Value = Const(0, 16)
        for number in range(MAX_KEPT):
            held = Signal(32, name=f"key{number}")
            held_index = Signal(16, name=f"index{number}", reset_less=True)
            less = Signal(name=f"less{number}")
            # `<` is a carry chain alone, where synthesis adds a comparator for equality to `>`.
            m.d.comb += less.eq(self.used[number] & (held < key))
            from_above = self.shift | above
            with m.If((self.take & less) | self.shift):
                m.d.sync += [
                    held.eq(Mux(from_above, last_key, key)),
                    held_index.eq(Mux(from_above, last_index, self.index)),
                ]
            above, last_key, last_index = less, held, held_index

        ordered = last_key ^ self.smallest.replicate(32)
        word = Mux(last_key == _NAN_KEY, CANONICAL_NAN, _turned(ordered, ~ordered[31]))
        m.d.comb += self.o.eq(Mux(self.value, word, last_index))
        return m


class Top(wiring.Component):
    """Finds the largest words of rows, all lanes at once.

    Members
    -------
    smallest : In(1), `kept` : In(4), `length` : In(16) : of the running instruction, steady
    columns : In(stream of columns), the elements of rows of `length`
    results : Out(stream of columns), for each row, from the least of the `kept` words to the
        greatest, its index and then the word itself

    Throughput: one column per cycle, in or out.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._lanes = config.lanes
        column = stream.Signature(column_shape(config))
        super().__init__(
            {
                "smallest": In(1),
                "kept": In(4),
                "length": In(16),
                "columns": In(column),
                "results": Out(column),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.lanes = cells = side_by_side(
            TopLane(), "vector_top", self._lanes,
            shared=("smallest", "used", "take", "index", "shift", "value"),
        )  # fmt: skip
        index = Signal(16)
        giving = Signal()
        value = Signal()
        given = Signal(4)
        taking = self.columns.valid & self.columns.ready
        shift = self.results.valid & self.results.ready & value
        m.d.comb += [
            self.columns.ready.eq(~giving),
            self.results.valid.eq(giving),
            cells.smallest.eq(self.smallest),
            cells.used.eq(Cat(self.kept > MAX_KEPT - 1 - number for number in range(MAX_KEPT))),
            cells.take.eq(taking),
            cells.index.eq(index),
            cells.shift.eq(shift),
            cells.value.eq(value),
        ]
        with m.If(taking):
            m.d.sync += index.eq(index + 1)
            with m.If(index == self.length - 1):
                m.d.sync += [index.eq(0), giving.eq(1), given.eq(1)]
        with m.If(self.results.valid & self.results.ready):
            m.d.sync += value.eq(~value)
        with m.If(shift):
            m.d.sync += given.eq(given + 1)
            with m.If(given == self.kept):
                m.d.sync += giving.eq(0)
        for lane in range(self._lanes):
            m.d.comb += [
                cells.word[lane].eq(self.columns.payload[lane]),
                self.results.payload[lane].eq(cells.o[lane]),
            ]
        return m
