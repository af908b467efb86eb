"""Legality: each cause, the order of the checks, and the bounds against a naive walk."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systolith.golden.checker import Fault, check, operand_counts
from systolith_hdl.config import PRESETS
from systolith_hdl.formats import FLOATS, FP8_TYPES, INTEGERS, NARROW_FLOATS, WORDS, DType
from systolith_hdl.isa import (
    COMPARISONS,
    DIVISIONS,
    FIELDS,
    LOADS,
    MAX_KEPT,
    OPERATION_TYPES,
    PAIRS,
    SCAN_OPERATIONS,
    SCAN_ROWS,
    SPECS,
    TABLE_WORDS,
    USED_BITS,
    AluOp,
    EngineKind,
    FaultCause,
    Function,
    Opcode,
    RowSums,
    decode,
    encode,
    engine_kind,
    legal_operations,
)
from systolith_tb.configs import NANO_FP8

#: A core that has every instruction.
NANO = NANO_FP8


def legal_fields(opcode: Opcode) -> dict[str, int]:
    """Fields of a simple legal instruction."""
    spec = SPECS[opcode]
    fields: dict[str, int] = {}
    if spec.operands:
        fields |= {f"counts.{i}": n for i, n in enumerate((1, 1, 1, 4))}
        for name, (spaces, types) in spec.operands.items():
            fields[f"{name}.space"] = min(s.value for s in spaces)
            fields[f"{name}.dtype"] = min(t.value for t in types)
            fields[f"{name}.base"] = 8
    for name in ("lanes", "columns", "count"):
        if name in FIELDS[opcode]:
            fields[name] = 4
    for name in ("op0", "op1"):
        if name in spec.header:
            fields[name] = min(legal_operations(opcode, name, NANO))
    for name, limit in spec.limits.items():
        least, most = limit(fields.__getitem__, NANO)
        fields[name] = min(max(fields.get(name, 0), least), most)
    return fields


def kind_of(opcode: Opcode) -> EngineKind:
    return SPECS[opcode].kind or EngineKind.VECTOR


def cause(opcode: Opcode, **changes: int) -> FaultCause | None:
    fields = legal_fields(opcode) | {k.replace("__", "."): v for k, v in changes.items()}
    fault = check(encode(opcode, fields), kind_of(opcode), NANO)
    return fault.cause if fault else None


@pytest.mark.parametrize("opcode", list(Opcode))
def test_legal(opcode: Opcode) -> None:
    raw = encode(opcode, legal_fields(opcode))
    assert check(raw, kind_of(opcode), NANO) is None
    for kind in EngineKind:
        legal = SPECS[opcode].kind in (None, kind)
        expected = None if legal else Fault(FaultCause.ILLEGAL_OPCODE)
        assert check(raw, kind, NANO) == expected


@pytest.mark.parametrize("opcode", list(Opcode))
def test_pairs_exist_where_fp8_rate_is_2(opcode: Opcode) -> None:
    raw = encode(opcode, legal_fields(opcode))
    expected = Fault(FaultCause.ILLEGAL_OPCODE) if opcode in PAIRS else None
    assert check(raw, kind_of(opcode), PRESETS["nano"]) == expected
    assert {op.name for op in PAIRS} == {"LOAD_STATIONARY_PAIR", "MATMUL_PAIR"}


def test_engine_kinds() -> None:
    kinds = [engine_kind(engine) for engine in NANO.engines]
    assert kinds == [EngineKind.TENSOR, EngineKind.VECTOR, EngineKind.SCALAR] + [EngineKind.DMA] * 2


@pytest.mark.parametrize("code", sorted(set(range(256)) - {op.value for op in Opcode}))
def test_unknown_opcodes(code: int) -> None:
    for kind in EngineKind:
        assert check(bytes([code]) + bytes(63), kind, NANO) == Fault(FaultCause.ILLEGAL_OPCODE)


@pytest.mark.parametrize("opcode", list(Opcode))
def test_every_reserved_bit(opcode: Opcode) -> None:
    word = int.from_bytes(encode(opcode, legal_fields(opcode)), "little")
    for bit in range(512):
        if not USED_BITS[opcode] >> bit & 1:
            raw = (word | 1 << bit).to_bytes(64, "little")
            assert check(raw, kind_of(opcode), NANO) == Fault(FaultCause.RESERVED_BITS), bit


def test_causes() -> None:
    c, op = cause, Opcode
    assert c(op.LOOP, count=0) is FaultCause.BAD_COUNT
    assert c(op.LOAD_TABLE, first=TABLE_WORDS - 4) is None
    assert c(op.LOAD_TABLE, first=TABLE_WORDS - 3) is FaultCause.BAD_COUNT
    assert c(op.LOAD_TABLE, counts__3=TABLE_WORDS + 1) is FaultCause.BAD_COUNT
    assert c(op.LOAD_TABLE, counts__2=2) is FaultCause.BAD_COUNT
    assert c(op.LOAD_TABLE, src0__dtype=DType.FP32.value) is FaultCause.BAD_TYPE
    assert c(op.TENSOR_TENSOR, op0=len(AluOp)) is FaultCause.ILLEGAL_OPERATION
    assert c(op.TENSOR_TENSOR, op1=63) is FaultCause.ILLEGAL_OPERATION
    assert c(op.REDUCE, op1=2) is FaultCause.ILLEGAL_OPERATION
    assert c(op.ACTIVATE, op0=len(Function)) is FaultCause.ILLEGAL_OPERATION
    assert c(op.ACTIVATE, op1=len(RowSums)) is FaultCause.ILLEGAL_OPERATION
    assert c(op.NOP, wait__1__mode=3) is FaultCause.ILLEGAL_OPERATION
    assert c(op.TENSOR_TENSOR, dst__dtype=8) is FaultCause.BAD_TYPE
    assert c(op.TENSOR_TENSOR, src1__dtype=1) is FaultCause.BAD_TYPE
    assert c(op.MATMUL, src0__dtype=0) is FaultCause.BAD_TYPE
    assert c(op.MATMUL, src0__dtype=15) is FaultCause.BAD_TYPE
    assert c(op.DMA_LOAD, dram_dtype=8) is FaultCause.BAD_TYPE
    for dtype in FLOATS:
        assert c(op.MEMSET, dst__dtype=dtype.value) is None
        assert c(op.DMA_STORE, dram_dtype=dtype.value) is None
        matmul = None if dtype in NARROW_FLOATS else FaultCause.BAD_TYPE
        assert c(op.MATMUL, src0__dtype=dtype.value) is matmul
        assert c(op.LOAD_STATIONARY, src0__dtype=dtype.value) is matmul
        pair = None if dtype in FP8_TYPES else FaultCause.BAD_TYPE
        for opcode in PAIRS:
            assert c(opcode, src0__dtype=dtype.value) is pair
            assert c(opcode, src1__dtype=dtype.value) is pair
    assert c(op.DMA_STORE, dram_dtype=9) is FaultCause.BAD_TYPE
    for dtype in INTEGERS:
        assert c(op.DMA_LOAD, dram_dtype=dtype.value) is None
        assert c(op.DMA_STORE, dram_dtype=dtype.value) is None
        assert c(op.DMA_STORE, local__dtype=dtype.value) is FaultCause.BAD_TYPE
        assert c(op.ACTIVATE, dst__dtype=dtype.value) is FaultCause.BAD_TYPE
        assert c(op.ACTIVATE, src0__dtype=dtype.value) is FaultCause.BAD_TYPE
    # The vector engine computes in the type of its sources, which is one, and writes any.
    for first in DType:
        for other in DType:
            legal = None if first in WORDS else FaultCause.BAD_TYPE
            assert c(op.TENSOR_SCALAR, src0__dtype=first.value, dst__dtype=other.value) is legal
            if other is not first:
                legal = FaultCause.BAD_TYPE
            for opcode in (op.TENSOR_TENSOR, op.COPY_PREDICATED):
                found = c(opcode, src0__dtype=first.value, src1__dtype=other.value)
                assert found is legal
        assert c(op.MEMSET, dst__dtype=first.value) is None
    fields = legal_fields(op.SCALAR_TENSOR_TENSOR)
    for name in ("src1", "scalar"):
        raw = encode(op.SCALAR_TENSOR_TENSOR, fields | {f"{name}.dtype": DType.INT32.value})
        assert check(raw, EngineKind.VECTOR, NANO) == Fault(FaultCause.BAD_TYPE)
    assert c(op.SCALAR_TENSOR_TENSOR, scalar__base=2048) is FaultCause.OUT_OF_BOUNDS
    assert c(op.SCALAR_TENSOR_TENSOR, scalar__space=2) is FaultCause.BAD_SPACE
    # The divider is that of the second ALU, and has operations of one kind of type.
    for division in DIVISIONS:
        assert c(op.TENSOR_SCALAR, op0=division.value) is FaultCause.ILLEGAL_OPERATION
        assert c(op.REDUCE, op1=division.value) is FaultCause.ILLEGAL_OPERATION
        for dtype in WORDS:
            legal = dtype in OPERATION_TYPES.get(division, WORDS)
            found = c(op.TENSOR_SCALAR, op1=division.value, src0__dtype=dtype.value)
            assert found is (None if legal else FaultCause.BAD_TYPE)
    for opcode in (op.AFFINE_SELECT, op.SELECT):
        for operation in AluOp:
            legal = None if operation in COMPARISONS else FaultCause.ILLEGAL_OPERATION
            assert c(opcode, op0=operation.value) is legal
    for dtype in DType:
        legal = None if dtype in (DType.FP32, DType.INT32) else FaultCause.BAD_TYPE
        assert c(op.IOTA, dst__dtype=dtype.value) is legal
        assert c(op.RANDOM, dst__dtype=dtype.value) is legal
        legal = None if dtype is DType.INT32 else FaultCause.BAD_TYPE
        assert c(op.RANGE_SELECT, src1__dtype=dtype.value) is legal
    assert c(op.LOAD_STATIONARY, src0__dtype=DType.INT8.value) is None
    assert c(op.LOAD_STATIONARY, src0__dtype=DType.INT32.value) is FaultCause.BAD_TYPE
    # Sums are FP32, those of INT8 may be INT32.
    for moving in DType:
        for sums in DType:
            legal = moving in (*NARROW_FLOATS, DType.INT8) and (
                sums is DType.FP32 or (sums is DType.INT32 and moving is DType.INT8)
            )
            found = c(op.MATMUL, src0__dtype=moving.value, dst__dtype=sums.value)
            assert found is (None if legal else FaultCause.BAD_TYPE)
    assert c(op.MATMUL, dst__space=0) is FaultCause.BAD_SPACE
    assert c(op.LOAD_STATIONARY, src0__space=1) is FaultCause.BAD_SPACE
    assert c(op.MATMUL_PAIR, src1__space=1) is FaultCause.BAD_SPACE
    assert c(op.DMA_LOAD, local__space=3) is FaultCause.BAD_SPACE
    assert c(op.MEMSET, dst__space=2) is FaultCause.BAD_SPACE
    for i in range(4):
        assert c(op.MEMSET, **{f"counts__{i}": 0}) is FaultCause.BAD_COUNT
    assert c(op.MEMSET, lanes=0) is FaultCause.BAD_COUNT
    assert c(op.MEMSET, lanes=5) is FaultCause.BAD_COUNT
    assert c(op.MATMUL, columns=0) is FaultCause.BAD_COUNT
    assert c(op.MATMUL, columns=5) is FaultCause.BAD_COUNT
    assert c(op.MATMUL_PAIR, columns=0) is FaultCause.BAD_COUNT
    assert c(op.MATMUL_PAIR, columns=5) is FaultCause.BAD_COUNT
    assert c(op.LOAD_STATIONARY_PAIR, counts__3=5) is FaultCause.BAD_COUNT
    assert c(op.LOAD_STATIONARY_PAIR, counts__0=2, counts__3=1) is FaultCause.BAD_COUNT
    assert c(op.LOAD_STATIONARY, counts__3=5) is FaultCause.BAD_COUNT
    assert c(op.LOAD_STATIONARY, counts__2=2, counts__3=1) is FaultCause.BAD_COUNT
    for opcode in (op.GATHER, op.SCATTER):
        assert c(opcode, counts__0=9) is None
        assert c(opcode, counts__0=0) is FaultCause.BAD_COUNT
        assert c(opcode, counts__1=2) is FaultCause.BAD_COUNT
        assert c(opcode, counts__2=2) is FaultCause.BAD_COUNT
        assert c(opcode, dram_dtype=9) is FaultCause.BAD_TYPE
        assert c(opcode, local__space=1) is FaultCause.BAD_SPACE
    for rows in range(1, 10):
        legal = None if rows <= SCAN_ROWS else FaultCause.BAD_COUNT
        assert c(op.SCAN, counts__3=rows) is legal
    for columns in range(1, 10):
        legal = None if columns <= NANO.lanes else FaultCause.BAD_COUNT
        assert c(op.TRANSPOSE, counts__3=columns) is legal
        assert c(op.SHUFFLE, lane=columns - 1) is legal
        if columns <= 8:
            assert c(op.SHUFFLE, select__1=columns - 1) is legal
            assert c(op.SHUFFLE, select__7=columns - 1) is legal
    for kept in range(16):
        legal = None if 1 <= kept <= MAX_KEPT else FaultCause.BAD_COUNT
        assert c(op.TOP, kept=kept, counts__3=40) is legal
        if 1 < kept <= MAX_KEPT:
            assert c(op.TOP, kept=kept, counts__3=kept) is None
            assert c(op.TOP, kept=kept, counts__3=kept - 1) is FaultCause.BAD_COUNT
    for operation in AluOp:
        legal = None if operation in SCAN_OPERATIONS else FaultCause.ILLEGAL_OPERATION
        assert c(op.SCAN, op0=operation.value) is legal
        assert c(op.SCAN, op1=operation.value) is legal
        found = c(op.TOP, op0=operation.value)
        legal = operation in (AluOp.MAX, AluOp.MIN)
        assert found is (None if legal else FaultCause.ILLEGAL_OPERATION)
    for dtype in DType:
        found = c(op.TOP, dst__dtype=dtype.value)
        assert found is (None if dtype is DType.FP32 else FaultCause.BAD_TYPE)
    for opcode in (op.ACTIVATE, op.ACTIVATE_ROWS):
        longest = {"counts__3": 65535, "dst__strides__3": 0, "src0__strides__3": 0}
        assert c(opcode, **longest, op1=RowSums.NONE.value) is None
        assert c(opcode, **longest, op1=RowSums.ONLY.value) is None
        assert c(opcode, **longest, op1=RowSums.BEHIND.value) is FaultCause.BAD_COUNT
    assert c(op.NOP, wait__0__mode=1, wait__0__sem=32) is FaultCause.BAD_SEMAPHORE
    assert c(op.NOP, wait__2__mode=2, wait__2__sem=63) is FaultCause.BAD_SEMAPHORE
    assert c(op.NOP, signal__amount=1, signal__sem=32) is FaultCause.BAD_SEMAPHORE
    assert c(op.NOP, signal__amount=1, signal__chip=1) is FaultCause.BAD_SEMAPHORE
    # Slots that do nothing are not looked at.
    assert c(op.NOP, wait__0__sem=63, wait__0__value=7) is None
    assert c(op.NOP, signal__sem=63, signal__chip=5) is None


def test_what_operands_walk() -> None:
    """Dimensions without a stride are not walked, and some innermost counts are their own."""
    counts = {f"counts.{d}": n for d, n in enumerate((2, 3, 4, 5))}

    def walked(opcode: Opcode, operand: str) -> list[int]:
        return operand_counts(opcode, operand, counts)

    assert walked(Opcode.TENSOR_SCALAR, "dst") == [2, 3, 4, 5]
    assert walked(Opcode.REDUCE, "src0") == [2, 3, 4, 5]
    assert walked(Opcode.REDUCE, "dst") == [2, 3, 4, 1]
    assert walked(Opcode.STATISTICS, "src0") == [2, 3, 4, 5]
    assert walked(Opcode.STATISTICS, "dst") == [2, 3, 4, 2]
    assert walked(Opcode.RANGE_SELECT, "src0") == [2, 3, 4, 5]
    assert walked(Opcode.RANGE_SELECT, "src1") == [1, 1, 1, 2]
    counts |= {"kept": 3, "lanes": 7}
    assert walked(Opcode.TRANSPOSE, "src0") == [2, 3, 4, 5]
    assert walked(Opcode.TRANSPOSE, "dst") == [2, 3, 4, 7]
    assert walked(Opcode.TOP, "dst") == [2, 3, 4, 6]


def test_order_of_causes() -> None:
    """An instruction with every defect; mending the first uncovers the next."""
    broken = {
        "op0": 63,
        "dst.dtype": 9,
        "dst.space": 3,
        "lanes": 0,
        "signal.sem": 63,
        "signal.amount": 1,
        "src0.base": 1 << 20,
    }
    mended = {"op0": 0, "dst.dtype": 0, "dst.space": 0, "lanes": 4, "signal.sem": 0, "src0.base": 0}
    fields = legal_fields(Opcode.TENSOR_TENSOR) | broken
    word = int.from_bytes(encode(Opcode.TENSOR_TENSOR, fields), "little") | 1 << 126
    met = []
    for kind, reserved in ((EngineKind.DMA, 1), (EngineKind.VECTOR, 1), (EngineKind.VECTOR, 0)):
        raw = (word & ~(0 if reserved else 1 << 126)).to_bytes(64, "little")
        met.append(check(raw, kind, NANO))
    for name, value in mended.items():
        fields[name] = value
        met.append(check(encode(Opcode.TENSOR_TENSOR, fields), EngineKind.VECTOR, NANO))
    causes = [fault.cause if fault else FaultCause.NONE for fault in met]
    assert [c.value for c in causes] == [1, 2, 3, 4, 5, 6, 7, 8, 0]


def test_bounds_address_and_operand_order() -> None:
    fields = legal_fields(Opcode.TENSOR_TENSOR) | {
        "dst.base": 2046,
        "dst.strides.3": 1,
        "src0.base": 2,
        "src0.strides.3": -1,
        "src1.base": 5000,
    }

    def address() -> int | None:
        fault = check(encode(Opcode.TENSOR_TENSOR, fields), EngineKind.VECTOR, NANO)
        assert fault is None or fault.cause is FaultCause.OUT_OF_BOUNDS
        return None if fault is None else fault.address

    assert address() == 2049
    fields["dst.base"] = 2044
    assert address() == -1
    fields["src0.base"] = 3
    assert address() == 5000
    fields["src1.base"] = 2047
    assert address() is None
    # Both ends outside: the low one is met first.
    fields |= {"counts.2": 2, "dst.base": 100, "dst.strides.2": -200, "dst.strides.3": 1000}
    assert address() == -100


def test_bounds_of_indices() -> None:
    fields = legal_fields(Opcode.GATHER) | {"counts.0": 8, "index.base": 2046}
    assert check(encode(Opcode.GATHER, fields), EngineKind.DMA, NANO) is None
    fields["counts.0"] = 9
    fault = check(encode(Opcode.GATHER, fields), EngineKind.DMA, NANO)
    assert fault == Fault(FaultCause.OUT_OF_BOUNDS, 2048)
    fields["local.base"] = 3000  # comes before them
    fault = check(encode(Opcode.GATHER, fields), EngineKind.DMA, NANO)
    assert fault == Fault(FaultCause.OUT_OF_BOUNDS, 3000)


@settings(max_examples=200)
@given(
    opcode=st.sampled_from([op for op in Opcode if SPECS[op].operands]),
    counts=st.tuples(*[st.integers(1, 3)] * 4),
    data=st.data(),
)
def test_bounds_against_a_walk(
    opcode: Opcode, counts: tuple[int, ...], data: st.DataObject
) -> None:
    if opcode in LOADS or opcode is Opcode.LOAD_TABLE:
        counts = (1, 1, 1, counts[3])
    if SPECS[opcode].indexed:
        counts = (counts[0] ** 2, 1, 1, counts[3])
    fields = legal_fields(opcode) | {f"counts.{i}": n for i, n in enumerate(counts)}
    strides = st.integers(-40, 40)
    sums = RowSums.NONE
    if "op1" in fields and SPECS[opcode].kind is EngineKind.SCALAR:
        sums = data.draw(st.sampled_from(list(RowSums)))
        fields["op1"] = sums.value
    outside = False
    for name in SPECS[opcode].operands:
        walked = operand_counts(opcode, name, fields)
        space = fields[f"{name}.space"]
        depth = NANO.psum_depth if space else NANO.sbuf_depth
        fields[f"{name}.base"] = data.draw(
            st.one_of(st.integers(0, 60), st.integers(depth - 60, depth + 10))
        )
        for i in range(4):
            if f"{name}.strides.{i}" in FIELDS[opcode]:
                fields[f"{name}.strides.{i}"] = data.draw(strides)
        walk = {
            fields[f"{name}.base"]
            + sum(i * fields.get(f"{name}.strides.{d}", 0) for d, i in enumerate(index))
            for index in itertools.product(*(range(n) for n in walked))
        }
        outside |= min(walk) < 0 or max(walk) >= depth
    if SPECS[opcode].indexed:
        # Of N indices in a column.
        fields["index.base"] = data.draw(st.integers(NANO.sbuf_depth - 4, NANO.sbuf_depth + 1))
        columns = {row // NANO.lanes for row in range(counts[0])}
        outside |= fields["index.base"] + max(columns) >= NANO.sbuf_depth
    fault = check(encode(opcode, fields), kind_of(opcode), NANO)
    assert (fault is not None) == outside
    assert fault is None or fault.cause is FaultCause.OUT_OF_BOUNDS


@given(st.binary(min_size=64, max_size=64), st.sampled_from(list(Opcode)))
def test_any_bytes_are_judged(raw: bytes, opcode: Opcode) -> None:
    """No bytes make the checker fail, and those it passes can be decoded."""
    for candidate in (raw, bytes([opcode.value]) + raw[1:]):
        if check(candidate, kind_of(opcode), NANO) is None:
            decode(candidate)
