"""Random words for the columns of stores."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arith import DitherStream
from ..config import CoreConfig
from ..emit import Once
from .runs import Nest


class ColumnDraws(wiring.Component):
    """Draws the random words of stores that round stochastically, column after column, ahead of
    the columns themselves.

    Members
    -------
    start : In(stream of {counts, counter, final}), one for each such store: the counts of its
        columns, at least 1, the number of instructions before it in its stream, and whether it is
        the instruction's last; the columns of all those of an instruction are numbered through
    seed : In(32), steady while a program runs
    key : In(32), `engine_key` of the engine's number, constant
    words : Out(stream of a 32-bit word for each lane), one for each column

    Latency: ``1 + DITHER_LATENCY`` cycles from `start` to the first words. Throughput: one column
    per cycle, also from one store to the next. A core without `random` words has none of it.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._lanes = config.lanes
        self._random = config.random
        super().__init__(
            {
                "start": In(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "counts": data.ArrayLayout(unsigned(16), 4),
                                "counter": unsigned(32),
                                "final": unsigned(1),
                            }
                        )
                    )
                ),
                "seed": In(32),
                "key": In(32),
                "words": Out(stream.Signature(data.ArrayLayout(unsigned(32), config.lanes))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if not self._random:
            return m
        lanes = self._lanes
        m.submodules.nest = nest = Nest(4, addresses=False)
        m.submodules.dither = dither = Once(DitherStream(lanes=lanes), f"dither_stream_{lanes}")
        counter = Signal(32)
        final = Signal()
        element = Signal(32)
        m.d.comb += [
            nest.start.valid.eq(self.start.valid),
            nest.start.payload.counts.eq(self.start.payload.counts),
            self.start.ready.eq(nest.start.ready),
            dither.seed.eq(self.seed),
            dither.key.eq(self.key),
            dither.element.valid.eq(nest.point.valid),
            dither.element.payload.counter.eq(counter),
            dither.element.payload.element.eq(element),
            nest.point.ready.eq(dither.element.ready),
            self.words.valid.eq(dither.words.valid),
            self.words.payload.eq(dither.words.payload),
            dither.words.ready.eq(self.words.ready),
        ]
        with m.If(nest.point.valid & nest.point.ready):
            last = final & nest.point.payload.ends.all()
            m.d.sync += element.eq(Mux(last, 0, element + 1))
        with m.If(self.start.valid & self.start.ready):
            m.d.sync += [
                counter.eq(self.start.payload.counter),
                final.eq(self.start.payload.final),
            ]
        return m
