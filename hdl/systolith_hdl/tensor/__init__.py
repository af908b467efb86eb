"""The tensor engine and its systolic array."""

from .array import SystolicArray, array_latency, mul_latency
from .engine import TensorEngine, matmul_latency
from .mac import ADD_LATENCY, MUL_LATENCY, Mac
from .mac_fp8x2 import PAIR_MUL_LATENCY, MacFp8x2

__all__ = [
    "ADD_LATENCY",
    "MUL_LATENCY",
    "PAIR_MUL_LATENCY",
    "Mac",
    "MacFp8x2",
    "SystolicArray",
    "TensorEngine",
    "array_latency",
    "matmul_latency",
    "mul_latency",
]
