"""The driver on the golden device: placing, binding, counters, faults of each kind, recovery."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from systolith.errors import (
    BackendError,
    ConfigMismatch,
    DeviceError,
    DeviceFault,
    DeviceTimeout,
    OutOfMemory,
    ProgramError,
    TensorError,
)
from systolith.golden import GoldenDevice
from systolith.kernel import AluOp, DType, KernelBuilder
from systolith.program import Program
from systolith.runtime import Backend, Counters, Driver, open_backend
from systolith_hdl import regs
from systolith_hdl.config import PRESETS
from systolith_hdl.isa import Opcode, encode

NANO = PRESETS["nano"]


def product() -> Program:
    """y = w.T @ x, w a constant."""
    nc = KernelBuilder("nano", name="product")
    x = nc.dram.tensor("x", (4, 16), DType.FP32)
    w = nc.dram.tensor("w", kind="constant", data=np.diag([1, 2, 3, 4]).astype(np.float32))
    y = nc.dram.tensor("y", (4, 16), DType.FP32, kind="output")
    a, b, out, p = nc.sbuf.tile(16), nc.sbuf.tile(4), nc.sbuf.tile(16), nc.psum.tile(16)
    nc.dma.load(a.view(), x, lane_stride=64)
    nc.dma.load(b.view(), w, lane_stride=16)
    nc.tensor.load_stationary(b.view())
    nc.tensor.matmul(p.view(), a.view())
    nc.vector.copy(out.view(), p.view())
    nc.dma.store(out.view(), y, lane_stride=64)
    return nc.finish()


def increment() -> Program:
    """x += 1 in place."""
    nc = KernelBuilder("nano", name="increment")
    x = nc.dram.tensor("x", (4, 8), DType.BF16)
    tile = nc.sbuf.tile(8)
    nc.dma.load(tile.view(), x, lane_stride=16)
    nc.vector.tensor_scalar(tile.view(), tile.view(), AluOp.ADD, 1.0)
    nc.dma.store(tile.view(), x, lane_stride=16)
    return nc.finish()


def patched(program: Program, engine: str, index: int, raw: bytes) -> Program:
    """The program with one instruction replaced."""
    stream = program.streams[engine]
    stream = stream[: 64 * index] + raw + stream[64 * (index + 1) :]
    relocations = tuple(r for r in program.relocations if (r.engine, r.index) != (engine, index))
    return dataclasses.replace(
        program, streams={**program.streams, engine: stream}, relocations=relocations
    )


@pytest.fixture
def driver() -> Driver:
    return Driver(GoldenDevice("nano", dram_bytes=1 << 16))


def check_usable(driver: Driver) -> None:
    """A correct program runs and gives the right result."""
    loaded = driver.load(product())
    x = np.arange(64, dtype=np.float32).reshape(4, 16)
    driver.write(loaded.tensors["x"], x)
    loaded.run()
    want = np.diag([1, 2, 3, 4]).astype(np.float32) @ x
    np.testing.assert_array_equal(driver.read(loaded.tensors["y"]), want)
    loaded.unload()


def test_golden_is_a_backend() -> None:
    assert isinstance(GoldenDevice("nano"), Backend)
    backend = open_backend("golden", "nano", dram_bytes=1 << 14)
    assert len(backend.dram) == 1 << 14
    with pytest.raises(BackendError, match="unknown device 'fpga'; the devices are golden"):
        open_backend("fpga", "nano")


def test_run_and_counters(driver: Driver) -> None:
    check_usable(driver)
    counters = driver.counters()
    assert counters.macs == 4 * 4 * 16
    assert counters.instructions == {"tensor": 3, "vector": 2, "scalar": 1, "dma0": 3, "dma1": 2}
    assert counters.cycles == 0 and set(counters.busy.values()) == {0}
    assert max(driver.semaphores()) > 0


def test_every_register_answers_and_nothing_else_does() -> None:
    device = GoldenDevice("nano")
    known = set()
    for name, register in regs.REGISTERS.items():
        for index in range(register.count(NANO)):
            for word in range(register.words):
                address = regs.address(name, index, word)
                known.add(address)
                if register.access == "ro":
                    with pytest.raises(DeviceError, match="refused a write"):
                        device.write_register(address, 0)
                else:
                    device.write_register(address, 0 if name == "CONTROL" else 0xFFFFFFFF)
                assert 0 <= device.read_register(address) < 1 << 32
    assert device.read_register(regs.address("ID")) == regs.MAGIC
    assert device.read_register(regs.address("STREAM_BASE", 4, 1)) == 0xFFFFFFFF
    for address in set(range(0, 1 << regs.ADDRESS_BITS, 4)) - known:
        with pytest.raises(DeviceError, match="refused a write"):
            device.write_register(address, 0xFFFFFFFF)
        with pytest.raises(DeviceError, match="refused a read"):
            device.read_register(address)


def test_identify() -> None:
    class Strange(GoldenDevice):
        def __init__(self, register: str, value: int) -> None:
            super().__init__("nano", dram_bytes=4096)
            self.strange = regs.address(register), value

        def read_register(self, address: int) -> int:
            wanted, value = self.strange
            return value if address == wanted else super().read_register(address)

    with pytest.raises(DeviceError, match="no Systolith core: ID 0x00000007"):
        Driver(Strange("ID", 7))
    with pytest.raises(DeviceError, match="ISA version 7"):
        Driver(Strange("ISA_VERSION", 7))
    with pytest.raises(ConfigMismatch, match="config hash 0x00000007"):
        Driver(Strange("CONFIG_HASH", 7))


def test_program_of_another_config(driver: Driver) -> None:
    program = KernelBuilder("small").finish()
    with pytest.raises(ConfigMismatch, match="lanes: 8 there, 4 here"):
        driver.load(program)


# -- tensors -----------------------------------------------------------------------------------


def test_tensors(driver: Driver) -> None:
    for array in (
        np.float32(3.5),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(6).astype(ml_dtypes.bfloat16),
        np.arange(-3, 3, dtype=np.int8),
    ):
        tensor = driver.put(array)
        assert tensor.address % 64 == 0
        got = driver.read(tensor)
        assert got.dtype == array.dtype and got.flags.writeable
        np.testing.assert_array_equal(got, array)


def test_tensor_errors(driver: Driver) -> None:
    tensor = driver.allocate((2, 3), DType.FP32, "t")
    with pytest.raises(TensorError, match=r"float64 array of shape \(2, 3\) to tensor 't' \(FP32"):
        driver.write(tensor, np.zeros((2, 3)))
    with pytest.raises(TensorError, match=r"shape \(3, 2\)"):
        driver.write(tensor, np.zeros((3, 2), np.float32))
    with pytest.raises(TensorError, match="no type for numpy float64"):
        driver.allocate((2,), np.float64)
    with pytest.raises(TensorError, match="at least 1"):
        driver.allocate((2, 0), DType.FP32)
    driver.free(tensor)
    for call in (driver.free, driver.read, lambda t: driver.write(t, np.zeros((2, 3), np.float32))):
        with pytest.raises(TensorError, match="free"):
            call(tensor)


def test_out_of_memory(driver: Driver) -> None:
    big = driver.allocate(10000, DType.FP32)
    with pytest.raises(OutOfMemory) as caught:
        driver.allocate(10000, DType.FP32, "weights")
    assert str(caught.value) == (
        "no room for tensor 'weights' (FP32 (10000,)): 40000 bytes wanted, the largest free block "
        "has 25536 (25536 of 65536 bytes free)"
    )
    driver.free(big)
    driver.free(driver.allocate(16384, DType.FP32))


def test_failed_load_leaves_nothing_allocated(driver: Driver) -> None:
    filler = driver.allocate(15000, DType.FP32)
    with pytest.raises(OutOfMemory, match=r"tensor|stream"):
        for _ in range(100):
            driver.load(product())
    free = driver._memory.free_units
    with pytest.raises(OutOfMemory):
        driver.load(product())
    assert driver._memory.free_units == free
    driver.free(filler)


# -- binding -----------------------------------------------------------------------------------


def test_binding_moves_tensors(driver: Driver) -> None:
    loaded = driver.load(increment())
    own = loaded.tensors["x"]
    others = [driver.put(np.full((4, 8), n, ml_dtypes.bfloat16)) for n in range(3)]
    for _ in range(2):
        for other in others:
            loaded.bind({"x": other})
            loaded.run()
    assert [driver.read(other)[0, 0] for other in others] == [2, 3, 4]
    assert not driver.read(own).any()
    loaded.unload()
    loaded.unload()
    with pytest.raises(ProgramError, match="not loaded"):
        driver.start(loaded)


def test_binding_at_load_and_unload_frees(driver: Driver) -> None:
    x = driver.put(np.zeros((4, 8), ml_dtypes.bfloat16), "mine")
    free = driver._memory.free_units
    loaded = driver.load(increment(), {"x": x})
    loaded.run()
    loaded.unload()
    assert driver._memory.free_units == free
    assert (driver.read(x) == 1).all()


def test_binding_errors(driver: Driver) -> None:
    loaded = driver.load(product())
    with pytest.raises(TensorError, match="cannot bind 'x', FP32"):
        loaded.bind({"x": driver.allocate((4, 16), DType.BF16)})
    with pytest.raises(TensorError, match="overlapping memory"):
        loaded.bind({"y": loaded.tensors["x"]})
    with pytest.raises(ProgramError, match="no tensor 'z'"):
        loaded.bind({"z": loaded.tensors["x"]})
    with pytest.raises(TensorError, match="'w' is a constant"):
        driver.load(product(), {"w": driver.allocate((4, 4), DType.FP32)})
    gone = driver.allocate((4, 16), DType.FP32)
    loaded.bind({"x": gone})
    driver.free(gone)
    with pytest.raises(TensorError, match=r"'x' is bound to tensor .* freed"):
        loaded.run()
    with pytest.raises(TensorError, match="freed"):
        loaded.bind({"x": gone})


def test_running_excludes(driver: Driver) -> None:
    loaded = driver.load(product())
    driver.start(loaded)
    for call in (
        lambda: driver.start(loaded),
        lambda: driver.load(product()),
        lambda: loaded.bind({}),
        loaded.unload,
    ):
        with pytest.raises(DeviceError, match="is running"):
            call()
    driver.wait()
    with pytest.raises(DeviceError, match="no program was started"):
        driver.wait()


# -- faults ------------------------------------------------------------------------------------


def memset(**changes: int) -> bytes:
    fields = {"lanes": 4, **{f"counts.{i}": 1 for i in range(4)}}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return encode(Opcode.MEMSET, fields)


def with_bit(raw: bytes, bit: int) -> bytes:
    return (int.from_bytes(raw, "little") | 1 << bit).to_bytes(64, "little")


DMA = {f"counts.{i}": 1 for i in range(4)} | {"lanes": 1}
#: cause -> (engine, instruction, address)
FAULTS = {
    "ILLEGAL_OPCODE": ("vector", bytes([0xFF]) + bytes(63), 0),
    "RESERVED_BITS": ("vector", with_bit(memset(), 126), 0),
    "ILLEGAL_OPERATION": ("vector", memset(wait__0__mode=3), 0),
    "BAD_TYPE": ("vector", memset(dst__dtype=9), 0),
    "BAD_SPACE": ("vector", memset(dst__space=2), 0),
    "BAD_COUNT": ("vector", memset(lanes=5), 0),
    "BAD_SEMAPHORE": ("vector", memset(signal__amount=1, signal__sem=40), 0),
    "OUT_OF_BOUNDS": ("vector", memset(dst__strides__3=-1, counts__3=3), -2),
    "AXI_READ_ERROR": (
        "dma0",
        encode(Opcode.DMA_LOAD, DMA | {"dram_base": 1 << 40}),
        1 << 40,
    ),
    "AXI_WRITE_ERROR": (
        "dma1",
        encode(Opcode.DMA_STORE, DMA | {"dram_base": 1 << 16}),
        1 << 16,
    ),
    "WATCHDOG": ("vector", memset(wait__0__mode=1, wait__0__sem=9, wait__0__value=1), 0),
}


@pytest.mark.parametrize("cause", list(FAULTS))
def test_fault(driver: Driver, cause: str) -> None:
    engine, raw, address = FAULTS[cause]
    program = patched(product(), engine, 0, raw)
    loaded = driver.load(program)
    with pytest.raises(DeviceFault) as caught:
        loaded.run()
    fault = caught.value
    assert (fault.engine, fault.pc, fault.cause, fault.address) == (engine, 0, cause, address)
    assert fault.instruction is not None and fault.instruction in str(fault)
    assert fault.source is not None and "test_driver.py:" in fault.source
    assert cause in str(fault) and fault.source in str(fault)
    loaded.unload()
    check_usable(driver)


def test_semaphore_overflow_fault(driver: Driver) -> None:
    stream = encode(Opcode.NOP, {"signal.sem": 3, "signal.amount": 255}) * 258
    stream += encode(Opcode.END, {})
    program = KernelBuilder("nano").finish()
    program = dataclasses.replace(program, streams={**program.streams, "scalar": stream}, debug={})
    with pytest.raises(DeviceFault, match=r"scalar stopped at instruction 257: SEMAPHORE_OVERFLOW"):
        driver.load(program).run()
    check_usable(driver)


def test_fetch_error_fault(driver: Driver) -> None:
    loaded = driver.load(KernelBuilder("nano").finish())
    loaded._stream_address["scalar"] = 1 << 16
    driver.start(loaded)
    with pytest.raises(DeviceFault, match=r"scalar .* 0: FETCH_ERROR, address 65536 \(0x10000\)"):
        driver.wait()
    check_usable(driver)


def test_timeout(driver: Driver) -> None:
    """Without a watchdog a deadlock ends at the time limit, and nothing hangs."""
    driver = Driver(driver.backend, watchdog=0)
    raw = memset(wait__0__mode=1, wait__0__sem=9, wait__0__value=1)
    program = patched(product(), "vector", 0, raw)
    for options in ({"timeout": 10_000}, {}):
        with pytest.raises(DeviceTimeout, match=r"did not end within .* completed: tensor .*/3"):
            driver.load(program).run(**options)
    check_usable(driver)


def test_progress(driver: Driver) -> None:
    seen: list[Counters] = []
    driver.load(product()).run(progress=seen.append, chunk=4)
    assert [sum(c.instructions.values()) for c in seen] == [4, 8]


def test_an_interrupted_wait_leaves_the_device_usable(driver: Driver) -> None:
    def interrupt(_: Counters) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.load(product()).run(progress=interrupt, chunk=1)
    check_usable(driver)


def test_context_manager() -> None:
    with Driver(GoldenDevice("nano", dram_bytes=4096)) as driver:
        assert driver.config is NANO
