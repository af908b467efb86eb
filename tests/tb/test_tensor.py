"""MAC, systolic array and tensor engine with PSUM against numpy."""

import pytest
from systolith_hdl.config import get_config
from systolith_tb.bench_array import ArrayBench
from systolith_tb.bench_mac import MacBench
from systolith_tb.bench_tensor import TensorBench
from systolith_tb.runner import run_bench


def test_mac() -> None:
    assert run_bench(MacBench(), "mac_bench", "systolith_tb.bench_mac") == 1


@pytest.mark.parametrize("config", ["nano"])
def test_array(config: str) -> None:
    ran = run_bench(
        ArrayBench(get_config(config)),
        f"array_{config}",
        "systolith_tb.bench_array",
        env={"SYSTOLITH_CONFIG": config},
    )
    assert ran == 4


@pytest.mark.parametrize("config", ["nano"])
def test_engine(config: str) -> None:
    ran = run_bench(
        TensorBench(get_config(config)),
        f"tensor_{config}",
        "systolith_tb.bench_tensor",
        env={"SYSTOLITH_CONFIG": config},
    )
    assert ran == 7
