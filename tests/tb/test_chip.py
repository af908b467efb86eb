"""The bench of the whole chip."""

from systolith_hdl.config import get_config
from systolith_hdl.core import chip_verilog
from systolith_tb.runner import run_bench


def test_chip() -> None:
    config = get_config("nano")
    ran = run_bench(chip_verilog(config), "chip", "systolith_tb.bench_chip")
    assert ran == 4
