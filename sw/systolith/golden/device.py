"""The golden core behind the host registers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

import numpy as np
from systolith_hdl import regs
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.isa import ISA_VERSION

from systolith.errors import BackendError, DeviceError
from systolith.program import Program
from systolith.runtime.backend import SharedDram

from .core import Core
from .debugger import Debugger

DEFAULT_DRAM_BYTES = 1 << 26
DRAM_GRANULE = 4096  #: bytes; no burst of any core lies partly inside the DRAM

_START = 1 << regs.field("CONTROL", "START").offset
_RESET = 1 << regs.field("CONTROL", "RESET").offset


class GoldenDevice(SharedDram):
    """A device backend that executes instructions in numpy.

    It has no clock: CYCLES and BUSY read 0, a cycle of `run` is one instruction, and WATCHDOG
    only says whether a deadlock becomes a fault (any value but 0) or not.

    Parameters
    ----------
    config : preset name or `CoreConfig`
    dram_bytes : size of the device DRAM, a multiple of 4096; ignored when `dram` is given
    dram : uint8 array to use as DRAM
    scheduler : see `Core`
    check : report races and the use of undefined memory, or "races" alone; see
        `systolith.golden.checks`

    Members
    -------
    debugger : `Debugger` of the core
    """

    def __init__(
        self,
        config: str | CoreConfig,
        *,
        dram_bytes: int = DEFAULT_DRAM_BYTES,
        dram: np.ndarray | None = None,
        scheduler: random.Random | None = None,
        check: bool | Literal["races"] = False,
    ) -> None:
        self.config = get_config(config)
        size = dram_bytes if dram is None else dram.size
        if size <= 0 or size % DRAM_GRANULE:
            raise BackendError(
                f"device DRAM must have a multiple of {DRAM_GRANULE} bytes, not {size}"
            )
        self.dram = np.zeros(dram_bytes, np.uint8) if dram is None else dram
        self.core = Core(self.config, self.dram, scheduler=scheduler)
        self.debugger = Debugger(self.core, check=check)
        self._kept = {
            name: regs.REGISTERS[name].reset for name in ("IRQ_ENABLE", "WATCHDOG", "SEED")
        }
        self._bases = [0] * len(self.config.engines)
        self._done = False
        self._irq_status = 0
        #: byte address -> (register, element, word of the element)
        self._map = {
            regs.address(name, index, word): (name, index, word)
            for name, register in regs.REGISTERS.items()
            for index in range(register.count(self.config))
            for word in range(register.words)
        }

    def _find(self, address: int, what: str) -> tuple[str, int, int]:
        if address not in self._map:
            raise DeviceError(f"the host port refused a {what} of {address:#x} (AXI response 2)")
        return self._map[address]

    def read_register(self, address: int) -> int:
        """Value of the 32-bit register at a byte address."""
        name, index, word = self._find(address, "read")
        return (self._value(name, index) >> (32 * word)) & 0xFFFFFFFF

    def _value(self, name: str, index: int) -> int:
        core = self.core
        fault = core.fault
        match name:
            case "ID":
                return regs.MAGIC
            case "ISA_VERSION":
                return ISA_VERSION
            case "CONFIG_HASH":
                return self.config.hash
            case "STATUS":
                flags = {"RUNNING": core.running, "DONE": self._done, "FAULT": fault is not None}
                return sum(
                    int(flag) << regs.field("STATUS", bit).offset for bit, flag in flags.items()
                )
            case "IRQ_STATUS":
                return self._irq_status
            case "FAULT_INFO" if fault is not None:
                cause = regs.field("FAULT_INFO", "CAUSE").offset
                engine = regs.field("FAULT_INFO", "ENGINE").offset
                return fault.cause.value << cause | fault.engine << engine
            case "FAULT_PC" if fault is not None:
                return fault.pc
            case "FAULT_ADDRESS" if fault is not None:
                return fault.address & (1 << 64) - 1
            case "MACS":
                return core.macs
            case "STREAM_BASE":
                return self._bases[index]
            case "INSTRUCTIONS":
                return core.instructions[index]
            case "SEMAPHORE":
                return core.semaphores[index]
        return self._kept.get(name, 0)

    def write_register(self, address: int, value: int) -> None:
        """Writes the 32-bit register at a byte address."""
        name, index, word = self._find(address, "write")
        if regs.REGISTERS[name].access == "ro":
            raise DeviceError(f"the host port refused a write of {address:#x} (AXI response 2)")
        match name:
            case "CONTROL":
                if value & _RESET:
                    self.core.reset()
                    self._done = False
                    self._irq_status = 0
                elif value & _START and not self.core.running:
                    self._done = False
                    self.core.start(self._bases, seed=self._kept["SEED"])
            case "IRQ_STATUS":
                self._irq_status &= ~value
            case "IRQ_ENABLE":
                self._kept[name] = value & 1
            case "WATCHDOG" | "SEED":
                self._kept[name] = value
            case "STREAM_BASE":
                kept = self._bases[index] & ~(0xFFFFFFFF << (32 * word))
                self._bases[index] = kept | value << (32 * word)

    def describe(self, program: Program, addresses: Mapping[str, int]) -> None:
        """Tells the debugger what is started next; see `Described`."""
        self.debugger.describe(program, addresses)

    @property
    def interrupt(self) -> bool:
        """The interrupt line."""
        return bool(self._irq_status & self._kept["IRQ_ENABLE"])

    def run(self, max_cycles: int | None) -> bool:
        """Executes until the interrupt line is high, at most `max_cycles` instructions; returns
        whether it is. Without a limit it also returns when nothing can happen any more."""
        if self.core.running and not self.interrupt:
            self.core.run(max_cycles, watchdog=self._kept["WATCHDOG"] != 0)
            if not self.core.running:
                self._done = self.core.fault is None
                self._irq_status = 1
        return self.interrupt

    def close(self) -> None:
        """Nothing to release."""
