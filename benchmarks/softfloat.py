"""The floating-point cells in gates against Berkeley SoftFloat on millions of cases.

Adder, multiplier and MAC, each Verilated alone, each on classes of cases made to be hard: ties,
their neighbours, subnormals, cancellation, overflow, special values. Writes docs/softfloat.md and
softfloat.json; run it as ``make nightly``. Exits with 1 if a single result differs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from systolith_hdl.emit import to_verilog
from systolith_tb.cells import Cells, run_cells
from systolith_tb.softfloat import OPERATIONS, compare

DOCS = Path(__file__).resolve().parent.parent / "docs"
#: cases a process makes at once
BATCH = 100_000
OBSERVED = ("NaN", "overflow", "subnormal", "zero", "tie", "cancelled")

Job = tuple[str, str, int, int]


def jobs(cases: int, seed: int) -> list[Job]:
    """(operation, class, seed, cases), at least `cases` in all of each operation."""
    found: list[Job] = []
    for name, operation in OPERATIONS.items():
        batches = -(-cases // (len(operation.classes) * BATCH))
        for kind, batch in itertools.product(operation.classes, range(batches)):
            found.append((name, kind, seed * 1_000_003 + batch, BATCH))
    return found


def _run(job: Job) -> tuple[Job, dict[str, int]]:
    return job, compare(*job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000_000, help="of each operation")
    parser.add_argument("--seed", type=int, default=None, help="default: drawn")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    seed = options.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    console = Console()
    console.print(f"seed {seed}")
    run_cells(np.zeros((1, 6), np.uint32))  # builds the library, before there are processes
    counts: dict[str, dict[str, dict[str, int]]] = {
        name: {kind: {} for kind in operation.classes} for name, operation in OPERATIONS.items()
    }
    began = time.perf_counter()
    todo = jobs(options.cases, seed)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, context) as pool:
        for (name, kind, _, _), found in track(
            pool.map(_run, todo), "comparing", total=len(todo), console=console
        ):
            row = counts[name][kind]
            for key, value in found.items():
                row[key] = row.get(key, 0) + value
    seconds = time.perf_counter() - began

    totals = {
        name: {key: sum(row[key] for row in rows.values()) for key in ("cases", "mismatches")}
        for name, rows in counts.items()
    }
    version = importlib.metadata.version("softfloatpy")
    lines = [
        "# Floating-point cells against SoftFloat",
        "",
        "Made by `make nightly`: the adder, multiplier and MAC of the chip, in gates, against",
        f"Berkeley SoftFloat (`softfloatpy` {version}; `f32_add`,",
        "`f32_mul`, and `f32_mul_add` with operands of the narrow types), every bit compared, NaNs",
        "made canonical. Behind the mismatches stands what results there were: a tie is an exact",
        "result halfway between two FP32 numbers, a cancelled one is 2^10 below its larger term.",
        "",
    ]
    for name, rows in counts.items():
        total = totals[name]
        lines += [
            f"**{name}**: {total['cases']:,} cases, {total['mismatches']:,} mismatches",
            "",
            "| class | cases | mismatches | " + " | ".join(OBSERVED) + " |",
            "|---" * (3 + len(OBSERVED)) + "|",
        ]
        table = Table(name, "cases", "mismatches")
        for kind, row in rows.items():
            cells = [f"{row[key]:,}" for key in ("cases", "mismatches", *OBSERVED)]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
            table.add_row(kind, *cells[:2])
        lines.append("")
        console.print(table)
    (DOCS / "softfloat.md").write_text("\n".join(lines))
    report = {
        "seed": seed,
        "softfloatpy": version,
        "cells_sha256": hashlib.sha256(to_verilog(Cells(), "cells").encode()).hexdigest(),
        "totals": totals,
        "classes": counts,
    }
    (DOCS / "softfloat.json").write_text(json.dumps(report, indent=1) + "\n")
    cases = sum(total["cases"] for total in totals.values())
    wrong = sum(total["mismatches"] for total in totals.values())
    console.print(
        f"{cases:,} cases in {seconds:.0f} s ({cases / seconds / 1e6:.2f} million a second), "
        f"{wrong:,} mismatches"
    )
    sys.exit(wrong != 0)


if __name__ == "__main__":
    main()
