"""The kernel language: builds programs instruction by instruction.

`KernelBuilder` builds a program; ``@systolith.kernel`` makes a function of `systolith.jit` code.
"""

import sys
import types
from typing import Any

from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Function, Rounding, RowSums, Space

from .builder import KernelBuilder
from .tabulate import Table, table
from .tensors import DramTensor, Tile, View

__all__ = [
    "AluOp",
    "DType",
    "DramTensor",
    "Function",
    "KernelBuilder",
    "Rounding",
    "RowSums",
    "Space",
    "Table",
    "Tile",
    "View",
    "table",
]


class _Package(types.ModuleType):
    """Makes the package itself the decorator: ``@systolith.kernel``."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `function.kernel`."""
        # JAX is imported when it is needed: benches and builders do without.
        from .function import kernel

        return kernel(*args, **options)


sys.modules[__name__].__class__ = _Package
