"""The instruction set: the only definition. Decoders, checker, assembler, disassembler, golden
model and the documentation tables all derive from the structures below.

An instruction is 64 bytes: a 16-byte `Header` and a 48-byte body whose layout the opcode fixes.
Bit 0 is the least significant bit of byte 0.

Elementwise instructions walk one iteration space of four nested counts (index 0 outermost, 3
innermost); each operand has a base and four strides in words, so a stride of zero broadcasts.
One step touches one *column*: the word at one address in every partition 0 to lanes-1.
"""

import dataclasses
import functools
import operator
from typing import Any

from amaranth.hdl import Shape, signed, unsigned
from amaranth.lib import data, enum

from .config import INSTRUCTION_BYTES, CoreConfig
from .formats import FLOATS, FP8_TYPES, INTEGERS, NARROW_FLOATS, WORDS, DType

ISA_VERSION = 3
MAX_WAITS = 3
INSTRUCTION_BITS = 8 * INSTRUCTION_BYTES


class Space(enum.Enum, shape=2):
    """Memory an operand lies in."""

    #: the scratchpad
    SBUF = 0
    #: the accumulator memory of the tensor engine
    PSUM = 1


class EngineKind(enum.Enum, shape=2):
    """What kind of engine executes an instruction."""

    TENSOR = 0
    VECTOR = 1
    SCALAR = 2
    DMA = 3


def engine_kind(engine: str) -> EngineKind:
    """Kind of an engine, from its name in `CoreConfig.engines`."""
    return EngineKind.DMA if engine.startswith("dma") else EngineKind[engine.upper()]


class Opcode(enum.Enum, shape=8):
    """What an instruction does."""

    #: waits and signals only; legal on every engine. One that signals completes after all earlier
    #: instructions of its engine have
    NOP = 0x00
    #: ends the engine's stream once all its earlier instructions have completed; the program is
    #: done when every engine has ended
    END = 0x01
    #: stationary[k, m] <- src0 rounded to its type (of INT8: the low 8 bits of the word, as a
    #: number), `lanes` rows (K), one column per step; counts 0 to 2 must be 1 and count 3 is M, at
    #: most N (else BAD_COUNT). Rows from K on become zero, columns from M on keep their weights
    LOAD_STATIONARY = 0x10
    #: dst[m, f] (+)= sum over k of stationary[k, m] * src0[k, f], src0 taken as its type like the
    #: stationary operand, whose type may be another; `lanes` = K, `columns` = M. With a dst of type
    #: INT32, for which src0 must be INT8 (else BAD_TYPE), the FP32 sum is made an integer, toward
    #: zero, before it is written or added modulo 2**32
    MATMUL = 0x11
    #: stationary[k, m] <- the pair of src0 and src1, each rounded to its type, which is FP8;
    #: otherwise as LOAD_STATIONARY. Only where `fp8_rate` is 2
    LOAD_STATIONARY_PAIR = 0x12
    #: dst[m, f] (+)= sum over k of a sum of two products, each of first times first and second
    #: times second number of stationary[k, m] and (src0[k, f], src1[k, f]), which are rounded to
    #: their types, FP8. Columns that LOAD_STATIONARY loaded multiply src0 alone, as MATMUL does,
    #: and MATMUL multiplies the first number of a pair. Only where `fp8_rate` is 2
    MATMUL_PAIR = 0x13
    #: dst = (src0 op0 imm0) op1 src1
    TENSOR_TENSOR = 0x20
    #: dst = (src0 op0 imm0) op1 imm1
    TENSOR_SCALAR = 0x21
    #: dst = op1-reduction over the innermost dimension of (src0 op0 imm0)
    REDUCE = 0x22
    #: dst = imm0, an integer if the type of dst is one, else FP32
    MEMSET = 0x23
    #: dst = src1 where src0 is not zero; other elements of dst keep their value
    COPY_PREDICATED = 0x24
    #: dst = (src0 op0 scalar) op1 src1, where `scalar` is one word of each partition, read once
    SCALAR_TENSOR_TENSOR = 0x25
    #: dst = function(src0 * imm0 + imm1)
    ACTIVATE = 0x30
    #: dst = function(src0 * imm0 + src1)
    ACTIVATE_TENSOR_BIAS = 0x31
    #: local <- DRAM
    DMA_LOAD = 0x40
    #: DRAM <- local
    DMA_STORE = 0x41


