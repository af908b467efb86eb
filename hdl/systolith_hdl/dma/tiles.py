"""Tiles: the pieces of up to N columns in which an instruction passes the corner-turn buffer."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..formats import DType
from .runs import Nest


def settings_layout(lanes: int) -> data.StructLayout:
    """How the elements of an instruction are moved. It travels with every tile, so that tiles of
    several instructions can be under way at once.

    `dtype` is that of the elements in DRAM, of ``1 << log_size`` bytes. With `turn` a row of the
    tile is one lane, else one column. With `merged` a run goes on over all rows of a pass along
    the innermost dimension, else every row is a run of its own. `broadcast` copies lane 0 to all.
    `stochastic` is how a store rounds; a load with `accumulate` adds to SBUF. `lanes` is the
    instruction's, `rows` how many rows a turned tile has.
    """
    count = unsigned(lanes.bit_length())
    return data.StructLayout(
        {
            "dtype": DType,
            "log_size": unsigned(2),
            "turn": unsigned(1),
            "merged": unsigned(1),
            "broadcast": unsigned(1),
            "stochastic": unsigned(1),
            "accumulate": unsigned(1),
            "lanes": count,
            "rows": count,
        }
    )


def tile_layout(lanes: int) -> data.StructLayout:
    """A tile: its number of columns (1 to N), whether it is the last of its pass along the
    innermost dimension, whether it is the last of the instruction, and the instruction's
    `settings_layout`."""
    return data.StructLayout(
        {
            "columns": unsigned(lanes.bit_length()),
            "ends_inner": unsigned(1),
            "last": unsigned(1),
            "settings": settings_layout(lanes),
        }
    )


class TileCounter(wiring.Component):
    """Lists the tiles of an instruction: for each (i0, i1, i2), the innermost dimension in pieces.

    Members
    -------
    start : In(stream of {counts, full_columns, last_columns, settings}): `counts` are three outer
        counts, then the number of pieces; `full_columns` and `last_columns` the columns of every
        piece but the last, and of the last. Taken when there is no tile left, or in the cycle in
        which the last one is taken.
    tile : Out(stream of `tile_layout`)

    Throughput: one tile per cycle, also from one instruction to the next.
    """

    def __init__(self, *, lanes: int) -> None:
        columns = unsigned(lanes.bit_length())
        super().__init__(
            {
                "start": In(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "counts": data.ArrayLayout(unsigned(16), 4),
                                "full_columns": columns,
                                "last_columns": columns,
                                "settings": settings_layout(lanes),
                            }
                        )
                    )
                ),
                "tile": Out(stream.Signature(tile_layout(lanes))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.nest = nest = Nest(4, addresses=False)
        job = Signal.like(self.start.payload, reset_less=True)
        ends = nest.point.payload.ends
        tile = self.tile.payload
        m.d.comb += [
            nest.start.valid.eq(self.start.valid),
            nest.start.payload.counts.eq(self.start.payload.counts),
            self.start.ready.eq(nest.start.ready),
            self.tile.valid.eq(nest.point.valid),
            nest.point.ready.eq(self.tile.ready),
            tile.columns.eq(Mux(ends[3], job.last_columns, job.full_columns)),
            tile.ends_inner.eq(ends[3]),
            tile.last.eq(ends.all()),
            tile.settings.eq(job.settings),
        ]
        with m.If(self.start.valid & self.start.ready):
            m.d.sync += job.eq(self.start.payload)
        return m
