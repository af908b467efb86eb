"""Every product of two FP8 numbers: 4 pairs of types, 65536 products each."""

import ml_dtypes
import numpy as np
import pytest
from systolith.kernel import KernelBuilder
from systolith.runtime import Driver, open_backend
from systolith_hdl.config import get_config
from systolith_hdl.formats import CANONICAL_NAN, FORMATS, DType
from systolith_tb.cells import mac_results

FP8 = (DType.FP8_E4M3, DType.FP8_E5M2)
PAIRS = [(left, right) for left in FP8 for right in FP8]
IDS = [f"{left.name}-{right.name}" for left, right in PAIRS]
NANO = get_config("nano")
BYTES = np.arange(256, dtype=np.uint8)


def numbers(dtype: DType) -> np.ndarray:
    """float64 of all 256 bytes, as ml_dtypes has them."""
    return BYTES.view(FORMATS[dtype].numpy).astype(np.float64)


def words(values: np.ndarray) -> np.ndarray:
    """FP32 words of float64 numbers, NaN canonical."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    return np.where(np.isnan(found), np.uint32(CANONICAL_NAN), found.view(np.uint32))


def products(left: DType, right: DType, acc: np.ndarray | float) -> np.ndarray:
    """FP32 words [256, 256] of ``acc + left * right``, with a single rounding: the products have
    8 bits at most, so float64 holds them, and its sum with an FP32 number where it matters here."""
    with np.errstate(invalid="ignore"):
        return words(acc + numbers(left)[:, None] * numbers(right)[None, :])


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=IDS)
@pytest.mark.parametrize("kind", ["golden", "rtl"])
def test_every_product_on_the_chip(kind: str, left: DType, right: DType) -> None:
    """From FP8 bytes in DRAM through DMA, tensor engine and PSUM, one product to a sum."""
    nc = KernelBuilder(NANO, name="products")
    a = nc.dram.tensor("a", (256,), left, kind="constant", data=BYTES.view(FORMATS[left].numpy))
    b = nc.dram.tensor("b", (256,), right, kind="constant", data=BYTES.view(FORMATS[right].numpy))
    y = nc.dram.tensor("y", (256, 256), DType.FP32, kind="output")
    a_tile, b_tile = nc.sbuf.tile(256), nc.sbuf.tile(256)
    nc.dma.load(a_tile.view(lanes=1), a, 0, (1,), 0)
    nc.dma.load(b_tile.view(lanes=1), b, 0, (1,), 0)
    sums, copies = [nc.psum.tile(256) for _ in range(2)], [nc.sbuf.tile(256) for _ in range(2)]
    for block in range(256 // NANO.lanes):
        psum, copy = sums[block % 2].view(), copies[block % 2].view()
        stationary = a_tile.view((NANO.lanes,), offset=block * NANO.lanes, lanes=1)
        nc.tensor.load_stationary(stationary.astype(left))
        nc.tensor.matmul(psum, b_tile.view(lanes=1).astype(right))
        nc.vector.copy(copy, psum)
        nc.dma.store(copy, y, block * NANO.lanes * 1024, (4,), 1024)
    with Driver(open_backend(kind, NANO)) as driver:
        loaded = driver.load(nc.finish())
        counters = driver.run(loaded)
        got = driver.read(loaded.tensors["y"]).view(np.uint32)
    assert counters.macs == 256 * 256
    wanted = products(left, right, 0.0)
    np.testing.assert_array_equal(got, wanted)
    # All kinds of results are there: no reference that is NaN or zero throughout.
    assert len(np.unique(wanted)) > 300 and np.isnan(wanted.view(np.float32)).sum() > 500


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=IDS)
def test_every_product_in_the_mac(left: DType, right: DType) -> None:
    """Added to +0, to -0, which keeps the sign of a zero product, and to numbers near it: half of
    its own last place apart, and its negative, which leaves nothing."""
    with np.errstate(invalid="ignore"):
        product = numbers(left)[:, None] * numbers(right)[None, :]
    a, w = (x.ravel() for x in np.broadcast_arrays(words(numbers(left))[:, None],
                                                   words(numbers(right))[None, :]))  # fmt: skip
    finite = np.where(np.isfinite(product), product, 0.0)
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, product.shape)
    for acc in (0.0, -0.0, 1.0, -finite, finite * 2.0**24, finite * (1 + noise), noise, np.inf):
        start = words(np.broadcast_to(np.asarray(acc, np.float64), product.shape))
        got = mac_results(start.ravel(), a, w).reshape(product.shape)
        with np.errstate(invalid="ignore"):
            wanted = words(start.view(np.float32).astype(np.float64) + product)
        np.testing.assert_array_equal(got, wanted)


def test_the_numbers_are_those_of_the_formats() -> None:
    """What the references stand on, by the OCP definition."""
    for dtype, exponent_bits, fraction_bits in ((DType.FP8_E4M3, 4, 3), (DType.FP8_E5M2, 5, 2)):
        bias = (1 << exponent_bits - 1) - 1
        for byte, value in zip(BYTES.tolist(), numbers(dtype).tolist(), strict=True):
            exponent = byte >> fraction_bits & (1 << exponent_bits) - 1
            fraction = byte & (1 << fraction_bits) - 1
            sign = -1.0 if byte >> 7 else 1.0
            if dtype is DType.FP8_E5M2 and exponent == 31:
                wanted = np.nan if fraction else sign * np.inf
            elif dtype is DType.FP8_E4M3 and byte & 0x7F == 0x7F:
                wanted = np.nan
            elif exponent:
                wanted = sign * 2.0 ** (exponent - bias) * (1 + fraction / (1 << fraction_bits))
            else:
                wanted = sign * 2.0 ** (1 - bias) * (fraction / (1 << fraction_bits))
            assert np.array_equal(value, wanted, equal_nan=True)
            assert np.signbit(value) == np.signbit(wanted) or np.isnan(wanted)
    assert np.dtype(ml_dtypes.float8_e4m3fn) == FORMATS[DType.FP8_E4M3].numpy
