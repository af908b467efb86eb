"""Emission: Amaranth components to one Verilog text, with repeated components emitted once.

Amaranth emits every instance of a submodule as a module of its own. `Once` instead elaborates
its component a single time, under a fixed module name, and places it with an `Instance`: a
systolic array then stays as small in Verilog as it is in Python, which keeps Verilator builds
short. The wrapper has the component's own signature, so a parent cannot tell the two apart.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amaranth.back import rtlil, verilog
from amaranth.hdl import ClockSignal, Const, Instance, Module, ResetSignal, Value, ValueCastable
from amaranth.hdl._ir import PortDirection
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from .toolchain import cached, content_hash, use_yosys

_emit_memory = rtlil.ModuleEmitter.emit_memory


def _emit_contents(emitter: rtlil.ModuleEmitter, index: int, cell: Any) -> None:
    """Leaves out initial contents that are all zero: block RAM and Verilator's memories power up at
    zero anyway, and spelled out, bit by bit, they would take a third of the time and megabytes."""
    if any(cell.init):
        _emit_memory(emitter, index, cell)


rtlil.ModuleEmitter.emit_memory = _emit_contents

#: module name -> RTLIL text of every component emitted once in this process
_emitted: dict[str, str] = {}


def _ports(component: wiring.Component) -> list[tuple[str, Value, bool]]:
    found = []
    for path, member, value in component.signature.flatten(component):
        if isinstance(value, ValueCastable):
            value = Value.cast(value)
        if isinstance(value, Const):  # the ready or valid of an always-ready or -valid stream
            continue
        found.append(("__".join(map(str, path)), value, member.flow is In))
    return found


def to_rtlil(component: wiring.Component, name: str) -> str:
    """Elaborates a component into RTLIL under the module name `name`, its ports named
    ``member__submember``. Zero-width members are left out."""
    ports = {
        port: (value, PortDirection.Input if is_input else PortDirection.Output)
        for port, value, is_input in _ports(component)
    }
    return str(rtlil.convert(component, name=name, ports=ports))


class Once(wiring.Component):
    """A component that is emitted once per process and placed as an `Instance`.

    Parameters
    ----------
    component : the component, not yet elaborated; every use of `name` must be the same design
    name : module name in the Verilog
    reset : resets the component; the surrounding domain's reset by default
    """

    def __init__(
        self, component: wiring.Component, name: str, *, reset: Value | None = None
    ) -> None:
        self._component = component
        self._name = name
        self._reset = ResetSignal() if reset is None else reset
        component._MustUse__used = True  # only the first of a name is elaborated, on purpose
        super().__init__(component.signature)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self._name not in _emitted:
            _emitted[self._name] = ""  # reserved: nested `Once` of the same name is an error
            _emitted[self._name] = to_rtlil(self._component, self._name)
        text = _emitted[self._name]
        head = text[text.rindex(f"module \\{self._name}\n") :].split("\n  end", 1)[0]
        wires: dict[str, object] = {}
        for port, value, is_input in _ports(self):
            if len(value):
                wires[f"{'i' if is_input else 'o'}_{port}"] = value
        for clock, signal in (("clk", ClockSignal()), ("rst", self._reset)):
            if re.search(rf"wire width 1 input \d+ +\\{clock}\n", head):
                wires[f"i_{clock}"] = signal
        m.submodules.cell = Instance(self._name, **wires)
        return m


def _connected(to: Any, value: Any) -> Any:
    """One member connected to another of its shape."""
    return Value.cast(to).eq(Value.cast(value))


#: Module name of `side_by_side`: name of the component, number of lanes.
LANES_NAME = re.compile(r"(\w+)_x(\d+)")


class _Lanes(wiring.Component):
    """See `side_by_side`."""

    def __init__(
        self, component: wiring.Component, name: str, count: int, shared: frozenset[str]
    ) -> None:
        self._component = component
        self._name = name
        self._count = count
        self._shared = shared
        members = component.signature.members
        unknown = sorted(shared - set(members))
        if unknown:
            raise ValueError(f"{name} has no {', '.join(unknown)}; its members: {list(members)}")
        component._MustUse__used = True  # only the first of a name is elaborated, on purpose
        super().__init__(
            {
                member: port if member in shared else port.array(count)
                for member, port in members.items()
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for lane in range(self._count):
            m.submodules[f"lane{lane}"] = cell = Once(self._component, self._name)
            for member, port in self.signature.members.items():
                outside, inside = getattr(self, member), getattr(cell, member)
                if member not in self._shared:
                    outside = outside[lane]
                ends = (inside, outside) if port.flow is In else (outside, inside)
                m.d.comb += _connected(*ends)
        return m


def side_by_side(
    component: wiring.Component, name: str, count: int, *, shared: Iterable[str] = ()
) -> Once:
    """`count` copies of a component side by side, emitted once, in a module ``{name}_x{count}``.

    The simulator works such a module out in one loop (`systolith.runtime.lanes`), so everything
    that the chip has once per lane belongs in one.

    Parameters
    ----------
    component : not yet elaborated; its members are ports of one signal each
    name : its module name
    count : number of copies
    shared : inputs that all copies have in common; of every other member `m` the result has a
        list, ``m[0]`` to ``m[count - 1]``
    """
    return Once(_Lanes(component, name, count, frozenset(shared)), f"{name}_x{count}")


#: Module name of `grid`: name of the component, rows, columns.
GRID_NAME = re.compile(r"(\w+)_grid(\d+)x(\d+)")


class _Row(wiring.Component):
    """One row of a `grid`: what goes right has one input, what goes down an input and an output for
    each column."""

    def __init__(
        self, component: wiring.Component, name: str, columns: int, down: frozenset[str]
    ) -> None:
        self._component = component
        self._name = name
        self._columns = columns
        members = component.signature.members
        links = {member.removesuffix("_in") for member in members if member.endswith("_in")}
        if {f"{link}{end}" for link in links for end in ("_in", "_out")} != set(members):
            raise ValueError(
                f"{name}: members of a grid are pairs x_in, x_out, not {list(members)}"
            )
        if not down <= links:
            raise ValueError(f"{name} has no {', '.join(sorted(down - links))}")
        component._MustUse__used = True  # only the first of a name is elaborated, on purpose
        self.down = sorted(down)
        self.right = sorted(links - down)
        super().__init__(
            {f"{link}_in": members[f"{link}_in"] for link in self.right}
            | {
                f"{link}{end}": members[f"{link}{end}"].array(columns)
                for link in self.down
                for end in ("_in", "_out")
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        left = {link: getattr(self, f"{link}_in") for link in self.right}
        for column in range(self._columns):
            m.submodules[f"column{column}"] = cell = Once(self._component, self._name)
            for link in self.right:
                m.d.comb += _connected(getattr(cell, f"{link}_in"), left[link])
                left[link] = getattr(cell, f"{link}_out")
            for link in self.down:
                above, below = (getattr(self, f"{link}{end}")[column] for end in ("_in", "_out"))
                m.d.comb += _connected(getattr(cell, f"{link}_in"), above)
                m.d.comb += _connected(below, getattr(cell, f"{link}_out"))
        return m


class _Grid(wiring.Component):
    """See `grid`."""

    def __init__(
        self, component: wiring.Component, name: str, rows: int, columns: int, down: frozenset[str]
    ) -> None:
        self._rows = rows
        self._name = f"{name}_row{columns}"
        self._row = _Row(component, name, columns, down)
        members = self._row.signature.members
        super().__init__(
            {f"{link}_in": members[f"{link}_in"].array(rows) for link in self._row.right}
            | {f"{link}{end}": members[f"{link}{end}"] for link in down for end in ("_in", "_out")}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        above = {link: getattr(self, f"{link}_in") for link in self._row.down}
        for number in range(self._rows):
            m.submodules[f"row{number}"] = row = Once(self._row, self._name)
            for link in self._row.right:
                m.d.comb += _connected(
                    getattr(row, f"{link}_in"), getattr(self, f"{link}_in")[number]
                )
            for link in self._row.down:
                for to, value in zip(getattr(row, f"{link}_in"), above[link], strict=True):
                    m.d.comb += _connected(to, value)
                above[link] = getattr(row, f"{link}_out")
        for link in self._row.down:
            for to, value in zip(getattr(self, f"{link}_out"), above[link], strict=True):
                m.d.comb += _connected(to, value)
        return m


def grid(
    component: wiring.Component, name: str, rows: int, columns: int, *, down: Iterable[str]
) -> Once:
    """Copies of a component in rows and columns, each linked to its neighbours, emitted once, in a
    module ``{name}_grid{rows}x{columns}``. The simulator works it out in one loop as well.

    Parameters
    ----------
    component : not yet elaborated; its members are pairs, an output `x_out` that leads to the input
        `x_in` of the next copy
    name : its module name
    down : the pairs `x` of which the next copy is that below; of the others it is that to the right

    Of a pair that goes right the result has the inputs of the leftmost copies, ``x_in[0]`` to
    ``x_in[rows - 1]``; of one that goes down the inputs of the topmost and the outputs of the
    lowest, ``x_in[0]`` and ``x_out[0]`` to ``x_in[columns - 1]`` and ``x_out[columns - 1]``.
    """
    whole = _Grid(component, name, rows, columns, frozenset(down))
    return Once(whole, f"{name}_grid{rows}x{columns}")


def _relative(rtlil: str) -> str:
    """Source locations without the folders above the project and above installed packages."""
    root = Path(__file__).parent.parent.parent
    rtlil = rtlil.replace(f'\\src "{root}/hdl/', '\\src "hdl/')
    return re.sub(r'(?<=\\src ")/[^"\n]*?(?:site|dist)-packages/', "", rtlil)


def to_design(component: wiring.Component, name: str) -> str:
    """Elaborates `component` and everything it places into one RTLIL text, source locations
    included, without what differs between checkouts."""
    _emitted.clear()
    collecting = gc.isenabled()
    gc.disable()  # millions of small objects, nearly all of which stay: a quarter of the time
    try:
        texts = [to_rtlil(component, name)]
    finally:
        if collecting:
            gc.enable()
    for text in _emitted.values():
        texts.append(re.sub(r"^\s*attribute \\top 1\n", "", text, flags=re.MULTILINE))
    return _relative("\n".join(texts))


def verilog_of(design: str) -> str:
    """The Verilog of a text of `to_design`, cached by its content."""
    use_yosys()
    # An edit that only moves lines changes nothing.
    whole = re.sub(r"^\s*attribute \\src .*\n", "", design, flags=re.MULTILINE)
    return cached(
        f"verilog-{content_hash(whole)}.v",
        lambda: verilog._convert_rtlil_text(whole, strip_internal_attrs=True),
    )


def to_verilog(component: wiring.Component, name: str) -> str:
    """Emits `component` and everything it places as one Verilog text, cached by content."""
    return verilog_of(to_design(component, name))
