"""Presets elaborate, and Yosys finds nothing wrong in them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from systolith_hdl.config import get_config
from systolith_hdl.core import chip_design
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


#: Multiple drivers, undriven wires in use, combinational loops; latches by their cells.
CHECK = """
{read}
hierarchy -check -top chip
proc
opt_clean -purge
{flatten}
opt_clean
check -assert
select -assert-none t:$dlatch t:$adlatch t:$dlatchsr t:$sr
"""


#: The others take minutes to elaborate: `make nightly`.
CHECKED = os.environ.get("SYSTOLITH_PRESETS", "tiny,nano,small,medium").split(",")


@pytest.mark.parametrize("name", CHECKED)
def test_check_assert(name: str, tmp_path: Path) -> None:
    """Nothing is wrong in any module of a preset."""
    (tmp_path / "chip.il").write_text(chip_design(get_config(name)))
    yosys(CHECK.format(read="read_rtlil chip.il", flatten=""), tmp_path)


@pytest.mark.parametrize("name", ["tiny", "nano-fp8"])
def test_check_assert_across_modules(name: str, tmp_path: Path) -> None:
    """Neither is there between modules, of which larger chips have more of the same."""
    (tmp_path / "chip.il").write_text(chip_design(CONFIGS[name]))
    yosys(CHECK.format(read="read_rtlil chip.il", flatten="flatten"), tmp_path)


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
            yosys(CHECK.format(read="read_verilog bad.v", flatten="flatten"), tmp_path)
