"""Access patterns: from an instruction's operand to a stream of columns, and back."""

import functools

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .isa import SPECS, EngineKind, Opcode, Space, field_of, operand_counts
from .ports import READ_LATENCY, ReadPort, WritePort, column_shape
from .queue import Direct, queue_of

#: Bits of a word address.
ADDRESS_BITS = 24


def walk_layout(width: int) -> data.StructLayout:
    """A walk of numbers of `width` bits: step (i0, i1, i2, i3), index 3 innermost, gives
    ``base + sum(i[d] * strides[d])``."""
    return data.StructLayout(
        {
            "base": unsigned(width),
            "strides": data.ArrayLayout(signed(16), 4),
            "counts": data.ArrayLayout(unsigned(16), 4),
            "space": Space,
        }
    )


#: A checked access pattern: a walk of word addresses in a memory.
Pattern = walk_layout(ADDRESS_BITS)


def pattern(operand: data.View, counts: data.View) -> data.View:
    """Builds the `Pattern` of an instruction's operand."""
    return data.View(
        Pattern,
        Cat(operand.base, operand.strides.as_value(), counts.as_value(), operand.space.as_value()),
    )


def operand_walk(m: Module, word: Value, operand: str, kind: EngineKind) -> Value:
    """The pattern that an operand of the instruction `word` of an elementwise engine walks."""
    two = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, word)
    walk = Signal(Pattern, name=f"{operand}_walk")
    m.d.comb += walk.eq(pattern(getattr(two.body, operand), two.body.counts))
    counts = list(two.body.counts)
    for opcode, spec in SPECS.items():
        if spec.kind is not kind or operand not in spec.operands:
            continue
        walked = operand_counts(opcode, operand, counts, functools.partial(field_of, word, opcode))
        others = [d for d in range(4) if walked[d] is not counts[d]]
        if others:
            with m.If(two.header.opcode == opcode):
                m.d.comb += [walk.counts[d].eq(walked[d]) for d in others]
    return walk


class AddressGenerator(wiring.Component):
    """Walks a pattern: one address per cycle.

    Parameters
    ----------
    width : bits of an address, modulo which it is worked out

    Members
    -------
    start : In(stream of `walk_layout`); taken when idle, or in the cycle in which the last address
        of the pattern before it is taken, so that patterns follow each other without a bubble.
    address : Out(stream of {address, following, last, space}); first valid one cycle after `start`
        is taken. `following` is the next address, if there is one.

    Throughput: one address per cycle. No multiplier: a running address is kept per nesting level.
    """

    def __init__(self, *, width: int = ADDRESS_BITS) -> None:
        self._width = width
        super().__init__(
            {
                "start": In(stream.Signature(walk_layout(width))),
                "address": Out(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "address": unsigned(width),
                                "following": unsigned(width),
                                "last": unsigned(1),
                                "space": Space,
                            }
                        )
                    )
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        active = Signal()
        current = Signal(walk_layout(self._width), reset_less=True)
        #: address at which each level started
        levels = Signal(data.ArrayLayout(unsigned(self._width), 4), reset_less=True)
        index = Signal(data.ArrayLayout(unsigned(16), 4), reset_less=True)

        ends = [Signal(name=f"end{d}") for d in range(4)]
        for d in range(4):
            m.d.comb += ends[d].eq(index[d] == current.counts[d] - 1)
        last = ends[0] & ends[1] & ends[2] & ends[3]

        m.d.comb += [
            self.address.valid.eq(active),
            self.address.payload.address.eq(levels[3]),
            self.address.payload.last.eq(last),
            self.address.payload.space.eq(current.space),
            self.start.ready.eq(~active | (self.address.ready & last)),
        ]
        # The innermost level that is not at its end steps; those inside it start again there.
        following = self.address.payload.following
        go = active & self.address.ready
        with m.If(go & last):
            m.d.sync += active.eq(0)
        for d in range(4):
            inner_end = Cat(*ends[d + 1 :]).all() if d < 3 else 1
            with m.If(inner_end & ~ends[d]):
                m.d.comb += following.eq(levels[d] + current.strides[d])
                with m.If(go):
                    m.d.sync += index[d].eq(index[d] + 1)
                    for inner in range(d, 4):
                        m.d.sync += levels[inner].eq(following)
                    for inner in range(d + 1, 4):
                        m.d.sync += index[inner].eq(0)
        with m.If(self.start.valid & self.start.ready):
            m.d.sync += [active.eq(1), current.eq(self.start.payload)]
            for d in range(4):
                m.d.sync += [levels[d].eq(self.start.payload.base), index[d].eq(0)]
        return m


