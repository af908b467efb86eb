"""Speed of the simulated chip: builds, cycles and MACs per second, a GEMM at N = 16 on one core.

Every product is held against the golden formula's bits elsewhere (gemm.py); here only time counts.
Simulation is measured in processor time, which other work on the machine disturbs less than the
clock on the wall; it still varies, so each figure is the median of several runs, with the range
beside it. Writes
docs/simulation.md and docs/simulation.json; part of ``make bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import systolith
from rich.console import Console
from systolith_hdl.config import get_config

DOCS = Path(__file__).resolve().parent.parent / "docs"
RUNS = 9
SIZE = 256
#: device -> (M MAC/s, build seconds): targets
TARGETS = {"rtl": (15, 90), "rtl-fast": (150, 40)}
#: peers under the same Verilator on another machine of the same kind: M MAC/s
PEERS = {"Gemmini, int8": 12.0, "RedMulE, FP16": 2.4}


def build_seconds(kind: str, config: str) -> float:
    """Seconds from nothing to a simulator that answers, with an empty cache."""
    before = os.environ.get("SYSTOLITH_CACHE")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SYSTOLITH_CACHE"] = cache
        try:
            began = time.perf_counter()
            systolith.Device(kind, config=config).close()
            return time.perf_counter() - began
        finally:
            del os.environ["SYSTOLITH_CACHE"]
            if before is not None:
                os.environ["SYSTOLITH_CACHE"] = before


def speed(kind: str, config: str) -> tuple[int, int, list[float]]:
    """Cycles and MACs of one product, and the processor seconds of each run in the simulator."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((SIZE, SIZE)).astype(ml_dtypes.bfloat16) for _ in range(2))

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return a @ b

    with systolith.Device(kind, config=config) as device:
        product = systolith.jit(multiply, device=device)
        expected = np.asarray(product(a, b))
        backend = device.driver.backend
        run, seconds = backend.run, []

        def timed(max_cycles: int | None) -> bool:
            began = time.process_time()
            ended = run(max_cycles)
            seconds.append(time.process_time() - began)
            return ended

        backend.run = timed
        for _ in range(RUNS):
            assert np.asarray(product(a, b)).tobytes() == expected.tobytes()
        stats = product.stats()
        return int(stats["cycles"]), int(stats["macs"]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="medium")
    options = parser.parse_args()
    console = Console()
    lanes = get_config(options.config).lanes
    rows = {}
    for kind, (target, build_target) in TARGETS.items():
        console.print(f"[dim]building {kind}[/dim]")
        build = build_seconds(kind, options.config)
        cycles, macs, seconds = speed(kind, options.config)
        rates = sorted(cycles / s / 1e3 for s in seconds)
        rows[kind] = {
            "build_seconds": round(build, 1),
            "build_target": build_target,
            "thousand_cycles_per_second": [
                round(rate, 1) for rate in (rates[0], statistics.median(rates), rates[-1])
            ],
            "million_macs_per_second": round(macs / statistics.median(seconds) / 1e6, 1),
            "target": target,
        }
    lines = [
        "# Simulation speed",
        "",
        f"Made by `make bench`: {SIZE} cubed of BF16, config `{options.config}` (N = {lanes}),",
        "from DRAM to DRAM, the whole chip on one core, in processor time; median of "
        f"{RUNS} runs, their range in brackets.",
        "Builds from an empty cache, two jobs, in wall time. "
        f"{platform.machine()}, {os.cpu_count()} cores that",
        "may be shared with other work: figures of one page compare with each other, less with",
        "those of another day.",
        "",
        "| device | thousand cycles/s | M MAC/s | target | build, s | target |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        low, middle, high = row["thousand_cycles_per_second"]
        met = "" if row["million_macs_per_second"] >= row["target"] else " (missed)"
        built = "" if row["build_seconds"] <= row["build_target"] else " (missed)"
        lines.append(
            f"| `{kind}` | {middle} ({low} to {high}) | {row['million_macs_per_second']} | "
            f"{row['target']}{met} | {row['build_seconds']} | {row['build_target']}{built} |"
        )
    lines += [
        "",
        "Open peers, their own RTL under the same Verilator: "
        + ", ".join(f"{peer} {rate} M MAC/s" for peer, rate in PEERS.items())
        + ".",
    ]
    console.print("\n".join(lines))
    (DOCS / "simulation.md").write_text("\n".join(lines) + "\n")
    (DOCS / "simulation.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
