"""Programs: instruction streams with everything needed to place, check and explain them.

A program file is a fixed header, JSON metadata and the payload (streams, then constants)::

    offset  bytes  field
         0      8  magic "SYSTPROG"
         8      2  file format version
        10      2  ISA version
        12      4  config hash
        16      8  bytes of metadata
        24      8  bytes of payload
        32     32  SHA-256 of all the other bytes
        64         metadata, payload

Integers are little-endian.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from systolith_hdl.config import INSTRUCTION_BYTES, ConfigError, CoreConfig
from systolith_hdl.formats import FORMATS, DType
from systolith_hdl.isa import (
    DRAM_WRITERS,
    FIELDS,
    ISA_VERSION,
    Opcode,
    decode,
    encode,
)

from .assembly import assemble, disassemble_instruction
from .errors import ConfigMismatch, ProgramError

__all__ = [
    "DRAM_ALIGN",
    "DebugInfo",
    "Program",
    "Relocation",
    "TensorInfo",
    "assemble",
    "disassemble_instruction",
]

DRAM_ALIGN = 64  #: bytes; streams and tensors start at multiples
FORMAT_VERSION = 1
_MAGIC = b"SYSTPROG"
_HEADER = struct.Struct("<8sHHIQQ32s")
_DIGEST_OFFSET = 32

_DRAM_BASE_BIT = FIELDS[Opcode.DMA_LOAD]["dram_base"][0]
_DRAM_BASE = slice(_DRAM_BASE_BIT // 8, _DRAM_BASE_BIT // 8 + 6)
#: opcodes with an address in DRAM, in the same bits
_DRAM_CODES = {opcode.value for opcode, fields in FIELDS.items() if "dram_base" in fields}
assert all(FIELDS[Opcode(code)]["dram_base"][0] == _DRAM_BASE_BIT for code in _DRAM_CODES)
_WRITER_CODES = frozenset(opcode.value for opcode in DRAM_WRITERS)


def align_up(value: int, align: int = DRAM_ALIGN) -> int:
    """Rounds up to a multiple of `align`."""
    return -(-value // align) * align


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a program.

    Parameters
    ----------
    name : unique in the program
    shape : dimensions, outermost first; dense in DRAM
    dtype : of the packed elements
    kind : "input", "output", "scratch" or "constant"
    address : DRAM byte address that the streams are linked for
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    kind: str
    address: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * FORMATS[self.dtype].bytes


@dataclasses.dataclass(frozen=True)
class Relocation:
    """Says that the ``dram_base`` of an instruction points into a tensor.

    Parameters
    ----------
    engine : name of the stream
    index : of the instruction in it
    tensor : index in the tensor table
    """

    engine: str
    index: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class DebugInfo:
    """Where an instruction comes from: ``file:line`` and a label, both may be None."""

    source: str | None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """What a core runs.

    Parameters
    ----------
    name : of the kernel or function it was made from
    config : of the core it was made for
    streams : engine name -> instructions, 64 bytes each, END last
    tensors : everything in DRAM that the streams touch
    relocations : which instructions to change when a tensor moves
    constants : tensor name -> its bytes
    debug : engine name -> one entry for each instruction
    metadata : whatever the maker wants to keep; JSON
    """

    name: str
    config: CoreConfig
    streams: Mapping[str, bytes]
    tensors: tuple[TensorInfo, ...] = ()
    relocations: tuple[Relocation, ...] = ()
    constants: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    debug: Mapping[str, tuple[DebugInfo, ...]] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._validate()

    # -- what is in it -------------------------------------------------------------------------

    def count(self, engine: str) -> int:
        """Instructions in the stream of an engine."""
        return len(self.streams[engine]) // INSTRUCTION_BYTES

    def instruction(self, engine: str, index: int) -> bytes:
        """The 64 bytes of one instruction."""
        return self.streams[engine][index * INSTRUCTION_BYTES : (index + 1) * INSTRUCTION_BYTES]

    def instructions(self) -> Iterator[tuple[str, int, bytes]]:
        """Yields (engine, index, 64 bytes), engine after engine."""
        for engine in self.streams:
            for index in range(self.count(engine)):
                yield engine, index, self.instruction(engine, index)

    def with_fields(self, engine: str, index: int, fields: Mapping[str, Any]) -> Program:
        """This program with fields of one instruction changed; nothing is checked but that the
        values fit, so it makes programs that fault as well."""
        opcode, old = decode(self.instruction(engine, index))
        start = index * INSTRUCTION_BYTES
        stream = self.streams[engine]
        changed = encode(opcode, {**old, **fields})
        stream = stream[:start] + changed + stream[start + INSTRUCTION_BYTES :]
        return dataclasses.replace(self, streams={**self.streams, engine: stream})

    def debug_info(self, engine: str, index: int) -> DebugInfo:
        """Where an instruction comes from, as far as it is known."""
        entries = self.debug.get(engine, ())
        return entries[index] if index < len(entries) else DebugInfo(None)

    def tensor(self, name: str) -> TensorInfo:
        """Looks a tensor up by name; raises ProgramError if there is none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        known = ", ".join(tensor.name for tensor in self.tensors) or "none"
        raise ProgramError(f"program {self.name!r} has no tensor {name!r}; its tensors: {known}")

    def written_tensors(self) -> frozenset[str]:
        """Names of the tensors that some instruction stores to."""
        return frozenset(
            self.tensors[relocation.tensor].name
            for relocation in self.relocations
            if self.instruction(relocation.engine, relocation.index)[0] in _WRITER_CODES
        )

    def disassemble(self) -> str:
        """All instructions as text, one a line; `assemble` reads it back."""
        lines: list[str] = []
        targets = {(r.engine, r.index): self.tensors[r.tensor] for r in self.relocations}
        for engine, index, raw in self.instructions():
            debug = self.debug_info(engine, index)
            notes = [note for note in (debug.source, debug.label) if note]
            tensor = targets.get((engine, index))
            if tensor is not None:
                base = decode(raw)[1]["dram_base"]
                notes.insert(0, f"{tensor.name}+{base - tensor.address}")
            comment = " ; " + " | ".join(notes).replace("\n", " ") if notes else ""
            lines.append(f"{engine}[{index}] {disassemble_instruction(raw)}{comment}")
        return "\n".join(lines) + "\n"

    # -- placing it ----------------------------------------------------------------------------

    def relocate(self, addresses: Mapping[str, int]) -> Program:
        """Returns the program with tensors at other DRAM addresses; those not named stay."""
        for name in addresses:
            self.tensor(name)
        moves = [addresses.get(t.name, t.address) - t.address for t in self.tensors]
        streams = {engine: bytearray(stream) for engine, stream in self.streams.items()}
        for relocation in self.relocations:
            if moves[relocation.tensor]:
                patch_dram_base(
                    streams[relocation.engine], relocation.index, moves[relocation.tensor]
                )
        return dataclasses.replace(
            self,
            streams={engine: bytes(stream) for engine, stream in streams.items()},
            tensors=tuple(
                dataclasses.replace(t, address=addresses.get(t.name, t.address))
                for t in self.tensors
            ),
        )

    # -- checking ------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Raises ProgramError for anything that does not fit together."""

        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ProgramError(f"program {self.name!r}: {message}")

        engines = set(self.config.engines)
        require(
            set(self.streams) == engines,
            f"has streams for {sorted(self.streams)}, the core has {sorted(engines)}",
        )
        for engine, stream in self.streams.items():
            require(
                len(stream) > 0 and len(stream) % INSTRUCTION_BYTES == 0,
                f"the stream of {engine} has {len(stream)} bytes, not a multiple of "
                f"{INSTRUCTION_BYTES}",
            )
            require(
                stream[-INSTRUCTION_BYTES] == Opcode.END.value,
                f"the stream of {engine} does not end with END",
            )
            entries = len(self.debug.get(engine, ()))
            require(
                entries in (0, len(stream) // INSTRUCTION_BYTES),
                f"the debug map of {engine} has {entries} entries",
            )
        require(set(self.debug) <= engines, "the debug map names an engine the core lacks")
        names = [tensor.name for tensor in self.tensors]
        require(len(set(names)) == len(names), "two tensors have the same name")
        for tensor in self.tensors:
            require(all(n > 0 for n in tensor.shape), f"tensor {tensor.name!r} is empty")
            require(
                tensor.address >= 0 and tensor.address % DRAM_ALIGN == 0,
                f"tensor {tensor.name!r} lies at {tensor.address}, not a multiple of {DRAM_ALIGN}",
            )
            require(
                (tensor.kind == "constant") == (tensor.name in self.constants),
                f"tensor {tensor.name!r} is {tensor.kind} but its data is "
                + ("there" if tensor.name in self.constants else "missing"),
            )
            if tensor.kind == "constant":
                have = len(self.constants[tensor.name])
                require(
                    have == tensor.nbytes,
                    f"constant {tensor.name!r} has {have} bytes, its shape {tensor.nbytes}",
                )
            else:
                require(
                    tensor.kind in ("input", "output", "scratch"),
                    f"tensor {tensor.name!r} is of unknown kind {tensor.kind!r}",
                )
        require(set(self.constants) <= set(names), "a constant is not in the tensor table")
        for relocation in self.relocations:
            require(
                relocation.engine in engines
                and 0 <= relocation.index < self.count(relocation.engine)
                and 0 <= relocation.tensor < len(self.tensors),
                f"{relocation} points nowhere",
            )
            require(
                self.streams[relocation.engine][relocation.index * INSTRUCTION_BYTES]
                in _DRAM_CODES,
                f"{relocation} is of an instruction without a DRAM address",
            )

    def check_config(self, config: CoreConfig) -> None:
        """Raises ConfigMismatch, naming the fields, if a core of `config` cannot run this."""
        if self.config.hash != config.hash:
            raise ConfigMismatch(
                f"program {self.name!r} was made for config {self.config.name!r}, "
                f"not for {config.name!r}:",
                config.differences(dataclasses.asdict(self.config)),
            )

    # -- files ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The program as the bytes of a program file."""
        payload = bytearray()

        def place(blob: bytes) -> list[int]:
            span = [len(payload), len(blob)]
            payload.extend(blob)
            return span

        strings: dict[str | None, int] = {}

        def intern(text: str | None) -> int:
            return strings.setdefault(text, len(strings))

        metadata = {
            "name": self.name,
            "config": dataclasses.asdict(self.config),
            "streams": {engine: place(stream) for engine, stream in self.streams.items()},
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "dtype": t.dtype.name,
                    "kind": t.kind,
                    "address": t.address,
                }
                for t in self.tensors
            ],
            "relocations": [[r.engine, r.index, r.tensor] for r in self.relocations],
            "constants": {name: place(blob) for name, blob in self.constants.items()},
            "debug": {
                engine: [[intern(entry.source), intern(entry.label)] for entry in entries]
                for engine, entries in self.debug.items()
            },
            "strings": list(strings),
            "metadata": dict(self.metadata),
        }
        try:
            text = json.dumps(metadata, separators=(",", ":")).encode()
        except TypeError as error:
            raise ProgramError(f"program {self.name!r}: metadata is not JSON: {error}") from error
        header = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            ISA_VERSION,
            self.config.hash,
            len(text),
            len(payload),
            bytes(32),
        )
        digest = hashlib.sha256(header[:_DIGEST_OFFSET] + text + payload).digest()
        return header[:_DIGEST_OFFSET] + digest + text + bytes(payload)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a program file."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Reads a program file; raises ProgramError if it is damaged or of another version."""
        return cls.from_bytes(Path(path).read_bytes(), origin=str(path))

    @classmethod
    def from_bytes(cls, blob: bytes, *, origin: str = "program") -> Program:
        """Reads the bytes of a program file; `origin` names it in messages."""
        if len(blob) < _HEADER.size:
            raise ProgramError(
                f"{origin}: truncated: {len(blob)} bytes, the header alone has {_HEADER.size}"
            )
        magic, version, isa_version, config_hash, text_bytes, payload_bytes, digest = (
            _HEADER.unpack_from(blob)
        )
        if magic != _MAGIC:
            raise ProgramError(f"{origin}: not a program file (it starts with {magic!r})")
        if version != FORMAT_VERSION:
            raise ProgramError(
                f"{origin}: file format version {version}, this software reads {FORMAT_VERSION}"
            )
        wanted = _HEADER.size + text_bytes + payload_bytes
        if len(blob) != wanted:
            what = "truncated" if len(blob) < wanted else "followed by other data"
            raise ProgramError(f"{origin}: {what}: {len(blob)} bytes, the header says {wanted}")
        if hashlib.sha256(blob[:_DIGEST_OFFSET] + blob[_HEADER.size :]).digest() != digest:
            raise ProgramError(f"{origin}: damaged: the checksum does not match")
        if isa_version != ISA_VERSION:
            raise ProgramError(
                f"{origin}: made for ISA version {isa_version}, this software has {ISA_VERSION}"
            )
        try:
            found = json.loads(blob[_HEADER.size : _HEADER.size + text_bytes])
            program = cls._from_metadata(found, memoryview(blob)[_HEADER.size + text_bytes :])
        except ConfigError as error:
            raise ProgramError(f"{origin}: {error}") from error
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ProgramError(f"{origin}: metadata cannot be read: {error!r}") from error
        if program.config.hash != config_hash:
            raise ProgramError(
                f"{origin}: the header's config hash {config_hash:#010x} is not that of its "
                f"config {program.config.name!r}, {program.config.hash:#010x}"
            )
        return program

    @classmethod
    def _from_metadata(cls, found: Any, payload: memoryview) -> Program:
        def cut(span: list[int]) -> bytes:
            offset, size = (int(n) for n in span)
            if offset < 0 or size < 0 or offset + size > len(payload):
                raise ValueError(f"{span} is outside the payload")
            return bytes(payload[offset : offset + size])

        strings = found["strings"]
        return cls(
            name=str(found["name"]),
            config=CoreConfig(**found["config"]),
            streams={engine: cut(span) for engine, span in found["streams"].items()},
            tensors=tuple(
                TensorInfo(
                    name=str(t["name"]),
                    shape=tuple(int(n) for n in t["shape"]),
                    dtype=DType[t["dtype"]],
                    kind=str(t["kind"]),
                    address=int(t["address"]),
                )
                for t in found["tensors"]
            ),
            relocations=tuple(
                Relocation(str(engine), int(index), int(tensor))
                for engine, index, tensor in found["relocations"]
            ),
            constants={name: cut(span) for name, span in found["constants"].items()},
            debug={
                engine: tuple(DebugInfo(strings[source], strings[label]) for source, label in pairs)
                for engine, pairs in found["debug"].items()
            },
            metadata=dict(found["metadata"]),
        )


def patch_dram_base(stream: bytearray | np.ndarray, index: int, move: int) -> None:
    """Adds `move` bytes to the DRAM address of a DMA instruction, in place."""
    start = index * INSTRUCTION_BYTES
    field = slice(start + _DRAM_BASE.start, start + _DRAM_BASE.stop)
    base = int.from_bytes(bytes(stream[field]), "little") + move
    if not 0 <= base < 1 << 48:
        raise ProgramError(f"instruction {index}: DRAM address {base:#x} does not fit 48 bits")
    raw = base.to_bytes(6, "little")
    stream[field] = raw if isinstance(stream, bytearray) else np.frombuffer(raw, np.uint8)
