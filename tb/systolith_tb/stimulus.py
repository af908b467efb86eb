"""Random words, patterns and instructions for benches."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
from amaranth.hdl import Shape
from systolith_hdl.config import INSTRUCTION_BYTES, CoreConfig
from systolith_hdl.formats import DType
from systolith_hdl.isa import (
    CONTROL,
    DMA_TYPES,
    FIELDS,
    INSTRUCTION_BITS,
    SEGMENT_WORDS,
    SPECS,
    TABLE_ROWS,
    TABLE_SEGMENTS,
    EngineKind,
    Opcode,
    Space,
    encode,
    legal_operations,
    operation_types,
)
from systolith_hdl.scalar import tables as T

#: FP32 words at which arithmetic goes wrong first.
CORNERS = np.array(
    [
        0x00000000, 0x80000000,  # zeros
        0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF,  # subnormals
        0x00800000, 0x80800000,  # smallest normals
        0x3F800000, 0xBF800000, 0x3F7FFFFF, 0x3F800001,  # around one
        0x7F7FFFFF, 0xFF7FFFFF,  # largest
        0x7F800000, 0xFF800000,  # infinities
        0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF,  # NaNs
        0x3F808000, 0x3F818000, 0x7F7F8000, 0x00008000, 0x00018000,  # ties of bfloat16
        0x4B800000, 0x33800000,  # 2^24, 2^-24
    ],
    np.uint32,
)  # fmt: skip

#: Integers at which arithmetic, shifts and conversions go wrong first.
INTEGER_CORNERS = np.array(
    [
        0, 1, 2, 3, 7, 31, 32, 33, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 46341,
        0x00FFFFFF, 0x01000001, 0x01000003, 0x55555555, 0x7FFFFF80, 0x7FFFFFFF,
        0x80000000, 0x80000001, 0xFFFFFF80, 0xFFFFFFFE, 0xFFFFFFFF, 0xFEFFFFFF,
    ],
    np.uint32,
)  # fmt: skip


def random_words(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """FP32 words: plain numbers, any bits, numbers near each other, and corners; integers among
    them."""
    plain = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
    anything = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    near = (np.float32(1) + rng.integers(-4, 5, shape) * np.float32(2**-22)).astype(np.float32)
    corner = rng.choice(CORNERS, shape)
    kind = rng.random(shape)
    words = np.where(kind < 0.5, plain, anything)
    words = np.where(kind > 0.75, near.view(np.uint32), words)
    words = np.where(kind > 0.85, corner, words)
    integer = np.where(
        rng.random(shape) < 0.5,
        rng.integers(-40, 40, shape).astype(np.uint32),
        rng.choice(INTEGER_CORNERS, shape),
    )
    return np.where(kind > 0.93, integer, words).astype(np.uint32)


def random_table(rng: np.random.Generator, segments: int = TABLE_SEGMENTS) -> np.ndarray:
    """Words of the end of a table for CUSTOM: segments of other functions in any order or, some of
    them, any bits; rows that name some of these."""
    words = rng.integers(0, 1 << 32, SEGMENT_WORDS * segments + TABLE_ROWS, dtype=np.uint32)
    known = T.tables().segments
    for first in range(0, SEGMENT_WORDS * segments, SEGMENT_WORDS):
        if rng.random() < 0.7:
            segment = known[rng.integers(len(known))]
            parts = [segment >> 32 * part & 0xFFFFFFFF for part in range(SEGMENT_WORDS)]
            words[first : first + SEGMENT_WORDS] = parts
    if segments < TABLE_SEGMENTS:
        counts = rng.integers(0, segments.bit_length(), TABLE_ROWS)
        bases = TABLE_SEGMENTS - rng.integers(1 << counts, segments + 1)
        base, count = (T.ENTRY[name].offset for name in ("base", "log2_count"))
        words[-TABLE_ROWS:] = bases << base | counts << count
    return words


def random_counter() -> int:
    """The number of instructions before one: mostly small, any of 32 bits."""
    return random.getrandbits(random.choice((3, 8, 16, 32)))


def random_counts(limit: int) -> list[int]:
    """Four counts whose product is at most `limit`, often with ones among them."""
    counts = [1, 1, 1, 1]
    budget = limit
    for d in random.sample(range(4), 4):
        counts[d] = random.randint(1, max(1, budget)) if random.random() < 0.6 else 1
        budget //= counts[d]
    return counts


def nested_strides(counts: list[int]) -> tuple[list[int], int]:
    """Strides by which no two steps touch the same word, and the number of words they span."""
    strides = [0, 0, 0, 0]
    reach = 1
    for d in random.sample(range(4), 4):
        strides[d] = reach + (random.randint(0, 2) if random.random() < 0.3 else 0)
        reach += strides[d] * (counts[d] - 1)
    return strides, reach


def any_strides(counts: list[int]) -> list[int]:
    """Strides of a source: broadcasts, negative and repeated ones among them."""
    return [random.choice((0, 1, 1, 2, 3, -1, -2, n)) for n in counts]


def place(strides: list[int], counts: list[int], low: int, high: int) -> int | None:
    """A base from which the pattern stays inside words low to high-1, or None."""
    ends = [s * (n - 1) for s, n in zip(strides, counts, strict=True)]
    first = low - sum(min(0, e) for e in ends)
    last = high - 1 - sum(max(0, e) for e in ends)
    return random.randint(first, last) if first <= last else None


def operand_fields(
    config: CoreConfig, name: str, counts: list[int], *, regions: dict[Space, tuple[int, int]],
    nested: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fields of a random operand inside one of the word regions given by memory."""
    while True:
        space = random.choice(list(regions))
        strides = nested_strides(counts)[0] if nested else any_strides(counts)
        base = place(strides, counts, *regions[space])
        if base is not None:
            return {
                f"{name}.space": space,
                f"{name}.base": base,
                **{f"{name}.strides.{d}": strides[d] for d in range(4)},
            }


