"""The scalar engine."""

import itertools

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from ..access import elementwise_ports, operand_walk, place_streamers
from ..arith import DITHER_LATENCY, FP32_LATENCY, dither_of, engine_key, rounded
from ..config import CoreConfig
from ..emit import Once, side_by_side
from ..formats import DType
from ..isa import (
    REDUCE_ACCUMULATORS,
    SPECS,
    TABLE_WORDS,
    EngineKind,
    Function,
    Opcode,
    Rounding,
    RowSums,
)
from ..ports import READ_LATENCY, IssuePort, lane_mask, split_words
from . import tables as T
from .lane import (
    FUNCTION_LATENCY,
    LANE_LATENCY,
    SHARING,
    TURN_CYCLES,
    CustomTable,
    FunctionTables,
    ScalarLane,
    Turning,
)
from .sums import Adding, RowSum

#: Cycles from an instruction being taken to its first column in front of the lanes.
_FIRST = 1 + READ_LATENCY
#: Cycles an instruction takes from being taken to `done`, beyond one per column, when no memory
#: port stalls: to the first column, and the lanes. Results are written in the cycle in which they
#: leave the lanes.
FIXED_CYCLES = _FIRST + LANE_LATENCY
#: Cycles a row's sum adds: the accumulators are combined in pairs and then once more.
SUM_CYCLES = 3 * (FP32_LATENCY + 1)
#: Cycles ACTIVATE_ROWS adds for each row: its scale is fetched.
ROW_CYCLES = 1
#: Cycles LOAD_TABLE takes from being taken to `done`, beyond one per column.
TABLE_CYCLES = _FIRST

# The first result finds its random words: stochastic rounding costs no cycle.
assert DITHER_LATENCY <= _FIRST + LANE_LATENCY


