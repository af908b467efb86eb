"""Bench of rounding, packing and widening, many copies side by side, against ml_dtypes."""

import os

import cocotb
import numpy as np
from amaranth.hdl import Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from systolith.golden import arithmetic
from systolith_hdl.arith import PackNarrow, RoundNarrow, WidenNarrow
from systolith_hdl.emit import Once
from systolith_hdl.formats import CANONICAL_NAN, FORMATS, NARROW_FLOATS, DType

from systolith_tb.clocking import start
from systolith_tb.numerics import CORNERS, numpy_rng, pack, random_words, unpack

#: Copies of each cell: this many vectors in a cycle.
COPIES = 64


class NarrowBench(wiring.Component):
    """`COPIES` of each cell between registers.

    Members
    -------
    dtype : In(DType)
    stochastic : In(1), how `words` are rounded
    words, random : In, FP32 words, and what rounds them stochastically
    rounded, bits : Out, of `words`, one cycle later
    narrow : In, packed numbers
    widened : Out, FP32 words of `narrow`, one cycle later
    """

    dtype: In(DType)
    stochastic: In(1)
    words: In(data.ArrayLayout(unsigned(32), COPIES))
    random: In(data.ArrayLayout(unsigned(32), COPIES))
    rounded: Out(data.ArrayLayout(unsigned(32), COPIES))
    bits: Out(data.ArrayLayout(unsigned(16), COPIES))
    narrow: In(data.ArrayLayout(unsigned(16), COPIES))
    widened: Out(data.ArrayLayout(unsigned(32), COPIES))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for i in range(COPIES):
            m.submodules[f"round{i}"] = rounding = Once(RoundNarrow(), "round_narrow")
            m.submodules[f"pack{i}"] = packing = Once(PackNarrow(), "pack_narrow")
            m.submodules[f"widen{i}"] = widening = Once(WidenNarrow(), "widen_narrow")
            m.d.comb += [
                rounding.word.eq(self.words[i]),
                rounding.stochastic.eq(self.stochastic),
                rounding.random.eq(self.random[i]),
                packing.word.eq(rounding.o),
                widening.bits.eq(self.narrow[i]),
            ]
            m.d.comb += [cell.dtype.eq(self.dtype) for cell in (rounding, packing, widening)]
            m.d.sync += [
                self.rounded[i].eq(rounding.o),
                self.bits[i].eq(packing.o),
                self.widened[i].eq(widening.o),
            ]
        return m


def every_number(dtype: DType) -> np.ndarray:
    """All bit patterns of a type, as unsigned integers."""
    form = FORMATS[dtype]
    return np.arange(1 << form.bits, dtype=np.uint32).astype(f"u{form.bytes}")


def edges(dtype: DType) -> np.ndarray:
    """FP32 words of all numbers of a type and all ties between neighbours, those next to each, and
    the same around where overflow begins; both signs."""
    form = FORMATS[dtype]
    with np.errstate(all="ignore"):
        values = every_number(dtype).view(form.numpy).astype(np.float64)
    values = np.unique(np.abs(values[np.isfinite(values)]))
    beyond = 2 * values[-1] - values[-2]  # what would come next
    values = np.append(values, beyond)
    ties = (values[1:] + values[:-1]) / 2
    found = np.concatenate([values, ties])
    with np.errstate(over="ignore"):
        words = found.astype(np.float32)
    assert (words.astype(np.float64) == found)[np.isfinite(words)].all()
    around = (words.view(np.uint32)[:, None] + np.array([-1, 0, 1], np.int64)).ravel()
    magnitudes = around[around >= 0].astype(np.uint32)
    return np.concatenate([magnitudes, magnitudes | np.uint32(1 << 31)])


