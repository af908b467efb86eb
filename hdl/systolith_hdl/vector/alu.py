"""ALU of one lane: the operations of `isa.AluOp` on FP32 words."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..arith import FP32_LATENCY, Fp32Add, Fp32Mul
from ..arith.fp32 import is_nan
from ..emit import Once
from ..formats import CANONICAL_NAN
from ..isa import AluOp

#: Cycles from operands to result.
ALU_LATENCY = FP32_LATENCY

_SIGN = 1 << 31
_ONE = 0x3F800000


def _order(word: Value) -> Value:
    """Maps FP32 words to unsigned numbers of the same order, -0 below +0."""
    return Mux(word[31], ~word, Cat(word[:31], Const(1, 1)))


class Alu(wiring.Component):
    """`o = a op b`.

    Members
    -------
    en : In(1), low freezes the pipeline
    op : In(6), an `AluOp`, travels with its operands
    a, b : In(32)
    o : Out(32), ALU_LATENCY = 3 enabled cycles later

    Throughput: one operation per cycle.
    """

    en: In(1)
    op: In(6)
    a: In(32)
    b: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a, b, op = self.a, self.b, self.op

        m.submodules.add = add = Once(Fp32Add(), "fp32_add")
        m.submodules.mul = mul = Once(Fp32Mul(), "fp32_mul")
        m.d.comb += [
            add.en.eq(self.en),
            add.a.eq(a ^ Mux(op == AluOp.RSUB, _SIGN, 0)),
            add.b.eq(b ^ Mux(op == AluOp.SUB, _SIGN, 0)),
            mul.en.eq(self.en),
            mul.a.eq(a),
            mul.b.eq(b),
        ]

        # Everything that needs no arithmetic is worked out at once and delayed.
        unordered = is_nan(a) | is_nan(b)
        a_zero, b_zero = ~a[:31].any(), ~b[:31].any()
        equal = ((a == b) | (a_zero & b_zero)) & ~unordered
        below = _order(a) < _order(b)  # -0 below +0: for MAX and MIN
        less = below & ~(a_zero & b_zero) & ~unordered
        nan = Const(CANONICAL_NAN, 32)

        def flag(condition: Value) -> Value:
            return Mux(condition, _ONE, 0)

        simple = Signal(32)
        with m.Switch(op):
            with m.Case(AluOp.MAX.value):
                m.d.comb += simple.eq(Mux(unordered, nan, Mux(below, b, a)))
            with m.Case(AluOp.MIN.value):
                m.d.comb += simple.eq(Mux(unordered, nan, Mux(below, a, b)))
            with m.Case(AluOp.ABS_MAX.value):
                larger = Mux(a[:31] < b[:31], b[:31], a[:31])
                m.d.comb += simple.eq(Mux(unordered, nan, larger))
            with m.Case(AluOp.EQ.value):
                m.d.comb += simple.eq(flag(equal))
            with m.Case(AluOp.NE.value):
                m.d.comb += simple.eq(flag(~equal))
            with m.Case(AluOp.LT.value):
                m.d.comb += simple.eq(flag(less))
            with m.Case(AluOp.LE.value):
                m.d.comb += simple.eq(flag(less | equal))
            with m.Case(AluOp.GT.value):
                m.d.comb += simple.eq(flag(~less & ~equal & ~unordered))
            with m.Case(AluOp.GE.value):
                m.d.comb += simple.eq(flag(~less & ~unordered))
            with m.Case(AluOp.LOGICAL_AND.value):
                m.d.comb += simple.eq(flag(~a_zero & ~b_zero))
            with m.Case(AluOp.LOGICAL_OR.value):
                m.d.comb += simple.eq(flag(~a_zero | ~b_zero))
            with m.Case(AluOp.LOGICAL_XOR.value):
                m.d.comb += simple.eq(flag(a_zero ^ b_zero))
            with m.Case(AluOp.BIT_AND.value):
                m.d.comb += simple.eq(a & b)
            with m.Case(AluOp.BIT_OR.value):
                m.d.comb += simple.eq(a | b)
            with m.Case(AluOp.BIT_XOR.value):
                m.d.comb += simple.eq(a ^ b)
            with m.Default():
                m.d.comb += simple.eq(a)

        is_add = (op == AluOp.ADD) | (op == AluOp.SUB) | (op == AluOp.RSUB)
        is_mul = op == AluOp.MUL
        for stage in range(ALU_LATENCY):
            moved = Signal.like(simple, name=f"simple{stage}")
            kinds = Signal(2, name=f"kind{stage}")
            with m.If(self.en):
                m.d.sync += [moved.eq(simple), kinds.eq(Cat(is_add, is_mul))]
            simple, is_add, is_mul = moved, kinds[0], kinds[1]
        m.d.comb += self.o.eq(Mux(is_add, add.o, Mux(is_mul, mul.o, simple)))
        return m
