"""The kernel language: builds programs instruction by instruction."""

from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Function, Rounding, Space

from .builder import KernelBuilder
from .tensors import DramTensor, Tile, View

__all__ = [
    "AluOp",
    "DType",
    "DramTensor",
    "Function",
    "KernelBuilder",
    "Rounding",
    "Space",
    "Tile",
    "View",
]
