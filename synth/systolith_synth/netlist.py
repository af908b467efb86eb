"""The elaborated design as text, taken apart into units that are synthesized one by one.

A unit is a module that is emitted once, or one directly below it; what is deeper is flattened
into its unit, and so are modules that only wrap an instance. Units of the same contents are one,
whatever they are called: the sequencer of the second DMA queue costs no run.

Source locations go through the tools as numbers, in order of appearance: an edit that only moves
lines leaves a unit's text as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from amaranth.lib import wiring
from systolith_hdl.config import CoreConfig
from systolith_hdl.core import chip_design
from systolith_hdl.emit import to_design
from systolith_hdl.toolchain import content_hash

_MODULE = re.compile(r"(?=^(?:attribute [^\n]*\n)*module \\)", re.MULTILINE)
_NAME = re.compile(r"^module \\(\S+)$", re.MULTILINE)
_INSTANCE = re.compile(r"^  cell \\(\S+) \\(\S+)$", re.MULTILINE)
_PORT = re.compile(
    r"^  wire width (\d+)(?: signed)? (input|output) (\d+)(?: signed)? +\\(\S+)$", re.MULTILINE
)
_SOURCE = re.compile(r'^( *attribute \\src ")([^"]*)"\n', re.MULTILINE)
_MEMORY = re.compile(r"^  memory width (\d+) size (\d+)(?: offset \d+)? \\(\S+)$", re.MULTILINE)
#: name that Amaranth gives a port made for a signal of another module, with a number that counts
#: through the whole design
_PORT_NAME = re.compile(r"(?<=\\)port\$\d+\$\d+")
#: where the names of modules are
_HEADS = re.compile(r"^(module |  cell )\\(\S+)( \S+)?$", re.MULTILINE)


class BlockError(ValueError):
    """A block is unknown in a design."""


#: Blocks by name, and their modules; a chip has the first of them that it contains. Any other
#: module is a block under its own name.
BLOCKS: dict[str, tuple[str, ...]] = {
    "tensor": ("core.tensor",),
    "tensor.mac": ("mac_narrow", "mac_fp8x2"),
    "tensor.pe": ("processing_element", "processing_element_fp8x2"),
    "vector": ("core.vector",),
    "vector.lane": ("vector_lane",),
    "vector.alu": ("vector_alu",),
    "scalar": ("core.scalar",),
    "scalar.lane": ("scalar_lane",),
    "arith.add": ("fp32_add",),
    "arith.mul": ("fp32_mul",),
    "arith.round": ("round_narrow",),
    "dma": ("dma_queue",),
    "sequencer": ("core.tensor_sequencer",),
    "semaphores": ("core.semaphores",),
    "sbuf": ("core.sbuf",),
    "psum": ("core.psum",),
    "host": ("chip.host",),
    "core": ("core",),
    "chip": ("chip",),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory in the source: where it is in its unit, its words and their width."""

    name: str
    width: int
    depth: int

    @property
    def bits(self) -> int:
        return self.width * self.depth


@dataclasses.dataclass
class Unit:
    """A part that is synthesized on its own.

    name : of the module in the design
    key : hash of its contents; the name of the module in the mapped netlist is ``u_KEY``
    text : RTLIL of module ``unit`` and what is flattened into it; children are black boxes
    children : the units placed in it, as often as they are, ``u_KEY`` -> times
    memories : those in it
    sources : source locations, ``path:line``; the text has their numbers
    """

    name: str
    key: str
    text: str
    children: dict[str, int]
    memories: list[Memory]
    sources: list[str]

    @property
    def module(self) -> str:
        return f"u_{self.key}"


