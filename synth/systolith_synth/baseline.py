"""Cell counts of `nano` against committed ones, so that a change that costs area is seen.

`python -m systolith_synth.baseline` writes ``baseline.json`` beside this file anew.
"""

from __future__ import annotations

import json
from pathlib import Path

from systolith_hdl.config import get_config

from .flow import Progress, Synthesis
from .netlist import Design
from .targets import get_target

PATH = Path(__file__).with_name("baseline.json")
CONFIG, TARGET = "nano", "ecp5-85k"
#: Growth of a class of cells that is too much.
LIMIT = 0.03

#: class -> cells; for the whole chip, and for all copies of each unit alone
Counts = dict[str, dict[str, float]]


def measure(progress: Progress = lambda text: None) -> Counts:
    """Synthesizes the chip and counts: under ``total`` and under the name of each unit."""
    design = Design.of_chip(get_config(CONFIG))
    synthesis = Synthesis(design, get_target(TARGET), progress=progress)
    left_out = ("occupied", "transistors", "area", "memory_bits")
    counts = {"total": synthesis.totals[synthesis.top.module]}
    for module, mapped in synthesis.mapped.items():
        own, copies = synthesis.own(module), synthesis.copies[module]
        counts[mapped.unit.name] = {kind: copies * number for kind, number in own.items()}
    return {
        name: {kind: n for kind, n in sorted(of.items()) if n and kind not in left_out}
        for name, of in counts.items()
    }


def growth(now: Counts, before: Counts) -> str:
    """Returns a table of the units that grew in the classes that grew too much; empty if none."""
    lines = []
    for kind, number in now["total"].items():
        old = before["total"].get(kind, 0)
        if number <= old * (1 + LIMIT):
            continue
        change = f"{number / old - 1:+.1%}" if old else "new"
        lines.append(f"{kind}: {old:,.0f} -> {number:,.0f} ({change}), in")
        deltas = {
            name: now.get(name, {}).get(kind, 0) - before.get(name, {}).get(kind, 0)
            for name in {*now, *before} - {"total"}
        }
        for name, delta in sorted(deltas.items(), key=lambda item: -item[1]):
            if delta > 0:
                had = before.get(name, {}).get(kind, 0)
                lines.append(f"  {name:<30} {had:>8,.0f} {delta:>+8,.0f}")
    return "\n".join(lines)


def main() -> None:
    """Writes the baseline."""
    PATH.write_text(json.dumps(measure(print), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
