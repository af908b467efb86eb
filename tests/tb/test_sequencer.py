"""The bench of sequencers and semaphores."""

from systolith_hdl.config import get_config
from systolith_tb.runner import run_bench
from systolith_tb.sequencing import Sequencing


def test_sequencers() -> None:
    ran = run_bench(Sequencing(get_config("nano")), "sequencing", "systolith_tb.bench_sequencer")
    assert ran == 4
