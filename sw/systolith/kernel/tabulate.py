"""Functions of the user's own on the scalar engine: tables for Function.CUSTOM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np
from systolith_hdl.formats import DType
from systolith_hdl.isa import (
    SEGMENT_WORDS,
    TABLE_SEGMENTS,
    TABLE_WORDS,
    Function,
)
from systolith_hdl.scalar import tables

from ..errors import KernelError
from ..golden.activation import evaluate

if TYPE_CHECKING:
    from .builder import KernelBuilder

#: least error bound: half a ULP of it is the rounding of the result
LEAST_ULP = 0.75
#: columns that the words of a table pass through on their way from DRAM
_STAGING = 256
#: numbers measured in every binade, beside both ends of every segment
_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Table:
    """The table of a function, made by `table`.

    Parameters
    ----------
    name : of the function
    words : uint32, the end of the table of a partition: from word ``first`` on
    segments : how many of the `TABLE_SEGMENTS` it takes
    max_ulp, max_absolute : largest errors measured, in ULP of the result and as a number, among
        results of magnitude 16 or less
    worst : where `max_ulp` was met
    """

    name: str
    words: np.ndarray
    segments: int
    max_ulp: float
    max_absolute: float
    worst: float

    @property
    def first(self) -> int:
        """Word of the partition's table at which `words` begin."""
        return TABLE_WORDS - len(self.words)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.segments} of {TABLE_SEGMENTS} segments, at most "
            f"{self.max_ulp:.3f} ULP (at {self.worst:.9g}) and {self.max_absolute:.2e} off"
        )

    def __call__(self, y: np.ndarray) -> np.ndarray:
        """What the chip makes of float32 numbers, bit for bit."""
        y = np.asarray(y, np.float32)
        whole = np.zeros(TABLE_WORDS, np.uint32)
        whole[self.first :] = self.words
        return evaluate(Function.CUSTOM, y.view(np.uint32), whole).view(np.float32)

    def load(self, nc: KernelBuilder) -> None:
        """Makes it the table of every partition: what Function.CUSTOM is from here on."""
        number = len(nc.dram.tensors)
        data = self.words.view(np.int32)
        tensor = nc.dram.tensor(f"table{number}", data=data, kind="constant")
        columns = max(1, min(_STAGING, len(data), nc.sbuf.largest_free))
        tile = nc.sbuf.tile(columns, f"table{number}")
        for start in range(0, len(data), columns):
            view = tile.view((min(columns, len(data) - start),)).astype(DType.INT32)
            nc.dma.load(view, tensor, start * tensor.itemsize, lane_stride=0)
            nc.scalar.load_table(view, self.first + start)
        nc.sbuf.free(tile)


def _decimal(f: Callable[[float], float], name: str) -> Callable[[Decimal], Decimal]:
    def value(x: Decimal) -> Decimal:
        with np.errstate(all="ignore"):
            try:
                return Decimal(float(f(np.float64(x))))
            except OverflowError:
                raise KernelError(
                    f"{name}({float(x):.6g}) overflows: use functions of numpy, which return "
                    "infinity, or give a domain"
                ) from None
            except ValueError:  # as math.log(-1)
                return Decimal("NaN")

    return value


def _inputs(made: tables.Fitted, domain: tuple[float, float]) -> np.ndarray:
    """FP32 numbers at which a table is measured, those of its domain's binades."""
    rng = np.random.default_rng(1)
    random = rng.integers(0, 1 << 23, (254, _SAMPLES))
    spread = (np.arange(1, 255)[:, None] << 23 | random).ravel()
    ends = []
    for row, word in enumerate(made.directory):
        entry = tables.field_bits(tables.ENTRY, word)
        row = (row - 1) % (tables.CUSTOM_SPAN + 4) - tables.ROW_LOW
        if word and 0 <= row < tables.CUSTOM_SPAN:
            steps = np.arange(1 << entry["log2_count"]) << 23 - entry["log2_count"]
            ends.append((tables.CUSTOM_LOW + row + 127 << 23) + steps)
    edges = np.concatenate(ends)
    near = (edges[:, None] + np.arange(-2, 3)).ravel()
    bits = np.concatenate([spread, near, np.arange(8)]).astype(np.uint32)
    y = np.concatenate([bits, bits | 1 << 31]).view(np.float32)
    low, high = domain
    return np.unique(y[(y > low) & (y < high)])


