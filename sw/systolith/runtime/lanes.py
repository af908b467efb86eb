"""Lanes in one loop: what lets the simulator keep pace with N lanes.

Verilator writes out every instance of a component, so N lanes are N copies of the same code, far
more than a processor's caches hold, and no vector instructions. Here each module that
`systolith_hdl.emit.side_by_side` made, N copies of a component, or `grid`, N x N of them, becomes a
module of the same ports that calls C++: a loop over the lanes, of which the compiler makes vector
instructions. So does each `systolith_hdl.tensor.delay.skew`.

The loop's body is the component itself. Yosys flattens it to cells of one operation each, whose
meaning Yosys documents; each becomes one C++ expression, in the order in which they depend on each
other. Registers live in C++, an array each. Nothing of the design is abstracted: the bits are those
of the Verilog that the lanes replace, cycle by cycle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from systolith_hdl.emit import GRID_NAME, LANES_NAME
from systolith_hdl.tensor.delay import skew_delays
from systolith_hdl.toolchain import ToolError, cache_dir, content_hash, yosys

#: A module of Yosys' Verilog, and its name.
MODULE = re.compile(r"^module (\S+?) ?\(.*?^endmodule\n", re.MULTILINE | re.DOTALL)
_INSTANCE = re.compile(r"^ +(\\\S+|\w+) +(?:\\\S+ |\w+) ?\(", re.MULTILINE)
_PORT = re.compile(r"^  (input|output) (?:\[(\d+):0\] )?(\\\S+|\w+) ?;", re.MULTILINE)
#: Modules that stand for C++ functions of fast_cells.h.
_CALL = re.compile(r"^module (fast_\w+)", re.MULTILINE)

_FLATTEN = """\
hierarchy -check -top {name}
proc
flatten
opt_clean
opt_expr -mux_undef -undriven
opt_merge
wreduce
memory_collect
opt_expr
opt_clean -purge
write_json {name}.json
"""

#: Contents of a memory, one word a line, of enough words to be worth it.
_CONTENTS = re.compile(
    r"^  initial begin\n((?:    \S+\[\d+\] = \d+'h[0-9a-f]+;\n){64,})  end\n", re.MULTILINE
)

_HEADER_HEAD = """\
#pragma once
#include <cstdint>
#include "fast_cells.h"
"""

_CPP_HEAD = """\
#include <cstring>
#include "lanes.h"

