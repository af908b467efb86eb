"""The driver on a simulated board, over its serial line; bad requests."""

import os
import random
import re
import select
import struct
import threading
import tty
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import systolith
from systolith.errors import BackendError, DeviceError, DeviceTimeout
from systolith.runtime import Driver, open_backend
from systolith.runtime.board import SimulatedBoard, SimulatedLine
from systolith.runtime.serial import SerialBackend, checksum, request
from systolith_hdl import regs
from systolith_hdl.board import protocol
from systolith_hdl.board.protocol import Operation, Status
from systolith_hdl.board.top import DRAM_BYTES
from systolith_hdl.config import get_config

CONFIG = get_config("tiny")
MAGIC = regs.MAGIC.to_bytes(4, "little")


@pytest.fixture(scope="module")
def board() -> Iterator[SimulatedBoard]:
    device = SimulatedBoard(CONFIG)
    yield device
    assert device.line.framing_errors == 0
    device.close()


def answer(line: SimulatedLine, status: Status, words: bytes = b"") -> None:
    """Takes an answer, which must be this one, and nothing may follow it."""
    body = bytes([status.value]) + words
    wanted = bytes([protocol.ANSWER]) + body + checksum(body)
    assert line.receive(len(wanted) + 1) == wanted


def identifies(line: SimulatedLine) -> None:
    """The bridge answers a request as if nothing had happened."""
    line.send(request(Operation.READ_REGISTER.value, regs.address("ID"), 1))
    answer(line, Status.OK, MAGIC)


