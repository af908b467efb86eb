"""The golden device as a debugger: breakpoints, a look at everything, and checked execution."""

from __future__ import annotations

import dataclasses
import functools
import linecache
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from systolith_hdl.formats import FORMATS, INTEGERS, DType
from systolith_hdl.isa import SPECS, Opcode, Space, decode

from systolith.assembly import disassemble_instruction
from systolith.errors import DeviceError, RaceError, UndefinedError
from systolith.program import DebugInfo, Program

from .checks import Checks, Race, Step, Undefined, accesses
from .core import Core

if TYPE_CHECKING:
    from systolith.kernel import Tile, View

_decode = functools.lru_cache(maxsize=1 << 12)(decode)


class Moment:
    """An instruction that is about to execute, or just did, and the state of the core then.

    Members
    -------
    engine, index : name of the engine, index of the instruction in its stream
    instruction : as text
    source, label : of the statement it was made by, or None
    """

    def __init__(self, debugger: Debugger, step: Step, raw: bytes) -> None:
        self._core = debugger.core
        self._debugger = debugger
        self._raw = raw
        self.engine = self._core.config.engines[step.engine]
        self.index = step.pc
        self.instruction = disassemble_instruction(raw)
        info = debugger.info(step)
        self.source = info.source
        self.label = info.label

    def words(self, space: Space) -> np.ndarray:
        """A copy of a whole memory: uint32 [lanes, depth]."""
        return (self._core.psum if space is Space.PSUM else self._core.sbuf).copy()

    def view(self, view: View) -> np.ndarray:
        """What a view reads: float32 [lanes, *shape], of integer types int32 or uint32."""
        memory = self._core.psum if view.space is Space.PSUM else self._core.sbuf
        found = memory[: view.lanes, view.addresses()]
        if view.dtype is DType.UINT32:
            return found
        return found.view(np.int32 if view.dtype in INTEGERS else np.float32)

    def tile(self, tile: Tile) -> np.ndarray:
        """A whole tile: float32 [lanes, columns]."""
        return self.view(tile.view())

    def operand(self, name: str) -> np.ndarray:
        """What an operand of this instruction visits ("dst", "src0", "src1", "local"): float32
        [lanes, *counts]."""
        opcode, fields = decode(self._raw)
        if name not in SPECS[opcode].operands:
            known = ", ".join(SPECS[opcode].operands) or "none"
            raise DeviceError(f"{opcode.name} has no operand {name!r}; its operands: {known}")
        lanes = self._core.config.lanes
        access = next(found for found in accesses(opcode, fields, lanes) if found.operand == name)
        memory = self._core.psum if access.space is Space.PSUM else self._core.sbuf
        address = np.full((), access.base, np.int64)
        for count, stride in zip(access.counts, access.strides, strict=True):
            address = address[..., None] + np.arange(count) * stride
        return memory[: access.lanes, address].view(np.float32)

    def tensor(self, name: str) -> np.ndarray:
        """A copy of a tensor of the program, from DRAM."""
        program, addresses = self._debugger.program, self._debugger.addresses
        if program is None:
            raise DeviceError("the tensors of a program are known when a driver loads it")
        info = program.tensor(name)
        raw = self._core.dram[addresses[name] : addresses[name] + info.nbytes].tobytes()
        return np.frombuffer(raw, FORMATS[info.dtype].numpy).reshape(info.shape).copy()

    @property
    def semaphores(self) -> list[int]:
        """The counts of all semaphores."""
        return list(self._core.semaphores)

    def __str__(self) -> str:
        text = f"{self.engine}[{self.index}] {self.instruction}"
        return text + (f"  at {self.source}" if self.source else "")


@dataclasses.dataclass(eq=False)
class Breakpoint:
    """Where the debugger calls; made by `Debugger.breakpoint`. None matches everything."""

    action: Callable[[Moment], object]
    engine: str | None
    index: int | None
    label: str | None
    source: str | None
    after: bool
    hits: int = 0
    enabled: bool = True

    def _matches(self, engine: str, index: int, info: DebugInfo) -> bool:
        return (
            self.enabled
            and self.engine in (None, engine)
            and self.index in (None, index)
            and self.label in (None, info.label)
            and (self.source is None or _at(info.source, self.source))
        )


def _at(found: str | None, wanted: str) -> bool:
    """Whether a statement, ``path:line (function)``, is at ``file.py:12``, or in ``file.py``."""
    if found is None:
        return False
    place = found.partition(" (")[0]
    path = place.rpartition(":")[0]
    return any(text == wanted or text.endswith(f"/{wanted}") for text in (place, path))


