"""The vector engine."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from ..access import AddressGenerator, Pattern, elementwise_ports, pattern, place_streamers
from ..arith import (
    CONVERT_LATENCY,
    DITHER_LATENCY,
    ConvertWord,
    Dither,
    RoundNarrow,
    engine_key,
)
from ..config import CoreConfig
from ..emit import Once, side_by_side
from ..formats import INTEGERS, NARROW_FLOATS, DType
from ..isa import (
    DIVISIONS,
    INSTRUCTION_BITS,
    REDUCE_ACCUMULATORS,
    SPECS,
    AluOp,
    Opcode,
    Rounding,
)
from ..ports import IssuePort, split_words
from .alu import ALU_LATENCY
from .lane import LANE_LATENCY, Second, VectorLane

#: Cycles an elementwise instruction takes from being taken to `done`, beyond one per column, when
#: no memory port stalls: 4 to the first column, the lanes, 2 to write.
FIXED_CYCLES = 4 + LANE_LATENCY + 1
#: Cycles REDUCE adds for each result: the accumulators drain, are combined and cleared.
REDUCE_CYCLES = 13

# The first result that needs a random word finds it, so stochastic rounding costs no cycle. Only
# MEMSET's comes 3 cycles earlier, as nothing is read, and waits for it, within FIXED_CYCLES.
assert DITHER_LATENCY <= 4 + LANE_LATENCY


def lane_mask(lanes: Value, count: int) -> Value:
    """One bit for each of `count` lanes, high in the first `lanes`."""
    return Cat(Const(lane, 8) < lanes for lane in range(count))


class VectorEngine(wiring.Component):
    """Executes TENSOR_TENSOR, TENSOR_SCALAR, SCALAR_TENSOR_TENSOR, REDUCE, MEMSET and
    COPY_PREDICATED on N lanes.

    Parameters
    ----------
    number : of the engine in `config.engines`, of which the random words of stochastic rounding
        depend

    Members
    -------
    issue : In(IssuePort)
    src0_sbuf, src0_psum, src1_sbuf, src1_psum : Out(ReadPort)
    dst_sbuf, dst_psum : Out(WritePort)

    One column per cycle, for one and two sources alike. An instruction of n columns is done
    ``n + FIXED_CYCLES`` cycles after it is taken when no port stalls; SCALAR_TENSOR_TENSOR, which
    reads its scalars first, through the port of src1, takes one more; what makes integers of FP32,
    FP32 of integers, or INT8 takes CONVERT_LATENCY more. With one of `isa.DIVISIONS` each column
    takes up to DIVIDE_CYCLES or DIVIDE_INTEGER_CYCLES more. REDUCE of r results takes
    ``n + FIXED_CYCLES + r * REDUCE_CYCLES`` at most. The next is taken in the cycle of `done`.
    """

    def __init__(self, config: CoreConfig, *, number: int) -> None:
        self._config = config
        self._number = number
        super().__init__({"issue": In(IssuePort()), **elementwise_ports(config)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes

        src0, src1, dst = place_streamers(m, self, config)
        m.submodules.steps = steps = AddressGenerator()  # paces MEMSET, which reads nothing

        # -- Issue: everything starts in the cycle the instruction is taken.
        active = Signal()
        word = Signal(INSTRUCTION_BITS)
        incoming = self.issue.instruction
        take = Signal()
        m.d.comb += [
            incoming.ready.eq(~active | dst.done),
            take.eq(incoming.valid & incoming.ready),
            self.issue.busy.eq(active),
            self.issue.done.eq(dst.done),
        ]
        with m.If(take):
            m.d.sync += [active.eq(1), word.eq(incoming.payload)]
        with m.Elif(dst.done):
            m.d.sync += active.eq(0)

        two = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, incoming.payload)
        opcode = two.header.opcode
        has_scalar = opcode == Opcode.SCALAR_TENSOR_TENSOR
        has_src1 = (
            (opcode == Opcode.TENSOR_TENSOR) | (opcode == Opcode.COPY_PREDICATED) | has_scalar
        )
        dst_pattern = Signal(Pattern)
        m.d.comb += [
            src0.start.payload.eq(pattern(two.body.src0, two.body.counts)),
            src0.start.valid.eq(take & (opcode != Opcode.MEMSET)),
            src1.start.payload.eq(pattern(two.body.src1, two.body.counts)),
            src1.start.valid.eq(take & has_src1),
            steps.start.payload.eq(pattern(two.body.dst, two.body.counts)),
            steps.start.valid.eq(take & (opcode == Opcode.MEMSET)),
            dst_pattern.eq(pattern(two.body.dst, two.body.counts)),
            dst.start.payload.eq(dst_pattern),
            dst.start.valid.eq(take),
        ]
        with m.If(opcode == Opcode.REDUCE):
            m.d.comb += dst.start.payload.counts[3].eq(1)
        # The column of scalars is read before those of src1.
        scalar_pattern = Signal(Pattern)
        one_word = data.View(
            SPECS[Opcode.SCALAR_TENSOR_TENSOR].layout, incoming.payload
        ).body.scalar
        m.d.comb += [
            scalar_pattern.base.eq(one_word.base),
            scalar_pattern.space.eq(one_word.space),
            *(count.eq(1) for count in scalar_pattern.counts),
        ]
        follows = Signal()  # src1 is still to be started
        load = Signal()  # the next column of src1 are the scalars
        with m.If(take):
            m.d.sync += [follows.eq(has_scalar), load.eq(has_scalar)]
            with m.If(has_scalar):
                m.d.comb += src1.start.payload.eq(scalar_pattern)
        with m.Elif(follows):
            second_start = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, word).body
            m.d.comb += [
                src1.start.payload.eq(pattern(second_start.src1, second_start.counts)),
                src1.start.valid.eq(1),
            ]
            with m.If(src1.start.ready):
                m.d.sync += follows.eq(0)
        with m.If(load & src1.columns.valid):
            m.d.sync += load.eq(0)

        # -- The running instruction.
        running = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, word)
        scalar = data.View(SPECS[Opcode.TENSOR_SCALAR].layout, word)
        code = running.header.opcode
        is_reduce = Signal()
        is_memset = Signal()
        is_predicated = Signal()
        is_tensor_tensor = Signal()
        m.d.comb += [
            is_reduce.eq(code == Opcode.REDUCE),
            is_memset.eq(code == Opcode.MEMSET),
            is_predicated.eq(code == Opcode.COPY_PREDICATED),
            is_tensor_tensor.eq(
                (code == Opcode.TENSOR_TENSOR) | (code == Opcode.SCALAR_TENSOR_TENSOR)
            ),
        ]
        bypass = AluOp.BYPASS.value
        op0 = Mux(is_memset | is_predicated, bypass, running.header.op0)
        op1 = Mux(is_memset | is_predicated, bypass, running.header.op1)

        # -- Random words for the results, one column after the other.
        m.submodules.dither = dither = Once(Dither(lanes=lanes), f"dither_{lanes}")
        stochastic = Signal()
        wanted = (two.header.rounding == Rounding.STOCHASTIC) & Cat(
            two.body.dst.dtype == each for each in NARROW_FLOATS
        ).any()
        with m.If(take):
            m.d.sync += stochastic.eq(wanted)

        # -- Types: of the ALUs, and whether the result needs a conversion.
        computes = Signal(DType)
        converts = Signal()
        writes_integer = Cat(two.body.dst.dtype == each for each in INTEGERS).any()
        given = Signal(DType)
        m.d.comb += given.eq(two.body.src0.dtype)
        with m.If(opcode == Opcode.MEMSET):
            m.d.comb += given.eq(Mux(writes_integer, DType.INT32, DType.FP32))
        with m.If(take):
            m.d.sync += [
                computes.eq(given),
                converts.eq(
                    ((given != DType.FP32) ^ writes_integer) | (two.body.dst.dtype == DType.INT8)
                ),
            ]
        out_valid = Signal()
        written = Signal()
        offer = Signal()
        divide = Signal()  # everything waits for the divider
        m.d.comb += [
            offer.eq(out_valid & (dither.valid | ~stochastic) & ~divide),
            written.eq(offer & dst.columns.ready),
            dither.start.eq(take & wanted),
            dither.seed.eq(self.issue.seed),
            dither.counter.eq(self.issue.counter),
            dither.key.eq(engine_key(self._number)),
            dither.take.eq(written & stochastic),
        ]

        # -- Lanes.
        enable = Signal()
        # An idle engine stands still: nothing is in its pipelines.
        m.d.comb += enable.eq(active & (~out_valid | written) & ~divide)
        offered = Mux(
            is_memset,
            steps.address.valid,
            src0.columns.valid & (src1.columns.valid | ~(is_tensor_tensor | is_predicated)) & ~load,
        )
        closed = Signal()  # REDUCE is finishing a group
        enter = Signal()
        m.d.comb += [
            enter.eq(offered & enable & ~closed & active),
            src0.columns.ready.eq(enter & ~is_memset),
            src1.columns.ready.eq(load | (enter & (is_tensor_tensor | is_predicated))),
            steps.address.ready.eq(enter & is_memset),
        ]

        # Steering of the second ALU.
        second = Signal(Second)
        index = Signal(2)
        clear = Signal()
        entered = enter & ~is_reduce
        accumulate = enter & is_reduce
        slot = Signal(range(REDUCE_ACCUMULATORS))
        slot_there: Value = slot
        for stage in range(ALU_LATENCY):
            moved = Signal(4, name=f"steer{stage}")
            with m.If(enable):
                m.d.sync += moved.eq(Cat(entered, accumulate, slot_there))
            entered, accumulate, slot_there = moved[0], moved[1], moved[2:4]
        # The element at the second ALU waits until its quotient is there.
        divides = Signal()
        started = Signal()
        busy = Signal()
        m.d.comb += divide.eq(divides & entered & (~started | busy))
        m.d.sync += started.eq(divide)
        with m.If(take):
            m.d.sync += divides.eq(
                ((opcode == Opcode.TENSOR_SCALAR) | (opcode == Opcode.TENSOR_TENSOR) | has_scalar)
                & Cat(two.header.op1 == each for each in sorted(op.value for op in DIVISIONS)).any()
            )

        finish = Signal()
        result = entered | finish
        for stage in range(ALU_LATENCY):
            moved = Signal(name=f"result{stage}")
            with m.If(enable):
                m.d.sync += moved.eq(result)
            result = moved
        straight = result
        for stage in range(CONVERT_LATENCY):
            moved = Signal(name=f"converted{stage}")
            with m.If(enable):
                m.d.sync += moved.eq(result & converts)
            result = moved
        m.d.comb += out_valid.eq(Mux(converts, result, straight))

        # A group of REDUCE: elements go to the accumulators in turn; after the last, wait until
        # all are in (6 cycles), combine in pairs, finish, clear, open again.
        element = Signal(unsigned(16))
        drain = Signal(range(16))
        m.d.comb += [
            second.eq(Mux(is_reduce, Second.ACCUMULATE, Second.OPERAND)),
            index.eq(slot_there),
        ]
        # An accumulating slot without an element would add garbage: steer it to no accumulator.
        with m.If(is_reduce & ~accumulate):
            m.d.comb += second.eq(Second.OPERAND)
        with m.If(enable & closed):
            m.d.sync += drain.eq(drain + 1)
        with m.If(closed):
            with m.Switch(drain):
                with m.Case(LANE_LATENCY):
                    m.d.comb += [second.eq(Second.COMBINE), index.eq(0)]
                with m.Case(LANE_LATENCY + 1):
                    m.d.comb += [second.eq(Second.COMBINE), index.eq(2)]
                with m.Case(LANE_LATENCY + ALU_LATENCY + 2):
                    m.d.comb += [second.eq(Second.FINISH), finish.eq(1)]
                with m.Case(LANE_LATENCY + ALU_LATENCY + 3):
                    m.d.comb += clear.eq(enable)
                    with m.If(enable):
                        m.d.sync += closed.eq(0)
        with m.If(enter & is_reduce):
            m.d.sync += [slot.eq(slot + 1), element.eq(element + 1)]
            with m.If(element == running.body.counts[3] - 1):
                m.d.sync += [element.eq(0), slot.eq(0), closed.eq(1), drain.eq(0)]
        fresh = Signal()
        m.d.sync += fresh.eq(take)
        with m.If(fresh):
            m.d.comb += clear.eq(1)  # the accumulators start from this instruction's identity

        imm1 = Mux(is_tensor_tensor, 0, scalar.body.imm1)
        column = dst.columns.payload
        random = split_words(m, dither.words, name="random")
        m.submodules.lanes = cells = side_by_side(
            VectorLane(), "vector_lane", lanes,
            shared=(
                "en", "op0", "op1", "dtype", "imm0", "load", "scalar", "divide", "start", "divides",
                "second", "index", "clear",
            ),
        )  # fmt: skip
        m.submodules.conversion = conversion = side_by_side(
            ConvertWord(), "convert_word", lanes, shared=("en", "given", "dtype")
        )
        m.submodules.rounding = rounding = side_by_side(
            RoundNarrow(), "round_narrow", lanes, shared=("dtype", "stochastic")
        )
        m.d.comb += [
            cells.en.eq(enable),
            cells.op0.eq(op0),
            cells.op1.eq(op1),
            cells.dtype.eq(computes),
            cells.imm0.eq(scalar.body.imm0),
            cells.load.eq(load),
            cells.divide.eq(divide),
            cells.start.eq(divide & ~started),
            cells.divides.eq(divides),
            busy.eq(Cat(cells.busy).any()),
            cells.scalar.eq(code == Opcode.SCALAR_TENSOR_TENSOR),
            cells.second.eq(second),
            cells.index.eq(index),
            cells.clear.eq(clear),
            conversion.en.eq(enable & converts),
            conversion.given.eq(computes),
            conversion.dtype.eq(running.body.dst.dtype),
            rounding.dtype.eq(running.body.dst.dtype),
            rounding.stochastic.eq(stochastic),
        ]
        for lane in range(lanes):
            source0, source1 = src0.columns.payload.data[lane], src1.columns.payload.data[lane]
            memset = Mux(is_memset, scalar.body.imm0, source0)
            m.d.comb += [
                # COPY_PREDICATED: the data pass through the ALUs, the mask comes along as b.
                cells.a[lane].eq(Mux(is_predicated, source1, memset)),
                cells.b[lane].eq(Mux(is_predicated, source0, Mux(is_tensor_tensor, source1, imm1))),
                conversion.word[lane].eq(cells.o[lane]),
                rounding.word[lane].eq(Mux(converts, conversion.o[lane], cells.o[lane])),
                rounding.random[lane].eq(random[lane]),
                column.data[lane].eq(rounding.o[lane]),
            ]
        nonzero: Value = Cat(cells.nonzero)
        for stage in range(CONVERT_LATENCY):
            moved = Signal(lanes, name=f"nonzero{stage}")
            with m.If(enable):
                m.d.sync += moved.eq(nonzero)
            nonzero = moved
        nonzero = Mux(converts, nonzero, Cat(cells.nonzero))
        everywhere = (~is_predicated).replicate(lanes)
        m.d.comb += [
            column.mask.eq(lane_mask(running.header.lanes, lanes) & (nonzero | everywhere)),
            dst.columns.valid.eq(offer),
        ]
        return m
