"""What Yosys makes of blocks of nano, in the FPGA's cells, under the benches of the sources."""

import re

from amaranth.lib import wiring
from systolith_hdl.banked import BankedMemory
from systolith_hdl.config import get_config
from systolith_hdl.vector.engine import VectorEngine
from systolith_synth.gatesim import netlist
from systolith_tb.bench_mac import MacBench
from systolith_tb.runner import run_bench


def run_gates(component: wiring.Component, name: str, bench: str, *, cell: str, **options) -> int:
    """Runs a bench on the netlist of a component, which must have the cell."""
    text = netlist(component, name)
    assert re.search(rf"^ +{cell} ", text, re.MULTILINE)
    units = re.findall(r"^module (u_\w+)", text, re.MULTILINE)
    return run_bench(text, name, f"systolith_tb.{bench}", keep=units, **options)


def test_mac() -> None:
    env = {"SYSTOLITH_VECTORS": "20000"}
    assert run_gates(MacBench(), "mac_gates", "bench_mac", cell="MULT18X18D", env=env) == 1


def test_scratchpad() -> None:
    config = get_config("nano")
    memory = BankedMemory(config, depth=config.sbuf_depth, reads=4, writes=3)
    env = {"SYSTOLITH_CONFIG": "nano", "SYSTOLITH_BENCH_DEPTH": str(config.sbuf_depth)}
    assert run_gates(memory, "banked_gates", "bench_banked", cell="DP16KD", env=env) == 3


def test_vector_lanes() -> None:
    config = get_config("nano")
    engine = VectorEngine(config, number=config.engines.index("vector"))
    assert run_gates(engine, "vector_gates", "bench_vector", cell="MULT18X18D") == 5
