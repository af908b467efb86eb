"""Bench of the cells between integers and FP32, many copies side by side, against numpy."""

import os

import cocotb
import numpy as np
from amaranth.hdl import Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from systolith.golden import arithmetic
from systolith_hdl.arith import CONVERT_LATENCY, ConvertWord, Fp32ToInt32, WidenInt8
from systolith_hdl.emit import Once
from systolith_hdl.formats import INTEGERS, NARROW_FLOATS, DType

from systolith_tb.clocking import start
from systolith_tb.numerics import CORNERS, numpy_rng, pack, random_words, to_int32, unpack
from systolith_tb.stimulus import INTEGER_CORNERS

#: Copies of each cell: this many vectors in a cycle.
COPIES = 64


class IntegerBench(wiring.Component):
    """`COPIES` of each cell between registers.

    Members
    -------
    words : In, FP32 words
    integers : Out, of `words`, the carry added, one cycle later
    bits : In, INT8 numbers
    widened : Out, FP32 words of `bits`, one cycle later
    given, dtype : In, of the conversion
    en : In, of the conversion
    converted : Out, of `words`, CONVERT_LATENCY enabled cycles later
    """

    given: In(DType)
    dtype: In(DType)
    en: In(1)
    converted: Out(data.ArrayLayout(unsigned(32), COPIES))

    words: In(data.ArrayLayout(unsigned(32), COPIES))
    integers: Out(data.ArrayLayout(unsigned(32), COPIES))
    bits: In(data.ArrayLayout(unsigned(8), COPIES))
    widened: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for i in range(COPIES):
            m.submodules[f"convert{i}"] = convert = Once(Fp32ToInt32(), "fp32_to_int32")
            m.submodules[f"widen{i}"] = widen = Once(WidenInt8(), "widen_int8")
            m.submodules[f"between{i}"] = between = Once(ConvertWord(), "convert_word")
            m.d.comb += [convert.word.eq(self.words[i]), widen.bits.eq(self.bits[i])]
            m.d.comb += [
                between.word.eq(self.words[i]),
                between.given.eq(self.given),
                between.dtype.eq(self.dtype),
                between.en.eq(self.en),
                self.converted[i].eq(between.o),
            ]
            m.d.sync += [
                self.integers[i].eq(convert.o + convert.carry),
                self.widened[i].eq(widen.o),
            ]
        return m


def edges() -> np.ndarray:
    """Of every exponent and sign the fractions with one bit set, one bit clear, all and none; and
    both neighbours of every power of two."""
    single = np.uint32(1) << np.arange(23, dtype=np.uint32)
    fractions = np.concatenate([[0], single, 0x7FFFFF ^ single, [0x7FFFFF]]).astype(np.uint32)
    exponents = np.arange(512, dtype=np.uint32) << np.uint32(23)
    return (exponents[:, None] | fractions).ravel()


@cocotb.test(timeout_time=100, timeout_unit="ms")
async def integers(dut) -> None:
    """Integers of all edges and $SYSTOLITH_VECTORS random words, half of them near the range of
    INT32; FP32 words of every INT8 number."""
    rng = numpy_rng()
    count = int(os.environ.get("SYSTOLITH_VECTORS", str(1 << 17)))
    near = (rng.integers(120, 164, count // 2, dtype=np.uint32) << 23) | (
        rng.integers(0, 1 << 32, count // 2, dtype=np.uint32) & np.uint32(0x807FFFFF)
    )
    words = np.concatenate([CORNERS, edges(), random_words(rng, count - count // 2), near])
    words = np.pad(words, (0, -len(words) % COPIES))
    numbers = np.arange(256).astype(np.uint8)
    batches, number_batches = len(words) // COPIES, len(numbers) // COPIES

    await start(dut)
    found: list[np.ndarray] = []
    widened: list[np.ndarray] = []
    for batch in range(batches + 1):
        await FallingEdge(dut.clk)
        if batch:
            found.append(unpack(dut.integers, np.uint32, COPIES))
        if 0 < batch <= number_batches:
            widened.append(unpack(dut.widened, np.uint32, COPIES))
        if batch < batches:
            dut.words.value = pack(words[batch * COPIES : (batch + 1) * COPIES])
        if batch < number_batches:
            dut.bits.value = pack(numbers[batch * COPIES : (batch + 1) * COPIES])
    got, wanted = np.concatenate(found), to_int32(words)
    wrong = np.flatnonzero(got != wanted)
    assert not len(wrong), (
        f"{len(wrong)} of {len(words)} wrong, first {words[wrong[0]]:08x}: "
        f"got {got[wrong[0]]:08x}, wanted {wanted[wrong[0]]:08x}"
    )
    wide = numbers.view(np.int8).astype(np.float32).view(np.uint32)
    assert (np.concatenate(widened) == wide).all() and len(wide) == 256
    cocotb.log.info("%d words, %d numbers", len(words), len(numbers))


@cocotb.test(timeout_time=100, timeout_unit="ms")
async def conversions(dut) -> None:
    """What the vector engine writes, between FP32 and all types of integers: all edges, corners and
    random words, against the golden model. What goes to a narrow float is rounded to odd."""
    rng = numpy_rng()
    count = int(os.environ.get("SYSTOLITH_VECTORS", str(1 << 13)))
    ranges = rng.integers(0, 1 << 32, count, dtype=np.uint32) >> rng.integers(
        0, 32, count, np.uint32
    )
    words = np.concatenate(
        [CORNERS, INTEGER_CORNERS, edges(), random_words(rng, count), ranges, -ranges]
    )
    words = np.pad(words, (0, -len(words) % COPIES))
    pairs = [(DType.FP32, dtype) for dtype in INTEGERS]
    for given in (DType.INT32, DType.UINT32):
        pairs += [(given, dtype) for dtype in (DType.FP32, *NARROW_FLOATS, DType.INT8)]

    await start(dut)
    compared = 0
    for given, dtype in pairs:
        dut.given.value, dut.dtype.value = given.value, dtype.value
        found: list[np.ndarray] = []
        arriving = [False] * CONVERT_LATENCY
        sent, batches = 0, len(words) // COPIES
        while len(found) < batches:
            await FallingEdge(dut.clk)
            enable = rng.random() < 0.9
            dut.en.value = int(enable)
            if enable:
                if arriving.pop(0):
                    found.append(unpack(dut.converted, np.uint32, COPIES))
                arriving.append(sent < batches)
                if sent < batches:
                    dut.words.value = pack(words[sent * COPIES : (sent + 1) * COPIES])
                sent += 1
        wanted = arithmetic.convert(words, given, dtype)
        if dtype in NARROW_FLOATS:
            wanted = arithmetic.from_integer(words, given, odd=True)
        got = np.concatenate(found)
        wrong = np.flatnonzero(got != wanted)
        assert not len(wrong), (
            f"{given.name} to {dtype.name}: {len(wrong)} of {len(words)} wrong, first "
            f"{words[wrong[0]]:08x}: got {got[wrong[0]]:08x}, wanted {wanted[wrong[0]]:08x}"
        )
        compared += len(got)
    cocotb.log.info("%d words", compared)
