"""What the simulator changes in the chip's Verilog: how inputs arrive, when what is worked out, and
for `rtl-fast` the floating-point cells."""

from __future__ import annotations

import collections
import itertools
import re
from pathlib import Path

from systolith_hdl.arith import FP32_LATENCY, SHORT_LATENCY
from systolith_hdl.config import CoreConfig
from systolith_hdl.core import gated_blocks
from systolith_hdl.tensor import ADD_LATENCY, MUL_LATENCY, PAIR_MUL_LATENCY
from systolith_hdl.toolchain import ToolError

from .lanes import MODULE, cpp_call

#: Cells with their arithmetic in C++, and that C++.
FAST_CELLS = Path(__file__).with_name("fast_cells.v")
FAST_CELLS_HEADER = Path(__file__).with_name("fast_cells.h")
_MODULES = ("fp32_add", "fp32_add_short", "fp32_mul", "word_mul", "mac_narrow", "mac_fp8x2")

_PORT = re.compile(
    r"(?:^|[(,])\s*(input|output)(?: reg| wire)?\s*(\[\d+:0\])?\s*(\w+)\b", re.MULTILINE
)


def _module(text: str, name: str) -> str:
    head = rf"^module {re.escape(name)}\s*\("
    found = re.findall(rf"{head}.*?^endmodule\n", text, re.MULTILINE | re.DOTALL)
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
        arguments = [pin for pin, (way, _) in pins.items() if way == "input"]
        call = cpp_call(function, arguments, 64 if pins["o"][1] == "[63:0]" else 32)
        body = f"  assign o = {call};\nendmodule\n"
        text = text.replace(module, module.replace("endmodule\n", body))
    return text


def with_held_inputs(text: str, name: str, top: str) -> str:
    """Returns the Verilog with a module `top` around the module `name`, of the same ports, that
    takes the inputs over at clock edges, as what drives them in the next cycle.

    Verilator works out everything that hangs on a top-level input anew in every `eval`, and by way
    of the reset that is most of the chip. Behind registers it is worked out once a cycle, and
    together with what hangs on the chip's own.
    """
    lines, pins = [], []
    inside = ports(text, name)
    for port, (direction, width) in inside.items():
        source = port
        if direction == "input" and port != "clk":
            source = f"{port}_held"
            lines += [
                f"  reg {width} {source} = 0;",
                f"  always @(posedge clk) {source} <= {port};",
            ]
        pins.append(f"    .{port}({source})")
    heading = ",\n".join(f"  {way} {width} {port}" for port, (way, width) in inside.items())
    body = [f"module {top}(\n{heading}\n);", *lines, f"  {name} inner(", ",\n".join(pins), "  );"]
    return "\n".join([text, *body, "endmodule", ""])


_INSTANCE = r"^  (\S+) +{name} +\(\n.*?^  \);\n"


def _with_clock(text: str, modules: dict[str, str], name: str, path: str, clock: str) -> None:
    """Gives a block another clock than its surroundings: changes `modules`, from `text` if they are
    not there yet. `clock` is known in the module `name`, in which the block has the `path`."""
    module = modules.setdefault(name, _module(text, name))
    block, _, rest = path.partition(".")
    found = list(re.finditer(_INSTANCE.format(name=block), module, re.MULTILINE | re.DOTALL))
    if len(found) != 1 or found[0][0].count(".clk(clk)") != 1:
        raise ToolError(f"{name} has {len(found)} blocks {block} with a clock of their own, not 1")
    instance, inner = found[0][0], found[0][1]
    if not rest:
        changed = instance.replace(".clk(clk)", f".clk({clock})")
    else:
        below = modules.setdefault(inner, _module(text, inner))
        changed = instance
        if f"  input {clock};\n" not in below:
            below = below.replace("(", f"({clock}, ", 1)
            modules[inner] = below.replace(");\n", f");\n  input {clock};\n", 1)
            changed = instance.replace(".clk(clk)", f".clk(clk), .{clock}({clock})")
        _with_clock(text, modules, inner, rest, clock)
    modules[name] = modules[name].replace(instance, changed)


