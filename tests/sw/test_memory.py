"""The free list against a bitmap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from systolith.memory import FreeList


@given(
    align=st.sampled_from([1, 8]),
    calls=st.lists(st.integers(-8, 20).filter(bool), max_size=60),
)
def test_blocks_never_overlap_and_nothing_is_lost(align: int, calls: list[int]) -> None:
    """A positive call allocates so many units, a negative one frees that live block."""
    memory = FreeList(64, align=align)
    live: dict[int, int] = {}
    for call in calls:
        if call > 0:
            rounded = -(-call // align) * align
            largest = memory.largest
            base = memory.allocate(call)
            assert (base is None) == (largest < rounded)
            if base is not None:
                assert base % align == 0
                live[base] = rounded
        elif live:
            base = sorted(live)[-call % len(live)]
            memory.free(base)
            del live[base]
        used = [unit for base, size in live.items() for unit in range(base, base + size)]
        assert len(set(used)) == len(used)
        assert memory.free_units == 64 - len(used)
        runs = "".join("x" if unit in set(used) else "." for unit in range(64)).split("x")
        assert memory.largest == max(map(len, runs))
    for base in live:
        memory.free(base)
    assert memory.largest == 64


def test_double_free() -> None:
    memory = FreeList(8)
    base = memory.allocate(4)
    assert base == 0
    memory.free(base)
    with pytest.raises(KeyError):
        memory.free(base)
