"""Host registers: the only definition. The hardware, the driver and the documentation derive
from `REGISTERS`. 32-bit registers on AXI4-Lite; 64-bit counters are two registers, low first."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .config import CoreConfig

MAGIC = 0x53595354  #: "SYST", the value of the ID register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """Bits `offset` to `offset + width - 1` of a register."""

    name: str
    offset: int
    width: int
    doc: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Register:
    """One register, or an array of them.

    Parameters
    ----------
    access : "ro", "rw", "w1" (writing a one acts, reads give zero) or "w1c" (a one clears)
    words : 32-bit words of one element (2 for a 64-bit value, low word first)
    array : None for one element, else "engine", "semaphore" or "memory" (SBUF, PSUM): an element
        for each
    """

    name: str
    address: int
    access: Literal["ro", "rw", "w1", "w1c"]
    doc: str
    words: int = 1
    array: Literal["engine", "semaphore", "memory"] | None = None
    reset: int = 0
    fields: tuple[Field, ...] = ()

    def count(self, config: CoreConfig) -> int:
        """Number of elements in a core of that config."""
        match self.array:
            case "engine":
                return len(config.engines)
            case "semaphore":
                return config.semaphores
            case "memory":
                return len(MEMORIES)
        return 1


MEMORIES = ("SBUF", "PSUM")  #: elements of an array over memories
ADDRESS_BITS = 12  #: width of the host port's byte address

_ALL = (
    Register(name="ID", address=0x000, access="ro", doc=f"Identification, {MAGIC:#010x}."),
    Register(name="ISA_VERSION", address=0x004, access="ro", doc="Version of the instruction set."),
    Register(name="CONFIG_HASH", address=0x008, access="ro", doc="Hash of the configuration."),
    Register(
        name="CONTROL",
        address=0x010,
        access="w1",
        doc="Commands.",
        fields=(
            Field(
                name="START",
                offset=0,
                width=1,
                doc="Doorbell: zeroes semaphores and counters and starts every engine at its "
                "STREAM_BASE. Ignored while running.",
            ),
            Field(
                name="RESET",
                offset=1,
                width=1,
                doc="Stops issue, waits until no AXI transaction is outstanding, then resets the "
                "core. Memories and the registers STREAM_BASE, WATCHDOG, SEED, IRQ_ENABLE keep "
                "their values.",
            ),
        ),
    ),
    Register(
        name="STATUS",
        address=0x014,
        access="ro",
        doc="State of the core.",
        fields=(
            Field(name="RUNNING", offset=0, width=1, doc="A program is running."),
            Field(name="DONE", offset=1, width=1, doc="Every engine has ended."),
            Field(name="FAULT", offset=2, width=1, doc="An engine stopped: see FAULT_INFO."),
            Field(name="RESETTING", offset=3, width=1, doc="A reset waits for AXI to drain."),
        ),
    ),
    Register(name="IRQ_ENABLE", address=0x018, access="rw", doc="1 lets the interrupt rise."),
    Register(
        name="IRQ_STATUS", address=0x01C, access="w1c", doc="1 after a program ended or faulted."
    ),
    Register(
        name="FAULT_INFO",
        address=0x020,
        access="ro",
        doc="First fault since START.",
        fields=(
            Field(name="CAUSE", offset=0, width=8, doc="A FaultCause."),
            Field(name="ENGINE", offset=8, width=8, doc="Number of the engine that stopped."),
        ),
    ),
    Register(
        name="FAULT_PC", address=0x024, access="ro", doc="Index of the instruction in its stream."
    ),
    Register(
        name="FAULT_ADDRESS",
        address=0x028,
        access="ro",
        words=2,
        doc="Address that faulted, two's complement; see the FaultCause.",
    ),
    Register(
        name="WATCHDOG",
        address=0x030,
        access="rw",
        reset=1_000_000,
        doc="Cycles without progress (no instruction completed, no AXI data beat moved, no column "
        "read or written by an engine) after which a running core faults; 0 never does.",
    ),
    Register(
        name="SEED",
        address=0x034,
        access="rw",
        doc="Seed of stochastic rounding. Not to be written while a program runs.",
    ),
    Register(name="CYCLES", address=0x040, access="ro", words=2, doc="Cycles since START."),
    Register(
        name="MACS",
        address=0x048,
        access="ro",
        words=2,
        doc="Multiply-accumulates done: lanes x columns for every moving column.",
    ),
    Register(
        name="STREAM_BASE",
        address=0x100,
        access="rw",
        words=2,
        array="engine",
        doc="Byte address of an engine's instruction stream, a multiple of 64.",
    ),
    Register(
        name="BUSY",
        address=0x180,
        access="ro",
        words=2,
        array="engine",
        doc="Cycles in which an engine was executing at least one instruction.",
    ),
    Register(
        name="CONFLICTS",
        address=0x1C0,
        access="ro",
        array="memory",
        doc="Cycles in which SBUF (element 0) or PSUM (1) held a request back, as another had its "
        "bank.",
    ),
    Register(
        name="INSTRUCTIONS",
        address=0x200,
        access="ro",
        array="engine",
        doc="Instructions an engine completed, END included.",
    ),
    Register(
        name="SEMAPHORE", address=0x400, access="ro", array="semaphore", doc="Semaphore counts."
    ),
)

REGISTERS: dict[str, Register] = {register.name: register for register in _ALL}


def address(name: str, index: int = 0, word: int = 0) -> int:
    """Byte address of a register, of element `index` of an array and its 32-bit `word`."""
    register = REGISTERS[name]
    return register.address + 4 * (index * register.words + word)


def field(name: str, field_name: str) -> Field:
    """Looks a field up by the names of its register and itself."""
    return next(f for f in REGISTERS[name].fields if f.name == field_name)
