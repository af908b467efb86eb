"""Runs the tools: each unit through Yosys, the mapped units joined, the whole through nextpnr.

Every step is cached by the hash of what goes into it, in the cache folder; its log stays there.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from systolith_hdl.toolchain import ToolError, cache_dir, content_hash, ecppack, nextpnr_ecp5, yosys

from .netlist import Design, Memory, Unit
from .targets import Kind, Target, TargetError

#: Memories above this many bits must not be made of flip-flops.
MEMORY_LIMIT = 1024

Progress = Callable[[str], None]


class FlowError(RuntimeError):
    """A tool ended with an error; the message holds the end of its log."""


@dataclasses.dataclass
class Mapped:
    """What Yosys made of a unit.

    cells : library cell -> how many, the units placed in it left out
    memories : (memory, library cell it became; empty for flip-flops)
    soft_multipliers : multiplications that are not in DSPs, by name
    gates : generic cell -> how many, and
    transistors : CMOS estimate of them, memories left out
    area : with a Liberty library, in its unit
    folder : script, log and netlist ``mapped.il``
    """

    unit: Unit
    cells: dict[str, int]
    memories: list[tuple[Memory, str]]
    soft_multipliers: list[str]
    folder: Path
    gates: dict[str, int] = dataclasses.field(default_factory=dict)
    transistors: int = 0
    area: float | None = None


@dataclasses.dataclass
class Route:
    """A place-and-route run of a netlist: its seed, and the report, or what went wrong."""

    seed: int
    folder: Path
    netlist: Path
    seconds: float
    fmax: float | None = None
    utilization: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    path: list[dict] = dataclasses.field(default_factory=list)
    error: str = ""


@functools.cache
def version(command: str) -> str:
    """Version of a tool, for reports and for the hash of a build."""
    name = Path(command).name
    if name.startswith("yowasp-"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else name


def _yosys(script: str, folder: Path) -> int:
    """Runs a script in `folder`, its log there; returns the exit status."""
    (folder / "script.ys").write_text(script)
    with open(folder / "yosys.log", "w") as log:
        return subprocess.run(
            [yosys(), "-Q", "-T", "script.ys"],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


class _Build:
    """A folder of the cache that is there whole or not at all.

    In a ``with`` block `folder` is where to write; `fresh` is False if the step was done before,
    and then there is nothing to do.
    """

    def __init__(self, kind: str, *parts: str) -> None:
        self._final = cache_dir() / f"{kind}-{content_hash(*parts)}"
        self.fresh = not self._final.exists()
        self.folder = self._final

    def __enter__(self) -> _Build:
        if self.fresh:
            prefix = f"{self._final.name}.tmp"
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._final.parent))
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if not self.fresh:
            return
        if kind is None and not self._final.exists():
            self.folder.replace(self._final)
        elif kind is None:  # another process was faster
            shutil.rmtree(self.folder)
        if kind is None:
            self.folder = self._final


def _stat(path: Path) -> dict:
    """The one module's part of what ``stat -json`` wrote."""
    (found,) = json.loads(path.read_text())["modules"].values()
    return found


def map_unit(unit: Unit, target: Target) -> Mapped:
    """Synthesizes a unit for a target. Raises FlowError if Yosys cannot."""
    script = "\n".join(
        [
            "read_rtlil unit.il",
            target.before,
            "{mapper}",
            "clean",
            target.after,
            "delete t:$scopeinfo",
            f"rename unit {unit.module}",
            f"tee -q -o stat.json stat -json {unit.module}",
            f"select {unit.module}",
            "write_rtlil -selected mapped.il",
        ]
    )
    with _Build("unit", unit.text, script, *target.mappers, version(yosys())) as build:
        if build.fresh:
            (build.folder / "unit.il").write_text(unit.text)
            for mapper in target.mappers:
                if _yosys(script.replace("{mapper}", mapper), build.folder) == 0:
                    break
            else:
                raise FlowError(
                    f"Yosys cannot synthesize {unit.name}; the end of "
                    f"{build.folder}/yosys.log:\n{_tail(build.folder / 'yosys.log')}"
                )
    counts = _stat(build.folder / "stat.json")["num_cells_by_type"]
    log = (build.folder / "yosys.log").read_text(errors="replace")
    kinds = dict(re.findall(r"^mapping memory unit\.(\S+) via \$__(\S+)$", log, re.MULTILINE))
    return Mapped(
        unit=unit,
        cells={cell: n for cell, n in counts.items() if cell not in unit.children},
        memories=[(memory, kinds.get(memory.name, "")) for memory in unit.memories],
        soft_multipliers=[
            name.removeprefix("$flatten\\").replace(".genblk1", "")
            for name in re.findall(r"creating \$macc model for (\S+) \(\$mul\)", log)
        ],
        folder=build.folder,
    )


