"""What Yosys makes of blocks of nano, in the FPGA's cells, under the benches of the sources."""

from systolith_hdl.banked import BankedMemory
from systolith_hdl.config import get_config
from systolith_hdl.vector.engine import VectorEngine
from systolith_synth.gatesim import netlist
from systolith_tb.bench_mac import MacBench
from systolith_tb.runner import run_bench


def test_mac() -> None:
    text = netlist(MacBench(), "mac_gates")
    assert "MULT18X18D" in text and "CCU2C" in text
    env = {"SYSTOLITH_VECTORS": "20000"}
    assert run_bench(text, "mac_gates", "systolith_tb.bench_mac", env=env) == 1


def test_scratchpad() -> None:
    memory = BankedMemory(get_config("nano"), depth=128, reads=4, writes=3)
    text = netlist(memory, "banked_gates")
    assert "DP16KD" in text
    assert run_bench(text, "banked_gates", "systolith_tb.bench_banked") == 3


def test_vector_lanes() -> None:
    config = get_config("nano")
    engine = VectorEngine(config, number=config.engines.index("vector"))
    text = netlist(engine, "vector_gates")
    assert run_bench(text, "vector_gates", "systolith_tb.bench_vector") == 5
