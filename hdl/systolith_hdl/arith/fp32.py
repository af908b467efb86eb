"""FP32 adder and multiplier: pipelined, one result per cycle, IEEE-754 in every corner.

The adder can be generated for any `Encoding`; the chip has it in FP32.
"""

import dataclasses
from collections.abc import Collection

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from .rounding import (
    EXP_BITS,
    FP32,
    RAW_BITS,
    RAW_INF,
    Encoding,
    finish,
    normalize,
    pack_fp32,
    saturate,
    saturate5,
    shift_right_sticky,
)

#: Enabled cycles from the operands of an FP32 cell to its result.
FP32_LATENCY = 3
#: Steps of `add` after which an `Adder` has a register; the last is at its end.
CUTS = ("swap", "level0")
assert len(CUTS) + 1 == FP32_LATENCY
#: Those of an `Adder` with a stage less, for where that counts and a slower clock limits anyway.
SHORT_CUTS = ("sum",)
#: Enabled cycles from its operands to its result.
SHORT_LATENCY = len(SHORT_CUTS) + 1


@dataclasses.dataclass(frozen=True)
class Addend:
    """An operand of `add`: (-1)**sign * significand / 2**fraction * 2**(exponent - bias).

    Parameters
    ----------
    sign : 1 bit
    exponent : signed or not; may lie outside the encoding, as that of a product may. That of zero
        is 1 or less.
    significand : ``1 + fraction`` bits; its top bit may be clear, see `lead` of `add`
    inf, nan : 1 bit; it is that, whatever exponent and significand say
    """

    sign: Value
    exponent: Value
    significand: Value
    inf: Value
    nan: Value


def is_nan(word: Value, encoding: Encoding = FP32) -> Value:
    """1 if the word is a NaN."""
    return word[:-1] > encoding.infinity


def unpack(m: Module, word: Value, encoding: Encoding = FP32) -> Addend:
    """Returns the number that a word stands for."""
    fraction, field = word[: encoding.fraction], word[encoding.fraction : -1]
    subnormal, special, whole = Signal(), Signal(), Signal()
    exponent = Signal(encoding.exp_bits)
    m.d.comb += [
        subnormal.eq(field == 0),
        special.eq(field == (1 << encoding.exponent) - 1),
        whole.eq(fraction == 0),
        exponent.eq(Cat(field[0] | subnormal, field[1:])),  # 0 turns into 1
    ]
    return Addend(
        sign=word[-1],
        exponent=exponent,
        significand=Cat(fraction, ~subnormal),
        inf=special & whole,
        nan=special & ~whole,
    )


def _spread(bit: Value, count: int) -> Value:
    """`count` copies of a bit."""
    return Mux(bit, Const((1 << count) - 1, count), Const(0, count))


def _choose(choice: Value, one: Value, zero: Value) -> Value:
    """``Mux(choice, one, zero)`` that Verilator does not turn into a branch: the choice is as good
    as random, and a simulation would guess it wrong half of the time."""
    return zero ^ ((one ^ zero) & _spread(choice, max(len(one), len(zero))))


class _Pipeline:
    """The values that a calculation hands from step to step: its attributes.

    All of them are signals: Amaranth writes out other expressions wherever they are used, and
    Verilator then works them out as often.
    """

    def __init__(self, m: Module, en: Value, cuts: Collection[str]) -> None:
        self._m, self._en, self._cuts = m, en, cuts
        self._values: dict[str, Signal] = {}

    def __getattr__(self, name: str) -> Signal:
        return self._values[name]

    def let(self, **values: Value) -> None:
        """Adds values, in this step."""
        for name, value in values.items():
            self._values[name] = signal = Signal(value.shape(), name=name)
            self._m.d.comb += signal.eq(value)

    def end(self, step: str, *names: str) -> None:
        """Ends a step, which hands on these values only; in registers if it is one of `cuts`."""
        values = {name: self._values[name] for name in names}
        if step in self._cuts:
            for name, value in list(values.items()):
                values[name] = signal = Signal(
                    value.shape(), name=f"{name}_{step}", reset_less=True
                )
                with self._m.If(self._en):
                    self._m.d.sync += signal.eq(value)
        self._values = values


