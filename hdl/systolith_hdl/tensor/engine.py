"""The tensor engine: LOAD_STATIONARY and MATMUL, and the same of pairs where the core has them."""

from amaranth.hdl import Cat, Module, Mux, ShapeLike, Signal, Value, ValueLike, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..access import AddressGenerator, Pattern, ReadStreamer, pattern
from ..arith import WidenInt8, rounded
from ..config import CoreConfig
from ..emit import side_by_side
from ..formats import DType
from ..isa import LOADS, PAIRS, SPECS, Opcode, is_opcode
from ..ports import READ_LATENCY, IssuePort, ReadPort, split_words
from ..psum import ACCUMULATE_LATENCY, AccumulatePort, accumulate_tag
from ..queue import queue_members, queue_of
from .array import SystolicArray, array_latency
from .mac import OPERAND_BITS
from .mac_fp8x2 import SECOND_BITS


def queue_depth(config: CoreConfig) -> int:
    """Instructions of each class taken from the sequencer ahead of their turn, at most 8. From
    being taken to its first column being sent one needs 5 cycles, in which others of one column
    each may follow."""
    return 2 * config.prefetch if config.prefetch > 1 else 1


#: Columns each streamer may be ahead by where pairs are read. Two walks in step that meet in a bank
#: would meet again in the next cycle if neither could run ahead.
PAIR_DEPTH = 8
#: Numbers of loads and swaps, counted modulo 16: at most 9 are under way.
_COUNT = unsigned(4)


def _load_entry(config: CoreConfig) -> data.StructLayout:
    """What is kept of a load until its columns are sent: the rows it loads (the others become
    zero), what the words are rounded to, and the number of swaps sent before it may begin (the
    shadow weights are in use until then)."""
    return data.StructLayout(
        {"lanes": unsigned(8), "dtype": DType, "swaps": _COUNT, **_pair_fields(config)}
    )


def _matmul_entry(config: CoreConfig) -> data.StructLayout:
    """What is kept of a matmul until its columns are sent: fields of the instruction; whether its
    sums become INT32 (`integer`); whether a load came before it and after the matmul before it
    (`swap`), and the number of loads finished before a swap may be sent."""
    return data.StructLayout(
        {
            "dst": Pattern,
            "lanes": unsigned(8),
            "dtype": DType,
            "columns": unsigned(8),
            "accumulate": unsigned(1),
            "integer": unsigned(1),
            "swap": unsigned(1),
            "loads": _COUNT,
            **_pair_fields(config),
        }
    )


def _pair_fields(config: CoreConfig) -> dict[str, ShapeLike]:
    """What is kept of an instruction beside: whether it has pairs, and the type of the second
    numbers."""
    return {} if config.fp8_rate == 1 else {"pair": unsigned(1), "second": DType}


def matmul_latency(config: CoreConfig) -> int:
    """Cycles from a moving column being taken from its streamer to its write in PSUM."""
    return 1 + array_latency(config) + ACCUMULATE_LATENCY


