"""Random words of stochastic rounding in gates, against golden."""

from systolith_hdl.arith import Dither
from systolith_tb.bench_dither import LANES
from systolith_tb.runner import run_bench


def test_dither() -> None:
    ran = run_bench(Dither(lanes=LANES), f"dither_{LANES}", "systolith_tb.bench_dither")
    assert ran == 2
