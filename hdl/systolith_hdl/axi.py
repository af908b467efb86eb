"""Arbiters that merge requesters onto the core's one AXI4 manager, and its pins."""

from amaranth.hdl import Array, Cat, Const, Module, Signal, unsigned
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out

from .banked import RoundRobin, one_hot_mux
from .config import CoreConfig
from .ports import axi4_read, axi4_write


def id_bits(requesters: int) -> int:
    """Bits of an ID that tells `requesters` apart; at least one."""
    return max(1, (requesters - 1).bit_length())


def axi_id_width(config: CoreConfig) -> int:
    """Bits of the core's AXI IDs: one for each instruction fetcher and each DMA queue."""
    return id_bits(len(config.engines) + config.dma_queues)


def _encode(m: Module, grants: Signal, name: str) -> Signal:
    """Returns the number of the bit set in the one-hot `grants`."""
    number = Signal(id_bits(len(grants)), name=name)
    m.d.comb += number.eq(
        one_hot_mux(grants, [Const(index, len(number)) for index in range(len(grants))])
    )
    return number


class AxiReadArbiter(wiring.Component):
    """Merges read requesters, round-robin per burst; the ID of a burst is its requester's number.

    Parameters
    ----------
    requesters : how many
    id_width : bits of the manager's ID, `id_bits(requesters)` if None

    Members
    -------
    requester : In(axi4_read with IDs of no bits) x requesters
    bus : Out(axi4_read)
    outstanding : Out(1), a burst accepted from a requester has not been answered wholly

    Latency: one cycle from requester to bus, one from bus to requester. Throughput: one burst and
    one beat per cycle. A requester that does not take its data holds up the data of the others.
    """

    def __init__(self, config: CoreConfig, *, requesters: int, id_width: int | None = None) -> None:
        self._requesters = requesters
        width = id_bits(requesters) if id_width is None else id_width
        if width < id_bits(requesters):
            raise ValueError(f"{requesters} requesters need more than {id_width} bits of ID")
        super().__init__(
            {
                "requester": In(axi4_read(config, id_width=0)).array(requesters),
                "bus": Out(axi4_read(config, id_width=width)),
                "outstanding": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        count = Signal(16)
        accepted = _merge_addresses(
            m, [requester.ar for requester in self.requester], self.bus.ar, permit=1
        )[0]
        answered = Signal()

        # Data: one register, routed by ID behind it.
        r = self.bus.r
        valid = Signal()
        beat = Signal(r.payload.shape(), reset_less=True)
        taken = Signal()
        m.d.comb += r.ready.eq(~valid | taken)
        with m.If(r.ready):
            m.d.sync += [valid.eq(r.valid), beat.eq(r.payload)]
        for index in range(self._requesters):
            channel = self.requester[index].r
            m.d.comb += [
                channel.valid.eq(valid & (beat.id == index)),
                channel.payload.data.eq(beat.data),
                channel.payload.resp.eq(beat.resp),
                channel.payload.last.eq(beat.last),
            ]
            with m.If(beat.id == index):
                m.d.comb += taken.eq(channel.ready)
        m.d.comb += answered.eq(valid & taken & beat.last)
        m.d.sync += count.eq(count + accepted - answered)
        m.d.comb += self.outstanding.eq(count != 0)
        return m


class AxiWriteArbiter(wiring.Component):
    """Merges write requesters, round-robin per burst; the ID of a burst is its requester's number.

    Write data follows in the order in which addresses were granted; data is taken from a requester
    only for a burst that has been accepted from it.

    Parameters
    ----------
    requesters : how many
    id_width : bits of the manager's ID, `id_bits(requesters)` if None
    depth : bursts granted whose data has not wholly passed, at most

    Members
    -------
    requester : In(axi4_write with IDs of no bits) x requesters; always ready to take responses
    bus : Out(axi4_write)
    outstanding : Out(1), a burst accepted from a requester has not been answered

    Latency: one cycle from requester to bus, one from bus to requester; data at least two cycles
    after its address was accepted. Throughput: one burst and one beat per cycle. A requester that
    is late with its data holds up the data of the others.
    """

    def __init__(
        self,
        config: CoreConfig,
        *,
        requesters: int,
        id_width: int | None = None,
        depth: int = 16,
    ) -> None:
        self._requesters = requesters
        self._depth = depth
        width = id_bits(requesters) if id_width is None else id_width
        if width < id_bits(requesters):
            raise ValueError(f"{requesters} requesters need more than {id_width} bits of ID")
        super().__init__(
            {
                "requester": In(axi4_write(config, id_width=0)).array(requesters),
                "bus": Out(axi4_write(config, id_width=width)),
                "outstanding": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        count = Signal(16)
        m.submodules.order = order = fifo.SyncFIFO(
            width=id_bits(self._requesters), depth=self._depth
        )
        accepted, number = _merge_addresses(
            m, [requester.aw for requester in self.requester], self.bus.aw, permit=order.w_rdy
        )
        m.d.comb += [order.w_en.eq(accepted), order.w_data.eq(number)]

        w = self.bus.w
        free = Signal()
        data = Signal.like(w.payload, reset_less=True)
        m.d.comb += [free.eq(~w.valid | w.ready), w.payload.eq(data)]
        with m.If(w.ready):
            m.d.sync += w.valid.eq(0)
        for index in range(self._requesters):
            channel = self.requester[index].w
            turn = order.r_rdy & (order.r_data == index)
            m.d.comb += channel.ready.eq(turn & free)
            with m.If(channel.valid & channel.ready):
                m.d.sync += [w.valid.eq(1), data.eq(channel.payload)]
                m.d.comb += order.r_en.eq(channel.payload.last)

        b = self.bus.b
        valid = Signal()
        response = Signal(b.payload.shape(), reset_less=True)
        taken = Signal()
        m.d.comb += b.ready.eq(~valid | taken)
        with m.If(b.ready):
            m.d.sync += [valid.eq(b.valid), response.eq(b.payload)]
        for index in range(self._requesters):
            channel = self.requester[index].b
            m.d.comb += [
                channel.valid.eq(valid & (response.id == index)),
                channel.payload.resp.eq(response.resp),
            ]
            with m.If(response.id == index):
                m.d.comb += taken.eq(channel.ready)
        m.d.sync += count.eq(count + accepted - (valid & taken))
        m.d.comb += self.outstanding.eq(count != 0)
        return m


def _merge_addresses(m: Module, channels: list, out, *, permit) -> tuple[Signal, Signal]:
    """Grants one of the address `channels` a place in the register before `out`, if `permit`.

    Returns whether one was accepted, and its number.
    """
    m.submodules.arbiter = arbiter = RoundRobin(len(channels))
    free = Signal()
    accepted = Signal()
    number = _encode(m, arbiter.grants, "granted")
    m.d.comb += [
        free.eq((~out.valid | out.ready) & permit),
        arbiter.requests.eq(Cat(channel.valid for channel in channels)),
        arbiter.hold.eq(~free),
        accepted.eq(arbiter.requests.any() & free),
    ]
    for index, channel in enumerate(channels):
        m.d.comb += channel.ready.eq(arbiter.grants[index] & free)
    chosen = Array([channel.payload for channel in channels])[number]
    offer = Signal.like(out.payload, reset_less=True)
    m.d.comb += out.payload.eq(offer)
    with m.If(out.ready):
        m.d.sync += out.valid.eq(0)
    with m.If(accepted):
        m.d.sync += [
            out.valid.eq(1),
            offer.id.eq(number),
            offer.addr.eq(chosen.addr),
            offer.len.eq(chosen.len),
            offer.size.eq(chosen.size),
            offer.burst.eq(chosen.burst),
        ]
    return accepted, number


def axi4_pins(config: CoreConfig, *, id_width: int) -> wiring.Signature:
    """Pins of an AXI4 manager under their names in the standard (``awaddr``, ``rlast`` ...)."""
    bits = 8 * config.axi_bytes
    members: dict[str, wiring.Member] = {}
    for name in ("aw", "ar"):
        members |= {
            f"{name}id": Out(unsigned(id_width)),
            f"{name}addr": Out(48),
            f"{name}len": Out(8),
            f"{name}size": Out(3),
            f"{name}burst": Out(2),
            f"{name}valid": Out(1),
            f"{name}ready": In(1),
        }
    members |= {
        "wdata": Out(bits),
        "wstrb": Out(bits // 8),
        "wlast": Out(1),
        "wvalid": Out(1),
        "wready": In(1),
        "bid": In(unsigned(id_width)),
        "bresp": In(2),
        "bvalid": In(1),
        "bready": Out(1),
        "rid": In(unsigned(id_width)),
        "rdata": In(bits),
        "rresp": In(2),
        "rlast": In(1),
        "rvalid": In(1),
        "rready": Out(1),
    }
    return wiring.Signature(members)


def connect_pins(m: Module, pins, *, read, write) -> None:
    """Connects `axi4_pins` to the `bus` members of a read and a write arbiter."""
    for channel, name in ((write.aw, "aw"), (write.w, "w"), (read.ar, "ar")):
        for field, _ in channel.payload.shape():
            m.d.comb += getattr(pins, name + field).eq(channel.payload[field])
        m.d.comb += [
            getattr(pins, f"{name}valid").eq(channel.valid),
            channel.ready.eq(getattr(pins, f"{name}ready")),
        ]
    for channel, name in ((write.b, "b"), (read.r, "r")):
        for field, _ in channel.payload.shape():
            m.d.comb += channel.payload[field].eq(getattr(pins, name + field))
        m.d.comb += [
            channel.valid.eq(getattr(pins, f"{name}valid")),
            getattr(pins, f"{name}ready").eq(channel.ready),
        ]