#: ABC's commands that map to gates: Yosys' own begin with `&fraig`, which did not end within
#: minutes on the function unit of the scalar lane.
_GATES = "+strash;scorr;dc2;strash;dch,-f;map,-B,0.9"


def estimate_gates(mapped: Mapped, liberty: Path | None) -> None:
    """Adds gates and transistors of a unit, and the area with a Liberty library.

    Memories stay out. Flip-flops are plain ones: enables and synchronous resets become gates."""
    map_cells, stat = f"abc -g cmos -script {_GATES}", "stat -tech cmos"
    library = ""
    if liberty is not None:
        library = liberty.read_text(errors="replace")
        map_cells = f"dfflibmap -liberty cells.lib\nabc -liberty cells.lib -script {_GATES}"
        stat = "stat -liberty cells.lib"
    script = "\n".join(
        [
            "read_rtlil unit.il",
            "synth -flatten -top unit -run begin:fine",
            "setattr -unset init w:*",
            "opt -fast -full\ntechmap\nopt -fast\ndfflegalize -cell $_DFF_P_ x\nopt -fast",
            map_cells,
            "opt_clean",
            "delete t:$scopeinfo",
            f"tee -q -o stat.json {stat} -json unit",
        ]
    )
    unit = mapped.unit
    with _Build("gates", unit.text, script, library, version(yosys())) as build:
        if build.fresh:
            (build.folder / "unit.il").write_text(unit.text)
            if liberty is not None:
                (build.folder / "cells.lib").write_text(library)
            if _yosys(script, build.folder):
                raise FlowError(
                    f"Yosys cannot map {unit.name} to gates; the end of its log:\n"
                    + _tail(build.folder / "yosys.log")
                )
    stat_of = _stat(build.folder / "stat.json")
    mapped.gates = {
        cell: n for cell, n in stat_of["num_cells_by_type"].items() if cell not in unit.children
    }
    if liberty is None:
        mapped.transistors = int(str(stat_of.get("estimated_num_transistors", 0)).rstrip("+"))
    else:
        mapped.area = float(stat_of.get("area", 0))


#: Yosys' own model picks the bit in four steps: four times as much for Verilator.
_LUT4 = """module LUT4(input A, B, C, D, output Z);
  parameter [15:0] INIT = 0;
  \\$lut #(.WIDTH(4), .LUT(INIT)) lut(.A({D, C, B, A}), .Y(Z));
endmodule
"""


