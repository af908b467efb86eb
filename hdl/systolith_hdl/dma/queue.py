"""One DMA queue: executes DMA_LOAD and DMA_STORE, one after the other."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, fifo, wiring
from amaranth.lib.wiring import In, Out

from ..access import AddressGenerator, pattern
from ..config import CoreConfig
from ..formats import FORMATS, DType
from ..isa import DMA_TYPES, SPECS, FaultCause, Opcode
from ..ports import READ_LATENCY, IssuePort, ReadPort, WritePort, axi4_read, axi4_write
from .align import ReadAligner, WriteAligner, run_position
from .corner_turn import CornerTurn
from .runs import ADDRESS_BITS, RUN_BYTES_BITS, BurstSplitter, Nest
from .tiles import TileCounter, tile_layout

_BURST_INCR = 1


class FaultPort(wiring.Signature):
    """A fault, seen from the engine that stopped.

    Members
    -------
    valid : Out(1), stays high until reset
    cause : Out(FaultCause), valid with `valid`
    address : Out(48 bits), valid with `valid`; its meaning depends on the cause
    """

    def __init__(self) -> None:
        super().__init__(
            {"valid": Out(1), "cause": Out(FaultCause), "address": Out(unsigned(ADDRESS_BITS))}
        )


class _State(enum.Enum, shape=2):
    IDLE = 0
    PREPARE = 1
    START = 2
    RUN = 3


class DmaQueue(wiring.Component):
    """Copies between device DRAM and SBUF, converting packed floats to words and back.

    Element (i0, i1, i2, i3) of lane l lies at DRAM byte
    ``dram_base + sum(i[d] * dram_strides[d]) + l * lane_stride`` modulo 2**48. An
    element of one byte may lie anywhere; others need an even address, nothing more (FP32 too): bit
    0 of theirs is ignored. Narrow types are widened exactly by a load; a store rounds to nearest
    even, and any NaN to the type's canonical one. Lanes not named keep their words. Elements that
    coincide, in SBUF or in DRAM, are written in the order (i0, i1, i2, i3, l), index 3 inside the
    others and the lane inside that: the last one stays.

    How it moves is decided for each instruction by its strides (E = bytes of an element):

    ========= ============================================== ================================
    mode      when                                           DRAM accesses
    ========= ============================================== ================================
    merged    ``lane_stride == E`` (or one lane) and         one run for each (i0, i1, i2):
              ``dram_strides[3] == lanes * E``               bursts of 16 beats
    columns   ``lane_stride == E`` (or one lane)             one run for each column
    turned    else ``dram_strides[3] == E``; a store also    one run of up to N elements for
              needs ``abs(lane_stride) >= N * E``            each lane and N columns
    single    everything else                                one element each
    ========= ============================================== ================================

    A load with ``lane_stride == 0`` fetches one lane and copies it to all.

    Throughput without stalls, in cycles (W = bytes of a beat): a run takes as many as it touches
    beats, ``ceil((address % W + bytes) / W)``, but not fewer than the steps of W bytes its rows
    have (``ceil(row bytes / W)`` each, a row being N elements or, not turned, one column). The
    SBUF side takes one cycle per column at the same time. Aligned and with N lanes, merged,
    columns and turned thus all move one beat per cycle, but for elements of one byte: N of them,
    that is mostly half a beat. Single moves one element per cycle.
    From taking an instruction to `done`, 15 to 26 cycles come on top, and the latency of DRAM.
    At most `outstanding` bursts are answered per round trip to DRAM, which is what limits runs of
    one beat (columns or turned of narrow types, aligned; single) once the latency exceeds some 50
    cycles.

    Parameters
    ----------
    outstanding : bursts in flight at most, a power of two

    Members
    -------
    issue : In(IssuePort); an instruction is taken when the one before is done, that is when all
        columns of a load have been written or every burst of a store has been answered
    read, write : Out(ReadPort), Out(WritePort) of SBUF
    axi_read, axi_write : Out(axi4_read), Out(axi4_write) with IDs of no bits. Addresses of bursts
        are multiples of a beat; bursts have up to 16 beats and end at multiples of 16 beats. Write
        data may be offered before its address, and after a fault without one: `axi_write` belongs
        behind an `AxiWriteArbiter`, which takes data only for addresses it has accepted.
    stop : In(1), no further bursts are issued while it is high
    active : Out(1), bursts are in flight
    fault : Out(FaultPort); address is that of the burst, as on AxADDR. After an error response no
        burst is issued and no instruction taken until reset; those in flight are finished.
    """

    def __init__(self, config: CoreConfig, *, outstanding: int = 64) -> None:
        if outstanding < 8 or outstanding & (outstanding - 1):
            raise ValueError(f"outstanding must be a power of two from 8 up, not {outstanding!r}")
        self._config = config
        self._outstanding = outstanding
        super().__init__(
            {
                "issue": In(IssuePort()),
                "read": Out(ReadPort(config, config.sbuf_depth)),
                "write": Out(WritePort(config, config.sbuf_depth)),
                "axi_read": Out(axi4_read(config, id_width=0)),
                "axi_write": Out(axi4_write(config, id_width=0)),
                "stop": In(1),
                "active": Out(1),
                "fault": Out(FaultPort()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes
        log_lanes = lanes.bit_length() - 1
        log_beat = config.axi_bytes.bit_length() - 1
        count = unsigned(lanes.bit_length())

        m.submodules.local = local = AddressGenerator()
        m.submodules.tiles = tiles = TileCounter(lanes=lanes)
        m.submodules.nest = nest = Nest(5, addresses=True)
        m.submodules.splitter = splitter = BurstSplitter(beat_bytes=config.axi_bytes)
        m.submodules.read_aligner = read_aligner = ReadAligner(config)
        m.submodules.write_aligner = write_aligner = WriteAligner(config)
        m.submodules.turner = turner = CornerTurn(
            lanes=lanes,
            info=tile_layout(lanes),
            user=data.StructLayout({"length": count, "run_end": 1, "last": 1}),
        )

        # ---------------------------------------------------------------- instruction, settings
        layout = SPECS[Opcode.DMA_LOAD].layout
        instruction = Signal(layout)
        body = instruction.body
        state = Signal(_State)
        finished = Signal()

        store = Signal()
        dtype = Signal(DType)
        log_size = Signal(2)
        turn = Signal()  # rows of a tile are lanes, else columns
        merged = Signal()
        blocks = Signal()  # tiles have up to N columns, else one
        broadcast = Signal()
        last_columns = Signal(count)
        pieces = Signal(16)  # tiles along the innermost dimension
        dense_elements = Signal(24)  # elements of a run when not turned

        log_bytes = Signal(2)
        element_bytes = Signal(4)
        used_lanes = Signal(count)
        inner_stride = body.dram_strides[3]
        lane_stride = body.lane_stride
        dense_lanes = Signal()
        dense_inner = Signal()
        dense_columns = Signal()
        separate = Signal()
        blocked = Signal()
        is_store = Signal()
        m.d.comb += [
            is_store.eq(instruction.header.opcode == Opcode.DMA_STORE),
            element_bytes.eq(1 << log_bytes),
            used_lanes.eq(instruction.header.lanes),
            dense_lanes.eq((lane_stride == element_bytes) | (used_lanes == 1)),
            dense_inner.eq(inner_stride == element_bytes),
            dense_columns.eq(inner_stride == used_lanes << log_bytes),
            # The rows of a turned tile do not overlap: the order in which a store writes them is
            # then of no consequence.
            separate.eq(
                (lane_stride >= (element_bytes << log_lanes))
                | (lane_stride <= -(element_bytes << log_lanes))
            ),
            blocked.eq(dense_lanes | (dense_inner & (separate | ~is_store))),
        ]
        with m.Switch(body.dram_dtype):
            for each in sorted(DMA_TYPES, key=lambda member: member.value):
                with m.Case(each):
                    m.d.comb += log_bytes.eq(FORMATS[each].bytes.bit_length() - 1)
        with m.If(state == _State.PREPARE):
            m.d.sync += [
                store.eq(is_store),
                dtype.eq(body.dram_dtype),
                log_size.eq(log_bytes),
                turn.eq(~dense_lanes),
                merged.eq(dense_lanes & dense_columns),
                blocks.eq(blocked),
                broadcast.eq(~dense_lanes & ~is_store & (lane_stride == 0)),
                last_columns.eq(Mux(blocked, (body.counts[3] - 1)[:log_lanes] + 1, 1)),
                pieces.eq(
                    Mux(blocked, (body.counts[3] + (lanes - 1)) >> log_lanes, body.counts[3])
                ),
                dense_elements.eq(
                    used_lanes * Mux(dense_lanes & dense_columns, body.counts[3], Const(1, 16))
                ),
            ]

        starting = state == _State.START
        m.d.comb += [
            self.issue.instruction.ready.eq((state == _State.IDLE) & ~self.fault.valid),
            self.issue.busy.eq(state != _State.IDLE),
            self.issue.done.eq((state == _State.RUN) & finished & ~self.fault.valid),
        ]
        with m.Switch(state):
            with m.Case(_State.IDLE):
                with m.If(self.issue.instruction.valid & ~self.fault.valid):
                    m.d.sync += [
                        instruction.eq(self.issue.instruction.payload),
                        state.eq(_State.PREPARE),
                    ]
            with m.Case(_State.PREPARE):
                m.d.sync += state.eq(_State.START)
            with m.Case(_State.START):
                # The generator is idle: the instruction before took all of its addresses.
                m.d.sync += state.eq(_State.RUN)
            with m.Case(_State.RUN):
                with m.If(self.issue.done):
                    m.d.sync += state.eq(_State.IDLE)

        rows = Signal(count)  # of a turned tile
        m.d.comb += [
            rows.eq(Mux(broadcast, 1, used_lanes)),
            local.start.valid.eq(starting),
            local.start.payload.eq(pattern(body.local, body.counts)),
            tiles.start.eq(starting),
            tiles.full_columns.eq(Mux(blocks, lanes, 1)),
            tiles.last_columns.eq(last_columns),
            tiles.counts[3].eq(pieces),
            nest.start.eq(starting),
            nest.base.eq(body.dram_base),
            # Innermost dimension: all of it, by columns, or by tiles; then the lanes.
            nest.counts[3].eq(Mux(turn, pieces, Mux(merged, 1, body.counts[3]))),
            nest.strides[3].eq(Mux(turn & blocks, element_bytes << log_lanes, inner_stride)),
            nest.counts[4].eq(Mux(turn, rows, 1)),
            nest.strides[4].eq(lane_stride),
        ]
        for d in range(3):
            m.d.comb += [
                tiles.counts[d].eq(body.counts[d]),
                nest.counts[d].eq(body.counts[d]),
                nest.strides[d].eq(body.dram_strides[d]),
            ]

        # ---------------------------------------------------------------------- runs and bursts
        # A run goes to the splitter, its place to the aligner, in the same cycle.
        position = run_position(config)
        m.submodules.places = places = fifo.SyncFIFO(width=position.size, depth=self._outstanding)
        elements = Signal(24)
        run = splitter.run.payload
        m.d.comb += [
            elements.eq(
                Mux(
                    turn,
                    Mux(nest.point.payload.ends[3], last_columns, tiles.full_columns),
                    dense_elements,
                )
            ),
            run.address.eq(
                Cat(nest.point.payload.address[0] & (log_size == 0), nest.point.payload.address[1:])
            ),
            run.bytes.eq(elements << log_size),
            splitter.run.valid.eq(nest.point.valid & places.w_rdy),
            nest.point.ready.eq(splitter.run.ready & places.w_rdy),
            places.w_en.eq(nest.point.valid & splitter.run.ready),
            places.w_data.eq(run.address[: log_beat + 4]),
        ]
        assert RUN_BYTES_BITS >= 24 + 2
        m.d.comb += [
            read_aligner.run.payload.eq(places.r_data),
            write_aligner.run.payload.eq(places.r_data),
            read_aligner.run.valid.eq(places.r_rdy & ~store),
            write_aligner.run.valid.eq(places.r_rdy & store),
            places.r_en.eq(Mux(store, write_aligner.run.ready, read_aligner.run.ready)),
        ]

        # Bursts in flight, counted from when they are committed to their address channel.
        m.submodules.flying = flying = fifo.SyncFIFO(
            width=ADDRESS_BITS - log_beat, depth=self._outstanding
        )
        ar, aw = self.axi_read.ar, self.axi_write.aw
        burst = splitter.burst
        commit = Signal()
        m.d.comb += [
            burst.ready.eq(
                flying.w_rdy
                & ~self.stop
                & ~self.fault.valid
                & Mux(store, ~aw.valid | aw.ready, ~ar.valid | ar.ready)
            ),
            commit.eq(burst.valid & burst.ready),
            flying.w_en.eq(commit),
            flying.w_data.eq(burst.payload.beat),
            self.active.eq(flying.r_rdy),
        ]
        for channel, mine in ((ar, ~store), (aw, store)):
            m.d.comb += [
                channel.payload.size.eq(log_beat),
                channel.payload.burst.eq(_BURST_INCR),
            ]
            with m.If(channel.ready):
                m.d.sync += channel.valid.eq(0)
            with m.If(commit & mine):
                m.d.sync += [
                    channel.valid.eq(1),
                    channel.payload.addr.eq(Cat(Const(0, log_beat), burst.payload.beat)),
                    channel.payload.len.eq(burst.payload.len),
                ]

        # ---------------------------------------------------------------------------- responses
        r, b = self.axi_read.r, self.axi_write.b
        error = Signal()
        m.d.comb += [
            # After a fault what still comes is dropped.
            read_aligner.beats.valid.eq(r.valid & ~self.fault.valid),
            read_aligner.beats.payload.eq(r.payload.data),
            r.ready.eq(read_aligner.beats.ready | self.fault.valid),
            b.ready.eq(1),
            flying.r_en.eq(Mux(store, b.valid, r.valid & r.ready & r.payload.last)),
            error.eq(
                Mux(
                    store,
                    b.valid & (b.payload.resp != 0),
                    r.valid & r.ready & (r.payload.resp != 0),
                )
            ),
        ]
        with m.If(error & ~self.fault.valid):
            m.d.sync += [
                self.fault.valid.eq(1),
                self.fault.cause.eq(
                    Mux(store, FaultCause.AXI_WRITE_ERROR.value, FaultCause.AXI_READ_ERROR.value)
                ),
                self.fault.address.eq(Cat(Const(0, log_beat), flying.r_data)),
            ]

        # ----------------------------------------------------------------- filling: rows (load)
        m.d.comb += [
            read_aligner.dtype.eq(dtype),
            read_aligner.log_size.eq(log_size),
            read_aligner.turn.eq(turn),
            read_aligner.merged.eq(merged),
            read_aligner.lanes.eq(used_lanes),
            read_aligner.turned_rows.eq(rows),
            read_aligner.tile.valid.eq(tiles.tile.valid & ~store),
            read_aligner.tile.payload.eq(tiles.tile.payload),
            turner.turn.eq(turn),
        ]

        # -------------------------------------------------------------- filling: columns (store)
        # Columns come unasked READ_LATENCY cycles after their request, into a buffer with room.
        depth = READ_LATENCY + 2
        m.submodules.columns = columns = fifo.SyncFIFO(width=32 * lanes, depth=depth)
        room = Signal(range(depth + 1), init=depth)
        column = Signal(log_lanes)
        asked = Signal()
        filling = Signal()
        tile = tiles.tile.payload
        last_column = column == tile.columns - 1
        m.d.comb += [
            self.read.request.valid.eq(store & local.address.valid & (room != 0)),
            self.read.request.payload.eq(local.address.payload.address),
            asked.eq(self.read.request.valid & self.read.request.ready),
            columns.w_en.eq(self.read.response.valid),
            columns.w_data.eq(self.read.response.payload),
            columns.r_en.eq(filling),
            filling.eq(store & columns.r_rdy & tiles.tile.valid & turner.write.ready),
            tiles.tile.ready.eq(Mux(store, filling & last_column, read_aligner.tile.ready)),
        ]
        m.d.sync += room.eq(room - asked + filling)
        with m.If(filling):
            m.d.sync += column.eq(Mux(last_column, 0, column + 1))
        with m.If(store):
            m.d.comb += [
                turner.write.valid.eq(filling),
                turner.write.payload.index.eq(column),
                turner.write.payload.words.eq(columns.r_data),
                turner.write.payload.mask.eq(Const((1 << lanes) - 1, lanes)),
                turner.write.payload.commit.eq(last_column),
                turner.write.payload.info.eq(tile),
            ]
        with m.Else():
            m.d.comb += [
                turner.write.valid.eq(read_aligner.rows.valid),
                turner.write.payload.eq(read_aligner.rows.payload),
                read_aligner.rows.ready.eq(turner.write.ready),
            ]

        # ---------------------------------------------------------------------------- draining
        # A load drains the columns of a tile; a store its rows, which are lanes or columns.
        drained = Signal(log_lanes)
        draining = Signal(count)
        info = turner.info
        request = turner.request
        last_drain = Signal()
        m.d.comb += [
            draining.eq(Mux(store & turn, used_lanes, info.columns)),
            last_drain.eq(drained == draining - 1),
            request.valid.eq(turner.full),
            request.payload.index.eq(drained),
            request.payload.release.eq(last_drain),
            request.payload.user.length.eq(Mux(turn, info.columns, used_lanes)),
            request.payload.user.run_end.eq(~merged | (last_drain & info.ends_inner)),
            request.payload.user.last.eq(last_drain & info.last),
        ]
        with m.If(request.valid & request.ready):
            m.d.sync += drained.eq(Mux(last_drain, 0, drained + 1))

        response = turner.response
        write = self.write.request
        m.d.comb += [
            write.valid.eq(~store & response.valid & local.address.valid),
            write.payload.address.eq(local.address.payload.address),
            write.payload.mask.eq(Cat(lane < used_lanes for lane in range(lanes))),
            write_aligner.dtype.eq(dtype),
            write_aligner.log_size.eq(log_size),
            write_aligner.row.valid.eq(store & response.valid),
            write_aligner.row.payload.words.eq(response.payload.words),
            write_aligner.row.payload.length.eq(response.payload.user.length),
            write_aligner.row.payload.run_end.eq(response.payload.user.run_end),
            response.ready.eq(
                Mux(store, write_aligner.row.ready, local.address.valid & write.ready)
            ),
            local.address.ready.eq(Mux(store, asked, response.valid & write.ready)),
        ]
        words = response.payload.words
        for lane in range(lanes):
            m.d.comb += write.payload.data[lane].eq(Mux(broadcast, words[0], words[lane]))

        # Data may be offered ahead of its address: the arbiter takes it only after.
        w = self.axi_write.w
        m.d.comb += [
            w.valid.eq(write_aligner.beats.valid),
            w.payload.eq(write_aligner.beats.payload),
            write_aligner.beats.ready.eq(w.ready),
        ]

        # ---------------------------------------------------------------------------------- end
        loaded = Signal()
        m.d.sync += loaded.eq(
            (loaded & ~self.issue.done) | (write.valid & write.ready & response.payload.user.last)
        )
        m.d.comb += finished.eq(Mux(store, ~nest.busy & ~splitter.busy & ~flying.r_rdy, loaded))
        return m
