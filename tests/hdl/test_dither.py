"""Random words of stochastic rounding in gates, against golden."""

import pytest
from systolith_hdl.arith import Dither, DitherStream
from systolith_tb.bench_dither import LANES
from systolith_tb.runner import run_bench


@pytest.mark.parametrize(
    ("kind", "name", "cases"),
    [
        (Dither, "dither", ("every_cycle", "now_and_then")),
        (DitherStream, "dither_stream", ("stream_at_full_rate", "stream_with_stalls")),
    ],
)
def test_dither(kind: type[Dither] | type[DitherStream], name: str, cases: tuple[str, ...]) -> None:
    ran = run_bench(
        kind(lanes=LANES),
        f"{name}_{LANES}",
        "systolith_tb.bench_dither",
        testcase=",".join(cases),
    )
    assert ran == len(cases)
