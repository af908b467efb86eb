"""Number formats: the one table of types, their widths and their numpy counterparts."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
from amaranth.lib import enum


class DType(enum.Enum, shape=4):
    """Type of an operand. SBUF and PSUM hold one element per 32-bit word: every float is kept
    as FP32, so a write in a narrow type rounds to it and keeps the rounded value, and a narrow
    type is packed only in DRAM and at the tensor engine's inputs. An integer is kept in 32 bits,
    that of a type with a sign in two's complement."""

    #: IEEE-754 binary32
    FP32 = 0
    #: bfloat16: FP32 with 7 fraction bits
    BF16 = 1
    #: IEEE-754 binary16
    FP16 = 2
    #: OCP FP8 E4M3 (finite, one NaN)
    FP8_E4M3 = 3
    #: OCP FP8 E5M2
    FP8_E5M2 = 4
    #: two's complement, 32 bits
    INT32 = 5
    #: two's complement, 8 bits
    INT8 = 6
    #: 32 bits without a sign
    UINT32 = 7


@dataclasses.dataclass(frozen=True)
class Format:
    """One type.

    Parameters
    ----------
    bits, exponent, fraction : widths; the latter two are 0 for integers
    numpy : its numpy counterpart
    nan : bits of its canonical NaN, the one that is written
    infinite : has infinities; what overflows gives NaN if not
    """

    bits: int
    exponent: int
    fraction: int
    numpy: np.dtype
    nan: int = 0
    infinite: bool = True

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def bias(self) -> int:
        """What is added to an exponent to store it."""
        return (1 << self.exponent - 1) - 1

    @property
    def largest(self) -> int:
        """FP32 word of the largest finite number."""
        # Without infinities the highest exponent is one like the others, but for a single NaN.
        exponent = (1 << self.exponent) - 1 - self.infinite - self.bias
        fraction = (1 << self.fraction) - 1 - (not self.infinite)
        return (exponent + 127) << 23 | fraction << 23 - self.fraction


FORMATS: dict[DType, Format] = {
    DType.FP32: Format(32, 8, 23, np.dtype(np.float32), nan=0x7FC00000),
    DType.BF16: Format(16, 8, 7, np.dtype(ml_dtypes.bfloat16), nan=0x7FC0),
    DType.FP16: Format(16, 5, 10, np.dtype(np.float16), nan=0x7E00),
    DType.FP8_E4M3: Format(8, 4, 3, np.dtype(ml_dtypes.float8_e4m3fn), nan=0x7F, infinite=False),
    DType.FP8_E5M2: Format(8, 5, 2, np.dtype(ml_dtypes.float8_e5m2), nan=0x7E),
    DType.INT32: Format(32, 0, 0, np.dtype(np.int32)),
    DType.INT8: Format(8, 0, 0, np.dtype(np.int8)),
    DType.UINT32: Format(32, 0, 0, np.dtype(np.uint32)),
}

#: The one NaN every engine produces: quiet, positive, payload zero.
CANONICAL_NAN = FORMATS[DType.FP32].nan
INFINITY = 0x7F800000  #: FP32 word
ONE = 0x3F800000  #: FP32 word

#: Floating-point types narrower than FP32.
NARROW_FLOATS = (DType.BF16, DType.FP16, DType.FP8_E4M3, DType.FP8_E5M2)
#: Those of 8 bits, of which a core with an `fp8_rate` of 2 multiplies pairs.
FP8_TYPES = (DType.FP8_E4M3, DType.FP8_E5M2)
#: All floating-point types.
FLOATS = (DType.FP32, *NARROW_FLOATS)
INTEGERS = (DType.INT32, DType.UINT32, DType.INT8)
#: Types that fill a word: those the vector engine computes in.
WORDS = (DType.FP32, DType.INT32, DType.UINT32)


def dtype_of(dtype: np.dtype | type) -> DType:
    """Returns the type of a numpy dtype; raises TypeError for one the chip does not have."""
    wanted = np.dtype(dtype)
    for name, fmt in FORMATS.items():
        if fmt.numpy == wanted:
            return name
    raise TypeError(f"the chip has no type for numpy {wanted.name}")
