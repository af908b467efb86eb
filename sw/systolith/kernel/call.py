"""One call of a kernel function, as the compiler keeps it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .function import Kernel

#: shape and type of an array
Spec = tuple[tuple[int, ...], np.dtype]


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel function with everything that decides what it does.

    Parameters
    ----------
    kernel : the function
    static : its keyword arguments, sorted
    arguments, results : of its arrays
    """

    kernel: Kernel
    static: tuple[tuple[str, Any], ...]
    arguments: tuple[Spec, ...]
    results: tuple[Spec, ...]

    def __str__(self) -> str:
        static = "".join(f", {name}={value!r}" for name, value in self.static)
        return f"{self.kernel.name}{static}"
