"""Netlists for simulation: a component as the FPGA's cells, in Verilog, and the whole chip as a
device.

The simulation models of most cells are Yosys' own. Those of the multiplier and the block RAM, which
Yosys has only as black boxes, are here; they know the modes that synthesis uses and stop the
simulation in any other.
"""

from __future__ import annotations

import re
from typing import Any

from amaranth.lib import wiring
from systolith.runtime.rtl import RtlBackend, build_of
from systolith_hdl.config import CoreConfig
from systolith_hdl.core import Chip
from systolith_hdl.toolchain import content_hash

from .flow import Progress, Synthesis
from .netlist import Design
from .targets import get_target


def _bits(port: str, count: int) -> str:
    """Concatenation of a port that the cell has bit by bit."""
    return "{" + ", ".join(f"{port}{i}" for i in reversed(range(count))) + "}"


def _ports(direction: str, port: str, count: int) -> str:
    return f"{direction} " + ", ".join(f"{port}{i}" for i in range(count))


def _multiplier() -> str:
    ports = [_ports("input", name, 18) for name in "ABC"] + [_ports("output", "P", 36)]
    return f"""
module MULT18X18D({", ".join(ports)}, input SIGNEDA, SIGNEDB, SOURCEA, SOURCEB);
  wire [17:0] a = {_bits("A", 18)}, b = {_bits("B", 18)};
  wire signed [18:0] wide_a = {{SIGNEDA & a[17], a}}, wide_b = {{SIGNEDB & b[17], b}};
  wire signed [37:0] product = wide_a * wide_b;
  assign {_bits("P", 36)} = product[35:0];
  initial #0 if (SOURCEA || SOURCEB) $fatal(1, "MULT18X18D: source registers are not modelled");
endmodule
"""


def _block_ram() -> str:
    inits = [f"INITVAL_{i:02X}" for i in range(64)]
    ports, reads = [], []
    for port in "AB":
        ports += [_ports("input", f"DI{port}", 18), _ports("input", f"AD{port}", 14)]
        ports += [f"input CE{port}, OCE{port}, CLK{port}, WE{port}, RST{port}"]
        ports += [_ports("input", f"CS{port}", 3), _ports("output", f"DO{port}", 18)]
    for port in "AB":
        reads.append(
            f"""
  wire [13:0] address{port} = {_bits(f"AD{port}", 14)};
  reg [35:0] out{port} = 0;
  // The nine bits at a multiple of 8 of the address, and those after it; 18 and 36 bits ignore the
  // low address bits, which are byte enables when writing.
  wire [10:0] row{port} = address{port}[13:3] & (WIDTH_{port} == 36 ? 11'h7fc :
                                                 WIDTH_{port} == 18 ? 11'h7fe : 11'h7ff);"""
        )
    return f"""
module DP16KD({", ".join(ports)});
  parameter DATA_WIDTH_A = 18, DATA_WIDTH_B = 18;
  parameter REGMODE_A = "NOREG", REGMODE_B = "NOREG", RESETMODE = "SYNC";
  parameter ASYNC_RESET_RELEASE = "SYNC", CSDECODE_A = "0b000", CSDECODE_B = "0b000";
  parameter CLKAMUX = "CLKA", CLKBMUX = "CLKB", GSR = "AUTO", INIT_DATA = "STATIC";
  parameter WRITEMODE_A = "NORMAL", WRITEMODE_B = "NORMAL";
  parameter [319:0] {", ".join(f"{name} = 0" for name in inits)};
  localparam WIDTH_A = DATA_WIDTH_A, WIDTH_B = DATA_WIDTH_B;
  reg [8:0] words [0:2047];
  wire [20479:0] contents = {{{", ".join(reversed(inits))}}};
  integer i;
  initial begin
    for (i = 0; i < 1024; i = i + 1)
      {{words[2 * i + 1], words[2 * i]}} = contents[20 * i +: 18];
    if (!((WIDTH_A == 9 || WIDTH_A == 18 || WIDTH_A == 36) &&
          (WIDTH_B == 9 || WIDTH_B == 18 || WIDTH_B == 36)))
      $fatal(1, "DP16KD: widths %0d and %0d are not modelled", WIDTH_A, WIDTH_B);
    if (CLKAMUX != "CLKA" || CLKBMUX != "CLKB" || REGMODE_A != "NOREG" || REGMODE_B != "NOREG")
      $fatal(1, "DP16KD: output registers and inverted clocks are not modelled");
  end{"".join(reads)}
  wire [35:0] data = {{{_bits("DIB", 18)}, {_bits("DIA", 18)}}};
  wire [3:0] enables = WIDTH_A == 9 ? 4'b1 : addressA[3:0] & (WIDTH_A == 18 ? 4'h3 : 4'hf);
  wire writes = CEA && WEA;
  // What is read of a row that is written in the same cycle is undefined on the device: here it is
  // wrong in every bit.
  function [8:0] read(input [10:0] row);
    integer k;
    begin
      read = words[row];
      for (k = 0; k < 4; k = k + 1)
        if (writes && enables[k] && row == rowA + k[10:0]) read = ~words[row];
    end
  endfunction
  always @(posedge CLKB) begin
    if (CEB && WEB) $fatal(1, "DP16KD: writing at port B is not modelled");
    if (RSTB) outB <= 0;
    else if (CEB)
      outB <= {{read(rowB + 3), read(rowB + 2), read(rowB + 1), read(rowB)}};
  end
  always @(posedge CLKA) begin
    if (CEA && !WEA)
      outA <= {{words[rowA + 3], words[rowA + 2], words[rowA + 1], words[rowA]}};
    for (i = 0; i < 4; i = i + 1)
      if (writes && enables[i]) words[rowA + i[10:0]] <= data[9 * i +: 9];
  end
  assign {_bits("DOA", 18)} = WIDTH_B == 36 ? outB[17:0] : outA[17:0];
  assign {_bits("DOB", 18)} = WIDTH_B == 36 ? outB[35:18] : outB[17:0];
endmodule
"""


def netlist(
    component: wiring.Component,
    name: str,
    *,
    target: str = "ecp5-85k",
    progress: Progress = lambda text: None,
) -> str:
    """Synthesizes a component; returns its netlist as Verilog, module `name` and below it a
    module for each unit, which Verilator is to work out once, however often it is placed, with
    models of the cells that Yosys has none for."""
    device = get_target(target)
    synthesis = Synthesis(Design.of_component(component, name), device, progress=progress)
    text = re.sub(
        r"^module u_.*?;\n",
        lambda head: f"{head[0]}  /*verilator no_inline_module*/\n",
        synthesis.verilog(name),
        flags=re.MULTILINE | re.DOTALL,
    )
    return "\n".join([text, _multiplier(), _block_ram()])


class NetlistBackend(RtlBackend):
    """The `netlist` device: `RtlBackend` with the cells that Yosys makes of the chip; options
    `dram_bytes`, `dram_latency`, `dram_bytes_per_cycle` and `progress` as its.

    Nano takes minutes to build.
    """

    def __init__(
        self, config: CoreConfig, *, progress: Progress = lambda message: None, **options: Any
    ) -> None:
        progress(f"synthesizing {config.name}")
        text = netlist(Chip(config), "chip", progress=progress)
        library = build_of(
            f"netlist-{config.name}",
            config,
            lambda: text,
            sources=content_hash(text),
            loops=False,
            progress=progress,
        )
        super().__init__(config, library=library, **options)
