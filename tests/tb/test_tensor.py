"""MAC, systolic array and tensor engine with PSUM against numpy."""

import pytest
from systolith_tb.bench_array import ArrayBench
from systolith_tb.bench_mac import MacBench
from systolith_tb.bench_mac_fp8x2 import MacFp8x2Bench
from systolith_tb.bench_tensor import TensorBench
from systolith_tb.configs import CONFIGS
from systolith_tb.runner import run_bench


def test_mac() -> None:
    assert run_bench(MacBench(), "mac_bench", "systolith_tb.bench_mac") == 1


def test_mac_fp8x2() -> None:
    assert run_bench(MacFp8x2Bench(), "mac_fp8x2_bench", "systolith_tb.bench_mac_fp8x2") == 3


@pytest.mark.parametrize("config", ["nano", "nano-fp8"])
def test_array(config: str) -> None:
    ran = run_bench(
        ArrayBench(CONFIGS[config]),
        f"array_{config}".replace("-", "_"),
        "systolith_tb.bench_array",
        env={"SYSTOLITH_CONFIG": config},
    )
    assert ran == 4


@pytest.mark.parametrize("config", ["nano", "nano-fp8"])
def test_engine(config: str) -> None:
    ran = run_bench(
        TensorBench(CONFIGS[config]),
        f"tensor_{config}".replace("-", "_"),
        "systolith_tb.bench_tensor",
        env={"SYSTOLITH_CONFIG": config},
    )
    assert ran == 7
