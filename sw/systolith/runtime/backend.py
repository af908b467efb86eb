"""The interface between the driver and a device, and how to open one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from systolith_hdl.config import CoreConfig, get_config

from systolith.errors import BackendError
from systolith.program import Program


@runtime_checkable
class Backend(Protocol):
    """A device: host registers, DRAM, and a way to let it run.

    Members
    -------
    config : of its core
    dram_bytes : size of the DRAM
    """

    config: CoreConfig

    @property
    def dram_bytes(self) -> int: ...

    def read_register(self, address: int) -> int:
        """Reads the 32-bit register at a byte address."""

    def write_register(self, address: int, value: int) -> None:
        """Writes the 32-bit register at a byte address."""

    def read_dram(self, address: int, count: int) -> np.ndarray:
        """Returns a copy of `count` bytes of DRAM from a byte address, uint8."""

    def write_dram(self, address: int, data: np.ndarray | bytes | bytearray) -> None:
        """Writes bytes (uint8) to DRAM from a byte address on."""

    def run(self, max_cycles: int | None) -> bool:
        """Lets the device run until its interrupt line is high, at most `max_cycles` cycles;
        returns whether it is."""

    def close(self) -> None:
        """Releases the device."""


@runtime_checkable
class Described(Protocol):
    """A device that wants to know what it executes, for its messages."""

    def describe(self, program: Program, addresses: Mapping[str, int]) -> None:
        """Called before a start: the program, and the byte address of each of its tensors."""


class SharedDram:
    """The DRAM of a device in the host's memory, for a `Backend`.

    Members
    -------
    dram : uint8, the whole DRAM; the device works on it
    """

    dram: np.ndarray

    @property
    def dram_bytes(self) -> int:
        """Size of the DRAM."""
        return len(self.dram)

    def read_dram(self, address: int, count: int) -> np.ndarray:
        """Returns a copy of `count` bytes from a byte address."""
        return self.dram[address : address + count].copy()

    def write_dram(self, address: int, data: np.ndarray | bytes | bytearray) -> None:
        """Writes bytes from a byte address on."""
        self.dram[address : address + len(data)] = np.frombuffer(data, np.uint8)


#: name -> "module:class"; the class takes (config, **options)
BACKENDS: dict[str, str] = {
    "golden": "systolith.golden.device:GoldenDevice",
    "rtl": "systolith.runtime.rtl:RtlBackend",
    "rtl-fast": "systolith.runtime.rtl:FastRtlBackend",
    "netlist": "systolith_synth.gatesim:NetlistBackend",
    "board": "systolith.runtime.board:SimulatedBoard",
    "uart": "systolith.runtime.serial:SerialBackend",
}


def open_backend(name: str, config: str | CoreConfig, **options: Any) -> Backend:
    """Opens a device by name; `options` are those of its class."""
    if name not in BACKENDS:
        raise BackendError(f"unknown device {name!r}; the devices are {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    device = getattr(importlib.import_module(module), attribute)
    backend: Backend = device(get_config(config), **options)
    return backend
