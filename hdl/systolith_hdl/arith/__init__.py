"""Arithmetic cells: IEEE-754 binary32 with one rounding per operation, subnormals kept, and what
leads from it to narrow floats and integers and back."""

from .convert import CONVERT_LATENCY, ConvertWord
from .dither import DITHER_LATENCY, Dither, DitherStream, dither_of, engine_key
from .fp32 import FP32_LATENCY, SHORT_LATENCY, Fp32Add, Fp32Mul, MulMode
from .integer import Fp32ToInt32, WidenInt8
from .narrow import PackNarrow, RoundNarrow, WidenNarrow, rounded
from .rounding import leading_zeros, pack_fp32

__all__ = [
    "CONVERT_LATENCY",
    "DITHER_LATENCY",
    "FP32_LATENCY",
    "SHORT_LATENCY",
    "ConvertWord",
    "Dither",
    "DitherStream",
    "Fp32Add",
    "Fp32Mul",
    "Fp32ToInt32",
    "MulMode",
    "PackNarrow",
    "RoundNarrow",
    "WidenInt8",
    "WidenNarrow",
    "dither_of",
    "engine_key",
    "leading_zeros",
    "pack_fp32",
    "rounded",
]
