"""Instructions as text, and back. Both directions derive from `systolith_hdl.isa`.

One line is one instruction::

    vector[7] wait(s4>=2) TENSOR_TENSOR op1=ADD lanes=4 counts=[1,1,1,8] dst=sbuf.fp32@0[0,0,0,1]
        src0=sbuf.fp32@0[0,0,0,1] src1=psum.fp32@16[0,0,0,1] signal(s2+1) ; train.py:31

(on one line). Fields that are zero are left out, but for operands and counts; what follows a
semicolon is a comment. An instruction that has no such form, because its opcode does not exist
or reserved bits are set, is shown as ``.raw`` and its 64 bytes in hexadecimal, so every
instruction survives the round trip.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator

import numpy as np
from systolith_hdl.config import INSTRUCTION_BYTES
from systolith_hdl.formats import INTEGERS, DType
from systolith_hdl.isa import (
    BIT_OPERANDS,
    FIELDS,
    MAX_WAITS,
    SPECS,
    USED_BITS,
    AluOp,
    EncodeError,
    Opcode,
    Rounding,
    Space,
    WaitMode,
    decode,
    encode,
    operation_enums,
)

from .errors import ProgramError

#: operations whose immediate is a word of bits rather than a number
_BITS = {op.value for op in BIT_OPERANDS}
#: types whose immediates are integers, shown as bits too
_INTEGERS = {dtype.value for dtype in INTEGERS}

#: strides of a transfer -> those that one with indices has, which is shown with the others as 0
_TABLE_STRIDES = {"dram_strides.0": "row_stride", "dram_strides.3": "column_stride"}


def _index(register: int) -> str:
    """An index register behind the address that it is added to."""
    return f"+r{register}" if register else ""


#: fields that have a form of their own
_SPECIAL = (
    *("opcode", "signal", "wait", "op0", "op1", "lanes", "columns", "accumulate", "rounding"),
    *("counts", "dram_base", "dram_index", "dram_strides", "dram_dtype", "lane_stride"),
    *("index", "rows", "row_stride", "column_stride", "imm0", "imm1"),
)


@functools.cache
def _codes(kind: type) -> dict[int, str]:
    return {member.value: member.name for member in kind}  # type: ignore[attr-defined]


def _name(kind: type, code: int) -> str:
    """The name of an enumeration code, ``#code`` if it has none."""
    return _codes(kind).get(code, f"#{code}")


def _code(kind: type, text: str) -> int:
    if text.startswith("#"):
        return int(text[1:])
    for code, name in _codes(kind).items():
        if name.lower() == text.lower():
            return code
    raise ProgramError(f"unknown {kind.__name__} {text!r}")


def float_to_bits(value: float) -> int:
    """The FP32 word of a number, rounded to nearest even."""
    with np.errstate(over="ignore"):
        return int(np.float32(value).view(np.uint32))


def bits_to_float(word: int) -> float:
    """The number that an FP32 word holds."""
    return struct.unpack("<f", struct.pack("<I", word))[0]


def _immediate(word: int) -> str:
    value = np.uint32(word).view(np.float32)
    if np.isfinite(value) and float_to_bits(float(str(value))) == word:
        return str(value)
    return f"{word:#010x}"


def _parse_immediate(text: str) -> int:
    return int(text, 16) if text.startswith("0x") else float_to_bits(float(text))


def _bracket(fields: dict[str, int], prefix: str, count: int = 4) -> str:
    return "[" + ",".join(str(fields.get(f"{prefix}.{i}", 0)) for i in range(count)) + "]"


