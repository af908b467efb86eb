"""FP32 adder and multiplier: pipelined, one result per cycle, IEEE-754 in every corner.

The adder can be generated for any `Encoding`; the chip has it in FP32.
"""

from collections.abc import Collection

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .rounding import (
    EXP_BITS,
    FP32,
    RAW_BITS,
    RAW_INF,
    Encoding,
    finish,
    leading_zeros,
    pack_fp32,
    saturate,
    saturate5,
    shift_right_sticky,
)

#: Enabled cycles from the operands of an FP32 cell to its result.
FP32_LATENCY = 3
#: Steps of `add` after which an `Adder` has a register; the last is at its end.
CUTS = ("align", "level0")
assert len(CUTS) + 1 == FP32_LATENCY


def addend_layout(encoding: Encoding = FP32) -> data.StructLayout:
    """An operand of `add`: (-1)**sign * significand / 2**fraction * 2**(exponent - bias).

    The exponent may lie outside the encoding, as that of a product may; that of zero is 1 or less.
    """
    return data.StructLayout(
        {
            "sign": unsigned(1),
            "exponent": signed(encoding.exp_bits + 1),
            #: Its top bit may be clear: see `lead` of `add`.
            "significand": unsigned(encoding.fraction + 1),
            "inf": unsigned(1),
            "nan": unsigned(1),
        }
    )


def is_nan(word: Value, encoding: Encoding = FP32) -> Value:
    """1 if the word is a NaN."""
    fraction, field = word[: encoding.fraction], word[encoding.fraction : -1]
    return field.all() & fraction.any()


def unpack(word: Value, encoding: Encoding = FP32) -> Value:
    """Returns the bits of an `addend_layout` holding the word."""
    fraction, field = word[: encoding.fraction], word[encoding.fraction : -1]
    subnormal = field == 0
    return Cat(
        word[-1],
        field[0] | subnormal,  # 0 turns into 1
        field[1:],
        Const(0, 2),
        fraction,
        ~subnormal,
        field.all() & ~fraction.any(),
        is_nan(word, encoding),
    )


class _Pipeline:
    """The values that a calculation hands from step to step: its attributes."""

    def __init__(self, m: Module, en: Value, cuts: Collection[str]) -> None:
        self._m, self._en, self._cuts = m, en, cuts
        self._values: dict[str, Signal] = {}

    def __getattr__(self, name: str) -> Signal:
        return self._values[name]

    def step(self, step: str, **values: Value) -> None:
        """Ends a step, in which these values were made; with a register if it is one of `cuts`."""
        values = {**self._values, **values}
        for name, value in values.items():
            self._values[name] = signal = Signal(
                value.shape(), name=f"{name}_{step}", reset_less=True
            )
            if step in self._cuts:
                with self._m.If(self._en):
                    self._m.d.sync += signal.eq(value)
            else:
                self._m.d.comb += signal.eq(value)


def _levels(bits: int) -> list[tuple[int, ...]]:
    return {5: [(4, 3), (2,), (1, 0)], 4: [(3, 2), (1, 0)], 3: [(2,), (1, 0)]}[bits]


