"""Instructions as text and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from systolith.assembly import (
    assemble,
    assemble_instruction,
    disassemble_instruction,
    float_to_bits,
)
from systolith.errors import ProgramError
from systolith_hdl.config import INSTRUCTION_BYTES
from systolith_hdl.isa import FIELDS, USED_BITS, AluOp, Opcode, Rounding, encode

OPCODES = st.sampled_from(list(Opcode))


@st.composite
def _field_bits(draw: st.DrawFn) -> bytes:
    """An instruction of a known opcode whose fields hold any bits."""
    opcode = draw(OPCODES)
    bits = int.from_bytes(draw(st.binary(min_size=64, max_size=64)), "little")
    if draw(st.booleans()):  # sparse: most fields zero
        bits &= int.from_bytes(draw(st.binary(min_size=64, max_size=64)), "little")
    return ((bits & USED_BITS[opcode] & ~0xFF) | opcode.value).to_bytes(64, "little")


@given(_field_bits())
def test_round_trip_of_every_field(raw: bytes) -> None:
    text = disassemble_instruction(raw)
    assert "\n" not in text and ";" not in text and ".raw" not in text
    assert assemble_instruction(text) == raw


@given(st.binary(min_size=64, max_size=64))
def test_round_trip_of_any_bytes(raw: bytes) -> None:
    assert assemble_instruction(disassemble_instruction(raw)) == raw


@given(st.integers(0, 2**32 - 1))
def test_round_trip_of_immediates(word: int) -> None:
    raw = encode(Opcode.MEMSET, {"imm0": word})
    assert assemble_instruction(disassemble_instruction(raw)) == raw


def test_text() -> None:
    raw = encode(
        Opcode.TENSOR_SCALAR,
        {
            "op0": AluOp.MUL,
            "op1": AluOp.BIT_AND,
            "lanes": 4,
            "rounding": Rounding.STOCHASTIC,
            "counts.3": 16,
            "dst.base": 8,
            "dst.strides.3": 1,
            "dst.dtype": 1,
            "src0.space": 1,
            "src0.strides.3": -2,
            "imm0": float_to_bits(0.1),
            "imm1": 255,
            "wait.0.sem": 3,
            "wait.0.mode": 1,
            "wait.0.value": 9,
            "wait.2.sem": 4,
            "wait.2.mode": 2,
            "wait.2.value": 1,
            "signal.sem": 2,
            "signal.amount": 1,
        },
    )
    assert disassemble_instruction(raw) == (
        "wait(s3>=9,-,s4-=1) TENSOR_SCALAR op0=MUL op1=BIT_AND lanes=4 rounding=STOCHASTIC "
        "counts=[0,0,0,16] dst=sbuf.bf16@8[0,0,0,1] src0=psum.fp32@0[0,0,0,-2] imm0=0.1 "
        "imm1=0x000000ff signal(s2+1)"
    )


def test_every_field_is_shown() -> None:
    """Setting any single field changes the text, so nothing is hidden."""
    for opcode in Opcode:
        plain = disassemble_instruction(encode(opcode, {}))
        for name in set(FIELDS[opcode]) - {"opcode"}:
            text = disassemble_instruction(encode(opcode, {name: 1}))
            assert text != plain, name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MEMSET rounding=UP",
        "MATMUL rounding=STOCHASTIC",
        "FROBNICATE",
        "NOP lanes=4",
        "MATMUL lanes=300",
        "MATMUL lanes",
        "MATMUL counts=[1,2,3]",
        "MATMUL dst=sbuf.fp32@0",
        "MATMUL dst=nowhere.fp32@0[0,0,0,0]",
        "TENSOR_SCALAR op0=FROB",
        "NOP wait(s1>=2,-,-,-)",
        "NOP wait(s1=>2)",
        "NOP wait(s1>=2",
        "NOP signal(s1)",
        "MEMSET imm0=zero",
        "REDUCE dst=sbuf.fp32@0[0,0,0,1]",
        ".raw 00",
        ".raw zz",
    ],
)
def test_bad_text_is_a_program_error(text: str) -> None:
    with pytest.raises(ProgramError):
        assemble_instruction(text)


def test_streams() -> None:
    text = "; two engines\nvector[0] NOP signal(s1+1) ; here\n\ndma0[0] END\nvector[1] END\n"
    streams = assemble(text)
    assert {name: len(stream) // INSTRUCTION_BYTES for name, stream in streams.items()} == {
        "vector": 2,
        "dma0": 1,
    }
    with pytest.raises(ProgramError, match=r"line 2.*index 2.*expected 1"):
        assemble("vector[0] NOP\nvector[2] NOP")
    with pytest.raises(ProgramError, match="line 1"):
        assemble("vector NOP")


@given(st.floats(width=32))
def test_float_to_bits(value: float) -> None:
    assert float_to_bits(value) == int(np.float32(value).view(np.uint32))