class Synthesis:
    """A design synthesized for a target.

    Parameters
    ----------
    gates : also estimate gates and transistors
    liberty : a cell library; its area instead of transistors
    progress : called with what is being done
    """

    def __init__(
        self,
        design: Design,
        target: Target,
        *,
        gates: bool = False,
        liberty: Path | None = None,
        progress: Progress = lambda text: None,
    ) -> None:
        self.design = design
        self.target = target
        self.liberty = liberty
        units = design.units()
        self.top = units[-1]
        #: module of the mapped netlist -> what it is made of, children first
        self.mapped: dict[str, Mapped] = {}
        distinct = {unit.module: unit for unit in reversed(units)}
        began = time.perf_counter()
        for number, unit in enumerate(reversed(distinct.values())):
            progress(f"synthesizing {unit.name} ({number + 1} of {len(distinct)})")
            self.mapped[unit.module] = mapped = map_unit(unit, target)
            if gates or liberty is not None:
                estimate_gates(mapped, liberty)
        self.seconds = time.perf_counter() - began

    @functools.cached_property
    def copies(self) -> dict[str, int]:
        """How often each unit is in the design."""
        copies = collections.Counter({self.top.module: 1})
        for module in reversed(self.mapped):
            for child, times in self.mapped[module].unit.children.items():
                copies[child] += copies[module] * times
        return dict(copies)

    def own(self, module: str) -> dict[str, float]:
        """Resources of one copy of a unit without its children: class -> units, and ``occupied``,
        the LUTs that its cells occupy."""
        totals: dict[str, float] = collections.defaultdict(float)
        for name, count in self.mapped[module].cells.items():
            cell = self.target.cell(name)
            totals[cell.kind.name] += cell.units * count
            totals["occupied"] += cell.luts * count
        totals["transistors"] += self.mapped[module].transistors
        totals["area"] += self.mapped[module].area or 0
        for memory, _ in self.mapped[module].memories:
            totals["memory_bits"] += memory.bits
        return dict(totals)

    @functools.cached_property
    def totals(self) -> dict[str, dict[str, float]]:
        """For each unit the resources of one copy with its children."""
        totals: dict[str, dict[str, float]] = {}
        for module, mapped in self.mapped.items():
            whole = collections.defaultdict(float, self.own(module))
            for child, times in mapped.unit.children.items():
                for resource, number in totals[child].items():
                    whole[resource] += times * number
            totals[module] = dict(whole)
        return totals

    def violations(self) -> list[str]:
        """What the project forbids and the netlist has, by unit."""
        found = []
        for module, mapped in self.mapped.items():
            name = mapped.unit.name
            latches = self.own(module).get(Kind.latch.name)
            if latches:
                found.append(f"{name}: {latches:.0f} latches")
            for memory, cell in mapped.memories:
                if not cell and memory.bits > MEMORY_LIMIT:
                    found.append(
                        f"{name}: memory {memory.name} ({memory.depth} x {memory.width} bits) is "
                        "made of flip-flops"
                    )
            for multiplier in mapped.soft_multipliers:
                found.append(f"{name}: multiplication {multiplier} is made of LUTs")
        return found

    def verilog(self, name: str) -> str:
        """The netlist as Verilog: module `name` only holds the top unit, and there is a module for
        each unit. In the place of a cell stands what its simulation model says; cells without one
        stay."""
        top = self.top.module
        parts = [mapped.folder.name for mapped in self.mapped.values()]
        script = ["setattr -mod -set keep_hierarchy 1 u_*"]
        script += [f"read_verilog -overwrite +/{file}" for file in self.target.simulation]
        script += [f"read_verilog -overwrite -icells <<EOT\n{_LUT4}EOT"]
        script += [f"hierarchy -top {top}", "proc", "flatten", "opt_expr", "opt_clean -purge"]
        script += ["write_verilog -noattr netlist.v"]
        output = "\n".join(script)
        with _Build("netlist", *parts, output, version(yosys())) as build:
            if build.fresh:
                self.link(build.folder, name=top, flatten=False, output=output)
        ports = ", ".join(
            f"{'input' if is_input else 'output'} [{width - 1}:0] {port}"
            for port, width, is_input in self.design.ports()
        )
        shell = f"module {name}({ports});\n  {top} netlist(.*);\nendmodule\n"
        return shell + (build.folder / "netlist.v").read_text()

    def link(
        self,
        folder: Path,
        *,
        name: str,
        output: str,
        extra: Sequence[Path] = (),
        flatten: bool = True,
    ) -> None:
        """Joins the mapped units into one netlist with module `name` at the top, written by the
        Yosys command `output` in `folder`; `extra` are more mapped netlists."""
        files = [mapped.folder / "mapped.il" for mapped in self.mapped.values()]
        for number, file in enumerate([*files, *extra]):
            shutil.copy(file, folder / f"part{number}.il")
        script = [f"read_rtlil part{number}.il" for number in range(len(files) + len(extra))]
        script += [
            self.target.library,
            f"hierarchy -check -top {name}",
            "flatten\ndelete t:$scopeinfo\nopt_clean" if flatten else "",
            "blackbox =A:whitebox",
            output,
        ]
        if _yosys("\n".join(script), folder):
            raise FlowError(f"Yosys cannot join the netlists:\n{_tail(folder / 'yosys.log')}")
        for number in range(len(files) + len(extra)):
            (folder / f"part{number}.il").unlink()