def narrowed(words: np.ndarray, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """(FP32 words of the rounded numbers, their packed bits), by numpy and ml_dtypes."""
    form = FORMATS[dtype]
    with np.errstate(all="ignore"):
        numbers = words.view(np.float32).astype(form.numpy)
        wide = numbers.astype(np.float32)
    nan = np.isnan(wide)
    bits = numbers.view(f"u{form.bytes}").astype(np.uint16)
    return (
        np.where(nan, np.uint32(CANONICAL_NAN), wide.view(np.uint32)),
        np.where(nan, np.uint16(form.nan), bits),
    )


def widened(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """FP32 words of packed numbers, by numpy and ml_dtypes; only BF16 keeps the bits of a NaN."""
    if dtype is DType.BF16:
        return bits.astype(np.uint32) << np.uint32(16)
    with np.errstate(all="ignore"):
        wide = bits.view(FORMATS[dtype].numpy).astype(np.float32)
    return np.where(np.isnan(wide), np.uint32(CANONICAL_NAN), wide.view(np.uint32))


def _check(what: str, given: np.ndarray, got: np.ndarray, wanted: np.ndarray) -> None:
    assert len(got) == len(wanted) == len(given)
    wrong = np.flatnonzero(got != wanted)
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {len(got)} wrong, first {given[wrong[0]]:08x}: "
        f"got {got[wrong[0]]:x}, wanted {wanted[wrong[0]]:x}"
    )


@cocotb.test(timeout_time=100, timeout_unit="ms")
@cocotb.parametrize(dtype=[dtype.name for dtype in NARROW_FLOATS])
async def narrow(dut, dtype: str) -> None:
    """Rounds and packs all ties, all numbers and their neighbours, and $SYSTOLITH_VECTORS random
    words; widens every number of the type."""
    kind = DType[dtype]
    rng = numpy_rng()
    count = int(os.environ.get("SYSTOLITH_VECTORS", str(1 << 18)))
    # Numbers of any magnitude, and as many again around and below the type's range.
    spread = rng.integers(-40, 20, count // 2) + 127
    near = (spread.astype(np.uint32) << 23) | (
        rng.integers(0, 1 << 32, count // 2, dtype=np.uint32) & np.uint32(0x807FFFFF)
    )
    words = np.concatenate([CORNERS, edges(kind), random_words(rng, count - count // 2), near])
    words = np.pad(words, (0, -len(words) % COPIES))
    bits = every_number(kind)
    batches = len(words) // COPIES
    narrow_batches = -(-len(bits) // COPIES)
    assert narrow_batches <= batches

    await start(dut)
    dut.dtype.value = kind.value
    rounded: list[np.ndarray] = []
    packed: list[np.ndarray] = []
    wide: list[np.ndarray] = []
    for batch in range(batches + 1):
        await FallingEdge(dut.clk)
        if batch:
            rounded.append(unpack(dut.rounded, np.uint32, COPIES))
            packed.append(unpack(dut.bits, np.uint16, COPIES))
        if 0 < batch <= narrow_batches:
            wide.append(unpack(dut.widened, np.uint32, COPIES))
        if batch < batches:
            dut.words.value = pack(words[batch * COPIES : (batch + 1) * COPIES])
        if batch < narrow_batches:
            noise = int(rng.integers(0, 256)) << 8 if FORMATS[kind].bits == 8 else 0
            chunk = bits[batch * COPIES : (batch + 1) * COPIES].astype(np.uint16)
            dut.narrow.value = pack(chunk | np.uint16(noise))
    wanted_words, wanted_bits = narrowed(words, kind)
    _check("rounded", words, np.concatenate(rounded), wanted_words)
    # The upper half of what an 8-bit type packs to means nothing.
    mask = np.uint16((1 << FORMATS[kind].bits) - 1)
    _check("packed", words, np.concatenate(packed) & mask, wanted_bits)
    _check("widened", bits, np.concatenate(wide)[: len(bits)], widened(bits, kind))
    cocotb.log.info("%s: %d words, %d numbers", dtype, len(words), len(bits))


def at_every_cut(dtype: DType, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """FP32 words of every exponent and the random words at which they begin to be rounded up, as
    well as those just below; what is above the bits that count is random."""
    form = FORMATS[dtype]
    fields = np.repeat(np.arange(256, dtype=np.uint32), 40)
    fractions = rng.integers(0, 1 << 23, len(fields), dtype=np.uint32)
    fractions[rng.random(len(fields)) < 0.2] = 0
    fractions[rng.random(len(fields)) < 0.2] = (1 << 23) - 1
    words = fields << 23 | fractions | rng.integers(0, 2, len(fields), dtype=np.uint32) << 31
    below_normal = np.maximum(128 - form.bias - np.maximum(fields, 1).astype(int), 0)
    cut = np.minimum(23 - form.fraction + below_normal, 32).astype(np.uint64)
    significand = fractions.astype(np.uint64) | (fields > 0).astype(np.uint64) << np.uint64(23)
    unit = np.uint64(1) << cut
    least = (unit - significand) % unit  # what carries into the lowest bit that is kept
    step = rng.integers(-1, 2, len(fields))
    noise = rng.integers(0, 1 << 32, len(fields), dtype=np.uint64) // unit * unit
    return words, (noise + (least + step.astype(np.uint64)) % unit).astype(np.uint32)


@cocotb.test(timeout_time=100, timeout_unit="ms")
@cocotb.parametrize(dtype=[dtype.name for dtype in NARROW_FLOATS])
async def stochastic(dut, dtype: str) -> None:
    """Rounds all numbers, ties and their neighbours, words of every exponent at the random words
    that decide, and $SYSTOLITH_VECTORS / 4 words, with random words; against golden."""
    kind = DType[dtype]
    rng = numpy_rng()
    count = int(os.environ.get("SYSTOLITH_VECTORS", str(1 << 18))) // 4
    plain = np.concatenate([CORNERS, edges(kind), random_words(rng, count)])
    sharp, deciding = at_every_cut(kind, rng)
    words = np.concatenate([sharp, plain])
    noise = np.concatenate([deciding, rng.integers(0, 1 << 32, len(plain), dtype=np.uint32)])
    noise[rng.random(len(noise)) < 0.02] = 0
    noise[rng.random(len(noise)) < 0.02] = 0xFFFFFFFF
    words, noise = (np.pad(a, (0, -len(a) % COPIES)) for a in (words, noise))
    await start(dut)
    dut.dtype.value = kind.value
    dut.stochastic.value = 1
    rounded: list[np.ndarray] = []
    for batch in range(0, len(words), COPIES):
        dut.words.value = pack(words[batch : batch + COPIES])
        dut.random.value = pack(noise[batch : batch + COPIES])
        await FallingEdge(dut.clk)
        rounded.append(unpack(dut.rounded, np.uint32, COPIES))
    dut.stochastic.value = 0
    got = np.concatenate(rounded)
    _check("rounded", words, got, arithmetic.round_to(words, kind, noise))
    differ = int((got != arithmetic.round_to(words, kind)).sum())
    assert differ > len(words) // 20
    cocotb.log.info("%s: %d words, %d not as to nearest", dtype, len(words), differ)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def int8(dut) -> None:
    """INT8 packs to the low bits of any word and widens with its sign, every number of it."""
    rng = numpy_rng()
    numbers = np.arange(256).astype(np.uint8)
    # What is above the low bits does not matter, on either way.
    above = rng.integers(0, 1 << 24, 256, dtype=np.uint32) << np.uint32(8)
    await start(dut)
    dut.dtype.value = DType.INT8.value
    for chunk, noise in zip(numbers.reshape(-1, COPIES), above.reshape(-1, COPIES), strict=True):
        await FallingEdge(dut.clk)
        dut.words.value = pack(chunk | noise)
        dut.narrow.value = pack((chunk | noise).astype(np.uint16))
        await FallingEdge(dut.clk)
        _check("packed", chunk, unpack(dut.bits, np.uint16, COPIES).astype(np.uint8), chunk)
        wide = chunk.view(np.int8).astype(np.int32).view(np.uint32)
        _check("widened", chunk, unpack(dut.widened, np.uint32, COPIES), wide)


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def other_types_pass(dut) -> None:
    """A type that is no narrow float leaves words as they are, NaNs included."""
    rng = numpy_rng()
    words = np.concatenate([CORNERS, random_words(rng, 8 * COPIES)])
    words = np.pad(words, (0, -len(words) % COPIES)).reshape(-1, COPIES)
    await start(dut)
    for kind in (DType.FP32, DType.INT32, DType.INT8):
        dut.dtype.value = kind.value
        dut.stochastic.value = kind is DType.INT32
        for chunk in words:
            await FallingEdge(dut.clk)
            dut.words.value = pack(chunk)
            await FallingEdge(dut.clk)
            _check(kind.name, chunk, unpack(dut.rounded, np.uint32, COPIES), chunk)