def add(
    m: Module,
    *,
    en: Value,
    a: data.View,
    b: data.View,
    lead: int,
    cuts: Collection[str],
    encoding: Encoding = FP32,
) -> Value:
    """Adds two numbers and rounds once, to nearest even: the core of every adder.

    Its steps:

    - swap: the number with the larger exponent comes first.
    - align: the other is shifted right by the distance of the exponents.
    - sum: they are added, or subtracted.
    - level0, level1, ...: leading zeros are shifted out, 16 of them or none, 8 or none, ...
    - It is rounded and encoded, and registered.

    Parameters
    ----------
    en : freezes all registers when low
    a, b : of `addend_layout`; `a` an unpacked word
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
    m.d.comb += difference.eq(a.exponent - b.exponent)
    swap = difference[-1]
    differ = a.sign ^ b.sign
    inf = a.inf | b.inf
    # The complement of a negative difference is one less than the distance: the last place is
    # shifted here.
    distance = difference[:-1] ^ swap.replicate(len(difference) - 1)
    pipe.step(
        "swap",
        big=Mux(swap, b.significand, a.significand),
        small=Mux(swap, a.significand, Cat(Const(0, 1), b.significand)),
        distance=saturate(distance, shift_bits),
        exponent=Mux(swap, b.exponent, a.exponent)[: encoding.exp_bits],
        sign=Mux(~a.inf & (b.inf | swap), b.sign, a.sign),
        subtract=differ & ~inf,
        inf=inf,
        nan=a.nan | b.nan | (a.inf & b.inf & differ),
    )
    aligned = shift_right_sticky(m, Cat(Const(0, guard_bits - 1), pipe.small), pipe.distance)
    pipe.step("align", addend=aligned ^ pipe.subtract.replicate(width))
    # One adder for both: subtracting adds the complement, and the carry-in comes from a pair of
    # ones below bit 0.
    total = Cat(pipe.subtract, Const(0, guard_bits), pipe.big) + Cat(
        pipe.subtract, pipe.addend, pipe.subtract, pipe.subtract
    )
    pipe.step("sum", total=total[1 : width + 2], negative=total[width + 2])

    # A negative sum is complemented here, and the one that this leaves out is added by rounding.
    negative = pipe.negative
    zero = pipe.total == 0
    rest = pipe.total ^ negative.replicate(width + 1)
    # x - x is +0; -0 + -0 keeps its sign.
    sign = (pipe.sign ^ negative) & ~(pipe.subtract & zero)
    room = pipe.exponent[shift_bits:].any()
    shift = Const(0, 0)
    for level, bits in enumerate(_levels(shift_bits)):
        goes: list[Value] = []
        first = rest
        for bit in bits:
            places = 1 << bit
            clear, go = Signal(name=f"clear_{bit}"), Signal(name=f"go_{bit}")
            left = pipe.exponent[bit]
            # Not further than exponent 1: what is left of the top bit then is a subnormal.
            if not goes:
                m.d.comb += [clear.eq(rest[-places:] == 0), go.eq(clear & (room | left))]
                room_stay = room | (left & ~clear)
            else:
                # Both outcomes of the place before are worked out in parallel.
                m.d.comb += [
                    go.eq(
                        Mux(
                            goes[0],
                            (first[-3 * places : -2 * places] == 0) & (room | left),
                            (first[-places:] == 0) & (room_stay | left),
                        )
                    ),
                    clear.eq(Mux(goes[0], first[-3 * places : -2 * places], first[-places:]) == 0),
                ]
                room_stay = Mux(goes[0], room, room_stay) | (left & ~clear)
            goes.append(go)
            shifted = Signal(width + 1, name=f"shifted_{bit}")
            m.d.comb += shifted.eq(Mux(go, Cat(negative.replicate(places), rest[:-places]), rest))
            rest = shifted
            shift = Cat(go, shift)
        pipe.step(
            f"level{level}",
            rest=rest,
            room=room_stay,
            shift=shift,
            negative=negative,
            zero=zero,
            sign=sign,
        )
        rest, room, shift = pipe.rest, pipe.room, pipe.shift
        negative, zero, sign = pipe.negative, pipe.zero, pipe.sign

    kept, guard, lost = rest[-1 - fraction : -1], rest[-2 - fraction], rest[: -2 - fraction]
    top = rest[-1]
    up = Mux(negative, guard | (kept[0] & lost.all()), guard & (kept[0] | lost.any()))
    # The exponent of the top bit: one more than that of the larger number, less `shift`, which is
    # the complement and one more. If the top bit is clear the exponent's field is zero, and all
    # its bits but the last come out so. The rounding carry runs from fraction to exponent, so the
    # next binade, the step from subnormal to normal and the step to infinity come by themselves.
    exponent = Cat(pipe.exponent[0] & top, pipe.exponent[1:] + 1)[: encoding.exp_bits]
    less = Cat(~shift[0] & top, ~shift[1:], Const(-1, encoding.exp_bits - shift_bits))
    packed = (Cat(kept, exponent) + Cat(up, Const(0, fraction - 1), less))[
        : fraction + encoding.exp_bits
    ]
    output = Signal(encoding.bits, reset_less=True)
    with m.If(en):
        m.d.sync += output.eq(
            finish(m, encoding, packed, sign=pipe.sign, zero=zero, inf=pipe.inf, nan=pipe.nan)
        )
    return output


class Adder(wiring.Component):
    """``o = a + b`` in an encoding, rounded to nearest even.

    Subnormals are kept, overflow gives infinity, every NaN result is the canonical one. To
    subtract, flip the top bit of an operand. Latency `FP32_LATENCY` enabled cycles; one result per
    enabled cycle.

    Parameters
    ----------
    encoding : of `a`, `b` and `o`

    Members
    -------
    en : In(1), low freezes every stage
    a, b : In, sampled in each enabled cycle
    o : Out, registered
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        bits = encoding.bits
        super().__init__({"en": In(1), "a": In(bits), "b": In(bits), "o": Out(bits)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        encoding = self._encoding
        a, b = Signal(addend_layout(encoding)), Signal(addend_layout(encoding))
        m.d.comb += [
            a.as_value().eq(unpack(self.a, encoding)),
            b.as_value().eq(unpack(self.b, encoding)),
        ]
        total = add(m, en=self.en, a=a, b=b, lead=0, cuts=CUTS, encoding=encoding)
        m.d.comb += self.o.eq(total)
        return m


class Fp32Add(Adder):
    """The `Adder` for FP32: words of 32 bits, NaN results 0x7FC00000."""

    def __init__(self) -> None:
        super().__init__(FP32)


class Fp32Mul(wiring.Component):
    """``o = a * b`` in FP32, rounded to nearest even.

    Subnormals are kept, overflow gives infinity, every NaN result is 0x7FC00000. Latency
    `FP32_LATENCY` enabled cycles; one result per enabled cycle.

    Members
    -------
    en : In(1), low freezes every stage
    a, b : In(32), sampled in each enabled cycle
    o : Out(32), registered
    """

    en: In(1)
    a: In(32)
    b: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # Stage 1: normalise. Two subnormals multiply to less than a quarter of the smallest
        # subnormal, which rounds to zero, so one shifter is enough.
        swap = Signal()
        x, y = Signal(31), Signal(31)
        m.d.comb += [
            swap.eq(self.a[23:31] == 0),
            x.eq(Mux(swap, self.b, self.a)[:31]),
            y.eq(Mux(swap, self.a, self.b)[:31]),
        ]
        y_subnormal = Signal()
        zeros = Signal(5)
        m.d.comb += [
            y_subnormal.eq(y[23:31] == 0),
            # Of the fraction below an absent leading one: a fraction 1xx.. moves up by one.
            zeros.eq(Mux(y_subnormal, leading_zeros(m, y[:23]) + 1, 0)),
        ]
        infinite = (x[23:31] == 0xFF) | (y[23:31] == 0xFF)
        zero = (x[23:31] == 0) | (y == 0)
        sum_1 = Signal(signed(EXP_BITS + 1), reset_less=True)
        x_1, y_1 = Signal(24, reset_less=True), Signal(24, reset_less=True)
        sign_1 = Signal(reset_less=True)
        nan_1 = Signal(reset_less=True)
        infinite_1 = Signal(reset_less=True)
        zero_1 = Signal(reset_less=True)

        # Stage 2: multiply. Bits below the 28 that rounding looks at only count as sticky.
        product = Signal(48)
        m.d.comb += product.eq(x_1 * y_1)
        raw_2 = Signal(RAW_BITS, reset_less=True)
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

        with m.If(self.en):
            m.d.sync += [
                x_1.eq(Cat(x[:23], 1)),
                y_1.eq(Cat(y[:23], ~y_subnormal) << zeros),
                sum_1.eq(x[23:31] + Cat(y[23] | y_subnormal, y[24:31]) - zeros - 127),
                sign_1.eq(self.a[31] ^ self.b[31]),
                nan_1.eq(is_nan(self.a) | is_nan(self.b) | (infinite & zero)),
                infinite_1.eq(infinite),
                zero_1.eq(zero),
                raw_2.eq(Mux(zero_1, 0, Cat(product[:21] != 0, product[21:]))),
                exponent_2.eq(Mux(infinite_1, RAW_INF, Mux(sum_1 < 0, 0, sum_1[:EXP_BITS]))),
                shift_2.eq(Mux(~infinite_1 & (sum_1 < 0), saturate5((-sum_1)[: EXP_BITS + 1]), 0)),
                sign_2.eq(sign_1),
                nan_2.eq(nan_1),
                self.o.eq(
                    pack_fp32(
                        m,
                        sign=sign_2,
                        exponent=(exponent_2 - up)[:EXP_BITS],
                        raw=raw,
                        nan=nan_2,
                    )
                ),
            ]
        return m
