"""Benches of the banked memory behind SBUF and PSUM."""

import pytest
from systolith_hdl.banked import BankedMemory
from systolith_hdl.config import get_config
from systolith_tb.runner import run_bench


@pytest.mark.parametrize("config", ["nano", "tiny"])
@pytest.mark.parametrize("priority", [False, True])
def test_banked_memory(priority: bool, config: str) -> None:
    """Of eight banks and of four."""
    memory = BankedMemory(get_config(config), depth=128, reads=4, writes=3, priority=priority)
    ran = run_bench(
        memory,
        f"banked{int(priority)}_{config}",
        "systolith_tb.bench_banked",
        env={"SYSTOLITH_CONFIG": config, "SYSTOLITH_BENCH_PRIORITY": str(int(priority))},
    )
    assert ran == 3
