"""Programs and program files, whole and damaged."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systolith.errors import ConfigMismatch, ProgramError
from systolith.kernel import DType, Function, KernelBuilder
from systolith.program import Program, Relocation, assemble
from systolith_hdl.config import PRESETS
from systolith_hdl.isa import decode


def example() -> Program:
    nc = KernelBuilder("nano", name="example")
    x = nc.dram.tensor("x", (4, 16), DType.FP32)
    c = nc.dram.tensor("c", kind="constant", data=np.arange(16, dtype=np.float32).reshape(4, 4))
    y = nc.dram.tensor("y", (4, 16), DType.BF16, kind="output")
    a, b = nc.sbuf.tile(16), nc.sbuf.tile(4)
    out, psum = nc.sbuf.tile(16), nc.psum.tile(16)
    with nc.label("a product"):
        nc.dma.load(a.view(), x, lane_stride=64)
        nc.dma.load(b.view(), c, lane_stride=16)
        nc.tensor.load_stationary(b.view())
        nc.tensor.matmul(psum.view(), a.view())
    nc.scalar.activate(out.view(), psum.view(), Function.EXP)
    nc.dma.store(out.view(), y, lane_stride=32)
    return nc.finish(metadata={"made": "for tests", "n": [1, 2]})


PROGRAM = example()
BLOB = PROGRAM.to_bytes()


def reseal(blob: bytes) -> bytes:
    """Gives a changed file a valid checksum."""
    digest = hashlib.sha256(blob[:32] + blob[64:]).digest()
    return blob[:32] + digest + blob[64:]


def with_metadata(change: dict) -> bytes:
    """The file with some of its metadata replaced, otherwise intact."""
    size = struct.unpack_from("<Q", BLOB, 16)[0]
    metadata = json.loads(BLOB[64 : 64 + size]) | change
    text = json.dumps(metadata).encode()
    header = BLOB[:16] + struct.pack("<Q", len(text)) + BLOB[24:64]
    return reseal(header + text + BLOB[64 + size :])


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "example.systolith"
    PROGRAM.save(path)
    loaded = Program.load(path)
    assert loaded == PROGRAM
    assert loaded.to_bytes() == BLOB
    assert loaded.metadata == {"made": "for tests", "n": [1, 2]}


def test_disassembly_round_trip_and_contents() -> None:
    text = PROGRAM.disassemble()
    assert assemble(text) == dict(PROGRAM.streams)
    assert "test_program.py:" in text and "a product" in text and "x+0" in text
    assert len(text.splitlines()) == sum(PROGRAM.count(engine) for engine in PROGRAM.streams)


@settings(max_examples=300)
@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_any_changed_byte_is_found(position: int, flip: int) -> None:
    blob = bytearray(BLOB)
    blob[position] ^= flip
    with pytest.raises(ProgramError, match="here"):
        Program.from_bytes(bytes(blob), origin="here")


@settings(max_examples=200)
@given(st.integers(0, len(BLOB) - 1))
def test_truncation_is_found(size: int) -> None:
    with pytest.raises(ProgramError, match="truncated"):
        Program.from_bytes(BLOB[:size])


def test_messages() -> None:
    def load(blob: bytes) -> None:
        Program.from_bytes(blob, origin="file")

    with pytest.raises(ProgramError, match="followed by other data"):
        load(BLOB + b"x")
    with pytest.raises(ProgramError, match="not a program file"):
        load(b"ELF" + BLOB[3:])
    with pytest.raises(ProgramError, match="format version 9"):
        load(BLOB[:8] + struct.pack("<H", 9) + BLOB[10:])
    with pytest.raises(ProgramError, match="checksum"):
        load(BLOB[:-1] + bytes([BLOB[-1] ^ 1]))
    with pytest.raises(ProgramError, match="ISA version 99"):
        load(reseal(BLOB[:10] + struct.pack("<H", 99) + BLOB[12:]))
    with pytest.raises(ProgramError, match="config hash"):
        load(reseal(BLOB[:12] + struct.pack("<I", 7) + BLOB[16:]))


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"name": "x"}},
        {"config": dataclasses.asdict(PRESETS["nano"]) | {"lanes": 5}},
        {"config": None},
        {"streams": {}},
        {"streams": []},
        {"streams": {engine: [0, 1 << 40] for engine in PROGRAM.streams}},
        {"streams": {engine: [0, 60] for engine in PROGRAM.streams}},
        {"streams": {engine: [0, 64] for engine in PROGRAM.streams}},
        {"streams": {engine: [-64, 64] for engine in PROGRAM.streams}},
        {"tensors": [{"name": "x"}]},
        {"tensors": []},
        {"tensors": None},
        {"relocations": [["dma0", 99, 0]]},
        {"relocations": [["dma0", 0, 9]]},
        {"relocations": [["dma0", -1, 0]]},
        {"relocations": [["tensor", 0, 0]]},
        {"relocations": [["nobody", 0, 0]]},
        {"relocations": [[1, 2]]},
        {"constants": {}},
        {"constants": {"c": [0, 4]}},
        {"constants": {"c": [0, 64], "d": [0, 64]}},
        {"debug": {"dma0": [[0, 0]]}},
        {"debug": {"dma0": [[99, 99]] * 3}},
        {"debug": {"nobody": []}},
        {"strings": None},
        {"metadata": 3},
    ],
)
def test_inconsistent_files(change: dict) -> None:
    with pytest.raises(ProgramError):
        Program.from_bytes(with_metadata(change))


def test_the_unchanged_metadata_is_fine() -> None:
    assert Program.from_bytes(with_metadata({})) == PROGRAM


def test_relocation() -> None:
    moved = PROGRAM.relocate({"x": 0x1000, "y": 0x123456789A40})
    bases = {
        PROGRAM.tensors[r.tensor].name: decode(moved.instruction(r.engine, r.index))[1]["dram_base"]
        for r in PROGRAM.relocations
    }
    assert bases == {"x": 0x1000, "c": PROGRAM.tensor("c").address, "y": 0x123456789A40}
    assert moved.tensor("y").address == 0x123456789A40
    back = moved.relocate({t.name: t.address for t in PROGRAM.tensors})
    assert back == PROGRAM
    with pytest.raises(ProgramError, match="no tensor 'z'; its tensors: x, c, y"):
        PROGRAM.relocate({"z": 0})
    with pytest.raises(ProgramError, match="48 bits"):
        PROGRAM.relocate({"x": 1 << 48})
    with pytest.raises(ProgramError, match="multiple of 64"):
        PROGRAM.relocate({"x": 8})


def test_written_tensors() -> None:
    assert PROGRAM.written_tensors() == {"y"}


def test_config_mismatch_names_the_fields() -> None:
    with pytest.raises(ConfigMismatch) as caught:
        PROGRAM.check_config(PRESETS["small"])
    assert caught.value.differences == (
        "lanes: 4 there, 8 here",
        "sbuf_depth: 2048 there, 4096 here",
        "psum_bank_depth: 64 there, 128 here",
    )
    PROGRAM.check_config(dataclasses.replace(PRESETS["nano"], name="another name"))


def test_validation() -> None:
    with pytest.raises(ProgramError, match="does not end with END"):
        dataclasses.replace(PROGRAM, streams=dict(PROGRAM.streams) | {"dma0": bytes(64)})
    with pytest.raises(ProgramError, match="without a DRAM address"):
        dataclasses.replace(PROGRAM, relocations=(Relocation("vector", 0, 0),))
    with pytest.raises(ProgramError, match="same name"):
        dataclasses.replace(PROGRAM, tensors=PROGRAM.tensors[:1] * 2)
    with pytest.raises(ProgramError, match="not JSON"):
        dataclasses.replace(PROGRAM, metadata={"a": object()}).to_bytes()