class TensorEngine(wiring.Component):
    """Loads stationary operands and streams moving operands through the systolic array into PSUM.

    Each class of instruction is in order; loads run in the background of matmuls. A MATMUL uses the
    last LOAD_STATIONARY before it, one without a load since the MATMUL before it reuses the weights
    in place. Words are taken as numbers of the operand's type, narrow floats or INT8, any two of
    them, as they are read. Lanes `columns` and above of the destination keep their values.
    LOAD_STATIONARY_PAIR and MATMUL_PAIR are of the same two classes; they read two operands side by
    side.

    A load writes all N rows of the columns it has (rows from its `lanes` on with what SBUF holds
    there); columns it does not have keep the weights of the last load that had them.

    Members
    -------
    issue : In(IssuePort); `done` is that of MATMULs, high in the cycle of the last write
    done_load : Out(1), high for one cycle when a LOAD_STATIONARY has made its reads
    stationary, moving : Out(ReadPort), SBUF
    stationary_second, moving_second : Out(ReadPort), SBUF; only with an `fp8_rate` of 2
    psum : Out(AccumulatePort)
    macs : Out, lanes * columns in every cycle in which a moving column is taken, twice that if it
        is one of pairs, else 0

    Throughput: one moving column per cycle. Matmuls of N + 1 or more columns that each have a load
    follow each other without a bubble if SBUF does not stall; a column that accumulates onto an
    address that one of the ACCUMULATE_LATENCY columns before it wrote waits for it.
    Latency: a MATMUL of F columns that waits for nothing is done F + 4 + `matmul_latency` cycles
    after it was taken.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        reads = ["stationary", "moving"]
        if config.fp8_rate == 2:
            reads += ["stationary_second", "moving_second"]
        super().__init__(
            {
                "issue": In(IssuePort()),
                "done_load": Out(1),
                **{name: Out(ReadPort(config, config.sbuf_depth)) for name in reads},
                "psum": Out(AccumulatePort(config)),
                "macs": Out(range(config.peak_macs_per_cycle + 1)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes
        pairs = config.fp8_rate == 2

        # -- Take instructions apart: the operand to read goes to the streamer's queue, the rest
        #    waits for the columns to come back.
        m.submodules.load_sources = load_sources = _Queue(config, Pattern)
        m.submodules.loads = loads = _Queue(config, _load_entry(config))
        m.submodules.moving_sources = moving_sources = _Queue(config, Pattern)
        m.submodules.matmuls = matmuls = _Queue(config, _matmul_entry(config))

        stream = self.issue.instruction
        instruction = data.View(SPECS[Opcode.MATMUL].layout, stream.payload)
        header, body = instruction.header, instruction.body
        is_load = is_opcode(header.opcode, LOADS, config)
        take_load, take_matmul = Signal(), Signal()
        room = Mux(
            is_load,
            load_sources.w_rdy & loads.w_rdy,
            moving_sources.w_rdy & matmuls.w_rdy,
        )
        columns = body.columns
        if pairs:
            # The other format, of the instructions with a second operand; it has the queues to
            # itself only now and then, so both have to have room.
            pair_body = data.View(SPECS[Opcode.MATMUL_PAIR].layout, stream.payload).body
            is_pair = is_opcode(header.opcode, PAIRS, config)
            columns = Mux(is_pair, pair_body.columns, body.columns)
            m.submodules.load_seconds = load_seconds = _Queue(config, Pattern)
            m.submodules.moving_seconds = moving_seconds = _Queue(config, Pattern)
            room = room & Mux(is_load, load_seconds.w_rdy, moving_seconds.w_rdy)
        loads_taken, loads_sent = Signal(_COUNT), Signal(_COUNT)
        swaps_taken, swaps_sent = Signal(_COUNT), Signal(_COUNT)
        fresh = Signal()  # a load since the last matmul
        m.d.comb += [
            stream.ready.eq(room),
            take_load.eq(stream.valid & room & is_load),
            take_matmul.eq(stream.valid & room & ~is_load),
            load_sources.w_en.eq(take_load),
            loads.w_en.eq(take_load),
            load_sources.w_data.eq(pattern(body.src0, body.counts)),
            loads.w_data.lanes.eq(header.lanes),
            loads.w_data.dtype.eq(body.src0.dtype),
            loads.w_data.swaps.eq(swaps_taken),
            moving_sources.w_en.eq(take_matmul),
            matmuls.w_en.eq(take_matmul),
            moving_sources.w_data.eq(pattern(body.src0, body.counts)),
            matmuls.w_data.dst.eq(pattern(body.dst, body.counts)),
            matmuls.w_data.lanes.eq(header.lanes),
            matmuls.w_data.dtype.eq(body.src0.dtype),
            matmuls.w_data.columns.eq(columns),
            matmuls.w_data.accumulate.eq(header.accumulate),
            matmuls.w_data.integer.eq(body.dst.dtype == DType.INT32),
            matmuls.w_data.swap.eq(fresh),
            matmuls.w_data.loads.eq(loads_taken),
        ]
        if pairs:
            for queue, entries, take in (
                (load_seconds, loads, take_load),
                (moving_seconds, matmuls, take_matmul),
            ):
                m.d.comb += [
                    queue.w_en.eq(take & is_pair),
                    queue.w_data.eq(pattern(pair_body.src1, body.counts)),
                    entries.w_data.pair.eq(is_pair),
                    entries.w_data.second.eq(pair_body.src1.dtype),
                ]
        with m.If(take_load):
            m.d.sync += [loads_taken.eq(loads_taken + 1), fresh.eq(1)]
        with m.If(take_matmul):
            m.d.sync += [swaps_taken.eq(swaps_taken + fresh), fresh.eq(0)]

        # -- Read.
        depth = PAIR_DEPTH if pairs else READ_LATENCY + 2
        m.submodules.stationary = stationary = ReadStreamer(config, depth=depth)
        m.submodules.moving = moving = ReadStreamer(config, depth=depth)
        m.submodules.destination = destination = AddressGenerator()
        wiring.connect(m, stationary.sbuf, wiring.flipped(self.stationary))
        wiring.connect(m, moving.sbuf, wiring.flipped(self.moving))
        for queue, start in (
            (load_sources, stationary.start),
            (moving_sources, moving.start),
            (matmuls, destination.start),
        ):
            source = queue.r_data.dst if queue is matmuls else queue.r_data
            m.d.comb += [
                start.valid.eq(queue.r_rdy),
                start.payload.eq(source),
                queue.r_en.eq(start.ready),
            ]

        weight_valid, word_valid = stationary.columns.valid, moving.columns.valid
        if pairs:
            m.submodules.stationary_second = weight_second = ReadStreamer(config, depth=depth)
            m.submodules.moving_second = word_second = ReadStreamer(config, depth=depth)
            wiring.connect(m, weight_second.sbuf, wiring.flipped(self.stationary_second))
            wiring.connect(m, word_second.sbuf, wiring.flipped(self.moving_second))
            for queue, start in (
                (load_seconds, weight_second.start),
                (moving_seconds, word_second.start),
            ):
                m.d.comb += [
                    start.valid.eq(queue.r_rdy),
                    start.payload.eq(queue.r_data),
                    queue.r_en.eq(start.ready),
                ]

        # -- Send the stationary operand.
        m.submodules.array = array = SystolicArray(config, tag=accumulate_tag(config))
        send_weight = Signal()
        first_weight = Signal(init=1)
        # Equality is enough: no later swap can be sent before this load is.
        weight_turn = loads.r_rdy & (loads.r_data.swaps == swaps_sent)
        if pairs:
            # Both columns of a pair go together.
            weight_pair = loads.r_data.pair
            m.d.comb += weight_second.columns.ready.eq(weight_turn & weight_pair & weight_valid)
            weight_turn = weight_turn & (weight_second.columns.valid | ~weight_pair)
        m.d.comb += [
            stationary.columns.ready.eq(weight_turn),
            send_weight.eq(weight_valid & stationary.columns.ready),
            self.done_load.eq(send_weight & stationary.columns.payload.last),
            loads.r_en.eq(self.done_load),
        ]
        m.d.sync += [
            array.weight.valid.eq(send_weight),
            array.weight.first.eq(send_weight & first_weight),
            loads_sent.eq(loads_sent + self.done_load),
        ]
        with m.If(send_weight):
            m.d.sync += first_weight.eq(stationary.columns.payload.last)

        # -- Send the moving operand.
        current = Signal(_matmul_entry(config))
        macs = Signal(self.macs.shape())
        first_column = Signal()
        products = matmuls.r_data.lanes * matmuls.r_data.columns
        with m.If(matmuls.r_rdy & matmuls.r_en):
            m.d.sync += [
                current.eq(matmuls.r_data),
                macs.eq(products << matmuls.r_data.pair if pairs else products),
                first_column.eq(1),
            ]
        address = destination.address
        tag = Signal(accumulate_tag(config))
        swap = Signal()
        send = Signal()
        clear = Signal()
        m.d.comb += [
            tag.address.eq(address.payload.address),
            tag.accumulate.eq(current.accumulate),
            tag.integer.eq(current.integer),
            tag.columns.eq(current.columns),
            tag.last.eq(address.payload.last),
            swap.eq(first_column & current.swap),
        ]
        # Everything from here to the write takes the same time for every column, so whether two
        # columns meet in PSUM's read-add-write is known here.
        recent = [
            (Signal(name=f"recent_valid{i}"), Signal.like(tag.address, name=f"recent{i}"))
            for i in range(ACCUMULATE_LATENCY)
        ]
        newer_valid, newer = send, tag.address
        for older_valid, older in recent:
            m.d.sync += [older_valid.eq(newer_valid), older.eq(newer)]
            newer_valid, newer = older_valid, older
        meets = Cat(valid & (older == tag.address) for valid, older in recent).any()
        if pairs:
            word_pair = current.pair
            m.d.comb += word_second.columns.ready.eq(send & word_pair)
            word_valid = word_valid & (word_second.columns.valid | ~word_pair)
        m.d.comb += [
            clear.eq(~(current.accumulate & meets) & (~swap | (loads_sent == current.loads))),
            send.eq(word_valid & address.valid & clear),
            moving.columns.ready.eq(send if pairs else address.valid & clear),
            address.ready.eq(word_valid & clear),
            self.macs.eq(Mux(send, macs, 0)),
        ]
        m.d.sync += [
            swaps_sent.eq(swaps_sent + (send & swap)),
            array.moving.valid.eq(send),
            array.moving.swap.eq(send & swap),
            array.moving.tag.eq(tag),
        ]
        with m.If(send & ~address.payload.last):
            m.d.sync += first_column.eq(0)
        weights = _rounded(m, stationary.columns.payload.data, loads.r_data.dtype, name="weight")
        words = _rounded(m, moving.columns.payload.data, current.dtype, name="word")
        m.d.sync += [
            array.weight.data.as_value().eq(
                Cat(Mux(lane < loads.r_data.lanes, word, 0) for lane, word in enumerate(weights))
            ),
            array.moving.data.as_value().eq(Cat(words)),
            array.moving.rows.eq(Cat(send & (lane < current.lanes) for lane in range(lanes))),
        ]

        if pairs:
            for name, streamer, dtype, bus in (
                ("weight", weight_second, loads.r_data.second, array.weight),
                ("word", word_second, current.second, array.moving),
            ):
                seconds = _rounded(m, streamer.columns.payload.data, dtype, name=f"{name}_second")
                if name == "weight":
                    seconds = [
                        Mux(lane < loads.r_data.lanes, word, 0) for lane, word in enumerate(seconds)
                    ]
                m.d.sync += bus.second.as_value().eq(Cat(word[-SECOND_BITS:] for word in seconds))
            m.d.sync += [array.weight.pair.eq(weight_pair), array.moving.pair.eq(word_pair)]

        # -- Results.
        m.d.comb += [
            self.psum.valid.eq(array.sums.valid),
            self.psum.tag.eq(array.sums.tag),
            self.psum.data.eq(array.sums.data),
            self.issue.done.eq(self.psum.done),
        ]
        # At most one matmul per stage of the pipeline, and the queues.
        under_way = Signal(range(matmul_latency(config) + 4 * queue_depth(config) + 4))
        m.d.sync += under_way.eq(
            under_way + take_load + take_matmul - self.done_load - self.issue.done
        )
        m.d.comb += self.issue.busy.eq(under_way != 0)
        return m


def _rounded(m: Module, column: data.View, dtype: ValueLike, *, name: str) -> list[Value]:
    """The words of a column, each as a number of a type, as operands of the array."""
    words = split_words(m, column, name=name)
    numbers = rounded(m, f"round_{name}", words, dtype)
    m.submodules[f"widen_{name}"] = integers = side_by_side(WidenInt8(), "widen_int8", len(words))
    for lane, word in enumerate(words):
        m.d.comb += integers.bits[lane].eq(word[:8])
    return [
        Mux(dtype == DType.INT8, integer, number)[-OPERAND_BITS:]
        for integer, number in zip(integers.o, numbers, strict=True)
    ]


class _Queue(wiring.Component):
    """Queue of `queue_depth` entries of a given shape, as `amaranth.lib.fifo.SyncFIFO`."""

    def __init__(self, config: CoreConfig, shape: ShapeLike) -> None:
        self._depth = queue_depth(config)
        super().__init__(queue_members(shape))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        width = len(self.w_data.as_value())
        m.submodules.fifo = queue = queue_of(width, self._depth)
        m.d.comb += [
            queue.w_data.eq(self.w_data),
            queue.w_en.eq(self.w_en),
            self.w_rdy.eq(queue.w_rdy),
            self.r_data.as_value().eq(queue.r_data),
            queue.r_en.eq(self.r_en),
            self.r_rdy.eq(queue.r_rdy),
        ]
        return m
