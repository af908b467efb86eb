"""The driver: runs programs on any device behind `Backend`, through its registers and DRAM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from systolith_hdl import regs
from systolith_hdl.config import INSTRUCTION_BYTES, CoreConfig
from systolith_hdl.formats import FORMATS, DType, dtype_of
from systolith_hdl.isa import ISA_VERSION, FaultCause

from systolith.assembly import disassemble_instruction
from systolith.errors import (
    ConfigMismatch,
    DeviceError,
    DeviceFault,
    DeviceTimeout,
    OutOfMemory,
    ProgramError,
    TensorError,
)
from systolith.memory import FreeList
from systolith.program import DRAM_ALIGN, Program, patch_dram_base

from .backend import Backend, Described

DEFAULT_TIMEOUT = 1 << 32  #: cycles
DEFAULT_CHUNK = 1 << 16  #: cycles between two calls of a progress callback
_RESET_CYCLES = 1 << 20  #: for AXI transactions to drain


@dataclasses.dataclass(eq=False)
class DeviceTensor:
    """A dense tensor in the DRAM of one driver's device.

    Parameters
    ----------
    name : shown in messages
    shape, dtype : of its elements
    address : byte address
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    address: int
    freed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * FORMATS[self.dtype].bytes

    def __str__(self) -> str:
        return f"tensor {self.name!r} ({self.dtype.name} {self.shape})"


@dataclasses.dataclass(frozen=True)
class Counters:
    """Performance counters of the last run.

    Parameters
    ----------
    cycles : from start to end; 0 on a device without a clock
    macs : multiply-accumulates done
    busy : engine -> cycles it was executing; 0 on a device without a clock
    conflicts : memory -> cycles in which it held a request back, as another had its bank
    instructions : engine -> instructions completed, END included
    """

    cycles: int
    macs: int
    busy: dict[str, int]
    conflicts: dict[str, int]
    instructions: dict[str, int]


class LoadedProgram:
    """A program in device DRAM, with tensors bound to its names. Made by `Driver.load`.

    Members
    -------
    program : as it was given
    tensors : name -> `DeviceTensor` it is bound to
    """

    def __init__(self, driver: Driver, program: Program) -> None:
        self._driver = driver
        self.program = program
        self.tensors: dict[str, DeviceTensor] = {}
        self._owned: list[DeviceTensor] = []
        self._stream_address: dict[str, int] = {}
        #: the streams as they lie in DRAM
        self._streams = {name: bytearray(stream) for name, stream in program.streams.items()}
        #: addresses that the streams in DRAM are linked for now
        self._linked = [tensor.address for tensor in program.tensors]
        self._uses: list[list[tuple[str, int]]] = [[] for _ in program.tensors]
        for relocation in program.relocations:
            self._uses[relocation.tensor].append((relocation.engine, relocation.index))
        self._written = program.written_tensors()
        self.unloaded = False

    def bind(self, bindings: Mapping[str, DeviceTensor]) -> None:
        """Makes the program use these tensors under these names from now on."""
        self._driver._check_idle("bind tensors")
        for name, tensor in bindings.items():
            info = self.program.tensor(name)
            if tensor.freed:
                raise TensorError(f"cannot bind {name!r} to {tensor}: it was freed")
            if info.shape != tensor.shape or info.dtype is not tensor.dtype:
                raise TensorError(
                    f"cannot bind {name!r}, {info.dtype.name} {info.shape}, to {tensor}"
                )
        after = {**self.tensors, **bindings}
        self._check_overlap(after)
        for index, info in enumerate(self.program.tensors):
            if info.name not in bindings:
                continue
            address = bindings[info.name].address
            if address != self._linked[index]:
                for engine, position in self._uses[index]:
                    stream = self._streams[engine]
                    patch_dram_base(stream, position, address - self._linked[index])
                    start = position * INSTRUCTION_BYTES
                    self._driver.backend.write_dram(
                        self._stream_address[engine] + start,
                        stream[start : start + INSTRUCTION_BYTES],
                    )
                self._linked[index] = address
        self.tensors = after

    def _check_overlap(self, tensors: Mapping[str, DeviceTensor]) -> None:
        """Semaphores order accesses to one tensor, so a tensor that is written shares no byte."""
        spans = sorted((t.address, t.address + t.nbytes, name) for name, t in tensors.items())
        end, holder = -1, ""
        for start, stop, name in spans:
            if start < end and {name, holder} & self._written:
                raise TensorError(
                    f"program {self.program.name!r}: {holder!r} and {name!r} are bound to "
                    "overlapping memory and the program writes to one of them"
                )
            if stop > end:
                end, holder = stop, name

    def run(self, **options: Any) -> Counters:
        """Starts the program and waits; options as for `Driver.wait`."""
        self._driver.start(self)
        return self._driver.wait(**options)

    def unload(self) -> None:
        """Frees the DRAM of the streams and of the tensors that `load` allocated."""
        self._driver._check_idle("unload a program")
        if self.unloaded:
            return
        self.unloaded = True
        for address in self._stream_address.values():
            self._driver._memory.free(address)
        for tensor in self._owned:
            if not tensor.freed:
                self._driver.free(tensor)


