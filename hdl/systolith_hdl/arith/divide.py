"""Quotients, remainders and roots, a bit per cycle."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from ..formats import CANONICAL_NAN, FORMATS, INFINITY, ONE, DType
from ..isa import AluOp

_BIAS = FORMATS[DType.FP32].bias
#: Bits of a significand, and one more to round by.
_BITS = 25

#: Cycles from `start` to the first without `busy`, at most: of FP32, by operation, and of integers.
DIVIDE_CYCLES = {
    AluOp.DIVIDE: 30,
    AluOp.MOD: 289,  # 36, and the difference of the exponents, and the result's leading zeros
    AluOp.RECIPROCAL: 30,
    AluOp.SQRT: 29,
    AluOp.RSQRT: 58,
}
DIVIDE_INTEGER_CYCLES = 37
#: Cycles more, at most, where an operand is subnormal; of MOD none.
DIVIDE_SUBNORMAL_CYCLES = 23


class _State(enum.Enum, shape=3):
    IDLE = 0
    #: the signs of integers are taken off, one after the other
    ABSOLUTE_A = 1
    ABSOLUTE_B = 2
    #: significands are shifted up until they have their leading one
    NORMALISE = 3
    #: the first bit of a quotient of significands, which may be 0
    FIRST = 4
    STEP = 5
    #: what MOD leaves is shifted up until it has its leading one
    RAISE = 6
    FINISH = 7


class Divide(wiring.Component):
    """`o = a op b` for DIVIDE, MOD, RECIPROCAL, SQRT and RSQRT, by subtracting and shifting.

    FP32 results are rounded to nearest even, that of RSQRT is 1 divided by the rounded root, that
    of MOD, C's `fmod`, is exact. Those of integers are what C gives: the quotient toward zero, the
    remainder with the sign of a. A quotient by 0 has all bits set, the remainder is a then.

    Members
    -------
    step : In(1), low freezes it
    start : In(1), takes `a` and `b`
    op : In(6), an `AluOp`, steady until the result is there
    dtype : In(DType), FP32, INT32 or UINT32; likewise. Roots and RECIPROCAL are for FP32
    a, b : In(32), the latter likewise
    busy : Out(1), from the cycle after `start` until `o` is the result
    o : Out(32), kept until the next `start`

    Latency: DIVIDE_CYCLES or DIVIDE_INTEGER_CYCLES of `step` at most, DIVIDE_SUBNORMAL_CYCLES more
    where an operand is subnormal; zeros, infinities and NaN take one, but for zeros of MOD, which
    takes one where b has the larger exponent. Else the remainder of FP32 takes 36 cycles, and one
    for each that the exponent of a is larger than that of b, and that of b than the result's.

    Source of the method: restoring division and its counterpart for square roots; see e.g. Parhami,
    "Computer Arithmetic", chapters 13 and 21. Both bring down bits of the number to be divided
    behind the rest, one for a quotient, two for a root, and subtract the divisor, or four times the
    root so far and one. A subnormal result needs fewer bits, so the last are not calculated; what
    is left says whether it was exact. MOD of FP32 divides significands as integers, 32 bits and as
    many zeros as the exponents differ by, so subnormal numbers need not be shifted up first.
    """

    step: In(1)
    start: In(1)
    op: In(6)
    dtype: In(DType)
    a: In(32)
    b: In(32)
    busy: Out(1)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        op = self.op
        fp32 = self.dtype == DType.FP32
        fmod = Signal()
        has_sign = self.dtype == DType.INT32
        is_mod, is_rsqrt = op == AluOp.MOD, op == AluOp.RSQRT
        is_root = (op == AluOp.SQRT) | is_rsqrt
        m.d.comb += fmod.eq(fp32 & is_mod)

        state = Signal(_State)
        rest, divisor, quotient = Signal(32), Signal(32), Signal(32)
        exponent = Signal(signed(11))  # of the result, biased
        left = Signal(range(33))  # bits still to be calculated
        negative = Signal()
        inverts = Signal()  # RSQRT has its root and divides by it
        root = is_root & ~inverts

        # -- What the operands are: `n` is divided by `d`, or the root of `d` is taken.
        n = Signal(32)
        d = Signal(32)
        m.d.comb += [
            n.eq(Mux(op == AluOp.RECIPROCAL, ONE, self.a)),
            d.eq(Mux((op == AluOp.DIVIDE) | is_mod, self.b, self.a)),
        ]

        def kind(word: Value) -> tuple[Value, Value, Value, Value]:
            """(exponent, whether the word is zero, infinite, NaN)"""
            field, fraction = word[23:31], word[:23].any()
            last = field.all()
            return (
                Cat(field[0] | ~field.any(), field[1:]),
                ~field.any() & ~fraction,
                last & ~fraction,
                last & fraction,
            )

        n_exponent, n_zero, n_infinite, n_nan = kind(n)
        d_exponent, d_zero, d_infinite, d_nan = kind(d)
        distance = Signal(signed(9))
        m.d.comb += distance.eq(n_exponent - d_exponent)
        sign = Mux(is_root, d[31], n[31] ^ (d[31] & ~is_mod))
        nan = Mux(
            is_root,
            d_nan | (d[31] & ~d_zero),
            n_nan | d_nan | (n_infinite & (d_infinite | is_mod)) | (d_zero & (n_zero | is_mod)),
        )
        infinite = Mux(is_root, Mux(is_rsqrt, d_zero, d_infinite), n_infinite | d_zero)
        zero = Mux(is_root, Mux(is_rsqrt, d_infinite, d_zero), n_zero | d_infinite)

        # -- One bit: the number brought down, less the divisor if it is not larger.
        brought = Signal(33)
        taken = Signal(33)
        difference = Signal(34)
        bit = Signal()
        after = Signal(32)
        m.d.comb += [
            brought.eq(Mux(root, Cat(divisor[30:], rest[:31]), Cat(quotient[31], rest))),
            taken.eq(Mux(root, Cat(Const(1, 2), quotient[:31]), divisor)),
            difference.eq(brought - taken),
            bit.eq(~difference[33]),
            after.eq(Mux(bit, difference, brought)[:32]),
        ]

        # -- One adder rounds, and gives integers their signs.
        low_n, low_d = ~rest[30] & ~root, ~divisor[31]
        up = quotient[0] & (quotient[1] | rest.any())
        field = Mux(Mux(is_mod, rest[23], quotient[_BITS - 1]), exponent[:8], 0)
        finishing = Signal()
        value = Signal(32)
        flip = Signal()
        total = Signal(32)
        m.d.comb += finishing.eq(state == _State.FINISH)
        with m.If(finishing & is_mod):
            m.d.comb += [
                value.eq(Cat(rest[:23], Mux(fp32, field, rest[23:]))),
                flip.eq(negative & ~fp32),
            ]
        with m.Elif(finishing & fp32):
            m.d.comb += value.eq(Cat(quotient[1 : _BITS - 1], field))
        with m.Elif(finishing):
            m.d.comb += [value.eq(quotient), flip.eq(negative)]
        with m.Elif(state == _State.ABSOLUTE_B):
            m.d.comb += [value.eq(divisor), flip.eq(has_sign & divisor[31])]
        with m.Else():
            m.d.comb += [value.eq(quotient), flip.eq(has_sign & quotient[31])]
        m.d.comb += total.eq((value ^ flip.replicate(32)) + Mux(finishing & fp32, up, flip))

        m.d.comb += self.busy.eq(state != _State.IDLE)
        with m.If(self.step & self.start):
            m.d.sync += [
                inverts.eq(0),
                left.eq(32),
                exponent.eq(Mux(is_root, d_exponent, distance + _BIAS)),
                state.eq(_State.NORMALISE),
                rest.eq(Mux(is_root, 0, Cat(Const(0, 7), n[:23], n[23:31].any()))),
                divisor.eq(Cat(Const(0, 8), d[:23], d[23:31].any())),
                quotient.eq(0),
                negative.eq(sign),
            ]
            with m.If(~fp32 | is_mod):
                top_a = Mux(fp32, self.a[23:31].any(), self.a[23:])
                top_b = Mux(fp32, self.b[23:31].any(), self.b[23:])
                m.d.sync += [
                    state.eq(Mux(fp32, _State.STEP, _State.ABSOLUTE_A)),
                    rest.eq(0),
                    divisor.eq(Cat(self.b[:23], top_b)),
                    quotient.eq(Cat(self.a[:23], top_a)),
                ]
            with m.If(~fp32):
                m.d.sync += negative.eq(
                    has_sign & (self.a[31] ^ (self.b[31] & ~is_mod)) & (self.b.any() | is_mod)
                )
            with m.Elif(nan | Mux(is_mod, distance < 0, infinite | zero)):
                word = Mux(infinite, INFINITY, 0)
                m.d.sync += [
                    state.eq(_State.IDLE),
                    self.o.eq(
                        Mux(nan, CANONICAL_NAN, Cat(Mux(is_mod, self.a[:31], word[:31]), sign))
                    ),
                ]
        with m.Elif(self.step):
            with m.Switch(state):
                with m.Case(_State.ABSOLUTE_A):
                    m.d.sync += [quotient.eq(total), state.eq(_State.ABSOLUTE_B)]
                with m.Case(_State.ABSOLUTE_B):
                    m.d.sync += [divisor.eq(total), state.eq(_State.STEP)]
                with m.Case(_State.NORMALISE):
                    with m.If(low_n):
                        m.d.sync += rest.eq(rest << 1)
                    with m.If(low_d):
                        m.d.sync += divisor.eq(divisor << 1)
                    m.d.sync += exponent.eq(exponent + Mux(root, -low_d, low_d - low_n))
                    with m.If(~low_n & ~low_d):
                        with m.If(root):
                            # 1 to 4, less its even exponent: two bits before the point.
                            m.d.sync += [
                                divisor.eq(Mux(exponent[0], divisor >> 1, divisor)),
                                exponent.eq((exponent + _BIAS) >> 1),
                                left.eq(_BITS),
                                state.eq(_State.STEP),
                            ]
                        with m.Else():
                            m.d.sync += [
                                left.eq(
                                    Mux(
                                        exponent >= 1,
                                        _BITS,
                                        Mux(exponent <= 1 - _BITS, 0, exponent + _BITS - 1),
                                    )
                                ),
                                state.eq(_State.FIRST),
                            ]
                with m.Case(_State.FIRST):
                    m.d.sync += [
                        rest.eq(after),
                        quotient.eq(bit & (left != 0)),
                        state.eq(_State.STEP),
                    ]
                    with m.If(~bit):
                        m.d.sync += exponent.eq(exponent - 1)
                    # A leading zero is not one of the bits, but may take one from a subnormal.
                    with m.If((bit | (exponent <= 1)) & (left != 0)):
                        m.d.sync += left.eq(left - 1)
                with m.Case(_State.STEP):
                    # The remainder of FP32 goes on with the zeros behind its significand: what it
                    # brings down must not be the quotient.
                    further = fmod & (exponent != _BIAS)
                    with m.If((left != 0) | further):
                        m.d.sync += [rest.eq(after), quotient.eq(Cat(bit & ~is_mod, quotient))]
                        with m.If(root):
                            m.d.sync += divisor.eq(divisor << 2)
                    with m.If(left != 0):
                        m.d.sync += left.eq(left - 1)
                    with m.Elif(further):
                        m.d.sync += exponent.eq(exponent - 1)
                    with m.Else():
                        m.d.sync += state.eq(Mux(fmod, _State.RAISE, _State.FINISH))
                        with m.If(fmod):
                            m.d.sync += exponent.eq(d_exponent)
                with m.Case(_State.RAISE):
                    with m.If(rest[23] | (exponent == 1) | ~rest.any()):
                        m.d.sync += state.eq(_State.FINISH)
                    with m.Else():
                        m.d.sync += [rest.eq(rest << 1), exponent.eq(exponent - 1)]
                with m.Case(_State.FINISH):
                    overflow = fp32 & (exponent >= 255)
                    m.d.sync += [
                        self.o.eq(
                            Mux(
                                fp32,
                                Cat(Mux(overflow, INFINITY, total[:31])[:31], negative),
                                total,
                            )
                        ),
                        state.eq(_State.IDLE),
                    ]
                    with m.If(is_rsqrt & ~inverts):
                        # 1 by the root, which is a normal number.
                        m.d.sync += [
                            inverts.eq(1),
                            rest.eq(1 << 30),
                            divisor.eq(Cat(Const(0, 8), total[:23], Const(1, 1))),
                            quotient.eq(0),
                            exponent.eq(2 * _BIAS - total[23:31]),
                            state.eq(_State.NORMALISE),
                        ]
        return m
