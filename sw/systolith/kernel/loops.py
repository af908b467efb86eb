"""Loops that stay loops: indices, and the registers that addresses step with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from systolith_hdl.isa import INDEX_REGISTERS

from .source import refuse


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A loop of a kernel.

    Parameters
    ----------
    name : shown in messages
    count : iterations, at most
    """

    name: str
    count: int


class Affine:
    """An integer that is known up to iteration numbers: ``const + sum(steps[loop] * iteration)``.

    Made by `KernelBuilder.loop` and by sums, differences and products with integers.
    """

    def __init__(self, const: int, steps: Mapping[Loop, int]) -> None:
        self.const = const
        self.steps = {loop: step for loop, step in steps.items() if step}

    @classmethod
    def of(cls, value: Any, what: str) -> Affine:
        """An integer or index as an `Affine`; anything else is refused."""
        if isinstance(value, Affine):
            return value
        if isinstance(value, int | np.integer):
            return cls(int(value), {})
        refuse(f"{what} must be an integer or made of loop indices, not {value!r}")

    @property
    def span(self) -> tuple[int, int]:
        """Lowest and highest value over all iterations."""
        reaches = [step * (loop.count - 1) for loop, step in self.steps.items()]
        return (
            self.const + sum(min(0, reach) for reach in reaches),
            self.const + sum(max(0, reach) for reach in reaches),
        )

    def __add__(self, other: Any) -> Affine:
        if not isinstance(other, Affine | int | np.integer):
            return NotImplemented
        other = Affine.of(other, "a term")
        steps = dict(self.steps)
        for loop, step in other.steps.items():
            steps[loop] = steps.get(loop, 0) + step
        return Affine(self.const + other.const, steps)

    def __mul__(self, factor: Any) -> Affine:
        if not isinstance(factor, int | np.integer):
            return NotImplemented
        steps = {loop: step * int(factor) for loop, step in self.steps.items()}
        return Affine(self.const * int(factor), steps)

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Any) -> Affine:
        return self + -other

    def __rsub__(self, other: Any) -> Affine:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __bool__(self) -> bool:
        refuse(f"{self} differs from one iteration to the next: Python cannot branch on it")

    def _compared(self, other: object) -> bool:
        refuse(f"{self} differs from one iteration to the next: Python cannot compare it")

    __lt__ = __le__ = __gt__ = __ge__ = _compared

    def __index__(self) -> int:
        refuse(f"{self} differs from one iteration to the next: it is no plain integer")

    def __str__(self) -> str:
        terms = [f"{step}*{loop.name}" for loop, step in self.steps.items()]
        return " + ".join([*terms, str(self.const)])


class Registers:
    """The index registers of one engine while loops are open.

    A register holds a step for each loop; it is shared by all addresses that step alike in the
    loops that are open where they are used.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._steps: list[dict[Loop, int]] = []

    def number(self, steps: Mapping[Loop, int], open_loops: Sequence[Loop]) -> int:
        """The register, from 1, that steps like that in the open loops."""
        wanted = {loop: steps.get(loop, 0) for loop in open_loops}
        for number, found in enumerate(self._steps, 1):
            if all(found.get(loop, step) == step for loop, step in wanted.items()):
                found.update(wanted)
                return number
        if len(self._steps) == INDEX_REGISTERS:
            refuse(
                f"the addresses of engine {self._engine} step in more than {INDEX_REGISTERS} "
                "different ways in this loop, and it has no more index registers: let operands "
                "step alike, or use several loops"
            )
        self._steps.append(wanted)
        return len(self._steps)

    def steps(self, loop: Loop) -> dict[str, int]:
        """Fields of the NEXT of a loop."""
        return {f"steps.{i}": found.get(loop, 0) for i, found in enumerate(self._steps)}

    def clear(self) -> None:
        """No loop is open."""
        self._steps.clear()
