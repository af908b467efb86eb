"""The RTL device: bad programs end in exceptions and leave it usable, bad machines are named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import systolith
from systolith.errors import BackendError, ConfigMismatch, DeviceFault, DeviceTimeout
from systolith.golden.device import GoldenDevice
from systolith.kernel import KernelBuilder
from systolith.program import Program
from systolith.runtime.driver import Driver
from systolith.runtime.rtl import RtlBackend, build
from systolith_hdl import regs
from systolith_hdl.config import get_config
from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Opcode, WaitMode
from systolith_hdl.toolchain import ToolError

NANO = get_config("nano")


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver(RtlBackend(NANO), watchdog=5000) as device:
        yield device


def increment() -> Program:
    """y = x + 1 for 4 x 8 numbers: one load, one vector instruction, one store."""
    nc = KernelBuilder(NANO, name="increment")
    x = nc.dram.tensor("x", (4, 8), DType.FP32, kind="input")
    y = nc.dram.tensor("y", (4, 8), DType.FP32, kind="output")
    tile = nc.sbuf.tile(8)
    nc.dma.load(tile.view((8,)), x, 0, (4,), 32)
    nc.vector.tensor_scalar(tile.view((8,)), tile.view((8,)), AluOp.ADD, 1.0)
    nc.dma.store(tile.view((8,)), y, 0, (4,), 32)
    return nc.finish()


def works(driver: Driver) -> None:
    """Runs the program as it should be."""
    loaded = driver.load(increment())
    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    driver.write(loaded.tensors["x"], x)
    counters = driver.run(loaded)
    np.testing.assert_array_equal(driver.read(loaded.tensors["y"]), x + 1)
    assert counters.instructions["vector"] == 2
    loaded.unload()


#: what is changed in the program -> cause, and engine that stops
BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "out of range": ("vector", {"src0.base": NANO.sbuf_depth - 7}, "OUT_OF_BOUNDS"),
    "below zero": ("vector", {"dst.base": 3, "dst.strides.3": -1}, "OUT_OF_BOUNDS"),
    "type": ("vector", {"dst.dtype": 9}, "BAD_TYPE"),
    "space": ("dma0", {"local.space": 1}, "BAD_SPACE"),
    "operation": ("vector", {"op0": 63}, "ILLEGAL_OPERATION"),
    "lanes": ("dma0", {"lanes": 5}, "BAD_COUNT"),
    "count": ("vector", {"counts.1": 0}, "BAD_COUNT"),
    "semaphore": ("vector", {"signal.sem": 63, "signal.amount": 1}, "BAD_SEMAPHORE"),
    "remote chip": ("vector", {"signal.chip": 1, "signal.amount": 1}, "BAD_SEMAPHORE"),
    "read outside DRAM": ("dma0", {"dram_strides.3": 1 << 28}, "AXI_READ_ERROR"),
    "write outside DRAM": ("dma1", {"dram_base": 1 << 40}, "AXI_WRITE_ERROR"),
    "deadlock": (
        "vector",
        {"wait.0.sem": 9, "wait.0.mode": WaitMode.AT_LEAST, "wait.0.value": 1},
        "WATCHDOG",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_program_faults_as_golden_and_the_device_stays_usable(
    driver: Driver, kind: str
) -> None:
    engine, fields, cause = BROKEN[kind]
    program = increment().with_fields(engine, 0, fields)
    records = []
    for device in (driver, Driver(GoldenDevice("nano"))):
        loaded = device.load(program)
        with pytest.raises(DeviceFault) as caught:
            device.run(loaded)
        fault = caught.value
        assert fault.cause == cause
        assert fault.source is not None and "test_rtl_device.py" in fault.source
        assert fault.instruction is not None
        records.append((fault.engine, fault.pc, fault.cause, fault.address, fault.instruction))
        loaded.unload()
        works(device)
    assert records[0] == records[1]


def by_index(numbers: list[int]) -> Program:
    """Adds rows of x to those of y that the numbers pick, and copies rows of y to z."""
    nc = KernelBuilder("nano", name="by_index")
    x = nc.dram.tensor("x", (len(numbers), 8), DType.FP32)
    y = nc.dram.tensor("y", (5, 8), DType.FP32)
    z = nc.dram.tensor("z", (len(numbers), 8), DType.FP32, kind="output")
    picks = nc.dram.tensor("picks", kind="constant", data=np.array(numbers, np.int32))
    columns = -(-len(numbers) // 4)
    index = nc.sbuf.tile(columns).view().astype(DType.INT32)
    view = nc.sbuf.tile(2 * len(numbers)).view((len(numbers), 2))
    nc.dma.load(index, picks, 0, (16,), 4)
    nc.dma.load(view, x, 0, (32, 16), 4)
    nc.dma.scatter(view, y, index, accumulate=True)
    nc.dma.gather(view, y, index)
    nc.dma.store(view, z, 0, (32, 16), 4)
    return nc.finish()


@pytest.mark.parametrize("bad", [None, 5, -1])
def test_rows_by_index_as_golden(driver: Driver, bad: int | None) -> None:
    """Memory, counters and fault: the rows before a bad index are moved, no others."""
    numbers = [0, 3, 3, 4, 1, 3, 0, 3]
    if bad is not None:
        numbers[5] = bad
    found = []
    for device in (driver, Driver(GoldenDevice("nano"))):
        loaded = device.load(by_index(numbers))
        x = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
        device.write(loaded.tensors["x"], x)
        device.write(loaded.tensors["y"], np.full((5, 8), 0.1, np.float32))
        record: tuple = ()
        if bad is None:
            counters = device.run(loaded)
            record = counters.instructions, device.read(loaded.tensors["z"]).tobytes()
        else:
            with pytest.raises(DeviceFault, match="SCATTER") as caught:
                device.run(loaded)
            fault = caught.value
            assert (fault.cause, fault.address) == ("OUT_OF_BOUNDS", bad % (1 << 32))
            record = fault.engine, fault.pc, fault.instruction
        y = np.full((5, 8), 0.1, np.float32)
        for row, number in enumerate(numbers[: 8 if bad is None else 5]):
            y[number] += x[row]
        np.testing.assert_array_equal(device.read(loaded.tensors["y"]), y)
        found.append(record)
        loaded.unload()
        works(device)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda raw: bytes([0x7F]) + raw[1:], "ILLEGAL_OPCODE"),
        (lambda raw: bytes([Opcode.MATMUL.value]) + raw[1:], "ILLEGAL_OPCODE"),
        (lambda raw: raw[:15] + bytes([raw[15] | 0x80]) + raw[16:], "RESERVED_BITS"),
    ],
)
def test_illegal_bytes_in_dram(driver: Driver, damage: Any, cause: str) -> None:
    """What the host could write over a program while it is loaded."""
    loaded = driver.load(increment())
    place = loaded._stream_address["vector"]
    driver.backend.write_dram(place, damage(driver.backend.read_dram(place, 64).tobytes()))
    with pytest.raises(DeviceFault, match=cause):
        driver.run(loaded)
    loaded.unload()
    works(driver)


def test_timeout(driver: Driver) -> None:
    loaded = driver.load(increment())
    with pytest.raises(DeviceTimeout, match="did not end within 20 cycles"):
        driver.run(loaded, timeout=20)
    loaded.unload()
    works(driver)


def test_a_program_for_another_config_is_refused(driver: Driver) -> None:
    nc = KernelBuilder("small", name="other")
    nc.vector.memset(nc.sbuf.tile(1).view(), 0.0)
    with pytest.raises(ConfigMismatch, match="lanes: 8 there, 4 here"):
        driver.load(nc.finish())


def test_registers_that_do_not_exist(driver: Driver) -> None:
    with pytest.raises(systolith.errors.DeviceError, match="refused a read"):
        driver.backend.read_register(0xFF0)
    with pytest.raises(systolith.errors.DeviceError, match="refused a write"):
        driver.backend.write_register(regs.address("ID"), 1)


def test_dram_latency_and_bandwidth_count() -> None:
    """A slower DRAM costs cycles and changes nothing else."""
    cycles = {}
    for latency, width in ((1, 64), (100, 64), (1, 1)):
        backend = RtlBackend(NANO, dram_latency=latency, dram_bytes_per_cycle=width)
        with Driver(backend) as device:
            loaded = device.load(increment())
            x = np.ones((4, 8), np.float32)
            device.write(loaded.tensors["x"], x)
            cycles[latency, width] = device.run(loaded).cycles
            np.testing.assert_array_equal(device.read(loaded.tensors["y"]), x + 1)
            read, written = backend.dram_traffic
            assert written == 4 * 32
            assert read >= 4 * 32 + 64 * 5
    assert cycles[100, 64] > cycles[1, 64] + 2 * 99 - 20  # a load and a store each wait for it
    assert cycles[1, 1] > cycles[1, 64] + 200


@pytest.mark.parametrize("options", [{"dram_latency": -1}, {"dram_bytes_per_cycle": 0}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(BackendError, match=next(iter(options))):
        RtlBackend(NANO, **options)  # type: ignore[arg-type]


def test_unknown_config() -> None:
    with pytest.raises(ValueError, match="unknown config 'huge'; the presets are tiny, nano"):
        systolith.Device("rtl", config="huge")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("CXX", "no-such-compiler", "no C.. compiler"), ("PATH", "", "not on PATH")],
)
def test_missing_tools(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ToolError, match=message):
        build(NANO)


def test_missing_compiler_on_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "systolith.cli", "train", "digits", "--device", "rtl"],
        env={"CXX": "no-such-compiler", "PATH": "", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