#: What nextpnr writes for ecppack.
_CONFIGURATION = "design.config"

#: A few pins instead of hundreds: the inputs come from a chain of registers, the outputs go into
#: registers that another chain carries out. So every path of the block is between registers.
_HARNESS = """
module harness(input clk, input in, input load, output out);
  reg [{inputs}-1:0] source;
  wire [{outputs}-1:0] result;
  reg [{outputs}-1:0] caught, chain;
  always @(posedge clk) begin
    source <= {{source, in}};
    caught <= result;
    chain <= load ? caught : {{chain, load}};
  end
  assign out = chain[{outputs}-1];
  {module} dut({connections});
endmodule
(* blackbox *) module {module}({ports});
endmodule
"""


#: The ports as they are.
_PADS = """
module harness({ports});
  {module} dut(.*);
endmodule
(* blackbox *) module {module}({ports});
endmodule
"""


def _harness(synthesis: Synthesis, *, pads: bool) -> Path:
    """Netlist of module ``harness`` around the design's top: with its ports if `pads`, else with
    registers and four pins."""
    ports = synthesis.design.ports()
    position = {True: 0, False: 0}
    connections, declarations = [], []
    for port, width, is_input in ports:
        declarations.append(f"{'input' if is_input else 'output'} [{width - 1}:0] \\{port} ")
        if port == "clk":
            connections.append(".clk(clk)")
            continue
        bus, low = ("source" if is_input else "result"), position[is_input]
        connections.append(f".\\{port} ({bus}[{low + width - 1}:{low}])")
        position[is_input] = low + width
    text = (_PADS if pads else _HARNESS).format(
        inputs=max(position[True], 1),
        outputs=max(position[False], 1),
        module=synthesis.top.module,
        connections=", ".join(connections),
        ports=", ".join(declarations),
    )
    target = synthesis.target
    script = "\n".join(
        [
            "read_verilog -sv harness.v",
            target.before.replace("unit", "harness"),
            "abc -lut 4",
            target.after,
            "select harness",
            "write_rtlil -selected mapped.il",
        ]
    )
    with _Build("harness", text, script, version(yosys())) as build:
        if build.fresh:
            (build.folder / "harness.v").write_text(text)
            if _yosys(script, build.folder):
                raise FlowError(f"the harness fails:\n{_tail(build.folder / 'yosys.log')}")
    return build.folder / "mapped.il"


#: Wires with several users after a round of the router `router2`, which goes on until there are
#: none, for ever if there always are.
_ROUND = re.compile(r"iter=\d+ wires=\d+ overused=(\d+)")
#: Rounds without fewer of them than ever before, after which a run is given up.
_PATIENCE = 60


