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
from collections.abc import Callable, Sequence
from typing import Any

from amaranth.hdl import Mux, Shape, Value, signed, unsigned
from amaranth.lib import data, enum

from .config import INSTRUCTION_BYTES, CoreConfig
from .formats import FLOATS, FP8_TYPES, INFINITY, INTEGERS, NARROW_FLOATS, ONE, WORDS, DType

ISA_VERSION = 3
MAX_WAITS = 3
LOOP_DEPTH = 4  #: loops that may be open at once in a stream
INDEX_REGISTERS = 3  #: of each stream, 32 bits each
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
    #: the instructions up to the matching NEXT are executed `count` times, at least once (else
    #: BAD_COUNT); loops nest up to 4 deep (else BAD_LOOP)
    LOOP = 0x02
    #: ends the body of the innermost loop (BAD_LOOP if there is none). If iterations are left, and,
    #: with `conditional`, the flag is set, `steps` are added to the index registers and the loop
    #: goes on after its LOOP; else it is over, and the index registers are again what they were
    #: before it
    NEXT = 0x03
    #: reads the 32-bit word at `dram_base`, of which the two lowest bits are ignored, once all
    #: earlier instructions of its engine are complete: the flag of the stream is set if the word is
    #: a number other than zero, that is unless bits 30 to 0 are zero. At first it is not set
    TEST = 0x04
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
    #: dst = base + i0*steps.0 + i1*steps.1 + i2*steps.2 + i3*steps.3 + lane*lane_step, modulo 2**32
    #: as a signed number; of type INT32 the number itself, of FP32 rounded to the nearest float
    IOTA = 0x26
    #: dst = src0 where the number that IOTA would write satisfies ``number op0 0``, elsewhere
    #: `fill`, the upper half of an FP32 word
    AFFINE_SELECT = 0x27
    #: dst = src1 where ``src0 op0 0`` holds, elsewhere imm0
    SELECT = 0x28
    #: dst = src0 where low <= i3 < high, elsewhere imm0. Low and high are two words of each
    #: partition, signed integers: the first and the second column of src1
    RANGE_SELECT = 0x29
    #: dst = r, with ``r = (src0 op0 (r of i2 - 1)) op1 src1`` along index 2, beginning from imm0;
    #: with `accumulate`, ``r = (src0 op0 (r of i2 - 1)) op1 imm0``, beginning from the word of src1
    #: at i2 = 0. Index 3 counts rows, 6 at most (else BAD_COUNT), which are worked on in turn
    SCAN = 0x2A
    #: the `kept` largest (op0 MAX) or smallest (MIN) words of src0 along the innermost dimension, 1
    #: to 8 and no more than there are (else BAD_COUNT). Dst walks 2 * `kept` in place of it: the
    #: one that comes first is written last, and of each its index, an integer, before itself. -0 is
    #: less than +0; NaNs, which are equal and given as the canonical one, come before any number;
    #: of equal words the one of the lowest index comes first
    TOP = 0x2B
    #: blocks turned: partition j of column (i0, i1, i2, l) of dst = partition l of column
    #: (i0, i1, i2, j) of src0. `lanes` partitions of src0 are `lanes` columns of dst, and the
    #: columns that count 3 counts, N at most (else BAD_COUNT), are partitions of dst
    TRANSPOSE = 0x2C
    #: partition l of dst = partition g + `select` at l - g of src0, g being l rounded down to a
    #: multiple of 8, or of N where it is less; with `spread`, partition `lane` of src0. `lanes` are
    #: those of dst. A number of a partition that does not exist is BAD_COUNT
    SHUFFLE = 0x2D
    #: dst = random words: of type INT32 the words themselves, of FP32 numbers from 0 to 1, without
    #: 1: multiples of 2**-23. The words follow from the SEED register, `key`, the element and the
    #: lane (see docs/numerics.md), so an instruction of the same key and counts repeats them
    RANDOM = 0x2E
    #: dst = src0 * imm0 where the random word, that of RANDOM, is at least `threshold`, elsewhere
    #: 0 * imm0
    DROPOUT = 0x2F
    #: dst = function(src0 * imm0 + imm1)
    ACTIVATE = 0x30
    #: dst = function(src0 * imm0 + src1)
    ACTIVATE_TENSOR_BIAS = 0x31
    #: dst = function(src0 * src1 + imm0)
    ACTIVATE_TENSOR_SCALE = 0x32
    #: dst = function(src0 * scale + bias), both of them words of src1 for each partition and row:
    #: src1 walks counts 0 to 2, and for each step of those the scale and, `src1.strides.3` words
    #: on, the bias
    ACTIVATE_ROWS = 0x33
    #: words `first` and following of each partition's table, which CUSTOM is evaluated by, <- src0,
    #: one column after the other; counts 0 to 2 must be 1 and count 3 is their number, and the last
    #: one must be a word of the table (else BAD_COUNT)
    LOAD_TABLE = 0x34
    #: local <- DRAM; with `accumulate` local <- local + DRAM, in FP32, of integers modulo 2**32
    DMA_LOAD = 0x40
    #: DRAM <- local; with `accumulate`, for one i0 after the other, first a DMA_LOAD with
    #: `accumulate` and then a DMA_STORE: the sums are in both
    DMA_STORE = 0x41
    #: local <- rows of a table in DRAM, picked by a vector of indices; counts 1 and 2 must be 1
    #: (else BAD_COUNT). Executes as `counts.0` DMA_LOADs one after the other, that of row i0 from
    #: ``dram_base + index(i0) * row_stride`` to ``local.base + i0 * local.strides.0``
    GATHER = 0x42
    #: rows of a table in DRAM, picked by a vector of indices, <- local: executes as `counts.0`
    #: DMA_STOREs, otherwise as GATHER. Of rows of one index the last one stays; with `accumulate`
    #: each is added
    SCATTER = 0x43
    #: two words of dst for each row of src0 along the innermost dimension, of which dst walks two
    #: elements: the sum of the row and the sum of its squares. Either is acc0 + acc1, where element
    #: i of the row was added to accumulator i mod 2, in order and from 0
    STATISTICS = 0x50


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
    #: what a / b, toward zero, leaves: exact, with the sign of a. Of integers a if b is 0; of FP32
    #: C's fmod: NaN if a is infinite or b is 0, a if b is infinite
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
#: Operations of the divider, which only the second ALU has, if there is one: a column takes as many
#: cycles as bits.
DIVISIONS = frozenset({AluOp.DIVIDE, AluOp.MOD, AluOp.RECIPROCAL, AluOp.SQRT, AluOp.RSQRT})
#: Operations that not all types have (else BAD_TYPE), with the types that src0 may have.
OPERATION_TYPES: dict[AluOp, frozenset[DType]] = {
    op: frozenset({DType.FP32}) for op in (AluOp.RECIPROCAL, AluOp.SQRT, AluOp.RSQRT)
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
    AluOp.MUL: _identities(ONE, 1, 1),
    AluOp.MAX: _identities(0xFF800000, 0x80000000, 0),
    AluOp.MIN: _identities(INFINITY, 0x7FFFFFFF, 0xFFFFFFFF),
    AluOp.ABS_MAX: _identities(0, 0, 0),
    AluOp.BIT_AND: _identities(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    AluOp.BIT_OR: _identities(0, 0, 0),
    AluOp.BIT_XOR: _identities(0, 0, 0),
}
#: REDUCE keeps this many accumulators: element i of the innermost dimension goes to accumulator
#: i mod 4, and the result is (acc0 op acc1) op (acc2 op acc3).
REDUCE_ACCUMULATORS = 4


#: Comparisons with zero that AFFINE_SELECT and SELECT take as op0. A NaN satisfies NE alone, and
#: -0 is zero.
COMPARISONS = frozenset({AluOp.EQ, AluOp.NE, AluOp.LT, AluOp.LE, AluOp.GT, AluOp.GE})


#: Operations SCAN takes.
SCAN_OPERATIONS = frozenset(
    {
        *(AluOp.BYPASS, AluOp.ADD, AluOp.SUB, AluOp.RSUB, AluOp.MUL),
        *(AluOp.MAX, AluOp.MIN, AluOp.ABS_MAX),
    }
)
#: SCAN works on this many rows in turn, at most: in as many cycles as the two operations take.
SCAN_ROWS = 6
#: TOP finds this many words, at most.
MAX_KEPT = 8


#: SHUFFLE moves words within groups of so many lanes.
SHUFFLE_GROUP = 8


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
    #: y / (1 + e to the -y)
    SILU = 16
    #: derivative of SILU
    SILU_DX = 17
    #: y / (1 + e to the -2u), u = sqrt(2 / pi) * (y + 0.044715 * y**3) (the tanh form of GELU)
    GELU_TANH = 18
    #: derivative of GELU_TANH
    GELU_TANH_DX = 19
    #: y * tanh(ln(1 + e to the y))
    MISH = 20
    #: derivative of MISH
    MISH_DX = 21
    #: y * y
    SQUARE = 22
    #: sine, of any finite y; takes 9 cycles for each column
    SIN = 23
    #: cosine, likewise
    COS = 24
    #: what the table of the partition says that LOAD_TABLE last loaded (see docs/numerics.md)
    CUSTOM = 25


#: Each partition's table of CUSTOM: segments of 4 words each, then directory rows of one word each.
TABLE_SEGMENTS = 512
TABLE_ROWS = 128
SEGMENT_WORDS = 4
TABLE_WORDS = SEGMENT_WORDS * TABLE_SEGMENTS + TABLE_ROWS


class RowSums(enum.Enum, shape=6):
    """Sums that the scalar engine delivers: of the function's results along the innermost
    dimension, a *row*, before they are rounded to the type of dst. The order of the additions is
    that of REDUCE."""

    #: none: dst holds the results
    NONE = 0
    #: dst holds the results, and behind each row of them, as an element of the row more, its sum,
    #: in FP32 whatever the type of dst
    BEHIND = 1
    #: dst holds the sums alone, one for each row, rounded to its type; it walks counts 0 to 2
    ONLY = 2


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
    #: ALU operation, reduction, function, kind of sums or wait mode does not exist, or not on this
    #: core
    ILLEGAL_OPERATION = 3
    #: operand type not allowed there
    BAD_TYPE = 4
    #: operand in a memory the instruction cannot reach
    BAD_SPACE = 5
    #: a count of zero, lanes or columns outside 1..N, or a field outside of the opcode's limits
    BAD_COUNT = 6
    #: semaphore number does not exist, or its chip is not this one
    BAD_SEMAPHORE = 7
    #: an access pattern leaves its memory; address = first word outside that the check met. Or an
    #: index names no row of its table; address = the index, unsigned. The rows before it have been
    #: moved then, no others
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
    #: a LOOP inside of 4 others, or a NEXT without a LOOP; found after all the checks of the
    #: instruction itself
    BAD_LOOP = 14


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
    """Local operand: `base` and strides in words of one partition. An `index` of 1 to 3 adds that
    index register to the base, modulo 2**24."""

    base: unsigned(24)
    strides: data.ArrayLayout(signed(16), 4)
    space: Space
    dtype: DType
    index: unsigned(2)


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


class AffineBody(data.Struct):
    """Elementwise body with an integer that depends on the indices and the lane."""

    counts: Counts
    dst: Operand
    src0: Operand
    base: signed(32)
    steps: data.ArrayLayout(signed(16), 4)
    lane_step: signed(16)
    fill: unsigned(16)


class TopBody(data.Struct):
    """Body of TOP."""

    counts: Counts
    dst: Operand
    src0: Operand
    kept: unsigned(4)
    reserved: unsigned(124)


class OneSourceBody(data.Struct):
    """Body with one source and no number."""

    counts: Counts
    dst: Operand
    src0: Operand
    reserved: unsigned(128)


class TableBody(data.Struct):
    """Body of LOAD_TABLE."""

    counts: Counts
    dst: Operand
    src0: Operand
    first: unsigned(12)
    reserved: unsigned(116)


class RandomBody(data.Struct):
    """Body of RANDOM and DROPOUT."""

    counts: Counts
    dst: Operand
    src0: Operand
    key: unsigned(32)
    threshold: unsigned(32)
    reserved: unsigned(32)
    imm0: unsigned(32)


class ShuffleBody(data.Struct):
    """Body of SHUFFLE."""

    counts: Counts
    dst: Operand
    src0: Operand
    select: data.ArrayLayout(unsigned(3), SHUFFLE_GROUP)
    spread: unsigned(1)
    lane: unsigned(8)
    reserved: unsigned(95)


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
    ``dram_base + sum(i[d] * dram_strides[d]) + l * lane_stride``, packed in `dram_dtype`. A
    `dram_index` of 1 to 3 adds that index register, as a signed number, to `dram_base`."""

    counts: Counts
    local: Operand
    dram_base: unsigned(48)
    dram_strides: data.ArrayLayout(signed(32), 4)
    lane_stride: signed(32)
    dram_dtype: DType
    reserved: unsigned(10)
    dram_index: unsigned(2)


class LoopBody(data.Struct):
    """Body of LOOP."""

    count: unsigned(32)
    reserved: unsigned(352)


class NextBody(data.Struct):
    """Body of NEXT: what each iteration adds to the index registers 1 to 3, modulo 2**32."""

    steps: data.ArrayLayout(signed(32), INDEX_REGISTERS)
    conditional: unsigned(1)
    reserved: unsigned(287)


class IndexVector(data.Struct):
    """INT32 words in SBUF, N in a column: index i is in partition ``i % N`` of word
    ``base + i // N``. An index register is added to the base as in `Operand`."""

    base: unsigned(24)
    index: unsigned(2)
    reserved: unsigned(6)


class IndexedBody(data.Struct):
    """DMA body with a vector of indices. Element (i0, 0, 0, i3) of lane l lies in DRAM at byte
    ``dram_base + index(i0) * row_stride + i3 * column_stride + l * lane_stride``. What both have
    is where `DmaBody` has it, the index register of `dram_base` too. An index, taken as unsigned,
    must be less than `rows`."""

    counts: Counts
    local: Operand
    dram_base: unsigned(48)
    row_stride: signed(32)
    rows: unsigned(32)
    index: IndexVector
    column_stride: signed(32)
    lane_stride: signed(32)
    dram_dtype: DType
    reserved: unsigned(10)
    dram_index: unsigned(2)


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
    inner : operand -> what it walks in the innermost dimension instead of count 3, from a function
        that gives the instruction's fields
    lanes : operand -> the field that holds the number of partitions it takes, if not `lanes`
    limits : field -> its least and its largest value, from a function that gives the instruction's
        fields, and the core's configuration
    alike : operands that must have the type of src0
    pairs : works on pairs of FP8 numbers, which only some cores have
    needs : field of `CoreConfig` that says whether a core has the instruction; empty: all have it
    """

    kind: EngineKind | None
    body: type[data.Struct]
    header: frozenset[str] = frozenset()
    operands: dict[str, tuple[frozenset[Space], frozenset[DType]]] = dataclasses.field(
        default_factory=dict
    )
    unused: frozenset[str] = frozenset()
    inner: dict[str, Callable[[Callable[[str], Any]], Any]] = dataclasses.field(
        default_factory=dict
    )
    lanes: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: dict[str, Callable[[Callable[[str], Any], CoreConfig], tuple[Any, Any]]] = (
        dataclasses.field(default_factory=dict)
    )
    alike: frozenset[str] = frozenset()
    pairs: bool = False
    needs: str = ""

    @property
    def indexed(self) -> bool:
        """Whether it reads an `IndexVector` of `counts.0` indices."""
        return self.body is IndexedBody

    def exists(self, config: CoreConfig) -> bool:
        """Whether cores of that configuration have the instruction."""
        if self.pairs and config.fp8_rate != 2:
            return False
        return not self.needs or getattr(config, self.needs)

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
_INTEGER = frozenset({DType.INT32})
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


def _choose(condition: Any, then: Any, otherwise: Any) -> Any:
    """One of two numbers, in hardware or not."""
    if isinstance(condition, Value):
        return Mux(condition, then, otherwise)
    return then if condition else otherwise


def _with_sums(field: Callable[[str], Any]) -> Any:
    """Words that dst of the scalar engine's instructions has in a row."""
    results, sums = field("counts.3"), field("op1")
    behind = results + _choose(sums == RowSums.BEHIND.value, 1, 0)
    return _choose(sums == RowSums.ONLY.value, 1, behind)


def _activation(
    body: type[data.Struct],
    src1: dict[str, Any],
    *,
    inner: dict[str, Any] | None = None,
    unused: frozenset[str] = frozenset(),
) -> Spec:
    """An instruction of the scalar engine."""
    return Spec(
        kind=EngineKind.SCALAR,
        body=body,
        header=frozenset({"op0", "op1", "lanes", "rounding"}),
        operands={**_DST, **_SRC0, **src1},
        unused=unused,
        inner={"dst": _with_sums, **(inner or {})},
        # A row has place for the sum behind it.
        limits={
            "counts.3": lambda field, config: (
                1,
                (1 << 16) - 1 - _choose(field("op1") == RowSums.BEHIND.value, 1, 0),
            )
        },
    )


#: One column after the other, at most as many as the array has.
_STATIONARY: dict[str, Any] = {
    **{f"counts.{d}": lambda field, config: (1, 1) for d in range(3)},
    "counts.3": lambda field, config: (1, config.lanes),
}

_ROWS: dict[str, Any] = {f"counts.{d}": lambda field, config: (1, 1) for d in (1, 2)}

_TABLE: dict[str, Any] = {
    **{f"counts.{d}": lambda field, config: (1, 1) for d in range(3)},
    "counts.3": lambda field, config: (1, TABLE_WORDS),
    "first": lambda field, config: (0, TABLE_WORDS - field("counts.3")),
}

SPECS: dict[Opcode, Spec] = {
    Opcode.NOP: Spec(kind=None, body=EmptyBody),
    Opcode.END: Spec(kind=None, body=EmptyBody),
    Opcode.LOOP: Spec(
        kind=None,
        body=LoopBody,
        limits={"count": lambda field, config: (1, (1 << 32) - 1)},
        needs="loops",
    ),
    Opcode.NEXT: Spec(kind=None, body=NextBody, needs="loops"),
    Opcode.TEST: Spec(
        kind=None,
        body=DmaBody,
        unused=frozenset({"counts", "local", "dram_strides", "lane_stride", "dram_dtype"}),
        needs="loops",
    ),
    Opcode.LOAD_STATIONARY: Spec(
        kind=EngineKind.TENSOR,
        body=TensorBody,
        header=frozenset({"lanes"}),
        operands={"src0": (_SBUF, _MATMUL)},
        unused=frozenset({"dst", "columns"}),
        limits=_STATIONARY,
    ),
    Opcode.MATMUL: Spec(
        kind=EngineKind.TENSOR,
        body=TensorBody,
        header=frozenset({"lanes", "accumulate"}),
        operands={"dst": (_PSUM, _SUMS), "src0": (_SBUF, _MATMUL)},
        lanes={"dst": "columns"},
    ),
    Opcode.LOAD_STATIONARY_PAIR: Spec(
        kind=EngineKind.TENSOR,
        body=TensorPairBody,
        header=frozenset({"lanes"}),
        operands={"src0": (_SBUF, _FP8), "src1": (_SBUF, _FP8)},
        unused=frozenset({"dst", "columns"}),
        limits=_STATIONARY,
        pairs=True,
    ),
    Opcode.MATMUL_PAIR: Spec(
        kind=EngineKind.TENSOR,
        body=TensorPairBody,
        header=frozenset({"lanes", "accumulate"}),
        operands={"dst": (_PSUM, _READ), "src0": (_SBUF, _FP8), "src1": (_SBUF, _FP8)},
        lanes={"dst": "columns"},
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
    Opcode.STATISTICS: Spec(
        kind=EngineKind.VECTOR,
        body=OneSourceBody,
        header=frozenset({"lanes", "rounding"}),
        operands={**_RESULT, **_X},
        inner={"dst": lambda field: 2},
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
    Opcode.IOTA: Spec(
        kind=EngineKind.VECTOR,
        body=AffineBody,
        header=frozenset({"lanes"}),
        operands={"dst": (_BOTH, _SUMS)},
        unused=frozenset({"src0", "fill"}),
    ),
    Opcode.AFFINE_SELECT: Spec(
        kind=EngineKind.VECTOR,
        body=AffineBody,
        header=frozenset({"op0", "lanes", "rounding"}),
        operands={**_DST, **_SRC0},
    ),
    Opcode.SELECT: Spec(
        kind=EngineKind.VECTOR,
        body=TensorTensorBody,
        header=frozenset({"op0", "lanes", "rounding"}),
        operands={**_DST, **_SRC0, **_SRC1},
    ),
    Opcode.RANGE_SELECT: Spec(
        kind=EngineKind.VECTOR,
        body=TensorTensorBody,
        header=frozenset({"lanes", "rounding"}),
        operands={**_DST, **_SRC0, "src1": (_BOTH, _INTEGER)},
        unused=frozenset({"src1.strides.0", "src1.strides.1", "src1.strides.2"}),
        inner={"src1": lambda field: 2},
    ),
    Opcode.SCAN: Spec(
        kind=EngineKind.VECTOR,
        body=TensorTensorBody,
        header=frozenset({"op0", "op1", "lanes", "accumulate", "rounding"}),
        operands={**_DST, **_SRC0, **_SRC1},
        limits={"counts.3": lambda field, config: (1, SCAN_ROWS)},
    ),
    Opcode.TOP: Spec(
        kind=EngineKind.VECTOR,
        body=TopBody,
        header=frozenset({"op0", "lanes"}),
        operands={"dst": (_BOTH, _READ), **_SRC0},
        inner={"dst": lambda field: 2 * field("kept")},
        limits={
            "kept": lambda field, config: (1, MAX_KEPT),
            "counts.3": lambda field, config: (field("kept"), (1 << 16) - 1),
        },
        needs="top",
    ),
    Opcode.TRANSPOSE: Spec(
        kind=EngineKind.VECTOR,
        body=OneSourceBody,
        header=frozenset({"lanes", "rounding"}),
        operands={**_DST, **_SRC0},
        inner={"dst": lambda field: field("lanes")},
        lanes={"dst": "counts.3"},
        limits={"counts.3": lambda field, config: (1, config.lanes)},
    ),
    Opcode.SHUFFLE: Spec(
        kind=EngineKind.VECTOR,
        body=ShuffleBody,
        header=frozenset({"lanes", "rounding"}),
        operands={**_DST, **_SRC0},
        limits={
            **{
                f"select.{place}": lambda field, config: (0, min(SHUFFLE_GROUP, config.lanes) - 1)
                for place in range(SHUFFLE_GROUP)
            },
            "lane": lambda field, config: (0, config.lanes - 1),
        },
    ),
    Opcode.RANDOM: Spec(
        kind=EngineKind.VECTOR,
        body=RandomBody,
        header=frozenset({"lanes"}),
        operands={"dst": (_BOTH, _SUMS)},
        unused=frozenset({"src0", "threshold", "imm0"}),
        needs="random",
    ),
    Opcode.DROPOUT: Spec(
        kind=EngineKind.VECTOR,
        body=RandomBody,
        header=frozenset({"lanes"}),
        operands={**_DST, **_SRC0},
        needs="random",
    ),
    Opcode.ACTIVATE: _activation(TensorScalarBody, {}),
    Opcode.ACTIVATE_TENSOR_BIAS: _activation(TensorTensorBody, _SRC1),
    Opcode.ACTIVATE_TENSOR_SCALE: _activation(TensorTensorBody, _SRC1),
    Opcode.ACTIVATE_ROWS: _activation(
        TensorTensorBody, _SRC1, unused=frozenset({"imm0"}), inner={"src1": lambda field: 2}
    ),
    Opcode.LOAD_TABLE: Spec(
        kind=EngineKind.SCALAR,
        body=TableBody,
        header=frozenset({"lanes"}),
        operands={"src0": (_BOTH, _INTEGER)},
        unused=frozenset({"dst"}),
        limits=_TABLE,
    ),
    Opcode.DMA_LOAD: Spec(
        kind=EngineKind.DMA,
        body=DmaBody,
        header=frozenset({"lanes", "accumulate"}),
        operands={"local": (_SBUF, _READ)},
    ),
    Opcode.DMA_STORE: Spec(
        kind=EngineKind.DMA,
        body=DmaBody,
        header=frozenset({"lanes", "accumulate", "rounding"}),
        operands={"local": (_SBUF, _READ)},
    ),
    Opcode.GATHER: Spec(
        kind=EngineKind.DMA,
        body=IndexedBody,
        header=frozenset({"lanes", "accumulate"}),
        operands={"local": (_SBUF, _READ)},
        unused=frozenset({"local.strides.1", "local.strides.2"}),
        limits=_ROWS,
    ),
    Opcode.SCATTER: Spec(
        kind=EngineKind.DMA,
        body=IndexedBody,
        header=frozenset({"lanes", "accumulate", "rounding"}),
        operands={"local": (_SBUF, _READ)},
        unused=frozenset({"local.strides.1", "local.strides.2"}),
        limits=_ROWS,
    ),
}


#: Instructions that load the stationary operand. They complete in order among themselves, but out
#: of order with the tensor engine's others.
LOADS = frozenset({Opcode.LOAD_STATIONARY, Opcode.LOAD_STATIONARY_PAIR})
#: Instructions that the sequencer executes itself.
CONTROL = frozenset({Opcode.NOP, Opcode.END, Opcode.LOOP, Opcode.NEXT, Opcode.TEST})
#: DMA instructions that read DRAM into SBUF, and those that write it from there.
DRAM_READERS = frozenset({Opcode.DMA_LOAD, Opcode.GATHER})
DRAM_WRITERS = frozenset({Opcode.DMA_STORE, Opcode.SCATTER})
#: Instructions on pairs of FP8 numbers.
PAIRS = frozenset(opcode for opcode, spec in SPECS.items() if spec.pairs)


def is_opcode(opcode: Any, wanted: frozenset[Opcode], config: CoreConfig) -> Any:
    """1 if the opcode (a value in hardware) is one of those wanted that the core has, else 0."""
    codes = [code for code in Opcode if code in wanted and SPECS[code].exists(config)]
    return functools.reduce(operator.or_, (opcode == code for code in codes), 0)


def operation_enums(opcode: Opcode) -> dict[str, type[enum.Enum]]:
    """Returns the enumeration that each of op0 and op1 holds, of those `opcode` uses."""
    spec = SPECS[opcode]
    kinds: dict[str, type[enum.Enum]] = {"op0": AluOp, "op1": AluOp}
    if spec.kind is EngineKind.SCALAR:
        kinds = {"op0": Function, "op1": RowSums}
    return {field: kind for field, kind in kinds.items() if field in spec.header}


#: What op0 or op1 may be where it is not any operation of the engine.
_OPERATIONS: dict[tuple[Opcode, str], frozenset[AluOp]] = {
    (Opcode.REDUCE, "op1"): frozenset(REDUCTIONS),
    (Opcode.AFFINE_SELECT, "op0"): COMPARISONS,
    (Opcode.SELECT, "op0"): COMPARISONS,
    (Opcode.SCAN, "op0"): SCAN_OPERATIONS,
    (Opcode.SCAN, "op1"): SCAN_OPERATIONS,
    (Opcode.TOP, "op0"): frozenset({AluOp.MAX, AluOp.MIN}),
}


def legal_operations(opcode: Opcode, field: str, config: CoreConfig) -> frozenset[int]:
    """Returns the codes `opcode` accepts in op0 or op1 on cores of that configuration."""
    allowed = _OPERATIONS.get((opcode, field), operation_enums(opcode)[field])
    codes = {op.value for op in allowed}
    if SPECS[opcode].kind is EngineKind.VECTOR and (field == "op0" or not config.divider):
        codes -= {op.value for op in DIVISIONS}
    return frozenset(codes)


def operation_types(opcode: Opcode, config: CoreConfig) -> dict[AluOp, frozenset[DType]]:
    """Returns the operations of op1 that `opcode` has for some types of src0 only, and those."""
    if SPECS[opcode].kind is not EngineKind.VECTOR or "op1" not in SPECS[opcode].header:
        return {}
    legal = legal_operations(opcode, "op1", config)
    return {op: types for op, types in OPERATION_TYPES.items() if op.value in legal}


def operand_counts(
    opcode: Opcode, operand: str, counts: Sequence[Any], field: Callable[[str], Any]
) -> list[Any]:
    """The four counts an operand walks, of the instruction's `counts`; numbers or, with `field`
    giving values in hardware, such values. It does not walk a dimension whose stride it lacks."""
    spec = SPECS[opcode]
    walked = [
        count if f"{operand}.strides.{d}" in FIELDS[opcode] else 1 for d, count in enumerate(counts)
    ]
    if operand in spec.inner:
        walked[3] = spec.inner[operand](field)
    return walked


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


@dataclasses.dataclass(frozen=True)
class IndexedField:
    """An address field that an index register may be added to: bit offsets and its width."""

    index: int
    base: int
    width: int


def indexed_fields(opcode: Opcode) -> list[IndexedField]:
    """The address fields of an opcode that have an index register."""
    found = []
    for name, (offset, _) in FIELDS[opcode].items():
        if name.endswith((".index", "dram_index")):
            base, shape = FIELDS[opcode][name.removesuffix("index") + "base"]
            found.append(IndexedField(offset, base, shape.width))
    return found


#: code of an opcode -> mask of the bits that select index registers
INDEX_BITS: dict[int, int] = {
    opcode.value: sum(3 << field.index for field in indexed_fields(opcode)) for opcode in SPECS
}


def add_indices(raw: bytes, registers: Sequence[int]) -> bytes:
    """The instruction with index registers 1 to 3 (modulo 2**32) added to its addresses."""
    word = int.from_bytes(raw, "little")
    for field in indexed_fields(Opcode(raw[0])):
        number = word >> field.index & 3
        if number:
            value = registers[number - 1] & 0xFFFFFFFF
            value -= value >> 31 << 32
            mask = (1 << field.width) - 1
            base = (word >> field.base) + value & mask
            word = word & ~(mask << field.base) | base << field.base
    return word.to_bytes(INSTRUCTION_BYTES, "little")


def field_of(word: Value, opcode: Opcode, name: str) -> Value:
    """A field of an instruction of that opcode, in hardware."""
    offset, shape = FIELDS[opcode][name]
    width, is_signed = _width(shape)
    bits = word[offset : offset + width]
    return bits.as_signed() if is_signed else bits


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