class Debugger:
    """Follows what a golden core executes.

    Free when off: the core has no observer as long as nothing is checked and there is no
    breakpoint.

    Parameters
    ----------
    core : the core
    check : report races, and when a program has ended the use of undefined memory, see
        `systolith.golden.checks`; "races" for a program that may use what is there before it

    Members
    -------
    checks : of the program that runs, if it is checked
    program : what the driver started last
    """

    def __init__(self, core: Core, *, check: bool | Literal["races"] = False) -> None:
        self.core = core
        self.check = check
        self.program: Program | None = None
        self.addresses: dict[str, int] = {}
        self._breakpoints: list[Breakpoint] = []
        self.checks: Checks | None = None
        self._attach()

    def _attach(self) -> None:
        self.core.observer = self if self.check or self._breakpoints else None

    # -- for the user --------------------------------------------------------------------------

    def breakpoint(
        self,
        action: Callable[[Moment], object],
        *,
        engine: str | None = None,
        index: int | None = None,
        label: str | None = None,
        source: str | None = None,
        after: bool = False,
    ) -> Breakpoint:
        """Calls ``action(moment)`` before, or `after`, each instruction that matches everything
        given. What the action raises stops the program and resets the device.

        Parameters
        ----------
        engine, index : name of an engine; index in its stream
        label : given by the kernel, or the JAX primitive
        source : ``file.py:12`` or ``file.py``, with as much of the path as tells it apart
        """
        if engine is not None and engine not in self.core.config.engines:
            known = ", ".join(self.core.config.engines)
            raise DeviceError(f"no engine {engine!r}; the engines are {known}")
        made = Breakpoint(action, engine, index, label, source, after)
        self._breakpoints.append(made)
        self._attach()
        return made

    def remove(self, breakpoint: Breakpoint) -> None:
        """Takes a breakpoint away."""
        self._breakpoints.remove(breakpoint)
        self._attach()

    # -- what the driver tells -----------------------------------------------------------------

    def describe(self, program: Program, addresses: Mapping[str, int]) -> None:
        """The program that is started next, and where its tensors lie."""
        self.program = program
        self.addresses = dict(addresses)

    def info(self, step: Step) -> DebugInfo:
        """Where an instruction comes from."""
        if self.program is None:
            return DebugInfo(None)
        return self.program.debug_info(self.core.config.engines[step.engine], step.pc)

    # -- what the core tells -------------------------------------------------------------------

    def started(self) -> None:
        """See `Observer`."""
        self._raw: dict[Step, bytes] = {}
        if not self.check:
            return
        undefined = []
        if self.program is not None:
            for tensor in self.program.tensors:
                if tensor.kind in ("output", "scratch"):
                    start = self.addresses[tensor.name]
                    undefined.append((start, start + tensor.nbytes))
        memories = {Space.SBUF: self.core.sbuf, Space.PSUM: self.core.psum}
        self.checks = Checks(self.core.config, memories, self.core.tables, undefined)
        if self.check == "races":
            self.checks.define_everything()

    def waited(self, engine: int, semaphore: int, value: int, acquire: bool) -> None:
        """See `Observer`."""
        if self.checks is not None:
            self.checks.clocks.waited(engine, semaphore, value, acquire)

    def before(self, engine: int, pc: int, raw: bytes) -> None:
        """See `Observer`."""
        step = Step(engine, pc)
        self._stop_at(step, raw, after=False)
        if self.checks is None:
            return
        self._raw[step] = raw
        opcode, fields = _decode(raw)
        try:
            self.checks.before(step, opcode, fields, len(self.core.dram))
        except Race as race:
            raise self._race(race, step, opcode) from None

    def after(self, engine: int, pc: int, raw: bytes) -> None:
        """See `Observer`."""
        if self.checks is not None:
            self.checks.after(_decode(raw)[1])
        self._stop_at(Step(engine, pc), raw, after=True)

    def ended(self) -> None:
        """See `Observer`."""
        if self.checks is not None and self.checks.used is not None:
            raise self._undefined(self.checks.used)

    def _stop_at(self, step: Step, raw: bytes, *, after: bool) -> None:
        if not self._breakpoints:
            return
        name, info = self.core.config.engines[step.engine], self.info(step)
        for found in [b for b in self._breakpoints if b.after is after]:
            if found._matches(name, step.pc, info):
                found.hits += 1
                found.action(Moment(self, step, raw))

    # -- messages ------------------------------------------------------------------------------

    def _text(self, step: Step) -> str:
        engine = self.core.config.engines[step.engine]
        return f"{engine}[{step.pc}] {disassemble_instruction(self._raw[step])}"

    def _lines(self, step: Step) -> list[str]:
        """An instruction and its statement, quoted."""
        info = self.info(step)
        lines = [self._text(step)]
        if info.source is not None:
            lines.append(f"  at {info.source}" + (f" [{info.label}]" if info.label else ""))
            path, _, rest = info.source.partition(":")
            number = rest.partition(" ")[0]
            text = linecache.getline(path, int(number)).strip() if number.isdigit() else ""
            if text:
                lines.append(f"    {text}")
        return lines

    def _tensor_at(self, place: str) -> str:
        """`place` with the tensor that a byte of DRAM belongs to."""
        if not place.endswith("of DRAM") or self.program is None:
            return place
        byte = int(place.split()[1], 16)
        for tensor in self.program.tensors:
            start = self.addresses[tensor.name]
            if start <= byte < start + tensor.nbytes:
                return f"{place}, byte {byte - start} of tensor {tensor.name!r}"
        return place

    def _race(self, race: Race, step: Step, opcode: Opcode) -> RaceError:
        place = self._tensor_at(race.place)
        did = ("writes" if race.wrote else "reads", "writes" if race.writes else "reads")
        lines = [f"race: no semaphore orders these two accesses to {place}:"]
        for what, who in zip(did, (race.first, step), strict=True):
            head, *rest = self._lines(who)
            lines += [f"{what}: {head}", *rest]
        return RaceError(
            "\n  ".join(lines),
            first=self._text(race.first),
            second=self._text(step),
            first_source=self.info(race.first).source,
            second_source=self.info(step).source,
            place=place,
        )

    def _undefined(self, found: Undefined) -> UndefinedError:
        place = self._tensor_at(found.place)
        lines = [f"{place} was never written, and this reads it ({found.operand}):"]
        if found.user != found.reader:
            lines = [f"{place} was never written, and this reads it:"]
        lines += self._lines(found.reader)
        if found.user != found.reader:
            lines += [f"what was made of it is used here ({found.operand}):"]
            lines += self._lines(found.user)
        return UndefinedError(
            "\n  ".join(lines),
            instruction=self._text(found.reader),
            source=self.info(found.reader).source,
            place=place,
        )
