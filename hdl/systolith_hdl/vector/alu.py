"""ALU of one lane: the operations of `isa.AluOp` on words of FP32, INT32 or UINT32."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from ..arith import FP32_LATENCY, Fp32Add, Fp32Mul, MulMode
from ..arith.fp32 import is_nan
from ..emit import Once
from ..formats import DType
from ..isa import AluOp

#: Cycles from operands to result.
ALU_LATENCY = FP32_LATENCY

_SIGN = 1 << 31


class _Logic(enum.Enum, shape=3):
    """What the result is made of, bit by bit."""

    ZERO = 0
    A = 1
    B = 2
    NOT_A = 3
    NOT_B = 4
    AND = 5
    OR = 6
    XOR = 7


class Alu(wiring.Component):
    """`o = a op b`.

    Members
    -------
    en : In(1), low freezes the pipeline
    op : In(6), an `AluOp`, travels with its operands
    dtype : In(DType), FP32, INT32 or UINT32, steady while operands are in the pipeline
    a, b : In(32)
    o : Out(32), ALU_LATENCY = 3 enabled cycles later

    Throughput: one operation per cycle.

    FP32 has its adder and its multiplier; the latter also multiplies and shifts integers. One
    integer adder adds and subtracts integers and, by the sign of a difference, compares words of
    every type.
    """

    en: In(1)
    op: In(6)
    dtype: In(DType)
    a: In(32)
    b: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        op = self.op
        fp32, unsigned = self.dtype == DType.FP32, self.dtype == DType.UINT32

        def is_one_of(*operations: AluOp) -> Value:
            return Cat(op == each for each in operations).any()

        # Operations of one operand are such of two: -a is -0 - a (of integers 0 - a), |a| is the
        # larger of the absolute values of a and 0, RELU is the larger of a and 0.
        a, b = self.a, Signal(32)
        alone = is_one_of(AluOp.NEG, AluOp.ABS, AluOp.RELU)
        m.d.comb += b.eq(
            Mux(alone, Cat(Const(0, 31), fp32 & (op == AluOp.NEG)), self.b),
        )
        add, subtract = op == AluOp.ADD, op == AluOp.SUB
        reverse = is_one_of(AluOp.RSUB, AluOp.NEG)
        absolute = is_one_of(AluOp.ABS, AluOp.ABS_MAX)

        m.submodules.add = adder = Once(Fp32Add(), "fp32_add")
        m.submodules.mul = mul = Once(Fp32Mul(words=True), "word_mul")
        m.d.comb += [
            adder.en.eq(self.en),
            adder.a.eq(a ^ Mux(reverse, _SIGN, 0)),
            adder.b.eq(b ^ Mux(subtract, _SIGN, 0)),
            mul.en.eq(self.en),
            mul.a.eq(a),
            mul.b.eq(Mux(op == AluOp.SQUARE, a, self.b)),
        ]
        with m.Switch(op):
            with m.Case(AluOp.SHIFT_LEFT):
                m.d.comb += mul.mode.eq(MulMode.SHIFT_LEFT)
            with m.Case(AluOp.SHIFT_RIGHT):
                m.d.comb += mul.mode.eq(MulMode.SHIFT_RIGHT)
            with m.Case(AluOp.SHIFT_RIGHT_SIGNED):
                m.d.comb += mul.mode.eq(MulMode.SHIFT_RIGHT_SIGNED)
            with m.Default():
                m.d.comb += mul.mode.eq(Mux(fp32, MulMode.FP32, MulMode.INTEGER))

        # Keys: unsigned numbers in the order of the words, of FP32 -0 below +0; for ABS_MAX in the
        # order of the magnitudes, that of a negative integer one too low. Keys of integers differ
        # from them in the top bit alone, so their sums and differences do, too, or not at all.
        turned = Mux(fp32, ~absolute, absolute & ~unsigned)
        top = Mux(unsigned, 1, ~absolute)

        def key(word: Value) -> Value:
            return Cat(
                word[:31] ^ (word[31] & turned).replicate(31),
                (word[31] ^ ~unsigned) & top,
            )

        total = Signal(33)
        tie = ~(absolute & ~fp32 & ~unsigned & b[31] & ~a[31])  # equal keys are not below
        m.d.comb += total.eq(
            (key(a) ^ reverse.replicate(32))
            + (key(b) ^ (~add & ~reverse).replicate(32))
            + Mux(add, 0, tie)
        )
        is_add = fp32 & (add | subtract | reverse)
        is_sum = ~fp32 & (add | subtract | reverse)
        is_mul = is_one_of(
            AluOp.MUL, AluOp.SQUARE, AluOp.SHIFT_LEFT, AluOp.SHIFT_RIGHT, AluOp.SHIFT_RIGHT_SIGNED
        )

        def later(value: Value, name: str) -> Signal:
            moved = Signal.like(value, name=name, reset_less=True)
            with m.If(self.en):
                m.d.sync += moved.eq(value)
            return moved

        # Stage 2: everything but FP32 sums and products is finished.
        unordered = later(fp32 & (is_nan(a) | is_nan(b)), "unordered")
        a_zero = later(~a[:31].any() & (fp32 | ~a[31]), "a_zero")
        b_zero = later(~b[:31].any() & (fp32 | ~b[31]), "b_zero")
        same = later(a == b, "same")
        is_sum, absolute = later(is_sum, "is_sum_1"), later(absolute, "absolute_1")
        a, b, op, total = (
            later(value, f"{name}_1")
            for name, value in {"a": a, "b": b, "op": op, "total": total}.items()
        )
        below = ~total[32]
        equal = (same | (a_zero & b_zero)) & ~unordered
        less = below & ~(a_zero & b_zero) & ~unordered
        flag = Signal()
        nan = Signal()
        logic = Signal(_Logic)
        negate = Signal()  # one is added to the complement of an integer
        m.d.comb += logic.eq(_Logic.A)
        with m.Switch(op):
            with m.Case(AluOp.MAX, AluOp.RELU):
                m.d.comb += [nan.eq(unordered), logic.eq(Mux(below, _Logic.B, _Logic.A))]
            with m.Case(AluOp.MIN):
                m.d.comb += [nan.eq(unordered), logic.eq(Mux(below, _Logic.A, _Logic.B))]
            with m.Case(AluOp.ABS_MAX, AluOp.ABS):
                m.d.comb += [
                    nan.eq(unordered),
                    negate.eq((self.dtype == DType.INT32) & Mux(below, b[31], a[31])),
                    logic.eq(
                        Mux(
                            below,
                            Mux(negate, _Logic.NOT_B, _Logic.B),
                            Mux(negate, _Logic.NOT_A, _Logic.A),
                        )
                    ),
                ]
            for operation, condition in {
                AluOp.EQ: equal,
                AluOp.NE: ~equal,
                AluOp.LT: less,
                AluOp.LE: less | equal,
                AluOp.GT: ~less & ~equal & ~unordered,
                AluOp.GE: ~less & ~unordered,
                AluOp.LOGICAL_AND: ~a_zero & ~b_zero,
                AluOp.LOGICAL_OR: ~a_zero | ~b_zero,
                AluOp.LOGICAL_XOR: a_zero ^ b_zero,
            }.items():
                with m.Case(operation):
                    m.d.comb += [flag.eq(condition), logic.eq(_Logic.ZERO)]
            for operation, function in {
                AluOp.BIT_AND: _Logic.AND,
                AluOp.BIT_OR: _Logic.OR,
                AluOp.BIT_XOR: _Logic.XOR,
                AluOp.BIT_NOT: _Logic.NOT_A,
            }.items():
                with m.Case(operation):
                    m.d.comb += logic.eq(function)
        with m.If(nan | is_sum):
            m.d.comb += logic.eq(_Logic.ZERO)

        bits = Signal(32)
        with m.Switch(logic):
            for function, value in {
                _Logic.A: a,
                _Logic.B: b,
                _Logic.NOT_A: ~a,
                _Logic.NOT_B: ~b,
                _Logic.AND: a & b,
                _Logic.OR: a | b,
                _Logic.XOR: a ^ b,
            }.items():
                with m.Case(function):
                    m.d.comb += bits.eq(value)
        # 1, 1.0 (0x3F800000) and NaN (0x7FC00000).
        one = flag & fp32
        constant = Cat(flag & ~fp32, Const(0, 21), nan, (one | nan).replicate(7), nan, Const(0, 1))
        simple = Signal(32)
        m.d.comb += simple.eq(
            Cat(bits[:31], bits[31] & ~(fp32 & absolute))
            | (total[:32] & is_sum.replicate(32))
            | constant
        )

        simple = later((simple + negate)[:32], "simple_2")
        simple = later(simple, "simple_3")
        for stage in range(ALU_LATENCY):
            is_add, is_mul = (
                later(is_add, f"is_add_{stage + 1}"),
                later(is_mul, f"is_mul_{stage + 1}"),
            )
        m.d.comb += self.o.eq(Mux(is_add, adder.o, Mux(is_mul, mul.o, simple)))
        return m