class AluOp(enum.Enum, shape=6):
    """Operation `a op b` of the vector engine, in the type of src0: FP32, INT32 or UINT32. Compares
    and logical operations give 1 or 0 of that type. Integers are calculated modulo 2**32; -0, NaN
    and rounding are those of FP32 alone. Where it says "of the words", the type does not matter."""

    #: a
    BYPASS = 0
    #: a + b
    ADD = 1
    #: a - b
    SUB = 2
    #: b - a
    RSUB = 3
    #: a * b
    MUL = 4
    #: the larger; NaN if either is NaN; +0 is larger than -0
    MAX = 5
    #: the smaller; NaN if either is NaN; -0 is smaller than +0
    MIN = 6
    #: the larger of the absolute values; NaN if either is NaN
    ABS_MAX = 7
    #: a == b
    EQ = 8
    #: a != b
    NE = 9
    #: a < b
    LT = 10
    #: a <= b
    LE = 11
    #: a > b
    GT = 12
    #: a >= b
    GE = 13
    #: both are nonzero (NaN counts as nonzero)
    LOGICAL_AND = 14
    #: either is nonzero
    LOGICAL_OR = 15
    #: exactly one is nonzero
    LOGICAL_XOR = 16
    #: bitwise and of the 32-bit words
    BIT_AND = 17
    #: bitwise or of the 32-bit words
    BIT_OR = 18
    #: bitwise exclusive or of the 32-bit words
    BIT_XOR = 19
    #: a shifted left by b places, of the words; b is an unsigned integer, 0 if it is 32 or more
    SHIFT_LEFT = 20
    #: a shifted right by b places, of the words, zeros coming in; 0 if b is 32 or more
    SHIFT_RIGHT = 21
    #: a shifted right by b places, of the words, copies of bit 31 coming in; all of them if b is 32
    #: or more
    SHIFT_RIGHT_SIGNED = 22
    #: -a, whatever b is
    NEG = 23
    #: absolute value of a, whatever b is
    ABS = 24
    #: a * a, whatever b is
    SQUARE = 25
    #: a, or +0 if it is negative, whatever b is; NaN if a is NaN
    RELU = 26
    #: the complement of a, of the words, whatever b is
    BIT_NOT = 27
    #: a / b; of integers toward zero, with all bits set if b is 0
    DIVIDE = 28
    #: of integers: what a / b leaves, with the sign of a; a if b is 0
    MOD = 29
    #: of FP32: 1 / a, whatever b is
    RECIPROCAL = 30
    #: of FP32: square root of a, whatever b is; NaN if a is below -0
    SQRT = 31
    #: of FP32: 1 divided by the rounded square root of a, whatever b is
    RSQRT = 32


#: Operations that do not look at b, though the instruction reads it.
UNARY_OPERATIONS = frozenset(
    {
        AluOp.BYPASS, AluOp.NEG, AluOp.ABS, AluOp.SQUARE, AluOp.RELU, AluOp.BIT_NOT,
        AluOp.RECIPROCAL, AluOp.SQRT, AluOp.RSQRT,
    }
)  # fmt: skip
#: Operations of the divider, which only the second ALU has: a column takes as many cycles as bits.
DIVISIONS = frozenset({AluOp.DIVIDE, AluOp.MOD, AluOp.RECIPROCAL, AluOp.SQRT, AluOp.RSQRT})
#: Operations that not all types have (else BAD_TYPE), with the types that src0 may have.
OPERATION_TYPES: dict[AluOp, frozenset[DType]] = {
    AluOp.MOD: frozenset({DType.INT32, DType.UINT32}),
    **{op: frozenset({DType.FP32}) for op in (AluOp.RECIPROCAL, AluOp.SQRT, AluOp.RSQRT)},
}
#: Operations on words, of whatever type.
WORD_OPERATIONS = frozenset(
    {
        AluOp.BYPASS, AluOp.BIT_AND, AluOp.BIT_OR, AluOp.BIT_XOR, AluOp.BIT_NOT,
        AluOp.SHIFT_LEFT, AluOp.SHIFT_RIGHT, AluOp.SHIFT_RIGHT_SIGNED,
    }
)  # fmt: skip
#: Operations whose b is a word of bits, or an integer, rather than a number of the type.
BIT_OPERANDS = frozenset(
    {
        AluOp.BIT_AND, AluOp.BIT_OR, AluOp.BIT_XOR,
        AluOp.SHIFT_LEFT, AluOp.SHIFT_RIGHT, AluOp.SHIFT_RIGHT_SIGNED,
    }
)  # fmt: skip


