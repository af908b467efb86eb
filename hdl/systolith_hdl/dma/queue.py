"""One DMA queue: executes the DMA instructions, in order, several at a time."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, fifo, wiring
from amaranth.lib.wiring import In, Out

from ..access import AddressGenerator, Pattern, pattern
from ..arith import DITHER_LATENCY, rounded
from ..config import CoreConfig
from ..formats import FORMATS, INTEGERS, NARROW_FLOATS
from ..isa import DMA_TYPES, SPECS, FaultCause, Opcode, Rounding
from ..ports import (
    READ_LATENCY,
    IssuePort,
    ReadPort,
    WritePort,
    axi4_read,
    axi4_write,
    lane_mask,
    split_words,
)
from .accumulate import ColumnAdder
from .align import ReadAligner, WriteAligner, run_position
from .corner_turn import CornerTurn
from .draws import ColumnDraws
from .rows import RowSplitter
from .runs import ADDRESS_BITS, RUN_BYTES_BITS, BurstSplitter, Nest
from .tiles import TileCounter, settings_layout, tile_layout

_BURST_INCR = 1
#: Cycles by which the first column of a store waits for its random words, at most: they take
#: ``2 + DITHER_LATENCY`` from launch, the column ``2 + READ_LATENCY``.
DRAW_DELAY = DITHER_LATENCY - READ_LATENCY
#: Instructions that wait for a stage of the queue while those before them are in it.
_LOOKAHEAD = 4


class FaultPort(wiring.Signature):
    """A fault, seen from the engine that stopped.

    Members
    -------
    valid : Out(1), stays high until reset; rises after `done` of every instruction before the one
        that failed
    cause : Out(FaultCause), valid with `valid`
    address : Out(48 bits), valid with `valid`; its meaning depends on the cause
    """

    def __init__(self) -> None:
        super().__init__(
            {"valid": Out(1), "cause": Out(FaultCause), "address": Out(unsigned(ADDRESS_BITS))}
        )


class DmaQueue(wiring.Component):
    """Copies between device DRAM and SBUF, converting packed floats to words and back.

    Element (i0, i1, i2, i3) of lane l lies at DRAM byte
    ``dram_base + sum(i[d] * dram_strides[d]) + l * lane_stride`` modulo 2**48. An
    element of one byte may lie anywhere; others need an even address, nothing more (FP32 too): bit
    0 of theirs is ignored. Narrow types are widened exactly by a load; a store rounds to nearest
    even or stochastically, and any NaN to the type's canonical one. Lanes not named keep their
    words. Elements that
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

    GATHER and SCATTER are split into a load or a store for each row, which move as any others do;
    indices are read once everything before the instruction is complete. A store or SCATTER with
    `accumulate` is split into a load that adds to SBUF and a store for each row (of one i0), so
    that rows that meet in DRAM are all added, in order.

    Throughput without stalls, in cycles (W = bytes of a beat): a run takes as many as it touches
    beats, ``ceil((address % W + bytes) / W)``, but not fewer than the steps of W bytes its rows
    have (``ceil(row bytes / W)`` each, a row being N elements or, not turned, one column). Where a
    turned load's row goes on in the next tile within a beat, that beat is read once. The
    SBUF side takes one cycle per column at the same time. Aligned and with N lanes, merged,
    columns and turned thus all move one beat per cycle, but for elements of one byte: N of them,
    that is mostly half a beat. Single moves one element per cycle.
    From taking an instruction to `done`, 12 to 26 cycles come on top, and the latency of DRAM.
    Rows of a GATHER or SCATTER follow each other like instructions, but at most one begins every
    `rows.ROW_CYCLES` cycles. A load that adds to SBUF takes `accumulate.column_cycles` for each
    column; of a store that adds, each load and each store is also waited for.
    Stochastic rounding changes no throughput: its random words are drawn ahead, and only those of
    the first column, `DRAW_DELAY` cycles later than the column itself, may be waited for.
    At most `config.outstanding` bursts, and of reads about four times as many beats, are answered
    per round trip to DRAM, which is what limits runs of one beat (columns or turned of narrow
    types, aligned; single) once the latency exceeds some 50 cycles.

    Instructions overlap, but none sees another half done. Loads follow loads and stores follow
    stores without a bubble, but that one begins every second cycle at most: while data of one is
    in flight, bursts of the next ones are issued;
    SBUF is written, and DRAM is, in program order. A store after a load begins when all columns of
    the load are in SBUF; a load after a store when every burst of the store has been answered.

    Members
    -------
    issue : In(IssuePort); `done` means that all columns of a load have been written, or that every
        burst of a store has been answered
    key : In(32), `arith.engine_key` of the queue's number in `config.engines`, constant: by it the
        random words of stochastic rounding differ from those of other engines
    read, write : Out(ReadPort), Out(WritePort) of SBUF
    axi_read, axi_write : Out(axi4_read), Out(axi4_write) with IDs of no bits. Addresses of bursts
        are multiples of a beat; bursts have up to 16 beats and end at multiples of 16 beats. Write
        data may be offered before its address, and after a fault without one: `axi_write` belongs
        behind an `AxiWriteArbiter`, which takes data only for addresses it has accepted.
    stop : In(1), no further bursts are issued while it is high
    active : Out(1), bursts are in flight
    fault : Out(FaultPort); address is that of the burst, as on AxADDR. After an error response no
        burst is issued and no instruction taken until reset; those in flight are finished. Loads
        after one that failed write nothing; stores after one that failed may have written. Of an
        index outside its table, address is the index; the rows before it are finished.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        super().__init__(
            {
                "issue": In(IssuePort()),
                "key": In(32),
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

        m.submodules.rows = rows = RowSplitter(config)
        m.submodules.local = local = AddressGenerator()
        m.submodules.tiles = tiles = TileCounter(lanes=lanes)
        m.submodules.nest = nest = Nest(5, addresses=True)
        m.submodules.splitter = splitter = BurstSplitter(beat_bytes=config.axi_bytes)
        m.submodules.read_aligner = read_aligner = ReadAligner(config)
        m.submodules.write_aligner = write_aligner = WriteAligner(config)
        m.submodules.draws = draws = ColumnDraws(config)
        m.submodules.adder = adder = ColumnAdder(config)
        m.submodules.turner = turner = CornerTurn(
            lanes=lanes,
            info=tile_layout(lanes),
            user=data.StructLayout(
                {"length": count, "run_end": 1, "last": 1, "settings": settings_layout(lanes)}
            ),
        )

        # ---------------------------------------------------------------- taking an instruction
        # Everything that is decided once is decided while it is taken.
        layout = SPECS[Opcode.DMA_LOAD].layout
        incoming = data.View(layout, self.issue.instruction.payload)
        body = incoming.body
        row = rows.row.payload
        counts = data.View(body.counts.shape(), Signal(64))
        log_bytes = Signal(2)
        element_bytes = Signal(4)
        used_lanes = Signal(count)
        inner_stride = body.dram_strides[3]
        lane_stride = body.lane_stride
        is_store = Signal()
        dense_lanes = Signal()
        merged = Signal()
        separate = Signal()
        blocked = Signal()  # tiles have several columns, else one
        turn = Signal()  # rows of a tile are lanes, else columns
        broadcast = Signal()
        stochastic = Signal()
        inner = body.counts[3]
        with m.Switch(body.dram_dtype):
            for each in sorted(DMA_TYPES, key=lambda member: member.value):
                with m.Case(each):
                    m.d.comb += log_bytes.eq(FORMATS[each].bytes.bit_length() - 1)
        m.d.comb += [
            is_store.eq(row.store),
            counts.eq(body.counts),
            element_bytes.eq(1 << log_bytes),
            used_lanes.eq(incoming.header.lanes),
            dense_lanes.eq((lane_stride == element_bytes) | (used_lanes == 1)),
            merged.eq(dense_lanes & (inner_stride == used_lanes << log_bytes)),
            # The rows of a turned tile do not overlap: the order in which a store writes them is
            # then of no consequence.
            separate.eq(
                (lane_stride >= (element_bytes << log_lanes))
                | (lane_stride <= -(element_bytes << log_lanes))
            ),
            turn.eq(~dense_lanes),
            blocked.eq(dense_lanes | ((inner_stride == element_bytes) & (separate | ~is_store))),
            broadcast.eq(turn & ~is_store & (lane_stride == 0)),
            stochastic.eq(
                is_store
                & (incoming.header.rounding == Rounding.STOCHASTIC)
                & Cat(body.dram_dtype == each for each in NARROW_FLOATS).any()
                & config.random
            ),
        ]

        with m.If(row.single):
            m.d.comb += counts[0].eq(1)

        # The row taken last, until it is launched: mostly a whole instruction.
        held = Signal()
        held_final = Signal()
        base = Signal(ADDRESS_BITS, reset_less=True)
        held_store = Signal()
        job = Signal.like(tiles.start.payload, reset_less=True)
        place = Signal(Pattern, reset_less=True)
        walk = Signal.like(nest.start.payload, reset_less=True)
        dense_elements = Signal(24, reset_less=True)  # of a run when not turned
        continues = Signal()  # a load whose rows go on from tile to tile
        counter = Signal(32, reset_less=True)
        taking = Signal()
        launch = Signal()
        failed = Signal()
        m.d.comb += [
            rows.instruction.payload.eq(self.issue.instruction.payload),
            rows.instruction.valid.eq(self.issue.instruction.valid),
            self.issue.instruction.ready.eq(rows.instruction.ready),
            rows.row.ready.eq(~held & ~failed),
            taking.eq(rows.row.valid & rows.row.ready),
        ]
        with m.If(taking):
            m.d.sync += [
                held.eq(1),
                held_store.eq(is_store),
                held_final.eq(row.final),
                base.eq(row.dram_base),
                continues.eq(turn & blocked & ~is_store),
                counter.eq(self.issue.counter),
                place.eq(pattern(body.local, counts)),
                place.base.eq(row.local_base),
                job.full_columns.eq(Mux(blocked, lanes, 1)),
                job.last_columns.eq(Mux(blocked, (inner - 1)[:log_lanes] + 1, 1)),
                job.counts[3].eq(Mux(blocked, (inner + (lanes - 1)) >> log_lanes, inner)),
                job.settings.dtype.eq(body.dram_dtype),
                job.settings.log_size.eq(log_bytes),
                job.settings.turn.eq(turn),
                job.settings.merged.eq(merged),
                job.settings.broadcast.eq(broadcast),
                job.settings.stochastic.eq(stochastic),
                job.settings.accumulate.eq(row.accumulate),
                job.settings.lanes.eq(used_lanes),
                job.settings.rows.eq(Mux(broadcast, 1, used_lanes)),
                dense_elements.eq(used_lanes * Mux(merged, inner, Const(1, 16))),
                # Innermost dimension: all of it, by columns, or by tiles; then the lanes.
                walk.counts[3].eq(
                    Mux(
                        turn & blocked,
                        (inner + (lanes - 1)) >> log_lanes,
                        Mux(merged, 1, inner),
                    )
                ),
                walk.strides[3].eq(Mux(turn & blocked, element_bytes << log_lanes, inner_stride)),
                walk.counts[4].eq(Mux(turn & ~broadcast, used_lanes, 1)),
                walk.strides[4].eq(lane_stride),
            ]
            for d in range(3):
                m.d.sync += [
                    job.counts[d].eq(counts[d]),
                    walk.counts[d].eq(counts[d]),
                    # Of an instruction with indices these are something else, but not used either.
                    walk.strides[d].eq(body.dram_strides[d]),
                ]
        with m.Elif(launch):
            m.d.sync += held.eq(0)

        # ------------------------------------------------------------------------------- launch
        # An instruction is launched into its stages at once: `nest` walks its runs, `tiles` its
        # tiles, `local` its columns in SBUF, and `draws` the random words of these. The first
        # begins at once, the others when those before it are through. What has been launched is
        # all loads or all stores.
        m.submodules.jobs = jobs = fifo.SyncFIFO(width=job.shape().size, depth=_LOOKAHEAD)
        m.submodules.patterns = patterns = fifo.SyncFIFO(width=Pattern.size, depth=_LOOKAHEAD)
        draw = Signal.like(draws.start.payload)
        m.submodules.to_draw = to_draw = fifo.SyncFIFO(width=draw.shape().size, depth=_LOOKAHEAD)
        store = Signal()
        most = config.outstanding + 4 * _LOOKAHEAD
        pending = Signal(range(most))  # launched and not done
        m.submodules.finals = finals = fifo.SyncFIFO(width=1, depth=most)  # of each pending
        done = Signal()
        alone = Signal()
        m.d.comb += [
            alone.eq(pending == done),
            rows.idle.eq(~held & (pending == 0)),
            finals.w_en.eq(launch),
            finals.w_data.eq(held_final),
            finals.r_en.eq(done),
            nest.start.valid.eq(
                held
                & ~failed
                & (alone | (store == held_store))
                & (jobs.w_rdy & patterns.w_rdy & to_draw.w_rdy)
            ),
            nest.start.payload.eq(walk),
            nest.start.payload.base.eq(base),
            launch.eq(nest.start.valid & nest.start.ready),
            jobs.w_en.eq(launch),
            jobs.w_data.eq(job),
            patterns.w_en.eq(launch),
            patterns.w_data.eq(place),
            tiles.start.valid.eq(jobs.r_rdy),
            tiles.start.payload.eq(jobs.r_data),
            jobs.r_en.eq(tiles.start.ready),
            local.start.valid.eq(patterns.r_rdy),
            local.start.payload.eq(patterns.r_data),
            patterns.r_en.eq(local.start.ready),
            draw.counts.eq(place.counts),
            draw.counter.eq(counter),
            draw.final.eq(held_final),
            to_draw.w_en.eq(launch & job.settings.stochastic),
            to_draw.w_data.eq(draw),
            draws.start.valid.eq(to_draw.r_rdy),
            draws.start.payload.eq(to_draw.r_data),
            to_draw.r_en.eq(draws.start.ready),
            draws.seed.eq(self.issue.seed),
            draws.key.eq(self.key),
            self.issue.busy.eq(held | (pending != 0) | rows.splitting),
        ]
        m.d.sync += pending.eq(pending + launch - done)
        with m.If(launch):
            m.d.sync += store.eq(held_store)

        # ---------------------------------------------------------------------- runs and bursts
        # A run goes to the splitter, its place to the aligner, in the same cycle.
        position = run_position(config)
        m.submodules.places = places = fifo.SyncFIFO(width=position.size, depth=config.outstanding)
        running = Signal.like(job, reset_less=True)
        dense_running = Signal.like(dense_elements, reset_less=True)
        goes_on = Signal()
        with m.If(launch):
            m.d.sync += [
                running.eq(job),
                dense_running.eq(dense_elements),
                goes_on.eq(continues),
            ]
        elements = Signal(24)
        run = splitter.run.payload
        point = nest.point.payload
        # The run of a lane in a turned tile goes on in the next tile. If that begins within a beat,
        # a load does not read the beat again, unless nothing else is to be read.
        address = Signal(ADDRESS_BITS)
        length = Signal(RUN_BYTES_BITS)
        later = Signal()  # not the first tile of a pass along the innermost dimension
        offset = address[:log_beat]
        begins = Signal(position)
        m.d.comb += [
            elements.eq(
                Mux(
                    running.settings.turn,
                    Mux(point.ends[3], running.last_columns, running.full_columns),
                    dense_running,
                )
            ),
            address.eq(
                Cat(
                    point.address[0] & (running.settings.log_size == 0),
                    point.address[1:],
                )
            ),
            length.eq(elements << running.settings.log_size),
            begins.offset.eq(offset),
            begins.beat.eq(address[log_beat:]),
            begins.continued.eq(later & (offset != 0) & (offset + length > config.axi_bytes)),
            run.address.eq(address),
            run.bytes.eq(length),
            run.last.eq(point.ends.all()),
            splitter.run.valid.eq(nest.point.valid & places.w_rdy),
            nest.point.ready.eq(splitter.run.ready & places.w_rdy),
            places.w_en.eq(nest.point.valid & splitter.run.ready),
            places.w_data.eq(begins),
        ]
        with m.If(begins.continued):
            m.d.comb += [
                run.address.eq(Cat(Const(0, log_beat), address[log_beat:] + 1)),
                run.bytes.eq(length - (config.axi_bytes - offset)),
            ]
        with m.If(launch):
            m.d.sync += later.eq(0)
        with m.Elif(nest.point.valid & nest.point.ready & point.ends[4]):
            m.d.sync += later.eq(~point.ends[3] & goes_on)
        assert RUN_BYTES_BITS >= 24 + 2
        m.d.comb += [
            read_aligner.run.payload.eq(places.r_data),
            write_aligner.run.payload.eq(places.r_data),
            read_aligner.run.valid.eq(places.r_rdy & ~store),
            write_aligner.run.valid.eq(places.r_rdy & store),
            places.r_en.eq(Mux(store, write_aligner.run.ready, read_aligner.run.ready)),
        ]

        # Bursts in flight, counted from when they are committed to their address channel. Beats
        # of reads are limited too: what is asked for is ahead of anyone else's reads.
        beats = Signal(range(4 * config.outstanding + 16))
        flight = data.StructLayout({"beat": ADDRESS_BITS - log_beat, "last": 1})
        m.submodules.flying = flying = fifo.SyncFIFO(width=flight.size, depth=config.outstanding)
        oldest = data.View(flight, flying.r_data)
        ar, aw = self.axi_read.ar, self.axi_write.aw
        burst = splitter.burst
        commit = Signal()
        m.d.comb += [
            burst.ready.eq(
                flying.w_rdy
                & ~self.stop
                & ~failed
                & (beats < 4 * config.outstanding)
                & Mux(store, ~aw.valid | aw.ready, ~ar.valid | ar.ready)
            ),
            commit.eq(burst.valid & burst.ready),
            flying.w_en.eq(commit),
            flying.w_data.eq(Cat(burst.payload.beat, burst.payload.last)),
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
        m.d.sync += beats.eq(
            beats + Mux(commit & ~store, burst.payload.len + 1, 0) - (r.valid & r.ready)
        )
        good = Signal()
        answered = Signal()
        error = Signal()
        stored = Signal()
        arrived = Signal()  # all beats of a load have
        m.d.comb += [
            # What came with an error is dropped, and so is all that comes after it.
            good.eq(~failed & (Mux(store, b.payload.resp, r.payload.resp) == 0)),
            read_aligner.beats.valid.eq(r.valid & good),
            read_aligner.beats.payload.eq(r.payload.data),
            r.ready.eq(read_aligner.beats.ready | ~good),
            b.ready.eq(1),
            answered.eq(Mux(store, b.valid, r.valid & r.ready & r.payload.last)),
            flying.r_en.eq(answered),
            error.eq(Mux(store, b.valid, r.valid) & ~good & ~failed),
            stored.eq(store & b.valid & good & oldest.last),
            arrived.eq(~store & answered & good & oldest.last),
        ]
        with m.If(error):
            m.d.sync += [
                failed.eq(1),
                self.fault.cause.eq(
                    Mux(store, FaultCause.AXI_WRITE_ERROR.value, FaultCause.AXI_READ_ERROR.value)
                ),
                self.fault.address.eq(Cat(Const(0, log_beat), oldest.beat)),
            ]
        # Loads whose data has come are still finished: the fault waits for them.
        loaded = Signal()
        ahead = Signal.like(pending)
        m.d.sync += ahead.eq(ahead + arrived - loaded)
        with m.If(failed & (ahead == 0)):
            m.d.sync += self.fault.valid.eq(1)
        with m.If(rows.bad & rows.idle):
            m.d.sync += [
                self.fault.valid.eq(1),
                self.fault.cause.eq(FaultCause.OUT_OF_BOUNDS),
                self.fault.address.eq(rows.index),
            ]

        # ----------------------------------------------------------------- filling: rows (load)
        m.d.comb += [
            read_aligner.tile.valid.eq(tiles.tile.valid & ~store),
            read_aligner.tile.payload.eq(tiles.tile.payload),
        ]

        # -------------------------------------------------------------- filling: columns (store)
        # Columns come unasked READ_LATENCY cycles after their request, into a buffer with room, and
        # are rounded on their way out of it.
        depth = READ_LATENCY + 2
        m.submodules.columns = columns = fifo.SyncFIFO(width=32 * lanes, depth=depth)
        room = Signal(range(depth + 1), init=depth)
        column = Signal(log_lanes)
        asked = Signal()
        filling = Signal()
        tile = tiles.tile.payload
        last_column = column == tile.columns - 1
        ready = Signal()
        results = Signal(data.ArrayLayout(unsigned(32), lanes))
        # Indices are read through the same port: they come first, but a request stays.
        read, index_request = self.read.request, rows.read.request
        indices = Signal()
        was_indices = Signal()
        stays = Signal()
        arriving = Signal(READ_LATENCY)  # what has been asked for is an index
        m.d.comb += indices.eq(Mux(stays, was_indices, index_request.valid))
        m.d.sync += [
            was_indices.eq(indices),
            stays.eq(read.valid & ~read.ready),
            arriving.eq(Cat(indices, arriving)),
        ]
        m.d.comb += [
            read.valid.eq(indices | (local.address.valid & Mux(store, room != 0, adder.ask))),
            read.payload.eq(Mux(indices, index_request.payload, local.address.payload.address)),
            index_request.ready.eq(read.ready & indices),
            rows.read.response.payload.eq(self.read.response.payload),
            rows.read.response.valid.eq(self.read.response.valid & arriving[-1]),
            asked.eq(store & read.valid & read.ready & ~indices),
            adder.asked.eq(~store & read.valid & read.ready & ~indices),
            adder.old.payload.eq(self.read.response.payload),
            adder.old.valid.eq(~store & self.read.response.valid & ~arriving[-1]),
            columns.w_en.eq(store & self.read.response.valid & ~arriving[-1]),
            columns.w_data.eq(self.read.response.payload),
            columns.r_en.eq(filling),
            ready.eq(columns.r_rdy & (~tile.settings.stochastic | draws.words.valid)),
            filling.eq(store & ready & tiles.tile.valid & turner.write.ready),
            draws.words.ready.eq(filling & tile.settings.stochastic),
            tiles.tile.ready.eq(Mux(store, filling & last_column, read_aligner.tile.ready)),
        ]
        m.d.sync += room.eq(room - asked + filling)
        with m.If(filling):
            m.d.sync += column.eq(Mux(last_column, 0, column + 1))
        random = split_words(m, draws.words.payload, name="random")
        m.d.comb += results.as_value().eq(
            Cat(
                rounded(
                    m,
                    "rounding",
                    [columns.r_data.word_select(lane, 32) for lane in range(lanes)],
                    tile.settings.dtype,
                    random=random if config.random else None,
                    stochastic=tile.settings.stochastic,
                )
            )
        )
        with m.If(store):
            m.d.comb += [
                turner.write.valid.eq(filling),
                turner.write.payload.index.eq(column),
                turner.write.payload.words.eq(results),
                turner.write.payload.mask.eq(Const((1 << lanes) - 1, lanes)),
                turner.write.payload.row_end.eq(1),
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
        user = request.payload.user
        last_drain = Signal()
        m.d.comb += [
            draining.eq(Mux(store & info.settings.turn, info.settings.lanes, info.columns)),
            last_drain.eq(drained == draining - 1),
            request.valid.eq(turner.full),
            request.payload.index.eq(drained),
            request.payload.release.eq(last_drain),
            user.length.eq(Mux(info.settings.turn, info.columns, info.settings.lanes)),
            user.run_end.eq(~info.settings.merged | (last_drain & info.ends_inner)),
            user.last.eq(last_drain & info.last),
            user.settings.eq(info.settings),
        ]
        with m.If(request.valid & request.ready):
            m.d.sync += drained.eq(Mux(last_drain, 0, drained + 1))

        response = turner.response
        out = response.payload.user
        write = self.write.request
        ready_to_write = Mux(out.settings.accumulate, adder.sum.valid, response.valid)
        written = Signal()
        m.d.comb += [
            write.valid.eq(~store & ready_to_write & local.address.valid),
            written.eq(write.valid & write.ready),
            adder.column.valid.eq(~store & response.valid & out.settings.accumulate),
            adder.column.payload.integer.eq(Cat(out.settings.dtype == t for t in INTEGERS).any()),
            adder.sum.ready.eq(write.ready & local.address.valid),
            write.payload.address.eq(local.address.payload.address),
            write.payload.mask.eq(lane_mask(out.settings.lanes, lanes)),
            write_aligner.row.valid.eq(store & response.valid),
            write_aligner.row.payload.words.eq(response.payload.words),
            write_aligner.row.payload.length.eq(out.length),
            write_aligner.row.payload.run_end.eq(out.run_end),
            write_aligner.row.payload.dtype.eq(out.settings.dtype),
            write_aligner.row.payload.log_size.eq(out.settings.log_size),
            response.ready.eq(Mux(store, write_aligner.row.ready, written)),
            local.address.ready.eq(Mux(store, asked, written)),
        ]
        words = response.payload.words
        for lane in range(lanes):
            word = adder.column.payload.words[lane]
            m.d.comb += [
                word.eq(Mux(out.settings.broadcast, words[0], words[lane])),
                write.payload.data[lane].eq(
                    Mux(out.settings.accumulate, adder.sum.payload[lane], word)
                ),
            ]

        # Data may be offered ahead of its address: the arbiter takes it only after.
        w = self.axi_write.w
        m.d.comb += [
            w.valid.eq(write_aligner.beats.valid),
            w.payload.eq(write_aligner.beats.payload),
            write_aligner.beats.ready.eq(w.ready),
        ]

        # ---------------------------------------------------------------------------------- end
        m.d.sync += loaded.eq(written & out.last)
        m.d.comb += [done.eq(loaded | stored), self.issue.done.eq(done & finals.r_data)]
        return m