def disassemble_instruction(raw: bytes) -> str:
    """Returns the text of one instruction, without its index or comment."""
    word = int.from_bytes(raw, "little")
    try:
        opcode, fields = decode(raw)
    except ValueError:
        return f".raw {raw.hex()}"
    if word & ~USED_BITS[opcode]:
        return f".raw {raw.hex()}"

    parts: list[str] = []
    waits = []
    for i in range(MAX_WAITS):
        sem, mode, value = (fields.pop(f"wait.{i}.{part}") for part in ("sem", "mode", "value"))
        if mode == WaitMode.AT_LEAST.value:
            waits.append(f"s{sem}>={value}")
        elif mode == WaitMode.ACQUIRE.value:
            waits.append(f"s{sem}-={value}")
        else:
            waits.append(f"s{sem}#{mode}:{value}" if sem or mode or value else "-")
    while waits and waits[-1] == "-":
        waits.pop()
    if waits:
        parts.append(f"wait({','.join(waits)})")
    parts.append(opcode.name)
    sem, amount, chip = (fields.pop(f"signal.{part}") for part in ("sem", "amount", "chip"))

    operations = operation_enums(opcode)
    for name in ("op0", "op1"):
        if fields.get(name):
            parts.append(f"{name}={_name(operations[name], fields[name])}")
    for name in ("lanes", "columns", "accumulate"):
        if fields.get(name):
            parts.append(f"{name}={fields[name]}")
    if fields.get("rounding"):
        parts.append(f"rounding={_name(Rounding, fields['rounding'])}")
    if "counts.0" in fields:
        parts.append(f"counts={_bracket(fields, 'counts')}")
    for name in SPECS[opcode].operands:
        space = _name(Space, fields[f"{name}.space"]).lower()
        dtype = _name(DType, fields[f"{name}.dtype"]).lower()
        strides = _bracket(fields, f"{name}.strides")
        index = _index(fields.get(f"{name}.index", 0))
        parts.append(f"{name}={space}.{dtype}@{fields[f'{name}.base']}{index}{strides}")
    if "dram_dtype" in fields:
        dtype = _name(DType, fields["dram_dtype"]).lower()
        strides = _bracket(fields, "dram_strides")
        if SPECS[opcode].indexed:
            strides = f"[{fields['row_stride']},0,0,{fields['column_stride']}]"
        index = _index(fields["dram_index"])
        parts.append(f"dram={dtype}@{fields['dram_base']:#x}{index}{strides}")
        parts.append(f"lane_stride={fields['lane_stride']}")
        if SPECS[opcode].indexed:
            index = _index(fields["index.index"])
            parts.append(f"index={fields['index.base']}{index} rows={fields['rows']}")
    elif "dram_base" in fields:
        parts.append(f"word={fields['dram_base']:#x}{_index(fields['dram_index'])}")
    computes = fields.get("src0.dtype", fields.get("dst.dtype"))  # MEMSET has no source
    for name, operation in (("imm0", "op0"), ("imm1", "op1")):
        if fields.get(name):
            bits = computes in _INTEGERS or (
                operations.get(operation) is AluOp and fields[operation] in _BITS
            )
            parts.append(
                f"{name}={fields[name]:#010x}" if bits else f"{name}={_immediate(fields[name])}"
            )
    for name in _others(opcode):
        if f"{name}.0" in FIELDS[opcode]:
            members = [member for member in FIELDS[opcode] if member.startswith(f"{name}.")]
            if any(fields[member] for member in members):
                parts.append(f"{name}={_bracket(fields, name, len(members))}")
        elif fields[name]:
            parts.append(f"{name}={fields[name]}")
    if sem or amount or chip:
        parts.append(f"signal(s{sem}+{amount}" + (f"@{chip})" if chip else ")"))
    return " ".join(parts)


@functools.cache
def _others(opcode: Opcode) -> tuple[str, ...]:
    """Fields, and arrays, that are written as plain numbers."""
    special = {*_SPECIAL, *SPECS[opcode].operands}
    names = (name.split(".")[0] for name in FIELDS[opcode])
    return tuple(dict.fromkeys(name for name in names if name not in special))


_WAIT = re.compile(r"s(\d+)(?:(>=|-=)|#(\d+):)(\d+)")
_SIGNAL = re.compile(r"signal\(s(\d+)\+(\d+)(?:@(\d+))?\)")
_OPERAND = re.compile(r"([\w#]+)\.([\w#]+)@(\d+)(?:\+r([1-3]))?\[([-\d,]+)\]")
_DRAM = re.compile(r"([\w#]+)@(0x[0-9a-f]+)(?:\+r([1-3]))?\[([-\d,]+)\]")
_VECTOR = re.compile(r"(\d+)(?:\+r([1-3]))?")
_WORD = re.compile(r"(0x[0-9a-f]+)(?:\+r([1-3]))?")


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ProgramError(f"cannot read {text!r}")
    return found


def _numbers(text: str, prefix: str, known: dict, count: int = 4) -> Iterator[tuple[str, int]]:
    values = [int(item) for item in text.split(",")]
    if len(values) != count:
        raise ProgramError(f"{prefix} needs {count} numbers, not {len(values)}")
    for i, value in enumerate(values):
        # A stride that the format lacks (that of REDUCE's innermost dimension) is written as 0.
        if value or f"{prefix}.{i}" in known:
            yield f"{prefix}.{i}", value