def _levels(bits: int) -> list[tuple[int, ...]]:
    """The bits of a shift, 2 to 5 of them, as `add` decides on them: two at a time at either end.

    >>> _levels(5)
    [(4, 3), (2,), (1, 0)]
    """
    highest = list(reversed(range(bits)))
    return [tuple(group) for group in (highest[:-2][:2], highest[2:-2], highest[-2:]) if group]


def add(
    m: Module,
    *,
    en: Value,
    a: Addend,
    b: Addend,
    lead: int,
    cuts: Collection[str],
    encoding: Encoding = FP32,
) -> Value:
    """Adds two numbers and rounds once, to nearest even: the core of every adder.

    Its steps:

    - swap: the number with the larger exponent comes first.
    - align: the other is shifted right by the distance of the exponents.
    - sum: they are added, or subtracted.
    - level0, level1, ...: leading zeros are shifted out, two bits of their number at a time or one.
    - It is rounded and encoded, and registered.

    Parameters
    ----------
    en : freezes all registers when low
    a, b : operands; `a` is an unpacked word
    lead : number of zeros that may stand above the highest one of the significand of `b`. More may
        only if its exponent is 1 or less.
    cuts : the steps that end in a register
    encoding : of the result

    Returns
    -------
    Register that holds the word ``len(cuts) + 1`` enabled cycles after `a` and `b`
    """
    fraction = encoding.fraction
    # Below the significand: guard, round and sticky bit, and what is shifted up to fill `lead`.
    guard_bits = 3 + lead
    width = 1 + fraction + guard_bits
    shift_bits = width.bit_length()
    pipe = _Pipeline(m, en, cuts)

    # Only exponents are compared, so the difference of the significands can be negative: where the
    # exponents are equal, and where both numbers are below the normal range.
    difference = Signal(signed(encoding.exp_bits + 2))
    swap = difference[-1]
    pipe.let(
        # The complement of a negative difference is one less than the distance: the last place is
        # shifted here.
        steps=difference[:-1] ^ _spread(swap, len(difference) - 1),
        differ=a.sign ^ b.sign,
        inf=a.inf | b.inf,
    )
    m.d.comb += difference.eq(a.exponent - b.exponent)
    pipe.let(
        big=_choose(swap, b.significand, a.significand),
        small=_choose(swap, a.significand, Cat(Const(0, 1), b.significand)),
        distance=saturate(pipe.steps, shift_bits),
        exponent=_choose(swap, b.exponent[: encoding.exp_bits], a.exponent)[: encoding.exp_bits],
        sign=_choose(~a.inf & (b.inf | swap), b.sign, a.sign),
        subtract=pipe.differ & ~pipe.inf,
        nan=a.nan | b.nan | (a.inf & b.inf & pipe.differ),
    )
    pipe.end("swap", "big", "small", "distance", "exponent", "sign", "subtract", "inf", "nan")

    aligned = shift_right_sticky(m, Cat(Const(0, guard_bits - 1), pipe.small), pipe.distance)
    pipe.let(addend=aligned ^ _spread(pipe.subtract, width))
    pipe.end("align", "big", "addend", "exponent", "sign", "subtract", "inf", "nan")

    # One adder for both: subtracting adds the complement, and the carry-in comes from a pair of
    # ones below bit 0.
    full = Cat(pipe.subtract, Const(0, guard_bits), pipe.big) + Cat(
        pipe.subtract, pipe.addend, pipe.subtract, pipe.subtract
    )
    pipe.let(full=full[: width + 3])
    pipe.let(total=pipe.full[1 : width + 2], negative=pipe.full[width + 2])
    pipe.end("sum", "total", "negative", "exponent", "sign", "subtract", "inf", "nan")

    # A negative sum is complemented here, and the one that this leaves out is added by rounding.
    pipe.let(fill=_spread(pipe.negative, width + 1), zero=pipe.total == 0)
    pipe.let(
        rest=pipe.total ^ pipe.fill,
        # x - x is +0; -0 + -0 keeps its sign.
        sign=(pipe.sign ^ pipe.negative) & ~(pipe.subtract & pipe.zero),
        # The exponent is larger than what all further levels can take from it.
        room=pipe.exponent[shift_bits:].any(),
    )
    handed_on = ["rest", "room", "exponent", "sign", "negative", "zero", "inf", "nan"]
    for level, bits in enumerate(_levels(shift_bits)):
        rest, room = pipe.rest, pipe.room
        # Not further than exponent 1: what is left of the top bit then is a subnormal.
        first, left = 1 << bits[0], pipe.exponent[bits[0]]
        clear = rest[-first:] == 0
        pipe.let(go=clear & (room | left))
        goes = [pipe.go]
        if len(bits) == 2:
            # The decision on the lower bit is made for both outcomes of that on the upper one.
            second, also_left = 1 << bits[1], pipe.exponent[bits[1]]
            clear_if = rest[-first - second : -first] == 0
            clear_else = rest[-second:] == 0
            pipe.let(
                also=(pipe.go & clear_if & (room | also_left))
                | (~pipe.go & clear_else & (room | left | also_left))
            )
            goes.append(pipe.also)
        for bit, go in zip(bits, goes, strict=True):
            pipe.let(
                # What comes in at the lower end are copies of `negative`.
                rest=(pipe.rest << Cat(Const(0, bit), go))[: width + 1]
                | _spread(pipe.negative & go, 1 << bit),
                room=pipe.room | (pipe.exponent[bit] & ~go),
            )
        amount = Cat(*reversed(goes))
        pipe.let(shift=Cat(amount, pipe.shift) if level else amount)
        pipe.end(f"level{level}", "shift", *handed_on)

    kept, guard, lost = (
        pipe.rest[-1 - fraction : -1],
        pipe.rest[-2 - fraction],
        pipe.rest[: -2 - fraction],
    )
    top = pipe.rest[-1]
    shift = pipe.shift
    pipe.let(
        up=Mux(
            pipe.negative,
            guard | (kept[0] & lost.all()),
            guard & (kept[0] | lost.any()),
        ),
        # The exponent of the top bit: one more than that of the larger number, less `shift`, which
        # is the complement and one more. If the top bit is clear the exponent's field is zero, and
        # all its bits but the last come out so.
        field=Cat(pipe.exponent[0] & top, pipe.exponent[1:] + 1)[: encoding.exp_bits],
        less=~Cat(shift[0] | ~top, shift[1:], Const(0, encoding.exp_bits - shift_bits)),
    )
    # The rounding carry runs from fraction to exponent, so the next binade, the step from subnormal
    # to normal and the step to infinity come by themselves.
    packed = Cat(kept, pipe.field) + Cat(pipe.up, Const(0, fraction - 1), pipe.less)
    pipe.let(packed=packed[: fraction + encoding.exp_bits])
    output = Signal(encoding.bits, reset_less=True)
    with m.If(en):
        m.d.sync += output.eq(
            finish(
                m,
                encoding,
                pipe.packed,
                sign=pipe.sign,
                zero=pipe.zero,
                inf=pipe.inf,
                nan=pipe.nan,
            )
        )
    return output


