"""What the simulator changes in the chip's Verilog: how its inputs arrive, and, for `rtl-fast`, the
floating-point cells."""

from __future__ import annotations

import re
from pathlib import Path

from systolith_hdl.arith import FP32_LATENCY, SHORT_LATENCY
from systolith_hdl.tensor import ADD_LATENCY, MUL_LATENCY, PAIR_MUL_LATENCY
from systolith_hdl.toolchain import ToolError

from .lanes import cpp_call

#: Cells with their arithmetic in C++, and that C++.
FAST_CELLS = Path(__file__).with_name("fast_cells.v")
FAST_CELLS_HEADER = Path(__file__).with_name("fast_cells.h")
_MODULES = ("fp32_add", "fp32_add_short", "fp32_mul", "word_mul", "mac_narrow", "mac_fp8x2")

_PORT = re.compile(
    r"(?:^|[(,])\s*(input|output)(?: reg| wire)?\s*(\[\d+:0\])?\s*(\w+)\b", re.MULTILINE
)


def _module(text: str, name: str) -> str:
    found = re.findall(rf"^module {name}\s*\(.*?^endmodule\n", text, re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        raise ToolError(f"module {name} stands {len(found)} times in the Verilog, not once")
    return str(found[0])


def ports(text: str, name: str) -> dict[str, tuple[str, str]]:
    """Ports of a module: name -> (direction, range; "" for one bit)."""
    found = _PORT.findall(_module(text, name))
    return {port: (direction, width) for direction, width, port in found}


def with_fast_cells(text: str, cells: str) -> str:
    """Returns the Verilog `text` with its floating-point cells replaced by those of `cells`.

    Cells that are not in `text` are left out. Raises ToolError if the ports or the latencies are
    not those of the gates.
    """
    latencies = (FP32_LATENCY, SHORT_LATENCY, MUL_LATENCY, PAIR_MUL_LATENCY, ADD_LATENCY)
    if latencies != (3, 2, 1, 3, 4):
        raise ToolError(f"{FAST_CELLS.name} is written for other latencies than the gates have")
    used = [cell for cell in _MODULES if re.search(rf"^module {cell}\s*\(", text, re.MULTILINE)]
    replaced = []
    for cell in used:
        if ports(text, cell) != ports(cells, cell):
            raise ToolError(f"{FAST_CELLS.name}: the ports of {cell} are not those of the gates")
        text = text.replace(_module(text, cell), "")
        replaced.append(_module(cells, cell))
    for function in re.findall(r"^module (fast_\w+)\(", cells, re.MULTILINE):
        replaced.append(_module(cells, function))
    return "\n".join([*replaced, text])


def with_calls(text: str) -> str:
    """Returns the Verilog `text` with a body for each module that stands for a C++ function."""
    for function in re.findall(r"^module (fast_\w+)\s*\(", text, re.MULTILINE):
        module = _module(text, function)
        pins = ports(text, function)
        call = cpp_call(function, {pin: pin for pin, (way, _) in pins.items() if way == "input"})
        body = f"  assign o = {call};\nendmodule\n"
        text = text.replace(module, module.replace("endmodule\n", body))
    return text


def with_held_inputs(text: str, name: str, top: str) -> str:
    """Returns the Verilog with a module `top` around the module `name`, of the same ports, that
    takes the inputs over at falling clock edges (the reset at rising ones).

    Verilator works out everything that hangs on a top-level input anew in every `eval`, and by way
    of the reset that is most of the chip. Behind registers it is worked out once a cycle.
    """
    lines, pins = [], []
    inside = ports(text, name)
    for port, (direction, width) in inside.items():
        source = port
        if direction == "input" and port != "clk":
            source = f"{port}_held"
            edge = "posedge" if port == "rst" else "negedge"
            lines += [
                f"  reg {width} {source} = 0;",
                f"  always @({edge} clk) {source} <= {port};",
            ]
        pins.append(f"    .{port}({source})")
    heading = ",\n".join(f"  {way} {width} {port}" for port, (way, width) in inside.items())
    body = [f"module {top}(\n{heading}\n);", *lines, f"  {name} inner(", ",\n".join(pins), "  );"]
    return "\n".join([text, *body, "endmodule", ""])