using systolith::pick;
"""

Bit = int | str  # as in Yosys' JSON: the number of a net's bit, or "0", "1", "x", "z"


def _modules(text: str) -> dict[str, str]:
    """The modules of a Verilog text, by name."""
    return {found[1].lstrip("\\"): found[0] for found in MODULE.finditer(text)}


def _parts(modules: dict[str, str], name: str) -> str:
    """The text of a module and of all that it places, each once."""
    found = [name]
    for current in found:
        for match in _INSTANCE.finditer(modules[current]):
            child = match[1].lstrip("\\")
            if child in modules and child not in found:
                found.append(child)
    return "".join(modules[part] for part in sorted(found))


def _without_contents(text: str, taken: list[list[int]]) -> str:
    """Returns the text with large contents of memories moved to `taken`: Yosys takes a millisecond
    for each word of them. Word 0 is their place in `taken` then, the others are undefined."""

    def take(found: re.Match[str]) -> str:
        lines = found[1].splitlines(keepends=True)
        head = lines[0].split("'h")[0]
        width = int(head.rsplit(" ", 1)[1])
        if not head.strip().split(" ")[0].endswith("[0]") or len(taken) >> width:
            return found[0]
        taken.append([int(line.split("'h")[1].rstrip(";\n"), 16) for line in lines])
        return f"  initial begin\n{head}'h{len(taken) - 1:x};\n  end\n"

    return _CONTENTS.sub(take, text)


def _put_contents(netlist: dict[str, Any], taken: list[list[int]]) -> None:
    """Puts back into the memories of a netlist what `_without_contents` took."""
    for cell in netlist["cells"].values():
        if cell["type"] != "$mem_v2":
            continue
        parameters = cell["parameters"]
        width, init = int(parameters["WIDTH"], 2), parameters["INIT"]
        if set(init[:-width]) == {"x"} and "x" not in init[-width:]:
            words = taken[int(init[-width:], 2)]
            rest = "x" * (len(init) - width * len(words))
            parameters["INIT"] = rest + "".join(f"{word:0{width}b}" for word in reversed(words))


def _flatten(sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Flat netlists of components, each from the text of the modules it is made of; cached."""
    paths = {
        name: cache_dir() / f"lane-{content_hash(_FLATTEN, name, text)}.json"
        for name, text in sources.items()
    }
    missing = [name for name in sources if not paths[name].exists()]
    if missing:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            script = []
            contents: dict[str, list[list[int]]] = {name: [] for name in missing}
            for name in missing:
                (folder / f"{name}.v").write_text(_without_contents(sources[name], contents[name]))
                script += ["design -reset", f"read_verilog {name}.v"]
                script += [f"blackbox {function}" for function in _CALL.findall(sources[name])]
                script.append(_FLATTEN.format(name=name))
            (folder / "flatten.ys").write_text("\n".join(script))
            done = subprocess.run(
                [yosys(), "-q", "flatten.ys"],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise ToolError(f"Yosys failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            for name in missing:
                unfinished = paths[name].with_suffix(f".{os.getpid()}.tmp")
                design = json.loads((folder / f"{name}.json").read_text())
                _put_contents(design["modules"][name], contents[name])
                unfinished.write_text(json.dumps(design))
                unfinished.replace(paths[name])
    return {name: json.loads(path.read_text())["modules"][name] for name, path in paths.items()}


def _mask(width: int) -> str:
    return f"{(1 << width) - 1:#x}{'ull' if width > 32 else 'u'}"


def _type(width: int) -> str:
    return "uint32_t" if width <= 32 else "uint64_t"


@dataclasses.dataclass(frozen=True)
class _Port:
    """A port of a component, as one argument of C++ or, if wider than 64 bits, several."""

    name: str
    is_input: bool
    bits: list[Bit]

    @property
    def pieces(self) -> list[tuple[str, list[Bit]]]:
        stem = re.sub(r"\W", "_", self.name)
        chunks = [self.bits[first : first + 64] for first in range(0, len(self.bits), 64)]
        return [(f"{stem}_p{number}", chunk) for number, chunk in enumerate(chunks)]


class Component:
    """A flat netlist as C++ expressions.

    Parameters
    ----------
    name : for messages
    netlist : module of Yosys' JSON
    """

    def __init__(self, name: str, netlist: dict[str, Any]) -> None:
        self._name = name
        self.ports = [
            _Port(port, description["direction"] == "input", description["bits"])
            for port, description in netlist["ports"].items()
            if port != "clk"
        ]
        #: bit -> (variable, place in it)
        self._place: dict[Bit, tuple[str, int]] = {}
        #: variable -> cell whose output it is
        self._cells: dict[str, dict[str, Any]] = {}
        #: variable of a register -> its cell
        self.registers: dict[str, dict[str, Any]] = {}
        self.tables: list[str] = []
        self._initial: dict[Bit, str] = {}
        for net in netlist["netnames"].values():
            init = net["attributes"].get("init")
            if init is not None:
                for bit, value in zip(net["bits"], reversed(init), strict=False):
                    self._initial[bit] = value
        for port in self.ports:
            if port.is_input:
                for variable, bits in port.pieces:
                    self._define(variable, bits)
        for number, (label, cell) in enumerate(netlist["cells"].items()):
            kind, pins = cell["type"], cell["connections"]
            cell["parameters"] = {
                key: value if key in ("INIT", "MEMID") else int(value.replace("x", "0"), 2)
                for key, value in cell.get("parameters", {}).items()
                if not isinstance(value, str) or set(value) <= {"0", "1", "x"}
            }
            if kind == "$dff":
                if cell["parameters"]["CLK_POLARITY"] != 1:
                    raise ToolError(f"{name}: register {label} has another clock")
                self.registers[f"r{number}"] = cell
                self._define(f"r{number}", pins["Q"])
            elif kind == "$mem_v2":
                self._memory(number, label, cell)
            else:
                output = "Y" if "Y" in pins else "o"
                if output not in pins or len(pins[output]) > 64:
                    raise ToolError(f"{name}: no loop can hold cell {label} of type {kind}")
                self._cells[f"v{number}"] = cell
                self._define(f"v{number}", pins[output])

    def _define(self, variable: str, bits: list[Bit]) -> None:
        for place, bit in enumerate(bits):
            self._place[bit] = (variable, place)

    def _memory(self, number: int, label: str, cell: dict[str, Any]) -> None:
        """A table that is never written, read at once."""
        parameters, pins = cell["parameters"], cell["connections"]
        width, size, reads = (parameters[key] for key in ("WIDTH", "SIZE", "RD_PORTS"))
        if parameters["WR_PORTS"] or parameters["RD_CLK_ENABLE"] or width > 64:
            raise ToolError(f"{self._name}: no loop can hold memory {label}")
        contents = cell["parameters"]["INIT"]
        words = [contents[len(contents) - width * (i + 1) :][:width] for i in range(size)]
        values = ", ".join(f"{int(word.replace('x', '0'), 2):#x}" for word in words)
        self.tables.append(f"const {_type(width)} t{number}[{size}] = {{{values}}};")
        address = len(pins["RD_ADDR"]) // reads
        for port in range(reads):
            variable = f"v{number}_{port}"
            self._cells[variable] = {
                "type": "table",
                "table": f"t{number}",
                "size": size,
                "connections": {
                    "A": pins["RD_ADDR"][port * address :][:address],
                    "Y": pins["RD_DATA"][port * width :][:width],
                },
            }
            self._define(variable, self._cells[variable]["connections"]["Y"])

    def initial(self, bits: list[Bit]) -> str:
        """C++ number that bits of registers, or constant ones, make after power-up."""
        digits = [str(self._initial.get(bit, bit if bit == "1" else "0")) for bit in reversed(bits)]
        return f"{int(''.join(digits).replace('x', '0'), 2):#x}{'ull' if len(bits) > 32 else 'u'}"

    def following(self, bits: list[Bit]) -> list[Bit]:
        """What bits of registers, or constant ones, will be after the next clock edge."""

        def after(bit: Bit) -> Bit:
            if isinstance(bit, str):
                return bit
            variable, place = self._place[bit]
            if variable not in self.registers:
                raise ToolError(f"{self._name}: {variable} is no register")
            following: Bit = self.registers[variable]["connections"]["D"][place]
            return following

        return [after(bit) for bit in bits]

    # -- Words.

    def word(self, bits: list[Bit], width: int | None = None) -> str:
        """C++ expression of a vector of bits, zero-extended to `width`."""
        kind = _type(width or len(bits))
        terms, constant, place = [], 0, 0
        while place < len(bits):
            bit = bits[place]
            if isinstance(bit, str):
                constant |= (bit == "1") << place
                place += 1
                continue
            variable, first = self._place[bit]
            count = 1
            if bits[place : place + 2].count(bit) == 2:  # a sign, repeated
                while place + count < len(bits) and bits[place + count] == bit:
                    count += 1
                term = f"({kind}(0) - {kind}({variable} >> {first} & 1))"
                if place + count < len(bits) or len(bits) not in (32, 64):
                    term = f"({term} & {_mask(count)})"
            else:
                while place + count < len(bits) and self._place.get(bits[place + count]) == (
                    variable, first + count,
                ):  # fmt: skip
                    count += 1
                term = f"{variable} >> {first}" if first else variable
                if first + count < self.width(variable):
                    term = f"({term} & {_mask(count)})"
                term = f"{kind}({term})"
            terms.append(f"({term} << {place})" if place else term)
            place += count
        if constant or not terms:
            terms.append(f"{kind}({constant:#x}ull)")
        return terms[0] if len(terms) == 1 else f"({' | '.join(terms)})"

    def width(self, variable: str) -> int:
        """Bits of a variable."""
        if variable in self._cells:
            pins = self._cells[variable]["connections"]
            return len(pins["Y"] if "Y" in pins else pins["o"])
        if variable in self.registers:
            return len(self.registers[variable]["connections"]["Q"])
        return next(
            len(bits) for port in self.ports for piece, bits in port.pieces if piece == variable
        )

    def _extended(self, bits: list[Bit], width: int, is_signed: bool) -> str:
        """A vector extended or cut to `width` bits."""
        if len(bits) > width:
            return self.word(bits[:width])
        text = self.word(bits, width)
        if not is_signed or len(bits) == width:
            return text
        size = 32 if width <= 32 else 64
        places = size - len(bits)
        text = f"{_type(width)}(int{size}_t({text} << {places}) >> {places})"
        return text if width == size else f"({text} & {_mask(width)})"

    def expression(self, variable: str) -> str:
        """C++ expression of a cell's output; every value is kept within its width."""
        cell = self._cells[variable]
        kind, pins = cell["type"], cell["connections"]
        if kind == "table":
            address = self.word(pins["A"])
            if 1 << len(pins["A"]) > cell["size"]:
                address = f"({address} < {cell['size']} ? {address} : 0)"
            return f"{cell['table']}[{address}]"
        if kind.startswith("fast_"):
            arguments = ", ".join(self.word(bits) for pin, bits in pins.items() if pin != "o")
            return f"{kind}({arguments})"
        parameters = cell["parameters"]
        width = len(pins["Y"])
        a = pins["A"]
        b = pins.get("B", [])
        a_signed = bool(parameters.get("A_SIGNED"))
        both = a_signed and bool(parameters.get("B_SIGNED"))

        def cut(text: str) -> str:
            return text if width in (32, 64) else f"({text}) & {_mask(width)}"

        if kind in ("$add", "$sub", "$mul", "$and", "$or", "$xor", "$xnor"):
            sign = {"$add": "+", "$sub": "-", "$mul": "*", "$and": "&", "$or": "|"}.get(kind, "^")
            text = f"{self._extended(a, width, both)} {sign} {self._extended(b, width, both)}"
            if kind == "$xnor":
                text = f"~({text})"
            return text if kind in ("$and", "$or", "$xor") else cut(text)
        if kind == "$not":
            return f"{self._extended(a, width, a_signed)} ^ {_mask(width)}"
        if kind in ("$neg", "$pos"):
            sign = "-" if kind == "$neg" else ""
            return cut(f"{sign}{self._extended(a, width, a_signed)}")
        if kind in ("$lt", "$le", "$gt", "$ge", "$eq", "$ne", "$eqx", "$nex"):
            sign = {"$lt": "<", "$le": "<=", "$gt": ">", "$ge": ">=", "$eq": "==", "$ne": "!="}[
                kind.removesuffix("x")
            ]
            size = 32 if max(len(a), len(b)) <= 32 else 64
            left, right = (self._extended(bits, size, both) for bits in (a, b))
            if both:
                left, right = f"int{size}_t({left})", f"int{size}_t({right})"
            return f"uint32_t({left} {sign} {right})"
        if kind in ("$reduce_or", "$reduce_bool", "$logic_not", "$reduce_and"):
            sign = "==" if kind in ("$logic_not", "$reduce_and") else "!="
            whole = _mask(len(a)) if kind == "$reduce_and" else "0"
            return f"uint32_t({self.word(a)} {sign} {whole})"
        if kind in ("$reduce_xor", "$reduce_xnor"):
            text = f"uint32_t(__builtin_parityll({self.word(a)}))"
            return text if kind == "$reduce_xor" else f"{text} ^ 1u"
        if kind in ("$logic_and", "$logic_or"):
            sign = "&" if kind == "$logic_and" else "|"
            return f"uint32_t({self.word(a)} != 0) {sign} uint32_t({self.word(b)} != 0)"
        if kind in ("$mux", "$pmux"):
            text = self.word(a, width)
            for place, select in enumerate(pins["S"]):
                choice = self.word(b[place * width : (place + 1) * width], width)
                text = f"pick({self.word([select])}, {choice}, {text})"
            return text
        if kind in ("$shl", "$sshl", "$shr", "$sshr", "$shift", "$shiftx"):
            if parameters.get("B_SIGNED"):
                raise ToolError(f"{self._name}: no loop can hold a {kind} by a signed number")
            return self._shift(kind, a, b, width, a_signed)
        raise ToolError(f"{self._name}: no loop can hold a cell of type {kind}")

    def _shift(self, kind: str, a: list[Bit], b: list[Bit], width: int, a_signed: bool) -> str:
        left = kind in ("$shl", "$sshl")
        inner = width if left else max(len(a), width)
        size = 32 if inner <= 32 else 64
        value = self._extended(a, inner, a_signed)
        amount = self.word(b, size)
        arithmetic = kind == "$sshr" and a_signed
        if arithmetic:
            value = f"int{size}_t({self._extended(a, size, True)})"
        text = f"{value} {'<<' if left else '>>'} {amount}"
        if (1 << len(b)) > size:  # farther than C++ can shift
            text = f"{value} {'<<' if left else '>>'} ({amount} & {size - 1})"
            beyond = f"{value} >> {size - 1}" if arithmetic else f"{_type(inner)}(0)"
            near = f"uint32_t({amount} < {size})"
            text = f"pick({near}, {_type(inner)}({text}), {_type(inner)}({beyond}))"
        return f"{_type(width)}({text}) & {_mask(width)}"

    # -- Order.

    def _reads(self, cell: dict[str, Any]) -> Iterable[str]:
        for pin, bits in cell["connections"].items():
            if pin not in ("Y", "o", "Q", "CLK"):
                for bit in bits:
                    if not isinstance(bit, str):
                        yield self._place[bit][0]

    def cone(self, bits: Iterable[Bit]) -> tuple[list[str], set[str]]:
        """Cells that a set of bits depends on, in order, and all variables they need."""
        order: list[str] = []
        seen: set[str] = set()
        open_: set[str] = set()
        roots = [self._place[bit][0] for bit in bits if not isinstance(bit, str)]
        stack = [(root, False) for root in roots]
        while stack:
            variable, left = stack.pop()
            if left:
                open_.discard(variable)
                order.append(variable)
                continue
            if variable in seen:
                continue
            seen.add(variable)
            if variable in self._cells:
                open_.add(variable)
                stack.append((variable, True))
                for read in dict.fromkeys(self._reads(self._cells[variable])):
                    if read in open_:
                        raise ToolError(f"{self._name}: {read} waits for itself")
                    stack.append((read, False))
        return order, seen

    def reads_table(self, bits: list[Bit]) -> bool:
        """Whether a set of bits depends on a table in the same cycle."""
        return any(self._cells[v]["type"] == "table" for v in self.cone(bits)[0])

    # -- Registers that stand still.

    def _zero(self, bit: Bit, shared: set[Bit]) -> frozenset[Bit] | None:
        """Bits of shared inputs that, all 0, make `bit` 0."""
        if isinstance(bit, str):
            return frozenset() if bit == "0" else None
        if bit in shared:
            return frozenset({bit})
        cell = self._cells.get(self._place[bit][0])
        if cell is None or cell["type"] not in ("$and", "$or", "$logic_and", "$logic_or"):
            return None
        sides = [cell["connections"][pin] for pin in ("A", "B")]
        if any(len(side) != 1 for side in sides):
            return None
        zeros = [self._zero(side[0], shared) for side in sides]
        if cell["type"] in ("$and", "$logic_and"):
            return zeros[0] if zeros[0] is not None else zeros[1]
        if zeros[0] is None or zeros[1] is None:
            return None
        return zeros[0] | zeros[1]

    def _holds(self, bits: list[Bit], held: list[Bit], shared: set[Bit]) -> frozenset[Bit] | None:
        """Bits of shared inputs that, all 0, make `bits` equal to `held`."""
        if bits == held:
            return frozenset()
        places = [self._place[bit] if not isinstance(bit, str) else None for bit in bits]
        if places[0] is None:
            return None
        variable, first = places[0]
        if places != [(variable, first + i) for i in range(len(bits))]:
            return None
        cell = self._cells.get(variable)
        if cell is None or cell["type"] not in ("$mux", "$pmux"):
            return None
        pins = cell["connections"]
        found = self._holds(pins["A"][first : first + len(bits)], held, shared)
        for select in pins["S"]:
            zero = self._zero(select, shared)
            if found is None or zero is None:
                return None
            found |= zero
        return found

    def gates(self, shared: set[Bit]) -> frozenset[Bit] | None:
        """Bits of shared inputs that, all 0, keep every register as it is, or None."""
        found: frozenset[Bit] = frozenset()
        for cell in self.registers.values():
            pins = cell["connections"]
            held = self._holds(pins["D"], pins["Q"], shared)
            if held is None:
                return None
            found |= held
        return found or None


def cpp_call(function: str, arguments: Iterable[str], width: int = 32) -> str:
    """Verilog's expression for what a C++ function returns."""
    passed = ', ", ", '.join(arguments)
    return f'$c{width}("{function}(", {passed}, ")")'


def _array_type(bits: list[Bit]) -> str:
    return "int unsigned" if len(bits) <= 32 else "longint unsigned"


def _array(name: str) -> str:
    """An array as an argument of `cpp_call`: where it is, so that nothing is copied."""
    return f'"&", {name}, "[0]"'


def _slice(port: _Port, number: int, bits: list[Bit]) -> str:
    """The bits of a port that its piece `number` has."""
    return f"[{64 * number + len(bits) - 1}:{64 * number}]" if len(port.bits) > 1 else ""


def _local(name: str) -> str:
    """A name as Verilog has it in text: an escaped one ends with a space."""
    return f"{name} " if name.startswith("\\") else name


#: name of an output's array -> type and number of its elements
_Outputs = dict[str, tuple[str, int]]


def _header(name: str, outputs: _Outputs, step: str | None, out: str | None) -> str:
    """What Verilator's C++ has to know of a module's: its functions, by their parameters, and where
    it puts its outputs, at the beginning of its state."""
    functions = [f"uint64_t {name}_new();", f"void {name}_delete(uint64_t handle);"]
    for function, parameters in (("step", step), ("out", out)):
        if parameters is not None:
            functions.append(f"uint32_t {name}_{function}({parameters});")
    return "\n".join(
        [
            f"struct alignas(64) {name}_outputs {{",
            *(
                f"    alignas(64) {kind} {array}[{count}];"
                for array, (kind, count) in outputs.items()
            ),
            "};",
            *functions,
            f"inline const {name}_outputs* {name}_words(uint64_t handle, uint32_t) {{",
            f"    return reinterpret_cast<const {name}_outputs*>(handle);",
            "}",
            "",
        ]
    )


def _wrapper(
    name: str,
    outer: str,
    body: list[str],
    step: list[str] | None,
    out: list[str] | None,
    results: list[tuple[str, str, int]],
) -> str:
    """A module with the ports of `outer` whose work C++ does.

    Parameters
    ----------
    body : lines before the calls
    step : arguments of ``{name}_step``, called at each clock edge; None if there is no register
    out : arguments of ``{name}_out``, called when one of them changes; None if the outputs follow
        from the registers alone, and `step` works them out
    results : outputs, and the C++ element and its bits that each is
    """
    ports = ",\n".join(
        f"  {'input wire' if way == 'input' else 'output wire'} [{high or 0}:0] {_local(port)}"
        for way, high, port in _PORT.findall(outer)
    )
    lines = [
        f"module {name}(\n{ports}\n);",
        *body,
        "  longint unsigned handle;",
        f'  initial handle = $c64("{name}_new()");',
        f'  final $c("{name}_delete(", handle, ");");',
        # Tell Verilator when the outputs are new.
        "  int unsigned tick = 0;",
        "  wire [31:0] ready;",
    ]
    if step is not None:
        call = cpp_call(f"{name}_step", ["handle", *step])
        lines.append(f"  always @(posedge clk) tick <= tick + {call};")
    ready = "tick" if out is None else cpp_call(f"{name}_out", ["handle", "tick", *out])
    lines.append(f"  assign ready = {ready};")
    for output, element, width in results:
        kind = 32 if width <= 32 else 64
        place = f'$c{kind}("{name}_words(", handle, ", ", ready, ")->{element}")'
        lines.append(f"  assign {output} = {place};")
    return "\n".join([*lines, "endmodule", ""])


@dataclasses.dataclass
class _Side:
    """A module of `count` copies of a component: its C++ and its Verilog."""

    name: str
    count: int
    component: Component
    outer: str  # the Verilog it replaces

    def __post_init__(self) -> None:
        ports = {name.lstrip("\\") for _, _, name in _PORT.findall(self.outer)}
        component = self.component
        self._shared = {p.name for p in component.ports if p.name in ports}
        self._outputs = [p for p in component.ports if not p.is_input]
        #: Registers that are kept, and their next values.
        self._kept = {r: cell["connections"]["D"] for r, cell in component.registers.items()}
        #: Variables that the outputs, and those that the next values of the registers depend on.
        #: Arguments that a function does not need would seem to Verilator a loop.
        self._read_by = {
            "out": component.cone(b for p in self._outputs for b in p.bits)[1],
            "step": component.cone(b for bits in self._kept.values() for b in bits)[1],
        }
        inputs = {piece for p in component.ports if p.is_input for piece, _ in p.pieces}
        #: The outputs follow from the registers alone.
        self._settled = bool(component.registers) and not self._read_by["out"] & inputs

    def _size(self, port: _Port) -> int:
        """Elements of the arrays that a port's pieces are passed in; 0 if it is not passed."""
        return self.count

    def _parameters(self, function: str) -> list[tuple[_Port, str, list[Bit]]]:
        """Inputs that `step` or `out` is passed: port, name, bits."""
        return [
            (port, piece, bits)
            for port in self.component.ports
            for piece, bits in port.pieces
            if port.is_input and piece in self._read_by[function]
        ]

    @property
    def _results(self) -> list[tuple[_Port, int, str, list[Bit]]]:
        """Pieces of the outputs that are passed: port, number, name, bits."""
        return [
            (port, number, piece, bits)
            for port in self._outputs
            for number, (piece, bits) in enumerate(port.pieces)
            if self._size(port)
        ]

    # -- C++.

    @property
    def _loop(self) -> list[str]:
        """The beginning of a loop over the copies, in which `i` is the number of one."""
        return ["#pragma GCC ivdep", f"    for (int i = 0; i < {self.count}; ++i) {{"]

    def _input(self, piece: str) -> str:
        """What copy `i` gets on an input that not all have in common."""
        return f"{piece}_[i]"

    def _body(self, roots: Iterable[Bit], stores: list[str]) -> list[str]:
        """A loop over the copies that works out `roots` and stores them."""
        component = self.component
        order, seen = component.cone(roots)
        lines = []
        for port in component.ports:
            for piece, bits in port.pieces if port.is_input else []:
                if piece in seen and port.name not in self._shared:
                    lines.append(f"const {_type(len(bits))} {piece} = {self._input(piece)};")
        for register, cell in component.registers.items():
            if register in seen:
                kind = _type(len(cell["connections"]["Q"]))
                lines.append(f"const {kind} {register} = s->{register}[i];")
        for variable in order:
            kind = _type(component.width(variable))
            lines.append(f"const {kind} {variable} = {component.expression(variable)};")
        return [*self._loop, *(f"        {line}" for line in [*lines, *stores]), "    }"]

    def _step(self) -> list[str]:
        """Loops that move all registers on. Reading a table makes no vector instruction, so what
        comes from one has a loop of its own, first and into `next`."""
        component = self.component
        looked_up = {r: d for r, d in self._kept.items() if component.reads_table(d)}
        lines = []
        for chosen, target in (
            (looked_up, "next_{}[i]"),
            ({r: d for r, d in self._kept.items() if r not in looked_up}, "s->{}[i]"),
        ):
            if chosen is looked_up:
                lines += [f"    {_type(len(d))} next_{r}[{self.count}];" for r, d in chosen.items()]
            stores = [f"{target.format(r)} = {component.word(d)};" for r, d in chosen.items()]
            if stores:
                lines += self._body([bit for d in chosen.values() for bit in d], stores)
        for register in looked_up:
            lines.append(f"    std::memcpy(s->{register}, next_{register}, sizeof(s->{register}));")
        return lines

    def _out(self) -> list[str]:
        """The loop that works out the outputs."""
        stores = [
            f"s->out.{piece}[i] = {self.component.word(bits)};"
            for _, _, piece, bits in self._results
        ]
        return self._body([b for *_, bits in self._results for b in bits], stores)

    def _state(self) -> list[str]:
        """Members of the state beside the registers, which are an array each."""
        return []

    def _power_up(self) -> list[str]:
        """What gives those members, all 0 at first, other values."""
        return []

    # Without registers: nothing is to be done while all inputs stand still.

    def _seen(self) -> list[str]:
        """Members of the state for the inputs of which the outputs are."""
        return [
            *(
                f"    alignas(64) {_type(len(bits))} seen_{piece}"
                f"{'' if port.name in self._shared else f'[{self._size(port)}]'};"
                for port, piece, bits in self._parameters("out")
            ),
            "    bool worked;",
        ]

    def _unless_same(self) -> list[str]:
        """What comes before the loop of `out`."""
        lines = ["    uint64_t news = !s->worked;", "    s->worked = true;"]
        for port, piece, _ in self._parameters("out"):
            if port.name in self._shared:
                lines += [
                    f"    news |= s->seen_{piece} ^ {piece};",
                    f"    s->seen_{piece} = {piece};",
                ]
            else:
                lines += [
                    f"    for (int i = 0; i < {self._size(port)}; ++i) {{",
                    f"        news |= s->seen_{piece}[i] ^ {piece}_[i];",
                    f"        s->seen_{piece}[i] = {piece}_[i];",
                    "    }",
                ]
        return [*lines, "    if (!news) return tick;"]

    def _signature(self, function: str) -> str:
        pieces = ["uint64_t handle"]
        if function == "out":
            pieces.append("uint32_t tick")
        for port, piece, bits in self._parameters(function):
            kind = _type(len(bits))
            shared = port.name in self._shared
            pieces.append(f"{kind} {piece}" if shared else f"const {kind}* __restrict {piece}_")
        return ", ".join(pieces)

    def header(self) -> str:
        """What Verilator's files have to know of the C++."""
        outputs = {
            piece: (_type(len(bits)), self._size(port)) for port, _, piece, bits in self._results
        }
        step = self._signature("step") if self.component.registers else None
        out = None if self._settled else self._signature("out")
        return _header(self.name, outputs, step, out)

    def cpp(self) -> str:
        component, name = self.component, self.name
        words = {r: component.registers[r]["connections"]["Q"] for r in self._kept}
        enter = [
            f"    using namespace {name};",
            "    State* __restrict s = reinterpret_cast<State*>(handle);",
        ]
        lines = [
            f"namespace {name} {{",
            *component.tables,
            "struct State {",
            f"    {name}_outputs out;",
            *(f"    alignas(64) {_type(len(q))} {r}[{self.count}];" for r, q in words.items()),
            *self._state(),
            *(self._seen() if not component.registers else []),
            "};",
        ]
        if self._settled:
            lines += ["void work(State* __restrict s) {", *self._out(), "}"]
        worked = ["    work(s);"] if self._settled else []
        lines += [
            "}",
            f"uint64_t {name}_new() {{",
            f"    using namespace {name};",
            "    auto* s = new State();",
            *(
                f"    for (auto& word : s->{register}) word = {component.initial(bits)};"
                for register, bits in words.items()
            ),
            *self._power_up(),
            *worked,
            "    return reinterpret_cast<uint64_t>(s);",
            "}",
            f"void {name}_delete(uint64_t handle) {{",
            f"    delete reinterpret_cast<{name}::State*>(handle);",
            "}",
        ]
        if component.registers:
            lines += [f"uint32_t {name}_step({self._signature('step')}) {{", *enter]
            shared: set[Bit] = {
                bit
                for port in component.ports
                if port.name in self._shared
                for bit in port.bits
                if not isinstance(bit, str)
            }
            gates = component.gates(shared)
            if gates:
                moving = " | ".join(component.word([bit]) for bit in sorted(gates, key=str))
                lines.append(f"    if (!({moving})) return 0;")
            lines += [*self._step(), *worked, "    return 1;", "}"]
        if not self._settled:
            lines += [f"uint32_t {name}_out({self._signature('out')}) {{", *enter]
            if not component.registers:
                lines += self._unless_same()
            lines += [*self._out(), "    return tick;", "}"]
        return "\n".join([*lines, ""])

    # -- Verilog.

    def verilog(self) -> str:
        lines = []
        escaped = {name.lstrip("\\"): name for _, _, name in _PORT.findall(self.outer)}
        for port in self.component.ports:
            for number, (piece, bits) in enumerate(port.pieces) if port.is_input else []:
                if port.name in self._shared:
                    continue
                lines.append(f"  {_array_type(bits)} {piece} [0:{self._size(port) - 1}];")
                for lane in range(self._size(port)):
                    part = _slice(port, number, bits)
                    lines.append(f"  assign {piece}[{lane}] = {port.name}__{lane}{part};")

        def arguments(function: str) -> list[str]:
            found = []
            for port, piece, bits in self._parameters(function):
                passed = _array(piece)
                if port.name in self._shared:
                    number = int(piece.rsplit("_p", 1)[1])
                    passed = f"{_local(escaped[port.name])}{_slice(port, number, bits)}"
                    # Verilator takes any bits above those passed.
                    if len(bits) % 32:
                        passed = f"{{{32 - len(bits) % 32}'b0, {passed}}}"
                found.append(passed)
            return found

        results = [
            (f"{port.name}__{lane}{_slice(port, number, bits)}", f"{piece}[{lane}]", len(bits))
            for port, number, piece, bits in self._results
            for lane in range(self._size(port))
        ]
        step = arguments("step") if self.component.registers else None
        out = None if self._settled else arguments("out")
        return _wrapper(self.name, self.outer, lines, step, out, results)


class _Grid(_Side):
    """A module of copies of a component in rows and columns, each linked to its neighbours.

    What goes from copy to copy comes from registers. These are not kept: the state has the words on
    the links instead, each where the next copy reads it, before and after the edge in turn, so that
    no step moves them. A link that goes right has a column more on the left, one that goes down a
    row more on top, for what comes from outside.
    """

    #: Words before a row's columns on a link to the right: as many as keep its stores aligned.
    _LEFT = 16

    def __init__(self, name: str, rows: int, columns: int, component: Component, outer: str):
        self._rows = rows
        self._columns = columns
        super().__init__(name, rows * columns, component, outer)
        #: Links: piece of an input -> whether it goes down, bits of the output that leads to it.
        self._links: dict[str, tuple[bool, list[Bit]]] = {
            piece.replace("_out_p", "_in_p"): (self._goes_down(port), bits)
            for port in self._outputs
            for piece, bits in port.pieces
        }
        if not self._settled:
            raise ToolError(f"{name}: no loop can hold a grid with a path from input to output")
        after = [b for _, bits in self._links.values() for b in component.following(bits)]
        kept: set[str] = set()
        while True:
            read = [b for register in kept for b in self._kept[register]]
            seen = component.cone([*after, *read])[1]
            found = seen & component.registers.keys()
            if found == kept:
                break
            kept = found
        self._kept = {register: d for register, d in self._kept.items() if register in kept}
        self._read_by["step"] = seen

    def _goes_down(self, port: _Port) -> bool:
        stem = port.name.removesuffix("_in").removesuffix("_out")
        return re.search(rf"\b{stem}_out__0\b", self.outer) is not None

    def _size(self, port: _Port) -> int:
        if self._goes_down(port):
            return self._columns
        return self._rows if port.is_input else 0

    @property
    def _loop(self) -> list[str]:
        return [
            f"    for (int row = 0; row < {self._rows}; ++row)",
            "#pragma GCC ivdep",
            f"    for (int column = 0; column < {self._columns}; ++column) {{",
            f"        const int i = row * {self._columns} + column;",
        ]

    def _input(self, piece: str) -> str:
        down, _ = self._links[piece]
        return f"before->{piece}[row][column{'' if down else f' + {self._LEFT - 1}'}]"

    def _step(self) -> list[str]:
        component = self.component
        lines = [
            "    State::Links* __restrict before = &s->links[s->now];",
            "    State::Links* __restrict after = &s->links[s->now ^ 1];",
            "    s->now ^= 1;",
        ]
        for port, piece, _ in self._parameters("step"):
            if port.name in self._shared:
                continue
            if self._links[piece][0]:
                lines.append(
                    f"    std::memcpy(before->{piece}, {piece}_, sizeof(*before->{piece}));"
                )
            else:
                lines.append(
                    f"    for (int row = 0; row < {self._rows}; ++row) "
                    f"before->{piece}[row][{self._LEFT - 1}] = {piece}_[row];"
                )
        words = {f"s->{register}[i]": d for register, d in self._kept.items()}
        for piece, (down, bits) in self._links.items():
            place = "[row + 1][column]" if down else f"[row][column + {self._LEFT}]"
            words[f"after->{piece}{place}"] = component.following(bits)
        stores = [f"{target} = {component.word(bits)};" for target, bits in words.items()]
        return lines + self._body([b for bits in words.values() for b in bits], stores)

    def _out(self) -> list[str]:
        last = f"s->links[s->now].{{}}[{self._rows}]"
        return [
            f"    std::memcpy(s->out.{piece}, {source}, sizeof({source}));"
            for _, _, piece, _ in self._results
            for source in [last.format(piece.replace("_out_p", "_in_p"))]
        ]

    def _state(self) -> list[str]:
        rows, columns = self._rows, self._columns
        lines = ["    struct alignas(64) Links {"]
        for piece, (down, bits) in self._links.items():
            sizes = f"[{rows + 1}][{columns}]" if down else f"[{rows}][{self._LEFT + columns}]"
            lines.append(f"        alignas(64) {_type(len(bits))} {piece}{sizes};")
        return [*lines, "    } links[2];", "    unsigned int now = 0;"]

    def _power_up(self) -> list[str]:
        return [
            f"    for (auto& links : s->links) for (auto& words : links.{piece}) "
            f"for (auto& word : words) word = {self.component.initial(bits)};"
            for piece, (_, bits) in self._links.items()
        ]


def _skew(name: str, width: int, delays: list[int], outer: str) -> tuple[str, str, str]:
    """Verilog, header and C++ of a module of `skew`, whose meaning is in its name: one ring for all
    words. A word that is not delayed goes through."""
    if width > 64:
        raise ToolError(f"{name}: no loop can hold delays of words of {width} bits")
    count = len(delays)
    depth = 1 << max(delays).bit_length()
    kind, element = _type(width), "int" if width <= 32 else "longint"
    puts = "\n".join(
        f"    s->words[(s->now + {delay}) & {depth - 1}][{k}] = i_[{k}];"
        for k, delay in enumerate(delays)
    )
    # A word goes to the place from which it is read when it is due.
    cpp = f"""\
namespace {name} {{
struct State {{
    {name}_outputs out;
    alignas(64) {kind} words[{depth}][{count}];
    unsigned int now;
}};
}}
uint64_t {name}_new() {{ return reinterpret_cast<uint64_t>(new {name}::State()); }}
void {name}_delete(uint64_t handle) {{ delete reinterpret_cast<{name}::State*>(handle); }}
uint32_t {name}_step(uint64_t handle, const {kind}* __restrict i_) {{
    auto* __restrict s = reinterpret_cast<{name}::State*>(handle);
{puts}
    s->now = (s->now + 1) & {depth - 1};
    std::memcpy(s->out.o, s->words[s->now], sizeof(s->out.o));
    return 1;
}}
"""
    header = _header(
        name, {"o": (kind, count)}, f"uint64_t handle, const {kind}* __restrict i_", None
    )
    lines = [f"  {element} unsigned i [0:{count - 1}];"]
    lines += [f"  assign i[{k}] = i__{k};" for k in range(count)]
    lines += [f"  assign o__{k} = i__{k};" for k, delay in enumerate(delays) if not delay]
    results = [(f"o__{k}", f"o[{k}]", width) for k, delay in enumerate(delays) if delay]
    return _wrapper(name, outer, lines, [_array("i")], None, results), header, cpp


def with_loops(text: str) -> tuple[str, str, str]:
    """Returns the Verilog `text` with every module of lanes made a loop, and the loops in C++: what
    Verilator's files have to include, and a file of its own."""
    modules = _modules(text)
    headers, cpp = [_HEADER_HEAD], [_CPP_HEAD]
    # name -> name of the component, how many: side by side, or rows and columns
    sides: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, module in modules.items():
        found = LANES_NAME.fullmatch(name) or GRID_NAME.fullmatch(name)
        if found and found[1] in modules:
            sides[name] = found[1], tuple(int(number) for number in found.groups()[1:])
        elif delays := skew_delays(name):
            verilog, header, loop = _skew(name, *delays, module)
            text = text.replace(module, verilog)
            headers.append(header)
            cpp.append(loop)
    netlists = _flatten({base: _parts(modules, base) for base, _ in sides.values()})
    components = {base: Component(base, netlist) for base, netlist in netlists.items()}
    for name, (base, counts) in sides.items():
        parts = components[base], modules[name]
        first, *rest = counts
        side = _Grid(name, first, rest[0], *parts) if rest else _Side(name, first, *parts)
        text = text.replace(modules[name], side.verilog())
        headers.append(side.header())
        cpp.append(side.cpp())
    return text, "\n".join(headers), "\n".join(cpp)
