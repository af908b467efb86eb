"""Rounding to narrow types, packing and widening in gates, against ml_dtypes, numpy and golden."""

from systolith_hdl.formats import NARROW_FLOATS
from systolith_tb.bench_narrow import NarrowBench
from systolith_tb.runner import run_bench


def test_narrow() -> None:
    ran = run_bench(NarrowBench(), "narrow_bench", "systolith_tb.bench_narrow")
    assert ran == 2 * len(NARROW_FLOATS) + 2
