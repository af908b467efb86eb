"""Tables of the scalar engine: what every function is made of, and the generator of the data.

The lane and the golden model know no function. Both follow these steps on a number y, with the
tables deciding everything that differs from one function to the next:

1. *Reduce.* In a function with `turn` (sine and cosine) whose |y| is at least 1/2, what counts is
   the distance of |y| to the nearest number at which the result is zero, in quarters of a turn: see
   below. Otherwise y is normalised to ``(-1)**s * 2**k * (1 + m)``, subnormals included. Where the
   function says so (|y| in [1/2, 2), on the sides `Control.center_positive` and `center_negative`)
   the exact difference ``|y| - center`` is normalised instead: that is how a function keeps its
   relative accuracy next to a zero of its own.
2. *Directory.* The page, chosen by sign and centring, and k give a row number, `directory_row`.
   The directory's entry there names ``2**log2_count`` segments that divide the binade evenly;
   the top bits of m pick the segment and the other bits, left-aligned, are the 23-bit integer t.
3. *Polynomial.* Integer Horner, every shift an arithmetic one (rounds down)::

       p2 = c2 + (c3 * (t >> 5) >> 18)
       p1 = c1 + (p2 * t >> 23)
       p0 = c0 + (p1 * t >> 23)  (+ k * LN2 in a segment with `log`)

4. *Result.* ``p0 * 2**(exponent + K)``, or in a segment with `exp2`
   ``2**(p0 * 2**-28 + exponent)`` from a second, quadratic table of 128 segments. K is 0 unless the
   segment is `relative`, then the function's `Scaling` of k. It is normalised once and rounded
   once (to nearest, ties to even).

The reduction of angles is exact (Payne and Hanek): |y| = M * 2**e, M of 24 bits, is multiplied by
the 85 bits of 2/pi that begin at the weight 2**(1 - e), in five pieces of 17 bits, the lowest
first. Bits above are multiples of whole turns, and what lies below is less than 2**-59 quarters.
The two top bits of the product modulo 2**85, plus 1 for the cosine, are the quadrant: bit 1 inverts
the result's sign, bit 0 the 58 bits that follow, so that they are the distance. No FP32 number is
closer to a multiple of pi/2 than 2**-29.9 quarters. The first 24 significant bits are the mantissa
1 + m, the rest is dropped; the segments of such a page stand for the middle of what may have been
dropped.

The exponential step is what keeps tails accurate: where a function decays like exp(-x) or
exp(-x*x) the first polynomial gives its logarithm, which is smooth, so a few segments reach
down to the smallest subnormal.

Adding a function is adding an entry to `DESCRIPTIONS` and running::

    python -m systolith_hdl.scalar.tables

which rewrites ``tables.hex`` beside this file. The generator works in decimal arithmetic of 60
and more digits with no floating point anywhere, so it gives the same file on every machine (a
test regenerates and compares). `custom` makes a table of any function for CUSTOM, whose directory
and segments each partition has in a memory of its own.
"""

from __future__ import annotations

import dataclasses
import decimal
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path

from amaranth.hdl import signed, unsigned
from amaranth.lib import data, enum

from ..isa import TABLE_ROWS, TABLE_SEGMENTS, Function

# ------------------------------------------------------------------ formats

SEGMENTS = 4096  #: words of the segment memory that two lanes share
DIRECTORY = 2048  #: words of their directory
EXP2_SEGMENTS_LOG2 = 7  #: segments of the 2**f table, log2
MANTISSA = 23  #: bits of t and of a mantissa without its leading one
FIXED = 28  #: fraction bits of p0 in segments with `exp2` or `log`
P0_BITS = 36  #: width of p0 and p1, signed; p2 has c2's
PIECE = 17  #: bits of a piece of 2/pi
PIECES = 5  #: pieces that |y| is multiplied by
DISTANCE = 58  #: bits of the distance that are kept
CENTER_FRACTION = 24  #: fraction bits of `Control.center`
MAX_COUNT_LOG2 = 8  #: most segments of one binade, log2


def _constant(value: Decimal, fraction: int) -> int:
    return int((value * 2**fraction).to_integral_value(decimal.ROUND_HALF_EVEN))


class Scaling(enum.Enum, shape=3):
    """What a relative segment adds to the result's exponent."""

    #: k
    PLUS = 0
    #: -k
    MINUS = 1
    #: floor(k / 2)
    HALF = 2
    #: -floor(k / 2)
    MINUS_HALF = 3
    #: 2 * k
    DOUBLE = 4


#: One polynomial: two words of 64 bits. The value is +-p0 * 2**exponent (see the steps above).
SEGMENT = data.StructLayout(
    {
        "c0": signed(36),
        "c2": signed(25),
        "relative": unsigned(1),  # K is added to the exponent
        "exp2": unsigned(1),  # the result is 2**(p0 * 2**-FIXED + exponent)
        "log": unsigned(1),  # k * LN2 is added to p0
        "c1": signed(36),
        "c3": signed(17),
        "exponent": signed(9),
        "negate": unsigned(1),  # the result's sign is inverted
        "nan": unsigned(1),  # the result is NaN
    }
)
#: Segments of one binade.
ENTRY = data.StructLayout(
    {"base": unsigned((SEGMENTS - 1).bit_length()), "log2_count": unsigned(4)}
)
#: Entry 0 of the directory is the one that NaN takes, whatever the function.
NAN_ADDRESS = 0
#: 2**f, f = (i + u) / 128: 2**28 + c0 + (c1 * u21 >> 21) + (c2 * (u21 >> 8)**2 >> 26)
EXP2_ENTRY = data.StructLayout({"c0": unsigned(28), "c1": unsigned(22), "c2": unsigned(14)})
#: What a function sets up for all lanes. `pages` is the directory address of row 0 of the pages
#: positive, negative, above center, below center.
CONTROL = data.StructLayout(
    {
        "pages": data.ArrayLayout(unsigned((DIRECTORY - 1).bit_length()), 4),
        "low": signed(9),  # least k with a directory row of its own
        "span": unsigned(6),  # how many k have one
        "center": unsigned(CENTER_FRACTION + 1),
        "center_positive": unsigned(2),  # y in [1/2, 1) (bit 0), [1, 2) (bit 1) is centred
        "center_negative": unsigned(2),  # the same for -y
        "odd": unsigned(1),  # the sign of y multiplies the result
        "parity": unsigned(1),  # the row is chosen by k mod 2 instead of k
        "scaling": Scaling,
        "turn": unsigned(1),  # |y| from 1/2 on is reduced to quarters of a turn
        "quarter": unsigned(1),  # and a quarter is added: the cosine
    }
)
#: Page of reduced angles: that above the centre.
TURN_PAGE = 2

