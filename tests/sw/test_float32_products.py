"""Matrix products of float32 operands in BF16 parts: the documented sum, its error, its ends."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith

BF16 = ml_dtypes.bfloat16
LARGEST = np.float32(ml_dtypes.finfo(BF16).max)


@pytest.fixture(scope="module", params=["nano", "small"])
def device(request):
    with systolith.Device("golden", config=request.param, check=True) as opened:
        yield opened


def parts(x):
    """Three BF16 numbers, as float32, whose sum x is."""

    def bf16(v):
        return v.astype(BF16).astype(np.float32)

    with np.errstate(invalid="ignore"):
        high = bf16(np.clip(x, -LARGEST, LARGEST))
        middle = bf16(x - high)
        return high, middle, bf16(x - high - middle)


def tile(w, x):
    acc = np.zeros((w.shape[1], x.shape[1]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for k in range(len(w)):
            acc = np.float32(np.float64(acc) + np.float64(w[k])[:, None] * np.float64(x[k]))
    return acc


def product(a, b, lanes, a_parts=None, b_parts=None):
    """The documented sum of ``a @ b``, bit for bit."""
    a_parts, b_parts = a_parts or parts(a), b_parts or parts(b)
    pairs = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]
    total = None
    for start in range(0, a.shape[1], 128):
        stop = min(start + 128, a.shape[1])
        partial = None
        for i, j in pairs:
            if i >= len(a_parts) or j >= len(b_parts):
                continue
            for k in range(start, stop, lanes):
                end = min(k + lanes, stop)
                done = tile(a_parts[i].T[k:end], b_parts[j][k:end])
                with np.errstate(invalid="ignore", over="ignore"):
                    partial = done if partial is None else partial + done
        with np.errstate(invalid="ignore", over="ignore"):
            total = partial if total is None else total + partial
    return total


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), ~numbers)
    unsigned = {2: np.uint16, 4: np.uint32}[want.dtype.itemsize]
    np.testing.assert_array_equal(got.view(unsigned)[numbers], want.view(unsigned)[numbers])


def floats(seed, *shape):
    """Numbers of all sizes whose products of a hundred stay in range."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-12, 13, shape)
    return (rng.normal(size=shape) * scale).astype(np.float32)


def matmul(a, b):
    return a @ b


@pytest.mark.parametrize(
    ("m", "k", "n"), [(2, 3, 1), (5, 11, 7), (9, 64, 3), (6, 129, 5), (3, 300, 6)]
)
def test_bit_for_bit_the_documented_sum(device, m, k, n):
    a, b = floats(1, m, k), floats(2, k, n)
    lanes = device.config.lanes
    got = systolith.jit(matmul, device=device, matmul="float32")(a, b)
    same_bits(got, product(a, b, lanes))
    turned = systolith.jit(lambda a, b: b.T @ a.T, device=device, matmul="float32")(a, b)
    same_bits(turned, product(b.T, a.T, lanes))
    magnitude = np.abs(a).astype(np.float64) @ np.abs(b)
    assert (np.abs(np.asarray(got) - a.astype(np.float64) @ b) <= 2**-21 * magnitude).all()


def test_products_with_vectors_and_of_other_axes(device):
    a, v, w = floats(3, 9, 21), floats(4, 21), floats(5, 9)

    def fn(a, v, w):
        return a @ v, w @ a, jnp.einsum("ki,kj->ij", a, a), jnp.einsum("ik,jk->ij", a, a)

    lanes = device.config.lanes
    got = systolith.jit(fn, device=device, matmul="float32")(a, v, w)
    same_bits(got[0], product(a, v[:, None], lanes)[:, 0])
    same_bits(got[1], product(w[None], a, lanes)[0])
    same_bits(got[2], product(a.T, a, lanes))
    same_bits(got[3], product(a, a.T, lanes))


def test_gradients(device):
    """Both products of the backward pass are of the same kind."""
    x, w, g = floats(6, 7, 13), floats(7, 13, 9), floats(8, 7, 9)

    def fn(x, w, g):
        return jax.vjp(matmul, x, w)[1](g)

    dx, dw = systolith.jit(fn, device=device, matmul="float32")(x, w, g)
    lanes = device.config.lanes
    same_bits(dx, product(g, w.T, lanes))
    same_bits(dw, product(x.T, g, lanes))


