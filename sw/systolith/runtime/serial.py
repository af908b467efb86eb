"""The `uart` device: a board at the other end of a serial line.

The protocol is that of `systolith_hdl.board.protocol`. The same class talks to a real board and to
the simulated one: they differ in the `Line` under it.
"""

from __future__ import annotations

import binascii
import struct
import time
from typing import Any, Protocol

import numpy as np
from systolith_hdl import regs
from systolith_hdl.board import protocol
from systolith_hdl.board.protocol import Operation, Status
from systolith_hdl.board.top import BAUD
from systolith_hdl.config import CoreConfig

from ..errors import BackendError, DeviceError, DeviceTimeout

#: Words of DRAM in one request: what a lost byte costs.
_WORDS = 4096
_MEANING = {
    Status.BAD_HEADER: "it got a request with a wrong header",
    Status.BAD_DATA: "it got data with a wrong checksum",
    Status.UNKNOWN_OPERATION: "it does not know the operation",
    Status.BAD_ADDRESS: "it has no such address",
    Status.REFUSED: "the host port refused the access",
    Status.INCOMPLETE: "it got only the beginning of the request",
}


class Line(Protocol):
    """A serial line to a board.

    Members
    -------
    seconds : time that has passed for the board
    """

    @property
    def seconds(self) -> float: ...

    def send(self, data: bytes) -> None:
        """Sends bytes."""

    def receive(self, count: int) -> bytes:
        """Waits for `count` bytes; returns fewer if they do not come."""

    def discard(self) -> None:
        """Drops what has come and was not received."""

    def close(self) -> None:
        """Releases the line."""


class SerialPort:
    """A real serial port, through pyserial.

    Parameters
    ----------
    port : its name, as ``/dev/ttyUSB0`` or ``COM3``
    baud : bits per second
    timeout : seconds to wait for an answer, more than the board takes to find the line silent
    """

    def __init__(self, port: str, *, baud: int = BAUD, timeout: float = 1.0) -> None:
        try:
            import serial
        except ImportError as error:
            raise BackendError(
                "the uart device needs pyserial: install it with `pip install pyserial`"
            ) from error
        try:
            self._port = serial.Serial(port, baud, timeout=timeout)
        except (serial.SerialException, ValueError) as error:
            raise BackendError(f"cannot open the serial port {port!r}: {error}") from error

    @property
    def seconds(self) -> float:
        return time.monotonic()

    def send(self, data: bytes) -> None:
        self._port.write(data)

    def receive(self, count: int) -> bytes:
        return bytes(self._port.read(count))

    def discard(self) -> None:
        self._port.reset_input_buffer()

    def close(self) -> None:
        self._port.close()


def checksum(data: bytes) -> bytes:
    """The two bytes that follow `data` on the line."""
    return binascii.crc_hqx(data, 0xFFFF).to_bytes(2, "big")


def request(operation: int, address: int = 0, count: int = 0, words: bytes | None = None) -> bytes:
    """The bytes of a request; `words` are those of an operation that writes."""
    header = struct.pack("<BIH", operation, address, count)
    frame = bytes([protocol.SYNC]) + header + checksum(header)
    return frame if words is None else frame + words + checksum(words)


