"""Integers from `jit` to the gates, bit for bit those of numpy and JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from hypothesis import given, settings
from hypothesis import strategies as st
from systolith.kernel import DType, KernelBuilder
from systolith_hdl.config import get_config

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module", params=["nano", "small"])
def device(request):
    with systolith.Device("golden", config=request.param, check=True) as opened:
        yield opened


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def int8(rng, *shape):
    """The whole range, its ends often: products of -128 are the largest."""
    anything = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.3, rng.choice([-128, 127], shape), anything).astype(
        np.int8
    )


def wide(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.int32)


def product(a, b):
    return a.astype(np.int32) @ b.astype(np.int32)


def same(got, want):
    got = np.asarray(got)
    assert got.dtype == want.dtype and got.shape == want.shape
    if got.dtype.itemsize == 1 and got.dtype != np.int8:
        got, want = got.astype(np.float32), want.astype(np.float32)  # numpy knows no NaN of FP8
    np.testing.assert_array_equal(got, want)


# --- products -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "m,k,f", [(4, 4, 4), (1, 1, 1), (5, 3, 2), (8, 16, 8), (7, 29, 11), (1, 40, 9), (13, 17, 1),
              (1, 50, 1)]
)  # fmt: skip
def test_products(device, rng, m, k, f):
    a, b = int8(rng, m, k), int8(rng, k, f)
    want = product(a, b)
    same(systolith.jit(wide, device=device)(a, b), want)
    same(systolith.jit(lambda a, b: wide(b.T, a.T), device=device)(a, b), want.T)
    same(systolith.jit(lambda at, b: wide(at.T, b), device=device)(a.T.copy(), b), want)
    same(systolith.jit(lambda a, bt: wide(a, bt.T), device=device)(a, b.T.copy()), want)
    # An int8 result wraps, as JAX has it.
    same(systolith.jit(lambda a, b: a @ b, device=device)(a, b), want.astype(np.int8))
    # The other way to say it.
    both = systolith.jit(lambda a, b: a.astype(jnp.int32) @ b.astype(jnp.int32), device=device)
    same(both(a, b), want)


def test_vectors(device, rng):
    a, b, x, y = int8(rng, 6, 19), int8(rng, 6, 19), int8(rng, 19), int8(rng, 19)
    same(systolith.jit(wide, device=device)(a, x), product(a, x))
    same(systolith.jit(wide, device=device)(x, a.T.copy()), product(x, a.T))
    same(systolith.jit(wide, device=device)(x, y), np.asarray(product(x, y)))
    for spec, want in (
        ("ij,ij->", (a.astype(np.int32) * b).sum(dtype=np.int32)),
        ("ij,ji->", (a.astype(np.int32) * b).sum(dtype=np.int32)),
    ):
        other = b.T.copy() if "ji" in spec else b
        fn = systolith.jit(
            lambda a, b, spec=spec: jnp.einsum(spec, a, b, preferred_element_type=jnp.int32),
            device=device,
        )
        same(fn(a, other), np.asarray(want))

    def outer(x, y):
        return jax.lax.dot_general(x, y, (((), ()), ((), ())), preferred_element_type=jnp.int32)

    same(systolith.jit(outer, device=device)(x, y), np.multiply.outer(x.astype(np.int32), y))


def test_results_go_on(device, rng):
    """Results in PSUM and SBUF are operands, are laid out anew, and are outputs more than once."""
    a, b, c = int8(rng, 9, 13), int8(rng, 13, 10), int8(rng, 10, 6)

    def fn(a, b, c):
        narrow = a @ b
        return wide(narrow, c), narrow.T, wide(b.T, a.T), wide(a, b), narrow

    got = systolith.jit(fn, device=device)(a, b, c)
    narrow = product(a, b).astype(np.int8)
    for mine, want in zip(
        got, (product(narrow, c), narrow.T, product(a, b).T, product(a, b), narrow), strict=True
    ):
        same(mine, want)


def test_products_larger_than_the_memories(rng):
    """Streamed through PSUM, and with operands and results that go through DRAM."""
    with systolith.Device("golden", config="nano", check=True) as device:
        a, b, c = int8(rng, 30, 40), int8(rng, 40, 60), int8(rng, 60, 50)
        same(systolith.jit(wide, device=device)(a, b), product(a, b))
        chained = systolith.jit(lambda a, b, c: wide(a @ b, c), device=device)
        same(chained(a, b, c), product(product(a, b).astype(np.int8), c))


def test_constants(device, rng):
    a, b = int8(rng, 5, 21), int8(rng, 21, 7)
    same(systolith.jit(lambda a: wide(a, b), device=device)(a), product(a, b))
    ones = systolith.jit(lambda a: wide(a, jnp.ones((21, 3), jnp.int8)), device=device)
    same(ones(a), np.repeat(a.sum(1, dtype=np.int32)[:, None], 3, 1))
    # int32, but all of them int8.
    small = systolith.jit(lambda a: a.astype(jnp.int32) @ b.astype(np.int32), device=device)
    same(small(a), product(a, b))
    known = systolith.jit(lambda a: (a, jnp.arange(-3, 4), jnp.int8(-7)), device=device)(a)
    same(known[1], np.arange(-3, 4, dtype=np.int32))
    same(known[2], np.asarray(-7, np.int8))


def test_sums_wrap():
    """2**17 products of -128 by -128 are 2**31: one more, and the sum is negative."""
    k = (1 << 17) + 777
    rng = np.random.default_rng(3)
    a, b = np.full((1, k), -128, np.int8), int8(rng, k, 3)
    b[:, 0] = -128
    with systolith.Device("golden", config="medium", check=True) as device:
        got = np.asarray(systolith.jit(wide, device=device)(a, b))
    np.testing.assert_array_equal(got, product(a, b))
    assert got[0, 0] == (k << 14) - (1 << 32)


@settings(max_examples=50, deadline=None)
@given(
    start=st.integers(-(1 << 31), (1 << 31) - 1),
    near=st.sampled_from([0, 1 << 31]),
    seed=st.integers(0, 2**32 - 1),
)
def test_accumulation_wraps(start, near, seed):
    """A kernel that adds tiles to any INT32 number."""
    config = get_config("nano")
    n = config.lanes
    rng = np.random.default_rng(seed)
    w, x = int8(rng, 3 * n, n), int8(rng, 3 * n, 5)
    start = (start >> 12 if near else start) + near
    initial = np.full((n, 5), start, np.int64).astype(np.int32)
    nc = KernelBuilder(config)
    w_dram = nc.dram.tensor("w", w.shape, DType.INT8)
    x_dram = nc.dram.tensor("x", x.shape, DType.INT8)
    s_dram = nc.dram.tensor("s", initial.shape, DType.INT32)
    y_dram = nc.dram.tensor("y", initial.shape, DType.INT32, kind="output")
    sums, words = nc.psum.tile(5).view().astype(DType.INT32), nc.sbuf.tile(5).view()
    nc.dma.load(words, s_dram, lane_stride=20)
    nc.vector.copy(sums, words.astype(DType.INT32))
    for k in range(0, 3 * n, n):
        stationary, moving = nc.sbuf.tile(n).view(), nc.sbuf.tile(5).view()
        nc.dma.load(stationary, w_dram, k * n, lane_stride=n)
        nc.dma.load(moving, x_dram, k * 5, lane_stride=5)
        nc.tensor.load_stationary(stationary.astype(DType.INT8))
        nc.tensor.matmul(sums, moving.astype(DType.INT8), accumulate=True)
    nc.vector.copy(words.astype(DType.INT32), sums)
    nc.dma.store(words, y_dram, lane_stride=20)
    with systolith.Device("golden", config="nano", check=True) as device:
        driver = device.driver
        loaded = driver.load(nc.finish())
        for name, value in (("w", w), ("x", x), ("s", initial)):
            driver.write(loaded.tensors[name], value)
        driver.run(loaded)
        same(driver.read(loaded.tensors["y"]), initial + product(w.T, x))


# --- INT8 and floats ------------------------------------------------------------------------


def chain(a, b, lanes):
    """The documented sum, in FP32."""
    total = None
    for first in range(0, a.shape[1], lanes):
        acc = np.zeros((a.shape[0], b.shape[1]), np.float32)
        for k in range(first, min(first + lanes, a.shape[1])):
            terms = np.float64(a[:, k])[:, None] * np.float64(b[k])
            acc = np.float32(np.float64(acc) + terms)
        total = acc if total is None else total + acc
    return total


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_int8_weights_of_float_activations(device, rng, name):
    kind = jnp.dtype(name)
    x, w = rng.normal(size=(6, 21)).astype(np.float32), int8(rng, 21, 9)
    narrow = x.astype(kind)
    want = chain(narrow, w, device.config.lanes)

    def mixed(x, w):
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)

    for matmul in {name, "bfloat16"}:
        got = systolith.jit(mixed, device=device, matmul=matmul)(narrow, w)
        same(got, want)
    same(systolith.jit(lambda x, w: x @ w, device=device)(narrow, w), want.astype(kind))
    # float32 activations are rounded to what `matmul=` names, the weights are not.
    same(systolith.jit(lambda x, w: x @ w, device=device, matmul=name)(x, w), want)
    same(systolith.jit(lambda x, w: w.T @ x.T, device=device, matmul=name)(x, w), want.T)
    converted = systolith.jit(lambda x, w: x @ w.astype(jnp.float32), device=device, matmul=name)
    same(converted(x, w), want)
    if kind.itemsize == 2:  # the types that hold every int8
        same(systolith.jit(lambda x, w: x @ w.astype(kind), device=device)(narrow, w),
             want.astype(kind))  # fmt: skip


def test_int8_weights_of_float32_in_parts(device, rng):
    """``matmul="float32"`` splits the activations only: an int8 is one part."""
    x, w = rng.normal(size=(6, 150)).astype(np.float32), int8(rng, 150, 9)
    fn = systolith.jit(lambda x, w: x @ w, device=device, matmul="float32")
    got = np.asarray(fn(x, w), np.float64)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w.astype(np.float64))
    assert (np.abs(got - exact) <= 2.0**-20 * magnitude).all()
    assert "parts=(3, 1)" in fn.compiled.dumps["fuse"]


def test_stochastic_rounding_leaves_integers_alone(device, rng):
    a, b = int8(rng, 9, 13), int8(rng, 13, 10)
    fn = systolith.jit(lambda a, b: (wide(a, b), (a @ b).T), device=device, rounding="stochastic")
    got = fn(a, b)
    same(got[0], product(a, b))
    same(got[1], product(a, b).astype(np.int8).T)


# --- moves ----------------------------------------------------------------------------------

MOVES = {
    "identity": lambda x: x,
    "twice": lambda x: (x, x.T),
    "transpose": lambda x: x.T,
    "reshape": lambda x: x.reshape(x.shape[1], x.shape[0]),
    "flatten": lambda x: x.T.reshape(-1),
    "slice": lambda x: x[1:4, ::2],
    "row and column": lambda x: (x[1], x[:, 2], x[0, 0]),
    "split": lambda x: jnp.split(x, 2, axis=1),
    "broadcast": lambda x: jnp.broadcast_to(x[:1], (3, x.shape[1])),
    "spread": lambda x: jnp.broadcast_to(x[:, 1][:, None], (x.shape[0], 5)),
    "all": lambda x: jnp.broadcast_to(x[2, 1], (9, 5)),
    "where": lambda x: jnp.where(jnp.ones((5, 1)) > 0, x[:5], x[-5:]),
    "expand": lambda x: x[None, 0, :].squeeze(0),
}


@pytest.mark.parametrize("kind", [np.int8, np.int32])
@pytest.mark.parametrize("fn", MOVES.values(), ids=MOVES.keys())
def test_moves(device, rng, fn, kind):
    info = np.iinfo(kind)
    x = rng.integers(info.min, info.max, (10, 6), endpoint=True).astype(kind)
    x[0, :3] = info.min, info.max, -1
    got, want = systolith.jit(fn, device=device)(x), fn(jnp.asarray(x))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        same(mine, np.asarray(theirs))


@pytest.mark.parametrize("kind", [np.int8, np.int32])
def test_choices(device, rng, kind):
    info = np.iinfo(kind)
    a, b = (rng.integers(info.min, info.max, (5, 7), endpoint=True).astype(kind) for _ in "ab")
    x = rng.normal(size=(5, 7)).astype(np.float32)
    fn = systolith.jit(
        lambda x, a, b: (jnp.where(x > 0, a, b), jnp.where(x > 0, a, kind(-3))), device=device
    )
    got = fn(x, a, b)
    same(got[0], np.where(x > 0, a, b))
    same(got[1], np.where(x > 0, a, kind(-3)))


def test_casts_between_integers(device, rng):
    """Modulo the size, as numpy's `astype`."""
    a = rng.integers(-(1 << 31), 1 << 31, (6, 9)).astype(np.int32)
    b, c = int8(rng, 6, 9), int8(rng, 9, 9)

    def fn(a, b, c):
        down = a.astype(jnp.int8)
        return down, down.astype(jnp.int32).T, b.T.astype(jnp.int32), wide(down, c), (
            wide(b, c).astype(jnp.int8).astype(jnp.int32)
        )  # fmt: skip

    got = systolith.jit(fn, device=device)(a, b, c)
    down = a.astype(np.int8)
    wants = (down, down.astype(np.int32).T, b.T.astype(np.int32), product(down, c),
             product(b, c).astype(np.int8).astype(np.int32))  # fmt: skip
    for mine, want in zip(got, wants, strict=True):
        same(mine, want)


