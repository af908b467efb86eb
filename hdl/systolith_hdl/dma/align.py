"""Between AXI beats and rows of elements, at any alignment.

Both directions work on bytes. A beat has W of them, so a row of up to N elements of 1, 2 or 4 bytes
takes up to ``4 * N / W`` *steps* of W bytes.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arith import PackNarrow, WidenNarrow
from ..config import CoreConfig
from ..emit import side_by_side
from ..formats import DType
from .corner_turn import rotate_down, rotate_up
from .tiles import tile_layout


def run_position(config: CoreConfig) -> data.StructLayout:
    """Where a run begins: byte in its first beat, and that beat's place in its block; and whether
    it is `continued`: goes on where the run of the same row of the tile before ended, inside of a
    beat that is not read again."""
    return data.StructLayout(
        {
            "offset": unsigned(config.axi_bytes.bit_length() - 1),
            "beat": unsigned(4),
            "continued": unsigned(1),
        }
    )


class ReadAligner(wiring.Component):
    """Cuts beats of read data into rows of words, for `corner_turn.CornerTurn.write`.

    A tile has `columns` rows of `lanes` elements, or, turned, `rows` rows of `columns` elements.
    Narrow elements are widened. Rows of one run follow each other without a gap in the beats. Of
    each row of a turned tile the last beat is kept, for a run that continues it.

    Members
    -------
    tile : In(stream of `tile_layout`), of one instruction after the other
    run : In(stream of `run_position`), one for each run
    beats : In(stream of data)
    rows : Out(stream), connects to `CornerTurn.write`

    Latency: one cycle. Throughput: one step or one beat per cycle, whichever are more: a run of B
    beats takes max(B, steps) cycles.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        lanes = config.lanes
        super().__init__(
            {
                "tile": In(stream.Signature(tile_layout(lanes))),
                "run": In(stream.Signature(run_position(config))),
                "beats": In(stream.Signature(unsigned(8 * config.axi_bytes))),
                "rows": Out(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "words": data.ArrayLayout(unsigned(32), lanes),
                                "index": unsigned(lanes.bit_length() - 1),
                                "mask": unsigned(lanes),
                                "row_end": unsigned(1),
                                "commit": unsigned(1),
                                "info": tile_layout(lanes),
                            }
                        )
                    )
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = self._config.lanes
        width = self._config.axi_bytes
        log_width = width.bit_length() - 1
        steps = 4 * lanes // width
        tile = self.tile.payload
        settings = tile.settings
        beat = self.beats.payload

        # Place in the tile, in the row and in the run.
        row = Signal(range(lanes))
        step = Signal(range(steps))
        begin = Signal(init=1)  # the next byte is the first of a run
        offset = Signal(log_width)
        # The run goes on in `held`, the beat before the one on offer, while `have` is high.
        held = Signal(8 * width, reset_less=True)
        have = Signal()
        # One that is continued begins in the last beat of its row.
        m.submodules.kept = kept = memory.Memory(shape=unsigned(8 * width), depth=lanes, init=[])
        keep = kept.write_port()
        last_beat = kept.read_port(domain="comb")
        continues = Signal()
        holds = Signal()  # low bytes of the step are those of a beat before the one on offer
        low = Signal(8 * width)

        length = Signal(range(lanes + 1))
        rest = Signal(range(4 * lanes + 1))
        taking = Signal(range(width + 1))
        row_end = Signal()
        last_row = Signal()
        run_end = Signal()
        start = Signal(log_width)
        end = Signal(log_width + 2)
        m.d.comb += [
            length.eq(Mux(settings.turn, tile.columns, settings.lanes)),
            rest.eq((length << settings.log_size) - (step << log_width)),
            row_end.eq(rest <= width),
            taking.eq(Mux(row_end, rest, width)),
            last_row.eq(row == Mux(settings.turn, settings.rows, tile.columns) - 1),
            run_end.eq(row_end & (~settings.merged | (last_row & tile.ends_inner))),
            start.eq(Mux(begin, self.run.payload.offset, offset)),
            end.eq(start + taking),
        ]

        # A step can span the held beat and the one on offer. When it would span one on offer and
        # one yet to come, that on offer is held first.
        active = Signal()
        spans = Signal()
        hold = Signal()
        out_free = Signal()
        go = Signal()
        m.d.comb += [
            active.eq(self.tile.valid & (~begin | self.run.valid)),
            continues.eq(begin & self.run.payload.continued),
            holds.eq(have | continues),
            spans.eq(end > width),
            hold.eq(active & ~holds & spans & self.beats.valid),
            go.eq(
                active & out_free & Mux(holds, ~spans | self.beats.valid, ~spans & self.beats.valid)
            ),
            self.run.ready.eq(begin & (hold | go)),
            self.tile.ready.eq(go & row_end & last_row),
            self.beats.ready.eq(hold | (go & Mux(holds, spans, run_end | (end == width)))),
            last_beat.addr.eq(row),
            low.eq(Mux(have, held, Mux(continues, last_beat.data, beat))),
            keep.addr.eq(row),
            keep.data.eq(Mux(spans, beat, low)),
            keep.en.eq(go & run_end & settings.turn),
        ]
        with m.If(hold):
            m.d.sync += [held.eq(beat), have.eq(1), offset.eq(start), begin.eq(0)]
        with m.If(go):
            m.d.sync += [
                step.eq(Mux(row_end, 0, step + 1)),
                offset.eq(end),
                begin.eq(run_end),
            ]
            with m.If(row_end):
                m.d.sync += row.eq(Mux(last_row, 0, row + 1))
            with m.If(holds):
                m.d.sync += [
                    held.eq(Mux(spans, beat, low)),
                    have.eq((end != width) & ~run_end),
                ]

        # Byte i of the step is byte start + i of (held, on offer).
        joined = Cat(
            Mux(start <= p, low.word_select(p, 8), beat.word_select(p, 8)) for p in range(width)
        )
        picked = rotate_down(m, joined, start, unit=8, name="pick")

        # Output register: bytes, widened to words only after it.
        register = Signal(8 * width, reset_less=True)
        register_step = Signal(range(steps))
        register_length = Signal(range(lanes + 1))
        out = self.rows.payload
        m.d.comb += out_free.eq(~self.rows.valid | self.rows.ready)
        with m.If(self.rows.ready):
            m.d.sync += self.rows.valid.eq(0)
        with m.If(go):
            m.d.sync += [
                self.rows.valid.eq(1),
                register.eq(picked),
                register_step.eq(step),
                register_length.eq(length),
                out.index.eq(row),
                out.row_end.eq(row_end),
                out.commit.eq(row_end & last_row),
                out.info.eq(tile),
            ]
        m.submodules.widen = widen = side_by_side(
            WidenNarrow(), "widen_narrow", lanes, shared=("dtype",)
        )
        m.d.comb += widen.dtype.eq(out.info.settings.dtype)
        for element in range(lanes):
            for log_size in range(3):
                in_step, place = divmod(element, width >> log_size)
                raw = register.word_select(place, 8 << log_size)
                with m.If(out.info.settings.log_size == log_size):
                    m.d.comb += [
                        widen.bits[element].eq(raw),
                        out.words[element].eq(raw if log_size == 2 else widen.o[element]),
                        out.mask[element].eq(
                            (register_step == in_step) & (element < register_length)
                        ),
                    ]
        return m


