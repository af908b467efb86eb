"""One lane of the vector engine."""

from amaranth.hdl import Array, Module, Mux, Signal
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from ..arith.divide import Divide
from ..emit import Once
from ..formats import DType
from ..isa import REDUCE_ACCUMULATORS, REDUCTIONS, AluOp
from .alu import ALU_LATENCY, Alu

#: Cycles from the operands of the first ALU to the result of the second.
LOOP_LATENCY = 2 * ALU_LATENCY
#: Cycles from operands to result when nothing is reduced: they are registered first.
LANE_LATENCY = 1 + LOOP_LATENCY


class Second(enum.Enum, shape=2):
    """What the second ALU works on."""

    #: x op1 b, x the result of the first ALU
    OPERAND = 0
    #: accumulator[index] op1 x, result back to accumulator[index]
    ACCUMULATE = 1
    #: accumulator[index] op1 accumulator[index + 1], result back to accumulator[index]
    COMBINE = 2
    #: accumulator[index] op1 accumulator[index + 2], result to the output
    FINISH = 3


class VectorLane(wiring.Component):
    """Two ALUs in a row, with the accumulators of REDUCE and STATISTICS around the second.

    Parameters
    ----------
    divider : whether there is one; without, `divide`, `start`, `divides` and `busy` stay low

    Members
    -------
    en : In(1), low freezes the lane
    op0 : In(6), of the element entering
    op1 : In(6), of the running instruction, steady while it runs
    dtype : In(DType) in which both ALUs work, steady while it runs
    a, y, b : In(32), operands of the element entering: x = a op0 y, result = x op1 b
    chain : In(1), y is the result that leaves the lane when the element is at the first ALU
    divide : In(1), the divider works on the element at the second ALU: `en` is low; `start`, high
        in its first cycle, gives it its operands. Its result takes the place of x, and op1 that of
        BYPASS, in an enabled cycle with `divides`
    divides : In(1), op1 is one of `isa.DIVISIONS`, steady while the instruction runs
    busy : Out(1), the divider has no result yet
    second : In(Second) and index : In(2), steer the second ALU in the cycle the element reaches it
    clear : In(1), sets all accumulators to the identity of op1
    o : Out(32), LANE_LATENCY = 7 enabled cycles after a and b
    nonzero : Out(1), whether `b` was not zero, in step with o (for COPY_PREDICATED)

    The result of the second ALU is back in its accumulator one cycle after it leaves the ALU:
    REDUCE_ACCUMULATORS = 4 accumulators used in turn therefore sustain one element per cycle.
    """

    en: In(1)
    op0: In(6)
    op1: In(6)
    dtype: In(DType)
    a: In(32)
    y: In(32)
    b: In(32)
    chain: In(1)
    divide: In(1)
    start: In(1)
    divides: In(1)
    busy: Out(1)
    second: In(Second)
    index: In(2)
    clear: In(1)
    o: Out(32)
    nonzero: Out(1)

    def __init__(self, *, divider: bool) -> None:
        self._divider = divider
        super().__init__()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        assert REDUCE_ACCUMULATORS == ALU_LATENCY + 1
        m.submodules.first_alu = first = Once(Alu(), "vector_alu")
        m.submodules.second_alu = second = Once(Alu(), "vector_alu")

        a, y, b = (Signal(32, name=name, reset_less=True) for name in ("a_0", "y_0", "b_0"))
        op0, chain = Signal(6, reset_less=True), Signal(reset_less=True)
        with m.If(self.en):
            m.d.sync += [
                a.eq(self.a),
                y.eq(self.y),
                b.eq(self.b),
                op0.eq(self.op0),
                chain.eq(self.chain),
            ]
        m.d.comb += [
            first.en.eq(self.en),
            first.dtype.eq(self.dtype),
            second.dtype.eq(self.dtype),
            first.op.eq(op0),
            first.a.eq(a),
            first.b.eq(Mux(chain, second.o, y)),
        ]
        nonzero = b[:31].any() | (b[31] & (self.dtype != DType.FP32))
        for stage in range(ALU_LATENCY):
            moved = Signal(32, name=f"b_{stage + 1}", reset_less=True)
            with m.If(self.en):
                m.d.sync += moved.eq(b)
            b = moved
        for stage in range(LOOP_LATENCY):
            flag = Signal(name=f"nonzero{stage}")
            with m.If(self.en):
                m.d.sync += flag.eq(nonzero)
            nonzero = flag

        accumulators = Array(Signal(32, name=f"accumulator{i}") for i in range(REDUCE_ACCUMULATORS))
        identity = Signal(32)
        with m.Switch(self.op1):
            for op, starts in REDUCTIONS.items():
                with m.Case(op.value), m.Switch(self.dtype):
                    for dtype, start in starts.items():
                        with m.Case(dtype):
                            m.d.comb += identity.eq(start)

        x, operation = first.o, self.op1
        if self._divider:
            m.submodules.divider = divider = Divide()
            m.d.comb += [
                divider.step.eq(self.divide),
                divider.start.eq(self.start),
                divider.op.eq(self.op1),
                divider.dtype.eq(self.dtype),
                divider.a.eq(first.o),
                divider.b.eq(b),
                self.busy.eq(divider.busy),
            ]
            x = Mux(self.divides, divider.o, x)
            operation = Mux(self.divides, AluOp.BYPASS.value, operation)

        accumulator = accumulators[self.index]
        m.d.comb += [second.en.eq(self.en), second.op.eq(operation)]
        with m.Switch(self.second):
            with m.Case(Second.OPERAND):
                m.d.comb += [second.a.eq(x), second.b.eq(b)]
            with m.Case(Second.ACCUMULATE):
                m.d.comb += [second.a.eq(accumulator), second.b.eq(first.o)]
            with m.Case(Second.COMBINE, Second.FINISH):
                distance = Mux(self.second == Second.FINISH, 2, 1)
                m.d.comb += [
                    second.a.eq(accumulator),
                    second.b.eq(accumulators[self.index | distance]),
                ]

        # The accumulator a result belongs to leaves the ALU's delay line with the result.
        target = self.index
        back = (self.second == Second.ACCUMULATE) | (self.second == Second.COMBINE)
        for stage in range(ALU_LATENCY):
            moved_target = Signal(2, name=f"target{stage}")
            moved_back = Signal(name=f"back{stage}")
            with m.If(self.en):
                m.d.sync += [moved_target.eq(target), moved_back.eq(back)]
            target, back = moved_target, moved_back
        with m.If(self.en & back):
            m.d.sync += accumulators[target].eq(second.o)
        with m.If(self.clear):
            m.d.sync += [accumulators[i].eq(identity) for i in range(REDUCE_ACCUMULATORS)]

        m.d.comb += [self.o.eq(second.o), self.nonzero.eq(nonzero)]
        return m