# --- arithmetic -----------------------------------------------------------------------------

ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: (a - b, 7 - a),
    "mul": lambda a, b: (a * b, a * 100),
    "min and max": lambda a, b: (jnp.minimum(a, b), jnp.maximum(a, b), jnp.clip(a, 1, 50)),
    "bits": lambda a, b: (a & b, a | b, a ^ b, ~a),
    "compares": lambda a, b: (a == b, a != b, a < b, a <= b, a > b, a >= 7),
    "one operand": lambda a, b: (-a, jnp.abs(a), jnp.sign(a), jnp.square(a), a**3),
    "div": lambda a, b: (jax.lax.div(a, b), jax.lax.div(a, b.dtype.type(7))),
    "rem": lambda a, b: (jax.lax.rem(a, b), jax.lax.rem(b.dtype.type(100), b)),
    "floor": lambda a, b: (a // b, a % b),
    "shifts": lambda a, b: (
        jax.lax.shift_left(a, b & 7),
        jax.lax.shift_right_arithmetic(a, b & 7),
    ),
    "choice": lambda a, b: jnp.where(a > b, a + 1, b * 2),
    "chain": lambda a, b: ((a ^ (a >> 3)) * 27 + b) ^ (b << 2),
    "sums": lambda a, b: (jnp.sum(a, 1, dtype=a.dtype), jnp.sum(a.T, 1, dtype=a.dtype)),
    "extremes": lambda a, b: (jnp.max(a, 0), jnp.min(a, 1), jnp.max(b)),
    "products": lambda a, b: jnp.prod(a, 1, dtype=a.dtype),
    "bits of all": lambda a, b: (
        jnp.bitwise_and.reduce(a, axis=1),
        jnp.bitwise_or.reduce(a, axis=0),
        jnp.bitwise_xor.reduce(a, axis=1),
    ),
    "counts": lambda a, b: jnp.sum((a > b).astype(jnp.int32)),
    "broadcasts": lambda a, b: a + b[0] * jnp.arange(a.shape[1], dtype=a.dtype),
    "conversions": lambda a, b: (
        a.astype(jnp.int32), a.astype(jnp.uint32), a.astype(jnp.int8), a.astype(bool),
        a.astype(jnp.float32) * 0.5, (a > b).astype(a.dtype) + a,
    ),
}  # fmt: skip


