"""Floating-point cells against numpy and Berkeley SoftFloat."""

from systolith_tb.bench_arith import ArithBench
from systolith_tb.runner import run_bench


def test_cells() -> None:
    assert run_bench(ArithBench(), "arith", "systolith_tb.bench_arith") == 1
