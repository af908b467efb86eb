"""Everything Systolith raises on purpose. Each message says what, where and what was allowed."""

from __future__ import annotations

from collections.abc import Sequence


class SystolithError(Exception):
    """Base of every error below."""


class KernelError(SystolithError):
    """A kernel asks for something the core would refuse.

    Attributes
    ----------
    source : ``file:line`` of the caller's statement, or None when it is not known
    """

    def __init__(self, message: str, *, source: str | None = None) -> None:
        super().__init__(f"{source}: {message}" if source else message)
        self.source = source

    def within(self, what: str, called: str | None) -> KernelError:
        """The same error, with the call that led to it: `what` was called at ``file:line``."""
        error = KernelError(f"{self}\n  in {what}" + (f", called at {called}" if called else ""))
        error.source = self.source
        return error


class ProgramError(SystolithError):
    """A program or program file is damaged, of another version, or inconsistent."""


class CompileError(SystolithError):
    """A function cannot be compiled."""


class UnsupportedError(CompileError):
    """A function uses something the compiler cannot lower."""


class TensorError(SystolithError, ValueError):
    """An array does not have the shape or type of the tensor it is meant for."""


class BackendError(SystolithError):
    """A device could not be opened or built."""


class DeviceError(SystolithError):
    """The device refused or failed."""


class ConfigMismatch(DeviceError):
    """A program was made for another core than the one it is loaded on.

    Attributes
    ----------
    differences : one line for each field that differs
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *differences]))
        self.differences = tuple(differences)


class OutOfMemory(DeviceError):
    """Device DRAM has no free block large enough.

    Attributes
    ----------
    requested, largest, free, size : bytes
    """

    def __init__(self, what: str, *, requested: int, largest: int, free: int, size: int) -> None:
        super().__init__(
            f"no room for {what}: {requested} bytes wanted, the largest free block has {largest} "
            f"({free} of {size} bytes free)"
        )
        self.requested = requested
        self.largest = largest
        self.free = free
        self.size = size


class DeviceFault(DeviceError):
    """An engine stopped at an instruction it could not execute. The device has been reset.

    Attributes
    ----------
    engine : name of the engine
    pc : index of the instruction in the engine's stream
    cause : name of the `systolith_hdl.isa.FaultCause`
    address : the fault's address, signed; its meaning depends on the cause
    instruction : disassembled text, or None when it could not be read
    source : ``file:line`` of the statement that made the instruction, or None
    label : label given to it by whoever built the program, or None
    """

    def __init__(
        self,
        *,
        engine: str,
        pc: int,
        cause: str,
        address: int,
        instruction: str | None = None,
        source: str | None = None,
        label: str | None = None,
    ) -> None:
        lines = [f"{engine} stopped at instruction {pc}: {cause}, address {address} ({address:#x})"]
        if instruction is not None:
            lines.append(f"instruction: {instruction}")
        if source is not None:
            lines.append(f"source: {source}" + (f" ({label})" if label else ""))
        elif label is not None:
            lines.append(f"label: {label}")
        super().__init__("\n  ".join(lines))
        self.engine = engine
        self.pc = pc
        self.cause = cause
        self.address = address
        self.instruction = instruction
        self.source = source
        self.label = label


class DeviceTimeout(DeviceError):
    """A program did not end within the cycles it was given. The device has been reset."""


class CheckError(DeviceError):
    """The golden device, asked to check, found a program wrong. The device has been reset."""


class RaceError(CheckError):
    """Two instructions of different engines touch the same words or DRAM bytes, one of them writes,
    and no chain of semaphores orders them.

    Attributes
    ----------
    first, second : ``engine[index] instruction`` of the two, in the order of execution here
    first_source, second_source : ``file:line`` of their statements, or None
    place : one word or byte that they share
    """

    def __init__(
        self,
        message: str,
        *,
        first: str,
        second: str,
        first_source: str | None,
        second_source: str | None,
        place: str,
    ) -> None:
        super().__init__(message)
        self.first = first
        self.second = second
        self.first_source = first_source
        self.second_source = second_source
        self.place = place


class UndefinedError(CheckError):
    """An instruction uses a word or DRAM byte that was never written.

    Attributes
    ----------
    instruction : ``engine[index] instruction``
    source : ``file:line`` of its statement, or None
    place : the word or byte
    """

    def __init__(self, message: str, *, instruction: str, source: str | None, place: str) -> None:
        super().__init__(message)
        self.instruction = instruction
        self.source = source
        self.place = place