def any_integers(rng, kind, *shape):
    """The whole range, small numbers often, never 0."""
    info = np.iinfo(kind)
    anything = rng.integers(info.min, info.max, shape, endpoint=True)
    small = rng.integers(max(-5, info.min), 9, shape)
    found = np.where(rng.random(shape) < 0.3, small, anything)
    return np.where(found == 0, 3, found).astype(kind)


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int8])
@pytest.mark.parametrize("fn", ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_arithmetic(device, rng, fn, kind):
    a, b = any_integers(rng, kind, 7, 10), any_integers(rng, kind, 7, 10)
    got, want = systolith.jit(fn, device=device)(a, b), jax.jit(fn)(a, b)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        same(mine, np.asarray(theirs))


@pytest.mark.parametrize("kind", [np.int32, np.uint32])
def test_logical_shift(device, rng, kind):
    a, b = any_integers(rng, kind, 5, 8), rng.integers(0, 40, (5, 8)).astype(kind)
    fn = systolith.jit(jax.lax.shift_right_logical, device=device)
    same(
        fn(a, b), np.where(b < 32, a.view(np.uint32) >> (b & 31).astype(np.uint32), 0).astype(kind)
    )


@pytest.mark.parametrize("kind", [np.int32, np.uint32])
@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
def test_conversions_to_narrow_floats_round_once(device, rng, kind, narrow):
    """Halfway between two numbers and one beside it: with two roundings both would go the same
    way."""
    bits = 8 if narrow == jnp.bfloat16 else 11
    top = 30 if narrow == jnp.bfloat16 else 15
    tie = (1 << top) + (1 << top - bits)
    a = np.array([[tie - 1, tie, tie + 1, 3, tie + (1 << top - bits + 1)]], kind)
    got = systolith.jit(lambda a: a.astype(narrow), device=device)(a)
    below, above = 1 << top, (1 << top) + (1 << top - bits + 1)
    want = [below, below, above, 3, above + (1 << top - bits + 1)]
    assert np.asarray(got).astype(np.float64)[0].tolist() == want


def test_conversions_of_floats(device):
    """Toward zero, within the range of the type, NaN to 0: as JAX has it here."""
    x = np.array([[1.5, -2.7, 3e9, -3e9, np.nan, np.inf, -np.inf, 0.5, 127.9, 2**31]], np.float32)
    for kind in (jnp.int32, jnp.uint32, jnp.int8):
        fn = lambda x, kind=kind: (x.astype(kind), (x > 0).astype(kind), -x.astype(kind))  # noqa: E731
        for mine, theirs in zip(systolith.jit(fn, device=device)(x), jax.jit(fn)(x), strict=True):
            same(mine, np.asarray(theirs))


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn,words",
    [
        (lambda a, i, x: jax.lax.population_count(i), "'population_count' is not supported"),
        (
            lambda a, i, x: jax.lax.reduce_xor(x > 0, (0,)),
            "'reduce_xor' is supported for integers only.*bool",
        ),
        (lambda a, i, x: jax.lax.shift_right_logical(a, a), "zeros cannot come in.*int8\\[3,3\\]"),
        (lambda a, i, x: i @ i, "must be int8.*preferred_element_type=jnp.int32"),
        (lambda a, i, x: a.astype(jnp.int32) @ jnp.full((3, 3), 1000), "must be int8"),
        (lambda a, i, x: jnp.argmax(x), "argmax"),
    ],
)
def test_refusals(device, fn, words):
    args = np.ones((3, 3), np.int8), np.ones((3, 3), np.int32), np.ones((3, 3), np.float32)
    with pytest.raises(systolith.UnsupportedError, match=f"(?s){words}") as caught:
        systolith.jit(fn, device=device)(*args)
    assert "test_integers.py" in str(caught.value)


