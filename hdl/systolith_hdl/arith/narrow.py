"""Between words and the narrow types: rounding, packing, widening. Combinational.

One circuit serves all types of `formats.NARROW_FLOATS`, and INT8 where it says so; its constants
come from `formats.FORMATS`.
"""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..emit import side_by_side
from ..formats import CANONICAL_NAN, FORMATS, INFINITY, NARROW_FLOATS, DType
from .fp32 import is_nan
from .rounding import normalize

_BIAS = FORMATS[DType.FP32].bias
#: Types with fewer exponent bits than FP32. All their numbers are normal in FP32.
_SHORT = tuple(t for t in NARROW_FLOATS if FORMATS[t].exponent < 8)


def _least(dtype: DType) -> int:
    """FP32's exponent field of the smallest normal number of a type."""
    return _BIAS + 1 - FORMATS[dtype].bias


class RoundNarrow(wiring.Component):
    """Rounds an FP32 word to a type, to nearest even or stochastically, and keeps the value as
    FP32.

    What rounds past the type's largest number becomes infinity, in a type without infinities NaN;
    every NaN becomes 0x7FC00000. A `dtype` that is no narrow float passes the word as it is.

    Parameters
    ----------
    chance : whether it can round stochastically; if not, `stochastic` and `random` are missing

    Members
    -------
    word : In(32)
    dtype : In(DType)
    stochastic : In(1), rounds up in magnitude if the part of the number that the type does not
        hold plus as many low bits of `random` reaches one unit of the type. A number below 2**-9
        of the type's smallest becomes zero.
    random : In(32)
    o : Out(32)
    """

    def __init__(self, *, chance: bool = True) -> None:
        self._chance = chance
        ports = {"stochastic": In(1), "random": In(32)} if chance else {}
        super().__init__({"word": In(32), "dtype": In(DType), **ports, "o": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        word = self.word
        fraction, field = word[:23], word[23:31]

        always = 23 - max(FORMATS[t].fraction for t in NARROW_FLOATS)  # low bits that all types cut
        # From here on a finite number is too large; its lower bits are 0 in all types.
        bounds = {t: FORMATS[t].largest + (1 << 23 - FORMATS[t].fraction) for t in NARROW_FLOATS}
        low = min((bound & -bound).bit_length() - 1 for bound in bounds.values())
        narrow, infinite = Signal(), Signal()
        dropped = Signal(4)  # bits more that a normal number's fraction loses in the type
        least = Signal(8)  # FP32's exponent field of the smallest normal number, or less
        edge = Signal(8)
        smallest = Signal(8)  # FP32's exponent field of the smallest number of the type
        bound = Signal(31 - low)
        with m.Switch(self.dtype):
            for dtype in NARROW_FLOATS:
                form = FORMATS[dtype]
                lost = 23 - form.fraction - always
                # BF16's normal range is FP32's.
                normal = _least(dtype) if dtype in _SHORT else 0
                with m.Case(dtype):
                    m.d.comb += [
                        narrow.eq(1),
                        dropped.eq(lost),
                        least.eq(normal),
                        edge.eq(normal + lost),
                        smallest.eq(max(_least(dtype) - form.fraction, 0)),
                        bound.eq(bounds[dtype] >> low),
                        infinite.eq(form.infinite),
                    ]

        # The `always + cut` lowest bits of the significand go: more of them below the type's normal
        # range. The unit of what is kept is the bit above them: 23 is the leading one's place, and
        # of a number that is below one unit (24) or below half a unit (25 and more) nothing is
        # kept: it becomes zero or the smallest number. The numbers of BF16 reach as far down as
        # FP32's exponents do, so there it is 16 at most.
        cut = Signal(8)
        m.d.comb += cut.eq(Mux(field < least, edge - field, dropped))
        far = cut[5:].any()
        # Bit i: bit i of the significand goes.
        cuts = Cat(Const(-1, always), (far | (cut[:5] > i) for i in range(33 - always)))
        # One sum rounds: what is added reaches the unit if the number is to go up. To nearest that
        # is just below half a unit, and the last bit that is kept, so that a tie goes to even.
        significand = Cat(fraction, field != 0)
        odd = ~far & Cat(significand[always:], Const(0, 32 - (24 - always))).bit_select(cut[:5], 1)
        addend: Value = cuts[1:]
        if self._chance:
            addend = Mux(self.stochastic, self.random & cuts[:32], addend)
            odd = odd & ~self.stochastic
        total = Signal(31)
        m.d.comb += total.eq(Cat(fraction, field) + addend[:23] + odd)
        # Without anything kept: does the sum with the leading one reach bit 24, and run on to the
        # unit?
        carry = total[23] ^ field[0]
        one = significand[23]
        reaches = Mux(addend[23], one | carry, one & carry)
        up = reaches & (addend[24:] | ~cuts[24:32]).all() & ~cuts[32]
        over = Signal()
        m.d.comb += over.eq(total[low:] >= bound)
        nan = (field.all() & fraction.any()) | (over & ~infinite)
        # The sum comes late, so what it is chosen by is known before.
        special = narrow & (over | nan)
        kept = narrow & ~cuts[23] & ~special
        lone = narrow & cuts[23] & up & ~special
        m.d.comb += self.o.eq(
            Cat(
                (total[:23] & ~cuts[:23] & kept.replicate(23))
                | Cat(Const(0, 22), narrow & nan)
                | (fraction & (~narrow).replicate(23)),
                (total[23:] & kept.replicate(8))
                | special.replicate(8)
                | (smallest & lone.replicate(8))
                | (field & (~narrow).replicate(8)),
                word[31] & ~(narrow & nan),
            )
        )
        return m


def rounded(
    m: Module,
    name: str,
    words: Sequence[Value],
    dtype: ValueLike,
    *,
    random: Sequence[Value] | None = None,
    stochastic: ValueLike = 0,
) -> list[Value]:
    """Places a `RoundNarrow` for each word, as submodule `name`; returns what comes out of them.

    Parameters
    ----------
    random : a word for each; None if none is ever rounded stochastically
    """
    if random is None:
        cells = side_by_side(
            RoundNarrow(chance=False), "round_nearest", len(words), shared=("dtype",)
        )
    else:
        cells = side_by_side(
            RoundNarrow(), "round_narrow", len(words), shared=("dtype", "stochastic")
        )
        m.d.comb += cells.stochastic.eq(stochastic)
        m.d.comb += [to.eq(word) for to, word in zip(cells.random, random, strict=True)]
    m.submodules[name] = cells
    m.d.comb += cells.dtype.eq(dtype)
    m.d.comb += [to.eq(word) for to, word in zip(cells.word, words, strict=True)]
    return list(cells.o)


class PackNarrow(wiring.Component):
    """Packs an FP32 word that `RoundNarrow` has rounded to a narrow float, or the low bits of an
    integer as INT8.

    Members
    -------
    word : In(32), a number of the type, or the canonical NaN; any integer
    dtype : In(DType), a narrow float or INT8
    o : Out(16), of an 8-bit type the low half
    """

    word: In(32)
    dtype: In(DType)
    o: Out(16)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        word = self.word
        field, sign = word[23:31], word[31]
        nan = is_nan(word)
        least = Signal(8)
        with m.Switch(self.dtype):
            for dtype in _SHORT:
                with m.Case(dtype):
                    m.d.comb += least.eq(_least(dtype))
        # Fraction and exponent as in FP16: the widest of each. Below the normal range the
        # significand moves down; zero has none.
        subnormal = Signal()
        shift = Signal(4)
        fraction = Signal(10)
        exponent = Signal(5)
        significand = Cat(word[13:23], field != 0)
        m.d.comb += [
            subnormal.eq(field < least),
            shift.eq(Mux(subnormal, least - field, 0)),
            fraction.eq(significand >> shift),
            exponent.eq(Mux(subnormal, 0, field - (least - 1))),
        ]
        with m.Switch(self.dtype):
            with m.Case(DType.BF16):
                m.d.comb += self.o.eq(word[16:])
            with m.Case(DType.INT8):
                m.d.comb += self.o.eq(word[:8])
            for dtype in _SHORT:
                form = FORMATS[dtype]
                magnitude = Cat(fraction[10 - form.fraction :], exponent[: form.exponent])
                infinity = ((1 << form.exponent) - 1) << form.fraction
                with m.Case(dtype):
                    m.d.comb += self.o.eq(
                        Mux(nan, form.nan, Cat(Mux(field == 0xFF, infinity, magnitude), sign))
                    )
        return m


class WidenNarrow(wiring.Component):
    """Widens a packed narrow float to FP32, INT8 to 32 bits: exact. A NaN of FP16 or FP8 gives
    0x7FC00000; one of BF16 keeps its bits.

    Members
    -------
    bits : In(16), of an 8-bit type the low half; what is above it does not matter
    dtype : In(DType), a narrow float or INT8
    o : Out(32)
    """

    bits: In(16)
    dtype: In(DType)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self.bits
        fraction = Signal(10)  # left-aligned
        exponent = Signal(5)
        least = Signal(8)
        sign, infinity, nan = Signal(), Signal(), Signal()
        with m.Switch(self.dtype):
            for dtype in _SHORT:
                form = FORMATS[dtype]
                top = form.bits - 1
                special = bits[form.fraction : top].all()
                zero = bits[: form.fraction] == 0
                with m.Case(dtype):
                    m.d.comb += [
                        fraction.eq(Cat(Const(0, 10 - form.fraction), bits[: form.fraction])),
                        exponent.eq(bits[form.fraction : top]),
                        sign.eq(bits[top]),
                        least.eq(_least(dtype)),
                    ]
                    if form.infinite:
                        m.d.comb += [infinity.eq(special & zero), nan.eq(special & ~zero)]
                    else:
                        m.d.comb += nan.eq(bits[:top] == form.nan)
        # A subnormal's fraction 1xx.. moves up by one place, 01x.. by two.
        subnormal = Signal()
        field = Signal(8)
        normal, places = normalize(m, Cat(fraction, ~subnormal))
        m.d.comb += [
            subnormal.eq(exponent == 0),
            field.eq(
                Mux(subnormal & (fraction == 0), 0, least + exponent - Mux(subnormal, places, 1))
            ),
        ]
        with m.If(self.dtype == DType.BF16):
            m.d.comb += self.o.eq(Cat(Const(0, 16), bits))
        with m.Elif(self.dtype == DType.INT8):
            m.d.comb += self.o.eq(bits[:8].as_signed())
        with m.Elif(nan):
            m.d.comb += self.o.eq(CANONICAL_NAN)
        with m.Else():
            value = Mux(infinity, INFINITY, Cat(Const(0, 13), normal[:10], field))
            m.d.comb += self.o.eq(Cat(value[:31], sign))
        return m
