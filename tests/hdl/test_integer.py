"""Cells between integers and FP32 in gates, against numpy."""

from systolith_tb.bench_integer import IntegerBench
from systolith_tb.runner import run_bench


def test_integer() -> None:
    assert run_bench(IntegerBench(), "integer_bench", "systolith_tb.bench_integer") == 2
