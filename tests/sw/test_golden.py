"""The golden core: instructions against loops over single elements, and programs."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systolith.assembly import assemble
from systolith.errors import BackendError
from systolith.golden import Core, GoldenDevice, arithmetic
from systolith.golden.activation import evaluate
from systolith.golden.checker import check, row_sums
from systolith.golden.dither import random_words
from systolith_hdl.arith.dither import RANDOM_STREAM
from systolith_hdl.formats import CANONICAL_NAN, FORMATS, INTEGERS, DType
from systolith_hdl.isa import (
    DMA_TYPES,
    FIELDS,
    REDUCE_ACCUMULATORS,
    REDUCTIONS,
    SPECS,
    TABLE_WORDS,
    AffineBody,
    AluOp,
    EngineKind,
    FaultCause,
    Function,
    Opcode,
    RandomBody,
    RowSums,
    Space,
    decode,
    encode,
    engine_kind,
    legal_operations,
)
from systolith_tb.configs import NANO_FP8

#: A core that has every instruction.
NANO = NANO_FP8
DRAM_BYTES = 4096
#: where random operands lie: small, so that elements meet
WINDOW = 48
#: from this word on SBUF holds indices of a table of that many rows
INDICES = 1024
ROWS = 20


def engine_of(opcode: Opcode) -> str:
    kind = SPECS[opcode].kind
    return next(engine for engine in NANO.engines if engine_kind(engine) is kind)


def random_instruction(rng: random.Random, opcode: Opcode) -> bytes:
    """A legal instruction on the first words of the memories and of DRAM."""
    spec = SPECS[opcode]
    while True:
        counts = [rng.choice((1, 1, 2, 3, 5)) for _ in range(4)]
        fields = {f"counts.{i}": n for i, n in enumerate(counts)}
        for name in ("lanes", "columns", "accumulate", "op0", "op1"):
            if name not in FIELDS[opcode]:
                continue
            if name.startswith("op"):
                fields[name] = rng.choice(sorted(legal_operations(opcode, name, NANO)))
            else:
                fields[name] = rng.randint(0, 1) if name == "accumulate" else rng.randint(1, 4)
        for name, limit in spec.limits.items():
            least, most = limit(fields.__getitem__, NANO)
            fields[name] = rng.randint(least, min(most, least + 3))
        for name, (spaces, types) in spec.operands.items():
            fields[f"{name}.space"] = rng.choice(sorted(s.value for s in spaces))
            fields[f"{name}.dtype"] = rng.choice(sorted(t.value for t in types))
            if name in spec.alike:
                fields[f"{name}.dtype"] = fields["src0.dtype"]
            fields[f"{name}.base"] = rng.randrange(WINDOW)
            for i in range(4):
                if f"{name}.strides.{i}" in FIELDS[opcode]:
                    fields[f"{name}.strides.{i}"] = rng.choice((0, 1, 1, 2, 5, -1, -3))
        if spec.kind is EngineKind.DMA:
            fields["dram_base"] = rng.randrange(DRAM_BYTES // 2)
            fields["dram_dtype"] = rng.choice(sorted(t.value for t in DMA_TYPES))
            fields["lane_stride"] = rng.choice((0, 2, 4, 64, -64, rng.randint(-50, 50)))
            for i in range(4):
                fields[f"dram_strides.{i}"] = rng.choice((0, 2, 4, 16, 20, rng.randint(-50, 50)))
        if spec.indexed:
            fields |= {"counts.0": rng.randint(1, 12), "counts.1": 1, "counts.2": 1}
            fields["row_stride"] = fields["dram_strides.0"]
            fields["column_stride"] = fields["dram_strides.3"]
            fields["rows"] = rng.choice((ROWS, ROWS, ROWS - 1))
            fields["index.base"] = rng.randrange(INDICES, INDICES + 6)
            fields = {k: v for k, v in fields.items() if k in FIELDS[opcode]}
        if spec.body is AffineBody:
            fields["base"] = rng.choice((0, rng.randint(-9, 9), rng.randint(-(1 << 31), 1 << 30)))
            fields["fill"] = rng.getrandbits(16)
            for name in ("lane_step", *(f"steps.{d}" for d in range(4))):
                fields[name] = rng.choice((0, 1, -1, rng.randint(-(1 << 15), (1 << 15) - 1)))
        if opcode is Opcode.IOTA:
            del fields["fill"]
        if opcode is Opcode.LOAD_TABLE:
            fields["first"] = rng.randint(0, TABLE_WORDS - fields["counts.3"])
        if opcode is Opcode.SHUFFLE:
            fields["spread"] = rng.randint(0, 1)
        if spec.body is RandomBody:
            fields["key"] = rng.getrandbits(32)
        if opcode is Opcode.DROPOUT:
            fields["threshold"] = rng.choice((0, 1 << 31, (1 << 32) - 1, rng.getrandbits(32)))
        fields["imm0"] = rng.choice((0, 0x3F800000, rng.getrandbits(32)))
        fields["imm1"] = rng.choice((0, 0xBF800000, rng.getrandbits(32)))
        for name in ("imm0", "imm1"):
            if name not in decode(encode(opcode, {}))[1]:
                del fields[name]
        raw = encode(opcode, fields)
        if check(raw, engine_kind(engine_of(opcode)), NANO) is None:
            return raw


def random_core(rng: random.Random) -> Core:
    generator = np.random.default_rng(rng.getrandbits(32))
    core = Core(NANO, generator.integers(0, 256, DRAM_BYTES).astype(np.uint8))
    for memory in (core.sbuf, core.psum, core.stationary.words):
        ordinary = generator.standard_normal(memory.shape).astype(np.float32).view(np.uint32)
        wild = generator.integers(0, 2**32, memory.shape, dtype=np.uint32)
        memory[:] = np.where(generator.random(memory.shape) < 0.8, ordinary, wild)
    core.tables[:] = generator.integers(0, 1 << 32, core.tables.shape, dtype=np.uint32)
    core.sbuf[:, INDICES:] = generator.integers(0, ROWS, core.sbuf[:, INDICES:].shape)
    words, pairs = core.stationary.words, generator.random(NANO.lanes) < 0.5
    core.seed = rng.getrandbits(32)
    core.stationary.pairs[:] = pairs
    for memory in (core.sbuf, core.psum):  # bounds of a range, for one
        small = generator.integers(-2, 7, memory.shape).astype(np.int32).view(np.uint32)
        memory[:] = np.where(generator.random(memory.shape) < 0.1, small, memory)
    words[0] = arithmetic.round_to(words[0], DType.BF16)
    words[:, :, pairs] = arithmetic.round_to(words[:, :, pairs], DType.FP8_E5M2)
    core.weights.assign(core.stationary)
    return core


def operand(word: np.ndarray, dtype: DType) -> np.ndarray:
    """A word as a number that the tensor engine multiplies, FP32."""
    if dtype is DType.INT8:
        low = int(word[0]) & 0xFF
        return one(np.float32(low - 256 * (low > 127)).view(np.uint32))
    return arithmetic.round_to(word, dtype)


def integer(value: np.float32) -> int:
    """Toward zero, within INT32."""
    if np.isnan(value):
        return 0
    if np.isinf(value):
        return (1 << 31) - 1 if value > 0 else -(1 << 31)
    return max(-(1 << 31), min((1 << 31) - 1, int(value)))


def affine(f: dict[str, int], lane: int, index: tuple[int, ...]) -> int:
    """The affine number of an element, signed."""
    number = (
        f["base"] + lane * f["lane_step"] + sum(i * f[f"steps.{d}"] for d, i in enumerate(index))
    )
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def compares(operation: int, number: float) -> bool:
    """Whether a number compares with zero."""
    match AluOp(operation):
        case AluOp.EQ:
            return number == 0
        case AluOp.NE:
            return number != 0
        case AluOp.LT:
            return number < 0
        case AluOp.LE:
            return number <= 0
        case AluOp.GT:
            return number > 0
    return number >= 0


def rank(word: np.uint32, sign: int) -> float:
    """Place of a word among others: by its bits below the sign, NaN before all."""
    magnitude = int(word) & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.inf
    return sign * (-1 - magnitude if int(word) >> 31 else magnitude)


def one(value: object) -> np.ndarray:
    return np.array([value], np.uint32)


class Naive:
    """One instruction, element by element: reads everything, then writes in order."""

    def __init__(self, core: Core) -> None:
        self.sbuf, self.psum = core.sbuf.copy(), core.psum.copy()
        self.stationary, self.dram = core.stationary.words.copy(), core.dram.copy()
        self.pairs = core.stationary.pairs.copy()
        self.seed = core.seed
        self.tables = core.tables.copy()

    def index(self, f: dict[str, int], row: int) -> int:
        """The index of a row of a GATHER or SCATTER."""
        return int(self.sbuf[row % NANO.lanes, f["index.base"] + row // NANO.lanes])

    def element(self, f: dict[str, int], index: tuple[int, ...], lane: int) -> int:
        """DRAM byte address of an element."""
        if "rows" in f:
            address = self.index(f, index[0]) * f["row_stride"] + index[3] * f["column_stride"]
        else:
            address = sum(i * f[f"dram_strides.{d}"] for d, i in enumerate(index))
        address = (f["dram_base"] + address + lane * f["lane_stride"]) % (1 << 48)
        return address & ~(FORMATS[DType(f["dram_dtype"])].bytes > 1)

    def first_bad_row(self, f: dict[str, int]) -> int | None:
        """The first row, of one i0, that does not exist."""
        end = DRAM_BYTES - FORMATS[DType(f["dram_dtype"])].bytes
        for row in range(f["counts.0"]):
            if "rows" in f and self.index(f, row) >= f["rows"]:
                return row
            for inner in itertools.product(*(range(f[f"counts.{d}"]) for d in (1, 2, 3))):
                if any(self.element(f, (row, *inner), lane) > end for lane in range(f["lanes"])):
                    return row
        return None

    def execute(self, raw: bytes) -> None:
        opcode, f = decode(raw)
        counts = [f[f"counts.{i}"] for i in range(4)]
        indices = list(itertools.product(*(range(n) for n in counts)))
        lanes = f["lanes"]

        def memory(name: str) -> np.ndarray:
            return self.psum if f[f"{name}.space"] == Space.PSUM.value else self.sbuf

        def at(name: str, index: tuple[int, ...]) -> int:
            walked = zip(index, (f.get(f"{name}.strides.{i}", 0) for i in range(4)), strict=True)
            return f[f"{name}.base"] + sum(i * s for i, s in walked)

        def word(name: str, lane: int, index: tuple[int, ...]) -> np.ndarray:
            return one(memory(name)[lane, at(name, index)])

        def alu(op: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return arithmetic.alu(AluOp(op), a, b, computes)

        # What the vector engine computes in.
        written = DType(f.get("dst.dtype", 0))
        computes = DType.INT32 if written in INTEGERS else DType.FP32
        if "src0.dtype" in f:
            computes = DType(f["src0.dtype"])
        writes: list[tuple[int, tuple[int, ...], np.ndarray]] = []
        steps = [(lane, index) for index in indices for lane in range(lanes)]
        match opcode:
            case Opcode.LOAD_STATIONARY | Opcode.LOAD_STATIONARY_PAIR:
                names = ["src0", "src1"][: 1 + (opcode is Opcode.LOAD_STATIONARY_PAIR)]
                self.stationary[:, :, : counts[3]] = 0
                self.pairs[: counts[3]] = len(names) == 2
                for number, name in enumerate(names):
                    for lane, index in steps:
                        value = operand(word(name, lane, index), DType(f[f"{name}.dtype"]))
                        self.stationary[number, lane, index[3]] = value[0]
            case Opcode.MATMUL | Opcode.MATMUL_PAIR:
                names = ["src0", "src1"][: 1 + (opcode is Opcode.MATMUL_PAIR)]
                moving = self.sbuf.copy()
                for index in indices:
                    x = []
                    for name in names:
                        column = moving[:lanes, at(name, index)]
                        numbers = [operand(one(w), DType(f[f"{name}.dtype"])) for w in column]
                        x.append(np.concatenate(numbers).view(np.float32).astype(np.float64))
                    for m in range(f["columns"]):
                        acc = np.float32(0)
                        with np.errstate(all="ignore"):
                            for k in range(lanes):
                                w = self.stationary[:, k, m].view(np.float32).astype(np.float64)
                                if len(names) == 2 and self.pairs[m]:
                                    pair = np.float32(x[0][k] * w[0] + x[1][k] * w[1])
                                    acc = np.float32(acc + pair)
                                else:
                                    acc = np.float32(np.float64(acc) + x[0][k] * w[0])
                        tile = arithmetic.canonical(np.array([acc], np.float32))
                        if f["dst.dtype"] == DType.INT32.value:
                            old = int(self.psum[m, at("dst", index)]) if f["accumulate"] else 0
                            tile = one((old + integer(acc)) % (1 << 32))
                        elif f["accumulate"]:
                            tile = arithmetic.add(one(self.psum[m, at("dst", index)]), tile)
                        self.psum[m, at("dst", index)] = tile[0]
            case Opcode.TENSOR_TENSOR:
                for lane, index in steps:
                    a = alu(f["op0"], word("src0", lane, index), one(f["imm0"]))
                    writes.append((lane, index, alu(f["op1"], a, word("src1", lane, index))))
            case Opcode.TENSOR_SCALAR:
                for lane, index in steps:
                    a = alu(f["op0"], word("src0", lane, index), one(f["imm0"]))
                    writes.append((lane, index, alu(f["op1"], a, one(f["imm1"]))))
            case Opcode.SCALAR_TENSOR_TENSOR:
                for lane, index in steps:
                    scalar = word("scalar", lane, (0, 0, 0, 0))
                    a = alu(f["op0"], word("src0", lane, index), scalar)
                    writes.append((lane, index, alu(f["op1"], a, word("src1", lane, index))))
            case Opcode.REDUCE:
                for outer in itertools.product(*(range(n) for n in counts[:3])):
                    for lane in range(lanes):
                        acc = [one(REDUCTIONS[AluOp(f["op1"])][computes])] * REDUCE_ACCUMULATORS
                        for i in range(counts[3]):
                            a = alu(f["op0"], word("src0", lane, (*outer, i)), one(f["imm0"]))
                            acc[i % 4] = alu(f["op1"], acc[i % 4], a)
                        left, right = alu(f["op1"], *acc[:2]), alu(f["op1"], *acc[2:])
                        writes.append((lane, (*outer, 0), alu(f["op1"], left, right)))
            case Opcode.STATISTICS:
                for outer in itertools.product(*(range(n) for n in counts[:3])):
                    for lane in range(lanes):
                        acc = [one(0)] * 4
                        for i in range(counts[3]):
                            x = word("src0", lane, (*outer, i))
                            for place, op in enumerate((AluOp.BYPASS, AluOp.SQUARE)):
                                at_place = 2 * (i % 2) + place
                                term = alu(op.value, x, x)
                                acc[at_place] = alu(AluOp.ADD.value, acc[at_place], term)
                        for place in range(2):
                            total = alu(AluOp.ADD.value, acc[place], acc[place + 2])
                            writes.append((lane, (*outer, place), total))
            case Opcode.MEMSET:
                writes = [(lane, index, one(f["imm0"])) for lane, index in steps]
            case Opcode.COPY_PREDICATED:
                for lane, index in steps:
                    sign = 0 if computes is DType.FP32 else 1 << 31
                    if word("src0", lane, index)[0] & (0x7FFFFFFF | sign):
                        writes.append((lane, index, word("src1", lane, index)))
            case Opcode.IOTA:
                for lane, index in steps:
                    number = affine(f, lane, index)
                    if f["dst.dtype"] == DType.FP32.value:
                        writes.append((lane, index, one(np.float32(number).view(np.uint32))))
                    else:
                        writes.append((lane, index, one(number % (1 << 32))))
                f["dst.dtype"] = DType.FP32.value  # whatever it is, nothing is rounded any more
            case Opcode.AFFINE_SELECT:
                for lane, index in steps:
                    found = word("src0", lane, index)
                    if not compares(f["op0"], affine(f, lane, index)):
                        found = one(f["fill"] << 16)
                    writes.append((lane, index, found))
            case Opcode.SELECT:
                for lane, index in steps:
                    condition = float(word("src0", lane, index).view(np.float32)[0])
                    chosen = compares(f["op0"], condition)
                    writes.append(
                        (lane, index, word("src1", lane, index) if chosen else one(f["imm0"]))
                    )
            case Opcode.RANGE_SELECT:
                for lane, index in steps:
                    low, high = (
                        int(word("src1", lane, (0, 0, 0, i)).view(np.int32)[0]) for i in (0, 1)
                    )
                    inside = low <= index[3] < high
                    writes.append(
                        (lane, index, word("src0", lane, index) if inside else one(f["imm0"]))
                    )
            case Opcode.SCAN:
                last: dict[tuple[int, ...], np.ndarray] = {}
                for lane, index in steps:
                    row = (lane, *index[:2], index[3])
                    if index[2] == 0:
                        first = word("src1", lane, index) if f["accumulate"] else one(f["imm0"])
                        last[row] = first
                    b = one(f["imm0"]) if f["accumulate"] else word("src1", lane, index)
                    a = alu(f["op0"], word("src0", lane, index), last[row])
                    last[row] = alu(f["op1"], a, b)
                    writes.append((lane, index, last[row]))
            case Opcode.TOP:
                sign = -1 if f["op0"] == AluOp.MIN.value else 1
                for outer in itertools.product(*(range(n) for n in counts[:3])):
                    for lane in range(lanes):
                        row = [word("src0", lane, (*outer, i))[0] for i in range(counts[3])]
                        ranked = sorted(
                            range(counts[3]), key=lambda i: (rank(row[i], sign), -i), reverse=True
                        )
                        for place, i in enumerate(reversed(ranked[: f["kept"]])):
                            value = row[i] if rank(row[i], sign) < np.inf else CANONICAL_NAN
                            writes.append((lane, (*outer, 2 * place), one(i)))
                            writes.append((lane, (*outer, 2 * place + 1), one(value)))
            case Opcode.TRANSPOSE:
                for lane, index in steps:
                    turned = (*index[:3], lane)
                    writes.append((index[3], turned, word("src0", lane, index)))
                writes.sort(key=lambda write: write[1])  # in the order of dst's columns
            case Opcode.SHUFFLE:
                for lane, index in steps:
                    source = f["lane"] if f["spread"] else f[f"select.{lane}"]
                    writes.append((lane, index, word("src0", source, index)))
            case Opcode.RANDOM | Opcode.DROPOUT:
                words = random_words(
                    self.seed, f["key"], RANDOM_STREAM, elements=len(indices), lanes=NANO.lanes
                )
                for lane, index in steps:
                    drawn = int(words[lane, indices.index(index)])
                    if opcode is Opcode.DROPOUT:
                        kept = drawn >= f["threshold"]
                        value = word("src0", lane, index) if kept else one(0)
                        value = arithmetic.mul(value, one(f["imm0"]))
                    elif f["dst.dtype"] == DType.FP32.value:
                        value = one(np.float32((drawn >> 9) / 2**23).view(np.uint32))
                    else:
                        value = one(drawn)
                    writes.append((lane, index, value))
                if opcode is Opcode.RANDOM:
                    f["dst.dtype"] = DType.FP32.value
            case (
                Opcode.ACTIVATE
                | Opcode.ACTIVATE_TENSOR_BIAS
                | Opcode.ACTIVATE_TENSOR_SCALE
                | Opcode.ACTIVATE_ROWS
            ):
                acc: dict[tuple[int, ...], list[np.ndarray]] = {}
                for lane, index in steps:
                    if opcode is Opcode.ACTIVATE:
                        scale, bias = one(f["imm0"]), one(f["imm1"])
                    elif opcode is Opcode.ACTIVATE_TENSOR_BIAS:
                        scale, bias = one(f["imm0"]), word("src1", lane, index)
                    elif opcode is Opcode.ACTIVATE_TENSOR_SCALE:
                        scale, bias = word("src1", lane, index), one(f["imm0"])
                    else:
                        scale, bias = (word("src1", lane, (*index[:3], i)) for i in (0, 1))
                    y = arithmetic.add(arithmetic.mul(word("src0", lane, index), scale), bias)
                    result = evaluate(Function(f["op0"]), y, self.tables[lane])
                    row = acc.setdefault((lane, *index[:3]), [one(0)] * 4)
                    row[index[3] % 4] = arithmetic.add(row[index[3] % 4], result)
                    if f["op1"] != RowSums.ONLY.value:
                        writes.append((lane, index, result))
                for (lane, *outer), row in acc.items():
                    total = arithmetic.add(arithmetic.add(*row[:2]), arithmetic.add(*row[2:]))
                    if f["op1"] == RowSums.ONLY.value:
                        writes.append((lane, (*outer, 0), total))
                    elif f["op1"] == RowSums.BEHIND.value:
                        writes.append((lane, (*outer, counts[3]), total))
                writes.sort(key=lambda entry: entry[1])
            case Opcode.LOAD_TABLE:
                for lane, index in steps:
                    self.tables[lane, f["first"] + index[3]] = word("src0", lane, index)[0]
            case Opcode.DMA_LOAD | Opcode.DMA_STORE | Opcode.GATHER | Opcode.SCATTER:
                dtype = DType(f["dram_dtype"])
                size = FORMATS[dtype].bytes
                load = opcode in (Opcode.DMA_LOAD, Opcode.GATHER)
                steps = [(lane, index) for index in indices for lane in range(lanes)]
                work = [(load, lane, index) for lane, index in steps]
                if f["accumulate"] and not load:
                    # A row after the other is added to SBUF and stored.
                    work = [
                        (loads, lane, index)
                        for row in range(counts[0])
                        for loads in (True, False)
                        for lane, index in steps
                        if index[0] == row
                    ]
                for loads, lane, index in work:
                    address = self.element(f, index, lane)
                    element = slice(address, address + size)
                    target = self.sbuf[lane : lane + 1, at("local", index)]
                    if loads:
                        bits = np.frombuffer(self.dram[element].tobytes(), f"<u{size}")
                        word = arithmetic.unpack(bits, dtype)
                        if f["accumulate"] and dtype in INTEGERS:
                            word = one((int(word[0]) + int(target[0])) % (1 << 32))
                        elif f["accumulate"]:
                            word = arithmetic.add(target.copy(), word)
                        target[0] = word[0]
                    else:
                        raw_bytes = arithmetic.pack(target, dtype).tobytes()
                        self.dram[element] = np.frombuffer(raw_bytes, np.uint8)
        for lane, index, value in writes:
            behind = row_sums(opcode, f) is RowSums.BEHIND and index[3] == counts[3]
            if not behind:  # a sum behind its row is not rounded
                value = arithmetic.convert(value, computes, written)
            memory("dst")[lane, at("dst", index)] = value[0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize(
    "opcode", [op for op in Opcode if SPECS[op].operands], ids=lambda op: op.name
)
def test_instruction(opcode: Opcode, seed: int) -> None:
    rng = random.Random(seed)
    core = random_core(rng)
    raw = random_instruction(rng, opcode)
    naive = Naive(core)
    fault = core.execute(raw, engine_of(opcode))
    if fault is not None:
        fields = decode(raw)[1]
        assert "dram_base" in fields  # only the bus can still refuse, or an index be wrong
        if SPECS[opcode].indexed or (opcode is Opcode.DMA_STORE and fields["accumulate"]):
            # The first row that is not there; those before it have been moved.
            bad = naive.first_bad_row(fields)
            assert bad is not None
            if fault.cause is FaultCause.OUT_OF_BOUNDS:
                assert fault.address == naive.index(fields, bad) >= fields["rows"]
            if bad:
                naive.execute(encode(opcode, {**fields, "counts.0": bad}))
        assert (core.sbuf == naive.sbuf).all() and (core.dram == naive.dram).all()
        return
    naive.execute(raw)
    for name in ("sbuf", "psum", "dram", "tables"):
        np.testing.assert_array_equal(getattr(core, name), getattr(naive, name), name)
    np.testing.assert_array_equal(core.stationary.words, naive.stationary)
    np.testing.assert_array_equal(core.stationary.pairs, naive.pairs)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_dma_windows_equal_the_definition(seed: int) -> None:
    """The strided windows give what `systolith.golden.dma` defines."""
    rng = random.Random(seed)
    core, other = random_core(random.Random(seed)), random_core(random.Random(seed))
    raw = random_instruction(rng, rng.choice((Opcode.DMA_LOAD, Opcode.DMA_STORE)))
    fault = other._dma_by_definition(*decode(raw))()
    assert core.execute(raw, "dma0") == fault
    np.testing.assert_array_equal(core.sbuf, other.sbuf)
    np.testing.assert_array_equal(core.dram, other.dram)


# -- programs ----------------------------------------------------------------------------------


def start(core: Core, text: str) -> None:
    """Places streams (END added to each) at multiples of 1024 bytes and starts them."""
    streams = assemble(text) if text else {}
    for index, engine in enumerate(NANO.engines):
        raw = streams.get(engine, b"") + encode(Opcode.END, {})
        core.dram[1024 * index : 1024 * index + len(raw)] = np.frombuffer(raw, np.uint8)
    core.start([1024 * index for index in range(len(NANO.engines))])


def new_core(seed: int | None = None) -> Core:
    scheduler = None if seed is None else random.Random(seed)
    return Core(NANO, np.zeros(1 << 14, np.uint8), scheduler=scheduler)


def test_counters_and_end() -> None:
    core = new_core()
    start(
        core,
        "tensor[0] LOAD_STATIONARY lanes=3 counts=[1,1,1,2] src0=sbuf.bf16@0[0,0,0,1]\n"
        "tensor[1] MATMUL lanes=3 columns=2 counts=[1,1,2,5] dst=psum.fp32@0[0,0,5,1]"
        " src0=sbuf.bf16@0[0,0,5,1]\nvector[0] NOP\n",
    )
    assert core.run() == 8
    assert core.fault is None and not core.running
    assert core.instructions == [3, 2, 1, 1, 1]
    assert core.macs == 3 * 2 * 10


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_semaphores(seed: int | None) -> None:
    """AT_LEAST leaves the count, ACQUIRE takes it, and slots hold one after the other."""
    core = new_core(seed)
    start(
        core,
        "vector[0] wait(s1>=2,s1-=1) NOP signal(s2+3)\n"
        "scalar[0] NOP signal(s1+1)\n"
        "scalar[1] NOP signal(s1+1)\n"
        "dma0[0] wait(s2-=1,s2-=2) NOP signal(s3+255)\n",
    )
    core.run()
    assert core.fault is None
    assert core.semaphores[:4] == [0, 1, 0, 255]


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_deadlock_is_a_watchdog_fault(seed: int | None) -> None:
    core = new_core(seed)
    start(core, "vector[0] NOP\nvector[1] wait(s1>=1) NOP\nscalar[0] wait(s2>=1) NOP signal(s1+1)")
    core.run()
    assert core.fault is not None
    assert (core.fault.engine, core.fault.pc) == (1, 1)
    assert core.fault.cause is FaultCause.WATCHDOG


def test_a_faulting_instruction_does_nothing() -> None:
    core = new_core()
    start(
        core,
        "vector[0] MEMSET lanes=4 counts=[1,1,1,4] dst=sbuf.fp32@0[0,0,0,1] imm0=1.0\n"
        "vector[1] MEMSET lanes=4 counts=[1,1,1,4] dst=sbuf.fp32@2045[0,0,0,1] imm0=1.0"
        " signal(s1+1)\n",
    )
    core.run()
    assert core.fault is not None
    assert (core.fault.engine, core.fault.pc, core.fault.address) == (1, 1, 2048)
    assert core.fault.cause is FaultCause.OUT_OF_BOUNDS
    assert core.sbuf[:, :4].all() and not core.sbuf[:, 4:].any()
    assert core.semaphores[1] == 0 and core.instructions[1] == 1


def test_semaphore_overflow() -> None:
    core = new_core()
    start(core, "\n".join(f"vector[{i}] NOP signal(s5+255)" for i in range(14)))
    core.semaphores[5] = 65535 - 255 * 3
    core.run()
    assert core.fault is not None
    assert core.fault.cause is FaultCause.SEMAPHORE_OVERFLOW
    assert (core.fault.pc, core.fault.address, core.semaphores[5]) == (3, 5, 65535)


def test_fetch_error() -> None:
    core = new_core()
    core.start([0, 0, 0, 0, 0])  # zeros are NOPs, up to the end of DRAM
    core.run()
    assert core.fault is not None
    assert core.fault.cause is FaultCause.FETCH_ERROR
    assert core.fault.pc == (1 << 14) // 64 and core.fault.address == 1 << 14


def test_memories_persist_over_runs_and_resets() -> None:
    core = new_core()
    start(core, "vector[0] MEMSET lanes=4 counts=[1,1,1,1] dst=psum.fp32@9[0,0,0,0] imm0=2.0")
    core.run()
    start(core, "")
    core.run()
    core.reset()
    assert (core.psum[:, 9] == 0x40000000).all()
    assert core.instructions == [0] * 5


def test_steps_can_be_limited() -> None:
    core = new_core()
    start(core, "vector[0] NOP\nvector[1] NOP")
    assert [core.run(3), core.running, core.run(3), core.running, core.run(3)] == [
        3,
        True,
        3,
        True,
        1,
    ]
    assert not core.running and core.fault is None


def test_dram_size_is_checked() -> None:
    with pytest.raises(BackendError, match="multiple of 4096 bytes, not 100"):
        GoldenDevice("nano", dram_bytes=100)
