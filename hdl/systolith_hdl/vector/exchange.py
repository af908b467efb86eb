"""Words that go from one lane to another: TRANSPOSE and SHUFFLE."""

from amaranth.hdl import Array, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..dma.corner_turn import CornerTurn
from ..isa import SHUFFLE_GROUP
from ..ports import column_shape, split_words


class Transposer(wiring.Component):
    """Turns blocks of columns: word j of column i becomes word i of column j.

    Members
    -------
    into, out_of : In(16), columns that a block has before and after; at most N, steady
    columns : In(stream of columns)
    results : Out(stream of columns); words from `into` on are not defined

    Latency: 2 cycles from a block's last column to its first result.
    Throughput: one column per cycle, in and out at once: while a block is read the next is written.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._lanes = config.lanes
        column = stream.Signature(column_shape(config))
        super().__init__(
            {"into": In(16), "out_of": In(16), "columns": In(column), "results": Out(column)}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        info = data.StructLayout({"settings": data.StructLayout({"turn": 1})})
        m.submodules.corner = corner = CornerTurn(
            lanes=self._lanes, info=info, user=data.StructLayout({})
        )
        written = Signal(range(self._lanes))
        read = Signal(range(self._lanes))
        write_last = written == self.into - 1
        read_last = read == self.out_of - 1
        m.d.comb += [
            corner.write.valid.eq(self.columns.valid),
            self.columns.ready.eq(corner.write.ready),
            corner.write.payload.words.eq(self.columns.payload),
            corner.write.payload.index.eq(written),
            corner.write.payload.mask.eq(~0),
            corner.write.payload.row_end.eq(1),
            corner.write.payload.commit.eq(write_last),
            corner.write.payload.info.settings.turn.eq(1),
            corner.request.valid.eq(corner.full),
            corner.request.payload.index.eq(read),
            corner.request.payload.release.eq(read_last),
            self.results.valid.eq(corner.response.valid),
            self.results.payload.eq(corner.response.payload.words),
            corner.response.ready.eq(self.results.ready),
        ]
        with m.If(corner.write.valid & corner.write.ready):
            m.d.sync += written.eq(written + 1)
            with m.If(write_last):
                m.d.sync += written.eq(0)
        with m.If(corner.request.valid & corner.request.ready):
            m.d.sync += read.eq(read + 1)
            with m.If(read_last):
                m.d.sync += read.eq(0)
        return m


class Shuffle(wiring.Component):
    """Gives each lane the word of another: of its group, or of one lane for all. Combinational.

    Members
    -------
    select : In(3) x SHUFFLE_GROUP, place in its group whose word a lane takes, by its own
    spread : In(1), all take the word of `lane` : In(8)
    column, o : columns
    """

    def __init__(self, config: CoreConfig) -> None:
        self._lanes = config.lanes
        super().__init__(
            {
                "select": In(data.ArrayLayout(3, SHUFFLE_GROUP)),
                "spread": In(1),
                "lane": In(8),
                "column": In(column_shape(config)),
                "o": Out(column_shape(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        words = split_words(m, self.column, name="word")
        group = min(SHUFFLE_GROUP, self._lanes)
        common = Signal(32)
        m.d.comb += common.eq(Array(words)[self.lane])
        for lane in range(self._lanes):
            first = lane - lane % group
            chosen = Array(words[first : first + group])[self.select[lane % group]]
            with m.If(self.spread):
                m.d.comb += self.o[lane].eq(common)
            with m.Else():
                m.d.comb += self.o[lane].eq(chosen)
        return m
