"""Random programs on the gates and in the golden model.

Legal programs must leave the same memories, semaphores and counters, illegal ones the same fault
record, on devices with fast and slow DRAM. What differs is shrunk and written to reports/fuzz.
Writes docs/fuzz.md and fuzz.json; run it as ``make fuzz``. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from systolith.runtime.rtl import build
from systolith_tb.configs import CONFIGS
from systolith_tb.fuzz import Pair, Tally, fuzz

ROOT = Path(__file__).resolve().parent.parent
#: programs a process runs at once
BATCH = 50
#: DRAM latency in cycles, bytes per cycle (None: as the device has)
MEMORIES: tuple[tuple[int, int | None], ...] = ((20, None), (100, None), (1, 64), (7, 3))

Job = tuple[str, int, tuple[int, int | None]]


def _run(job: Job) -> Tally:
    name, seed, (latency, rate) = job
    pair = Pair.of_gates(CONFIGS[name], dram_latency=latency, dram_bytes_per_cycle=rate)
    try:
        return fuzz(pair, range(seed, seed + BATCH))
    finally:
        pair.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000, help="legal ones, of each config")
    parser.add_argument("--configs", nargs="+", default=["nano", "nano-fp8"], choices=CONFIGS)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    seed = options.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    console = Console()
    console.print(f"seed {seed}")
    for name in options.configs:  # before there are processes
        build(CONFIGS[name], console.print)
    batches = range(-(-options.programs // BATCH))
    jobs: list[Job] = [
        (name, seed + BATCH * batch, MEMORIES[batch % len(MEMORIES)])
        for name, batch in itertools.product(options.configs, batches)
    ]
    total = {name: Tally() for name in options.configs}
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, context) as pool:
        found = track(pool.map(_run, jobs), "fuzzing", total=len(jobs), console=console)
        for (name, _, _), tally in zip(jobs, found, strict=True):
            total[name].add(tally)
            for failure in tally.failures:
                console.print(failure, markup=False, highlight=False)
    seconds = time.perf_counter() - began

    failures = [failure for tally in total.values() for failure in tally.failures]
    if failures:
        folder = ROOT / "reports" / "fuzz"
        folder.mkdir(parents=True, exist_ok=True)
        for number, failure in enumerate(failures):
            (folder / f"failure{number}.txt").write_text(failure)
        console.print(f"reports of {len(failures)} failures are in {folder.relative_to(ROOT)}")
    (ROOT / "docs" / "fuzz.md").write_text(page(total, seed))
    report = {
        "seed": seed,
        "configs": {
            name: {
                "programs": tally.programs,
                "cycles": tally.cycles,
                "instructions": dict(sorted(tally.instructions.items())),
                "faults": dict(sorted(tally.faults.items())),
                "failures": len(tally.failures),
            }
            for name, tally in total.items()
        },
    }
    (ROOT / "docs" / "fuzz.json").write_text(json.dumps(report, indent=1) + "\n")
    programs = sum(tally.programs for tally in total.values())
    console.print(f"{programs:,} programs in {seconds:.0f} s, {len(failures)} failures")
    sys.exit(bool(failures))


def page(total: dict[str, Tally], seed: int) -> str:
    """docs/fuzz.md."""
    lines = [
        "# Random programs, gates against golden model",
        "",
        f"Made by `make fuzz` from seed {seed}. A legal program runs on random memories on device",
        "`rtl` (all gates; DRAM latency 1 to 100 cycles, 3 to 64 bytes a cycle) and on `golden`,",
        "whose race detector follows; all of SBUF, PSUM and DRAM, the semaphores and the counts",
        "of instructions and MACs must be equal. An illegal program must stop with the same fault",
        "record on both, and the next legal one must run as if nothing had been. How programs are",
        "drawn is told in `tb/systolith_tb/fuzz.py`.",
        "",
    ]
    for name, tally in total.items():
        faults = sum(tally.faults.values())
        lines += [
            f"**{name}**: {tally.programs - faults:,} legal and {faults:,} illegal programs, "
            f"{tally.cycles:,} cycles, {len(tally.failures)} mismatches",
            "",
            "| opcode | executed |",
            "|---|---|",
            *(f"| {key} | {value:,} |" for key, value in sorted(tally.instructions.items())),
            "",
            "| fault | programs |",
            "|---|---|",
            *(f"| {key} | {value:,} |" for key, value in sorted(tally.faults.items())),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