class ScalarEngine(wiring.Component):
    """Executes ACTIVATE, ACTIVATE_TENSOR_BIAS, ACTIVATE_TENSOR_SCALE, ACTIVATE_ROWS and LOAD_TABLE
    on N lanes.

    ``dst = function(src0 * scale + bias)``: a multiplication and an addition in FP32, each rounded,
    then the function, then rounding to the type of dst; scale and bias are numbers, elements of
    src1, or words of src1 for each row. Sums of the results of each row, the innermost dimension,
    are written behind the row or in its place.

    Parameters
    ----------
    number : of the engine in `config.engines`, of which the random words of stochastic rounding
        depend

    Members
    -------
    issue : In(IssuePort)
    src0_sbuf, src0_psum, src1_sbuf, src1_psum : Out(ReadPort)
    dst_sbuf, dst_psum : Out(WritePort)

    One column per cycle, with one source or two. An instruction of n columns in r rows is done
    ``n + FIXED_CYCLES`` cycles after it is taken when no port stalls, ``r * SUM_CYCLES`` later with
    sums, and ``r * ROW_CYCLES`` later if it is ACTIVATE_ROWS. Sine and cosine take TURN_CYCLES for
    each column, ``n * TURN_CYCLES + 1`` in place of n, and ROW_CYCLES once. LOAD_TABLE of n columns
    is done ``n + TABLE_CYCLES`` cycles after it is taken. The next instruction is taken in the
    cycle of `done`, when all writes are accepted and the lanes are empty.
    """

    def __init__(self, config: CoreConfig, *, number: int) -> None:
        self._config = config
        self._number = number
        super().__init__({"issue": In(IssuePort()), **elementwise_ports(config)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes

        src0, src1, dst = place_streamers(m, self, config, direct=True)

        # -- Issue: the streamers start in the cycle the instruction is taken.
        incoming = self.issue.instruction
        tensor = data.View(SPECS[Opcode.ACTIVATE_TENSOR_BIAS].layout, incoming.payload)
        scalar = data.View(SPECS[Opcode.ACTIVATE].layout, incoming.payload)
        load = data.View(SPECS[Opcode.LOAD_TABLE].layout, incoming.payload)
        opcode, op1 = tensor.header.opcode, tensor.header.op1
        take, done = Signal(), Signal()
        is_load = Signal()
        loaded = Signal()  # LOAD_TABLE: the last word has been written
        active = Signal()
        has_src1 = Signal()
        m.d.comb += [
            done.eq(dst.done | loaded),
            incoming.ready.eq(~active | done),
            take.eq(incoming.valid & incoming.ready),
            is_load.eq(opcode == Opcode.LOAD_TABLE),
            has_src1.eq((opcode != Opcode.ACTIVATE) & ~is_load),
            self.issue.busy.eq(active),
            self.issue.done.eq(done),
            src0.start.valid.eq(take),
            src1.start.valid.eq(take & has_src1),
            dst.start.valid.eq(take & ~is_load),
        ]
        for name, streamer in (("src0", src0), ("src1", src1), ("dst", dst)):
            walk = operand_walk(m, incoming.payload, name, EngineKind.SCALAR)
            m.d.comb += streamer.start.payload.eq(walk)

        # -- What the lanes need of the running instruction.
        control = Signal(T.CONTROL, reset_less=True)
        bias = Signal(32, reset_less=True)
        tensor_bias, tensor_scale, rows = Signal(), Signal(), Signal()
        sums, only = Signal(), Signal()
        row = Signal(16, reset_less=True)
        dtype = Signal(DType)
        result_dtype = Signal(DType)  # of what leaves now
        mask = Signal(lanes)
        custom = Signal()  # the function is that of the lanes' own tables
        loading = Signal()
        with m.If(take):
            m.d.sync += [
                active.eq(1),
                loading.eq(is_load),
                custom.eq(tensor.header.op0 == Function.CUSTOM.value),
                bias.eq(Mux(has_src1, tensor.body.imm0, scalar.body.imm1)),
                tensor_bias.eq(opcode == Opcode.ACTIVATE_TENSOR_BIAS),
                tensor_scale.eq(opcode == Opcode.ACTIVATE_TENSOR_SCALE),
                rows.eq(opcode == Opcode.ACTIVATE_ROWS),
                sums.eq(op1 != RowSums.NONE.value),
                only.eq(op1 == RowSums.ONLY.value),
                row.eq(tensor.body.counts[3]),
                dtype.eq(tensor.body.dst.dtype),
                result_dtype.eq(tensor.body.dst.dtype),
                mask.eq(lane_mask(tensor.header.lanes, lanes)),
            ]
            with m.Switch(tensor.header.op0):
                for function, word in T.tables().controls.items():
                    with m.Case(function.value):
                        m.d.sync += control.eq(Const(word, T.CONTROL.size))
        with m.Elif(done):
            m.d.sync += active.eq(0)

        # -- LOAD_TABLE: a word for the table of each lane in every cycle.
        table_word = Signal(range(TABLE_WORDS))
        writing = Signal()
        m.d.comb += writing.eq(active & loading & src0.columns.valid)
        m.d.sync += loaded.eq(writing & src0.columns.payload.last)
        with m.If(take):
            m.d.sync += table_word.eq(load.body.first)
        with m.Elif(writing):
            m.d.sync += table_word.eq(table_word + 1)

        # -- Random words for the results, one column after the other.
        m.submodules.dither = dither = dither_of(config)
        stochastic = Signal()
        wanted = (
            (tensor.header.rounding == Rounding.STOCHASTIC)
            & (tensor.body.dst.dtype != DType.FP32)
            & config.random
        )
        with m.If(take):
            m.d.sync += stochastic.eq(wanted)
        m.d.comb += [
            dither.start.eq(take & wanted),
            dither.seed.eq(self.issue.seed),
            dither.counter.eq(self.issue.counter),
            dither.key.eq(engine_key(self._number)),
            dither.take.eq(dst.columns.valid & dst.columns.ready & stochastic),
        ]

        # -- Lanes: the whole pipeline stands still while the write side is full, and while the sum
        # of a row is completed.
        enable, enter = Signal(), Signal()
        valid, end = Signal(LANE_LATENCY), Signal(LANE_LATENCY)
        arrived = LANE_LATENCY - FUNCTION_LATENCY - 1  # where an element is y
        turn = Signal(range(TURN_CYCLES + 1))  # of reducing an angle; 0: none
        turn_end = Signal()
        turning = Signal(Turning)
        pace = Signal(range(TURN_CYCLES))  # cycles until the next element may enter
        closing = Signal()
        element = Signal(16)
        row_end = Signal()
        fetched = Signal()  # ACTIVATE_ROWS: this row's scale is in its registers
        fetch = Signal()
        needs_src1 = tensor_bias | tensor_scale | rows
        m.d.comb += [
            # An idle engine stands still: nothing is in its pipelines.
            enable.eq(active & ~loading & ~closing & (~valid[-1] | only | dst.columns.ready)),
            fetch.eq(enable & rows & ~fetched & src1.columns.valid),
            enter.eq(
                enable
                & (pace == 0)
                & (fetched | ~rows)
                & src0.columns.valid
                & (src1.columns.valid | ~needs_src1)
            ),
            row_end.eq(element == row - 1),
            src0.columns.ready.eq(enter | writing),
            # The bias of a row stays in front until the row has entered.
            src1.columns.ready.eq(fetch | (enter & needs_src1 & (row_end | ~rows))),
        ]
        with m.If(enable):
            m.d.sync += [valid.eq(Cat(enter, valid)), end.eq(Cat(row_end, end))]
            with m.If(control.turn):
                # The function proper starts when the angle has been reduced.
                m.d.sync += [
                    valid[arrived + 1].eq(turn == TURN_CYCLES),
                    end[arrived + 1].eq(turn_end),
                    pace.eq(Mux(enter, TURN_CYCLES - 1, Mux(pace == 0, 0, pace - 1))),
                    turn.eq(Mux((turn == 0) | (turn == TURN_CYCLES), 0, turn + 1)),
                ]
                with m.If(valid[arrived]):
                    m.d.sync += [turn.eq(1), turn_end.eq(end[arrived])]
        m.d.comb += [
            turning.load.eq(control.turn & valid[arrived]),
            turning.first.eq(turn == 1),
            turning.multiply.eq((turn >= 1) & (turn <= T.PIECES)),
            turning.fold.eq(turn == T.PIECES + 1),
            turning.shift.eq((turn > T.PIECES) & (turn < TURN_CYCLES)),
        ]
        with m.If(enter):
            m.d.sync += element.eq(Mux(row_end, 0, element + 1))
        with m.If(fetch):
            m.d.sync += fetched.eq(1)
        with m.Elif(enter & row_end):
            m.d.sync += fetched.eq(0)
        m.submodules.lanes = cells = side_by_side(
            ScalarLane(), "scalar_lane", lanes, shared=("en", "control", "turning")
        )
        m.d.comb += [
            cells.en.eq(enable),
            cells.control.eq(control),
            cells.turning.eq(turning),
        ]
        m.submodules.tables = lookup = side_by_side(
            FunctionTables(), "function_tables", lanes // SHARING, shared=("en",)
        )
        m.d.comb += lookup.en.eq(enable)
        for lane in range(lanes):
            place, user = divmod(lane, SHARING)
            own = Once(CustomTable(), "custom_table")
            m.submodules[f"custom{lane}"] = own
            m.d.comb += [
                own.write.eq(writing & mask[lane]),
                own.address.eq(table_word),
                own.word.eq(src0.columns.payload.data[lane]),
                own.en.eq(enable),
                own.custom.eq(custom),
                own.row.eq(cells.row[lane]),
                own.index.eq(cells.index[lane]),
                own.shared_entry.eq(getattr(lookup, f"entry{user}")[place]),
                own.shared_segment.eq(getattr(lookup, f"segment{user}")[place]),
                cells.entry[lane].eq(own.entry),
                cells.segment[lane].eq(own.segment),
                cells.piece[lane].eq(getattr(lookup, f"piece{user}")[place]),
                *(
                    getattr(lookup, f"{address}{user}")[place].eq(getattr(cells, address)[lane])
                    for address in ("row", "index", "weight")
                ),
            ]
            second = src1.columns.payload.data[lane]
            scale = Signal(32, name=f"scale{lane}", reset_less=True)
            with m.If(take):
                m.d.sync += scale.eq(tensor.body.imm0)
            with m.Elif(fetch):
                m.d.sync += scale.eq(second)
            m.d.comb += [
                cells.x[lane].eq(src0.columns.payload.data[lane]),
                cells.scale[lane].eq(Mux(tensor_scale, second, scale)),
                cells.bias[lane].eq(Mux(tensor_bias | rows, second, bias)),
            ]

        # -- Sums. Elements go to the accumulators in turn; behind the last of a row they are
        # combined, in step with the adder, which stands still unless it is used.
        leaving = Signal()  # an element leaves the lanes
        slot = Signal(range(REDUCE_ACCUMULATORS))
        step = Signal(range(SUM_CYCLES + 1))  # cycles since the last element of the row
        complete = Signal()  # SUM_CYCLES of them
        adding = Signal(Adding)
        index = Signal(range(REDUCE_ACCUMULATORS))
        entering = Signal()  # what enters the adder goes back to accumulator `index`
        add = Signal()
        stores = [
            Signal(REDUCE_ACCUMULATORS, name=f"store{stage}") for stage in range(FP32_LATENCY)
        ]
        m.d.comb += [
            leaving.eq(enable & valid[-1] & sums),
            closing.eq(step != 0),
            add.eq(leaving | (closing & (~complete | dst.columns.ready))),
            index.eq(slot),
            entering.eq(leaving),
        ]
        with m.Switch(step):
            with m.Case(FP32_LATENCY + 1):
                m.d.comb += [adding.eq(Adding.COMBINE), index.eq(0), entering.eq(1)]
            with m.Case(FP32_LATENCY + 2):
                m.d.comb += [adding.eq(Adding.COMBINE), index.eq(2), entering.eq(1)]
            with m.Case(2 * FP32_LATENCY + 3):
                m.d.comb += [adding.eq(Adding.FINISH), index.eq(0)]
        with m.If(add):
            m.d.sync += stores[0].eq(Mux(entering, Const(1, REDUCE_ACCUMULATORS) << index, 0))
            m.d.sync += [later.eq(store) for store, later in itertools.pairwise(stores)]
            with m.If(closing):
                completes = step == SUM_CYCLES - 1
                m.d.sync += [
                    step.eq(Mux(complete, 0, step + 1)),
                    complete.eq(completes),
                    # A sum behind its row stays FP32.
                    result_dtype.eq(Mux(completes & ~only, DType.FP32, dtype)),
                ]
            with m.Else():
                m.d.sync += slot.eq(slot + 1)
                with m.If(end[-1]):
                    m.d.sync += [slot.eq(0), step.eq(1)]
        m.submodules.sums = totals = side_by_side(
            RowSum(), "row_sum", lanes, shared=("en", "adding", "index", "store", "clear")
        )
        m.d.comb += [
            totals.en.eq(add),
            totals.adding.eq(adding),
            totals.index.eq(index),
            totals.store.eq(stores[-1]),
            totals.clear.eq(complete),
        ]

        # -- Results.
        random = split_words(m, dither.words, name="random")
        results = rounded(
            m,
            "rounding",
            [Mux(complete, a, b) for a, b in zip(totals.o, cells.o, strict=True)],
            result_dtype,
            random=random if config.random else None,
            stochastic=stochastic,
        )
        m.d.comb += [
            dst.columns.valid.eq(complete | (valid[-1] & ~closing & ~only)),
            dst.columns.payload.mask.eq(mask),
        ]
        for lane in range(lanes):
            m.d.comb += [
                totals.x[lane].eq(cells.o[lane]),
                dst.columns.payload.data[lane].eq(results[lane]),
            ]
        return m
