"""What a config leaves out: faults the same on the gates and in the golden model, is refused when a
program is built, and what is left trains."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import systolith
from systolith.errors import DeviceFault, KernelError, UnsupportedError
from systolith.golden.checker import check
from systolith.golden.device import GoldenDevice
from systolith.kernel import AluOp, DType, KernelBuilder
from systolith.program import Program
from systolith.runtime import Driver, open_backend
from systolith.train import digits
from systolith_hdl.config import LEFT_OUT, PRESETS, ConfigError, CoreConfig, get_config
from systolith_hdl.isa import (
    DIVISIONS,
    FIELDS,
    SPECS,
    EngineKind,
    Opcode,
    Rounding,
    decode,
    encode,
    legal_operations,
)

TINY = get_config("tiny")
WHOLE = dataclasses.replace(TINY, name="whole", **dict.fromkeys(LEFT_OUT, True))
WITHOUT_DIVIDER = dataclasses.replace(WHOLE, name="undivided", divider=False)
WITHOUT_TOP = dataclasses.replace(WHOLE, name="topless", top=False)
WITHOUT_LOOPS = dataclasses.replace(WHOLE, name="loopless", loops=False)
LOOPS = [Opcode.LOOP, Opcode.NEXT, Opcode.TEST]
WITHOUT_RANDOM = dataclasses.replace(WHOLE, name="certain", random=False)
RANDOM = [Opcode.RANDOM, Opcode.DROPOUT]


def sums(config: CoreConfig) -> Program:
    """x + x."""
    nc = KernelBuilder(config, name="sums")
    x = nc.dram.tensor("x", (2, 8), DType.FP32)
    y = nc.dram.tensor("y", (2, 8), DType.FP32, kind="output")
    tile, out = nc.sbuf.tile(8).view(), nc.sbuf.tile(8).view()
    nc.dma.load(tile, x, lane_stride=32)
    nc.vector.tensor_tensor(out, tile, AluOp.ADD, tile)
    nc.dma.store(out, y, lane_stride=32)
    return nc.finish()


def test_only_tiny_leaves_out() -> None:
    assert [
        name for name, preset in PRESETS.items() if not all(getattr(preset, f) for f in LEFT_OUT)
    ] == ["tiny"]
    with pytest.raises(ConfigError, match="divider must be True or False, not 1"):
        dataclasses.replace(TINY, divider=1)
    with pytest.raises(ConfigError, match="banks must be 2, 4 or 8, not 6"):
        dataclasses.replace(TINY, banks=6)


def test_each_field_counts_in_the_hash() -> None:
    small = PRESETS["small"]
    others = [
        dataclasses.replace(small, **{field: value})
        for field, value in (("banks", 4), ("prefetch", 1), ("outstanding", 16))
    ]
    others += [dataclasses.replace(small, **{field: False}) for field in LEFT_OUT]
    assert len({small.hash, *(other.hash for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "opcode",
    [o for o, spec in SPECS.items() if spec.kind is EngineKind.VECTOR and "op1" in spec.header],
)
def test_divisions_are_illegal_operations(opcode: Opcode) -> None:
    codes = {op.value for op in DIVISIONS}
    with_divider = legal_operations(opcode, "op1", WITHOUT_TOP)
    assert legal_operations(opcode, "op1", WITHOUT_DIVIDER) == with_divider - codes
    fields = {name: 1 for name in FIELDS[opcode] if name.startswith("counts") or name == "lanes"}
    for code in codes & with_divider:
        raw = encode(opcode, {**fields, "op1": code})
        assert check(raw, EngineKind.VECTOR, WITHOUT_TOP) is None
        found = check(raw, EngineKind.VECTOR, WITHOUT_DIVIDER)
        assert found is not None and found.cause.name == "ILLEGAL_OPERATION"


def test_top_is_an_illegal_opcode() -> None:
    fields = {f"counts.{d}": 1 for d in range(4)} | {"lanes": 1, "kept": 1, "op0": AluOp.MAX}
    raw = encode(Opcode.TOP, fields)
    assert check(raw, EngineKind.VECTOR, WITHOUT_DIVIDER) is None
    found = check(raw, EngineKind.VECTOR, WITHOUT_TOP)
    assert found is not None and found.cause.name == "ILLEGAL_OPCODE"


@pytest.mark.parametrize("opcode", LOOPS)
def test_loops_are_illegal_opcodes(opcode: Opcode) -> None:
    raw = encode(opcode, {"count": 1} if opcode is Opcode.LOOP else {})
    for kind in EngineKind:
        assert check(raw, kind, WITHOUT_TOP) is None
        found = check(raw, kind, WITHOUT_LOOPS)
        assert found is not None and found.cause.name == "ILLEGAL_OPCODE"


@pytest.mark.parametrize("opcode", [o for o, spec in SPECS.items() if "rounding" in spec.header])
def test_stochastic_rounding_is_an_illegal_operation(opcode: Opcode) -> None:
    """Of whatever types: that is looked at later."""
    kind = SPECS[opcode].kind
    assert kind is not None
    fields = {
        field: min(legal_operations(opcode, field, WITHOUT_RANDOM))
        for field in {"op0", "op1"} & SPECS[opcode].header
    }
    raw = encode(opcode, {**fields, "rounding": Rounding.STOCHASTIC})
    found = check(raw, kind, WITHOUT_RANDOM)
    assert found is not None and found.cause.name == "ILLEGAL_OPERATION"
    found = check(raw, kind, WITHOUT_TOP)
    assert found is None or found.cause.name != "ILLEGAL_OPERATION"


@pytest.fixture(scope="module")
def gates() -> Driver:
    return Driver(open_backend("rtl", TINY))


@pytest.mark.parametrize(
    "missing",
    [
        *sorted(DIVISIONS, key=lambda op: op.value),
        Opcode.TOP,
        *LOOPS,
        *RANDOM,
        Rounding.STOCHASTIC,
    ],
)
def test_gates_fault_as_golden(gates: Driver, missing: AluOp | Opcode | Rounding) -> None:
    """Each division, opcode and rounding in a program for a core that has it."""
    made = sums(TINY)
    (at,) = (
        i
        for i in range(made.count("vector"))
        if decode(made.instruction("vector", i))[0] is Opcode.TENSOR_TENSOR
    )
    if isinstance(missing, Opcode):
        _, fields = decode(made.instruction("vector", at))
        fields = {name: value for name, value in fields.items() if name in FIELDS[missing]}
        if missing is Opcode.TOP:
            fields |= {"op0": AluOp.MAX, "kept": 1}
        elif missing not in RANDOM:
            fields = {}
        stream = made.streams["vector"]
        stream = stream[: 64 * at] + encode(missing, fields) + stream[64 * (at + 1) :]
        broken = dataclasses.replace(made, streams={**made.streams, "vector": stream})
        cause = "ILLEGAL_OPCODE"
    else:
        field = "rounding" if isinstance(missing, Rounding) else "op1"
        broken = made.with_fields("vector", at, {field: missing})
        cause = "ILLEGAL_OPERATION"
    records = []
    for driver in (gates, Driver(GoldenDevice(TINY))):
        loaded = driver.load(broken)
        with pytest.raises(DeviceFault) as caught:
            driver.run(loaded)
        records.append((caught.value.engine, caught.value.pc, caught.value.cause))
        loaded.unload()
        # And it goes on afterwards.
        loaded = driver.load(made)
        x = np.arange(16, dtype=np.float32).reshape(2, 8)
        driver.write(loaded.tensors["x"], x)
        driver.run(loaded)
        np.testing.assert_array_equal(driver.read(loaded.tensors["y"]), 2 * x)
        loaded.unload()
    assert records == [("vector", at, cause)] * 2


def test_the_builder_says_what_is_missing() -> None:
    nc = KernelBuilder(TINY, name="refused")
    a = nc.sbuf.tile(8).view()
    nc.vector.memset(a, 1.0)
    for call in (
        lambda: nc.vector.tensor_tensor(a, a, AluOp.DIVIDE, a),
        lambda: nc.vector.tensor_scalar(a, a, AluOp.BYPASS, 0.0, AluOp.RSQRT),
    ):
        with pytest.raises(
            KernelError,
            match=r"config 'tiny' is without the divider of the vector engine \(divider=False\), "
            r"which op1 = \w+ needs; the scalar engine has RECIPROCAL, SQRT and RSQRT",
        ):
            call()
    with pytest.raises(KernelError, match=r"'tiny' is without the instruction TOP.*MAX or MIN"):
        nc.vector.top(a[:2], a)
    with pytest.raises(KernelError, match=r"'tiny' is without the instructions LOOP.*unrolled"):
        nc.loop(2).__enter__()
    nowhere = r"'tiny' is without random words.*DROPOUT \(random=False\), which {} needs; results"
    for call, what in (
        (lambda: nc.vector.random(a, key=1), "random"),
        (lambda: nc.vector.dropout(a, a, 0.5, key=1), "dropout"),
        (lambda: nc.vector.copy(a, a, rounding="stochastic"), "rounding = STOCHASTIC"),
    ):
        with pytest.raises(KernelError, match=nowhere.format(what)):
            call()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_the_compiler_says_what_is_missing(dtype: type) -> None:
    def step(x):
        return jnp.fmod(x, x + x) if dtype is np.float32 else x // (x + x)

    with (
        systolith.Device("golden", config="tiny") as device,
        pytest.raises(
            UnsupportedError, match=r"(?s)'tiny' is without the divider.*test_left_out.py"
        ),
    ):
        systolith.jit(step, device=device)(np.ones((2, 4), dtype))


def test_the_compiler_says_that_nothing_is_random() -> None:
    with (
        systolith.Device("golden", config="tiny") as device,
        pytest.raises(UnsupportedError, match=r"'tiny' is without random words.*rounding='stoch"),
    ):
        systolith.jit(lambda x: x + x, device=device, rounding="stochastic")(
            np.ones((2, 4), np.float32)
        )


def test_it_trains() -> None:
    """Digits: a step's loss goes down, divisions of the loss included."""
    data = digits.load()
    state = digits.initial_state(0, 0.15)
    with systolith.Device("golden", config="tiny") as device:
        step = systolith.jit(digits.make_step(digits.rate_drop(0.15, 3)), device=device)
        losses = []
        for _ in range(3):
            state, loss = step(state, data.train_images[:16], data.train_labels[:16])
            losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]
