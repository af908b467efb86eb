"""Scalar engine: the lane and the engine against the golden model."""

from systolith_tb.bench_scalar import LaneBench
from systolith_tb.runner import run_bench


def test_lane() -> None:
    bench = LaneBench()
    assert run_bench(bench, "scalar_lanes", "systolith_tb.bench_scalar", testcase="lane") == 1
