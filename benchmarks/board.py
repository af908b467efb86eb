"""What each field of `CoreConfig` that preset `tiny` has smaller saves on the board's FPGA.

Synthesizes the chip once for each, with the field as in other presets. Writes the table of
docs/board.md; run it as ``make synth``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from systolith_hdl.config import CoreConfig, get_config
from systolith_synth.board import get_board
from systolith_synth.flow import Synthesis
from systolith_synth.netlist import Design

PAGE = Path(__file__).resolve().parent.parent / "docs" / "board.md"
TINY = get_config("tiny")
#: field -> what tiny has, what the others have
FIELDS = {
    "divider": ("no DIVIDE, MOD, RECIPROCAL, SQRT, RSQRT in the vector engine", "there"),
    "top": ("no TOP", "there"),
    "random": ("no stochastic rounding, RANDOM, DROPOUT", "there"),
    "loops": ("no LOOP, NEXT, TEST", "there"),
    "banks": ("SBUF and PSUM of {} banks", "{}"),
    "prefetch": (
        "{} instruction fetched ahead in each sequencer, and one of each kind taken ahead by the "
        "tensor engine",
        "{}, and 8",
    ),
    "outstanding": ("{} bursts of the DMA queue in flight", "{}"),
    "dma_queues": ("{} DMA queue", "{}"),
    "semaphores": ("{} semaphores", "{}"),
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(CoreConfig)}


def luts(config: CoreConfig, console: Console) -> int:
    """LUTs that the chip occupies, mapped as for the board."""
    synthesis = Synthesis(Design.of_chip(config), get_board("ulx3s").target, progress=console.print)
    return round(synthesis.totals[synthesis.top.module]["occupied"])


def main() -> None:
    console = Console()
    own = luts(TINY, console)
    rows = ["| field | `tiny` | others | LUTs |", "|---|---|---|---|"]
    for field, (here, there) in FIELDS.items():
        console.print(f"tiny with {field} = {DEFAULTS[field]}")
        more = luts(dataclasses.replace(TINY, **{field: DEFAULTS[field]}), console) - own
        rows.append(
            f"| `{field}` | {here.format(getattr(TINY, field))} | "
            f"{there.format(DEFAULTS[field])} | {more:,} |"
        )
    console.print("\n".join(rows))
    begin, end = "<!-- fields -->\n", "<!-- end of fields -->\n"
    text = PAGE.read_text()
    head, rest = text.split(begin)
    PAGE.write_text(head + begin + "\n".join(rows) + "\n" + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
