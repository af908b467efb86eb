"""Corner-turn buffer: N x N words written by rows and read by columns, twice over."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out


def rotate_up(m: Module, value: Value, amount: Value, *, unit: int, name: str) -> Value:
    """Returns `value` with each piece of `unit` bits moved up by `amount` places, around the end.

    The number of pieces is a power of two, ``2 ** len(amount)``.
    """
    for stage in range(len(amount)):
        turned = Signal(len(value), name=f"{name}{stage}")
        m.d.comb += turned.eq(Mux(amount[stage], value.rotate_left(unit << stage), value))
        value = turned
    return value


def rotate_down(m: Module, value: Value, amount: Value, *, unit: int, name: str) -> Value:
    """Returns `value` with each piece moved down by `amount` places, around the end."""
    for stage in range(len(amount)):
        turned = Signal(len(value), name=f"{name}{stage}")
        m.d.comb += turned.eq(Mux(amount[stage], value.rotate_right(unit << stage), value))
        value = turned
    return value


class CornerTurn(wiring.Component):
    """Holds two tiles of N x N words: one is filled while the other is drained. A tile that is not
    turned is drained while it is filled.

    Word j of row i lies in memory ``(i + j) mod N`` at address i. The words of a row are thus in N
    different memories, and so are those of a column (word j of every row): either is moved in one
    cycle by N small memories of 2N words (distributed RAM) and a rotator on each side.

    Parameters
    ----------
    lanes : N, a power of two
    info : layout of what goes with a tile; a struct that has `turn` in its `settings`: high:
        `request` reads columns of what `write` wrote as rows; low: it reads the rows themselves,
        as a FIFO would
    user : layout of what goes with a read

    Members
    -------
    write : In(stream of {index, words, mask, row_end, commit, info}); writes the words of row
        `index` that `mask` names; `row_end` ends the row and `commit` the tile. Rows come in
        order. `info` is the same with every row of a tile. Ready while the tile to be filled is
        free.
    full : Out(1), there is something to read: a whole tile, or a row of one that is not turned;
        its info is on `info`
    info : Out(info), valid with `full`
    request : In(stream of {index, release, user}); reads a column (or row, in order); ready only
        while `full`; `release` frees the tile. Every tile is released once, with its last column.
    response : Out(stream of {words, user}), one for each request, in order

    Latency: a committed tile, or a row, can be read in the next cycle; response one cycle after
    request.
    Throughput: one row and one column per cycle.
    """

    def __init__(self, *, lanes: int, info: data.Layout, user: data.Layout) -> None:
        self._lanes = lanes
        self._log = lanes.bit_length() - 1
        words = data.ArrayLayout(unsigned(32), lanes)
        super().__init__(
            {
                "write": In(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "words": words,
                                "index": unsigned(self._log),
                                "mask": unsigned(lanes),
                                "row_end": unsigned(1),
                                "commit": unsigned(1),
                                "info": info,
                            }
                        )
                    )
                ),
                "full": Out(1),
                "info": Out(info),
                "request": In(
                    stream.Signature(
                        data.StructLayout(
                            {"index": unsigned(self._log), "release": unsigned(1), "user": user}
                        )
                    )
                ),
                "response": Out(
                    stream.Signature(data.StructLayout({"words": words, "user": user}))
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes, log = self._lanes, self._log
        full = Signal(2)
        infos = [Signal(self.info.shape(), name=f"info{half}") for half in range(2)]
        filling = Signal()
        draining = Signal()
        rows = Signal(range(lanes))  # complete ones of the tile that is being filled

        write, request = self.write.payload, self.request.payload
        turn = self.info.settings.turn
        writing = Signal()
        reading = Signal()
        m.d.comb += [
            self.write.ready.eq(~full.bit_select(filling, 1)),
            writing.eq(self.write.valid & self.write.ready),
            self.full.eq(
                full.bit_select(draining, 1)
                | ((filling == draining) & ~turn & (self.request.payload.index < rows))
            ),
            self.info.eq(Array(infos)[draining]),
            self.request.ready.eq(self.full & (~self.response.valid | self.response.ready)),
            reading.eq(self.request.valid & self.request.ready),
        ]
        # `full` may be high for both, or for the one that is being drained; of the one being filled
        # it is low.
        for half in range(2):
            with m.If(writing & (filling == half)):
                m.d.sync += infos[half].eq(write.info)
                with m.If(write.commit):
                    m.d.sync += full[half].eq(1)
            with m.If(reading & request.release & (draining == half)):
                m.d.sync += full[half].eq(0)
        with m.If(writing & write.row_end):
            m.d.sync += rows.eq(Mux(write.commit, 0, rows + 1))
        m.d.sync += [
            filling.eq(filling ^ (writing & write.commit)),
            draining.eq(draining ^ (reading & request.release)),
        ]

        place = Signal(log)
        m.d.comb += place.eq(Mux(write.info.settings.turn, write.index, 0))
        words = rotate_up(m, write.words.as_value(), place, unit=32, name="write_words")
        mask = rotate_up(m, write.mask, place, unit=1, name="write_mask")
        found = []
        for bank in range(lanes):
            m.submodules[f"bank{bank}"] = ram = memory.Memory(
                shape=unsigned(32), depth=2 * lanes, init=[]
            )
            port = ram.write_port()
            m.d.comb += [
                port.addr.eq(Cat(write.index, filling)),
                port.data.eq(words.word_select(bank, 32)),
                port.en.eq(writing & mask[bank]),
            ]
            out = ram.read_port(domain="comb")
            row = Signal(log, name=f"row{bank}")
            m.d.comb += [
                row.eq(Mux(turn, bank - request.index, request.index)),
                out.addr.eq(Cat(row, draining)),
            ]
            found.append(out.data)
        back = Signal(log)
        m.d.comb += back.eq(Mux(turn, request.index, 0))
        turned = rotate_down(m, Cat(*found), back, unit=32, name="read_words")
        with m.If(self.response.ready):
            m.d.sync += self.response.valid.eq(0)
        with m.If(reading):
            m.d.sync += [
                self.response.valid.eq(1),
                self.response.payload.words.as_value().eq(turned),
                self.response.payload.user.eq(request.user),
            ]
        return m
