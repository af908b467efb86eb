"""The golden device as a debugger: races, undefined memory, breakpoints."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import systolith
from systolith.errors import BackendError, DeviceError, RaceError, UndefinedError
from systolith.golden import GoldenDevice
from systolith.golden.debugger import Moment
from systolith.kernel import AluOp, DType, Function, KernelBuilder
from systolith.program import Program
from systolith.runtime import Driver
from systolith.train import digits
from systolith_hdl.isa import Opcode, Space, WaitMode, decode
from systolith_tb.bench_chip import random_kernel, run_on

FP32 = 4


def line() -> int:
    """Line number of the caller."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


def execute(program: Program, *, check: bool = True, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """Runs a program on a checked device; returns its outputs."""
    with systolith.Device("golden", config="nano", check=check) as device:
        loaded = device.driver.load(program)
        for name, array in arrays.items():
            device.driver.write(loaded.tensors[name], array)
        loaded.run()
        return {
            tensor.name: device.driver.read(loaded.tensors[tensor.name])
            for tensor in program.tensors
            if tensor.kind == "output"
        }


def without_wait(program: Program, engine: str, index: int, slot: int) -> Program:
    return program.with_fields(
        engine, index, {f"wait.{slot}.{part}": 0 for part in ("sem", "mode", "value")}
    )


def waits(program: Program) -> list[tuple[str, int, int]]:
    """(engine, index, slot) of every wait."""
    return [
        (engine, index, slot)
        for engine, index, raw in program.instructions()
        for slot in range(3)
        if decode(raw)[1][f"wait.{slot}.mode"] != WaitMode.NONE.value
    ]


def chain() -> tuple[Program, dict[str, int]]:
    """A kernel that goes through every engine, and the lines of its statements."""
    nc = KernelBuilder("nano", name="chain")
    n = nc.config.lanes
    x = nc.dram.tensor("x", (n, n), DType.FP32)
    y = nc.dram.tensor("y", (n, n), DType.FP32, kind="output")
    a, b = nc.sbuf.tile(n).view(), nc.sbuf.tile(n).view()
    sums = nc.psum.tile(n).view()
    lines = {}
    lines["load"] = line() + 1
    nc.dma.load(a, x, lane_stride=n * FP32)
    nc.tensor.load_stationary(a)
    lines["matmul"] = line() + 1
    nc.tensor.matmul(sums, a)
    with nc.label("exponential"):
        lines["exp"] = line() + 1
        nc.scalar.activate(b, sums, Function.EXP)
    nc.vector.tensor_tensor(b, b, AluOp.ADD, b)
    lines["store"] = line() + 1
    nc.dma.store(b, y, lane_stride=n * FP32)
    return nc.finish(), lines


X = np.arange(16, dtype=np.float32).reshape(4, 4) / 16


def test_a_clean_program_is_left_alone() -> None:
    program, _ = chain()
    checked, plain = (execute(program, check=check, x=X)["y"] for check in (True, False))
    np.testing.assert_array_equal(checked, plain)


def test_a_race_quotes_both_instructions_and_statements() -> None:
    program, lines = chain()
    assert decode(program.instruction("scalar", 0))[0] is Opcode.ACTIVATE
    with pytest.raises(RaceError) as caught:
        execute(without_wait(program, "scalar", 0, 0), x=X)
    error = caught.value
    first, second = ("matmul", "exp") if error.first.startswith("tensor") else ("exp", "matmul")
    assert {error.first.split("[")[0], error.second.split("[")[0]} == {"tensor", "scalar"}
    for source, what in ((error.first_source, first), (error.second_source, second)):
        assert source is not None and source.endswith(f"test_debugger.py:{lines[what]}")
    text = str(error)
    assert "MATMUL" in text and "ACTIVATE op0=EXP" in text and "[exponential]" in text
    assert "nc.tensor.matmul(sums, a)" in text and "nc.scalar.activate(b, sums" in text
    assert re.fullmatch(r"word \d+ of partition \d of PSUM", error.place)


@pytest.mark.parametrize("wait", waits(chain()[0]), ids=lambda w: f"{w[0]}{w[1]}.{w[2]}")
def test_every_wait_of_a_kernel_is_needed(wait: tuple[str, int, int]) -> None:
    with pytest.raises(RaceError):
        execute(without_wait(chain()[0], *wait), x=X)


def test_races_in_dram_are_found_byte_by_byte() -> None:
    """Stores of neighbouring columns interleave in DRAM and do not meet; the same column does."""

    def program(offset: int) -> Program:
        nc = KernelBuilder("nano")
        y = nc.dram.tensor("y", (4, 8), DType.BF16, kind="output")
        a, b = nc.sbuf.tile(4).view(), nc.sbuf.tile(4).view()
        nc.vector.memset(a, 1.0)
        nc.vector.memset(b, 2.0)
        nc.dma.store(a, y, 0, [4], lane_stride=16, queue=0)
        nc.dma.store(b, y, 2 * offset, [4], lane_stride=16, queue=1)
        made = nc.finish()
        for engine, index, slot in waits(made):
            if decode(made.instruction(engine, index))[1][f"wait.{slot}.sem"] > 3:
                made = without_wait(made, engine, index, slot)  # of one queue for the other
        return made

    execute(program(1))
    with pytest.raises(RaceError, match="byte 0 of tensor 'y'"):
        execute(program(0))


@pytest.mark.parametrize("scatter", [False, True])
def test_races_of_indices_are_found_by_their_values(scatter: bool) -> None:
    """A gather or scatter touches the rows that its indices name, and reads the indices."""

    def program(queue: int, *, broken: bool) -> Program:
        nc = KernelBuilder("nano")
        numbers = nc.dram.tensor("numbers", (3,), np.int32)
        table = nc.dram.tensor("table", (8, 4), DType.FP32)
        rows, row = nc.sbuf.tile(3).view((3, 1)), nc.sbuf.tile(1).view(1)
        index = nc.sbuf.tile(1).view(lanes=3).astype(DType.INT32)
        nc.vector.memset(row, 1.0)
        nc.vector.memset(rows, 2.0)
        nc.dma.store(row, table, 5 * 4 * FP32, lane_stride=FP32, queue=0)
        nc.dma.load(index, numbers, 0, lane_stride=FP32, queue=queue)
        (nc.dma.scatter if scatter else nc.dma.gather)(rows, table, index, queue=1)
        made = nc.finish()
        at = made.count("dma1") - 2
        opcode, fields = decode(made.instruction("dma1", at))
        assert opcode is (Opcode.SCATTER if scatter else Opcode.GATHER)
        first_queue = 4  # its semaphore
        (slot,) = (i for i in range(3) if fields[f"wait.{i}.sem"] == first_queue)
        return without_wait(made, "dma1", at, slot) if broken else made

    here, elsewhere = (np.array(rows, np.int32) for rows in ([1, 5, 5], [1, 7, 6]))
    table = np.zeros((8, 4), np.float32)
    execute(program(1, broken=False), numbers=here, table=table)
    execute(program(1, broken=True), numbers=elsewhere, table=table)
    with pytest.raises(RaceError, match="byte 80 of tensor 'table'"):
        execute(program(1, broken=True), numbers=here, table=table)
    with pytest.raises(RaceError, match=r"word \d of partition 0 of SBUF"):
        execute(program(0, broken=True), numbers=elsewhere, table=table)


def test_a_semaphore_of_two_streams_orders_only_what_it_must() -> None:
    """A wait for one of two signals orders neither signaller, a wait for both orders both."""

    def program(value: int) -> Program:
        nc = KernelBuilder("nano")
        tiles = [nc.sbuf.tile(1) for _ in range(3)]
        y = nc.dram.tensor("y", (4, 1), DType.FP32, kind="output")
        nc.vector.memset(tiles[0].view(), 1.0)
        nc.vector.memset(tiles[1].view(), 1.0)
        nc.scalar.activate(tiles[2].view(), tiles[1].view(), Function.EXP)
        nc.dma.store(tiles[0].view(), y, lane_stride=4, queue=1)
        made = nc.finish()
        # The first memset and the scalar engine both signal semaphore 9.
        signal = {"signal.sem": 9, "signal.amount": 1}
        made = made.with_fields("vector", 0, signal).with_fields("scalar", 0, signal)
        made = made.with_fields("vector", 1, {"signal.sem": 8, "signal.amount": 1})
        made = made.with_fields("scalar", 0, {"wait.0.sem": 8, "wait.0.value": 1})
        wait = {"wait.0.sem": 9, "wait.0.mode": WaitMode.AT_LEAST.value, "wait.0.value": value}
        # Behind a NOP that waits for the scalar engine, so that both have signalled by then.
        return made.with_fields("dma1", 0, wait)

    execute(program(2))
    with systolith.Device("golden", config="nano", check=True) as device:
        core = device.driver.backend.core  # type: ignore[attr-defined]
        # Other engines first: what is signalled by the time of the wait counts.
        core._turns = lambda: [1, 2, 0, 3, 1, 2, 4]
        loaded = device.driver.load(program(1))
        with pytest.raises(RaceError):
            loaded.run()


def test_acquired_semaphores_order_a_ring_of_buffers() -> None:
    """Producer and consumer that hand one buffer back and forth with ACQUIRE."""
    nc = KernelBuilder("nano")
    tile, out = nc.sbuf.tile(1).view(), [nc.sbuf.tile(1).view() for _ in range(3)]
    for dst in out:
        nc.vector.memset(tile, 1.0)
        nc.scalar.activate(dst, tile, Function.EXP)
    program = nc.finish()
    full, empty = 8, 9
    acquire = WaitMode.ACQUIRE.value
    for i in range(3):
        take = {"wait.0.sem": empty, "wait.0.mode": acquire, "wait.0.value": 1}
        none = {"wait.0.sem": 0, "wait.0.mode": 0, "wait.0.value": 0}
        program = program.with_fields(
            "vector", i, (take if i else none) | {"signal.sem": full, "signal.amount": 1}
        )
        program = program.with_fields(
            "scalar",
            i,
            {"wait.0.sem": full, "wait.0.mode": acquire, "wait.0.value": 1}
            | {"signal.sem": empty, "signal.amount": 1},
        )
    execute(program)
    with pytest.raises(RaceError):
        execute(without_wait(program, "vector", 2, 0))


# --- undefined memory ---------------------------------------------------------------------------


def test_storing_what_was_never_written() -> None:
    nc = KernelBuilder("nano")
    y = nc.dram.tensor("y", (4, 4), DType.FP32, kind="output")
    tile = nc.sbuf.tile(4)
    nc.vector.memset(tile.view(3), 0.0)
    at = line() + 1
    nc.dma.store(tile.view(), y, lane_stride=16)
    with pytest.raises(UndefinedError, match="word 3 of partition 0 of SBUF") as caught:
        execute(nc.finish())
    assert caught.value.instruction.startswith("dma1[0] ")
    assert caught.value.source is not None
    assert caught.value.source.endswith(f"test_debugger.py:{at}")
    assert "DMA_STORE" in str(caught.value) and "nc.dma.store(tile.view()" in str(caught.value)


def test_the_first_reader_is_named() -> None:
    """Undefined words go through the vector and scalar engines; who reads one first is to blame."""
    nc = KernelBuilder("nano")
    y = nc.dram.tensor("y", (4, 1), DType.FP32, kind="output")
    a, b, total = nc.sbuf.tile(4), nc.sbuf.tile(4), nc.sbuf.tile(1)
    nc.vector.memset(a.view(2), 0.0)
    at = line() + 1
    nc.scalar.activate(b.view(), a.view(), Function.EXP)
    nc.vector.reduce(total.view(), b.view(), AluOp.ADD)
    nc.dma.store(total.view(), y, lane_stride=4)
    with pytest.raises(UndefinedError) as caught:
        execute(nc.finish())
    assert caught.value.instruction.startswith("scalar[0] ")
    assert caught.value.source is not None
    assert caught.value.source.endswith(f"test_debugger.py:{at}")
    assert "used here" in str(caught.value) and "DMA_STORE" in str(caught.value)


@pytest.mark.parametrize("sums", ["behind", "only"])
@pytest.mark.parametrize("missing", ["x", "scale", "bias", None])
def test_a_sum_needs_its_whole_row_and_no_other(sums: str, missing: str | None) -> None:
    nc = KernelBuilder("nano")
    y = nc.dram.tensor("y", (4, 2), DType.FP32, kind="output")
    x, pairs = nc.sbuf.tile(6), nc.sbuf.tile(4)
    nc.vector.memset(x.view(6), 1.0)
    nc.vector.memset(pairs.view(4), 1.0)
    rows, scale, bias = x.view((2, 3)), pairs.view((2, 1)), pairs.view((2, 1), offset=2)
    hole = {"x": rows[1, 1:2], "scale": scale[1], "bias": bias[1], None: None}[missing]
    if hole is not None:  # a result of words never written
        nc.scalar.activate(hole, nc.sbuf.tile(1).view(), Function.IDENTITY)
    dst = nc.sbuf.tile(8).view((2, 4 if sums == "behind" else 1))
    nc.scalar.activate(dst, rows, Function.IDENTITY, scale, bias, sums=sums)
    totals = dst.last(1)
    for row in range(2):
        nc.dma.store(totals[row], y, 4 * row, lane_stride=8)
    program = nc.finish()
    if missing is None:
        np.testing.assert_array_equal(execute(program)["y"], np.full((4, 2), 6.0, np.float32))
        return
    with pytest.raises(UndefinedError, match=r"used here") as caught:
        execute(program)
    stored = [line for line in str(caught.value).splitlines() if "DMA_STORE" in line]
    assert stored and f"sbuf.fp32@{totals[1].base}[" in stored[0]


def test_lanes_that_nobody_reads_do_not_matter() -> None:
    nc = KernelBuilder("nano")
    y = nc.dram.tensor("y", (3, 4), DType.FP32, kind="output")
    tile = nc.sbuf.tile(4)
    nc.vector.memset(tile.view(lanes=3), 0.0)
    nc.scalar.activate(tile.view(), tile.view(), Function.EXP)
    nc.dma.store(tile.view(lanes=3), y, lane_stride=16)
    np.testing.assert_array_equal(execute(nc.finish())["y"], np.ones((3, 4), np.float32))


def test_masks_decide_what_is_defined() -> None:
    def program(masks: tuple[float, float]) -> Program:
        nc = KernelBuilder("nano")
        y = nc.dram.tensor("y", (4, 4), DType.FP32, kind="output")
        mask, one, dst = (nc.sbuf.tile(4).view() for _ in range(3))
        nc.vector.memset(one, 1.0)
        for columns, value in ((slice(0, 2), masks[0]), (slice(2, 4), masks[1])):
            nc.vector.memset(mask[columns], value)
        nc.vector.copy_predicated(dst, mask, one)
        nc.vector.tensor_scalar(mask, mask, AluOp.EQ, 0.0)
        nc.vector.copy_predicated(dst[2:], mask[2:], one[2:])
        nc.dma.store(dst, y, lane_stride=16)
        return nc.finish()

    np.testing.assert_array_equal(execute(program((1.0, 0.0)))["y"], np.ones((4, 4), np.float32))
    with pytest.raises(UndefinedError):
        execute(program((0.0, 1.0)))


def test_the_tensor_engine_takes_nothing_undefined() -> None:
    for what in ("stationary", "moving", "accumulator"):
        nc = KernelBuilder("nano")
        a, b = nc.sbuf.tile(4).view(), nc.sbuf.tile(4).view()
        for name, tile in (("stationary", a), ("moving", b)):
            if name != what:
                nc.vector.memset(tile, 1.0)
        nc.tensor.load_stationary(a)
        nc.tensor.matmul(nc.psum.tile(4).view(), b, accumulate=what == "accumulator")
        with pytest.raises(UndefinedError, match="tensor"):
            execute(nc.finish())


def test_undefined_dram() -> None:
    """Scratch and outputs hold nothing until they are stored to; inputs do."""
    nc = KernelBuilder("nano")
    s = nc.dram.tensor("s", (4, 4), DType.FP32, kind="scratch")
    tile = nc.sbuf.tile(4)
    nc.vector.memset(tile.view(), 0.0)
    nc.dma.store(tile.view(lanes=3), s, lane_stride=16, queue=0)
    nc.dma.load(tile.view(), s, lane_stride=16, queue=0)
    with pytest.raises(UndefinedError, match="byte 48 of tensor 's' was never written"):
        execute(nc.finish())


# --- compiled programs --------------------------------------------------------------------------


def test_training_of_digits_is_clean_and_needs_its_waits() -> None:
    """A whole compiled step: nothing to report, and most waits matter (some are there because the
    builder judges by ranges)."""
    data = digits.load()
    images, labels = data.train_images[:8], data.train_labels[:8]
    state = digits.initial_state(0, 0.1)
    with systolith.Device("golden", config="nano", check=True) as device:
        step = systolith.jit(digits.make_step(0.001), device=device)
        for _ in range(2):
            state, _ = step(state, images, labels)
        state = jax.tree.map(np.asarray, state)
        program = step.program
        compiled = step.compiled
        driver = device.driver
        found = 0
        tried = waits(program)[::9]
        for wait in tried:
            loaded = driver.load(without_wait(program, *wait))
            leaves = jax.tree.leaves(((state, images, labels), {}))
            for binding, leaf in zip(compiled.inputs, leaves, strict=True):
                driver.write(loaded.tensors[binding.name], np.asarray(leaf))
            try:
                loaded.run()
            except RaceError:
                found += 1
            loaded.unload()
    assert found >= 0.9 * len(tried) > 5


def test_kernels_of_the_benches_are_clean() -> None:
    """The random kernels that the chip is compared with golden on."""
    driver = Driver(GoldenDevice("nano", check=True), seed=1)
    for seed in range(20):
        run_on(driver, random_kernel(seed), seed)


# --- breakpoints --------------------------------------------------------------------------------


def test_breakpoints() -> None:
    """By engine and index, label, and source line; before and after; tiles, tensors, operands."""
    nc = KernelBuilder("nano")
    x = nc.dram.tensor("x", (4, 4), DType.FP32)
    y = nc.dram.tensor("y", (4, 4), DType.FP32, kind="output")
    tile = nc.sbuf.tile(4, "mine")
    nc.dma.load(tile.view(), x, lane_stride=16)
    with nc.label("double"):
        at = line() + 1
        nc.vector.tensor_scalar(tile.view(), tile.view(), AluOp.MUL, 2.0)
    nc.dma.store(tile.view(), y, lane_stride=16)
    program = nc.finish()
    seen: dict[str, object] = {}

    def before(moment: Moment) -> None:
        seen["before"] = moment.tile(tile), str(moment), moment.label
        np.testing.assert_array_equal(moment.operand("src0")[:, 0, 0, 0], moment.tile(tile))
        np.testing.assert_array_equal(moment.tensor("x"), X)
        words = moment.words(Space.SBUF)[:, :4].view(np.float32)
        np.testing.assert_array_equal(words, moment.tile(tile))
        assert sum(moment.semaphores) == 1
        with pytest.raises(DeviceError, match="no operand 'src1'"):
            moment.operand("src1")

    def after(moment: Moment) -> None:
        seen["after"] = moment.view(tile.view()[1:3])

    def store(moment: Moment) -> None:
        seen["store"] = moment.instruction

    with systolith.Device("golden", config="nano") as device:
        debugger = device.debugger
        assert debugger.core.observer is None  # free when off
        points = [
            debugger.breakpoint(before, label="double"),
            debugger.breakpoint(after, source=f"test_debugger.py:{at}", after=True),
            debugger.breakpoint(store, engine="dma1", index=0),
        ]
        loaded = device.driver.load(program)
        device.driver.write(loaded.tensors["x"], X)
        loaded.run()
        assert [point.hits for point in points] == [1, 1, 1]
        loaded.run()
        points[0].enabled = False
        loaded.run()
        assert [point.hits for point in points] == [2, 3, 3]
        for point in points:
            debugger.remove(point)
        assert debugger.core.observer is None
        loaded.run()
        assert [point.hits for point in points] == [2, 3, 3]
        with pytest.raises(DeviceError, match="no engine 'gpsimd'"):
            debugger.breakpoint(before, engine="gpsimd")
    words, text, label = seen["before"]  # type: ignore[misc]
    np.testing.assert_array_equal(words, X)
    assert text.startswith("vector[0] ") and f"test_debugger.py:{at}" in text and label == "double"
    np.testing.assert_array_equal(seen["after"], 2 * X[:, 1:3])
    assert "DMA_STORE" in str(seen["store"])


def test_a_breakpoint_can_stop_the_program() -> None:
    class Enough(Exception):
        pass

    def stop(moment: Moment) -> None:
        raise Enough(moment.source)

    with systolith.Device("golden", config="nano") as device:
        double = systolith.jit(lambda x: jnp.exp(x) * 2.0, device=device)
        point = device.debugger.breakpoint(stop, label="exp", source="test_debugger.py")
        with pytest.raises(Enough, match=r"test_debugger\.py"):
            double(X)
        device.debugger.remove(point)
        np.testing.assert_allclose(np.asarray(double(X)), 2 * np.exp(X), rtol=1e-6)


def test_other_devices_have_none() -> None:
    with pytest.raises(BackendError, match='needs the device "golden"'):
        systolith.Device("rtl", config="nano", check=True)