def assemble_instruction(text: str) -> bytes:
    """Returns the 64 bytes of one instruction; raises ProgramError naming what it cannot read."""
    words = text.partition(";")[0].split()
    try:
        if len(words) == 2 and words[0] == ".raw":
            raw = bytes.fromhex(words[1])
            if len(raw) != INSTRUCTION_BYTES:
                raise ProgramError(f".raw needs {INSTRUCTION_BYTES} bytes, not {len(raw)}")
            return raw
        return _assemble_words(words)
    except (EncodeError, ValueError, KeyError) as error:
        raise ProgramError(f"cannot assemble {text.strip()!r}: {error}") from error


def _assemble_words(words: list[str]) -> bytes:
    fields: dict[str, int] = {}
    opcode: Opcode | None = None
    for word in words:
        if word.startswith("wait("):
            slots = word[len("wait(") : -1].split(",")
            if len(slots) > MAX_WAITS or not word.endswith(")"):
                raise ProgramError(f"cannot read {word!r}")
            for i, slot in enumerate(slots):
                if slot == "-":
                    continue
                sem, relation, mode, value = _match(_WAIT, slot).groups()
                fields[f"wait.{i}.sem"] = int(sem)
                fields[f"wait.{i}.value"] = int(value)
                fields[f"wait.{i}.mode"] = (
                    int(mode)
                    if mode is not None
                    else (WaitMode.AT_LEAST if relation == ">=" else WaitMode.ACQUIRE).value
                )
        elif word.startswith("signal("):
            sem, amount, chip = _match(_SIGNAL, word).groups()
            fields["signal.sem"] = int(sem)
            fields["signal.amount"] = int(amount)
            fields["signal.chip"] = int(chip or 0)
        elif opcode is None:
            if word not in Opcode.__members__:
                raise ProgramError(f"unknown opcode {word!r}")
            opcode = Opcode[word]
        else:
            name, equals, value = word.partition("=")
            if not equals:
                raise ProgramError(f"cannot read {word!r}")
            known = FIELDS[opcode]
            if name in ("op0", "op1"):
                fields[name] = _code(operation_enums(opcode)[name], value)
            elif name in ("lanes", "columns", "accumulate", "lane_stride", "rows"):
                fields[name] = int(value)
            elif name == "index":
                base, index = _match(_VECTOR, value).groups()
                fields |= {"index.base": int(base), "index.index": int(index or 0)}
            elif name == "rounding":
                fields[name] = _code(Rounding, value)
            elif name in ("imm0", "imm1"):
                fields[name] = _parse_immediate(value)
            elif name == "counts":
                fields.update(_numbers(value.strip("[]"), "counts", known))
            elif name in _others(opcode):
                if f"{name}.0" in known:
                    count = sum(member.startswith(f"{name}.") for member in known)
                    fields.update(_numbers(value.strip("[]"), name, known, count))
                else:
                    fields[name] = int(value)
            elif name == "dram":
                dtype, base, index, strides = _match(_DRAM, value).groups()
                fields["dram_dtype"] = _code(DType, dtype)
                fields["dram_base"] = int(base, 16)
                fields["dram_index"] = int(index or 0)
                names = _TABLE_STRIDES if SPECS[opcode].indexed else {}
                for field, stride in _numbers(strides, "dram_strides", known):
                    fields[names.get(field, field)] = stride
            elif name == "word":
                base, index = _match(_WORD, value).groups()
                fields |= {"dram_base": int(base, 16), "dram_index": int(index or 0)}
            else:
                space, dtype, base, index, strides = _match(_OPERAND, value).groups()
                if index:
                    fields[f"{name}.index"] = int(index)
                fields[f"{name}.space"] = _code(Space, space)
                fields[f"{name}.dtype"] = _code(DType, dtype)
                fields[f"{name}.base"] = int(base)
                fields.update(_numbers(strides, f"{name}.strides", known))
    if opcode is None:
        raise ProgramError("no opcode")
    return encode(opcode, fields)


_LINE = re.compile(r"(\w+)\[(\d+)\]\s+(.*)")


def assemble(text: str) -> dict[str, bytes]:
    """Assembles lines ``engine[index] instruction``; returns engine -> stream.

    Empty lines and lines that start with a semicolon are skipped. Raises ProgramError, naming
    the line.
    """
    streams: dict[str, bytearray] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(";"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ProgramError(f"line {number}: cannot read {line!r}")
        engine, index, instruction = found.groups()
        stream = streams.setdefault(engine, bytearray())
        if int(index) * INSTRUCTION_BYTES != len(stream):
            raise ProgramError(
                f"line {number}: index {index} of {engine} out of sequence, expected "
                f"{len(stream) // INSTRUCTION_BYTES}"
            )
        try:
            stream += assemble_instruction(instruction)
        except ProgramError as error:
            raise ProgramError(f"line {number}: {error}") from error
    return {engine: bytes(stream) for engine, stream in streams.items()}