def loss(w: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return ((jnp.tanh(x @ w[0]) @ w[1] - y) ** 2).mean()


def step(w: list[jax.Array], x: jax.Array, y: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    value, slopes = jax.value_and_grad(loss)(w, x, y)
    return value, [a - 0.1 * b for a, b in zip(w, slopes, strict=True)]


def test_training_over_the_line_equals_golden() -> None:
    rng = np.random.default_rng(1)
    shapes = ((6, 8), (8, 3), (5, 6), (5, 3))
    *w, x, y = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    results = []
    for device in ("golden", "board"):
        with systolith.Device(device, config=CONFIG, dram_bytes=DRAM_BYTES) as chip:
            run = systolith.jit(step, device=chip)
            weights, losses = w, []
            for _ in range(2):
                value, weights = run(weights, x, y)
                losses.append(np.asarray(value))
            results.append([*losses, *(np.asarray(each) for each in weights)])
            cycles = run.stats()["cycles"]
    assert cycles > 0
    for wanted, got in zip(*results, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert losses[1] < losses[0]


def test_faults_and_timeouts_leave_it_usable(board: SimulatedBoard) -> None:
    from systolith.errors import DeviceFault
    from systolith.kernel import KernelBuilder

    driver = Driver(board)
    nc = KernelBuilder(CONFIG, name="increment")
    tile = nc.sbuf.tile(4)
    nc.vector.memset(tile.view(), 1.0)
    loaded = driver.load(nc.finish())
    with pytest.raises(DeviceTimeout, match="did not end within 1 cycles"):
        # Starting takes longer than a cycle, so the program is stopped before it is started.
        driver.start(loaded)
        board.write_register(regs.address("IRQ_STATUS"), 1)
        driver.wait(timeout=1)
    place = loaded._stream_address["vector"]
    kept = board.read_dram(place, 64)
    board.write_dram(place, bytes([0x7F]))
    with pytest.raises(DeviceFault, match="ILLEGAL_OPCODE"):
        loaded.run()
    board.write_dram(place, kept)
    assert loaded.run().instructions["vector"] == 2
    loaded.unload()


@pytest.mark.parametrize(
    ("address", "count"), [(0, 1), (1, 1), (2, 7), (63, 66), (1001, 20000), (DRAM_BYTES - 3, 3)]
)
def test_dram(board: SimulatedBoard, address: int, count: int) -> None:
    """Every byte written is read, and those beside them stay."""
    rng = np.random.default_rng(address)
    around = slice(max(address - 8, 0), min(address + count + 8, DRAM_BYTES))
    before = rng.integers(0, 256, around.stop - around.start).astype(np.uint8)
    board.write_dram(around.start, before)
    wanted = before.copy()
    wanted[address - around.start :][:count] = data = rng.integers(0, 256, count).astype(np.uint8)
    board.write_dram(address, data)
    np.testing.assert_array_equal(board.read_dram(address, count), data)
    np.testing.assert_array_equal(board.read_dram(around.start, len(before)), wanted)


def test_errors_of_the_host(board: SimulatedBoard) -> None:
    with pytest.raises(DeviceError, match=r"read of register 0xff0: the host port refused"):
        board.read_register(0xFF0)
    with pytest.raises(DeviceError, match=r"write of register 0x0: the host port refused"):
        board.write_register(0, 1)
    with pytest.raises(DeviceError, match="no such address"):
        board.read_register(2)
    with pytest.raises(DeviceError, match="no such address"):
        board.read_dram(DRAM_BYTES - 4, 8)
    with pytest.raises(DeviceError, match="no such address"):
        board.write_dram(DRAM_BYTES - 4, bytes(8))
    assert board.read_register(0) == regs.MAGIC


@pytest.mark.parametrize("place", range(1, 10))
def test_a_damaged_header(board: SimulatedBoard, place: int) -> None:
    frame = bytearray(request(Operation.READ_REGISTER.value, 0, 1))
    frame[place] ^= 1 << place % 8
    board.line.send(bytes(frame))
    answer(board.line, Status.BAD_HEADER)
    identifies(board.line)


def test_damaged_data_is_not_written(board: SimulatedBoard) -> None:
    seed = regs.address("SEED")
    board.write_register(seed, 0x1234)
    frame = bytearray(request(Operation.WRITE_REGISTER.value, seed, 1, bytes(4)))
    for place in range(10, 16):
        damaged = frame.copy()
        damaged[place] ^= 0x10
        board.line.send(bytes(damaged))
        answer(board.line, Status.BAD_DATA)
        assert board.read_register(seed) == 0x1234
    board.line.send(bytes(frame))
    answer(board.line, Status.OK)
    assert board.read_register(seed) == 0


@pytest.mark.parametrize(
    ("operation", "address", "count", "status"),
    [
        (0, 0, 1, Status.UNKNOWN_OPERATION),
        (6, 0, 1, Status.UNKNOWN_OPERATION),
        (Operation.READ_REGISTER.value, 0, 0, Status.BAD_ADDRESS),
        (Operation.READ_REGISTER.value, 0, 2, Status.BAD_ADDRESS),
        (Operation.READ_REGISTER.value, 0x1000, 1, Status.BAD_ADDRESS),
        (Operation.READ_DRAM.value, 0, 0, Status.BAD_ADDRESS),
        (Operation.READ_DRAM.value, 2, 1, Status.BAD_ADDRESS),
        (Operation.READ_DRAM.value, 0xFFFFFFFC, 2, Status.BAD_ADDRESS),
        (Operation.READ_DRAM.value, 4, DRAM_BYTES // 4, Status.BAD_ADDRESS),
    ],
)
def test_wrong_requests(
    board: SimulatedBoard, operation: int, address: int, count: int, status: Status
) -> None:
    board.line.send(request(operation, address, count))
    answer(board.line, status)
    identifies(board.line)


def test_a_wrong_write_is_read_to_its_end(board: SimulatedBoard) -> None:
    board.write_dram(0, bytes(range(16)))
    for address in (2, DRAM_BYTES, 1 << 31):
        words = request(Operation.READ_REGISTER.value, 0, 1) + bytes(2)  # must not be obeyed
        board.line.send(request(Operation.WRITE_DRAM.value, address, 3, words))
        answer(board.line, Status.BAD_ADDRESS)
    np.testing.assert_array_equal(board.read_dram(0, 16), np.arange(16))


@pytest.mark.parametrize("kept", [1, 2, 9, 10, 11, 17, 18, 19])
def test_a_request_that_stops(board: SimulatedBoard, kept: int) -> None:
    frame = request(Operation.WRITE_DRAM.value, 0, 2, bytes(8))
    assert len(frame) == 20
    board.line.send(frame[:kept])
    answer(board.line, Status.INCOMPLETE)
    identifies(board.line)


def test_noise_between_requests(board: SimulatedBoard) -> None:
    board.line.send(bytes(b for b in range(256) if b != protocol.SYNC))
    identifies(board.line)


def test_random_bytes_never_hang_it(board: SimulatedBoard) -> None:
    """Whatever was sent, the bridge answers at most once a request and then the next request."""
    rng = random.Random(5)
    for _ in range(40):
        frame = bytearray(
            request(
                rng.choice([0, 1, 2, 4, 5]),
                rng.choice([0, 0, 4, rng.getrandbits(32)]),
                rng.randrange(4),
                rng.choice([None, rng.randbytes(rng.randrange(20))]),
            )
        )
        for _ in range(rng.randrange(3)):
            frame[rng.randrange(len(frame))] = rng.getrandbits(8)
        board.line.send(bytes(frame) + rng.randbytes(rng.randrange(4)))
        # Until it has been silent for as long as any answer takes.
        while board.line.receive(4096):
            pass
        identifies(board.line)


def test_answers_the_driver_does_not_take() -> None:
    class Other:
        seconds = 0.0
        closed = False

        def __init__(self, *answers: bytes) -> None:
            self._answers = b"".join(answers)

        def send(self, data: bytes) -> None:
            assert data == request(Operation.INFO.value)

        def receive(self, count: int) -> bytes:
            head, self._answers = self._answers[:count], self._answers[count:]
            return head

        def discard(self) -> None: ...

        def close(self) -> None:
            self.closed = True

    body = b"\0" + struct.pack("<3I", 2, 0, 0)
    for line, error, message in (
        (Other(b"\xa5", body, checksum(body)), DeviceError, "version 2 of the protocol"),
        (Other(b"\xa5", body, b"xx"), DeviceError, "wrong checksum"),
        (Other(b"\xa5", body), DeviceTimeout, "only a part"),
        (Other(b"hello"), DeviceError, "which is no answer"),
        (Other(), DeviceTimeout, "did not answer: identification"),
    ):
        with pytest.raises(error, match=message):
            SerialBackend(CONFIG, line=line)
        assert line.closed


def test_a_board_of_another_config() -> None:
    line = SimulatedLine(CONFIG)
    with pytest.raises(systolith.errors.ConfigMismatch, match="config hash"):
        Driver(SerialBackend(get_config("nano"), line=line))
    line.close()


def test_a_serial_port() -> None:
    """The class for real ports, at a pseudo-terminal whose other end is the simulated board."""
    line = SimulatedLine(CONFIG)
    host, device = os.openpty()
    tty.setraw(device)
    done = threading.Event()

    def carry() -> None:
        while not done.is_set():
            if select.select([host], [], [], 0.05)[0]:
                line.send(os.read(host, 4096))
                while data := line.receive(4096):
                    os.write(host, data)

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        board = SerialBackend(CONFIG, line=os.ttyname(device), timeout=60.0)
        driver = Driver(board)
        data = np.arange(300, dtype=np.float32)
        np.testing.assert_array_equal(driver.read(driver.put(data)), data)
        with pytest.raises(DeviceError, match="the host port refused"):
            board.read_register(0xFF0)
        assert not board.run(1)
        board.close()
    finally:
        done.set()
        thread.join()
        os.close(host)
        os.close(device)
    line.close()


def test_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "board.md").read_text()
    for enum in (Operation, Status):
        rows = re.findall(r"^\| `(\d+)` (\w+) \|", text, re.MULTILINE)
        for member in enum:
            assert (str(member.value), member.name) in rows
    assert f"`{protocol.SYNC:#04X}`".replace("X", "x") in text
    assert f"`{protocol.ANSWER:#04X}`".replace("X", "x") in text


def test_a_port_that_does_not_exist() -> None:
    with pytest.raises(BackendError, match=r"pyserial|cannot open the serial port"):
        open_backend("uart", CONFIG, line="no-such-port")
