"""Engines side by side: what each takes alone, what all take together, and bank conflicts.

Every engine has as much to do as the others, on tiles of its own: matmuls with a load of the
stationary operand each, two-source vector instructions, activations, and a DMA queue each that
loads and stores. Writes docs/engines.md and engines.json; part of ``make bench``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from systolith.kernel import AluOp, DType, KernelBuilder
from systolith.program import Program
from systolith.runtime.backend import open_backend
from systolith.runtime.driver import Counters, Driver
from systolith_hdl.config import get_config
from systolith_hdl.isa import Function

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLUMNS = 128  #: of an instruction
TIMES = 40  #: instructions of each engine
ENGINES = ("tensor", "vector", "scalar", "dma0", "dma1")
LOADER = "dma0"  #: takes all of the bandwidth of DRAM, and so delays the fetch of instructions
TARGET = 5.0  #: percent of cycles with a bank conflict


def program(config: str, engines: Collection[str]) -> Program:
    """A kernel in which these engines work, none waiting for another."""
    nc = KernelBuilder(config, name="+".join(engines))
    lanes = nc.config.lanes
    x = nc.dram.tensor("x", (COLUMNS, lanes), DType.BF16, kind="input")
    y = nc.dram.tensor("y", (COLUMNS, lanes), DType.BF16, kind="output")
    row = 2 * lanes
    weights, moving = nc.sbuf.tile(lanes), nc.sbuf.tile(COLUMNS)
    sums = nc.psum.tile(2 * COLUMNS).view((2, COLUMNS))
    first, second, third = (nc.sbuf.tile(COLUMNS).view() for _ in range(3))
    before, after = nc.sbuf.tile(COLUMNS).view(), nc.sbuf.tile(COLUMNS).view()
    loaded, stored = nc.sbuf.tile(COLUMNS).view(), nc.sbuf.tile(COLUMNS).view()
    for step in range(TIMES):
        if "tensor" in engines:
            nc.tensor.load_stationary(weights.view().astype(DType.BF16))
            nc.tensor.matmul(sums[step % 2], moving.view().astype(DType.BF16))
        if "vector" in engines:
            nc.vector.tensor_tensor(third, first, AluOp.ADD, second, op0=AluOp.MUL, imm0=2.0)
        if "scalar" in engines:
            nc.scalar.activate(after, before, Function.TANH)
        if "dma0" in engines:
            nc.dma.load(loaded, x, 0, (row,), 2, queue=0)
        if "dma1" in engines:
            nc.dma.store(stored, y, 0, (row,), 2, queue=1)
    return nc.finish()


def run(driver: Driver, config: str, engines: Collection[str]) -> Counters:
    """Counters of the program with these engines."""
    loaded = driver.load(program(config, engines))
    counters = driver.run(loaded)
    loaded.unload()
    return counters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="medium")
    parser.add_argument("--device", default="rtl", choices=("rtl", "rtl-fast"))
    options = parser.parse_args()
    console = Console()
    config = get_config(options.config)
    backend = open_backend(options.device, config, dram_bytes=1 << 24, progress=console.print)
    rows = []
    with Driver(backend) as driver:
        together = run(driver, options.config, ENGINES)
        quiet = run(driver, options.config, [e for e in ENGINES if e != LOADER])
        for engine in ENGINES:
            alone = run(driver, options.config, (engine,))
            rows.append(
                {
                    "engine": engine,
                    "alone": alone.busy[engine],
                    "together": together.busy[engine],
                    "without_loads": quiet.busy[engine] if engine != LOADER else None,
                }
            )
    conflicts = {
        name: {"cycles": count, "percent": 100 * count / together.cycles}
        for name, count in together.conflicts.items()
    }
    lines = [
        "# Engines side by side",
        "",
        f"Made by `make bench` (`benchmarks/engines.py`): config `{options.config}`. Each engine",
        f"executes {TIMES} instructions of {COLUMNS} columns on tiles of its own: alone, with all",
        f"others, and with all but `{LOADER}`. That one reads DRAM at its full bandwidth, and the",
        "instructions of all come over the same bus, so the difference is what fetching costs.",
        "Cycles are those in which the engine was executing; the tensor engine's count waiting",
        "with a loaded operand for its matmul.",
        "",
        f"| engine | alone | with all others | ratio | with all but `{LOADER}` | ratio |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['engine']} | {r['alone']:,} | {r['together']:,} "
            f"| {r['together'] / r['alone']:.3f} | "
            + (
                "| |"
                if r["without_loads"] is None
                else f"{r['without_loads']:,} | {r['without_loads'] / r['alone']:.3f} |"
            )
            for r in rows
        ),
        "",
        f"All at once take {together.cycles:,} cycles. Cycles in which a bank was asked for twice,",
        f"so that one request waited (register CONFLICTS; target: at most {TARGET:.0f} %):",
        "",
        "| memory | cycles | of all |",
        "|---|---|---|",
        *(f"| {n} | {c['cycles']:,} | {c['percent']:.1f} % |" for n, c in conflicts.items()),
        "",
    ]
    text = "\n".join(lines)
    console.print(text, markup=False, highlight=False)
    (DOCS / "engines.md").write_text(text)
    report = {"config": options.config, "engines": rows, "conflicts": conflicts,
              "cycles": together.cycles}  # fmt: skip
    (DOCS / "engines.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