def _patiently(command: list[str], folder: Path) -> tuple[int, str]:
    """Runs nextpnr in `folder`, its log there; returns the exit status, and why it was given up or
    nothing."""
    path = folder / "nextpnr.log"
    with (
        open(path, "w") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while True:
                try:
                    return process.wait(timeout=2), ""
                except subprocess.TimeoutExpired:
                    text = path.read_text(errors="replace")
                left = [int(count) for count in _ROUND.findall(text)]
                best = left.index(min(left)) + 1 if left else 0
                if len(left) - best >= _PATIENCE:
                    return 1, (
                        f"not routed: {min(left)} wires have several users at best, after round "
                        f"{best} of {len(left)}; try other seeds or a smaller design"
                    )
        finally:
            process.kill()  # nothing if it has ended


def _with_settings(netlist: str, settings: Mapping[str, str]) -> str:
    """A netlist of module ``harness`` in JSON with settings of nextpnr, which reads them there."""
    if not settings:
        return netlist
    head, name, rest = netlist.partition('"harness": {')
    assert name, "Yosys wrote another module"
    return f'{head}{name}"settings": {json.dumps(settings)},{rest}'


def place_and_route(
    synthesis: Synthesis,
    *,
    seeds: int,
    mhz: float,
    pins: str | None = None,
    progress: Progress = lambda text: None,
) -> list[Route]:
    """Places and routes the design, once for each seed from 1 to `seeds`, for a clock of `mhz`. A
    run that fails is returned with its `error`; one that a signal ends raises FlowError.

    Parameters
    ----------
    pins : constraints (LPF) that place its ports on pins; without, it is put inside registers

    Raises TargetError when the target has no place-and-route, ToolError without nextpnr."""
    target = synthesis.target
    if not target.nextpnr:
        raise TargetError(
            f"target {target.name} has no open place-and-route; leave --pnr out, or use an ECP5"
        )
    nextpnr = nextpnr_ecp5()
    harness = _harness(synthesis, pads=pins is not None)
    parts = [mapped.folder.name for mapped in synthesis.mapped.values()]
    parts += [harness.parent.name, target.name, version(yosys())]
    with _Build("linked", *parts) as linked:
        if linked.fresh:
            progress("joining the netlists")
            synthesis.link(
                linked.folder, name="harness", extra=[harness], output="write_json netlist.json"
            )
    arguments = [*target.nextpnr, "--freq", str(mhz), "--timing-allow-fail"]
    arguments += ["--report", "report.json", "--top", "harness"]
    if pins is None:
        arguments += ["--lpf-allow-unconstrained"]
    else:
        arguments += ["--lpf", "pins.lpf", "--textcfg", _CONFIGURATION]
    routes = []
    for seed in range(1, seeds + 1):
        progress(f"placing and routing, seed {seed} of {seeds}")
        options = [*arguments, "--seed", str(seed)]
        key = [linked.folder.name, *options, repr(target.settings), pins or "", version(nextpnr)]
        with _Build("pnr", *key) as build:
            if build.fresh:
                text = (linked.folder / "netlist.json").read_text()
                (build.folder / "netlist.json").write_text(_with_settings(text, target.settings))
                (build.folder / "pins.lpf").write_text(pins or "")
                began = time.perf_counter()
                command = [nextpnr, "--json", "netlist.json", *options]
                status, gave_up = _patiently(command, build.folder)
                if status < 0:  # no result of this design: not to be found again
                    raise FlowError(f"nextpnr was ended by signal {-status}, seed {seed}")
                (build.folder / "netlist.json").unlink()
                seconds = time.perf_counter() - began
                done = {"status": status, "seconds": seconds, "error": gave_up}
                (build.folder / "done.json").write_text(json.dumps(done))
        routes.append(_route(seed, build.folder, linked.folder / "netlist.json"))
    return routes


def pack(route: Route, bitstream: Path) -> None:
    """Makes the bitstream of a design that was placed on `pins`.

    Raises ToolError without ecppack, FlowError when it fails."""
    done = subprocess.run(
        [ecppack(), "--compress", _CONFIGURATION, "design.bit"],
        cwd=route.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FlowError(f"ecppack fails: {done.stderr.strip()}")
    (route.folder / "design.bit").replace(bitstream)


def _route(seed: int, folder: Path, netlist: Path) -> Route:
    """Reads what nextpnr left."""
    done = json.loads((folder / "done.json").read_text())
    route = Route(seed=seed, folder=folder, netlist=netlist, seconds=done["seconds"])
    log = (folder / "nextpnr.log").read_text(errors="replace")
    used = re.findall(r"^Info:\s+(\w+): +(\d+)/ *(\d+) ", log, re.MULTILINE)
    route.utilization = {name: (int(n), int(of)) for name, n, of in used}
    if done["status"]:
        errors = [done["error"]] if done.get("error") else []
        errors += re.findall(r"^ERROR: (.*)$", log, re.MULTILINE)
        route.error = errors[0] if errors else f"nextpnr ended with status {done['status']}"
        return route
    report = json.loads((folder / "report.json").read_text())
    clocks = report["fmax"]
    worst = min(clocks, key=lambda name: clocks[name]["achieved"], default=None)
    if worst is None:
        route.error = "there is no path between registers"
        return route
    route.fmax = clocks[worst]["achieved"]
    for critical in report["critical_paths"]:
        if critical["from"] == critical["to"] == f"posedge {worst}":
            route.path = critical["path"]
    return route


__all__ = [
    "FlowError",
    "Mapped",
    "Route",
    "Synthesis",
    "ToolError",
    "map_unit",
    "pack",
    "place_and_route",
]
