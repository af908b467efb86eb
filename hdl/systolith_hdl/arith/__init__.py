"""Floating-point cells: IEEE-754 binary32 with one rounding per operation, subnormals kept."""

from .dither import DITHER_LATENCY, Dither, engine_key
from .fp32 import FP32_LATENCY, Fp32Add, Fp32Mul
from .narrow import PackNarrow, RoundNarrow, WidenNarrow
from .rounding import leading_zeros, pack_fp32

__all__ = [
    "DITHER_LATENCY",
    "FP32_LATENCY",
    "Dither",
    "Fp32Add",
    "Fp32Mul",
    "PackNarrow",
    "RoundNarrow",
    "WidenNarrow",
    "engine_key",
    "leading_zeros",
    "pack_fp32",
]
