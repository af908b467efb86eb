"""The bench of sequencers and semaphores."""

import pytest
from systolith_tb.configs import CONFIGS
from systolith_tb.runner import run_bench
from systolith_tb.sequencing import Sequencing


@pytest.mark.parametrize("config", ["nano", "nano-fp8", "tiny"])
def test_sequencers(config: str) -> None:
    ran = run_bench(
        Sequencing(CONFIGS[config]),
        f"sequencing_{config}".replace("-", "_"),
        "systolith_tb.bench_sequencer",
        env={"SYSTOLITH_CONFIG": config},
    )
    assert ran == (9 if CONFIGS[config].loops else 5)
