"""Random words of stochastic rounding in gates, against golden."""

from systolith_hdl.arith import Dither, DitherStream
from systolith_tb.bench_dither import LANES
from systolith_tb.runner import run_bench


def test_dither() -> None:
    ran = run_bench(
        Dither(lanes=LANES),
        f"dither_{LANES}",
        "systolith_tb.bench_dither",
        testcase="every_cycle,now_and_then",
    )
    assert ran == 2


def test_dither_stream() -> None:
    ran = run_bench(
        DitherStream(lanes=LANES),
        f"dither_stream_{LANES}",
        "systolith_tb.bench_dither",
        testcase="stream_at_full_rate,stream_with_stalls",
    )
    assert ran == 2
