"""The bench of the whole chip."""

from systolith_hdl.config import get_config
from systolith_hdl.core import Chip
from systolith_tb.runner import run_bench


def test_chip() -> None:
    assert run_bench(Chip(get_config("nano")), "chip", "systolith_tb.bench_chip") == 4
