"""DMA in numpy against the definition, element by element."""

import itertools
import random
import struct

import numpy as np
import pytest
from systolith.golden.arithmetic import round_to
from systolith.golden.dma import DmaFault, dma_load, dma_store, first_bad_burst
from systolith_hdl.formats import FORMATS, NARROW_FLOATS, DType
from systolith_hdl.isa import DMA_TYPES, FaultCause

DRAM = 4096
DEPTH = 64
LANES = 4


def _draw(rng: random.Random) -> dict[str, int]:
    """Small counts and strides, so that elements often coincide."""
    fields = {
        "lanes": rng.randint(1, LANES),
        "lane_stride": rng.choice([0, 1, 2, 4, rng.randint(-40, 40)]),
        "dram_base": rng.randint(1000, 2000),
        "dram_dtype": rng.choice(sorted(t.value for t in DMA_TYPES)),
        "local.base": rng.randint(20, 30),
    }
    for d in range(4):
        fields[f"counts.{d}"] = rng.randint(1, 3)
        fields[f"dram_strides.{d}"] = rng.choice([0, 1, 2, 4, 16, rng.randint(-60, 60)])
        fields[f"local.strides.{d}"] = rng.randint(-2, 3)
    return fields


def _elements(fields: dict[str, int]) -> list[tuple[int, int, int]]:
    """(lane, column, byte address) of every element in the order of the definition."""
    found = []
    for index in itertools.product(*(range(fields[f"counts.{d}"]) for d in range(4))):
        column, address = fields["local.base"], fields["dram_base"]
        for d, i in enumerate(index):
            column += i * fields[f"local.strides.{d}"]
            address += i * fields[f"dram_strides.{d}"]
        for lane in range(fields["lanes"]):
            byte = (address + lane * fields["lane_stride"]) % 2**48
            found.append((lane, column, byte & ~(_size(fields) > 1)))
    return found


def _size(fields: dict[str, int]) -> int:
    return FORMATS[DType(fields["dram_dtype"])].bytes


def _packed(word: int, dtype: DType) -> int:
    """Bits of the nearest number; `test_arithmetic` holds what they must be."""
    form = FORMATS[dtype]
    if dtype is DType.INT8:
        return word % 256
    with np.errstate(all="ignore"):
        value = np.uint32(word).view(np.float32).astype(form.numpy)
    return form.nan if value != value else int(value.view(f"u{form.bytes}"))


def _widened(bits: int, dtype: DType) -> int:
    form = FORMATS[dtype]
    if dtype is DType.BF16:
        return bits << 16
    if dtype is DType.INT8:
        return bits if bits < 128 else bits + (1 << 32) - 256
    value = np.array(bits, f"u{form.bytes}").view(form.numpy).astype(np.float32)
    return 0x7FC00000 if value != value else int(value.view(np.uint32))


def _memories(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rng.getrandbits(32))
    sbuf = generator.integers(0, 1 << 32, (LANES, DEPTH), dtype=np.uint32)
    # Ties, infinities and NaN whose payload would round to infinity.
    sbuf[:, ::3] &= 0xFFFF8000
    sbuf[:, ::7] = generator.choice(
        np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF], np.uint32),
        sbuf[:, ::7].shape,
    )
    return generator.integers(0, 256, DRAM, dtype=np.uint8), sbuf


@pytest.mark.parametrize("seed", range(150))
def test_moves_every_element_in_order(seed: int) -> None:
    rng = random.Random(seed)
    fields = _draw(rng)
    dram, sbuf = _memories(rng)
    loaded, stored = sbuf.copy(), dram.copy()
    for lane, column, address in _elements(fields):
        dtype, word = DType(fields["dram_dtype"]), int(sbuf[lane, column])
        code = {1: "<B", 2: "<H", 4: "<I"}[_size(fields)]
        bits = struct.unpack_from(code, dram, address)[0]
        whole = dtype in (DType.FP32, DType.INT32, DType.UINT32)
        loaded[lane, column] = bits if whole else _widened(bits, dtype)
        struct.pack_into(code, stored, address, word if whole else _packed(word, dtype))
    target = sbuf.copy()
    dma_load(dram, target, fields)
    np.testing.assert_array_equal(target, loaded)
    target = dram.copy()
    dma_store(target, sbuf, fields)
    np.testing.assert_array_equal(target, stored)


@pytest.mark.parametrize("seed", range(30))
def test_rounds_every_element_by_its_random_word(seed: int) -> None:
    rng = random.Random(seed)
    fields = _draw(rng)
    dtype = rng.choice(NARROW_FLOATS)
    fields["dram_dtype"] = dtype.value
    dram, sbuf = _memories(rng)
    elements = _elements(fields)
    shape = fields["lanes"], len(elements) // fields["lanes"]
    words = np.random.default_rng(seed).integers(0, 1 << 32, shape, dtype=np.uint32)
    stored = dram.copy()
    for number, (lane, column, address) in enumerate(elements):
        word = words[lane, number // fields["lanes"]]
        rounded = int(round_to(sbuf[lane, column], dtype, word))
        code = {1: "<B", 2: "<H"}[_size(fields)]
        struct.pack_into(code, stored, address, _packed(rounded, dtype))
    dma_store(dram, sbuf, fields, words)
    np.testing.assert_array_equal(dram, stored)


@pytest.mark.parametrize("seed", range(100))
def test_faults_exactly_when_an_element_is_outside(seed: int) -> None:
    rng = random.Random(seed)
    fields = _draw(rng)
    fields["dram_base"] = rng.choice([0, DRAM - 4, rng.randint(0, 200), DRAM - rng.randint(0, 200)])
    size = _size(fields)
    outside = any(address + size > DRAM for _, _, address in _elements(fields))
    dram, sbuf = _memories(rng)
    for store, execute in ((False, dma_load), (True, dma_store)):
        before = dram.copy(), sbuf.copy()
        bad = first_bad_burst(fields, DRAM, LANES, store=store)
        assert (bad is not None) == outside
        if not outside:
            execute(dram, sbuf, fields)
            continue
        assert bad is not None and bad >= DRAM and bad % 8 == 0
        with pytest.raises(DmaFault) as caught:
            execute(dram, sbuf, fields)
        assert caught.value.address == bad
        wanted = FaultCause.AXI_WRITE_ERROR if store else FaultCause.AXI_READ_ERROR
        assert caught.value.cause is wanted
        np.testing.assert_array_equal(dram, before[0])
        np.testing.assert_array_equal(sbuf, before[1])
