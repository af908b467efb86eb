"""Scalar engine: the lane and the engine against the golden model."""

from systolith_hdl.scalar.engine import ScalarEngine
from systolith_tb.bench_scalar import CONFIG, LaneBench
from systolith_tb.runner import run_bench


def test_lane() -> None:
    bench = LaneBench()
    assert run_bench(bench, "scalar_lanes", "systolith_tb.bench_scalar", testcase="lane") == 1


def test_engine() -> None:
    cases = ("engine_free", "engine_idle", "engine_backpressure", "engine_stalls")
    ran = run_bench(
        ScalarEngine(CONFIG, number=CONFIG.engines.index("scalar")),
        "scalar_engine",
        "systolith_tb.bench_scalar",
        testcase=",".join(cases),
    )
    assert ran == len(cases)
