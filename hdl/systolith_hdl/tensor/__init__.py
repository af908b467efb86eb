"""The tensor engine and its systolic array."""

from .array import SystolicArray, array_latency
from .engine import TensorEngine, matmul_latency
from .mac import ADD_LATENCY, MUL_LATENCY, Mac

__all__ = [
    "ADD_LATENCY",
    "MUL_LATENCY",
    "Mac",
    "SystolicArray",
    "TensorEngine",
    "array_latency",
    "matmul_latency",
]
