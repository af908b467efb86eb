"""The `board` device: the whole board, simulated to the bits on its serial line."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from systolith_hdl.board.top import CLOCK_HZ, Board
from systolith_hdl.config import CoreConfig
from systolith_hdl.emit import to_verilog
from systolith_hdl.toolchain import content_hash, sources_hash

from .rtl import Progress, verilate
from .serial import SerialBackend
from .verilog import with_held_inputs

_HARNESS = Path(__file__).with_name("board.cpp")
_TOP = "simulated_board"
_BYTE_BITS = 10


class SimulatedLine:
    """The serial line of a simulated board (`systolith.runtime.serial.Line`).

    Parameters
    ----------
    config : of its chip
    divisor : clock cycles per bit
    silence : cycles without a byte after which the board takes the line for silent
    dram_bytes : of the board
    fast : the floating-point cells are C++ instead of gates
    progress : called with a line of text when a long step begins
    """

    def __init__(
        self,
        config: CoreConfig,
        *,
        divisor: int = 8,
        silence: int = 2000,
        dram_bytes: int = 1 << 16,
        fast: bool = False,
        progress: Progress = lambda message: None,
    ) -> None:
        options = {
            "dram_bytes": dram_bytes,
            "clock_hz": CLOCK_HZ,
            "baud": CLOCK_HZ // divisor,
            "silence": silence,
        }
        library = ctypes.CDLL(
            str(
                verilate(
                    f"board-{config.name}{'-fast' if fast else ''}",
                    _TOP,
                    lambda: with_held_inputs(
                        to_verilog(Board(config, **options), "board"), "board", _TOP
                    ),
                    _HARNESS,
                    sources=content_hash(sources_hash(), repr(config), repr(options)),
                    fast=fast,
                    progress=progress,
                )
            )
        )
        u8, u32, u64, handle = (
            ctypes.c_char_p,
            ctypes.c_uint32,
            ctypes.c_uint64,
            ctypes.c_void_p,
        )
        for name, result, arguments in (
            ("board_create", handle, [u32]),
            ("board_destroy", None, [handle]),
            ("board_cycles", u64, [handle]),
            ("board_framing_errors", u64, [handle]),
            ("board_interrupt", ctypes.c_int, [handle]),
            ("board_send", None, [handle, u8, u64]),
            ("board_receive", u64, [handle, u8, u64, u64]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        #: A silent board answers after `silence` cycles; the rest is time for the answer to begin.
        self._patience = 2 * silence + 100 * _BYTE_BITS * divisor
        self._sim = library.board_create(divisor)

    @property
    def cycles(self) -> int:
        """Clock cycles since the simulation began."""
        return int(self._library.board_cycles(self._sim))

    @property
    def framing_errors(self) -> int:
        """Bytes from the board without a stop bit: there must be none."""
        return int(self._library.board_framing_errors(self._sim))

    @property
    def interrupt(self) -> bool:
        """The chip's interrupt, a light on the board."""
        return bool(self._library.board_interrupt(self._sim))

    @property
    def seconds(self) -> float:
        return self.cycles / CLOCK_HZ

    def send(self, data: bytes) -> None:
        self._library.board_send(self._sim, data, len(data))

    def receive(self, count: int) -> bytes:
        buffer = ctypes.create_string_buffer(count)
        got = self._library.board_receive(self._sim, buffer, count, self._patience)
        return buffer.raw[:got]

    def discard(self) -> None:
        """Drops what has come; the simulation stands still in between, so that is all there is."""
        while self.receive_now():
            pass

    def receive_now(self) -> bytes:
        """Returns the bytes that have come already, 4096 at most."""
        buffer = ctypes.create_string_buffer(4096)
        got = self._library.board_receive(self._sim, buffer, 4096, 0)
        return buffer.raw[:got]

    def close(self) -> None:
        """Ends the simulation; harmless if done before."""
        if self._sim:
            self._library.board_destroy(self._sim)
            self._sim = None


class SimulatedBoard(SerialBackend):
    """The driver's way to a simulated board: `SerialBackend` on a `SimulatedLine` with these
    options."""

    def __init__(self, config: CoreConfig, **options: Any) -> None:
        self.line = SimulatedLine(config, **options)
        super().__init__(config, line=self.line)
