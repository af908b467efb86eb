"""The DRAM side of a DMA instruction: nested addresses, contiguous runs, AXI bursts."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

ADDRESS_BITS = 48
#: Bursts end at multiples of this many beats. AXI4 lets none cross 4 KB, and 16 beats of the
#: widest bus are 2 KB, so these never do.
BLOCK_BEATS = 16
#: Longest run: 65535 columns of 128 lanes of 4 bytes.
RUN_BYTES_BITS = 26


class Nest(wiring.Component):
    """Walks nested counts, index 0 outermost, one point per cycle.

    Parameters
    ----------
    levels : number of nested counts
    addresses : whether a strided address goes with the indices

    Members
    -------
    start : In(stream of {counts, base, strides}): `counts` 16 bits x levels, at least 1; `base` 48
        bits and `strides` 33 bits signed x levels only with `addresses`. Taken when there is no
        point left, or in the cycle in which the last one is taken.
    point : Out(stream of {address, ends}); bit d of `ends` is high when index d is at its last.
        The first is valid in the cycle after `start` is taken.

    Throughput: one point per cycle, walks follow each other without a bubble. No multiplier: a
    running address is kept for each level.
    """

    def __init__(self, levels: int, *, addresses: bool) -> None:
        self._levels = levels
        self._addresses = addresses
        walk: dict[str, object] = {"counts": data.ArrayLayout(unsigned(16), levels)}
        point: dict[str, object] = {"ends": unsigned(levels)}
        if addresses:
            walk["base"] = unsigned(ADDRESS_BITS)
            walk["strides"] = data.ArrayLayout(signed(33), levels)
            point["address"] = unsigned(ADDRESS_BITS)
        super().__init__(
            {
                "start": In(stream.Signature(data.StructLayout(walk))),
                "point": Out(stream.Signature(data.StructLayout(point))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        levels = self._levels
        busy = Signal()
        walk = self.start.payload
        # `again` holds the counts less one.
        again = Signal(data.ArrayLayout(unsigned(16), levels), reset_less=True)
        left = Signal(data.ArrayLayout(unsigned(16), levels), reset_less=True)
        ends = Signal(levels)
        starting = Signal()
        m.d.comb += [
            ends.eq(Cat(left[d] == 0 for d in range(levels))),
            self.point.valid.eq(busy),
            self.point.payload.ends.eq(ends),
            self.start.ready.eq(~busy | (self.point.ready & ends.all())),
            starting.eq(self.start.valid & self.start.ready),
        ]
        # steps[d]: index d advances and all those inside it start again.
        steps = [Cat(~ends[d], ends[d + 1 :]).all() for d in range(levels)]
        with m.If(starting):
            m.d.sync += busy.eq(1)
            for d in range(levels):
                m.d.sync += [left[d].eq(walk.counts[d] - 1), again[d].eq(walk.counts[d] - 1)]
        with m.Elif(busy & self.point.ready):
            with m.If(ends.all()):
                m.d.sync += busy.eq(0)
            for d in range(levels):
                with m.If(steps[d]):
                    m.d.sync += left[d].eq(left[d] - 1)
                    for inner in range(d + 1, levels):
                        m.d.sync += left[inner].eq(again[inner])
        if not self._addresses:
            return m

        # at[d] is the address at which the current pass of level d's inside began.
        at = Signal(data.ArrayLayout(unsigned(ADDRESS_BITS), levels), reset_less=True)
        strides = Signal(data.ArrayLayout(signed(33), levels), reset_less=True)
        origin = Signal(ADDRESS_BITS)
        stride = Signal(signed(33))
        moved = Signal(ADDRESS_BITS)
        m.d.comb += [
            moved.eq(origin + stride),
            self.point.payload.address.eq(at[levels - 1]),
        ]
        for d in range(levels):
            with m.If(steps[d]):
                m.d.comb += [origin.eq(at[d]), stride.eq(strides[d])]
        with m.If(starting):
            m.d.sync += strides.eq(walk.strides)
            for d in range(levels):
                m.d.sync += at[d].eq(walk.base)
        with m.Elif(busy & self.point.ready):
            for d in range(levels):
                with m.If(steps[d]):
                    for inner in range(d, levels):
                        m.d.sync += at[inner].eq(moved)
        return m


class BurstSplitter(wiring.Component):
    """Cuts contiguous runs into AXI bursts.

    A burst ends at the next multiple of `BLOCK_BEATS` beats or at the end of the run, so it never
    crosses 4 KB; its address is that of its first beat, a multiple of the beat.

    Parameters
    ----------
    beat_bytes : bytes of a data beat, a power of two

    Members
    -------
    run : In(stream of {address, bytes, last}); bytes at least 1
    burst : Out(stream of {beat, len, last}); `beat` is the address in beats, `len` beats less one;
        `last` is high with the last burst of a run that had it

    Throughput: one burst per cycle, runs follow each other without a bubble. Latency: 1 cycle.
    """

    def __init__(self, *, beat_bytes: int) -> None:
        self._log_beat = beat_bytes.bit_length() - 1
        super().__init__(
            {
                "run": In(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "address": unsigned(ADDRESS_BITS),
                                "bytes": unsigned(RUN_BYTES_BITS),
                                "last": unsigned(1),
                            }
                        )
                    )
                ),
                "burst": Out(
                    stream.Signature(
                        data.StructLayout(
                            {
                                "beat": unsigned(ADDRESS_BITS - self._log_beat),
                                "len": unsigned(4),
                                "last": unsigned(1),
                            }
                        )
                    )
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        busy = Signal()
        last_run = Signal()
        log_beat = self._log_beat
        beat = Signal(ADDRESS_BITS - log_beat, reset_less=True)
        # Beats of the run after this one.
        more = Signal(RUN_BYTES_BITS - log_beat + 1, reset_less=True)
        in_block = Signal(4)  # beats of the block after this one
        last = Signal()
        m.d.comb += [
            in_block.eq(~beat[:4]),
            last.eq(more <= in_block),
            self.burst.valid.eq(busy),
            self.burst.payload.beat.eq(beat),
            self.burst.payload.len.eq(Mux(last, more, in_block)),
            self.burst.payload.last.eq(last & last_run),
            self.run.ready.eq(~busy | (self.burst.ready & last)),
        ]
        with m.If(busy & self.burst.ready):
            m.d.sync += [
                beat[4:].eq(beat[4:] + 1),
                beat[:4].eq(0),
                more.eq(more - in_block - 1),
                busy.eq(~last),
            ]
        with m.If(self.run.valid & self.run.ready):
            run = self.run.payload
            m.d.sync += [
                busy.eq(1),
                last_run.eq(run.last),
                beat.eq(run.address[log_beat:]),
                more.eq((run.address[:log_beat] + run.bytes - 1)[log_beat:]),
            ]
        return m
