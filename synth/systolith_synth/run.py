"""One report from end to end: what `systolith synth` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from systolith_hdl.board import PoweredBoard
from systolith_hdl.board.top import CLOCK_HZ
from systolith_hdl.config import CoreConfig
from systolith_hdl.toolchain import ToolError, nextpnr_ecp5, yosys

from . import report as reports
from .board import BoardTarget
from .flow import FlowError, Progress, Route, Synthesis, pack, place_and_route, version
from .netlist import Design
from .targets import Target, TargetError


def run(
    config: CoreConfig,
    target: Target,
    folder: Path,
    *,
    block: str = "chip",
    board: BoardTarget | None = None,
    seeds: int = 0,
    mhz: float = 100.0,
    gates: bool = True,
    liberty: Path | None = None,
    compare: Path | None = None,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Synthesizes a block of a chip and writes the report.

    Parameters
    ----------
    board : the chip with its bridge goes onto the pins of a board, whose FPGA is `target`; of the
        runs that reach the board's clock the fastest becomes ``board.bit``
    seeds : place-and-route runs; 0 leaves it out
    mhz : the clock that place-and-route tries to reach; on a board it is the board's
    gates : also map to gates, for an estimate of transistors
    liberty : a cell library to map to, for area instead of a transistor estimate
    compare : an older ``report.json``; that in `folder`, if there is one, by default

    Returns the report. Its ``error`` says what could not be done; the rest is there all the same.
    Raises BlockError, TargetError and ToolError for what cannot begin, and FlowError when Yosys
    fails.
    """
    if liberty is not None and not liberty.is_file():
        raise TargetError(f"there is no Liberty file {liberty}")
    if seeds and not target.nextpnr:
        raise TargetError(
            f"target {target.name} has no open place-and-route; leave --pnr out, or take an ECP5"
        )
    tools = [version(yosys())]
    old = _old(compare or folder / "report.json", needed=compare is not None)
    progress("elaborating")
    if board is None:
        design = Design.of_chip(config).block(block)
    else:
        block = board.name
        top = PoweredBoard(config, divider=board.divider)
        mhz = CLOCK_HZ / 1e6
        design = Design.of_component(top, "powered_board")
    synthesis = Synthesis(design, target, gates=gates, liberty=liberty, progress=progress)
    routes, error = None, ""
    partial = reports.collect(synthesis, config, block, tools=tools)
    if seeds and partial["over_capacity"]:
        error = f"{block} does not fit, so it was not placed: {partial['over_capacity'][0]}"
    elif seeds:
        try:
            tools.append(version(nextpnr_ecp5()))
            pins = board.constraints() if board else None
            routes = place_and_route(synthesis, seeds=seeds, mhz=mhz, pins=pins, progress=progress)
            failed = [route for route in routes if route.error]
            if failed:
                error = f"seed {failed[0].seed} of {seeds}: {failed[0].error}"
            if board and any(route.fmax for route in routes):
                error = _pack(board, routes, folder) or error
        except (FlowError, ToolError) as problem:
            error = str(problem)
    report = reports.collect(synthesis, config, block, routes=routes, error=error, tools=tools)
    reports.write(folder, report, synthesis=synthesis, routes=routes, old=old)
    return report


def _pack(board: BoardTarget, routes: list[Route], folder: Path) -> str:
    """Makes the bitstream of the fastest run; returns what went wrong."""
    best = max(routes, key=lambda route: route.fmax or 0)
    if not best.fmax or best.fmax * 1e6 < CLOCK_HZ:
        return (
            f"no bitstream: {best.fmax or 0:.1f} MHz at most, the board's clock has "
            f"{CLOCK_HZ / 1e6:g} MHz"
        )
    folder.mkdir(parents=True, exist_ok=True)
    pack(best, folder / "board.bit")
    return ""


def _old(path: Path, *, needed: bool) -> dict[str, Any] | None:
    """Reads an older report."""
    if not needed and not path.exists():
        return None
    try:
        old = json.loads(path.read_text())
        if not {"levels", "total", "block", "target"} <= set(old):
            raise ValueError("not a report of this command")
    except (OSError, ValueError) as problem:
        if not needed:
            return None
        raise TargetError(f"cannot compare with {path}: {problem}") from problem
    return old
