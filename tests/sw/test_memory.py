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


@given(
    align=st.sampled_from([1, 8]),
    calls=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)), max_size=30),
)
def test_a_block_at_an_address(align: int, calls: list[tuple[int, int]]) -> None:
    """Given exactly if all of it is free."""
    memory = FreeList(64, align=align)
    free = set(range(64))
    for base, size in calls:
        base = base // align * align
        wanted = set(range(base, base + -(-size // align) * align))
        assert memory.take(base, size) == (wanted <= free)
        if wanted <= free:
            free -= wanted
            if base % 3 == 0:
                memory.free(base)
                free |= wanted
        assert memory.free_units == len(free)
        runs = "".join(".x"[unit not in free] for unit in range(64)).split("x")
        assert memory.largest == max(map(len, runs))


def test_double_free() -> None:
    memory = FreeList(8)
    base = memory.allocate(4)
    assert base == 0
    memory.free(base)
    with pytest.raises(KeyError):
        memory.free(base)