class Adder(wiring.Component):
    """``o = a + b`` in an encoding, rounded to nearest even.

    Subnormals are kept, overflow gives infinity, every NaN result is the canonical one. To
    subtract, flip the top bit of an operand. Latency ``len(cuts) + 1`` enabled cycles; one result
    per enabled cycle.

    Parameters
    ----------
    encoding : of `a`, `b` and `o`
    cuts : steps of `add` that end in a register

    Members
    -------
    en : In(1), low freezes every stage
    a, b : In, sampled in each enabled cycle
    o : Out, registered
    """

    def __init__(self, encoding: Encoding, *, cuts: Collection[str] = CUTS) -> None:
        self._encoding = encoding
        self._cuts = cuts
        bits = encoding.bits
        super().__init__({"en": In(1), "a": In(bits), "b": In(bits), "o": Out(bits)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        encoding = self._encoding
        a, b = unpack(m, self.a, encoding), unpack(m, self.b, encoding)
        total = add(m, en=self.en, a=a, b=b, lead=0, cuts=self._cuts, encoding=encoding)
        m.d.comb += self.o.eq(total)
        return m


class Fp32Add(Adder):
    """The `Adder` for FP32: words of 32 bits, NaN results 0x7FC00000.

    Parameters
    ----------
    short : latency `SHORT_LATENCY` in place of `FP32_LATENCY`
    """

    def __init__(self, *, short: bool = False) -> None:
        super().__init__(FP32, cuts=SHORT_CUTS if short else CUTS)


class MulMode(enum.Enum, shape=3):
    """What a multiplier of `words` makes of its operands."""

    #: FP32: a * b
    FP32 = 0
    #: integers: the low 32 bits of a * b
    INTEGER = 1
    #: integers: a shifted left by b places, zeros coming in, also where b is 32 or more
    SHIFT_LEFT = 2
    #: integers: a shifted right by b places, zeros coming in
    SHIFT_RIGHT = 3
    #: integers: a shifted right by b places, copies of its top bit coming in
    SHIFT_RIGHT_SIGNED = 4


class Fp32Mul(wiring.Component):
    """``o = a * b`` in FP32, rounded to nearest even, or, with the same multiplier, of integers.

    Subnormals are kept, overflow gives infinity, every NaN result is 0x7FC00000. Latency
    `FP32_LATENCY` enabled cycles; one result per enabled cycle.

    Parameters
    ----------
    words : whether it also multiplies and shifts integers; if not, `mode` is missing

    Members
    -------
    en : In(1), low freezes every stage
    a, b : In(32), sampled in each enabled cycle
    mode : In(MulMode), likewise
    o : Out(32), registered

    A shift is a product by a power of two: to the left the low word of ``a * 2**n``, to the right
    the high word of ``a * 2**(32 - n)``. Where ones come in, ``~a`` is shifted.
    """

    def __init__(self, *, words: bool = False) -> None:
        self._words = words
        mode = {"mode": In(MulMode)} if words else {}
        super().__init__({"en": In(1), "a": In(32), "b": In(32), **mode, "o": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        words = self._words

        fp32 = self.mode == MulMode.FP32 if words else Const(1)

        # Stage 1: normalise. Two subnormals multiply to less than a quarter of the smallest
        # subnormal, which rounds to zero, so one shifter is enough.
        swap = Signal()
        x, y = Signal(31), Signal(31)
        m.d.comb += [
            swap.eq(fp32 & (self.a[23:31] == 0)),
            x.eq(Mux(swap, self.b, self.a)[:31]),
            y.eq(Mux(swap, self.a, self.b)[:31]),
        ]
        y_subnormal = Signal()
        m.d.comb += y_subnormal.eq(swap | (self.b[23:31] == 0))
        infinite = (x[23:31] == 0xFF) | (y[23:31] == 0xFF)
        zero = (x[23:31] == 0) | (y == 0)
        factors: list[Value] = [Cat(x[:23], 1), Cat(y[:23], ~y_subnormal)]
        forced = None
        if words:
            mode = self.mode
            right, ones, shifts = Signal(), Signal(), Signal()
            m.d.comb += [
                right.eq((mode == MulMode.SHIFT_RIGHT) | (mode == MulMode.SHIFT_RIGHT_SIGNED)),
                shifts.eq((mode == MulMode.SHIFT_LEFT) | right),
                ones.eq((mode == MulMode.SHIFT_RIGHT_SIGNED) & self.a[31]),
            ]
            whole = [
                Cat(factor, Mux(fp32, Cat(top, Const(0, 8)), word[23:]))
                for factor, top, word in (
                    (x[:23], Const(1, 1), self.a),
                    (y[:23], ~y_subnormal, self.b),
                )
            ]
            # The power of two comes from the shifter that normalises: 2**n, or 2**(31 - n) for the
            # word from bit 31 on.
            factors = [
                whole[0] ^ _spread(ones, 32),
                Mux(shifts, ~self.b[5:].any(), whole[1]),
            ]
            forced = ~fp32, (self.b[:5] ^ _spread(right, 5)) & _spread(shifts, 5)
            fp32_1, right_1, ones_1 = (Signal(reset_less=True) for _ in range(3))
            fp32_2, ones_2 = (Signal(reset_less=True) for _ in range(2))
        width = len(factors[0])
        normal, zeros = normalize(m, factors[1], top=24, forced=forced, early=words)
        # The exponent, if the shift moved nothing.
        unmoved_1 = Signal(signed(EXP_BITS + 1), reset_less=True)
        zeros_1 = Signal.like(zeros, reset_less=True)
        x_1, y_1 = Signal(width, reset_less=True), Signal(width, reset_less=True)
        sign_1 = Signal(reset_less=True)
        nan_1 = Signal(reset_less=True)
        infinite_1 = Signal(reset_less=True)
        zero_1 = Signal(reset_less=True)

        # Stage 2: multiply. Bits below the 28 that rounding looks at only count as sticky.
        sum_1 = Signal(signed(EXP_BITS + 1))
        m.d.comb += sum_1.eq(unmoved_1 - zeros_1)
        product = Signal(2 * width)
        m.d.comb += product.eq(x_1 * y_1)
        result: Value = Mux(zero_1, 0, Cat(product[:21] != 0, product[21:48]))
        if words:
            result = Mux(fp32_1, result, Mux(right_1, product[31:63], product[:32]))
        result_2 = Signal(32 if words else RAW_BITS, reset_less=True)
        raw_2 = result_2[:RAW_BITS]
        exponent_2 = Signal(EXP_BITS, reset_less=True)
        shift_2 = Signal(5, reset_less=True)
        sign_2 = Signal(reset_less=True)
        nan_2 = Signal(reset_less=True)

        # Stage 3: shift down into the subnormal range, or up by the one place that the product of
        # two numbers in [1, 2) can lack, and round.
        down, raw = Signal(RAW_BITS), Signal(RAW_BITS)
        up = Signal()
        m.d.comb += [
            down.eq(shift_right_sticky(m, raw_2, shift_2)),
            up.eq(~down[27] & (exponent_2 != 0)),
            raw.eq(Mux(up, down << 1, down)),
        ]

        packed: Value = pack_fp32(
            m, sign=sign_2, exponent=(exponent_2 - up)[:EXP_BITS], raw=raw, nan=nan_2
        )
        if words:
            packed = Mux(fp32_2, packed, result_2 ^ _spread(ones_2, 32))
            with m.If(self.en):
                m.d.sync += [
                    *(fp32_1.eq(fp32), right_1.eq(right), ones_1.eq(ones)),
                    *(fp32_2.eq(fp32_1), ones_2.eq(ones_1)),
                ]
        with m.If(self.en):
            m.d.sync += [
                x_1.eq(factors[0]),
                y_1.eq(normal),
                unmoved_1.eq(x[23:31] + Cat(y[23] | y_subnormal, y[24:31]) - 127),
                zeros_1.eq(zeros),
                sign_1.eq(self.a[31] ^ self.b[31]),
                nan_1.eq(is_nan(self.a) | is_nan(self.b) | (infinite & zero)),
                infinite_1.eq(infinite),
                zero_1.eq(zero),
                result_2.eq(result),
                exponent_2.eq(Mux(infinite_1, RAW_INF, Mux(sum_1 < 0, 0, sum_1[:EXP_BITS]))),
                shift_2.eq(Mux(~infinite_1 & (sum_1 < 0), saturate5((-sum_1)[: EXP_BITS + 1]), 0)),
                sign_2.eq(sign_1),
                nan_2.eq(nan_1),
                self.o.eq(packed),
            ]
        return m
