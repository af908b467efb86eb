"""What Yosys makes of blocks of nano, in the FPGA's cells, under the benches of the sources; and of
the whole chip, training."""

import re

import jax
import numpy as np
import systolith
from amaranth.lib import wiring
from systolith.train import digits
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
    return run_bench(text, name, f"systolith_tb.{bench}", **options)


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
    assert run_gates(engine, "vector_gates", "bench_vector", cell="MULT18X18D") == 6


def test_whole_chip_trains() -> None:
    """A step of the digits training: parameters and loss those of golden, cycles those of `rtl`."""
    data, batch = digits.load(), 32
    results, cycles = {}, {}
    for kind in ("golden", "rtl", "netlist"):
        with systolith.Device(kind, config="nano") as device:
            step = systolith.jit(digits.make_step(1e-3), device=device)
            images, labels = data.train_images[:batch], data.train_labels[:batch]
            state, loss = step(digits.initial_state(0, 0.15), images, labels)
            results[kind] = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state, loss))]
            cycles[kind] = step.stats().get("cycles")
    assert results["netlist"] == results["golden"] == results["rtl"]
    assert cycles["netlist"] == cycles["rtl"] > 0
