"""A first-fit free list over a range of addresses: SBUF and PSUM words, DRAM bytes."""

from __future__ import annotations

import bisect


class FreeList:
    """Hands out and takes back blocks of ``[0, size)``.

    Freed blocks join their free neighbours. The lowest block that is large enough is used, so
    the same sequence of calls gives the same addresses.

    Parameters
    ----------
    size : units in all
    align : bases are multiples of it, and sizes are rounded up to it
    """

    def __init__(self, size: int, *, align: int = 1) -> None:
        self.size = size
        self.align = align
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (base, size), sorted
        self._used: dict[int, int] = {}

    def _round(self, size: int) -> int:
        return -(-size // self.align) * self.align

    @property
    def free_units(self) -> int:
        """Units not handed out, in all blocks."""
        return sum(size for _, size in self._free)

    @property
    def largest(self) -> int:
        """Size of the largest free block."""
        return max((size for _, size in self._free), default=0)

    def allocate(self, size: int) -> int | None:
        """Returns the base of a block of `size` units (1 or more), or None if none is left."""
        wanted = self._round(size)
        for i, (base, available) in enumerate(self._free):
            if available >= wanted:
                if available == wanted:
                    del self._free[i]
                else:
                    self._free[i] = (base + wanted, available - wanted)
                self._used[base] = wanted
                return base
        return None

    def take(self, base: int, size: int) -> bool:
        """Hands out the block of `size` units at `base`, a multiple of the alignment; False if any
        of it is not free."""
        wanted = self._round(size)
        for i, (start, available) in enumerate(self._free):
            if start <= base and base + wanted <= start + available:
                left = [(start, base - start), (base + wanted, start + available - base - wanted)]
                self._free[i : i + 1] = [block for block in left if block[1]]
                self._used[base] = wanted
                return True
        return False

    def free(self, base: int) -> None:
        """Takes back the block that starts at `base`; raises KeyError if there is none."""
        size = self._used.pop(base)
        i = bisect.bisect(self._free, (base, 0))
        if i < len(self._free) and base + size == self._free[i][0]:
            size += self._free[i][1]
            del self._free[i]
        if i > 0 and sum(self._free[i - 1]) == base:
            base, size = self._free[i - 1][0], self._free[i - 1][1] + size
            i -= 1
            del self._free[i]
        self._free.insert(i, (base, size))