#: CUSTOM has rows for CUSTOM_SPAN binades, from 2**CUSTOM_LOW on, in two pages behind the entry
#: for NaN.
CUSTOM_LOW = -28
CUSTOM_SPAN = 59
_CUSTOM_PAGES = (1, 1 + CUSTOM_SPAN + 4)
CUSTOM_ROWS = _CUSTOM_PAGES[1] + CUSTOM_SPAN + 4  #: rows in use
assert CUSTOM_ROWS <= TABLE_ROWS

ZERO_TOP = -31  #: k of an operand zero, less the exponent it has: 31 zeros are normalised away
ROW_ZERO = 0  #: row of the (reduced) operand zero
ROW_UNDER = 1  #: row of k < low
ROW_LOW = 2  #: row of k = low; k = low + span - 1 has row 1 + span
# then k >= low + span has row 2 + span, infinity 3 + span


def field_bits(layout: data.StructLayout, word: int) -> dict[str, int]:
    """Unpacks a word into the fields of a flat layout, signed ones sign-extended."""
    found = {}
    for name, field in layout:
        width = field.width
        value = word >> field.offset & (1 << width) - 1
        if getattr(field.shape, "signed", False) and value >> width - 1:
            value -= 1 << width
        found[str(name)] = value
    return found


def _pack(layout: data.StructLayout, values: dict[str, int]) -> int:
    word = 0
    for name, value in values.items():
        field = layout[name]
        low, high = 0, 1 << field.width
        if getattr(field.shape, "signed", False):
            low, high = -high // 2, high // 2
        if not low <= value < high:
            raise ValueError(f"{name} = {value} is outside {low}..{high - 1}")
        word |= (value & (1 << field.width) - 1) << field.offset
    return word


@dataclasses.dataclass(frozen=True)
class Tables:
    """The data all lanes are initialised with.

    Parameters
    ----------
    segments : words of `SEGMENT`, at most `SEGMENTS`
    directory : words of `ENTRY`, at most `DIRECTORY`
    exp2 : words of `EXP2_ENTRY`, 2**EXP2_SEGMENTS_LOG2
    controls : words of `CONTROL` by function
    """

    segments: tuple[int, ...]
    directory: tuple[int, ...]
    exp2: tuple[int, ...]
    controls: dict[Function, int]

    def dump(self) -> str:
        lines = ["# generated by python -m systolith_hdl.scalar.tables"]
        for name, words, layout in (
            ("segments", self.segments, SEGMENT),
            ("directory", self.directory, ENTRY),
            ("exp2", self.exp2, EXP2_ENTRY),
        ):
            digits = -(-layout.size // 4)
            lines += [f"[{name}]", *(f"{word:0{digits}x}" for word in words)]
        lines.append("[controls]")
        lines += [f"{f.name} {word:x}" for f, word in self.controls.items()]
        return "\n".join(lines) + "\n"

    @staticmethod
    def parse(text: str) -> Tables:
        parts: dict[str, list[str]] = {}
        for line in text.splitlines():
            if line.startswith("["):
                rows = parts.setdefault(line.strip("[]"), [])
            elif line and not line.startswith("#"):
                rows.append(line)
        return Tables(
            segments=tuple(int(line, 16) for line in parts["segments"]),
            directory=tuple(int(line, 16) for line in parts["directory"]),
            exp2=tuple(int(line, 16) for line in parts["exp2"]),
            controls={
                Function[line.split()[0]]: int(line.split()[1], 16) for line in parts["controls"]
            },
        )


_PATH = Path(__file__).with_name("tables.hex")


@functools.cache
def tables() -> Tables:
    """Returns the committed tables."""
    return Tables.parse(_PATH.read_text())


# ------------------------------------------------------------------ decimal mathematics

_CONTEXT = decimal.Context(prec=60, Emin=-9999, Emax=9999, rounding=decimal.ROUND_HALF_EVEN)
#: 1 - erf(x) loses up to 57 digits at x = 16 / sqrt(2), the largest argument used
_ERF_CONTEXT = decimal.Context(prec=120, Emin=-9999, Emax=9999, rounding=decimal.ROUND_HALF_EVEN)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"
              "8628034825342117067982148086513282306647")  # fmt: skip
_LN2_D = Decimal(2).ln(_CONTEXT)
_LOG2E = _CONTEXT.divide(1, _LN2_D)

#: ln 2 with `FIXED` fraction bits
LN2 = _constant(_LN2_D, FIXED)


def _pieces_of_two_over_pi() -> tuple[int, ...]:
    """`PIECE` bits of 2/pi from each weight on: piece k + 1 + 17 n is the nth for |y| in
    [2**k, 2**(k + 1)), k from -1 on."""
    first = 25  # weight of the first bit, 1 - e for k = -1 and M's unit 2**(k - 23)
    last = 128 + PIECE * PIECES - 1
    with decimal.localcontext(_ERF_CONTEXT):
        bits = int(2 / _PI * 2 ** (last - first))
    return tuple(bits >> last + 1 - PIECE - at & (1 << PIECE) - 1 for at in range(last - PIECE + 2))


TWO_OVER_PI = _pieces_of_two_over_pi()


def _exp(x: Decimal) -> Decimal:
    return x.exp()


def _log1p(x: Decimal) -> Decimal:
    return (1 + x).ln()


def _tanh(x: Decimal) -> Decimal:
    e = (-2 * x).exp()
    return (1 - e) / (1 + e)


def _sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


