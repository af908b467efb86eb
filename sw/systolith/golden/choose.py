"""Affine numbers, and the conditions by which the vector engine's selections choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from systolith_hdl.isa import AluOp

from .arithmetic import Words, floats

_HOLDS: dict[AluOp, Callable[[np.ndarray], np.ndarray]] = {
    AluOp.EQ: lambda x: x == 0,
    AluOp.NE: lambda x: x != 0,
    AluOp.LT: lambda x: x < 0,
    AluOp.LE: lambda x: x <= 0,
    AluOp.GT: lambda x: x > 0,
    AluOp.GE: lambda x: x >= 0,
}


def compares(operation: AluOp, words: Words) -> np.ndarray:
    """Where FP32 words compare with zero."""
    return _HOLDS[operation](floats(words))


def affine(fields: dict[str, int], counts: Sequence[int]) -> np.ndarray:
    """Affine numbers of an instruction: int32 [lanes, *counts]."""
    steps = [fields["lane_step"], *(fields[f"steps.{d}"] for d in range(4))]
    numbers = np.full((), fields["base"], np.int64)
    for step, count in zip(steps, (fields["lanes"], *counts), strict=True):
        numbers = numbers[..., None] + np.arange(count) * step
    return numbers.astype(np.int32)  # modulo 2**32


def affine_compares(operation: AluOp, numbers: np.ndarray) -> np.ndarray:
    """Where integers compare with zero."""
    return _HOLDS[operation](numbers)


def within(bounds: Words, indices: int) -> np.ndarray:
    """Which of so many indices lie in each partition's range, from bounds [lanes, 2]: bool
    [lanes, indices]."""
    low, high = bounds.view(np.int32)[..., None].swapaxes(0, 1)
    index = np.arange(indices)
    return (low <= index) & (index < high)
