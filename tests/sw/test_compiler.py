"""The compiler's primitives and layouts, on the golden device against JAX in float32."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from systolith import nn
from systolith_hdl.isa import Opcode, decode


@pytest.fixture(scope="module", params=["nano", "small"])
def device(request):
    with systolith.Device("golden", config=request.param, check=True) as opened:
        yield opened


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def run(device, fn, *args):
    """Calls `fn` on the device; returns (its leaves, those of JAX, the compiled function)."""
    compiled = systolith.jit(fn, device=device)
    got = compiled(*args)
    want = fn(*jax.tree.map(jnp.asarray, args))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = []
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        leaves.append((np.asarray(mine), np.asarray(theirs)))
    return leaves, compiled


def check(device, fn, *args, rtol=2e-6, atol=2e-6):
    leaves, compiled = run(device, fn, *args)
    for mine, theirs in leaves:
        np.testing.assert_allclose(
            mine.astype(np.float32), theirs.astype(np.float32), rtol=rtol, atol=atol
        )
    return compiled


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def bf16(array):
    return np.asarray(array, ml_dtypes.bfloat16).astype(np.float64)


# --- elementwise ----------------------------------------------------------------------------

UNARY = {
    "neg": lambda x: -x,
    "abs": jnp.abs,
    "sign": jnp.sign,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "erf": jax.lax.erf,
    "erfc": jax.lax.erfc,
    "square": jnp.square,
    "cube": lambda x: x**3,
    "power 5": lambda x: x**5,
    "power 0": lambda x: x**0,
    "expm1": jnp.expm1,
    "literals": lambda x: (2.0 - x) * 3.0 / 7.0 + 1.0,
    "maximum": lambda x: jnp.maximum(x, 0.25),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "relu": jax.nn.relu,
    "compare": lambda x: x > 0.1,
    "compare cast": lambda x: (x <= 0.1).astype(jnp.float32),
    "logic": lambda x: (x > 0) & ~(x > 1) | (x < -1) ^ (x < -2),
    "where": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "where literal": lambda x: jnp.where(x > 0, 1.0, x),
    "where literals": lambda x: jnp.where(x > 0, 1.0, -2.0),
    "isfinite": jnp.isfinite,
    "stop_gradient": lambda x: jax.lax.stop_gradient(x) + x,
    "gelu": nn.gelu,
    "gelu tanh": jax.nn.gelu,
    "gelu erfc": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "nn softplus": nn.softplus,
    "nn gelu tanh": lambda x: nn.gelu(x, approximate=True),
    "nn silu": nn.silu,
    "nn mish": nn.mish,
    "nn leaky_relu": nn.leaky_relu,
    "steep leaky_relu": lambda x: nn.leaky_relu(x, 2.5),
    "arctan": jnp.arctan,
    "sin": jnp.sin,
    "cos": lambda x: jnp.cos(1e4 * x),
    "elu": jax.nn.elu,
    "iota": lambda x: x + jnp.arange(x.shape[-1]),
    "astype bool": lambda x: x.astype(bool),
    "checkpoint": jax.checkpoint(lambda x: jnp.tanh(x) * 2.0),
    "inner jit": jax.jit(lambda x: jnp.tanh(x) * 2.0),
    "grad gelu": lambda x: jax.grad(lambda v: nn.gelu(v).sum())(x),
    "grad gelu tanh": lambda x: jax.grad(lambda v: jax.nn.gelu(v).sum())(x),
    "grad grad gelu": lambda x: jax.grad(lambda v: jax.grad(lambda u: nn.gelu(u).sum())(v).sum())(
        x
    ),
    "grad softplus": lambda x: jax.grad(lambda v: jax.nn.softplus(v).sum())(x),
    "grad nn softplus": lambda x: jax.grad(lambda v: nn.softplus(v).sum())(x),
    "grad nn gelu tanh": lambda x: jax.grad(lambda v: nn.gelu(v, approximate=True).sum())(x),
    "grad nn silu": lambda x: jax.grad(lambda v: nn.silu(v).sum())(x),
    "grad nn mish": lambda x: jax.grad(lambda v: nn.mish(v).sum())(x),
    "grad nn leaky_relu": lambda x: jax.grad(lambda v: nn.leaky_relu(v, 0.2).sum())(x),
    "grad grad nn silu": lambda x: jax.grad(
        lambda v: jax.grad(lambda u: nn.silu(u).sum())(v).sum()
    )(x),
    "grad grad nn mish": lambda x: jax.grad(
        lambda v: jax.grad(lambda u: nn.mish(u).sum())(v).sum()
    )(x),
    "grad sin": lambda x: jax.grad(lambda v: jnp.sin(jnp.cos(v)).sum())(x),
    "grad arctan": lambda x: jax.grad(lambda v: jnp.arctan(v).sum())(x),
    "grad relu": lambda x: jax.grad(lambda v: jax.nn.relu(v).sum())(x),
    "grad abs": lambda x: jax.grad(lambda v: jnp.abs(v).sum())(x),
}

POSITIVE = {
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "reciprocal": lambda x: 1.0 / x,
    "power -2": lambda x: x**-2,
    "power 0.5": lambda x: x**0.5,
    "power -0.5": lambda x: x**-0.5,
    "power 1.5": lambda x: x**1.5,
    "exponent": lambda x: 2.5**x,
    "log2": jnp.log2,
}


@pytest.mark.parametrize("shape", [(), (1,), (11,), (5, 7), (16, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize("name", ["literals", "where", "gelu", "tanh", "compare", "iota"])
def test_shapes(device, rng, name, shape):
    if name == "iota" and not shape:
        shape = (2,)
    check(device, UNARY[name], floats(rng, *shape), rtol=4e-6)


@pytest.mark.parametrize("name", UNARY)
def test_unary(device, rng, name):
    check(device, UNARY[name], floats(rng, 5, 7), rtol=1e-5)


@pytest.mark.parametrize("name", POSITIVE)
def test_positive(device, rng, name):
    check(device, POSITIVE[name], np.abs(floats(rng, 5, 7)) + 0.01, rtol=1e-5)


def test_small_arguments_keep_their_precision(device):
    x = np.float32([1e-8, -1e-8, 3e-6, -4e-4, 0.0, 1e-3])
    check(device, lambda x: (jnp.expm1(x), jnp.log1p(x)), x, rtol=2e-6, atol=0)


def test_special_values(device):
    x = np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, -1.0, 3e-38])
    for fn in (jnp.sign, jnp.abs, jnp.exp, jnp.tanh, jnp.log1p, jnp.expm1, jnp.isfinite):
        leaves, _ = run(device, fn, x)
        np.testing.assert_allclose(*leaves[0], rtol=1e-5, err_msg=fn.__name__)
    leaves, _ = run(device, lambda x: (jnp.sign(x), x * 1.0, jnp.maximum(x, -jnp.inf)), x)
    for mine, theirs in leaves:
        np.testing.assert_array_equal(np.signbit(mine[:2]), np.signbit(theirs[:2]))
        np.testing.assert_array_equal(np.signbit(mine[3:5]), np.signbit(theirs[3:5]))


@pytest.mark.parametrize(
    "left,right",
    [
        ((5, 7), (5, 7)), ((5, 7), (7,)), ((5, 7), (1, 7)), ((5, 7), (5, 1)), ((5, 7), ()),
        ((5, 1), (1, 7)), ((6,), ()), ((6,), (6,)), ((1, 6), (9, 1)), ((17, 9), (9,)),
        ((17, 9), (17, 1)),
    ],
)  # fmt: skip
def test_broadcasting(device, rng, left, right):
    def fn(x, y):
        return x + y, x * y, x - y, y - x, x / (y * y + 1.0), jnp.maximum(x, y), x < y, x == x * y

    check(device, fn, floats(rng, *left), floats(rng, *right))


def test_masks_as_arguments(device, rng):
    mask = rng.integers(0, 2, (5, 7)).astype(bool)
    check(device, lambda m, x: (jnp.where(m, x, 2.0), ~m, m), mask, floats(rng, 5, 7))


NARROW = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("name", NARROW)
def test_narrow_types(device, rng, name):
    kind = jnp.dtype(name)
    x = floats(rng, 5, 7).astype(kind)

    def fn(x):
        # Every operation rounds, as it does in JAX when it is not fused.
        y = x * jnp.asarray(3, kind) + x
        wide = y.astype(jnp.float32)
        return y, wide + 1.0, (wide * 1.001).astype(kind), jnp.where(x > 0, x, y).T

    leaves, _ = run(device, fn, x)
    for mine, theirs in leaves:
        np.testing.assert_array_equal(mine, theirs)


def test_conversions_between_narrow_types(device, rng):
    """Each type to each other one, with overflow, subnormals and NaN."""
    for old, new in itertools.permutations(NARROW, 2):
        with np.errstate(all="ignore"):
            x = floats(rng, 122) * np.float32(10) ** rng.integers(-6, 6, 122)
            x[:2] = 0, np.nan
            x = x.astype(jnp.dtype(old))
            want = x.astype(np.float32).astype(jnp.dtype(new)).astype(np.float32)
        got = np.asarray(systolith.jit(lambda x, new=new: x.astype(new), device=device)(x))
        assert got.dtype == jnp.dtype(new)
        np.testing.assert_array_equal(got.astype(np.float32), want, err_msg=f"{old} to {new}")


def chain(a, b, tiles):
    """The documented sum: in the order of k, one rounding to float32 for each product, and one
    for each tile of k."""
    total = None
    for first in range(0, a.shape[1], tiles):
        acc = np.zeros((a.shape[0], b.shape[1]), np.float32)
        for k in range(first, min(first + tiles, a.shape[1])):
            product = np.float64(a[:, k])[:, None] * np.float64(b[k])
            acc = np.float32(np.float64(acc) + product)
        total = acc if total is None else total + acc
    return total


@pytest.mark.parametrize("left", NARROW)
@pytest.mark.parametrize("right", NARROW)
def test_products_of_narrow_arrays(device, rng, left, right):
    """Both operands as they are, bit for bit the documented sum; so are float32 operands under
    `matmul=`, and a product of two arrays of one type is rounded to it."""
    a = floats(rng, 6, 21).astype(jnp.dtype(left))
    b = floats(rng, 21, 9).astype(jnp.dtype(right))
    want = chain(a, b, device.config.lanes)

    def mixed(a, b):
        dims = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    got = systolith.jit(mixed, device=device)(a, b)
    np.testing.assert_array_equal(np.asarray(got), want)
    wide = systolith.jit(mixed, device=device, matmul=left)(a.astype(np.float32), b)
    np.testing.assert_array_equal(np.asarray(wide), want)
    if left == right:
        same = systolith.jit(lambda a, b: a @ b, device=device)(a, b)
        np.testing.assert_array_equal(np.asarray(same), want.astype(a.dtype))
        turned = systolith.jit(lambda a, b: b.T @ a.T, device=device)(a, b)
        np.testing.assert_array_equal(np.asarray(turned), want.T.astype(a.dtype))


@pytest.mark.parametrize("name", NARROW)
def test_matmul_rounds_float32_operands(device, rng, name):
    a, b = floats(rng, 6, 21), floats(rng, 21, 9)
    got = systolith.jit(lambda a, b: a @ b, device=device, matmul=name)(a, b)
    narrow = (v.astype(jnp.dtype(name)) for v in (a, b))
    np.testing.assert_array_equal(np.asarray(got), chain(*narrow, device.config.lanes))


# --- shapes ---------------------------------------------------------------------------------

SHAPES = {
    "transpose": lambda x: x.T,
    "transpose twice": lambda x: (x.T * 2.0).T + x,
    "add transposed": lambda x: x @ x.T + (x @ x.T).T,
    "flatten": lambda x: x.reshape(-1) * 2.0,
    "reshape": lambda x: (x + 1.0).reshape(x.shape[1], x.shape[0]) * 2.0,
    "reshape of a transpose": lambda x: (x + 1.0).T.reshape(-1) * 2.0,
    "expand": lambda x: x[0][:, None] * x[0][None, :],
    "slice": lambda x: x[1:4, ::2] + 1.0,
    "slice of a result": lambda x: (x * 2.0)[1:, 2:5],
    "slice of a transpose": lambda x: (x * 2.0).T[1:3, 1:],
    "row": lambda x: x[2] * 2.0,
    "column": lambda x: x[:, 2] * 2.0,
    "split": lambda x: jnp.split(x * 2.0, [2, 3], axis=1),
    "same twice": lambda x: (x + 1.0, x + 1.0),
    "passed through": lambda x: (x, x.T, x[0]),
    "constants": lambda x: (jnp.ones((3, 5)), jnp.arange(4.0), 2.0 * jnp.eye(3), jnp.float32(1.5)),
    "broadcast out": lambda x: (
        jnp.broadcast_to(x[0], x.shape),
        jnp.broadcast_to(x[:, :1], x.shape),
        jnp.broadcast_to(x.sum(), (3, 5)),
    ),
    "sum of a broadcast": lambda x: (x[:, :1] + jnp.zeros(x.shape)).sum(1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_operations(device, rng, name):
    check(device, SHAPES[name], floats(rng, 5, 7), rtol=1e-2 if "@" in name else 2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (7, 1), (13,), (), (33, 18)])
def test_reductions(device, rng, shape):
    def fn(x):
        results = [x.sum(), x.max(), x.min(), x.mean(), (x > 0).any(), (x > -9).all()]
        for axis in range(x.ndim):
            results += [x.sum(axis), x.max(axis), (x * 2.0).min(axis), x.mean(axis)]
            results += [x - x.mean(axis, keepdims=True), x.var(axis)]
        return results

    check(device, fn, floats(rng, *shape), atol=1e-5)


def test_softmax_and_norms(device, rng):
    def fn(x):
        return (
            jax.nn.softmax(x),
            jax.nn.softmax(x, axis=0),
            jax.nn.log_softmax(x),
            jax.nn.logsumexp(x, axis=1),
            (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-5),
            jnp.linalg.norm(x),
        )

    check(device, fn, floats(rng, 13, 10), rtol=1e-5)


# --- matrix products ------------------------------------------------------------------------


PRODUCTS = [(1, 1, 5), (3, 5, 7), (4, 4, 4), (8, 8, 8), (9, 17, 5), (1, 9, 6), (6, 9, 1), (1, 1, 1),
            (5, 1, 7), (33, 2, 18)]  # fmt: skip


@pytest.mark.parametrize("m,k,f", PRODUCTS)
def test_products(device, rng, m, k, f):
    a, b = floats(rng, m, k), floats(rng, k, f)
    exact = bf16(a) @ bf16(b)
    for name, (fn, args) in {
        "ab": (lambda a, b: a @ b, (a, b)),
        "abt": (lambda a, b: a @ b.T, (a, b.T.copy())),
        "atb": (lambda a, b: a.T @ b, (a.T.copy(), b)),
        "atbt": (lambda a, b: a.T @ b.T, (a.T.copy(), b.T.copy())),
        "btat": (lambda a, b: (b.T @ a.T).T, (a, b)),
        "einsum": (lambda a, b: jnp.einsum("mk,kf->mf", a, b), (a, b)),
    }.items():
        leaves, compiled = run(device, fn, *args)
        if (m, f) != (1, 1):
            np.testing.assert_allclose(leaves[0][0], exact, rtol=1e-5, atol=1e-5, err_msg=name)
            assert compiled.stats()["macs"] == m * k * f
        else:  # computed elementwise, in float32
            np.testing.assert_allclose(*leaves[0], rtol=1e-5)


def test_products_with_vectors(device, rng):
    a, x, y = floats(rng, 9, 5), floats(rng, 5), floats(rng, 9)

    def fn(a, x, y):
        return a @ x, y @ a, jnp.dot(x, x), jnp.outer(x, y), jnp.vdot(a, a)

    (ax, ya, xx, outer, aa), _ = run(device, fn, a, x, y)
    np.testing.assert_allclose(ax[0], bf16(a) @ bf16(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ya[0], bf16(y) @ bf16(a), rtol=1e-5, atol=1e-5)
    for mine, theirs in (xx, outer, aa):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_product_larger_than_psum(device, rng):
    rows = device.config.lanes + 1
    a, b = floats(rng, rows, 3), floats(rng, 3, device.config.psum_depth)
    leaves, compiled = run(device, lambda a, b: (a @ b) * 2.0, a, b)
    np.testing.assert_allclose(leaves[0][0], 2 * (bf16(a) @ bf16(b)), rtol=1e-5, atol=1e-5)
    assert compiled.stats()["macs"] == rows * 3 * device.config.psum_depth


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_tiles_side_by_side_in_dram_are_loaded_together(device, rng, tiles):
    """Rows of the left operand lie along K, as the partitions do: two tiles of K make one run."""
    lanes = device.config.lanes
    a, b = floats(rng, 8 * lanes, tiles * lanes), floats(rng, tiles * lanes, lanes)
    fn = systolith.jit(lambda a, b: a @ b, device=device)
    np.testing.assert_allclose(np.asarray(fn(a, b)), bf16(a) @ bf16(b), rtol=1e-5, atol=1e-5)
    joined = []
    for engine, stream in fn.program.streams.items():
        for at in range(0, len(stream) if engine.startswith("dma") else 0, 64):
            opcode, fields = decode(stream[at : at + 64])
            if opcode is Opcode.DMA_LOAD and fields["lane_stride"] == a.itemsize:
                joined.append((fields["dram_base"] % (tiles * lanes * 4), fields["counts.3"]))
    assert joined
    columns = {at // (lanes * 4) % tiles: count for at, count in joined}
    assert columns == {tile: min(2, tiles - tile) for tile in range(0, tiles, 2)}


def test_many_products_wait_in_psum(device, rng):
    # Each fits, together they do not: some must leave PSUM before they are read.
    width = device.config.psum_depth // 4
    a, b = floats(rng, 4, 3), floats(rng, 3, width)

    def fn(a, b):
        parts = [(a * float(i)) @ b for i in range(1, 8)]
        total = parts[0]
        for part in parts[1:]:
            total = total * part
        return total

    exact = np.prod([bf16(np.float32(i) * a) @ bf16(b) for i in range(1, 8)], axis=0)
    leaves, _ = run(device, fn, a, b)
    np.testing.assert_allclose(leaves[0][0], exact, rtol=1e-4, atol=1e-2)


def test_garbage_lanes_do_not_leak(device, rng):
    # The partial last tiles of a and b sit above lanes that hold NaN.
    lanes = device.config.lanes
    nan = np.full((2 * lanes, 8), np.nan, np.float32)
    a, b = floats(rng, lanes + 1, lanes + 1), floats(rng, lanes + 1, 3)

    def fn(nan, a, b):
        poison = nan * 2.0
        return jnp.isnan(poison).all(), (a * 1.0) @ (b + 0.0), (a + 1.0).sum(0), (a + 1.0).sum(1)

    leaves, _ = run(device, fn, nan, a, b)
    assert leaves[0][0]
    np.testing.assert_allclose(leaves[1][0], bf16(a) @ bf16(b), rtol=1e-5, atol=1e-5)
    for mine, theirs in leaves[2:]:
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_spills_to_dram_when_sbuf_is_full(rng):
    with systolith.Device("golden", config="nano", check=True) as device:
        # Eight values of 400 columns live at once, in 2048.
        x = floats(rng, 4, 400)

        def fn(x):
            parts = [jnp.tanh(x * (0.1 * i)) for i in range(1, 9)]
            total = jnp.zeros_like(x)
            for i, part in enumerate(parts):
                total = total + part * parts[-1 - i]
            return total

        compiled = check(device, fn, x, rtol=1e-5)
        assert any(t.kind == "scratch" for t in compiled.program.tensors)


# --- passes ---------------------------------------------------------------------------------


def test_fusion(device, rng):
    compiled = systolith.jit(
        lambda p, m, g: (p - 0.1 * (0.9 * m + g), 0.9 * m + g, jnp.exp(0.5 * g - 1.0)),
        device=device,
    )
    x = floats(rng, 3, 5)
    lines = compiled.compile(x, x, x).dumps["layout"].splitlines()
    kinds = [line.split(" = ")[1].split("(")[0] for line in lines if " = " in line]
    assert sorted(kinds) == ["act", "tt", "tt"]
    compiled(x, x, x)
    instructions = compiled.stats()["instructions"]
    assert instructions["vector"] + instructions["scalar"] == 3 + 2  # and an END each


def test_transposes_vanish(device, rng):
    a, b = floats(rng, 5, 6), floats(rng, 7, 6)
    compiled = systolith.jit(lambda a, b: ((a @ b.T).T * 2.0).T, device=device)
    np.testing.assert_allclose(compiled(a, b), 2 * (bf16(a) @ bf16(b).T), rtol=1e-5, atol=1e-5)
    assert not any(t.kind == "scratch" for t in compiled.program.tensors)


def test_every_pass_dumps_its_ir(device, rng):
    compiled = systolith.jit(lambda x: jnp.tanh(x @ x.T), device=device)
    dumps = compiled.compile(floats(rng, 3, 5)).dumps
    assert list(dumps) == ["trace", "dead code", "fuse", "layout", "schedule"]
    assert "@rows" in dumps["layout"] or "@cols" in dumps["layout"]
    assert "test_compiler.py" in dumps["trace"]


def test_debug_map_names_the_users_lines(device, rng):
    compiled = systolith.jit(lambda x: nn.gelu(x), device=device)
    compiled(floats(rng, 3, 5))
    entries = {entry.source for entry in compiled.program.debug["scalar"] if entry.source}
    assert any("test_compiler.py" in source for source in entries)


@pytest.mark.parametrize(
    "name", ["gelu tanh", "silu", "mish", "leaky_relu"]
)  # fmt: skip
def test_activations_are_one_instruction(device, rng, name):
    """And what they are under JAX is what JAX has of that name, derivatives included."""
    approximate = {"approximate": True} if name == "gelu tanh" else {}
    mine = functools.partial(getattr(nn, name.split()[0]), **approximate)
    theirs = functools.partial(getattr(jax.nn, name.split()[0]), **approximate)
    x = 4 * floats(rng, 64)
    for ours, reference in ((mine, theirs), (jax.vmap(jax.grad(mine)), jax.vmap(jax.grad(theirs)))):
        # Two formulas of one function, both in float32.
        error = float(np.abs(ours(x) - reference(x)).max())
        print(f"{name}: {error:.1e}")
        assert error < 4e-6
    compiled = systolith.jit(mine, device=device)
    compiled(x)
    engines = [e for e, _, raw in compiled.program.instructions() if decode(raw)[0] != Opcode.END]
    assert engines.count("vector") + engines.count("scalar") == 1


def test_remainders(device, rng):
    """Exact, with the sign of the first operand; `%` has that of the second."""
    a, b = (floats(rng, 5, 7) * 10.0 ** rng.integers(-9, 9, (5, 7)) for _ in "ab")
    a, b = a.astype(np.float32), b.astype(np.float32)
    a[0], b[0] = 0.0, 2.0
    a[1, :3], b[2, :3] = (np.inf, np.nan, 3.0), (np.inf, np.nan, 0.0)

    def fn(a, b):
        grad = jax.grad(lambda x: jnp.fmod(x * x, 0.75).sum())(b)
        return jax.lax.rem(a, b), a % b, jnp.fmod(a, 0.3), jax.lax.rem(100.0, b), -a % 2.5, grad

    with np.errstate(invalid="ignore"):
        wanted = (
            np.fmod(a, b), np.mod(a, b), np.fmod(a, np.float32(0.3)), np.fmod(np.float32(100), b),
            np.mod(-a, np.float32(2.5)), 2 * b,
        )  # fmt: skip
    for mine, want in zip(systolith.jit(fn, device=device)(a, b), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), want)


# --- refusals -------------------------------------------------------------------------------


def test_unsupported_primitive_names_everything(device):
    def fn(x):
        return jnp.sort(x * 2.0)  # the guilty line

    with pytest.raises(systolith.UnsupportedError) as caught:
        systolith.jit(fn, device=device)(np.zeros((3, 5), np.float32))
    message = str(caught.value)
    assert "'sort'" in message and "float32[3,5]" in message
    assert "test_compiler.py" in message and "the guilty line" in message


@pytest.mark.parametrize(
    "fn,words",
    [
        (lambda x: x[None] * jnp.ones((2, 1, 1)), "two dimensions"),
        (lambda x: jnp.einsum("bi,bi->b", x, x), "batched"),
        (lambda x: x.astype(jnp.int16), "int16"),
        (lambda x: x.astype(jnp.float8_e4m3b11fnuz), "float8_e4m3b11fnuz"),
        (lambda x: jnp.dot(x, x.T, precision="BF16_BF16_F32"), "precision"),
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x), "supported"),
        (lambda x: jnp.zeros((2, 2, 2)), "rank"),
    ],
)
def test_refusals(device, fn, words):
    with pytest.raises(systolith.UnsupportedError, match=words):
        systolith.jit(fn, device=device)(np.ones((3, 5), np.float32))


def test_step_that_does_not_fit_names_what_is_large():
    with systolith.Device("golden", config="nano", check=True) as device:
        x = np.ones((4, 1500), np.float32)
        with pytest.raises(systolith.CompileError) as caught:
            systolith.jit(lambda x, y: jnp.tanh(x) * y, device=device)(x, x)
    message = str(caught.value)
    assert "2048" in message and "1500 columns" in message and "test_compiler.py" in message


# --- whole steps ----------------------------------------------------------------------------


def relative(mine, theirs):
    return float(np.abs(mine - theirs).max() / (np.abs(theirs).max() + 1e-30))


@pytest.mark.parametrize("activation", [nn.gelu, jax.nn.gelu, jnp.tanh, jax.nn.relu])
def test_training_step(device, rng, activation):
    sizes = (64, 32, 10)
    params = {
        f"{kind}{i}": floats(rng, *shape) * 0.1
        for i in (0, 1)
        for kind, shape in (("w", sizes[i : i + 2]), ("b", sizes[i + 1 : i + 2]))
    }
    x = floats(rng, 16, 64)
    labels = np.eye(10, dtype=np.float32)[rng.integers(0, 10, 16)]

    def loss(p, x, y):
        logits = activation(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]
        return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=-1))

    leaves, compiled = run(device, jax.value_and_grad(loss), params, x, labels)
    errors = [relative(*pair) for pair in leaves]
    print(f"relative errors against float32: {max(errors):.2e}")
    assert max(errors) < 2e-2
    # Forward, weight gradients, and the gradient of the hidden layer: nothing else multiplies.
    assert compiled.stats()["macs"] == 16 * (2 * 64 * 32 + 3 * 32 * 10)


def test_deep_network_of_odd_sizes_tracks_jax(device):
    rng = np.random.default_rng(3)
    sizes, batch, steps = (13, 37, 21, 3), 19, 30
    params = [
        (floats(rng, a, b) / math.sqrt(a), np.zeros(b, np.float32))
        for a, b in itertools.pairwise(sizes)
    ]
    x = floats(rng, batch, 13)
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2], np.cos(x[:, 3])], 1).astype(np.float32)

    def loss(params, x, y):
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = params[-1]
        return jnp.mean((x @ w + b - y) ** 2)

    def step(params, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads), value

    on_chip = systolith.jit(step, device=device)
    in_jax = jax.jit(step)
    mine, theirs = params, params
    curves = []
    for _ in range(steps):
        mine, my_loss = on_chip(mine, x, y)
        theirs, their_loss = in_jax(theirs, x, y)
        curves.append((float(my_loss), float(their_loss)))
    curves = np.array(curves)
    apart = np.abs(curves[:, 0] - curves[:, 1]) / curves[0, 1]
    print(f"loss {curves[0, 1]:.4f} -> {curves[-1, 1]:.4f}, apart at most {apart.max():.2e}")
    assert curves[-1, 0] < 0.3 * curves[0, 0]
    assert apart.max() < 1e-2
    products = 2 * 13 * 37 + 3 * 37 * 21 + 3 * 21 * 3
    assert on_chip.stats()["macs"] == batch * products