class Driver:
    """Drives one device.

    Parameters
    ----------
    backend : the device
    watchdog : cycles without progress after which the device faults by itself; None keeps the
        device's default
    seed : of stochastic rounding in the first program run; each run takes the next number, so
        that a training step rounds differently every time and a whole training repeats exactly
    """

    def __init__(self, backend: Backend, *, watchdog: int | None = None, seed: int = 0) -> None:
        self.backend = backend
        self.seed = seed
        self._memory = FreeList(backend.dram_bytes, align=DRAM_ALIGN)
        self._running: LoadedProgram | None = None
        self.identify()
        self.reset()
        if watchdog is not None:
            self._write("WATCHDOG", watchdog)
        self._write("IRQ_ENABLE", 1)

    @property
    def config(self) -> CoreConfig:
        """Of the device's core."""
        return self.backend.config

    # -- registers -----------------------------------------------------------------------------

    def _read(self, name: str, index: int = 0) -> int:
        value = 0
        for word in range(regs.REGISTERS[name].words):
            value |= self.backend.read_register(regs.address(name, index, word)) << (32 * word)
        return value

    def _write(self, name: str, value: int, index: int = 0) -> None:
        for word in range(regs.REGISTERS[name].words):
            part = (value >> (32 * word)) & 0xFFFFFFFF
            self.backend.write_register(regs.address(name, index, word), part)

    def _flag(self, register: str, name: str) -> int:
        return 1 << regs.field(register, name).offset

    def _part(self, register: str, name: str, value: int) -> int:
        found = regs.field(register, name)
        return (value >> found.offset) & ((1 << found.width) - 1)

    def identify(self) -> None:
        """Checks that this is a Systolith core of the ISA version and config expected."""
        magic = self._read("ID")
        if magic != regs.MAGIC:
            raise DeviceError(
                f"the device is no Systolith core: ID {magic:#010x}, expected {regs.MAGIC:#010x}"
            )
        version = self._read("ISA_VERSION")
        if version != ISA_VERSION:
            raise DeviceError(f"the device has ISA version {version}, the driver {ISA_VERSION}")
        found = self._read("CONFIG_HASH")
        if found != self.config.hash:
            raise ConfigMismatch(
                f"the device has config hash {found:#010x}, config {self.config.name!r} has "
                f"{self.config.hash:#010x}"
            )

    # -- DRAM ----------------------------------------------------------------------------------

    def _allocate(self, what: str, nbytes: int) -> int:
        address = self._memory.allocate(nbytes)
        if address is None:
            raise OutOfMemory(
                what,
                requested=nbytes,
                largest=self._memory.largest,
                free=self._memory.free_units,
                size=self._memory.size,
            )
        return address

    def allocate(
        self, shape: Sequence[int] | int, dtype: DType | Any, name: str = "tensor"
    ) -> DeviceTensor:
        """Reserves DRAM for a tensor; its contents are whatever was there."""
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        if any(n < 1 for n in shape):
            raise TensorError(f"tensor {name!r}: every dimension must be at least 1: {shape}")
        if not isinstance(dtype, DType):
            try:
                dtype = dtype_of(dtype)
            except TypeError as error:
                raise TensorError(f"tensor {name!r}: {error}") from error
        nbytes = math.prod(shape) * FORMATS[dtype].bytes
        address = self._allocate(f"tensor {name!r} ({dtype.name} {shape})", nbytes)
        return DeviceTensor(name, shape, dtype, address)

    def free(self, tensor: DeviceTensor) -> None:
        """Gives a tensor's DRAM back."""
        if tensor.freed:
            raise TensorError(f"{tensor} is already free")
        tensor.freed = True
        self._memory.free(tensor.address)

    def put(self, array: np.ndarray, name: str = "tensor") -> DeviceTensor:
        """Allocates a tensor like `array` and writes it."""
        array = np.asarray(array)
        tensor = self.allocate(array.shape, array.dtype, name)
        self.write(tensor, array)
        return tensor

    def _address(self, tensor: DeviceTensor) -> int:
        if tensor.freed:
            raise TensorError(f"{tensor} was freed")
        return tensor.address

    def write(self, tensor: DeviceTensor, array: np.ndarray) -> None:
        """Copies an array of the tensor's shape and type to the device."""
        array = np.asarray(array)
        wanted = FORMATS[tensor.dtype].numpy
        if array.shape != tensor.shape or array.dtype != wanted:
            raise TensorError(
                f"cannot write a {array.dtype.name} array of shape {array.shape} to {tensor}"
            )
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.backend.write_dram(self._address(tensor), raw)

    def read(self, tensor: DeviceTensor) -> np.ndarray:
        """Copies a tensor from the device."""
        raw = self.backend.read_dram(self._address(tensor), tensor.nbytes)
        return raw.view(FORMATS[tensor.dtype].numpy).reshape(tensor.shape)

    # -- programs ------------------------------------------------------------------------------

    def load(
        self, program: Program, bindings: Mapping[str, DeviceTensor] | None = None
    ) -> LoadedProgram:
        """Places a program in DRAM.

        Tensors not in `bindings` are allocated: constants hold their data, the others zeros.
        Raises ConfigMismatch, OutOfMemory or TensorError; then nothing stays allocated.
        """
        self._check_idle("load a program")
        program.check_config(self.config)
        for name in bindings or {}:
            if program.tensor(name).kind == "constant":
                raise TensorError(f"{name!r} is a constant of program {program.name!r}")
        loaded = LoadedProgram(self, program)
        try:
            for engine, stream in program.streams.items():
                address = self._allocate(
                    f"the {engine} stream of program {program.name!r}", len(stream)
                )
                loaded._stream_address[engine] = address
                self.backend.write_dram(address, stream)
            tensors = dict(bindings or {})
            for info in program.tensors:
                if info.name not in tensors:
                    tensor = self.allocate(info.shape, info.dtype, info.name)
                    loaded._owned.append(tensor)
                    tensors[info.name] = tensor
                    data = program.constants.get(info.name)
                    self.backend.write_dram(
                        tensor.address, bytes(tensor.nbytes) if data is None else data
                    )
            loaded.bind(tensors)
        except Exception:
            loaded.unload()
            raise
        return loaded

    def _check_idle(self, what: str) -> None:
        if self._running is not None:
            raise DeviceError(f"cannot {what}: program {self._running.program.name!r} is running")

    def start(self, loaded: LoadedProgram) -> None:
        """Starts a program and returns at once; see `wait`."""
        self._check_idle("start a program")
        if loaded.unloaded or loaded._driver is not self:
            raise ProgramError(f"program {loaded.program.name!r} is not loaded on this device")
        for name, tensor in loaded.tensors.items():
            if tensor.freed:
                raise TensorError(f"{name!r} is bound to {tensor}, which was freed")
        if isinstance(self.backend, Described):
            addresses = {name: tensor.address for name, tensor in loaded.tensors.items()}
            self.backend.describe(loaded.program, addresses)
        self._write("IRQ_STATUS", 1)
        for index, engine in enumerate(self.config.engines):
            self._write("STREAM_BASE", loaded._stream_address[engine], index)
        self._write("SEED", self.seed & 0xFFFFFFFF)
        self._write("CONTROL", self._flag("CONTROL", "START"))
        self.seed += 1
        self._running = loaded

    def wait(
        self,
        *,
        timeout: int = DEFAULT_TIMEOUT,
        progress: Callable[[Counters], None] | None = None,
        chunk: int = DEFAULT_CHUNK,
    ) -> Counters:
        """Waits for the end of the program that was started; returns its counters.

        Parameters
        ----------
        timeout : cycles after which to give up
        progress : called with the counters every `chunk` cycles

        Raises DeviceFault or DeviceTimeout; the device is then reset and usable again.
        """
        if self._running is None:
            raise DeviceError("no program was started")
        left = timeout
        step = chunk if progress is not None else DEFAULT_TIMEOUT
        try:
            while not self.backend.run(min(step, left)):
                left -= min(step, left)
                if progress is not None:
                    progress(self.counters())
                if left <= 0:
                    self._raise_timeout(timeout)
            status = self._read("STATUS")
            if status & self._flag("STATUS", "FAULT"):
                raise self._fault(self._running)
            if not status & self._flag("STATUS", "DONE"):
                raise DeviceError(f"the interrupt rose but STATUS is {status:#x}")
        except BaseException:
            # Whatever happened, an interrupt of the host included: leave an idle device.
            self._running = None
            self.reset()
            raise
        self._running = None
        self._write("IRQ_STATUS", 1)
        return self.counters()

    def run(self, program: LoadedProgram, **options: Any) -> Counters:
        """Starts a program and waits; options as for `wait`."""
        return program.run(**options)

    def _raise_timeout(self, timeout: int) -> None:
        assert self._running is not None
        counters = self.counters()
        done = ", ".join(
            f"{engine} {count}/{self._running.program.count(engine)}"
            for engine, count in counters.instructions.items()
        )
        raise DeviceTimeout(
            f"program {self._running.program.name!r} did not end within {timeout} cycles; "
            f"instructions completed: {done}"
        )

    def counters(self) -> Counters:
        """Reads the performance counters."""
        engines = self.config.engines
        return Counters(
            cycles=self._read("CYCLES"),
            macs=self._read("MACS"),
            busy={engine: self._read("BUSY", i) for i, engine in enumerate(engines)},
            conflicts={name: self._read("CONFLICTS", i) for i, name in enumerate(regs.MEMORIES)},
            instructions={
                engine: self._read("INSTRUCTIONS", i) for i, engine in enumerate(engines)
            },
        )

    def semaphores(self) -> list[int]:
        """Reads all semaphores."""
        return [self._read("SEMAPHORE", i) for i in range(self.config.semaphores)]

    def _fault(self, loaded: LoadedProgram) -> DeviceFault:
        """Reads the fault record."""
        info = self._read("FAULT_INFO")
        number = self._part("FAULT_INFO", "ENGINE", info)
        code = self._part("FAULT_INFO", "CAUSE", info)
        engines = self.config.engines
        engine = engines[number] if number < len(engines) else f"engine {number}"
        pc = self._read("FAULT_PC")
        address = self._read("FAULT_ADDRESS")
        if address >> 63:
            address -= 1 << 64
        known = {cause.value: cause.name for cause in FaultCause}
        instruction = None
        debug = loaded.program.debug_info(engine, pc)
        if engine in loaded.program.streams and pc < loaded.program.count(engine):
            # As it lies in DRAM: that is what was executed.
            place = loaded._stream_address[engine] + pc * INSTRUCTION_BYTES
            raw = self.backend.read_dram(place, INSTRUCTION_BYTES)
            instruction = disassemble_instruction(raw.tobytes())
        return DeviceFault(
            engine=engine,
            pc=pc,
            cause=known.get(code, f"unknown cause {code}"),
            address=address,
            instruction=instruction,
            source=debug.source,
            label=debug.label,
        )

    def reset(self) -> None:
        """Resets the core; memories, DRAM and loaded programs stay."""
        self._running = None
        self._write("CONTROL", self._flag("CONTROL", "RESET"))
        resetting = self._flag("STATUS", "RESETTING")
        for _ in range(_RESET_CYCLES >> 8):
            if not self._read("STATUS") & resetting:
                return
            self.backend.run(1 << 8)
        raise DeviceError(f"the device did not finish its reset within {_RESET_CYCLES} cycles")

    def close(self) -> None:
        """Releases the device."""
        self.backend.close()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