def table(
    f: Callable[[float], float],
    *,
    ulp: float = 1.0,
    absolute: float = 0.0,
    domain: tuple[float, float] = (-math.inf, math.inf),
    name: str | None = None,
) -> Table:
    """Makes a table by which the scalar engine evaluates a function: `Function.CUSTOM`.

    Parameters
    ----------
    f : takes and returns a float; numpy's functions, which return infinity and NaN, are fine
    ulp, absolute : a result may be off by so many ULP, at least 0.75 (0.5 are the rounding of the
        result), or by so much. A function with a zero that is no power of two needs an absolute
        bound, as no table has a segment for every number next to it
    domain : open interval in which the function matters; up to the next powers of two it must be
        smooth, too, and beyond them the result is NaN
    name : in messages

    Below 2**-28 a function is taken for constant or for a multiple of y, likewise above 2**31,
    where the domain goes so far; an infinite y has the value that the largest ones have. NaN gives
    NaN. The table is measured against `f` at about 35,000 numbers and more. Raises KernelError if
    the function does not fit the memory or misses the bounds.
    """
    name = name or str(getattr(f, "__name__", "function"))
    low, high = (float(end) for end in domain)
    if not ulp >= LEAST_ULP:
        raise KernelError(f"table of {name}: ulp must be at least {LEAST_ULP}, not {ulp}")
    if not absolute >= 0 or math.isinf(absolute):
        raise KernelError(f"table of {name}: absolute must be 0 or more, not {absolute}")
    if not low < high:
        raise KernelError(f"table of {name}: a domain from {low} to {high} is empty")
    real = _decimal(f, name)
    try:
        made = tables.custom(
            real,
            ulp=Decimal(float(ulp)),
            absolute=Decimal(float(absolute)),
            domain=(Decimal(low), Decimal(high)),
        )
    except ValueError as error:
        raise KernelError(f"table of {name}: {error}") from None
    segments = [w >> 32 * part & 0xFFFFFFFF for w in made.segments for part in range(SEGMENT_WORDS)]
    words = np.array([*segments, *made.directory], np.uint32)
    words.setflags(write=False)
    found = Table(name, words, len(made.segments), 0.0, 0.0, 0.0)
    return _measured(found, real, _inputs(made, (low, high)), ulp, absolute)


def _measured(
    found: Table, f: Callable[[Decimal], Decimal], y: np.ndarray, ulp: float, absolute: float
) -> Table:
    """The table with its errors; raises KernelError where one is above the bounds."""
    # scipy is needed by the other functions there
    from ..golden.accuracy import errors

    want = np.array([float(f(Decimal(float(x)))) for x in y])
    got = found(y)
    error = errors(got.view(np.uint32), want)
    with np.errstate(all="ignore"):
        off = np.abs(got.astype(np.float64) - want)
        # beside the bound of the table there is the rounding of the result
        beyond = (error > ulp) & ~(off <= absolute + np.spacing(np.abs(got)) / 2)
    beyond |= np.isinf(error)
    if beyond.any():
        at = int(np.argmax(beyond))
        raise KernelError(
            f"table of {found.name}: at {y[at]:.9g} it gives {got[at]:.9g} for {want[at]:.9g}: the "
            "function bends too sharply between the numbers that it was fitted at; give a larger "
            "error bound or a smaller domain"
        )
    worst = int(np.argmax(error))
    small = off[np.abs(want) <= 16]
    return dataclasses.replace(
        found,
        max_ulp=float(error[worst]),
        worst=float(y[worst]),
        max_absolute=float(small.max(initial=0.0)),
    )