@functools.lru_cache(1 << 16)
def _erf_wide(x: Decimal) -> Decimal:
    """erf for x >= 0 by its all-positive series, to about 115 digits."""
    with decimal.localcontext(_ERF_CONTEXT):
        square, n = x * x, 1
        term = total = 2 * x / _PI.sqrt() * (-square).exp()
        while term > total.scaleb(-118):
            term = term * 2 * square / (2 * n + 1)
            total += term
            n += 1
        return total


def _erf(x: Decimal) -> Decimal:
    return +_erf_wide(x)


def _phi(x: Decimal) -> Decimal:
    """Standard normal distribution function."""
    with decimal.localcontext(_ERF_CONTEXT):
        half = _erf_wide(abs(x) / Decimal(2).sqrt()) / 2
        value = Decimal(1) / 2 + (half if x >= 0 else -half)
    return +value


def _density(x: Decimal) -> Decimal:
    return (-x * x / 2).exp() / (2 * _PI).sqrt()


def _gelu(x: Decimal) -> Decimal:
    return x * _phi(x)


def _gelu_dx(x: Decimal) -> Decimal:
    return _phi(x) + x * _density(x)


def _softplus(x: Decimal) -> Decimal:
    with decimal.localcontext(_ERF_CONTEXT):  # 1 + e to the -100 has 44 digits of e
        value = max(x, Decimal(0)) + _log1p((-abs(x)).exp())
    return +value


def _arctan(x: Decimal) -> Decimal:
    doublings = 0
    while abs(x) > Decimal("0.01"):  # the angle is halved
        x = x / (1 + (1 + x * x).sqrt())
        doublings += 1
    total, power, n = x, x, 1
    while abs(power) > abs(x).scaleb(-62):
        power *= -x * x
        n += 2
        total += power / n
    return total * 2**doublings


def _taylor(x: Decimal, n: int) -> Decimal:
    """x**n / n! minus every second term that follows in e to the x: sine (n = 1), cosine (0)."""
    term = total = x if n else Decimal(1)
    while abs(term) > Decimal("1e-65"):
        term *= -x * x / ((n + 1) * (n + 2))
        total += term
        n += 2
    return total


def _sin(x: Decimal) -> Decimal:
    return _taylor(x, 1)


def _cos(x: Decimal) -> Decimal:
    return _taylor(x, 0)


def _sin_of_quarters(x: Decimal) -> Decimal:
    return _sin(x * _PI / 2)


def _silu(x: Decimal) -> Decimal:
    return x * _sigmoid(x)


def _silu_dx(x: Decimal) -> Decimal:
    return _sigmoid(x) * (1 + x * _sigmoid(-x))


def _gelu_tanh_argument(x: Decimal) -> tuple[Decimal, Decimal]:
    """2 * u of GELU_TANH and its derivative."""
    cubic = Decimal("0.044715")
    twice = 2 * (2 / _PI).sqrt()
    return twice * x * (1 + cubic * x * x), twice * (1 + 3 * cubic * x * x)


def _gelu_tanh(x: Decimal) -> Decimal:
    return x * _sigmoid(_gelu_tanh_argument(x)[0])


def _gelu_tanh_dx(x: Decimal) -> Decimal:
    u, slope = _gelu_tanh_argument(x)
    return _sigmoid(u) * (1 + x * _sigmoid(-u) * slope)


def _mish(x: Decimal) -> Decimal:
    e = x.exp()
    q = e * (e + 2)  # (1 + e to the x)**2 - 1: its tanh is q / (q + 2)
    return x * q / (q + 2)


def _mish_dx(x: Decimal) -> Decimal:
    e = x.exp()
    q = e * (e + 2)
    return q / (q + 2) + x * 4 * e * (1 + e) / (q + 2) ** 2


def _log2(x: Decimal) -> Decimal:
    return x.ln() * _LOG2E


# ------------------------------------------------------------------ description language

#: Largest relative error of a polynomial, truncations and coefficient rounding included: a
#: quarter of a ULP at most. Exponents (`exp2`) get twice that.
TOLERANCE = Decimal(2) ** -26