class ReadStreamer(wiring.Component):
    """Reads the columns of a pattern from SBUF or PSUM.

    Parameters
    ----------
    psum : whether there is a PSUM port
    depth : columns requested and not yet taken, at most. The least, READ_LATENCY + 2, is what one
        column per cycle needs; more let a streamer run ahead of another that is read beside it
    direct : columns are offered in the cycle in which the memory returns them, not one later

    Members
    -------
    start : In(stream of Pattern), as `AddressGenerator.start`
    sbuf, psum : Out(ReadPort)
    columns : Out(stream of {data, last}); the first is valid 4 cycles after `start` is taken, 3 if
        `direct`, if the memory does not stall.

    Throughput: one column per cycle.
    """

    def __init__(
        self,
        config: CoreConfig,
        *,
        psum: bool = False,
        depth: int = READ_LATENCY + 2,
        direct: bool = False,
    ) -> None:
        self._config = config
        self._psum = psum
        self._direct = direct
        self._depth = depth
        members = {
            "start": In(stream.Signature(Pattern)),
            "sbuf": Out(ReadPort(config, config.sbuf_depth)),
            "columns": Out(
                stream.Signature(
                    data.StructLayout({"data": column_shape(config), "last": unsigned(1)})
                )
            ),
        }
        if psum:
            members["psum"] = Out(ReadPort(config, config.psum_depth))
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.addresses = addresses = AddressGenerator()
        wiring.connect(m, wiring.flipped(self.start), addresses.start)

        width = 32 * self._config.lanes
        m.submodules.buffer = buffer = (Direct if self._direct else queue_of)(
            width + 1, self._depth
        )
        free = Signal(range(self._depth + 1), init=self._depth)
        request = addresses.address
        go = Signal()
        m.d.comb += go.eq(request.valid & free.any())

        taken = Signal()
        ports = [(self.sbuf, Space.SBUF)] + ([(self.psum, Space.PSUM)] if self._psum else [])
        for port, space in ports:
            here = request.payload.space == space if self._psum else 1
            m.d.comb += [
                port.request.payload.eq(request.payload.address),
                port.request.valid.eq(go & here),
            ]
            with m.If(here):
                m.d.comb += taken.eq(go & port.request.ready)
        m.d.comb += request.ready.eq(taken)

        # What was taken READ_LATENCY cycles ago arrives now.
        in_flight = Signal(data.ArrayLayout(2, READ_LATENCY))
        m.d.sync += in_flight[0].eq(Cat(request.payload.last, request.payload.space == Space.PSUM))
        for stage in range(1, READ_LATENCY):
            m.d.sync += in_flight[stage].eq(in_flight[stage - 1])
        arriving = in_flight[READ_LATENCY - 1]
        word = self.sbuf.response.payload.as_value()
        valid = self.sbuf.response.valid
        if self._psum:
            word = Mux(arriving[1], self.psum.response.payload.as_value(), word)
            valid = valid | self.psum.response.valid
        m.d.comb += [
            buffer.w_data.eq(Cat(word, arriving[0])),
            buffer.w_en.eq(valid),
            self.columns.valid.eq(buffer.r_rdy),
            self.columns.payload.last.eq(buffer.r_data[-1]),
            self.columns.payload.data.eq(buffer.r_data[:-1]),
            buffer.r_en.eq(self.columns.ready),
        ]
        popped = self.columns.valid & self.columns.ready
        m.d.sync += free.eq(free - taken + popped)
        return m


