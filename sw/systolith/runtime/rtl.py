"""The `rtl` and `rtl-fast` devices: the chip's Verilog as a shared library, built by Verilator and
cached."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from systolith_hdl.config import CoreConfig
from systolith_hdl.core import chip_verilog
from systolith_hdl.toolchain import (
    ToolError,
    cache_dir,
    content_hash,
    cxx,
    sources_hash,
    verilator_env,
    verilator_identity,
)

from ..errors import BackendError, DeviceError, DeviceTimeout
from .backend import SharedDram
from .lanes import with_loops
from .verilog import (
    FAST_CELLS,
    FAST_CELLS_HEADER,
    with_calls,
    with_clock_gates,
    with_fast_cells,
    with_held_inputs,
    with_registers,
    with_whole_writes,
)

_HARNESS = Path(__file__).with_name("rtl.cpp")
#: What stands between the chip's Verilog and that of the simulator.
_TRANSLATORS = [Path(__file__).with_name(name) for name in ("lanes.py", "verilog.py")]
_LIBRARY = "libsimulator.so"
#: What the loops have for Verilator's files.
_LANES_HEADER = "lanes.h"
_TOP = "simulated_chip"


#: This machine's vector instructions. The next two keep every bit as it is: no fused multiply-add
#: where there are two roundings, and nobody looks at exception flags. The last avoids an error of
#: GCC 12, which loads words at 16 modulo 32 as if they were aligned to 32 (in VL_SHIFTR_WWI).
_CXX_FLAGS = (
    "-march=native -ffp-contract=off -fno-trapping-math -ftree-vectorize -fvect-cost-model=dynamic "
    "-fno-tree-bit-ccp"
)

#: For Verilator's makefiles: what runs every cycle, what runs once, its run-time library. Measured
#: at N = 16: -O2 takes half as long again to compile and is no faster, -Os slower.
OPTIMIZATION = "OPT_FAST=-O1 OPT_SLOW=-O0 OPT_GLOBAL=-O2"

Progress = Callable[[str], None]


@functools.cache
def _processor() -> str:
    """What the compiler makes of -march=native: a library is for one kind of processor."""
    command = [cxx(), *_CXX_FLAGS.split(), "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _verilator_args(top: str, cflags: str) -> list[str]:
    return [
        "--cc",
        "--exe",
        "--build",
        "-j",
        "2",
        "--top-module",
        top,
        "--prefix",
        "Vtop",
        "-O3",
        "--x-assign",
        "fast",
        "--x-initial",
        "fast",
        "--no-timing",
        "--noassert",
        "--output-split",
        "20000",
        "-Wno-fatal",
        "-Wno-lint",
        "-CFLAGS",
        f"-fPIC {_CXX_FLAGS} {cflags}",
        "-MAKEFLAGS",
        OPTIMIZATION,
        "-LDFLAGS",
        "-shared -Wl,-Bsymbolic-functions",
        "-o",
        _LIBRARY,
    ]


@contextlib.contextmanager
def _run_time_library(
    binary: str, environment: dict[str, str], arguments: list[str], top: str
) -> Iterator[None]:
    """Compiles Verilator's run-time library into the cache of objects (objcache.py), if nothing is
    there yet, beside what is done inside, which keeps one core busy. A build with the same
    arguments finds it there; what fails here fails in that build too, which reports it."""
    if (cache_dir() / "objects").exists():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _LANES_HEADER).touch()
        (Path(folder) / "empty.v").write_text(f"module {top}; endmodule\n")
        command = [binary, *arguments, "--Mdir", "empty", "empty.v"]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=quiet, stderr=quiet):
            yield


def verilate(
    name: str,
    top: str,
    emit: Callable[[], str],
    harness: Path,
    *,
    sources: str,
    cflags: str = "",
    fast: bool = False,
    loops: bool = True,
    progress: Progress = lambda message: None,
) -> Path:
    """Builds Verilog and a C++ harness into a shared library, or finds it in the cache.

    Parameters
    ----------
    name : what is built, for messages and the name of the folder
    top : top module, the class `Vtop` for the harness
    emit : returns the Verilog; called only to build
    harness : C++ file
    sources : hash of everything the Verilog follows from
    cflags : for the harness
    fast : the floating-point cells are replaced by C++
    loops : lanes become loops (lanes.py); else Verilator writes each lane out

    Returns the library's path. Raises ToolError naming a missing tool, or the log of a failed
    build.
    """
    binary, environment, flags = verilator_env()
    arguments = _verilator_args(top, cflags) + flags
    cells = FAST_CELLS.read_text() if fast else ""
    header = FAST_CELLS_HEADER.read_text()
    # Seen by every file that Verilator writes, from the folder below.
    arguments += ["--compiler-include", f"../{_LANES_HEADER}"]
    key = content_hash(
        sources,
        *(path.read_text() for path in (harness, *_TRANSLATORS)),
        cells,
        header,
        repr((arguments, loops)),
        verilator_identity(),
        cxx(),
        _processor(),
    )
    folder = cache_dir() / f"{name}-{key}"
    library = folder / _LIBRARY
    if library.exists():
        progress("using the cached simulator")
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        progress(f"emitting the Verilog of {name}")
        with _run_time_library(binary, environment, arguments, top):
            verilog = emit()
        if fast:
            verilog = with_fast_cells(verilog, cells)
        includes, cpp = f'#include "{FAST_CELLS_HEADER.name}"\n', ""
        if loops:
            verilog, includes, cpp = with_loops(verilog)
        verilog = with_registers(with_whole_writes(with_calls(verilog)))
        (folder / FAST_CELLS_HEADER.name).write_text(header)
        (folder / _LANES_HEADER).write_text(includes)
        (folder / "lanes.cpp").write_text(cpp)
        (folder / "design.v").write_text(verilog)
        log = folder / "build.log"
        progress(f"building the simulator of {name}")
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [binary, *arguments, "--Mdir", unfinished.name, "design.v", "lanes.cpp"]
        with open(log, "w") as out:
            done = subprocess.run(
                [*command, str(harness)],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise ToolError(f"Verilator failed (log: {log}):\n{tail}")
        # Moved only when whole: an interrupted build is never taken for a finished one.
        (unfinished / _LIBRARY).rename(library)
        shutil.rmtree(unfinished)
    return library


def build_of(name: str, config: CoreConfig, emit: Callable[[], str], **options: Any) -> Path:
    """Builds the shared library of a chip from the Verilog that `emit` returns, module ``chip``;
    options as of `verilate`."""
    return verilate(
        name,
        _TOP,
        lambda: with_held_inputs(emit(), "chip", _TOP),
        _HARNESS,
        cflags=f"-DSYSTOLITH_AXI_BYTES={config.axi_bytes}",
        **options,
    )


def build(
    config: CoreConfig,
    progress: Progress = lambda message: None,
    *,
    fast: bool = False,
    gated: bool = True,
) -> Path:
    """Builds the shared library of a config, or finds it in the cache; returns its path.

    `fast` replaces the floating-point cells by C++ of the same latency and bits; `gated` stops the
    clocks of blocks at rest. The cache key is the chip's sources, the config, the harness, the
    flags and the tools, so an unchanged design is never built twice. Raises ToolError naming a
    missing tool, or the log of a failed build.
    """

    def emit() -> str:
        text = chip_verilog(config)
        return with_clock_gates(text, config) if gated else text

    return build_of(
        f"chip-{config.name}{'-fast' if fast else ''}{'' if gated else '-ungated'}",
        config,
        emit,
        sources=content_hash(sources_hash(), repr(config)),
        fast=fast,
        progress=progress,
    )


class RtlBackend(SharedDram):
    """The Verilated chip behind the device interface.

    Parameters
    ----------
    config : the core
    dram_bytes : size of the device DRAM
    dram_latency : cycles from an accepted burst to its first beat
    dram_bytes_per_cycle : bandwidth of each direction; 2 per lane if None
    progress : called with a line of text when a long step begins
    fast : the floating-point cells are C++ instead of gates: same bits, same cycles
    gated : the clocks of blocks at rest stop; without, slower: same bits, same cycles
    library : a simulator of the chip that was built from something else, by `build_of`
    """

    def __init__(
        self,
        config: CoreConfig,
        *,
        dram_bytes: int = 1 << 26,
        dram_latency: int = 20,
        dram_bytes_per_cycle: int | None = None,
        progress: Progress = lambda message: None,
        fast: bool = False,
        gated: bool = True,
        library: Path | None = None,
    ) -> None:
        if dram_bytes_per_cycle is None:
            dram_bytes_per_cycle = 2 * config.lanes
        if dram_latency < 0:
            raise BackendError(f"dram_latency must not be negative, not {dram_latency}")
        if dram_bytes_per_cycle < 1:
            raise BackendError(f"dram_bytes_per_cycle must be positive, not {dram_bytes_per_cycle}")
        self.config = config
        self.dram = np.zeros(dram_bytes, np.uint8)
        path = library or build(config, progress, fast=fast, gated=gated)
        simulator = ctypes.CDLL(str(path))
        u32, u64, handle = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
        for name, result, arguments in (
            ("sim_create", handle, [handle, u64, u64, u64]),
            ("sim_destroy", None, [handle]),
            ("sim_cycles", u64, [handle]),
            ("sim_read_bytes", u64, [handle]),
            ("sim_written_bytes", u64, [handle]),
            ("sim_run", ctypes.c_int, [handle, u64]),
            ("sim_write", ctypes.c_int, [handle, u32, u32]),
            ("sim_read", ctypes.c_int, [handle, u32, ctypes.POINTER(u32)]),
        ):
            function = getattr(simulator, name)
            function.restype, function.argtypes = result, arguments
        self._library = simulator
        self._sim = simulator.sim_create(
            self.dram.ctypes.data, dram_bytes, dram_latency, dram_bytes_per_cycle
        )

    @staticmethod
    def _answered(response: int, what: str) -> None:
        if response < 0:
            raise DeviceTimeout(f"the host port did not answer a {what}")
        if response != 0:
            text = f"the host port refused a {what} (AXI response {response})"
            raise DeviceError(text)

    def read_register(self, address: int) -> int:
        """Reads a 32-bit register over AXI4-Lite."""
        value = ctypes.c_uint32()
        response = self._library.sim_read(self._sim, address, ctypes.byref(value))
        self._answered(response, f"read of {address:#x}")
        return value.value

    def write_register(self, address: int, value: int) -> None:
        """Writes a 32-bit register over AXI4-Lite."""
        response = self._library.sim_write(self._sim, address, value)
        self._answered(response, f"write of {address:#x}")

    def run(self, max_cycles: int | None) -> bool:
        """Runs until the interrupt is high; returns False if `max_cycles` passed before."""
        limit = (1 << 63) if max_cycles is None else max_cycles
        return bool(self._library.sim_run(self._sim, limit))

    @property
    def simulated_cycles(self) -> int:
        """Clock cycles since the simulation began, host accesses included."""
        return int(self._library.sim_cycles(self._sim))

    @property
    def dram_traffic(self) -> tuple[int, int]:
        """Bytes read from and written to DRAM since the simulation began, fetches included."""
        return (
            int(self._library.sim_read_bytes(self._sim)),
            int(self._library.sim_written_bytes(self._sim)),
        )

    def close(self) -> None:
        """Ends the simulation; harmless if done before."""
        if self._sim:
            self._library.sim_destroy(self._sim)
            self._sim = None


class FastRtlBackend(RtlBackend):
    """The `rtl-fast` device: `RtlBackend` with its floating-point cells in C++; same options."""

    def __init__(self, config: CoreConfig, **options: Any) -> None:
        super().__init__(config, fast=True, **options)
