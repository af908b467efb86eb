"""The vector engine."""

import dataclasses
import functools

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from ..access import Pattern, elementwise_ports, pattern, place_streamers
from ..arith import DITHER_LATENCY, Dither, RoundNarrow, engine_key
from ..config import CoreConfig
from ..emit import Once, side_by_side
from ..formats import DType
from ..isa import (
    INSTRUCTION_BITS,
    SPECS,
    AluOp,
    EngineKind,
    Opcode,
    Rounding,
    field_of,
    is_opcode,
    operand_counts,
)
from ..ports import IssuePort, split_words
from .affine import Affine, affine_setup
from .front import HALVES_OFFSET, Condition, FrontLane
from .front import Data as FrontData
from .lane import LANE_LATENCY, VectorLane
from .reduce import REDUCE_CYCLES, Steering

__all__ = ["FIXED_CYCLES", "REDUCE_CYCLES", "VectorEngine", "fixed_cycles", "lane_mask"]

#: Cycles an elementwise instruction takes from being taken to `done`, beyond one per column, when
#: no memory port stalls: 4 to the first column, the lanes, 2 to write.
FIXED_CYCLES = 4 + LANE_LATENCY + 1

# The first result that needs a random word finds it, so stochastic rounding costs no cycle. Only
# MEMSET's comes 3 cycles earlier, as nothing is read, and waits for it, within FIXED_CYCLES.
assert DITHER_LATENCY <= 4 + LANE_LATENCY


def fixed_cycles(opcode: Opcode, config: CoreConfig) -> int:
    """Cycles an instruction takes from being taken to `done`, beyond one per column, when no memory
    port stalls; at most."""
    if opcode in (Opcode.IOTA, Opcode.AFFINE_SELECT):
        return LANE_LATENCY + 1 + max(4, affine_setup(config))
    if opcode is Opcode.RANGE_SELECT:
        return FIXED_CYCLES + 2  # its bounds come first
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
    Opcode.REDUCE: Form(operations=True),
    Opcode.MEMSET: Form(condition=Condition.NEVER, stepped=True),
    # The data pass through the ALUs, the mask comes along as b.
    Opcode.COPY_PREDICATED: Form(data=FrontData.SRC1),
    Opcode.IOTA: Form(data=FrontData.NUMBER, stepped=True),
    Opcode.AFFINE_SELECT: Form(condition=Condition.NUMBER, stepped=True),
    Opcode.SELECT: Form(data=FrontData.SRC1, condition=Condition.SRC0),
    Opcode.RANGE_SELECT: Form(condition=Condition.RANGE, stepped=True),
}
assert FORMS.keys() == {o for o, spec in SPECS.items() if spec.kind is EngineKind.VECTOR}

#: op0 -> for which a comparison with zero holds: below, zero, above, NaN
_HOLDS = {
    AluOp.LT: 0b0001,
    AluOp.LE: 0b0011,
    AluOp.EQ: 0b0010,
    AluOp.NE: 0b1101,
    AluOp.GT: 0b0100,
    AluOp.GE: 0b0110,
}


def lane_mask(lanes: Value, count: int) -> Value:
    """One bit for each of `count` lanes, high in the first `lanes`."""
    return Cat(Const(lane, 8) < lanes for lane in range(count))


def _reading(operand: str) -> frozenset[Opcode]:
    return frozenset(opcode for opcode in FORMS if operand in SPECS[opcode].operands)


