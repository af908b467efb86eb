"""Clock gates of the simulator: what stands still costs nothing, and changes nothing."""

import pytest
from systolith.runtime.rtl import RtlBackend
from systolith.runtime.verilog import with_clock_gates, with_registers, with_whole_writes
from systolith_hdl.config import get_config
from systolith_hdl.core import chip_verilog, gated_blocks
from systolith_hdl.toolchain import ToolError
from systolith_tb.fuzz import Rig, difference, draw_case, illegal_program, program

NANO = get_config("nano")


@pytest.mark.parametrize(("latency", "rate"), [(1, 64), (20, None), (90, 3)])
def test_gated_clocks_change_no_bit_and_no_cycle(latency: int, rate: int | None) -> None:
    """Random programs, legal and not, one after the other: the same memories, faults and counters,
    after the same number of cycles."""
    options = {"dram_bytes": 1 << 20, "dram_latency": latency, "dram_bytes_per_cycle": rate}
    gated, free = (RtlBackend(NANO, gated=choice, **options) for choice in (True, False))
    rigs = Rig(gated), Rig(free)
    for seed in range(4000 + latency, 4015 + latency):
        case = draw_case(NANO, seed)
        for made in (program(case), illegal_program(case)):
            mine, other = (rig.run(made, seed) for rig in rigs)
            assert difference(mine, other) is None, f"case {seed}"
            assert gated.simulated_cycles == free.simulated_cycles, f"case {seed}"
    for rig in rigs:
        rig.driver.close()


def test_every_block_has_the_clock_of_its_bit() -> None:
    text = with_clock_gates(chip_verilog(NANO), NANO)
    bits = list(gated_blocks(NANO).values())
    for bit in set(bits):
        assert text.count(f".clk(clk_{bit})") == bits.count(bit)
        assert text.count(f"wire clk_{bit} = ") == 1


def test_a_block_without_a_clock_of_its_own_is_refused() -> None:
    text = chip_verilog(NANO).replace("  \\core.vector  vector (", "  \\core.vector  other (")
    with pytest.raises(ToolError, match="core has 0 blocks vector"):
        with_clock_gates(text, NANO)


def test_whole_writes() -> None:
    """Lanes of one word become one write; what is anything else stays as it is."""
    lanes = (
        "    if (m[0])\n      ram[row][7:0] <= data[7:0];\n"
        "    if (m[1])\n      ram[row][15:8] <= data[15:8];\n"
    )
    mask = "{{8{m[1]}}, {8{m[0]}}}"
    assert with_whole_writes(lanes) == (
        f"    if (m[0] | m[1])\n      ram[row] <= (data & {mask}) | (ram[row] & ~{mask});\n"
    )
    for other in (
        lanes.replace("[15:8]", "[16:9]"),
        lanes.replace("data[15:8]", "date[15:8]"),
        lanes.replace("ram[row][15", "ram[low][15"),
    ):
        assert with_whole_writes(other) == other


REGISTER = "  always @(posedge clk)\n    q <= \\$1 ;\n"
NEXT = """\
  always @* begin
    if (\\$dump ) begin end
    \\$1  = q;
    if (en) begin
      \\$1 [3:0] = q[7:4];
    end
  end
"""
ONE = """\
  always @(posedge clk) begin
    if (en) begin
      q[3:0] <= q[7:4];
    end
  end
"""


def _module(*parts: str) -> str:
    return "".join(["module m(clk, en, q);\n  reg [7:0] \\$1 ;\n", *parts, "endmodule\n"])


def test_registers() -> None:
    """A register and its next value become one process; a value that is read elsewhere, as well or
    instead, or assigned together with another, stays."""
    assert with_registers(_module(REGISTER, NEXT)) == _module(ONE)
    for other in (
        _module(REGISTER, NEXT, "  assign o = \\$1 ;\n"),
        _module(REGISTER, REGISTER.replace("q", "p"), NEXT),
        _module(REGISTER, NEXT.replace("q[7:4]", "\\$1 [7:4]")),
        _module(REGISTER, NEXT.replace("\\$1 [3:0]", "\\$2 [3:0]")),
        _module(REGISTER, NEXT.replace("\\$1 [3:0]", "\\$2 [3:0]"), "  assign o = \\$1 ;\n"),
        _module(REGISTER, NEXT.replace("    end\n", "    end\n    m[a] = q;\n")),
        _module(NEXT),
    ):
        assert with_registers(other) == other


def test_nearly_all_registers_of_the_chip_are_one_process() -> None:
    text = chip_verilog(NANO)
    separate = with_registers(text).count("  always @(posedge clk)\n")
    assert separate < text.count("  always @(posedge clk)\n") / 10