def with_clock_gates(text: str, config: CoreConfig) -> str:
    """Returns the Verilog `text` with a clock gate before each block of the core that says when it
    is `awake`.

    What a block's registers alone determine, Verilator works out at the edges of that block's
    clock: what stands still costs nothing. The gate is the usual one, a latch that is open while
    the clock is low, so that nothing changes but the registers of a block in cycles in which, by
    its own word, none would change in a way that can be seen.
    """
    modules: dict[str, str] = {}
    blocks = gated_blocks(config)
    for block, bit in blocks.items():
        _with_clock(text, modules, "core", block, f"clk_{bit}")
    gates = []
    for bit in sorted(set(blocks.values())):
        gates += [
            f"  reg runs_{bit} = 1;",
            f"  always_latch if (!clk) runs_{bit} = awake[{bit}] | rst;",
            f"  wire clk_{bit} = clk & runs_{bit};",
        ]
    end = modules["core"].rindex("endmodule")
    modules["core"] = "\n".join([modules["core"][:end], *gates, modules["core"][end:]])
    for name, module in modules.items():
        text = text.replace(_module(text, name), module)
    return text


#: Writes of one word's lanes, each with an enable of its own.
_LANE_WRITES = re.compile(
    r"    if \(\w+\[\d+\]\)\n      (\w+\[\w+\])\[(\d+:0)\] <= (\w+)\[\2\];\n"
    r"(?:    if \(\w+\[\d+\]\)\n      \1\[(\d+:\d+)\] <= \3\[\4\];\n)+"
)
_LANE = re.compile(r"\((\w+\[\d+\])\)\n.*\[(\d+):(\d+)\] <=")


def with_whole_writes(text: str) -> str:
    """Returns the Verilog `text` with memories that are written in lanes written a word at a time.

    Verilator keeps each write of a memory aside until the end of the cycle: one is kept faster than
    N, of which each would be looked at in every cycle.
    """

    def whole(found: re.Match[str]) -> str:
        lanes = [(enable, int(high), int(low)) for enable, high, low in _LANE.findall(found[0])]
        if any(low != high + 1 for (_, high, _), (_, _, low) in itertools.pairwise(lanes)):
            return found[0]
        place, data = found[1], found[3]
        mask = ", ".join(f"{{{high - low + 1}{{{enable}}}}}" for enable, high, low in lanes[::-1])
        return (
            f"    if ({' | '.join(enable for enable, _, _ in lanes)})\n"
            f"      {place} <= ({data} & {{{mask}}}) | ({place} & ~{{{mask}}});\n"
        )

    return _LANE_WRITES.sub(whole, text)


_NAME = re.compile(r"\\\S+|[A-Za-z_]\w*")
_REGISTER = re.compile(r"  always @\(posedge (\w+)\)\n    (\\\S+ |\w+) <= (\\\S+|\w+) ?;\n")
_COMBINATIONAL = re.compile(
    r"  always @\* begin\n    if \(\S+ \) begin end\n((?:    .*\n)+?)  end\n"
)
_STATEMENT = re.compile(r"^ +(?![ /]).*;$", re.MULTILINE)
_ASSIGNMENT = re.compile(r"^( +)(\\\S+|\w+) *(\[[\d:]+\])? = ", re.MULTILINE)


def with_registers(text: str) -> str:
    """Returns the Verilog `text` with each register's next value worked out at its clock's edge.

    Yosys writes a register as two processes, one of them for its next value. Verilator works that
    one out whenever anything it reads has changed, which is nearly always; as a part of the other
    it waits for the edge, and that of a gated clock does not come.
    """
    return MODULE.sub(lambda module: _with_registers(module[0]), text)


def _with_registers(module: str) -> str:
    registers = {value: (clock, name) for clock, name, value in _REGISTER.findall(module)}
    uses = collections.Counter(_NAME.findall(module))
    done = set()

    def clocked(found: re.Match[str]) -> str:
        body = found[1]
        targets = [target for _, target, _ in _ASSIGNMENT.findall(body)]
        value = targets[0] if targets else ""
        # All that is done here is to assign it, and all else that it is in is its declaration and
        # its register: a value that is read, here or elsewhere, stays a signal.
        alone = set(targets) == {value} and len(targets) == len(_STATEMENT.findall(body))
        if value not in registers or not alone or uses[value] != 2 + len(targets):
            return found[0]
        done.add(value)
        clock, name = registers[value]
        changed = _ASSIGNMENT.sub(lambda place: f"{place[1]}{name}{place[3] or ''} <= ", body)
        # That it keeps its value goes without saying.
        kept = changed.removeprefix(f"    {name} <= {name};\n")
        return f"  always @(posedge {clock}) begin\n{kept}  end\n"

    module = _COMBINATIONAL.sub(clocked, module)
    return _REGISTER.sub(lambda found: "" if found[3] in done else found[0], module)
