"""FP8 at twice the rate: compiled products on a core with `fp8_rate` 2, bit for bit the documented
sum, on the golden device and on the gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from systolith.errors import DeviceFault
from systolith.golden import GoldenDevice
from systolith.kernel import DType, KernelBuilder
from systolith.runtime.driver import Driver
from systolith.runtime.rtl import RtlBackend
from systolith_hdl.config import PRESETS, ConfigError, CoreConfig
from systolith_tb.configs import NANO_FP8

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LANES = NANO_FP8.lanes


@pytest.fixture(scope="module", params=["golden", "rtl"])
def device(request: pytest.FixtureRequest) -> Iterator[systolith.Device]:
    with systolith.Device(request.param, config=NANO_FP8) as device:
        yield device


def formula(a: np.ndarray, b: np.ndarray, lanes: int) -> np.ndarray:
    """The documented sum of pairs: see docs/numerics.md."""
    a, b = a.astype(np.float32), b.astype(np.float32)

    def products(k: int) -> np.ndarray:
        return np.outer(a[:, k], b[k])

    depth = a.shape[1]
    whole = depth // lanes
    paired = whole - whole % 2
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    steps = [*range(0, paired, 2), *range(paired, -(-depth // lanes))]
    for number, tile in enumerate(steps):
        acc = np.zeros_like(total)
        for k in range(tile * lanes, min(tile * lanes + lanes, depth)):
            acc += products(k) + products(k + lanes) if tile < paired else products(k)
        total = total + acc if number else acc
    return total


def wide(a: jax.Array, b: jax.Array) -> jax.Array:
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


@pytest.mark.parametrize("left", [E4M3, E5M2])
@pytest.mark.parametrize("right", [E4M3, E5M2])
@pytest.mark.parametrize("depth", [3, 4, 7, 8, 13, 16, 31])
def test_products(device: systolith.Device, left: type, right: type, depth: int) -> None:
    rng = np.random.default_rng(depth)
    # Exponents far apart, so that pairs and sums are rounded.
    a = (rng.standard_normal((6, depth)) * 2.0 ** rng.integers(-6, 6, (6, depth))).astype(left)
    b = (rng.standard_normal((depth, 9)) * 2.0 ** rng.integers(-6, 6, (depth, 9))).astype(right)
    product = systolith.jit(wide, device=device)
    want = formula(a, b, LANES)
    np.testing.assert_array_equal(np.asarray(product(a, b)).view(np.uint32), want.view(np.uint32))
    pairs = product.disassemble().count("MATMUL_PAIR")
    assert (pairs > 0) == (depth >= 2 * LANES)
    assert product.stats()["macs"] == 6 * depth * 9
    if depth == 31:
        turned = systolith.jit(lambda a, b: wide(b.T, a.T), device=device)
        np.testing.assert_array_equal(np.asarray(turned(a, b)), want.T)
        if left is right:
            name = np.dtype(left).name
            rounded = systolith.jit(wide, device=device, matmul=name)
            x, y = a.astype(np.float32), b.astype(np.float32)
            np.testing.assert_array_equal(np.asarray(rounded(x, y)), want)


def test_larger_product(device: systolith.Device) -> None:
    """Blocks of rows, and a result that takes PSUM in turns."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((21, 24)).astype(E4M3)
    b = rng.standard_normal((24, 130)).astype(E5M2)
    product = systolith.jit(wide, device=device)
    np.testing.assert_array_equal(np.asarray(product(a, b)), formula(a, b, LANES))


def test_special_numbers(device: systolith.Device) -> None:
    """Infinities, NaNs and zeros of both signs in pairs."""
    rng = np.random.default_rng(1)
    values = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 448, 2.0**-9], np.float32)
    a = rng.choice(values, (16, 24), p=[0.2, 0.2, 0.2, 0.2, 0.02, 0.02, 0.02, 0.1, 0.04])
    b = rng.choice(values[:4], (24, 16))
    with np.errstate(invalid="ignore"):
        a, b = a.astype(E5M2), b.astype(E4M3)
        want = formula(a, b, LANES)
    found = np.asarray(systolith.jit(wide, device=device)(a, b))
    assert 0 < np.isnan(want).sum() < want.size and np.isinf(want).any()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    real = ~np.isnan(want)
    assert (found.view(np.uint32)[real] == want.view(np.uint32)[real]).all()


def test_other_types_as_on_a_core_without_pairs(device: systolith.Device) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((9, 20)), rng.standard_normal((20, 9))
    with systolith.Device("golden", config="nano", check=True) as plain:
        for left, right in ((ml_dtypes.bfloat16, E4M3), (np.float16, np.float16)):
            x, y = a.astype(left), b.astype(right)
            product = systolith.jit(wide, device=device)
            expected = np.asarray(systolith.jit(wide, device=plain)(x, y))
            np.testing.assert_array_equal(np.asarray(product(x, y)), expected)
            assert "PAIR" not in product.disassemble()


def test_a_core_without_pairs_refuses_the_instructions() -> None:
    """A program that claims to be for such a core: ILLEGAL_OPCODE, on the gates too."""
    nc = KernelBuilder(NANO_FP8)
    tile = nc.sbuf.tile(16).view((4,)).astype(DType.FP8_E4M3)
    nc.tensor.load_stationary(tile, tile)
    nc.tensor.matmul(nc.psum.tile(4).view(), tile, pair=tile)
    program = dataclasses.replace(nc.finish(), config=PRESETS["nano"])
    for backend in (GoldenDevice("nano"), RtlBackend(program.config)):
        with Driver(backend) as driver:
            loaded = driver.load(program)
            with pytest.raises(DeviceFault) as caught:
                driver.run(loaded)
        fault = caught.value
        assert (fault.engine, fault.pc, fault.cause) == ("tensor", 0, "ILLEGAL_OPCODE")


def test_configuration() -> None:
    assert PRESETS["medium-fp8"].fp8_rate == 2
    plain = PRESETS["nano"]
    assert plain.fp8_rate == 1 and plain.hash != NANO_FP8.hash
    assert NANO_FP8.peak_macs_per_cycle == 2 * plain.peak_macs_per_cycle
    with pytest.raises(ConfigError, match="fp8_rate must be 1 or 2, not 4"):
        CoreConfig(name="x", lanes=4, sbuf_depth=2048, psum_bank_depth=64, fp8_rate=4)
