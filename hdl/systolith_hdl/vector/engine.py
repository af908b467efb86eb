"""The vector engine."""

import dataclasses

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from ..access import elementwise_ports, operand_walk, pattern, place_streamers
from ..arith import (
    CONVERT_LATENCY,
    DITHER_LATENCY,
    ConvertWord,
    dither_of,
    engine_key,
    rounded,
)
from ..arith.dither import RANDOM_STREAM
from ..config import CoreConfig
from ..emit import side_by_side
from ..formats import INTEGERS, NARROW_FLOATS, ONE, DType
from ..isa import (
    DIVISIONS,
    INSTRUCTION_BITS,
    SPECS,
    AluOp,
    EngineKind,
    Opcode,
    Rounding,
    is_opcode,
)
from ..ports import IssuePort, lane_mask, split_words
from .affine import Affine, affine_setup
from .exchange import Shuffle, Transposer
from .front import HALVES_OFFSET, Condition, FrontLane
from .front import Data as FrontData
from .lane import LANE_LATENCY, VectorLane
from .reduce import REDUCE_CYCLES, STATISTICS_CYCLES, Steering
from .scan import Scan
from .top import Top

__all__ = ["FIXED_CYCLES", "REDUCE_CYCLES", "STATISTICS_CYCLES", "VectorEngine", "fixed_cycles"]

#: Cycles an elementwise instruction takes from being taken to `done`, beyond one per column, when
#: no memory port stalls: 4 to the first column, the lanes, 2 to write.
FIXED_CYCLES = 4 + LANE_LATENCY + 1

# The first result that needs a random word finds it, so stochastic rounding costs no cycle, not
# even where nothing is read and it comes 3 cycles earlier (MEMSET).
assert DITHER_LATENCY <= 1 + LANE_LATENCY


#: Opcodes that take random words.
_RANDOM = frozenset({Opcode.RANDOM, Opcode.DROPOUT})


