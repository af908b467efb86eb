"""Tiles: the pieces of up to N columns in which an instruction passes the corner-turn buffer."""

from amaranth.hdl import Module, Mux, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .runs import Nest


def tile_layout(lanes: int) -> data.StructLayout:
    """A tile: its number of columns (1 to N), whether it is the last of its pass along the
    innermost dimension, and whether it is the last of the instruction."""
    return data.StructLayout(
        {
            "columns": unsigned(lanes.bit_length()),
            "ends_inner": unsigned(1),
            "last": unsigned(1),
        }
    )


class TileCounter(wiring.Component):
    """Lists the tiles of an instruction: for each (i0, i1, i2), the innermost dimension in pieces.

    Members
    -------
    start : In(1), first tile in the next cycle
    counts : In(16 bits x 4): three outer counts, then the number of pieces; stable
    full_columns, last_columns : In, columns of every piece but the last, and of the last; stable
    tile : Out(stream of `tile_layout`)

    Throughput: one tile per cycle.
    """

    def __init__(self, *, lanes: int) -> None:
        columns = unsigned(lanes.bit_length())
        super().__init__(
            {
                "start": In(1),
                "counts": In(data.ArrayLayout(unsigned(16), 4)),
                "full_columns": In(columns),
                "last_columns": In(columns),
                "tile": Out(stream.Signature(tile_layout(lanes))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.nest = nest = Nest(4, addresses=False)
        ends = nest.point.payload.ends
        m.d.comb += [
            nest.start.eq(self.start),
            nest.counts.eq(self.counts),
            self.tile.valid.eq(nest.point.valid),
            nest.point.ready.eq(self.tile.ready),
            self.tile.payload.columns.eq(Mux(ends[3], self.last_columns, self.full_columns)),
            self.tile.payload.ends_inner.eq(ends[3]),
            self.tile.payload.last.eq(ends.all()),
        ]
        return m
