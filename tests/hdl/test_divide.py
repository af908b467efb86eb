"""The divider in gates, against the golden model."""

from systolith_tb.bench_divide import DivideBench
from systolith_tb.runner import run_bench


def test_divide() -> None:
    assert run_bench(DivideBench(), "divide_bench", "systolith_tb.bench_divide") == 1
