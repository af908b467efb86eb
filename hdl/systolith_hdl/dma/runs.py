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
    start : In(1), starts at the point zero in the next cycle; only when `busy` is low
    counts : In(16 bits x levels), at least 1; stable while busy
    base, strides : In(48 bits), In(33 bits signed x levels), stable while busy; with `addresses`
    point : Out(stream of {address, ends}); bit d of `ends` is high when index d is at its last
    busy : Out(1), high from `start` until the last point was taken

    No multiplier: a running address is kept for each level.
    """

    def __init__(self, levels: int, *, addresses: bool) -> None:
        self._levels = levels
        self._addresses = addresses
        fields = {"ends": unsigned(levels)}
        members = {
            "start": In(1),
            "counts": In(data.ArrayLayout(unsigned(16), levels)),
            "busy": Out(1),
        }
        if addresses:
            fields["address"] = unsigned(ADDRESS_BITS)
            members["base"] = In(ADDRESS_BITS)
            members["strides"] = In(data.ArrayLayout(signed(33), levels))
        members["point"] = Out(stream.Signature(data.StructLayout(fields)))
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        levels = self._levels
        left = Signal(data.ArrayLayout(unsigned(16), levels))
        ends = Signal(levels)
        m.d.comb += [
            ends.eq(Cat(left[d] == 0 for d in range(levels))),
            self.point.valid.eq(self.busy),
            self.point.payload.ends.eq(ends),
        ]
        # steps[d]: index d advances and all those inside it start again.
        steps = [Cat(~ends[d], ends[d + 1 :]).all() for d in range(levels)]
        with m.If(self.start):
            m.d.sync += self.busy.eq(1)
            for d in range(levels):
                m.d.sync += left[d].eq(self.counts[d] - 1)
        with m.Elif(self.busy & self.point.ready):
            with m.If(ends.all()):
                m.d.sync += self.busy.eq(0)
            for d in range(levels):
                with m.If(steps[d]):
                    m.d.sync += left[d].eq(left[d] - 1)
                    for inner in range(d + 1, levels):
                        m.d.sync += left[inner].eq(self.counts[inner] - 1)
        if not self._addresses:
            return m

        # at[d] is the address at which the current pass of level d's inside began.
        at = Signal(data.ArrayLayout(unsigned(ADDRESS_BITS), levels))
        origin = Signal(ADDRESS_BITS)
        stride = Signal(signed(33))
        moved = Signal(ADDRESS_BITS)
        m.d.comb += [
            moved.eq(origin + stride),
            self.point.payload.address.eq(at[levels - 1]),
        ]
        for d in range(levels):
            with m.If(steps[d]):
                m.d.comb += [origin.eq(at[d]), stride.eq(self.strides[d])]
        with m.If(self.start):
            for d in range(levels):
                m.d.sync += at[d].eq(self.base)
        with m.Elif(self.busy & self.point.ready):
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
    run : In(stream of {address, bytes}); bytes at least 1
    burst : Out(stream of {beat, len}); `beat` is the address in beats, `len` beats less one
    busy : Out(1), a run is not wholly split yet

    Throughput: one burst per cycle, runs follow each other without a bubble. Latency: 1 cycle.
    """

    def __init__(self, *, beat_bytes: int) -> None:
        self._log_beat = beat_bytes.bit_length() - 1
        super().__init__(
            {
                "run": In(
                    stream.Signature(
                        data.StructLayout(
                            {"address": unsigned(ADDRESS_BITS), "bytes": unsigned(RUN_BYTES_BITS)}
                        )
                    )
                ),
                "burst": Out(
                    stream.Signature(
                        data.StructLayout(
                            {"beat": unsigned(ADDRESS_BITS - self._log_beat), "len": unsigned(4)}
                        )
                    )
                ),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        log_beat = self._log_beat
        beat = Signal(ADDRESS_BITS - log_beat)
        more = Signal(RUN_BYTES_BITS - log_beat + 1)  # beats of the run after this one
        in_block = Signal(4)  # beats of the block after this one
        last = Signal()
        m.d.comb += [
            in_block.eq(~beat[:4]),
            last.eq(more <= in_block),
            self.burst.valid.eq(self.busy),
            self.burst.payload.beat.eq(beat),
            self.burst.payload.len.eq(Mux(last, more, in_block)),
            self.run.ready.eq(~self.busy | (self.burst.ready & last)),
        ]
        with m.If(self.busy & self.burst.ready):
            m.d.sync += [
                beat[4:].eq(beat[4:] + 1),
                beat[:4].eq(0),
                more.eq(more - in_block - 1),
                self.busy.eq(~last),
            ]
        with m.If(self.run.valid & self.run.ready):
            run = self.run.payload
            m.d.sync += [
                self.busy.eq(1),
                beat.eq(run.address[log_beat:]),
                more.eq((run.address[:log_beat] + run.bytes - 1)[log_beat:]),
            ]
        return m