_LOOPS = {opcode.value for opcode in CONTROL - {Opcode.NOP, Opcode.END}}


def random_raw(kind: EngineKind, config: CoreConfig, *, mutate: bool = True) -> bytes:
    """64 bytes of an instruction for an engine, without waits and signals: mostly legal, or, with
    `mutate`, often wrong in a field or a bit."""
    # Sometimes one that only other cores have, or an operation that they have.
    foreign = mutate and random.random() < 0.05
    having = dataclasses.replace(config, divider=True) if foreign else config
    opcodes = [o for o, s in SPECS.items() if s.kind is kind and (foreign or s.exists(config))]
    opcode = random.choice([*opcodes, Opcode.NOP])
    spec = SPECS[opcode]
    fields: dict[str, Any] = {}
    for name, (_, shape) in FIELDS[opcode].items():
        part = name.split(".")
        width = Shape.cast(shape).width
        if part[0] == "opcode" or part[0] in ("wait", "signal"):
            continue
        if part[0] == "counts":
            fields[name] = random.choice((1, 1, 2, 3, 5))
        elif part[0] in ("lanes", "columns"):
            fields[name] = random.randint(1, config.lanes)
        elif part[0] in ("op0", "op1"):
            fields[name] = random.choice(sorted(legal_operations(opcode, name, having)))
        elif part[0] in spec.operands:
            spaces, types = spec.operands[part[0]]
            space = random.choice(sorted(spaces, key=lambda s: s.value))
            depth = config.sbuf_depth if space is Space.SBUF else config.psum_depth
            if part[1] == "base":
                fields[f"{part[0]}.space"] = space
                fields[name] = random.choice(
                    (depth // 2, depth // 2, random.randrange(depth), depth - 1, 0)
                )
            elif part[1] == "strides":
                fields[name] = random.randint(-3, 3)
            elif part[1] == "dtype":
                fields[name] = random.choice(sorted(types, key=lambda t: t.value))
        elif name == "dram_dtype":
            fields[name] = random.choice(sorted(DMA_TYPES, key=lambda t: t.value))
        elif name not in fields:
            low = -(1 << (width - 1)) if Shape.cast(shape).signed else 0
            fields[name] = random.randint(low, low + (1 << width) - 1)
    if spec.alike and (not mutate or random.random() < 0.8):
        fields |= {f"{name}.dtype": fields["src0.dtype"] for name in spec.alike}
    for operation, legal in operation_types(opcode, having).items():
        if fields["op1"] == operation.value and (not mutate or random.random() < 0.8):
            dtype = random.choice(sorted(legal, key=lambda t: t.value))
            fields |= {f"{name}.dtype": dtype for name in ("src0", *spec.alike)}
    for name, limit in spec.limits.items():
        least, most = limit(fields.__getitem__, config)
        fields[name] = random.randint(least, min(most, least + 4))
    if spec.indexed:
        columns = -(-fields["counts.0"] // config.lanes)
        end = config.sbuf_depth - columns
        fields["index.base"] = random.choice((0, random.randrange(end), end, end, end + 1))
        if not mutate:
            fields["index.base"] = min(end, fields["index.base"])
    if opcode is Opcode.MATMUL and fields["dst.dtype"] is DType.INT32:
        # As it must be; seldom not, which is an error.
        if not mutate or random.random() < 0.8:
            fields["src0.dtype"] = DType.INT8
    if mutate and random.random() < 0.4:
        names = [n for n in FIELDS[opcode] if n != "opcode"]
        names += 3 * [n for n in names if n.endswith("space")]  # so small that they are seldom hit
        name = random.choice(names)
        shape = Shape.cast(FIELDS[opcode][name][1])
        low = -(1 << (shape.width - 1)) if shape.signed else 0
        fields[name] = random.choice((0, random.randint(low, low + (1 << shape.width) - 1)))
        if name.startswith("wait"):
            # A wait that can hold: faults are found before waits are.
            slot = name.split(".")[1]
            fields[f"wait.{slot}.value"] = 0
            fields[f"wait.{slot}.mode"] = random.choice((1, 1, 3))
    word = int.from_bytes(encode(opcode, fields), "little")
    if mutate and random.random() < 0.02:  # a bit seldom hits the opcode
        word = word & ~0xFF | random.randrange(256)
    if mutate and random.random() < 0.2:
        bit = random.randrange(INSTRUCTION_BITS)
        if not 32 <= bit < 104 and not 8 <= bit < 32:  # waits and signals are above
            word ^= 1 << bit
    if word & 0xFF in _LOOPS:  # whether it is legal depends on others
        word = word & ~0xFF | opcode.value
    return word.to_bytes(INSTRUCTION_BYTES, "little")