class WriteStreamer(wiring.Component):
    """Writes a stream of columns to a pattern in SBUF or PSUM.

    Parameters
    ----------
    psum : whether there is a PSUM port
    direct : a column is offered to the memory in the cycle in which it comes, not one later

    Members
    -------
    start : In(stream of Pattern), as `AddressGenerator.start`
    columns : In(stream of {data, mask}); `ready` comes from a register. One is taken for each
        step of the pattern; a pattern's columns may be offered from the cycle after its start.
    sbuf, psum : Out(WritePort)
    done : Out(1), high for one cycle after the last write of a pattern was accepted.

    Throughput: one column per cycle.
    """

    def __init__(self, config: CoreConfig, *, psum: bool = False, direct: bool = False) -> None:
        self._config = config
        self._psum = psum
        self._direct = direct
        members = {
            "start": In(stream.Signature(Pattern)),
            "columns": In(
                stream.Signature(
                    data.StructLayout(
                        {"data": column_shape(config), "mask": unsigned(config.lanes)}
                    )
                )
            ),
            "sbuf": Out(WritePort(config, config.sbuf_depth)),
            "done": Out(1),
        }
        if psum:
            members["psum"] = Out(WritePort(config, config.psum_depth))
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.addresses = addresses = AddressGenerator()
        wiring.connect(m, wiring.flipped(self.start), addresses.start)

        shape = self.columns.payload.shape()
        m.submodules.buffer = buffer = (Direct if self._direct else queue_of)(shape.size, 2)
        m.d.comb += [
            buffer.w_data.eq(self.columns.payload.as_value()),
            buffer.w_en.eq(self.columns.valid),
            self.columns.ready.eq(buffer.w_rdy),
        ]
        column = data.View(shape, buffer.r_data)
        address = addresses.address
        go = Signal()
        taken = Signal()
        m.d.comb += go.eq(address.valid & buffer.r_rdy)
        ports = [(self.sbuf, Space.SBUF)] + ([(self.psum, Space.PSUM)] if self._psum else [])
        for port, space in ports:
            here = address.payload.space == space if self._psum else 1
            m.d.comb += [
                port.request.valid.eq(go & here),
                port.request.payload.address.eq(address.payload.address),
                port.request.payload.data.eq(column.data),
                port.request.payload.mask.eq(column.mask),
            ]
            with m.If(here):
                m.d.comb += taken.eq(go & port.request.ready)
        m.d.comb += [address.ready.eq(taken), buffer.r_en.eq(taken)]
        m.d.sync += self.done.eq(taken & address.payload.last)
        return m


def elementwise_ports(config: CoreConfig) -> dict[str, wiring.Member]:
    """Members of an engine that reads two operands and writes one, each from SBUF or PSUM:
    src0_sbuf, src0_psum, src1_sbuf, src1_psum and dst_sbuf, dst_psum."""
    members = {}
    for memory, depth in (("sbuf", config.sbuf_depth), ("psum", config.psum_depth)):
        for source in ("src0", "src1"):
            members[f"{source}_{memory}"] = Out(ReadPort(config, depth))
        members[f"dst_{memory}"] = Out(WritePort(config, depth))
    return members


#: Columns that a source of an elementwise engine may be ahead by. Two sources that ask for the same
#: bank part by a cycle, and whoever leads needs room to stay ahead: with the least depth both would
#: lose every fifth cycle. Memories of FPGAs have the room anyway.
_AHEAD = 8


def place_streamers(
    m: Module, engine: wiring.Component, config: CoreConfig, *, direct: bool = False
) -> tuple[ReadStreamer, ReadStreamer, WriteStreamer]:
    """Places the streamers src0, src1 and dst behind an engine's `elementwise_ports`."""
    streamers = (
        ReadStreamer(config, psum=True, depth=_AHEAD, direct=direct),
        ReadStreamer(config, psum=True, depth=_AHEAD, direct=direct),
        WriteStreamer(config, psum=True, direct=direct),
    )
    for name, streamer in zip(("src0", "src1", "dst"), streamers, strict=True):
        m.submodules[name] = streamer
        wiring.connect(m, streamer.sbuf, wiring.flipped(getattr(engine, f"{name}_sbuf")))
        wiring.connect(m, streamer.psum, wiring.flipped(getattr(engine, f"{name}_psum")))
    return streamers
