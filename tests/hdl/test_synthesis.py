"""Every preset elaborates; up to medium Yosys finds nothing wrong in it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from systolith_hdl.config import PRESETS, get_config
from systolith_hdl.core import Chip
from systolith_hdl.emit import to_rtlil, to_verilog
from systolith_hdl.toolchain import use_yosys
from systolith_tb.configs import CONFIGS


def yosys(script: str, cwd: Path) -> str:
    """Runs a Yosys script; fails with its output if it fails."""
    use_yosys()
    (cwd / "script.ys").write_text(script)
    done = subprocess.run(
        [os.environ.get("YOSYS", "yosys"), "-q", "script.ys"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


#: Multiple drivers, undriven wires in use, combinational loops; latches by their cells. Names of
#: what has another one are dropped before 256 MACs are written out: WebAssembly has 4 GB.
CHECK = """
read_verilog {name}.v
hierarchy -check -top chip
proc
opt_clean -purge
{flatten}
opt_clean
check -assert
select -assert-none t:$dlatch t:$adlatch t:$dlatchsr t:$sr
"""


@pytest.mark.parametrize("name", ["nano", "nano-fp8", "small", "medium"])
def test_check_assert(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.v").write_text(to_verilog(Chip(CONFIGS[name]), "chip"))
    yosys(CHECK.format(name=name, flatten="flatten"), tmp_path)


def test_the_check_finds_what_it_is_for(tmp_path: Path) -> None:
    """A combinational loop through two modules, and a latch, fail."""
    loop = """
    module leaf(input a, output b); assign b = ~a; endmodule
    module chip(output c); wire d; leaf x(.a(d), .b(c)); leaf y(.a(c), .b(d)); endmodule
    """
    latch = """
    module chip(input a, input b, output reg c); always @* if (a) c = b; endmodule
    """
    for text in (loop, latch):
        (tmp_path / "bad.v").write_text(text)
        with pytest.raises(AssertionError):
            yosys(CHECK.format(name="bad", flatten="flatten"), tmp_path)


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("nano", "small", "medium")])
def test_elaborates(name: str) -> None:
    assert "module \\chip" in to_rtlil(Chip(get_config(name)), "chip")