def fixed_cycles(opcode: Opcode, config: CoreConfig) -> int:
    """Cycles an instruction takes from being taken to `done`, beyond one per column, when no memory
    port stalls, nothing is divided and no result converted; at most."""
    if opcode in (Opcode.IOTA, Opcode.AFFINE_SELECT):
        return LANE_LATENCY + 1 + max(4, affine_setup(config))
    if opcode is Opcode.RANGE_SELECT:
        return FIXED_CYCLES + 2  # its bounds come first
    if opcode is Opcode.SCALAR_TENSOR_TENSOR:
        return FIXED_CYCLES + 1  # its scalars do
    if opcode in _RANDOM:
        return LANE_LATENCY + 1 + DITHER_LATENCY
    if opcode is Opcode.STATISTICS:
        return FIXED_CYCLES - 5  # nothing opens again after the last row
    return FIXED_CYCLES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How the lanes execute an opcode.

    Parameters
    ----------
    data, condition : of `FrontLane`
    operations : op0 and op1 of the instruction are the ALUs'; else they pass `a` on
    stepped : elements come from `Affine`, alone or beside the columns read
    """

    data: FrontData = FrontData.SRC0
    condition: Condition = Condition.ALWAYS
    operations: bool = False
    stepped: bool = False


FORMS: dict[Opcode, Form] = {
    Opcode.TENSOR_TENSOR: Form(operations=True),
    Opcode.TENSOR_SCALAR: Form(operations=True),
    Opcode.SCALAR_TENSOR_TENSOR: Form(operations=True),
    Opcode.REDUCE: Form(operations=True),
    Opcode.STATISTICS: Form(),
    Opcode.MEMSET: Form(condition=Condition.NEVER, stepped=True),
    # The data pass through the ALUs, the mask comes along as b.
    Opcode.COPY_PREDICATED: Form(data=FrontData.SRC1),
    Opcode.IOTA: Form(data=FrontData.NUMBER, stepped=True),
    Opcode.AFFINE_SELECT: Form(condition=Condition.NUMBER, stepped=True),
    Opcode.SELECT: Form(data=FrontData.SRC1, condition=Condition.SRC0),
    Opcode.RANGE_SELECT: Form(condition=Condition.RANGE, stepped=True),
    Opcode.SCAN: Form(operations=True),
    Opcode.TOP: Form(data=FrontData.FOUND),
    Opcode.TRANSPOSE: Form(data=FrontData.FOUND),
    Opcode.SHUFFLE: Form(data=FrontData.FOUND),
    Opcode.RANDOM: Form(data=FrontData.RANDOM, stepped=True),
    Opcode.DROPOUT: Form(condition=Condition.RANDOM),
}
assert FORMS.keys() == {o for o, spec in SPECS.items() if spec.kind is EngineKind.VECTOR}

_DIVISIONS = sorted(DIVISIONS, key=lambda op: op.value)

#: op0 -> for which a comparison with zero holds: below, zero, above, NaN
_HOLDS = {
    AluOp.LT: 0b0001,
    AluOp.LE: 0b0011,
    AluOp.EQ: 0b0010,
    AluOp.NE: 0b1101,
    AluOp.GT: 0b0100,
    AluOp.GE: 0b0110,
}


def _reading(operand: str) -> frozenset[Opcode]:
    return frozenset(opcode for opcode in FORMS if operand in SPECS[opcode].operands)


class VectorEngine(wiring.Component):
    """Executes the instructions of `EngineKind.VECTOR` on N lanes.

    A column goes from the readers of src0 and src1, or from `Affine`, through `FrontLane`, the two
    ALUs of `VectorLane`, the conversion between integers and floats, if there is one, and the
    rounding to the writer of dst. The scalars of SCALAR_TENSOR_TENSOR come first, through the port
    of src1.

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
    ``n + fixed_cycles(opcode)`` cycles after it is taken when no port stalls. REDUCE of r results
    takes ``n + FIXED_CYCLES + r * REDUCE_CYCLES`` at most, STATISTICS of r rows
    ``2 * n + r * STATISTICS_CYCLES + fixed_cycles(opcode)``, SCAN of c columns in each step
    ``LOOP_LATENCY * (n / c - 1) + c + FIXED_CYCLES``, TOP ``n + r + FIXED_CYCLES``, r being the
    columns written, TRANSPOSE of b blocks of c columns that become l
    ``c + (b - 1) * max(c, l) + l + 1 + FIXED_CYCLES``. What makes integers of FP32, FP32 of
    integers, or INT8 takes CONVERT_LATENCY more; with one of `isa.DIVISIONS` each column takes up
    to DIVIDE_CYCLES or DIVIDE_INTEGER_CYCLES more. The next is taken in the cycle of `done`.

    Without `config.divider` there is none of these, without `config.top` no TOP.
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
        m.submodules.affine = affine = Affine(config)

        # -- Issue: everything starts in the cycle the instruction is taken.
        active = Signal()
        word = Signal(INSTRUCTION_BITS, reset_less=True)
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

        new = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, incoming.payload)
        new_affine = data.View(SPECS[Opcode.AFFINE_SELECT].layout, incoming.payload).body
        for name, streamer in (("src0", src0), ("src1", src1), ("dst", dst)):
            started = is_opcode(new.header.opcode, _reading(name), config)
            m.d.comb += [
                streamer.start.payload.eq(
                    operand_walk(m, incoming.payload, name, EngineKind.VECTOR)
                ),
                streamer.start.valid.eq(take & started),
            ]
        # The column of scalars is read before those of src1.
        has_scalar = Signal()
        scalars = data.View(SPECS[Opcode.SCALAR_TENSOR_TENSOR].layout, incoming.payload).body.scalar
        follows = Signal()  # src1 is still to be started
        m.d.comb += has_scalar.eq(new.header.opcode == Opcode.SCALAR_TENSOR_TENSOR)
        with m.If(take):
            m.d.sync += follows.eq(has_scalar)
            with m.If(has_scalar):
                m.d.comb += [
                    src1.start.payload.base.eq(scalars.base),
                    src1.start.payload.space.eq(scalars.space),
                    *(count.eq(1) for count in src1.start.payload.counts),
                ]
        with m.Elif(follows):
            two = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, word).body
            m.d.comb += [
                src1.start.payload.eq(pattern(two.src1, two.counts)),
                src1.start.valid.eq(1),
            ]
            with m.If(src1.start.ready):
                m.d.sync += follows.eq(0)
        stepped = frozenset(opcode for opcode, form in FORMS.items() if form.stepped)
        numbered = is_opcode(
            new.header.opcode, frozenset({Opcode.IOTA, Opcode.AFFINE_SELECT}), config
        )
        m.d.comb += [
            affine.begin.valid.eq(take & is_opcode(new.header.opcode, stepped, config)),
            affine.begin.payload.counts.eq(new.body.counts),
            affine.begin.payload.strides[3].eq(1),  # the address is the innermost index
            affine.numbered.eq(numbered),
            affine.lane_step.eq(new_affine.lane_step),
        ]
        with m.If(numbered):
            m.d.comb += [
                affine.begin.payload.base.eq(new_affine.base),
                affine.begin.payload.strides.eq(new_affine.steps),
            ]

        # -- The running instruction. What follows from its opcode is known when it is taken.
        running = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, word)
        scalar = data.View(SPECS[Opcode.TENSOR_SCALAR].layout, word)
        code = new.header.opcode

        def of_running(value: ValueLike, name: str) -> Signal:
            """A register that `value`, of the instruction that comes, is kept in."""
            kept = Signal.like(Value.cast(value), name=name, reset_less=True)
            with m.If(take):
                m.d.sync += kept.eq(value)
            return kept

        is_range = of_running(code == Opcode.RANGE_SELECT, "is_range")
        is_predicated = of_running(code == Opcode.COPY_PREDICATED, "is_predicated")
        is_scalar = of_running(code == Opcode.SCALAR_TENSOR_TENSOR, "is_scalar")
        is_tensor_tensor = of_running(
            (code == Opcode.TENSOR_TENSOR) | (code == Opcode.SCALAR_TENSOR_TENSOR),
            "is_tensor_tensor",
        )
        is_affine_select = of_running(code == Opcode.AFFINE_SELECT, "is_affine_select")
        is_scan = of_running(code == Opcode.SCAN, "is_scan")
        is_top = of_running(config.top & (code == Opcode.TOP), "is_top")
        is_transpose = of_running(code == Opcode.TRANSPOSE, "is_transpose")
        is_statistics = of_running(code == Opcode.STATISTICS, "is_statistics")
        is_reduce = of_running((code == Opcode.REDUCE) | (code == Opcode.STATISTICS), "is_reduce")
        is_stepped = of_running(is_opcode(code, stepped, config), "is_stepped")
        reads0 = of_running(
            is_opcode(code, _reading("src0") - {Opcode.TOP, Opcode.TRANSPOSE}, config), "reads0"
        )
        reads1 = of_running(
            is_opcode(code, _reading("src1") - {Opcode.RANGE_SELECT}, config), "reads1"
        )
        given_data, given_condition = Signal(FrontData), Signal(Condition)
        given_op0, given_op1, given_imm0 = Signal(6), Signal(6), Signal(32)
        new_fp32 = new.body.dst.dtype == DType.FP32
        with m.Switch(code):
            for opcode, form in FORMS.items():
                if not SPECS[opcode].exists(config):
                    continue
                with m.Case(opcode.value):
                    m.d.comb += [given_data.eq(form.data), given_condition.eq(form.condition)]
                    if form.operations:
                        m.d.comb += [
                            given_op0.eq(new.header.op0),
                            given_op1.eq(new.header.op1),
                        ]
        m.d.comb += given_imm0.eq(
            data.View(SPECS[Opcode.TENSOR_SCALAR].layout, incoming.payload).body.imm0
        )
        with m.If((code == Opcode.IOTA) & new_fp32):
            m.d.comb += [
                given_data.eq(FrontData.HALVES),
                given_op0.eq(AluOp.SUB.value),
                given_imm0.eq(HALVES_OFFSET),
                given_op1.eq(AluOp.ADD.value),
            ]
        with m.If((code == Opcode.RANDOM) & new_fp32):
            m.d.comb += [
                given_data.eq(FrontData.UNIFORM),
                given_op0.eq(AluOp.SUB.value),
                given_imm0.eq(ONE),
            ]
        with m.If(code == Opcode.DROPOUT):
            m.d.comb += given_op0.eq(AluOp.MUL.value)
        with m.If(code == Opcode.STATISTICS):
            m.d.comb += given_op1.eq(AluOp.ADD.value)
        op0 = Signal(6)
        first_op0 = of_running(given_op0, "first_op0")
        op1 = of_running(given_op1, "op1")
        imm0 = of_running(given_imm0, "imm0")
        m.submodules.steering = steering = Steering()
        squares = is_statistics & steering.again
        m.d.comb += op0.eq(Mux(squares, AluOp.SQUARE.value, first_op0))

        # -- Types: of the ALUs, and whether the result needs a conversion.
        computes = Signal(DType)
        converts = Signal()
        given = Signal(DType)
        writes_integer = Cat(new.body.dst.dtype == each for each in INTEGERS).any()
        m.d.comb += given.eq(new.body.src0.dtype)
        with m.If(is_opcode(new.header.opcode, frozenset(FORMS) - _reading("src0"), config)):
            m.d.comb += given.eq(Mux(writes_integer, DType.INT32, DType.FP32))
        with m.If(take):
            m.d.sync += [
                computes.eq(given),
                converts.eq(
                    ((given != DType.FP32) ^ writes_integer) | (new.body.dst.dtype == DType.INT8)
                ),
            ]

        # -- Random words, one column after the other: for the results, or for what enters.
        new_random = data.View(SPECS[Opcode.DROPOUT].layout, incoming.payload).body
        draws = is_opcode(new.header.opcode, _RANDOM, config)
        is_random = of_running(draws, "is_random")
        m.submodules.dither = dither = dither_of(config)
        stochastic = Signal()
        wanted = Cat(new.body.dst.dtype == each for each in NARROW_FLOATS).any()
        wanted &= (new.header.rounding == Rounding.STOCHASTIC) & config.random
        with m.If(take):
            m.d.sync += stochastic.eq(wanted)
        m.submodules.scan = scan = Scan()
        enable = Signal()
        # The element at the second ALU waits until its quotient is there, and all others with it.
        divides = Signal()
        divide = Signal()
        started = Signal()
        busy = Signal()
        m.d.comb += divide.eq(divides & steering.arrived & (~started | busy))
        m.d.sync += started.eq(divide)
        if config.divider:
            division = Cat(new.header.op1 == each.value for each in _DIVISIONS).any()
            with m.If(take):
                m.d.sync += divides.eq(division)
        converted: Value = steering.result & converts
        for stage in range(CONVERT_LATENCY):
            moved = Signal(name=f"converted{stage}")
            with m.If(enable):
                m.d.sync += moved.eq(converted)
            converted = moved
        out_valid = Signal()
        written = Signal()
        offer = Signal()
        m.d.comb += [
            out_valid.eq(Mux(converts, converted, steering.result)),
            # What holds the lanes holds their result, too: it leaves once.
            offer.eq(out_valid & (dither.valid | ~stochastic) & ~scan.hold & ~divide),
            written.eq(offer & dst.columns.ready),
            dither.start.eq(take & (wanted | draws)),
            dither.seed.eq(self.issue.seed),
            dither.counter.eq(Mux(draws, new_random.key, self.issue.counter)),
            dither.key.eq(Mux(draws, engine_key(RANDOM_STREAM), engine_key(self._number))),
        ]

        # -- Columns enter the lanes.
        enter = Signal()
        # Which bound of RANGE_SELECT comes next, one-hot; 0: both are there. The scalars of
        # SCALAR_TENSOR_TENSOR, one column, come as the second bound does.
        bounds = Signal(2)
        with m.If(take):
            m.d.sync += bounds.eq(Cat(new.header.opcode == Opcode.RANGE_SELECT, has_scalar))
        with m.Elif(src1.columns.valid):
            m.d.sync += bounds.eq(bounds << 1)
        found_ready: Value = Const(0)
        if config.top:
            m.submodules.top = top = Top(config)
            found_ready = top.columns.ready & is_top
        m.submodules.transposer = transposer = Transposer(config)
        m.submodules.shuffle = shuffle = Shuffle(config)
        shuffled = data.View(SPECS[Opcode.SHUFFLE].layout, word).body
        offered = (
            (src0.columns.valid | ~reads0)
            & (src1.columns.valid | ~reads1)
            & (affine.element.valid | ~is_stepped)
            & (dither.valid | ~is_random)
            & (~is_top | (top.results.valid if config.top else 1))
            & (transposer.results.valid | ~is_transpose)
            & ~bounds.any()
        )
        m.d.comb += [
            # An idle engine stands still: nothing is in its pipelines.
            enable.eq(active & (~out_valid | written) & ~scan.hold & ~divide),
            enter.eq(offered & enable & ~steering.closed & scan.turn),
            src0.columns.ready.eq(
                (enter & reads0 & (steering.again | ~is_statistics))
                | found_ready
                | (transposer.columns.ready & is_transpose)
            ),
            src1.columns.ready.eq((enter & reads1) | bounds.any()),
            affine.element.ready.eq(enter & is_stepped),
            dither.take.eq(Mux(is_random, enter, written & stochastic)),
            transposer.into.eq(running.body.counts[3]),
            transposer.out_of.eq(running.header.lanes),
            transposer.columns.valid.eq(src0.columns.valid & is_transpose),
            transposer.columns.payload.eq(src0.columns.payload.data),
            transposer.results.ready.eq(enter & is_transpose),
            shuffle.select.eq(shuffled.select),
            shuffle.spread.eq(shuffled.spread),
            shuffle.lane.eq(shuffled.lane),
            shuffle.column.eq(src0.columns.payload.data),
            scan.begin.eq(take),
            scan.scanning.eq(is_scan & active),
            scan.rows.eq(running.body.counts[3]),
            scan.length.eq(running.body.counts[2]),
            scan.offered.eq(offered),
            scan.last.eq(src0.columns.payload.last),
            scan.moving.eq(enable),
            scan.entered.eq(enter),
            steering.enable.eq(enable),
            steering.enter.eq(enter),
            steering.reducing.eq(is_reduce),
            steering.twice.eq(is_statistics),
            steering.length.eq(running.body.counts[3]),
            steering.begin.eq(take),
        ]
        if config.top:
            m.d.comb += [
                top.smallest.eq(running.header.op0 == AluOp.MIN),
                top.kept.eq(data.View(SPECS[Opcode.TOP].layout, word).body.kept),
                top.length.eq(running.body.counts[3]),
                top.columns.valid.eq(src0.columns.valid & is_top),
                top.columns.payload.eq(src0.columns.payload.data),
                top.results.ready.eq(enter & is_top),
            ]

        # -- Lanes.
        fill = data.View(SPECS[Opcode.AFFINE_SELECT].layout, word).body.fill
        given_holds = Signal(4)
        with m.Switch(new.header.op0):
            for comparison, for_which in _HOLDS.items():
                with m.Case(comparison.value):
                    m.d.comb += given_holds.eq(for_which)
        m.submodules.front = front = side_by_side(
            FrontLane(), "vector_front", lanes,
            shared=(
                "data", "condition", "holds", "otherwise", "index", "bounds", "start", "base",
                "step", "increment", "threshold", "initial", "imm0", "predicated", "tensor",
                "imm1", "load", "scalar",
            ),
        )  # fmt: skip
        m.submodules.lanes = cells = side_by_side(
            VectorLane(divider=config.divider), "vector_lane", lanes,
            shared=(
                "en", "op0", "op1", "dtype", "chain", "divide", "start", "divides", "second",
                "index", "clear",
            ),
        )  # fmt: skip
        m.submodules.conversion = conversion = side_by_side(
            ConvertWord(), "convert_word", lanes, shared=("en", "given", "dtype")
        )
        m.d.comb += [
            front.data.eq(of_running(given_data, "front_data")),
            front.condition.eq(of_running(given_condition, "condition")),
            front.holds.eq(of_running(given_holds, "holds")),
            front.otherwise.eq(
                Mux(
                    is_affine_select,
                    Cat(Const(0, 16), fill),
                    Mux(is_random, 0, scalar.body.imm0),
                )
            ),
            front.threshold.eq(data.View(SPECS[Opcode.DROPOUT].layout, word).body.threshold),
            front.index.eq(affine.element.payload.index),
            front.bounds.eq(Mux(src1.columns.valid & is_range, bounds, 0)),
            front.start.eq(affine.start),
            front.base.eq(affine.base),
            front.step.eq(affine.step),
            front.increment.eq(affine.increment),
            front.load.eq(src1.columns.valid & is_scalar & bounds.any()),
            front.scalar.eq(is_scalar),
            front.initial.eq(is_scan & running.header.accumulate),
            front.imm0.eq(imm0),
            front.predicated.eq(is_predicated),
            front.tensor.eq(is_tensor_tensor | (is_scan & ~running.header.accumulate)),
            front.imm1.eq(Mux(is_scan, scalar.body.imm0, scalar.body.imm1)),
            cells.en.eq(enable),
            cells.op0.eq(op0),
            cells.op1.eq(op1),
            cells.dtype.eq(computes),
            cells.divide.eq(divide),
            cells.start.eq(divide & ~started),
            cells.divides.eq(divides),
            busy.eq(Cat(cells.busy).any()),
            cells.chain.eq(is_scan & ~scan.first),
            cells.second.eq(steering.second),
            cells.index.eq(steering.index),
            cells.clear.eq(steering.clear),
            conversion.en.eq(enable & converts),
            conversion.given.eq(computes),
            conversion.dtype.eq(running.body.dst.dtype),
        ]
        column = dst.columns.payload
        random = split_words(m, dither.words, name="random")
        results = rounded(
            m,
            "rounding",
            [Mux(converts, a, b) for a, b in zip(conversion.o, cells.o, strict=True)],
            running.body.dst.dtype,
            random=random if config.random else None,
            stochastic=stochastic,
        )
        for lane in range(lanes):
            m.d.comb += [
                front.src0[lane].eq(src0.columns.payload.data[lane]),
                front.src1[lane].eq(src1.columns.payload.data[lane]),
                front.found[lane].eq(
                    Mux(is_transpose, transposer.results.payload[lane], shuffle.o[lane])
                ),
                front.random[lane].eq(random[lane]),
                front.chosen[lane].eq(affine.chosen[lane]),
                cells.a[lane].eq(front.a[lane]),
                cells.y[lane].eq(front.y[lane]),
                cells.b[lane].eq(front.b[lane]),
                conversion.word[lane].eq(cells.o[lane]),
                column.data[lane].eq(results[lane]),
            ]
            if config.top:
                with m.If(is_top):
                    m.d.comb += front.found[lane].eq(top.results.payload[lane])
        nonzero: Value = Cat(cells.nonzero)
        for stage in range(CONVERT_LATENCY):
            moved = Signal(lanes, name=f"nonzero{stage}")
            with m.If(enable):
                m.d.sync += moved.eq(nonzero)
            nonzero = moved
        nonzero = Mux(converts, nonzero, Cat(cells.nonzero))
        everywhere = (~is_predicated).replicate(lanes)
        written_lanes = Mux(is_transpose, running.body.counts[3], running.header.lanes)[:8]
        m.d.comb += [
            column.mask.eq(lane_mask(written_lanes, lanes) & (nonzero | everywhere)),
            dst.columns.valid.eq(offer),
        ]
        return m