class WriteAligner(wiring.Component):
    """Packs rows of words into beats of write data with byte strobes.

    Members
    -------
    row : In(stream of {words, length, run_end, dtype, log_size}); the first `length` words, which
        are numbers of the type, are written right after the row before unless that had `run_end`
    run : In(stream of `run_position`), one for each run
    beats : Out(stream of {data, strb, last}); `last` at the end of every block and run

    Latency: one cycle. Throughput: a run takes as many cycles as it has steps or beats, whichever
    are more.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        width = config.axi_bytes
        super().__init__(
            {
                "row": In(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "words": data.ArrayLayout(unsigned(32), config.lanes),
                                "length": unsigned(config.lanes.bit_length()),
                                "run_end": unsigned(1),
                                "dtype": DType,
                                "log_size": unsigned(2),
                            }
                        )
                    )
                ),
                "run": In(stream.Signature(run_position(config))),
                "beats": Out(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "data": unsigned(8 * width),
                                "strb": unsigned(width),
                                "last": unsigned(1),
                            }
                        )
                    )
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = self._config.lanes
        width = self._config.axi_bytes
        log_width = width.bit_length() - 1
        steps = 4 * lanes // width
        row = self.row.payload

        step = Signal(range(steps))
        begin = Signal(init=1)
        flush = Signal()  # the run is over but for what is held
        offset = Signal(log_width)
        place = Signal(4)  # of the beat being filled, in its block
        held = Signal(8 * width, reset_less=True)
        held_mask = Signal(width)

        rest = Signal(range(4 * lanes + 1))
        giving = Signal(range(width + 1))
        row_end = Signal()
        run_end = Signal()
        start = Signal(log_width)
        start_place = Signal(4)
        end = Signal(log_width + 2)
        m.d.comb += [
            rest.eq((row.length << row.log_size) - (step << log_width)),
            row_end.eq(rest <= width),
            giving.eq(Mux(row_end, rest, width)),
            run_end.eq(row_end & row.run_end),
            start.eq(Mux(begin, self.run.payload.offset, offset)),
            start_place.eq(Mux(begin, self.run.payload.beat, place)),
            end.eq(start + giving),
        ]

        m.submodules.pack = pack = side_by_side(
            PackNarrow(), "pack_narrow", lanes, shared=("dtype",)
        )
        m.d.comb += [
            pack.dtype.eq(row.dtype),
            *(pack.word[element].eq(row.words[element]) for element in range(lanes)),
        ]
        packed = Signal(32 * lanes)
        with m.Switch(row.log_size):
            with m.Case(0):
                m.d.comb += packed.eq(Cat(element[:8] for element in pack.o))
            with m.Case(1):
                m.d.comb += packed.eq(Cat(pack.o))
            with m.Case(2):
                m.d.comb += packed.eq(row.words.as_value())
        chunk = packed.word_select(step, 8 * width)
        moved = rotate_up(m, chunk, start, unit=8, name="place")

        filled = Signal(width)  # bytes of this step in the beat being filled
        spilled = Signal(width)  # and in the one after it
        mask = Signal(width)
        current = Signal(8 * width)
        for p in range(width):
            m.d.comb += [
                filled[p].eq((start <= p) & (end > p)),
                spilled[p].eq(end > p + width),
                current.word_select(p, 8).eq(
                    Mux(filled[p], moved.word_select(p, 8), held.word_select(p, 8))
                ),
            ]
        m.d.comb += mask.eq(filled | Mux(begin, 0, held_mask))

        # Every run ends in a beat of its own; a step makes at most one, so what spills over at the
        # end of a run is flushed in a cycle of its own.
        full = Signal()
        free = Signal()
        go = Signal()
        flushing = Signal()
        m.d.comb += [
            full.eq((end >= width) | run_end),
            free.eq(~self.beats.valid | self.beats.ready),
            go.eq(self.row.valid & ~flush & (~begin | self.run.valid) & (~full | free)),
            flushing.eq(flush & free),
            self.row.ready.eq(go & row_end),
            self.run.ready.eq(go & begin),
        ]
        out = self.beats.payload
        last = Signal()
        m.d.comb += last.eq(Mux(flush, 1, (start_place == 15) | (run_end & (end <= width))))
        with m.If(self.beats.ready):
            m.d.sync += self.beats.valid.eq(0)
        with m.If((go & full) | flushing):
            written = Mux(flush, held_mask, mask)
            m.d.sync += [
                self.beats.valid.eq(1),
                out.data.eq(Mux(flush, held, current)),
                out.strb.eq(written),
                out.last.eq(last),
            ]
        with m.If(go):
            m.d.sync += [
                step.eq(Mux(row_end, 0, step + 1)),
                offset.eq(end),
                begin.eq(run_end & (end <= width)),
                flush.eq(run_end & (end > width)),
                place.eq(start_place + full),
                held.eq(Mux(full, moved, current)),
                held_mask.eq(Mux(full, spilled, mask)),
            ]
        with m.If(flushing):
            m.d.sync += [flush.eq(0), begin.eq(1)]
        return m