class Design:
    """The modules of an elaborated design, and the one at the top.

    Parameters
    ----------
    rtlil : text of `to_design`
    top : name of the top module
    """

    def __init__(self, rtlil: str, top: str) -> None:
        self.top = top
        self._modules: dict[str, str] = {}
        self._units: dict[str, Unit] = {}
        for chunk in _MODULE.split(rtlil):
            name = _NAME.search(chunk)
            if name and name[1] not in self._modules:
                self._modules[name[1]] = chunk
        _renumber_ports(self._modules)

    @classmethod
    def of_component(cls, component: wiring.Component, name: str) -> Design:
        """Elaborates a component."""
        return cls(to_design(component, name), name)

    @classmethod
    def of_chip(cls, config: CoreConfig) -> Design:
        """Elaborates a chip."""
        return cls(chip_design(config), "chip")

    def block(self, name: str) -> Design:
        """The same design with a block of it at the top (see `BLOCKS`)."""
        for module in BLOCKS.get(name, (name,)):
            if module in self._modules:
                part = Design("", module)
                part._modules = self._modules
                return part
        raise BlockError(
            f"unknown block {name!r}; the blocks are {', '.join(BLOCKS)}, and every module of the "
            "chip under its own name"
        )

    def ports(self, module: str | None = None) -> list[tuple[str, int, bool]]:
        """Ports of a module, the top by default: (name, width, whether it is an input)."""
        return [
            (name, int(width), direction == "input")
            for width, direction, _, name in _PORT.findall(self._modules[module or self.top])
        ]

    def _instances(self, module: str) -> list[tuple[str, str]]:
        """(module, instance) of what a module places."""
        return [(m, i) for m, i in _INSTANCE.findall(self._modules[module]) if m in self._modules]

    @functools.cache  # noqa: B019  (a design lives as long as the process)
    def _is_unit(self, module: str) -> bool:
        if module == self.top:
            return True
        if module.count(".") > 1:
            return False
        cells = re.findall(r"^  (?:cell|process) ", self._modules[module], re.MULTILINE)
        return len(cells) > 1 or not self._instances(module)

    def _inside(self, module: str, path: str = "") -> Iterator[tuple[str, str]]:
        """(module, path) of what is flattened into a unit, itself first."""
        yield module, path
        for child, instance in self._instances(module):
            if not self._is_unit(child):
                yield from self._inside(child, f"{path}{instance}.")

    def units(self) -> list[Unit]:
        """All units, children before those that place them, the top last. Each of them once: units
        of the same contents share the `key`."""
        found = self._units

        def visit(module: str) -> Unit:
            if module in found:
                return found[module]
            inside = list(self._inside(module))
            placed = [
                child
                for inner, _ in inside
                for child, _ in self._instances(inner)
                if self._is_unit(child)
            ]
            units = {child: visit(child) for child in dict.fromkeys(placed)}
            names = {child: unit.module for child, unit in units.items()}
            inner_names = dict.fromkeys(inner for inner, _ in inside)
            for number, inner in enumerate(inner_names):
                names[inner] = f"part{number}" if number else "unit"

            text = _HEADS.sub(
                lambda m: f"{m[1]}\\{names.get(m[2], m[2])}{m[3] or ''}",
                "".join(self._modules[inner] for inner in inner_names),
            )
            sources: list[str] = []
            text = _SOURCE.sub(functools.partial(_number, sources), text)
            stubs = {unit.module: child for child, unit in units.items()}
            text += "".join(self._stub(child, name) for name, child in stubs.items())
            children: dict[str, int] = {}
            for child in placed:
                children[names[child]] = children.get(names[child], 0) + 1
            memories = [
                Memory(path + name, int(width), int(depth))
                for inner, path in inside
                for width, depth, name in _MEMORY.findall(self._modules[inner])
            ]
            unit = Unit(module, content_hash(text), text, children, memories, sources)
            found[module] = unit
            return unit

        if not found:
            visit(self.top)
        return list(found.values())

    def _stub(self, module: str, name: str) -> str:
        """A black box with the ports of a module."""
        lines = [
            f"  wire width {width} {direction} {number} \\{port}\n"
            for width, direction, number, port in _PORT.findall(self._modules[module])
        ]
        return f"attribute \\blackbox 1\nmodule \\{name}\n{''.join(lines)}end\n"

    def locate(self, name: str, source: str = "") -> tuple[str, str]:
        """Says where a net or cell of the flat netlist is from.

        Parameters
        ----------
        name : its name
        source : its ``src`` attribute

        Returns the path of the innermost module that the name tells, without the instances of
        wrappers, and the source locations, ``path:line``; empty if unknown."""
        self.units()
        module, path, rest = self.top, [], name
        unit = self._units[module]
        while True:
            step = max(
                (pair for pair in self._instances(module) if rest.startswith(pair[1] + ".")),
                key=lambda pair: len(pair[1]),
                default=None,
            )
            if step is None:
                break
            module = step[0]
            unit = self._units.get(module, unit)
            path.append(step[1])
            rest = rest[len(step[1]) + 1 :]
        numbers = [int(n) for n in re.findall(r"@(\d+)", source)]
        places = [unit.sources[n] for n in numbers if n < len(unit.sources)]
        return ".".join(p for p in path if p != "cell") or self.top, ", ".join(places)


def _renumber_ports(modules: dict[str, str]) -> None:
    """Numbers the ports that Amaranth made within each module: so equal modules have equal texts,
    and an edit of one module leaves the others alone."""
    numbers: dict[str, dict[str, str]] = {}
    for module, text in modules.items():
        made = dict.fromkeys(_PORT_NAME.findall(text))
        numbers[module] = {name: f"port${number}" for number, name in enumerate(made)}

    for module, text in modules.items():
        lines = []
        ports: dict[str, str] = {}
        for line in text.split("\n"):
            if line.startswith("  cell "):
                ports = numbers.get(line.split()[1].removeprefix("\\"), {})
            head = ""
            if line.startswith("    connect "):
                # The port is the instance's; what is connected is this module's.
                port, line = line[12:].split(" ", 1)
                head = (
                    "    connect " + _PORT_NAME.sub(functools.partial(_renamed, ports), port) + " "
                )
            lines.append(head + _PORT_NAME.sub(functools.partial(_renamed, numbers[module]), line))
        modules[module] = "\n".join(lines)


def _renamed(names: dict[str, str], match: re.Match[str]) -> str:
    return names.get(match[0], match[0])


def _number(sources: list[str], match: re.Match[str]) -> str:
    """Puts a number in place of a source location; those outside of the project vanish."""
    location = match[2]
    if not location.startswith("hdl/") or location.startswith("hdl/systolith_hdl/emit.py"):
        return ""
    if location not in sources:
        sources.append(location)
    return f'{match[1]}@{sources.index(location)}"\n'