def _identities(fp32: int, int32: int, uint32: int) -> dict[DType, int]:
    return dict(zip(WORDS, (fp32, int32, uint32), strict=True))


#: Reductions REDUCE takes as op1, with the value that each of its accumulators starts from, by the
#: type of src0.
REDUCTIONS: dict[AluOp, dict[DType, int]] = {
    AluOp.ADD: _identities(0, 0, 0),
    AluOp.MUL: _identities(0x3F800000, 1, 1),
    AluOp.MAX: _identities(0xFF800000, 0x80000000, 0),
    AluOp.MIN: _identities(0x7F800000, 0x7FFFFFFF, 0xFFFFFFFF),
    AluOp.ABS_MAX: _identities(0, 0, 0),
    AluOp.BIT_AND: _identities(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    AluOp.BIT_OR: _identities(0, 0, 0),
    AluOp.BIT_XOR: _identities(0, 0, 0),
}
#: REDUCE keeps this many accumulators: element i of the innermost dimension goes to accumulator
#: i mod 4, and the result is (acc0 op acc1) op (acc2 op acc3).
REDUCE_ACCUMULATORS = 4


class Function(enum.Enum, shape=6):
    """Function of the scalar engine, applied to y = x * scale + bias."""

    #: y
    IDENTITY = 0
    #: e to the y
    EXP = 1
    #: natural logarithm
    LOG = 2
    #: hyperbolic tangent
    TANH = 3
    #: 1 / y
    RECIPROCAL = 4
    #: 1 / square root of y
    RSQRT = 5
    #: square root
    SQRT = 6
    #: y * Phi(y), Phi the standard normal distribution function (the erf form)
    GELU = 7
    #: derivative of GELU
    GELU_DX = 8
    #: 1 / (1 + e to the -y)
    SIGMOID = 9
    #: error function
    ERF = 10
    #: ln(1 + e to the y); its derivative is SIGMOID
    SOFTPLUS = 11
    #: arc tangent
    ARCTAN = 12
    #: 1 with the sign of y, or y itself if it is zero
    SIGN = 13
    #: absolute value
    ABS = 14
    #: y, or +0 if it is negative
    RELU = 15


class Rounding(enum.Enum, shape=1):
    """How a result becomes a narrow float; other destination types round nothing."""

    #: to nearest, ties to even
    NEAREST = 0
    #: to one of the two neighbours, to each with a probability that makes the mean exact; the
    #: random bits follow from the SEED register, the engine, the number of instructions it issued
    #: before this one, the element and the lane (see docs/numerics.md)
    STOCHASTIC = 1


class WaitMode(enum.Enum, shape=2):
    """When a wait is satisfied."""

    #: the slot is empty
    NONE = 0
    #: semaphore >= value; the semaphore is left as it is
    AT_LEAST = 1
    #: semaphore >= value; value is then subtracted
    ACQUIRE = 2


class FaultCause(enum.Enum, shape=8):
    """Why an engine stopped. The checks of one instruction are made in this order."""

    #: no fault
    NONE = 0
    #: opcode unknown, not one of this engine's, or not one that the core has
    ILLEGAL_OPCODE = 1
    #: a bit that the opcode's format leaves reserved is set
    RESERVED_BITS = 2
    #: ALU operation, reduction, function or wait mode does not exist
    ILLEGAL_OPERATION = 3
    #: operand type not allowed there
    BAD_TYPE = 4
    #: operand in a memory the instruction cannot reach
    BAD_SPACE = 5
    #: a count of zero, or lanes or columns outside 1..N (LOAD_STATIONARY: see there)
    BAD_COUNT = 6
    #: semaphore number does not exist, or its chip is not this one
    BAD_SEMAPHORE = 7
    #: an access pattern leaves its memory; address = first word outside that the check met
    OUT_OF_BOUNDS = 8
    #: a signal would carry a semaphore past 65535; address = semaphore number
    SEMAPHORE_OVERFLOW = 9
    #: error response to a DMA read; address = byte address of the burst
    AXI_READ_ERROR = 10
    #: error response to a DMA write; address = byte address of the burst
    AXI_WRITE_ERROR = 11
    #: error response to an instruction fetch; address = byte address of the instruction
    FETCH_ERROR = 12
    #: nothing progressed for as many cycles as the watchdog register holds; engine = the lowest
    #: numbered one that has not ended, pc = its oldest instruction that is not complete
    WATCHDOG = 13


class Signal(data.Struct):
    """Adds `amount` to a semaphore when the instruction completes; 0 signals nothing."""

    sem: unsigned(6)
    amount: unsigned(8)
    chip: unsigned(10)


class Wait(data.Struct):
    """Holds the instruction back until a local semaphore has reached `value`."""

    sem: unsigned(6)
    mode: WaitMode
    value: unsigned(16)


class Header(data.Struct):
    """First 16 bytes of every instruction. Fields an opcode does not use must be zero."""

    opcode: Opcode
    signal: Signal
    wait: data.ArrayLayout(Wait, MAX_WAITS)
    op0: unsigned(6)
    op1: unsigned(6)
    lanes: unsigned(8)
    accumulate: unsigned(1)
    rounding: Rounding
    reserved: unsigned(2)


class Operand(data.Struct):
    """Local operand: `base` and strides in words of one partition."""

    base: unsigned(24)
    strides: data.ArrayLayout(signed(16), 4)
    space: Space
    dtype: DType
    reserved: unsigned(2)


Counts = data.ArrayLayout(unsigned(16), 4)


class TensorTensorBody(data.Struct):
    """Two-source elementwise body."""

    counts: Counts
    dst: Operand
    src0: Operand
    src1: Operand
    imm0: unsigned(32)


class ScalarOperand(data.Struct):
    """Local operand of one word in each partition."""

    base: unsigned(24)
    space: Space
    dtype: DType
    reserved: unsigned(2)


class ScalarTensorTensorBody(data.Struct):
    """Two-source elementwise body with a third source of one column."""

    counts: Counts
    dst: Operand
    src0: Operand
    src1: Operand
    scalar: ScalarOperand


class TensorScalarBody(data.Struct):
    """One-source elementwise body."""

    counts: Counts
    dst: Operand
    src0: Operand
    imm1: unsigned(32)
    reserved: unsigned(64)
    imm0: unsigned(32)


class TensorBody(data.Struct):
    """Tensor-engine body: `src0` is the stationary or the moving operand, `columns` is M."""

    counts: Counts
    dst: Operand
    src0: Operand
    columns: unsigned(8)
    reserved: unsigned(120)


class TensorPairBody(data.Struct):
    """Tensor-engine body with the second numbers of pairs in `src1`."""

    counts: Counts
    dst: Operand
    src0: Operand
    src1: Operand
    columns: unsigned(8)
    reserved: unsigned(24)


class DmaBody(data.Struct):
    """DMA body. Element (i0, i1, i2, i3) of lane l lies in DRAM at byte
    ``dram_base + sum(i[d] * dram_strides[d]) + l * lane_stride``, packed in `dram_dtype`."""

    counts: Counts
    local: Operand
    dram_base: unsigned(48)
    dram_strides: data.ArrayLayout(signed(32), 4)
    lane_stride: signed(32)
    dram_dtype: DType
    reserved: unsigned(12)


class EmptyBody(data.Struct):
    """Body of NOP and END."""

    reserved: unsigned(384)


def _instruction(body: type[data.Struct]) -> data.StructLayout:
    return data.StructLayout({"header": Header, "body": body})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What the checker, assembler and documentation know of one opcode.

    Parameters
    ----------
    kind : engine it runs on; None for every engine
    body : layout of its body
    header : header fields it uses beside opcode, signal and wait
    operands : local operands it uses -> (spaces allowed, types allowed)
    unused : dotted body fields that must be zero though the body has them
    alike : operands that must have the type of src0
    pairs : works on pairs of FP8 numbers, which only some cores have
    """

    kind: EngineKind | None
    body: type[data.Struct]
    header: frozenset[str] = frozenset()
    operands: dict[str, tuple[frozenset[Space], frozenset[DType]]] = dataclasses.field(
        default_factory=dict
    )
    unused: frozenset[str] = frozenset()
    alike: frozenset[str] = frozenset()
    pairs: bool = False

    def exists(self, config: CoreConfig) -> bool:
        """Whether cores of that configuration have the instruction."""
        return not self.pairs or config.fp8_rate == 2

    @property
    def layout(self) -> data.StructLayout:
        return _instruction(self.body)


_BOTH = frozenset({Space.SBUF, Space.PSUM})
_SBUF = frozenset({Space.SBUF})
_PSUM = frozenset({Space.PSUM})
_READ = frozenset({DType.FP32})
_WRITE = frozenset(FLOATS)
_WORDS = frozenset(WORDS)
_ANY = frozenset(DType)
_MATMUL = frozenset({*NARROW_FLOATS, DType.INT8})
_FP8 = frozenset(FP8_TYPES)
_SUMS = frozenset({DType.FP32, DType.INT32})
#: types DMA moves between DRAM and 32-bit words
DMA_TYPES = frozenset({*FLOATS, *INTEGERS})

_DST = {"dst": (_BOTH, _WRITE)}
_SRC0 = {"src0": (_BOTH, _READ)}
_SRC1 = {"src1": (_BOTH, _READ)}
#: Operands of the vector engine: it computes in the type of the sources, and converts the result.
_RESULT = {"dst": (_BOTH, _ANY)}
_X = {"src0": (_BOTH, _WORDS)}
_Y = {"src1": (_BOTH, _WORDS)}
_SCALAR = {"scalar": (_BOTH, _WORDS)}

SPECS: dict[Opcode, Spec] = {
    Opcode.NOP: Spec(kind=None, body=EmptyBody),
    Opcode.END: Spec(kind=None, body=EmptyBody),
    Opcode.LOAD_STATIONARY: Spec(
        kind=EngineKind.TENSOR,
        body=TensorBody,
        header=frozenset({"lanes"}),
        operands={"src0": (_SBUF, _MATMUL)},
        unused=frozenset({"dst", "columns"}),
    ),
    Opcode.MATMUL: Spec(
        kind=EngineKind.TENSOR,
        body=TensorBody,
        header=frozenset({"lanes", "accumulate"}),
        operands={"dst": (_PSUM, _SUMS), "src0": (_SBUF, _MATMUL)},
    ),
    Opcode.LOAD_STATIONARY_PAIR: Spec(
        kind=EngineKind.TENSOR,
        body=TensorPairBody,
        header=frozenset({"lanes"}),
        operands={"src0": (_SBUF, _FP8), "src1": (_SBUF, _FP8)},
        unused=frozenset({"dst", "columns"}),
        pairs=True,
    ),
    Opcode.MATMUL_PAIR: Spec(
        kind=EngineKind.TENSOR,
        body=TensorPairBody,
        header=frozenset({"lanes", "accumulate"}),
        operands={"dst": (_PSUM, _READ), "src0": (_SBUF, _FP8), "src1": (_SBUF, _FP8)},
        pairs=True,
    ),
    Opcode.TENSOR_TENSOR: Spec(
        kind=EngineKind.VECTOR,
        body=TensorTensorBody,
        header=frozenset({"op0", "op1", "lanes", "rounding"}),
        operands={**_RESULT, **_X, **_Y},
        alike=frozenset({"src1"}),
    ),
    Opcode.TENSOR_SCALAR: Spec(
        kind=EngineKind.VECTOR,
        body=TensorScalarBody,
        header=frozenset({"op0", "op1", "lanes", "rounding"}),
        operands={**_RESULT, **_X},
    ),
    Opcode.REDUCE: Spec(
        kind=EngineKind.VECTOR,
        body=TensorScalarBody,
        header=frozenset({"op0", "op1", "lanes", "rounding"}),
        operands={**_RESULT, **_X},
        unused=frozenset({"imm1", "dst.strides.3"}),
    ),
    Opcode.MEMSET: Spec(
        kind=EngineKind.VECTOR,
        body=TensorScalarBody,
        header=frozenset({"lanes", "rounding"}),
        operands={**_RESULT},
        unused=frozenset({"imm1", "src0"}),
    ),
    Opcode.COPY_PREDICATED: Spec(
        kind=EngineKind.VECTOR,
        body=TensorTensorBody,
        header=frozenset({"lanes", "rounding"}),
        operands={**_RESULT, **_X, **_Y},
        alike=frozenset({"src1"}),
        unused=frozenset({"imm0"}),
    ),
    Opcode.SCALAR_TENSOR_TENSOR: Spec(
        kind=EngineKind.VECTOR,
        body=ScalarTensorTensorBody,
        header=frozenset({"op0", "op1", "lanes", "rounding"}),
        operands={**_RESULT, **_X, **_Y, **_SCALAR},
        alike=frozenset({"src1", "scalar"}),
    ),
    Opcode.ACTIVATE: Spec(
        kind=EngineKind.SCALAR,
        body=TensorScalarBody,
        header=frozenset({"op0", "lanes", "rounding"}),
        operands={**_DST, **_SRC0},
    ),
    Opcode.ACTIVATE_TENSOR_BIAS: Spec(
        kind=EngineKind.SCALAR,
        body=TensorTensorBody,
        header=frozenset({"op0", "lanes", "rounding"}),
        operands={**_DST, **_SRC0, **_SRC1},
    ),
    Opcode.DMA_LOAD: Spec(
        kind=EngineKind.DMA,
        body=DmaBody,
        header=frozenset({"lanes"}),
        operands={"local": (_SBUF, _READ)},
    ),
    Opcode.DMA_STORE: Spec(
        kind=EngineKind.DMA,
        body=DmaBody,
        header=frozenset({"lanes", "rounding"}),
        operands={"local": (_SBUF, _READ)},
    ),
}


#: Instructions that load the stationary operand. They complete in order among themselves, but out
#: of order with the tensor engine's others.
LOADS = frozenset({Opcode.LOAD_STATIONARY, Opcode.LOAD_STATIONARY_PAIR})
#: Instructions on pairs of FP8 numbers.
PAIRS = frozenset(opcode for opcode, spec in SPECS.items() if spec.pairs)


def is_opcode(opcode: Any, wanted: frozenset[Opcode], config: CoreConfig) -> Any:
    """1 if the opcode (a value in hardware) is one of those wanted that the core has."""
    codes = [code for code in Opcode if code in wanted and SPECS[code].exists(config)]
    return functools.reduce(operator.or_, (opcode == code for code in codes))


def operation_enums(opcode: Opcode) -> dict[str, type[enum.Enum]]:
    """Returns the enumeration that each of op0 and op1 holds, of those `opcode` uses."""
    spec = SPECS[opcode]
    kind = Function if spec.kind is EngineKind.SCALAR else AluOp
    return {field: kind for field in ("op0", "op1") if field in spec.header}


def legal_operations(opcode: Opcode, field: str) -> frozenset[int]:
    """Returns the codes `opcode` accepts in op0 or op1."""
    if opcode is Opcode.REDUCE and field == "op1":
        return frozenset(op.value for op in REDUCTIONS)
    codes = {op.value for op in operation_enums(opcode)[field]}
    if field == "op0" and SPECS[opcode].kind is EngineKind.VECTOR:
        codes -= {op.value for op in DIVISIONS}
    return frozenset(codes)


def operation_types(opcode: Opcode) -> dict[AluOp, frozenset[DType]]:
    """Returns the operations of op1 that `opcode` has for some types of src0 only, and those."""
    if SPECS[opcode].kind is not EngineKind.VECTOR or "op1" not in SPECS[opcode].header:
        return {}
    legal = legal_operations(opcode, "op1")
    return {op: types for op, types in OPERATION_TYPES.items() if op.value in legal}


class EncodeError(ValueError):
    """A field does not exist in the opcode's format, or its value does not fit."""


def _leaves(layout: Any, prefix: str, offset: int) -> dict[str, tuple[int, Any]]:
    """Flattens a layout into dotted leaf name -> (bit offset, shape)."""
    if isinstance(layout, type) and issubclass(layout, data.Struct):
        layout = data.Layout.cast(layout)
    if not isinstance(layout, data.Layout):
        return {prefix: (offset, layout)}
    found: dict[str, tuple[int, Any]] = {}
    for name, field in layout:
        dotted = f"{prefix}.{name}" if prefix else str(name)
        found.update(_leaves(field.shape, dotted, offset + field.offset))
    return found


#: opcode -> dotted field name -> (bit offset, shape); header names carry no prefix
FIELDS: dict[Opcode, dict[str, tuple[int, Any]]] = {}
#: opcode -> mask of the bits that may be set
USED_BITS: dict[Opcode, int] = {}


def _width(shape: Any) -> tuple[int, bool]:
    if isinstance(shape, type) and issubclass(shape, enum.Enum):
        return Shape.cast(shape).width, False
    return shape.width, shape.signed


def _build_tables() -> None:
    header_always = {"opcode", "signal", "wait"}
    for opcode, spec in SPECS.items():
        fields: dict[str, tuple[int, Any]] = {}
        for name, (offset, shape) in _leaves(Header, "", 0).items():
            if name.split(".")[0] in header_always | spec.header:
                fields[name] = (offset, shape)
        for name, (offset, shape) in _leaves(spec.body, "", 128).items():
            unused = any(name == u or name.startswith(u + ".") for u in spec.unused)
            if name.split(".")[-1] != "reserved" and not unused:
                fields[name] = (offset, shape)
        FIELDS[opcode] = fields
        mask = 0
        for offset, shape in fields.values():
            mask |= ((1 << _width(shape)[0]) - 1) << offset
        USED_BITS[opcode] = mask


_build_tables()


def encode(opcode: Opcode, fields: dict[str, Any]) -> bytes:
    """Packs an instruction into 64 bytes.

    `fields` maps dotted names (``"dst.strides.0"``, ``"wait.1.sem"``) to integers or enumeration
    members; what is not named is zero. Raises EncodeError, naming the field.
    """
    word = opcode.value
    known = FIELDS[opcode]
    for name, value in fields.items():
        if name not in known:
            raise EncodeError(f"{opcode.name} has no field {name!r}; it has {', '.join(known)}")
        offset, shape = known[name]
        width, is_signed = _width(shape)
        number = value.value if isinstance(value, enum.Enum) else int(value)
        low = -(1 << (width - 1)) if is_signed else 0
        high = (1 << (width - 1)) - 1 if is_signed else (1 << width) - 1
        if not low <= number <= high:
            raise EncodeError(f"{opcode.name}.{name} = {number} is outside {low}..{high}")
        word |= (number & ((1 << width) - 1)) << offset
    return word.to_bytes(INSTRUCTION_BYTES, "little")


def decode(raw: bytes) -> tuple[Opcode, dict[str, int]]:
    """Unpacks 64 bytes into the opcode and all the fields of its format, as plain integers.

    Raises ValueError for an unknown opcode. Says nothing of legality: see the checker.
    """
    word = int.from_bytes(raw, "little")
    opcode = Opcode(word & 0xFF)
    fields: dict[str, int] = {}
    for name, (offset, shape) in FIELDS[opcode].items():
        width, is_signed = _width(shape)
        value = (word >> offset) & ((1 << width) - 1)
        if is_signed and value >> (width - 1):
            value -= 1 << width
        fields[name] = value
    del fields["opcode"]
    return opcode, fields