class SerialBackend:
    """A chip on a board behind the device interface (`systolith.runtime.backend.Backend`).

    Parameters
    ----------
    config : of the chip on the board
    line : to it, a `Line`, or the name of a serial port
    options : of `SerialPort`, for a name

    Raises DeviceError for an answer that says what went wrong, DeviceTimeout for none or half of
    one. A request is never repeated: it may have done its work.
    """

    def __init__(self, config: CoreConfig, *, line: Line | str, **options: Any) -> None:
        self.config = config
        self._line: Line = SerialPort(line, **options) if isinstance(line, str) else line
        try:
            found = self._ask("identification", Operation.INFO, answer=len(protocol.INFO_WORDS))
            info = dict(zip(protocol.INFO_WORDS, (int(n) for n in found), strict=True))
            if info["version"] != protocol.VERSION:
                raise DeviceError(
                    f"the board's bridge has version {info['version']} of the protocol, this "
                    f"software {protocol.VERSION}"
                )
        except BaseException:
            self.close()
            raise
        self.dram_bytes = info["dram_bytes"]
        self.clock_hz = info["clock_hz"]

    def _ask(
        self,
        what: str,
        operation: Operation,
        address: int = 0,
        count: int = 0,
        words: bytes | None = None,
        *,
        answer: int = 0,
    ) -> np.ndarray:
        """Sends a request; returns the `answer` words of its answer."""
        self._line.discard()
        self._line.send(request(operation.value, address, count, words))
        head = self._line.receive(2)
        if len(head) < 2:
            raise DeviceTimeout(f"the board did not answer: {what}")
        if head[0] != protocol.ANSWER:
            raise DeviceError(f"the board answered {head.hex()}, which is no answer: {what}")
        status = head[1]
        size = 4 * answer if status == Status.OK.value else 0
        rest = self._line.receive(size + 2)
        if len(rest) < size + 2:
            raise DeviceTimeout(f"the board sent only a part of its answer: {what}")
        if checksum(head[1:] + rest[:-2]) != rest[-2:]:
            raise DeviceError(f"the board's answer has a wrong checksum: {what}")
        if status != Status.OK.value:
            known = {each.value: text for each, text in _MEANING.items()}
            why = known.get(status, f"status {status}")
            raise DeviceError(f"the board refused: {what}: {why}")
        return np.frombuffer(rest[:-2], "<u4")

    # -- the device interface --------------------------------------------------------------------

    def read_register(self, address: int) -> int:
        """Reads a 32-bit register."""
        what = f"read of register {address:#x}"
        return int(self._ask(what, Operation.READ_REGISTER, address, 1, answer=1)[0])

    def write_register(self, address: int, value: int) -> None:
        """Writes a 32-bit register."""
        words = value.to_bytes(4, "little")
        what = f"write of register {address:#x}"
        self._ask(what, Operation.WRITE_REGISTER, address, 1, words)

    def read_dram(self, address: int, count: int) -> np.ndarray:
        """Copies `count` bytes from a byte address."""
        start, stop = address & ~3, (address + count + 3) & ~3
        parts = []
        for at in range(start, stop, 4 * _WORDS):
            number = min(_WORDS, (stop - at) // 4)
            what = f"read of {number} words of DRAM at {at:#x}"
            parts.append(self._ask(what, Operation.READ_DRAM, at, number, answer=number))
        words = np.concatenate(parts) if parts else np.zeros(0, "<u4")
        return words.view(np.uint8)[address - start : address - start + count].copy()

    def write_dram(self, address: int, data: np.ndarray | bytes | bytearray) -> None:
        """Copies bytes to a byte address."""
        raw = bytes(data)
        # Words at the ends that are written in part keep the rest.
        before = address & 3
        after = -(address + len(raw)) & 3
        if raw and before:
            raw = self.read_dram(address - before, before).tobytes() + raw
        if raw and after:
            raw += self.read_dram(address - before + len(raw), after).tobytes()
        start = address - before
        for at in range(0, len(raw), 4 * _WORDS):
            words = raw[at : at + 4 * _WORDS]
            number = len(words) // 4
            what = f"write of {number} words of DRAM at {start + at:#x}"
            self._ask(what, Operation.WRITE_DRAM, start + at, number, words)

    def run(self, max_cycles: int | None) -> bool:
        """Asks for the interrupt until it is high; returns False if it is not when the time of
        `max_cycles` has passed."""
        limit = None if max_cycles is None else self._line.seconds + max_cycles / self.clock_hz
        while True:
            over = limit is not None and self._line.seconds >= limit
            status = self.read_register(regs.address("IRQ_STATUS"))
            if status & self.read_register(regs.address("IRQ_ENABLE")):
                return True
            if over:
                return False

    def close(self) -> None:
        """Releases the line."""
        self._line.close()