class VectorEngine(wiring.Component):
    """Executes the instructions of `EngineKind.VECTOR` on N lanes.

    A column goes from the readers of src0 and src1, or from `Affine`, through `FrontLane`, the two
    ALUs of `VectorLane` and the rounding to the writer of dst.

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
    ``n + fixed_cycles(opcode)`` cycles after it is taken when no port stalls; REDUCE of r results
    takes ``n + FIXED_CYCLES + r * REDUCE_CYCLES`` at most. The next is taken in the cycle of
    `done`.
    """

    def __init__(self, config: CoreConfig, *, number: int) -> None:
        self._config = config
        self._number = number
        super().__init__({"issue": In(IssuePort()), **elementwise_ports(config)})

    def _walk(self, m: Module, word: Value, operand: str) -> Value:
        """The pattern of an operand of the instruction `word`."""
        two = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, word)
        view = getattr(two.body, operand)
        walk = Signal(Pattern, name=f"{operand}_walk")
        m.d.comb += walk.eq(pattern(view, two.body.counts))
        counts = list(two.body.counts)
        for opcode in _reading(operand):
            field = functools.partial(field_of, word, opcode)
            walked = operand_counts(opcode, operand, counts, field)
            with m.If(two.header.opcode == opcode):
                m.d.comb += [
                    walk.counts[d].eq(walked[d]) for d in range(4) if walked[d] is not counts[d]
                ]
        return walk

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes

        src0, src1, dst = place_streamers(m, self, config)
        m.submodules.affine = affine = Affine(config)

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

        new = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, incoming.payload)
        new_affine = data.View(SPECS[Opcode.AFFINE_SELECT].layout, incoming.payload).body
        for name, streamer in (("src0", src0), ("src1", src1), ("dst", dst)):
            started = is_opcode(new.header.opcode, _reading(name), config)
            m.d.comb += [
                streamer.start.payload.eq(self._walk(m, incoming.payload, name)),
                streamer.start.valid.eq(take & started),
            ]
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

        # -- The running instruction.
        running = data.View(SPECS[Opcode.TENSOR_TENSOR].layout, word)
        scalar = data.View(SPECS[Opcode.TENSOR_SCALAR].layout, word)
        code = running.header.opcode
        is_range = Signal()
        is_predicated = Signal()
        is_tensor_tensor = Signal()
        is_stepped = Signal()
        reads0, reads1 = Signal(), Signal()
        m.d.comb += [
            is_range.eq(code == Opcode.RANGE_SELECT),
            is_predicated.eq(code == Opcode.COPY_PREDICATED),
            is_tensor_tensor.eq(code == Opcode.TENSOR_TENSOR),
            is_stepped.eq(is_opcode(code, stepped, config)),
            reads0.eq(is_opcode(code, _reading("src0"), config)),
            reads1.eq(is_opcode(code, _reading("src1") - {Opcode.RANGE_SELECT}, config)),
        ]
        front_data = Signal(FrontData)
        condition = Signal(Condition)
        op0, op1, imm0 = Signal(6), Signal(6), Signal(32)
        with m.Switch(code):
            for opcode, form in FORMS.items():
                with m.Case(opcode.value):
                    m.d.comb += [front_data.eq(form.data), condition.eq(form.condition)]
                    if form.operations:
                        m.d.comb += [op0.eq(running.header.op0), op1.eq(running.header.op1)]
        m.d.comb += imm0.eq(scalar.body.imm0)
        with m.If((code == Opcode.IOTA) & (running.body.dst.dtype == DType.FP32)):
            m.d.comb += [
                front_data.eq(FrontData.HALVES),
                op0.eq(AluOp.SUB.value),
                imm0.eq(HALVES_OFFSET),
                op1.eq(AluOp.ADD.value),
            ]

        # -- Random words for the results, one column after the other.
        m.submodules.dither = dither = Once(Dither(lanes=lanes), f"dither_{lanes}")
        stochastic = Signal()
        wanted = (new.header.rounding == Rounding.STOCHASTIC) & (new.body.dst.dtype != DType.FP32)
        with m.If(take):
            m.d.sync += stochastic.eq(wanted)
        m.submodules.steering = steering = Steering()
        out_valid = steering.result
        written = Signal()
        offer = Signal()
        m.d.comb += [
            offer.eq(out_valid & (dither.valid | ~stochastic)),
            written.eq(offer & dst.columns.ready),
            dither.start.eq(take & wanted),
            dither.seed.eq(self.issue.seed),
            dither.counter.eq(self.issue.counter),
            dither.key.eq(engine_key(self._number)),
            dither.take.eq(written & stochastic),
        ]

        # -- Columns enter the lanes.
        enable = Signal()
        enter = Signal()
        bounds = Signal(2)  # of RANGE_SELECT, that are still to come: one-hot
        with m.If(take):
            m.d.sync += bounds.eq(new.header.opcode == Opcode.RANGE_SELECT)
        with m.Elif(src1.columns.valid):
            m.d.sync += bounds.eq(bounds << 1)
        offered = (
            (src0.columns.valid | ~reads0)
            & (src1.columns.valid | ~reads1)
            & (affine.element.valid | ~is_stepped)
            & ~bounds.any()
        )
        m.d.comb += [
            # An idle engine stands still: nothing is in its pipelines.
            enable.eq(active & (~out_valid | written)),
            enter.eq(offered & enable & ~steering.closed),
            src0.columns.ready.eq(enter & reads0),
            src1.columns.ready.eq((enter & reads1) | bounds.any()),
            affine.element.ready.eq(enter & is_stepped),
            steering.enable.eq(enable),
            steering.enter.eq(enter),
            steering.reducing.eq(code == Opcode.REDUCE),
            steering.length.eq(running.body.counts[3]),
            steering.begin.eq(take),
        ]

        # -- Lanes.
        fill = data.View(SPECS[Opcode.AFFINE_SELECT].layout, word).body.fill
        holds = Signal(4)
        with m.Switch(running.header.op0):
            for comparison, for_which in _HOLDS.items():
                with m.Case(comparison.value):
                    m.d.comb += holds.eq(for_which)
        m.submodules.front = front = side_by_side(
            FrontLane(), "vector_front", lanes,
            shared=(
                "data", "condition", "holds", "otherwise", "index", "bounds", "start", "base",
                "step", "increment", "predicated", "tensor", "imm1",
            ),
        )  # fmt: skip
        m.submodules.lanes = cells = side_by_side(
            VectorLane(), "vector_lane", lanes,
            shared=("en", "op0", "op1", "imm0", "second", "index", "clear"),
        )  # fmt: skip
        m.submodules.rounding = rounding = side_by_side(
            RoundNarrow(), "round_narrow", lanes, shared=("dtype", "stochastic")
        )
        m.d.comb += [
            front.data.eq(front_data),
            front.condition.eq(condition),
            front.holds.eq(holds),
            front.otherwise.eq(
                Mux(code == Opcode.AFFINE_SELECT, Cat(Const(0, 16), fill), scalar.body.imm0)
            ),
            front.index.eq(affine.element.payload.index),
            front.bounds.eq(Mux(src1.columns.valid & is_range, bounds, 0)),
            front.start.eq(affine.start),
            front.base.eq(affine.base),
            front.step.eq(affine.step),
            front.increment.eq(affine.increment),
            front.predicated.eq(is_predicated),
            front.tensor.eq(is_tensor_tensor),
            front.imm1.eq(scalar.body.imm1),
            cells.en.eq(enable),
            cells.op0.eq(op0),
            cells.op1.eq(op1),
            cells.imm0.eq(imm0),
            cells.second.eq(steering.second),
            cells.index.eq(steering.index),
            cells.clear.eq(steering.clear),
            rounding.dtype.eq(running.body.dst.dtype),
            rounding.stochastic.eq(stochastic),
        ]
        column = dst.columns.payload
        random = split_words(m, dither.words, name="random")
        for lane in range(lanes):
            m.d.comb += [
                front.src0[lane].eq(src0.columns.payload.data[lane]),
                front.src1[lane].eq(src1.columns.payload.data[lane]),
                front.chosen[lane].eq(affine.chosen[lane]),
                cells.a[lane].eq(front.a[lane]),
                cells.b[lane].eq(front.b[lane]),
                rounding.word[lane].eq(cells.o[lane]),
                rounding.random[lane].eq(random[lane]),
                column.data[lane].eq(rounding.o[lane]),
            ]
        nonzero = Cat(cells.nonzero)
        everywhere = (~is_predicated).replicate(lanes)
        m.d.comb += [
            column.mask.eq(lane_mask(running.header.lanes, lanes) & (nonzero | everywhere)),
            dst.columns.valid.eq(offer),
        ]
        return m
