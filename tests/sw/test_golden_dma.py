"""DMA in numpy against the definition, element by element."""

import itertools
import random
import struct

import numpy as np
import pytest
from systolith.golden.dma import DmaFault, dma_load, dma_store, first_bad_burst
from systolith_hdl.formats import DType
from systolith_hdl.isa import FaultCause

DRAM = 4096
DEPTH = 64
LANES = 4


def _draw(rng: random.Random) -> dict[str, int]:
    """Small counts and strides, so that elements often coincide."""
    fields = {
        "lanes": rng.randint(1, LANES),
        "lane_stride": rng.choice([0, 2, 4, rng.randint(-40, 40)]),
        "dram_base": rng.randint(1000, 2000),
        "dram_dtype": rng.choice([DType.FP32, DType.BF16]).value,
        "local.base": rng.randint(20, 30),
    }
    for d in range(4):
        fields[f"counts.{d}"] = rng.randint(1, 3)
        fields[f"dram_strides.{d}"] = rng.choice([0, 2, 4, 16, rng.randint(-60, 60)])
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
            found.append((lane, column, (address + lane * fields["lane_stride"]) % 2**48 & ~1))
    return found


def _bf16(word: int) -> int:
    """Rounds by comparing with the neighbours, exactly, in integers: magnitudes are monotonic."""
    if word & 0x7FFFFFFF > 0x7F800000:
        return 0x7FC0
    low, rest = word >> 16, word & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low & 1))


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
        if fields["dram_dtype"] == DType.FP32.value:
            loaded[lane, column] = struct.unpack_from("<I", dram, address)[0]
            struct.pack_into("<I", stored, address, int(sbuf[lane, column]))
        else:
            loaded[lane, column] = struct.unpack_from("<H", dram, address)[0] << 16
            struct.pack_into("<H", stored, address, _bf16(int(sbuf[lane, column])))
    target = sbuf.copy()
    dma_load(dram, target, fields)
    np.testing.assert_array_equal(target, loaded)
    target = dram.copy()
    dma_store(target, sbuf, fields)
    np.testing.assert_array_equal(target, stored)


@pytest.mark.parametrize("seed", range(100))
def test_faults_exactly_when_an_element_is_outside(seed: int) -> None:
    rng = random.Random(seed)
    fields = _draw(rng)
    fields["dram_base"] = rng.choice([0, DRAM - 4, rng.randint(0, 200), DRAM - rng.randint(0, 200)])
    size = 4 if fields["dram_dtype"] == DType.FP32.value else 2
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
