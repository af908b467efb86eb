"""Legality of an instruction: the definition that the sequencers equal."""

from __future__ import annotations

import dataclasses
import functools
from enum import Enum
from typing import Any

from systolith_hdl import isa
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import DType
from systolith_hdl.isa import (
    DMA_TYPES,
    MAX_WAITS,
    SPECS,
    USED_BITS,
    EngineKind,
    FaultCause,
    Opcode,
    Rounding,
    RowSums,
    Space,
    WaitMode,
    decode,
    legal_operations,
    operation_types,
)

from . import exchange


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why an instruction is illegal.

    Parameters
    ----------
    cause : the first check that failed
    address : of OUT_OF_BOUNDS: word address (signed); 0 for every other cause found here
    """

    cause: FaultCause
    address: int = 0


@functools.cache
def _codes(kind: type[Enum]) -> frozenset[int]:
    return frozenset(member.value for member in kind)


_legal = functools.cache(legal_operations)
_types = functools.cache(operation_types)


def _allowed(codes: frozenset[Any]) -> frozenset[int]:
    return frozenset(code.value for code in codes)


#: opcode -> operand -> (codes of the spaces allowed, codes of the types allowed)
_OPERANDS = {
    opcode: {
        name: (_allowed(spaces), _allowed(dtypes))
        for name, (spaces, dtypes) in spec.operands.items()
    }
    for opcode, spec in SPECS.items()
}
_DMA_TYPE_CODES = _allowed(DMA_TYPES)
#: largest count
MAX_COUNT = (1 << 16) - 1
_OPCODES = frozenset(opcode.value for opcode in Opcode)


def operand_counts(opcode: Opcode, operand: str, fields: dict[str, int]) -> list[int]:
    """The four counts an operand walks."""
    counts = [fields[f"counts.{i}"] for i in range(4)]
    return isa.operand_counts(opcode, operand, counts, fields.__getitem__)


def row_sums(opcode: Opcode, fields: dict[str, int]) -> RowSums:
    """The sums that an instruction delivers; NONE of one that has none."""
    sums = SPECS[opcode].kind is EngineKind.SCALAR and "op1" in fields
    return RowSums(fields["op1"] if sums else 0)


def operand_strides(operand: str, fields: dict[str, int]) -> list[int]:
    """The four strides of an operand, in words; one the format leaves out is 0."""
    return [fields.get(f"{operand}.strides.{i}", 0) for i in range(4)]


def operand_lanes(opcode: Opcode, operand: str, fields: dict[str, int], lanes: int) -> int:
    """How many partitions an operand takes, from partition 0 on, in a core of so many lanes. That
    of SHUFFLE is the highest it needs."""
    if opcode is Opcode.SHUFFLE and operand == "src0":
        return int(exchange.shuffle_sources(fields, lanes).max()) + 1
    return fields[SPECS[opcode].lanes.get(operand, "lanes")]


def check(raw: bytes, kind: EngineKind, config: CoreConfig) -> Fault | None:
    """Returns the fault that an instruction causes on an engine of that kind, None if it is legal.

    The checks are made in the order of `FaultCause`, each on the whole instruction:

    1. ILLEGAL_OPCODE: the opcode does not exist, is another engine's, or one that cores of this
       configuration do not have: those of pairs if ``fp8_rate`` is 1, TOP without ``top``,
       RANDOM and DROPOUT without ``random``, LOOP, NEXT and TEST without ``loops``
    2. RESERVED_BITS: a bit that no field of the opcode's format holds is set
    3. ILLEGAL_OPERATION: op0, op1 or a wait mode has a code the opcode does not accept, or one of
       `isa.DIVISIONS` without ``divider``, or it rounds stochastically without ``random``
    4. BAD_TYPE: an operand type (or ``dram_dtype``) is not one it may have, or no type at all, or
       that of an operand that must have the type of src0 is another, or op1 is an operation that
       this type does not have, or a MATMUL's dst is INT32 and its src0 is not INT8
    5. BAD_SPACE: the same for the operand's memory
    6. BAD_COUNT: a count is 0, ``lanes`` or ``columns`` is not 1..N, or a field is outside of the
       limits of the opcode
    7. BAD_SEMAPHORE: a wait (mode not NONE) or a signal (amount not 0) names a semaphore that
       does not exist, or the signal's chip is not 0
    8. OUT_OF_BOUNDS: operands in the order dst, src0, src1, scalar, local, index; of each the
       lowest address is below 0 (address = that), or the highest is past the memory (address =
       that)

    DRAM addresses are not checked here: the bus answers those with an error. Neither are the values
    of indices, which are read only when the instruction executes.
    """
    if raw[0] not in _OPCODES:
        return Fault(FaultCause.ILLEGAL_OPCODE)
    opcode, fields = decode(raw)
    spec = SPECS[opcode]
    if (spec.kind is not None and spec.kind is not kind) or not spec.exists(config):
        return Fault(FaultCause.ILLEGAL_OPCODE)

    if int.from_bytes(raw, "little") & ~USED_BITS[opcode]:
        return Fault(FaultCause.RESERVED_BITS)

    for name in ("op0", "op1"):
        if name in fields and fields[name] not in _legal(opcode, name, config):
            return Fault(FaultCause.ILLEGAL_OPERATION)
    if fields.get("rounding") == Rounding.STOCHASTIC.value and not config.random:
        return Fault(FaultCause.ILLEGAL_OPERATION)
    for i in range(MAX_WAITS):
        if fields[f"wait.{i}.mode"] not in _codes(WaitMode):
            return Fault(FaultCause.ILLEGAL_OPERATION)

    operands = _OPERANDS[opcode]
    for name, (_, dtypes) in operands.items():
        if fields[f"{name}.dtype"] not in dtypes:
            return Fault(FaultCause.BAD_TYPE)
    if any(fields[f"{name}.dtype"] != fields["src0.dtype"] for name in spec.alike):
        return Fault(FaultCause.BAD_TYPE)
    for operation, legal in _types(opcode, config).items():
        if fields["op1"] == operation.value and DType(fields["src0.dtype"]) not in legal:
            return Fault(FaultCause.BAD_TYPE)
    if (
        opcode is Opcode.MATMUL
        and fields["dst.dtype"] == DType.INT32.value
        and fields["src0.dtype"] != DType.INT8.value
    ):
        return Fault(FaultCause.BAD_TYPE)
    if "dram_dtype" in fields and fields["dram_dtype"] not in _DMA_TYPE_CODES:
        return Fault(FaultCause.BAD_TYPE)

    for name, (spaces, _) in operands.items():
        if fields[f"{name}.space"] not in spaces:
            return Fault(FaultCause.BAD_SPACE)

    if "counts.0" in fields:
        counts = [fields[f"counts.{i}"] for i in range(4)]
        if 0 in counts:
            return Fault(FaultCause.BAD_COUNT)
    for name in ("lanes", "columns"):
        if name in fields and not 1 <= fields[name] <= config.lanes:
            return Fault(FaultCause.BAD_COUNT)
    for name, limit in spec.limits.items():
        least, most = limit(fields.__getitem__, config)
        if not least <= fields[name] <= most:
            return Fault(FaultCause.BAD_COUNT)

    for i in range(MAX_WAITS):
        if (
            fields[f"wait.{i}.mode"] != WaitMode.NONE.value
            and fields[f"wait.{i}.sem"] >= config.semaphores
        ):
            return Fault(FaultCause.BAD_SEMAPHORE)
    if fields["signal.amount"] and (
        fields["signal.sem"] >= config.semaphores or fields["signal.chip"] != 0
    ):
        return Fault(FaultCause.BAD_SEMAPHORE)

    for name in operands:
        depth = (
            config.psum_depth if fields[f"{name}.space"] == Space.PSUM.value else config.sbuf_depth
        )
        low = high = fields[f"{name}.base"]
        for count, stride in zip(
            operand_counts(opcode, name, fields), operand_strides(name, fields), strict=True
        ):
            reach = (count - 1) * stride
            if reach < 0:
                low += reach
            else:
                high += reach
        if low < 0:
            return Fault(FaultCause.OUT_OF_BOUNDS, low)
        if high >= depth:
            return Fault(FaultCause.OUT_OF_BOUNDS, high)
    if spec.indexed:
        high = fields["index.base"] + (fields["counts.0"] - 1) // config.lanes
        if high >= config.sbuf_depth:
            return Fault(FaultCause.OUT_OF_BOUNDS, high)
    return None


__all__ = ["Fault", "check", "operand_counts", "operand_lanes", "operand_strides", "row_sums"]