def test_numbers_of_the_host(device):
    assert systolith.jit(lambda x: x, device=device)(np.int32(-(1 << 31))).item() == -(1 << 31)
    assert float(device.put(np.int8(-128))) == -128.0


# --- gates ----------------------------------------------------------------------------------


def test_same_bits_on_the_gates(rng):
    """All kinds of products and moves, with K > N, odd shapes and long sums; results of golden
    and of the gates are numpy's."""
    a, b, i = int8(rng, 7, 23), int8(rng, 23, 9), rng.integers(-(1 << 31), 1 << 31, (5, 6))
    i = i.astype(np.int32)
    x = rng.normal(size=(7, 23)).astype(np.float32)

    def fn(a, b, i, x):
        narrow = a @ b
        return (
            wide(a, b), narrow, wide(narrow.T, a), i.T, i[1:, ::2].reshape(-1), i.astype(jnp.int8),
            a.T.astype(jnp.int32), x @ b, (i * 3 - 7) >> 2, jax.lax.div(i, i >> 9 | 1),
            i.astype(jnp.float32), x.astype(jnp.int32), jnp.max(i, 1),
        )  # fmt: skip

    narrow = product(a, b).astype(np.int8)
    wants = [product(a, b), narrow, product(narrow.T, a), i.T, i[1:, ::2].reshape(-1),
             i.astype(np.int8), a.T.astype(np.int32), chain(x.astype(BF16), b, 4),
             (i * 3 - 7) >> 2, np.asarray(jax.lax.div(i, i >> 9 | 1)),
             i.astype(np.float32), x.astype(np.int32), i.max(1)]  # fmt: skip
    for kind in ("golden", "rtl"):
        with systolith.Device(kind, config="nano") as device:
            for mine, want in zip(systolith.jit(fn, device=device)(a, b, i, x), wants, strict=True):
                same(mine, want)
