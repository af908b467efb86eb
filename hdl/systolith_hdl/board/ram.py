"""Device DRAM made of block RAM."""

from amaranth.hdl import Const, Module, Shape, Signal, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..ports import axi4

_OKAY, _DECERR = 0, 3


class AxiRam(wiring.Component):
    """Block RAM as an AXI4 subordinate, with a second port for the host.

    Parameters
    ----------
    size : bytes, a multiple of 4096
    id_width : bits of the IDs

    Members
    -------
    axi : In(axi4); INCR bursts whose beats have the width of the bus, at addresses that are
        multiples of it. One burst at a time in each direction; a beat of an address outside is
        answered DECERR, and the response of a write burst with one.
    host : In(stream of {word, write, data}), 32-bit words; goes before the beats of `axi`
    read : Out(stream of 32 bits, always ready): what the host asked for, the cycle after its
        request was taken

    Latency: the first beat of a read is offered 2 cycles after its address was taken. Throughput:
    one beat per cycle in each direction, and one word per cycle of the host instead.
    """

    def __init__(self, config: CoreConfig, *, size: int, id_width: int) -> None:
        if size < 4096 or size % 4096:
            raise ValueError(f"size must be a multiple of 4096 bytes, not {size!r}")
        self._bytes = config.axi_bytes
        self._beats = size // config.axi_bytes
        super().__init__(
            {
                "axi": In(axi4(config, id_width=id_width)),
                "host": In(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "word": Shape.cast(range(size // 4)),
                                "write": unsigned(1),
                                "data": unsigned(32),
                            }
                        )
                    )
                ),
                "read": Out(stream.Signature(unsigned(32), always_ready=True)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        words = self._bytes // 4
        log_words = words.bit_length() - 1
        m.submodules.ram = ram = memory.Memory(
            shape=unsigned(8 * self._bytes), depth=self._beats, init=[]
        )
        out, into = ram.read_port(), ram.write_port(granularity=8)
        host = self.host
        part = host.payload.word[:log_words]
        place = host.payload.word[log_words:]
        beat = self._bytes.bit_length() - 1

        # -- Writes.
        aw, w, b = self.axi.aw, self.axi.w, self.axi.b
        writing = Signal()
        position = Signal(48 - beat)
        outside = Signal()
        m.d.comb += [
            outside.eq(position >= self._beats),
            aw.ready.eq(~writing & ~b.valid),
            w.ready.eq(writing & ~(host.valid & host.payload.write)),
        ]
        with m.If(aw.valid & aw.ready):
            m.d.sync += [
                writing.eq(1),
                position.eq(aw.payload.addr[beat:]),
                b.payload.id.eq(aw.payload.id),
                b.payload.resp.eq(_OKAY),
            ]
        with m.If(w.valid & w.ready):
            m.d.sync += position.eq(position + 1)
            with m.If(outside):
                m.d.sync += b.payload.resp.eq(_DECERR)
            with m.If(w.payload.last):
                m.d.sync += [writing.eq(0), b.valid.eq(1)]
        with m.If(b.valid & b.ready):
            m.d.sync += b.valid.eq(0)
        m.d.comb += [
            into.addr.eq(position),
            into.data.eq(w.payload.data),
        ]
        with m.If(w.valid & w.ready & ~outside):
            m.d.comb += into.en.eq(w.payload.strb)
        with m.If(host.valid & host.payload.write):
            m.d.comb += [
                into.addr.eq(place),
                into.data.eq(host.payload.data.replicate(words)),
                into.en.eq(Const(0xF, 4 * words) << (part << 2) if words > 1 else 0xF),
            ]

        # -- Reads: the output register of the RAM is the register of the channel.
        ar, r = self.axi.ar, self.axi.r
        reading = Signal()
        source = Signal(48 - beat)
        left = Signal(8)
        owner = Signal.like(ar.payload.id)
        free = Signal()
        asked = Signal()
        wants = host.valid & ~host.payload.write
        m.d.comb += [
            free.eq(~r.valid | r.ready),
            ar.ready.eq(~reading),
            out.addr.eq(source),
            asked.eq(reading & free & ~wants),
            out.en.eq(free),
            host.ready.eq(host.payload.write | free),
            r.payload.data.eq(out.data),
        ]
        with m.If(wants):
            m.d.comb += out.addr.eq(place)
        with m.If(ar.valid & ar.ready):
            m.d.sync += [
                reading.eq(1),
                source.eq(ar.payload.addr[beat:]),
                left.eq(ar.payload.len),
                owner.eq(ar.payload.id),
            ]
        with m.If(free):
            m.d.sync += r.valid.eq(asked)
        with m.If(asked):
            m.d.sync += [
                source.eq(source + 1),
                left.eq(left - 1),
                r.payload.id.eq(owner),
                r.payload.last.eq(left == 0),
                r.payload.resp.eq(_OKAY),
            ]
            with m.If(source >= self._beats):
                m.d.sync += r.payload.resp.eq(_DECERR)
            with m.If(left == 0):
                m.d.sync += reading.eq(0)
        which = Signal(max(log_words, 1))
        m.d.sync += [self.read.valid.eq(wants & free), which.eq(part)]
        m.d.comb += self.read.payload.eq(out.data.word_select(which, 32))
        return m