def _nothing(want: Decimal) -> Decimal:
    return Decimal(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """How one row of a page is evaluated; see the constructors below."""

    f: Callable[[Decimal], Decimal]
    relative: bool = False
    exp2: bool = False
    log: bool = False
    negate: bool = False
    nan: bool = False
    constant: bool = False
    #: the row's f takes the mantissa in [1, 2) instead of |y|
    mantissa: bool = False
    #: the operand is up to a unit of its last bit larger than its mantissa says
    truncated: bool = False
    #: largest relative error, see `TOLERANCE`; and an absolute one, if that is more, of a result
    tolerance: Decimal = TOLERANCE
    absolute: Callable[[Decimal], Decimal] = _nothing
    #: bits of c0 that may be given up so that c2 and c3 fit, if the tolerance leaves them
    spare: int = 5


def direct(f: Callable[[Decimal], Decimal]) -> Piece:
    """The result is f(x), x > 0 the reduced operand's absolute value."""
    return Piece(f=f)


def power(f: Callable[[Decimal], Decimal], *, negate: bool = False) -> Piece:
    """The result is 2**f(x), negated or not."""
    return Piece(f=f, exp2=True, negate=negate)


def scaled(f: Callable[[Decimal], Decimal]) -> Piece:
    """The result is f(mantissa) * 2**K, for any k."""
    return Piece(f=f, relative=True, mantissa=True)


def plus_log(f: Callable[[Decimal], Decimal]) -> Piece:
    """The result is f(mantissa) + k * ln 2, for any k."""
    return Piece(f=f, log=True, mantissa=True)


def constant(value: Decimal | int | str) -> Piece:
    """The result is `value`."""
    return Piece(f=lambda x: Decimal(value), constant=True)


ZERO = constant(0)
MINUS_ZERO = dataclasses.replace(ZERO, negate=True)
HALF = constant("0.5")
ONE = constant(1)
#: overflows to infinity
INFINITY = constant(Decimal(2) ** 200)
MINUS_INFINITY = dataclasses.replace(INFINITY, negate=True)
NAN = Piece(f=lambda x: Decimal(0), constant=True, nan=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """The rows of one page.

    Parameters
    ----------
    zero : reduced operand zero
    under : k below the function's `low`
    rows : (first k, piece) in rising order; each piece holds up to the next one's first k. A k of
        the function that none covers takes `under`
    over : k above the function's `high`
    inf : infinity; `over` if left out
    """

    zero: Piece
    under: Piece
    rows: tuple[tuple[int, Piece], ...] = ()
    over: Piece | None = None
    inf: Piece | None = None

    def pieces(self, low: int, high: int) -> list[tuple[int, Piece]]:
        """Returns (k, piece) row by row; k is 0 where the piece does not depend on it."""
        over = self.over or self.under
        found = [(0, self.zero), (0, self.under)]
        for k in range(low, high + 1):
            piece = self.under
            for first, candidate in self.rows:
                if k >= first:
                    piece = candidate
            found.append((0 if piece.mantissa or piece.constant else k, piece))
        return [*found, (0, over), (0, self.inf or over)]


_NAN_PAGE = Page(zero=NAN, under=NAN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """One function.

    Parameters
    ----------
    positive, negative : pages for y > 0 and y < 0 (+0 and -0 with them); `negative` is left out
        for an odd function
    low, high : exponents k with rows of their own
    center : y about which the function is centred on `centered` binades of |y| (k = -1, 0)
    above, below : pages for |y| greater or smaller than |center|; `zero` of `above` is y = center
    parity : rows are k mod 2
    scaling : see `Scaling`
    turn, quarter : see `CONTROL`; `above` is the page of reduced angles, `positive` that of |y|
        below 1/2
    """

    positive: Page
    negative: Page | None = None
    low: int = 0
    high: int = -1
    center: Decimal | None = None
    centered: tuple[int, ...] = ()
    above: Page = _NAN_PAGE
    below: Page = _NAN_PAGE
    parity: bool = False
    scaling: Scaling = Scaling.PLUS
    turn: bool = False
    quarter: bool = False

    @property
    def odd(self) -> bool:
        return self.negative is None


#: -x / e to the x, and its derivative: what is left of SILU(-x) and MISH(-x) from x = 32 on.
_TAIL = 5, power(lambda x: x.ln() * _LOG2E - x * _LOG2E, negate=True)
_TAIL_DX = 5, power(lambda x: (x - 1).ln() * _LOG2E - x * _LOG2E, negate=True)


def _gate(
    f: Callable[[Decimal], Decimal],
    *,
    low: int,
    high: int,
    straight: int,
    slope: str = "0.5",
    tail: tuple[tuple[int, Piece], ...] = (),
) -> Description:
    """A function like SILU: `slope` * y around 0, y far above, and a vanishing tail below.

    `straight` is the first k at which it is y; it is -0 for negative y of k above `high`. `tail`
    are rows for negative y in place of its own.
    """
    return Description(
        low=low,
        high=high,
        positive=Page(
            zero=ZERO,
            under=linear(slope),
            rows=((low, direct(f)), (straight, linear(1))),
            over=linear(1),
            inf=INFINITY,
        ),
        negative=Page(
            zero=MINUS_ZERO,
            under=linear("-" + slope),
            rows=(
                (low, direct(lambda x: f(-x))),
                (0, power(lambda x: _log2(-f(-x)), negate=True)),
                *tail,
            ),
            over=MINUS_ZERO,
        ),
    )


def _gate_dx(
    f: Callable[[Decimal], Decimal],
    *,
    low: int,
    high: int,
    flat: int,
    zero: Decimal,
    slope: str = "0.5",
    tail: tuple[tuple[int, Piece], ...] = (),
) -> Description:
    """The derivative of such a function: `slope` at 0, 1 from k = `flat` on, and a vanishing tail
    below its `zero`, around which it is centred."""
    start = constant(slope)
    at = 0 if zero <= -1 else -1
    negative = [(low, direct(lambda x: f(-x))), (at, NAN)]  # `at` is never met: centred
    if at < 0:
        negative.append((0, direct(lambda x: f(-x))))
    negative.append((1, power(lambda x: _log2(-f(-x)), negate=True)))
    negative.extend(tail)
    return Description(
        low=low,
        high=high,
        positive=Page(
            zero=start, under=start, rows=((low, direct(f)), (flat, ONE)), over=ONE
        ),
        negative=Page(zero=start, under=start, rows=tuple(negative), over=MINUS_ZERO),
        center=zero,
        centered=(at,),
        above=Page(
            zero=constant(_CONTEXT.plus(f(zero))),
            under=NAN,
            rows=((-24, direct(lambda x: f(zero - x))), (0, NAN)),
        ),
        below=Page(
            zero=NAN, under=NAN, rows=((-24, direct(lambda x: f(zero + x))), (-1, NAN))
        ),
    )  # fmt: skip


def linear(slope: Decimal | int | str) -> Piece:
    """The result is slope * y."""
    return scaled(lambda m: Decimal(slope) * m)


def _root(f: Callable[[Decimal], Decimal]) -> tuple[tuple[int, Piece], tuple[int, Piece]]:
    return (0, scaled(f)), (1, scaled(lambda m: f(2 * m)))


def _zero_of(f: Callable[[Decimal], Decimal], low: str, high: str) -> Decimal:
    """The zero of a rising f between low and high, by bisection to 1e-30."""
    with decimal.localcontext(_CONTEXT):
        a, b = Decimal(low), Decimal(high)
        while b - a > Decimal("1e-30"):
            middle = (a + b) / 2
            a, b = (middle, b) if f(middle) < 0 else (a, middle)
        # the centre itself must be a number that y can take: 24 bits of [1/2, 1)
        return Decimal(_constant(a, CENTER_FRACTION)) / 2**CENTER_FRACTION


_TURNED = Page(
    zero=NAN,  # never met
    under=dataclasses.replace(linear(_CONTEXT.divide(_PI, 2)), truncated=True),
    rows=((-13, dataclasses.replace(direct(_sin_of_quarters), truncated=True)),),
)


def _wave(
    *, zero: Piece, under: Piece, f: Callable[[Decimal], Decimal], quarter: bool
) -> Description:
    """Sine or cosine. The cosine counts as odd, as the lane ignores the sign of y for it."""
    return Description(
        low=-13,
        high=-1,
        positive=Page(zero=zero, under=under, rows=((-13, direct(f)), (-1, NAN)), inf=NAN),
        above=_TURNED,
        turn=True,
        quarter=quarter,
    )


DESCRIPTIONS: dict[Function, Description] = {
    Function.IDENTITY: Description(positive=Page(zero=ZERO, under=linear(1), inf=INFINITY)),
    Function.EXP: Description(
        low=-25,
        high=6,
        positive=Page(
            zero=ONE, under=ONE, rows=((-25, power(lambda x: x * _LOG2E)),), over=INFINITY
        ),
        negative=Page(zero=ONE, under=ONE, rows=((-25, power(lambda x: -x * _LOG2E)),), over=ZERO),
    ),
    Function.LOG: Description(
        low=-24,
        high=-1,
        positive=Page(zero=MINUS_INFINITY, under=plus_log(lambda m: m.ln()), inf=INFINITY),
        negative=Page(zero=MINUS_INFINITY, under=NAN),
        center=Decimal(1),
        centered=(-1, 0),
        above=Page(zero=ZERO, under=linear(1), rows=((-24, direct(_log1p)),)),
        below=Page(
            zero=ZERO,
            under=linear(-1),
            # k = -1 is y = 1/2 alone
            rows=((-24, direct(lambda x: _log1p(-x))), (-1, constant(-_LN2_D))),
        ),
    ),
    Function.TANH: Description(
        low=-13,
        high=3,
        positive=Page(zero=ZERO, under=linear(1), rows=((-13, direct(_tanh)),), over=ONE),
    ),
    Function.RECIPROCAL: Description(
        positive=Page(zero=INFINITY, under=scaled(lambda m: 1 / m), inf=ZERO),
        scaling=Scaling.MINUS,
    ),
    Function.RSQRT: Description(
        low=0,
        high=1,
        parity=True,
        positive=Page(
            zero=INFINITY, under=NAN, rows=_root(lambda m: 1 / m.sqrt()), inf=ZERO
        ),
        negative=Page(zero=MINUS_INFINITY, under=NAN),
        scaling=Scaling.MINUS_HALF,
    ),
    Function.SQRT: Description(
        low=0,
        high=1,
        parity=True,
        positive=Page(zero=ZERO, under=NAN, rows=_root(lambda m: m.sqrt()), inf=INFINITY),
        negative=Page(zero=MINUS_ZERO, under=NAN),
        scaling=Scaling.HALF,
    ),
    Function.GELU: _gate(_gelu, low=-25, high=3, straight=3),
    Function.GELU_DX: _gate_dx(
        _gelu_dx, low=-26, high=3, flat=3, zero=_zero_of(_gelu_dx, "-0.8", "-0.7")
    ),
    Function.SIGMOID: Description(
        low=-25,
        high=6,
        positive=Page(
            zero=HALF, under=HALF, rows=((-25, direct(_sigmoid)), (5, ONE)), over=ONE
        ),
        negative=Page(
            zero=HALF,
            under=HALF,
            rows=(
                (-25, direct(lambda x: _sigmoid(-x))),
                (0, power(lambda x: -(x + _log1p((-x).exp())) * _LOG2E)),
            ),
            over=ZERO,
        ),
    ),
    Function.ERF: Description(
        low=-13,
        high=1,
        positive=Page(
            zero=ZERO,
            under=linear(2 / _PI.sqrt(_CONTEXT)),
            rows=((-13, direct(_erf)),),
            over=ONE,
        ),
    ),
    Function.SOFTPLUS: Description(
        low=-26,
        high=6,
        positive=Page(
            zero=constant(_LN2_D),
            under=constant(_LN2_D),
            rows=((-26, direct(_softplus)), (5, linear(1))),
            over=linear(1),
            inf=INFINITY,
        ),
        negative=Page(
            zero=constant(_LN2_D),
            under=constant(_LN2_D),
            rows=(
                (-26, direct(lambda x: _softplus(-x))),
                (0, power(lambda x: _log2(_softplus(-x)))),
            ),
            over=ZERO,
        ),
    ),
    Function.ARCTAN: Description(
        low=-13,
        high=25,
        positive=Page(
            zero=ZERO,
            under=linear(1),
            rows=((-13, direct(_arctan)),),
            over=constant(_CONTEXT.divide(_PI, 2)),
        ),
    ),
    Function.SIGN: Description(positive=Page(zero=ZERO, under=ONE)),
    Function.ABS: Description(
        positive=Page(zero=ZERO, under=linear(1), inf=INFINITY),
        negative=Page(zero=ZERO, under=linear(1), inf=INFINITY),
    ),
    Function.RELU: Description(
        positive=Page(zero=ZERO, under=linear(1), inf=INFINITY),
        negative=Page(zero=ZERO, under=ZERO),
    ),
    Function.SILU: _gate(_silu, low=-25, high=6, straight=5, tail=(_TAIL,)),
    Function.SILU_DX: _gate_dx(
        _silu_dx, low=-26, high=6, flat=5, zero=_zero_of(_silu_dx, "-1.3", "-1.2"),
        tail=(_TAIL_DX,),
    ),
    Function.GELU_TANH: _gate(_gelu_tanh, low=-25, high=3, straight=3),
    Function.GELU_TANH_DX: _gate_dx(
        _gelu_tanh_dx, low=-26, high=3, flat=3, zero=_zero_of(_gelu_tanh_dx, "-0.8", "-0.7")
    ),
    Function.MISH: _gate(
        _mish, low=-25, high=6, straight=4, slope="0.6", tail=(_TAIL,)
    ),
    Function.MISH_DX: _gate_dx(
        _mish_dx, low=-26, high=6, flat=4, zero=_zero_of(_mish_dx, "-1.3", "-1.1"),
        slope="0.6", tail=(_TAIL_DX,),
    ),
    Function.SQUARE: Description(
        positive=Page(zero=ZERO, under=scaled(lambda m: m * m), inf=INFINITY),
        negative=Page(zero=ZERO, under=scaled(lambda m: m * m), inf=INFINITY),
        scaling=Scaling.DOUBLE,
    ),
    Function.SIN: _wave(zero=ZERO, under=linear(1), f=_sin, quarter=False),
    Function.COS: _wave(zero=ONE, under=ONE, f=_cos, quarter=True),
}  # fmt: skip

# ------------------------------------------------------------------ generator

#: 2 to that power, and what is less, rounds to zero.
_VANISHED = -151


def horner(c0: int, c1: int, c2: int, c3: int, t: int) -> tuple[int, int, int]:
    """p2, p1 and p0 of step 3, without the logarithm's term."""
    p2 = c2 + (c3 * (t >> 5) >> 18)
    p1 = c1 + (p2 * t >> MANTISSA)
    return p2, p1, c0 + (p1 * t >> MANTISSA)


def _nodes() -> tuple[Decimal, ...]:
    """Chebyshev's nodes of degree 4 in [0, 1]."""
    root = Decimal(2).sqrt()
    near, far = (2 - root).sqrt() / 4, (2 + root).sqrt() / 4
    half = Decimal(1) / 2
    return half - far, half - near, half + near, half + far


def _fit(f: Callable[[Decimal], Decimal]) -> tuple[Decimal, ...]:
    """Coefficients of the cubic through f at Chebyshev's nodes of [0, 1]."""
    nodes = _nodes()
    table = [f(node) for node in nodes]
    for order in range(1, 4):  # Newton's divided differences
        for i in range(3, order - 1, -1):
            table[i] = (table[i] - table[i - 1]) / (nodes[i] - nodes[i - order])
    poly = [table[3], Decimal(0), Decimal(0), Decimal(0)]
    for i in range(2, -1, -1):  # poly = poly * (t - node) + table[i]
        shifted = [Decimal(0), *poly[:3]]
        poly = [a - nodes[i] * b for a, b in zip(shifted, poly, strict=True)]
        poly[0] += table[i]
    return tuple(poly)


def _fits(values: Iterable[int], widths: Iterable[int]) -> bool:
    return all(abs(v) < 1 << width - 1 for v, width in zip(values, widths, strict=True))


#: t at which a segment's error is measured: the ends and between the nodes
_PROBES = tuple(
    int(Decimal(x) * (2**MANTISSA - 1)) >> MAX_COUNT_LOG2 << MAX_COUNT_LOG2
    for x in ("0", "0.015", "0.08", "0.146", "0.25", "0.38", "0.5", "0.62", "0.75", "0.854",
              "0.92", "0.985", "1")
)  # fmt: skip


def _segment(piece: Piece, k: int, index: int, log2_count: int) -> int | None:
    """Fits segment `index` of 2**log2_count; None if it misses `TOLERANCE`."""
    unit = Decimal(2) ** (0 if piece.mantissa else k)
    least = 1 + Decimal(piece.truncated) / 2 ** (MANTISSA + 1)

    @functools.cache
    def f(t: Decimal) -> Decimal:
        return piece.f(unit * (least + (index + t) / 2**log2_count))

    flags = {
        name: int(getattr(piece, name)) for name in ("relative", "exp2", "log", "negate", "nan")
    }
    if piece.constant:
        value = f(Decimal(0))
        scale = 34 - value.adjusted() * 10 // 3 if value else 0
        while value and abs(value) * Decimal(2) ** scale > 2**35 - 1:
            scale -= 1
        c0 = int((value * Decimal(2) ** scale).to_integral_value())
        return _pack(SEGMENT, {"c0": c0, "exponent": -scale, **flags})

    if piece.exp2 and max(f(Decimal(0)), f(Decimal(1))) < _VANISHED:
        return _pack(SEGMENT, {"exponent": _VANISHED - 1, **flags})

    real = list(_fit(f))
    offset = Decimal(0)  # moved from c0 to the exponent
    fixed = piece.exp2 or piece.log
    if fixed:
        scale = FIXED
        if piece.exp2:
            offset = real[0].to_integral_value()
            real[0] -= offset
    else:
        top = max(abs(f(Decimal(0))), abs(f(Decimal(1))))
        if top < Decimal(2) ** _VANISHED:
            zero = all(abs(value) < Decimal(2) ** _VANISHED for value in real)
            return _pack(SEGMENT, flags) if zero else None
        scale = 33 - int(top.ln() / _LN2_D)
    for drop in range(1 if fixed else 1 + piece.spare):
        unrounded = [v * Decimal(2) ** (scale - drop) for v in real]
        if fixed:  # the mean of what the two shifts drop; other segments have bits to spare
            unrounded[0] += Decimal("0.75")
        c = [int(v.to_integral_value()) for v in unrounded]
        steps = {t: horner(c[0], c[1], c[2], c[3], t) for t in _PROBES}
        if _fits(c, (36, 36, 25, 17)) and all(_fits(p, (25, 36, 36)) for p in steps.values()):
            break
    else:
        return None
    scale -= drop
    wants = {t: f(Decimal(t) / 2**MANTISSA) for t in steps}
    if not fixed and min(wants.values()) < 0 < max(wants.values()):
        # Next to a zero a relative bound is never met.
        if piece.absolute(Decimal(0)) * 2**scale < 4:
            return None
    for t, (_, _, p0) in steps.items():
        want = wants[t]
        error = abs(p0 / Decimal(2) ** scale + offset - want)
        limit = piece.tolerance * (2 if piece.exp2 else 1)
        if piece.exp2:
            if want < _VANISHED:  # rounds to zero whatever the error
                continue
            error *= _LN2_D
        elif not piece.log:  # the logarithm's sum is about 1 at least
            limit = max(limit * abs(want), piece.absolute(want))
        if error > limit:
            return None
    names = ("c0", "c1", "c2", "c3")
    exponent = int(offset) if piece.exp2 else -scale
    return _pack(SEGMENT, {**dict(zip(names, c, strict=True)), "exponent": exponent, **flags})


def _binade(pieces: Sequence[Piece], k: int) -> tuple[int, ...]:
    """Segments of one row, as few as reach the tolerance by one of the pieces."""
    for log2_count in range(MAX_COUNT_LOG2 + 1):
        count = 1 << log2_count
        for piece in pieces:
            # the ends of the binade are the likeliest to fail
            found: dict[int, int] = {}
            for index in sorted(range(count), key=lambda i: min(i, count - 1 - i)):
                word = _segment(piece, k, index, log2_count)
                if word is None:
                    break
                found[index] = word
            else:
                return tuple(found[index] for index in range(count))
    raise ValueError(f"no {1 << MAX_COUNT_LOG2} segments of 2**{k} reach the tolerance")


class _Segments:
    """The segments of rows, equal ones kept once."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self._groups: dict[tuple[int, ...], int] = {}

    def entry(self, group: tuple[int, ...]) -> dict[str, int]:
        """The directory's entry of a row's segments, as fields."""
        if group not in self._groups:
            self._groups[group] = len(self.words)
            self.words.extend(group)
        return {"base": self._groups[group], "log2_count": len(group).bit_length() - 1}


def _exp2_table() -> tuple[int, ...]:
    """Quadratics of 2**f: LSB 2**-28, the mean of the truncations added to c0."""
    words = []
    count = 1 << EXP2_SEGMENTS_LOG2
    half, root = Decimal(1) / 2, Decimal(3).sqrt() / 4
    nodes = (half - root, half, half + root)
    for i in range(count):
        y0, y1, y2 = (Decimal(2) ** ((i + u) / count) for u in nodes)
        d1, d2 = (y1 - y0) / root, (y2 - y1) / root
        a2 = (d2 - d1) / (2 * root)
        a1 = d1 - a2 * (nodes[0] + nodes[1])
        a0 = y0 - d1 * nodes[0] + a2 * nodes[0] * nodes[1]
        c0 = (a0 - 1) * 2**FIXED + 1
        values = {"c0": c0, "c1": a1 * 2**FIXED, "c2": a2 * 2**FIXED}
        words.append(_pack(EXP2_ENTRY, {n: int(v.to_integral_value()) for n, v in values.items()}))
    return tuple(words)


def _pages(bases: Iterable[int]) -> int:
    """The bits of `CONTROL` that name the pages."""
    width = CONTROL["pages"].shape.elem_shape.width
    return sum(base << CONTROL["pages"].offset + i * width for i, base in enumerate(bases))


def generate(report: Callable[[str], None] = lambda line: None) -> Tables:
    """Computes the tables from `DESCRIPTIONS`."""
    memory = _Segments()
    segments = memory.words
    fitted: dict[tuple[int, int], tuple[int, ...]] = {}

    def entry(k: int, piece: Piece) -> int:
        key = (id(piece), k)
        if key not in fitted:
            fitted[key] = _binade([piece], k)
        return _pack(ENTRY, memory.entry(fitted[key]))

    with decimal.localcontext(_CONTEXT):
        directory = [entry(0, NAN)]
        pages: dict[tuple[int, ...], int] = {}
        controls = {}
        for function, d in DESCRIPTIONS.items():
            before = len(segments), len(directory)
            bases = []
            for page in (d.positive, d.negative or d.positive, d.above, d.below):
                rows = tuple(entry(k, piece) for k, piece in page.pieces(d.low, d.high))
                if rows not in pages:
                    pages[rows] = len(directory)
                    directory.extend(rows)
                bases.append(pages[rows])
            masks = {"center_positive": 0, "center_negative": 0}
            if d.center is not None:
                side = "center_positive" if d.center > 0 else "center_negative"
                masks[side] = sum(1 << k + 1 for k in d.centered)
            word = _pack(
                CONTROL,
                {
                    "low": d.low,
                    "span": d.high - d.low + 1,
                    "center": _constant(abs(d.center or Decimal(0)), CENTER_FRACTION),
                    "odd": int(d.odd),
                    "parity": int(d.parity),
                    "scaling": d.scaling.value,
                    "turn": int(d.turn),
                    "quarter": int(d.quarter),
                    **masks,
                },
            )
            controls[function] = word | _pages(bases)
            report(
                f"{function.name:12} {len(segments) - before[0]:5} segments "
                f"{len(directory) - before[1]:5} directory rows"
            )
        control = {"low": CUSTOM_LOW, "span": CUSTOM_SPAN}
        controls[Function.CUSTOM] = _pack(CONTROL, control) | _pages(_CUSTOM_PAGES)
        exp2 = _exp2_table()
    report(f"{'total':12} {len(segments):5} segments {len(directory):5} directory rows")
    if len(segments) > SEGMENTS or len(directory) > DIRECTORY:
        raise ValueError(f"{len(segments)} segments, {len(directory)} rows do not fit the memories")
    return Tables(tuple(segments), tuple(directory), exp2, controls)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The table of a function for CUSTOM.

    Parameters
    ----------
    segments : words of `SEGMENT`, for the end of the memory of segments
    directory : words of `ENTRY`
    """

    segments: tuple[int, ...]
    directory: tuple[int, ...]


_OVERFLOW = Decimal(2) ** 128


class _Fitter:
    """Chooses how the rows of CUSTOM are evaluated; parameters as of `custom`."""

    def __init__(
        self,
        f: Callable[[Decimal], Decimal],
        ulp: Decimal,
        absolute: Decimal,
        domain: tuple[Decimal, Decimal],
    ) -> None:
        self._exactly = f
        self._f = functools.cache(f)  # -0 and 0 are one number to it
        self._domain = domain
        # Half a ULP is for the rounding of the result; a ULP is 2**-24 of a number at least, and
        # 2**-149.
        self._relative = (ulp - Decimal("0.5")) * Decimal(2) ** -24
        self._least = (ulp - Decimal("0.5")) * Decimal(2) ** -149
        self._error = absolute

    def _absolute(self, want: Decimal) -> Decimal:
        return max(self._least, self._error - abs(want) * Decimal(2) ** -24)

    def _outside(self, low: Decimal, high: Decimal) -> bool:
        """Whether nothing between two powers of two, with signs, is in the domain."""
        return high <= self._domain[0] or low >= self._domain[1]

    def zero(self, sign: int) -> Piece:
        """The row of zero."""
        if not self._domain[0] <= 0 <= self._domain[1]:
            return NAN
        at = Decimal(0).copy_sign(Decimal(sign))
        found = self._simple([self._exactly(at)], [Decimal(1)], last=False)
        assert found is not None
        return found

    def _simple(self, values: list[Decimal], xs: list[Decimal], *, last: bool) -> Piece | None:
        """A constant, or a multiple of x, that agrees with all values; constants are like the
        first or the last of them."""
        if any(v.is_nan() for v in values):
            return NAN if all(v.is_nan() for v in values) else None
        if all(abs(v) >= _OVERFLOW for v in values) and len({v.is_signed() for v in values}) == 1:
            return MINUS_INFINITY if values[0].is_signed() else INFINITY
        if any(v.is_infinite() for v in values):
            return None
        value = values[-last]
        if abs(value) < Decimal(2) ** (_VANISHED + 1):
            value = Decimal(0).copy_sign(value)
        slope = values[0] / xs[0]
        errors = [abs(value - v) for v in values]
        slope_errors = [abs(slope * x - v) for x, v in zip(xs, values, strict=True)]
        ulps = [max(self._relative * abs(v), self._least) for v in values]
        loose = [max(u, self._absolute(v)) for u, v in zip(ulps, values, strict=True)]
        for bounds in (ulps, loose):
            if all(map(operator.le, errors, bounds)):
                if value:
                    return constant(value)
                return MINUS_ZERO if value.is_signed() else ZERO
            if all(map(operator.le, slope_errors, bounds)):
                return linear(slope)
        return None

    def far(self, sign: int, exponents: range) -> Piece:
        """One row for all these binades, beyond those with rows of their own."""
        parts = (Decimal(1), Decimal("1.37"), 2 - Decimal(2) ** -23)
        xs = [Decimal(2) ** k * part for k in exponents for part in parts]
        ends = sorted((sign * xs[0], sign * xs[-1]))
        if self._outside(*ends):
            return NAN
        found = self._simple([self._f(sign * x) for x in xs], xs, last=exponents[0] > 0)
        if found is None:
            where, remedy = f"below 2**{CUSTOM_LOW}", "an absolute error bound"
            if exponents[0] > 0:
                where, remedy = f"above 2**{exponents[0]}", "a domain that ends before"
            raise ValueError(
                f"the function is neither constant nor a multiple of y for {'-' * (sign < 0)}y "
                f"{where}: give {remedy}"
            )
        return found

    def row(self, sign: int, k: int) -> tuple[int, ...]:
        """The segments of a binade."""
        unit = Decimal(2) ** k
        if self._outside(*sorted((sign * unit, sign * 2 * unit))):
            return _binade([NAN], 0)
        xs = [unit * (1 + Decimal(i) / 16) for i in range(16)] + [unit * (2 - Decimal(2) ** -23)]
        values = [self._f(sign * x) for x in xs]
        simple = self._simple(values, xs, last=False)
        if simple is not None:
            return _binade([simple], 0)
        where = f"between {sign * unit:.6g} and {sign * 2 * unit:.6g}"
        if not all(v.is_finite() for v in values):
            raise ValueError(f"the function is not finite everywhere {where}")
        pieces = [
            dataclasses.replace(
                direct(lambda x: self._f(sign * x)),
                tolerance=self._relative,
                absolute=self._absolute,
                spare=20,
            )
        ]
        sizes = [abs(v) for v in values]
        if len({v.is_signed() for v in values}) == 1 and 0 < 4 * min(sizes) < max(sizes):
            logarithm = power(lambda x: _log2(abs(self._f(sign * x))), negate=values[0].is_signed())
            pieces.append(dataclasses.replace(logarithm, tolerance=self._relative / 2))
        try:
            return _binade(pieces, k)
        except (ValueError, decimal.InvalidOperation):
            raise ValueError(
                f"the function takes more than {1 << MAX_COUNT_LOG2} segments {where}: give a "
                "larger error bound (where it is zero, an absolute one) or a smaller domain"
            ) from None


def custom(
    f: Callable[[Decimal], Decimal],
    *,
    ulp: Decimal,
    absolute: Decimal,
    domain: tuple[Decimal, Decimal],
) -> Fitted:
    """Makes a table of any function of real numbers for CUSTOM.

    Parameters
    ----------
    f : may return NaN and infinities
    ulp, absolute : a result may be off by so many ULP, 0.75 at least, or by so much
    domain : open interval outside of whose binades the result is NaN

    Infinite numbers have the value that the largest have, or go to infinity with them. Raises
    ValueError if the function does not fit.
    """
    memory = _Segments()
    with decimal.localcontext(_CONTEXT):
        fitter = _Fitter(f, ulp, absolute, domain)
        high = CUSTOM_LOW + CUSTOM_SPAN
        entries = [memory.entry(_binade([NAN], 0))]
        for sign in (1, -1):
            over = fitter.far(sign, range(high, 128))
            inf = over
            if not over.constant:
                inf = MINUS_INFINITY if over.f(Decimal(1)) < 0 else INFINITY
            rows = [
                _binade([fitter.zero(sign)], 0),
                _binade([fitter.far(sign, range(-149, CUSTOM_LOW))], 0),
                *(fitter.row(sign, k) for k in range(CUSTOM_LOW, high)),
                _binade([over], 0),
                _binade([inf], 0),
            ]
            entries += [memory.entry(row) for row in rows]
    spare = TABLE_SEGMENTS - len(memory.words)
    if spare < 0:
        bound = f"{ulp} ULP" + (f" or {absolute}" if absolute else "")
        raise ValueError(
            f"the function needs {len(memory.words)} segments for {bound}; {TABLE_SEGMENTS} are "
            "there: give a larger error bound or a smaller domain"
        )
    for fields in entries:
        fields["base"] += spare
    directory = [_pack(ENTRY, fields) for fields in entries]
    directory += [0] * (TABLE_ROWS - len(directory))
    return Fitted(tuple(memory.words), tuple(directory))


def main() -> None:
    _PATH.write_text(generate(lambda line: print(line, file=sys.stderr)).dump())


if __name__ == "__main__":
    main()