def test_a_training_step_is_as_close_to_jax_as_float32_gets(device):
    rng = np.random.default_rng(9)
    params = [rng.normal(size=s).astype(np.float32) / 3 for s in ((10, 7), (7, 3))]
    x, y = (rng.normal(size=s).astype(np.float32) for s in ((12, 10), (12, 3)))

    def step(params, x, y):
        def loss(params):
            return ((jnp.maximum(x @ params[0], 0) @ params[1] - y) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, [p - 0.1 * g for p, g in zip(params, grads, strict=True)]

    compiled = systolith.jit(step, device=device, matmul="float32")
    mine, theirs = params, params
    for _ in range(5):
        value, mine = compiled(mine, x, y)
        expected, theirs = step(theirs, x, y)
        np.testing.assert_allclose(float(value), float(expected), rtol=3e-6)
    for ours, jaxs in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(jaxs), rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float8_e4m3fn"])
def test_a_narrow_operand_is_one_part(device, kind):
    narrow = np.random.default_rng(10).normal(size=(5, 19)).astype(jnp.dtype(kind))
    b = floats(11, 19, 6)

    def fn(a, b):
        return jnp.matmul(a, b, preferred_element_type=jnp.float32), a.astype(jnp.float32) @ b

    # float32 is what both are for numpy and JAX; the second is one for the chip as well.
    for precision, mode in ((None, "float32"), ("highest", "bfloat16")):
        with jax.default_matmul_precision(precision):
            got = systolith.jit(fn, device=device, matmul=mode)(narrow, b)
        wide = narrow.astype(np.float32)
        want = product(wide, b, device.config.lanes, a_parts=(wide,))
        same_bits(got[0], want)
        same_bits(got[1], want)


def test_the_result_may_be_narrow(device):
    a, b = floats(12, 5, 150), floats(13, 150, 6)

    def fn(a, b):
        return jnp.matmul(a, b).astype(jnp.bfloat16)

    got = systolith.jit(fn, device=device, matmul="float32")(a, b)
    same_bits(got, product(a, b, device.config.lanes).astype(BF16))


def test_precision_selects_it_for_one_product(device):
    a, b = floats(14, 6, 21), floats(15, 21, 9)
    low, high = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST

    def fn(a, b):
        return (
            jnp.matmul(a, b),
            jnp.matmul(a, b, precision=high),
            jnp.matmul(a, b, precision="high"),
            jnp.matmul(a, b, precision=(low, high)),
        )

    rounded, *exact = systolith.jit(fn, device=device)(a, b)
    lanes = device.config.lanes
    want = product(a, b, lanes)
    for got in exact:
        same_bits(got, want)
    one_pass = product(a, b, lanes, (parts(a)[0],), (parts(b)[0],))
    same_bits(rounded, one_pass)
    assert (one_pass != want).any()


@pytest.mark.parametrize(
    ("config", "k"),
    [*(("nano", k) for k in (64, 256, 1024)), *(("medium", k) for k in (64, 256, 1024, 4096))],
)
def test_error_is_no_larger_than_numpys(config, k):
    """Over seeds, against float64, in [-1, 1] and normal: RMS no larger than of `a @ b`, which sums
    as this processor's BLAS does; maximum no larger than of sums in order."""
    with systolith.Device("golden", config=config, check=True) as device:
        fn = systolith.jit(matmul, device=device, matmul="float32")
        for normal in (False, True):
            mine, theirs, in_order = [], [], []
            for seed in range(8):
                rng = np.random.default_rng(seed)
                a, b = (
                    (rng.normal(size=s) if normal else rng.uniform(-1, 1, s)).astype(np.float32)
                    for s in ((4, k), (k, 6))
                )
                exact = a.astype(np.float64) @ b.astype(np.float64)
                mine.append(np.asarray(fn(a, b)) - exact)
                theirs.append(a @ b - exact)
                in_order.append(sum(a[:, i, None] * b[i] for i in range(k)) - exact)
            assert np.square(mine).mean() <= np.square(theirs).mean(), (normal, k)
            assert np.abs(mine).max() <= np.abs(in_order).max(), (normal, k)


def test_numbers_near_the_ends_of_the_range(device):
    """Beyond BF16's largest number nothing is lost; what lies below 2**-134 of an operand is."""
    fn = systolith.jit(matmul, device=device, matmul="float32")
    lanes = device.config.lanes
    identity = np.eye(4, dtype=np.float32)
    rng = np.random.default_rng(16)
    words = rng.integers(0x7F7F0000, 0x7F800000, (6, 4)).astype(np.uint32)
    large = words.view(np.float32) * np.where(rng.random((6, 4)) < 0.5, -1, 1).astype(np.float32)
    assert np.isinf(large.astype(BF16)).any()
    same_bits(fn(large, identity), large)
    same_bits(fn(large, identity / 2), large / 2)
    small = rng.integers(0, 1 << 27, (6, 4)).astype(np.uint32).view(np.float32)
    same_bits(fn(small, identity), product(small, identity, lanes))
    lost = np.abs(np.asarray(fn(small, identity)).astype(np.float64) - small)
    assert 0 < lost.max() <= 2.0**-134
    # The product of two that multiply to a normal number is as exact as any.
    smallest = np.float32(2.0**-110) * (1 + rng.random((6, 4)).astype(np.float32))
    scale = identity * np.float32(2.0**100)
    same_bits(fn(smallest, scale), smallest * np.float32(2.0**100))


def test_infinities_and_nan_give_nan(device):
    fn = systolith.jit(matmul, device=device, matmul="float32")
    a, b = floats(17, 5, 4), floats(18, 4, 3)
    for value in (np.inf, -np.inf, np.nan):
        bad = a.copy()
        bad[2, 1] = value
        got = np.asarray(fn(bad, b))
        assert np.isnan(got[2]).all()
        same_bits(np.delete(got, 2, 0), np.delete(product(a, b, device.config.lanes), 2, 0))
        same_bits(got, product(bad, b, device.config.lanes))
    # Sums beyond FP32 are infinite.
    huge = np.full((2, 4), 2.0**80, np.float32)
    assert (np.asarray(fn(huge, huge.T)) == np.inf).all()


def test_the_gates_do_the_same():
    a, b = floats(19, 6, 133), floats(20, 133, 5)
    a[0, 0], b[1, 1], a[2, 5] = np.float32(3.4e38), np.float32(1e-42), np.inf
    results = []
    for kind in ("golden", "rtl"):
        with systolith.Device(kind, config="nano") as device:
            fn = systolith.jit(matmul, device=device, matmul="float32")
            results.append(np.asarray(fn(a, b)))
            same_bits(results[-1], product(a, b, device.config.lanes))
    assert results[0].tobytes() == results[1].tobytes()
