"""The kernel library against numpy, over odd shapes, on a device that checks; on the gates the same
bits."""

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from systolith import kernels
from systolith.errors import KernelError

BF16 = ml_dtypes.bfloat16
#: largest error of a sum of products of bfloat16 operands, as part of the sum of magnitudes
EPSILON = 2.0**-7


def array(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.normal(size=shape).astype(dtype)


@pytest.fixture
def rng(request) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="module")
def nano():
    with systolith.Device("golden", config="nano", check=True) as device:
        yield device


@pytest.fixture(scope="module")
def small():
    with systolith.Device("golden", config="small", check=True) as device:
        yield device


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).astype(np.float32)


def close(got: Any, want: np.ndarray, tolerance: float = 1e-5, scale: float = 0.0) -> None:
    """Within `tolerance` of the largest element, or of `scale` if that is larger."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape
    scale = max(scale, float(np.abs(want).max()), 1e-30)
    error = float(np.abs(got - want).max()) / scale
    print(f"error {error:.1e}, at most {tolerance:.1e}, of {scale:.2g}")
    assert error <= tolerance


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("m,k,f", [(1, 1, 1), (4, 4, 4), (5, 7, 3), (13, 9, 30), (3, 90, 140)])
def test_matmul(nano, rng, layout: str, m: int, k: int, f: int) -> None:
    a = array(rng, *((k, m) if layout[0] == "t" else (m, k)))
    b = array(rng, *((f, k) if layout[1] == "t" else (k, f)))
    turned = {"transpose_a": layout[0] == "t", "transpose_b": layout[1] == "t"}
    got = kernels.matmul.on(nano, **turned)(a, b)
    x, y = bf16(a.T if layout[0] == "t" else a), bf16(b.T if layout[1] == "t" else b)
    close(got, x.astype(np.float64) @ y, 1e-6)


def test_matmul_types(nano, rng) -> None:
    a, b = array(rng, 5, 6, dtype=BF16), array(rng, 6, 7, dtype=np.float16)
    got = kernels.matmul.on(nano, operands="float16", dtype="bfloat16")(a, b)
    assert got.dtype == BF16
    close(got, a.astype(np.float16).astype(np.float64) @ b.astype(np.float64), EPSILON)


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_gradient_of_matmul(nano, rng, layout: str) -> None:
    a, b, g = array(rng, 5, 6), array(rng, 6, 7), array(rng, 5, 7)
    left, right = layout[0] == "t", layout[1] == "t"
    a, b = (a.T if left else a), (b.T if right else b)

    def fn(a: Any, b: Any, g: Any) -> Any:
        product = lambda a, b: kernels.matmul(a, b, transpose_a=left, transpose_b=right)  # noqa: E731
        return jax.vjp(product, a, b)[1](g)

    da, db = systolith.jit(fn, device=nano)(a, b, g)
    x, y, z = (bf16(v).astype(np.float64) for v in (a, b, g))
    x, y = (x.T if left else x), (y.T if right else y)
    want_a, want_b = z @ y.T, x.T @ z
    close(da, want_a.T if left else want_a)
    close(db, want_b.T if right else want_b)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (7, 3), (3, 11), (9, 300)])
@pytest.mark.parametrize("dtype", [np.float32, BF16, ml_dtypes.float8_e4m3fn])
def test_transpose(nano, rng, shape, dtype) -> None:
    x = array(rng, *shape, dtype=dtype)
    got = np.asarray(kernels.transpose.on(nano)(x))
    assert got.tobytes() == np.ascontiguousarray(x.T).tobytes()


# --- rows ---------------------------------------------------------------------------------------

SHAPES = [(1, 1), (4, 8), (3, 5), (13, 7), (41, 30), (6, 400)]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum(nano, rng, shape, reverse: bool) -> None:
    x, g = array(rng, *shape), array(rng, *shape)

    def sums(x: np.ndarray, reverse: bool) -> np.ndarray:
        x = x[:, ::-1] if reverse else x
        found = np.cumsum(x, axis=1, dtype=np.float32)
        return found[:, ::-1] if reverse else found

    got = kernels.cumsum.on(nano, reverse=reverse)(x)
    np.testing.assert_array_equal(np.asarray(got), sums(x, reverse))
    fn = lambda x, g: jax.vjp(lambda x: kernels.cumsum(x, reverse=reverse), x)[1](g)[0]  # noqa: E731
    gradient = systolith.jit(fn, device=nano)(x, g)
    np.testing.assert_array_equal(np.asarray(gradient), sums(g, not reverse))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [True, False])
def test_top_k(nano, rng, shape, largest: bool) -> None:
    k = min(8, shape[1])
    x = array(rng, *shape)
    values, indices = kernels.top_k.on(nano, k=k, largest=largest)(x)
    want = np.argsort(-x if largest else x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.asarray(indices), want)
    np.testing.assert_array_equal(np.asarray(values), np.take_along_axis(x, want, axis=1))


def test_top_k_in_jit(nano, rng) -> None:
    x = array(rng, 9, 30)
    fn = lambda x: kernels.top_k(jnp.exp(x), k=3)  # noqa: E731
    values, indices = systolith.jit(fn, device=nano)(x)
    want = np.argsort(-x, axis=1)[:, :3]
    np.testing.assert_array_equal(np.asarray(indices), want)
    close(values, np.exp(np.take_along_axis(x, want, axis=1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(nano, rng, shape) -> None:
    x, g = 5 * array(rng, *shape), array(rng, *shape)
    y = softmax(x)
    close(kernels.softmax.on(nano)(x), y)
    _, dx = systolith.jit(
        lambda x, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(kernels.softmax, x)), device=nano
    )(x, g)
    close(dx, y * (g - (y * g).sum(-1, keepdims=True)))


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(nano, rng, shape) -> None:
    x, labels = 3 * array(rng, *shape), rng.random(shape).astype(np.float32)
    g = array(rng, shape[0])
    log = np.log(softmax(x))

    def fn(x: Any, labels: Any, g: Any) -> Any:
        loss, pull = jax.vjp(kernels.cross_entropy, x, labels)
        return loss, pull(g)

    loss, (dx, d_labels) = systolith.jit(fn, device=nano)(x, labels, g)
    close(loss, -(labels * log).sum(-1))
    close(dx, (softmax(x) * labels.sum(-1, keepdims=True) - labels) * g[:, None])
    close(d_labels, -log * g[:, None])
    close(kernels.cross_entropy.on(nano)(x, labels), -(labels * log).sum(-1))


@pytest.mark.parametrize("shape", [*SHAPES[1:-1], (6, 260), (2, 1)])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms(nano, rng, kind: str, shape) -> None:
    x, g = 2 * array(rng, *shape) + 1, array(rng, *shape)
    gain, bias = array(rng, shape[1]), array(rng, shape[1])
    vectors = (gain, bias) if kind == "layernorm" else (gain,)
    eps = 1e-2

    def reference(x: Any, gain: Any, *bias: Any) -> Any:
        if bias:
            x = x - x.mean(-1, keepdims=True)
        h = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return h * gain + (bias[0] if bias else 0)

    function = getattr(kernels, kind)

    def fn(x: Any, g: Any, *vectors: Any) -> Any:
        y, pull = jax.vjp(lambda *args: function(*args, eps=eps), x, *vectors)
        return y, pull(g)

    with jax.enable_x64(True):
        want, pull = jax.vjp(reference, *(jnp.asarray(v, jnp.float64) for v in (x, *vectors)))
        gradients = [np.asarray(v) for v in pull(jnp.asarray(g, jnp.float64))]
        want = np.asarray(want)
    y, got = systolith.jit(fn, device=nano)(x, g, *vectors)
    close(y, want)
    for mine, theirs in zip(got, gradients, strict=True):
        # What cancels in the gradient of a short row is as large as the gradient that comes in.
        close(mine, theirs, 1e-5, float(np.abs(g).max()))
    close(function.on(nano, eps=eps)(x, *vectors), want)


@pytest.mark.parametrize("shape", [*SHAPES[1:-1], (260, 6), (1, 2)])
@pytest.mark.parametrize("mean", [1.0, -3000.0])
def test_batch_norm(nano, rng, shape, mean: float) -> None:
    """A large mean costs what its rounding in x does, no more."""
    x, g = 2 * array(rng, *shape) + np.float32(mean), array(rng, *shape)
    gain, bias = array(rng, shape[1]), array(rng, shape[1])
    eps = 1e-2

    def reference(x: Any, gain: Any, bias: Any) -> Any:
        root = jnp.sqrt(x.var(0) + eps)
        return (x - x.mean(0)) / root * gain + bias

    def fn(x: Any, g: Any, *vectors: Any) -> Any:
        y, pull = jax.vjp(lambda *args: kernels.batch_norm(*args, eps=eps), x, *vectors)
        return y, pull(g)

    with jax.enable_x64(True):
        wide = (jnp.asarray(v, jnp.float64) for v in (x, gain, bias))
        want, pull = jax.vjp(reference, *wide)
        gradients = [np.asarray(v) for v in pull(jnp.asarray(g, jnp.float64))]
        want = np.asarray(want)
    y, got = systolith.jit(fn, device=nano)(x, g, gain, bias)
    close(y, want, 2e-6)
    for mine, theirs in zip(got, gradients, strict=True):
        close(mine, theirs, 2e-6, float(np.abs(g).max()))
    close(kernels.batch_norm.on(nano, eps=eps)(x, gain, bias), want, 2e-6)


# --- attention ----------------------------------------------------------------------------------


def attend(q: Any, k: Any, v: Any, causal: bool, scale: float | None) -> Any:
    t, s, d = q.shape[-2], k.shape[-2], q.shape[-1]
    scores = q @ jnp.swapaxes(k, -1, -2) * (1 / math.sqrt(d) if scale is None else scale)
    if causal:
        scores = jnp.where(np.tri(t, s, s - t, dtype=bool), scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1) @ v


def attend_heads(q: Any, k: Any, v: Any, heads: int, causal: bool) -> Any:
    """With heads side by side in the columns."""
    apart = (jnp.swapaxes(x.reshape(x.shape[0], heads, -1), 0, 1) for x in (q, k, v))
    return jnp.swapaxes(attend(*apart, causal, None), 0, 1).reshape(q.shape)


#: queries, keys, depth: one block and many, partial ones, depths above N, chunks of keys (64 here),
#: more keys than stay in SBUF
ATTENTION = [(1, 1, 1), (4, 4, 4), (3, 5, 2), (6, 6, 6), (9, 14, 3), (5, 150, 4), (11, 70, 9)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("t,s,d", [*ATTENTION, (4, 700, 5)])
def test_attention(nano, rng, t: int, s: int, d: int, causal: bool) -> None:
    q, k, v = (bf16(array(rng, n, d)) for n in (t, s, s))
    scale = None if t % 2 else 0.3
    got = kernels.attention.on(nano, causal=causal, scale=scale)(q, k, v)
    close(got, np.asarray(attend(q, k, v, causal, scale)), 2 * EPSILON)


def test_attention_of_large_scores(nano, rng) -> None:
    """The maximum keeps exponentials in range, also when it comes late."""
    q, k, v = bf16(30 * array(rng, 6, 4)), bf16(30 * array(rng, 150, 4)), bf16(array(rng, 150, 4))
    k[-1] = 4 * q[0]
    got = kernels.attention.on(nano)(q, k, v)
    close(got, np.asarray(attend(q, k, v, False, None)), 2 * EPSILON)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("t,s,d", ATTENTION)
def test_gradient_of_attention(nano, rng, t: int, s: int, d: int, causal: bool) -> None:
    q, k, v, g = (bf16(array(rng, n, d)) for n in (t, s, s, t))

    def fn(function: Callable[..., Any]) -> Any:
        def run(q: Any, k: Any, v: Any, g: Any) -> Any:
            return jax.vjp(function, q, k, v)[1](g)

        return run

    got = systolith.jit(fn(lambda q, k, v: kernels.attention(q, k, v, causal=causal)), device=nano)(
        q, k, v, g
    )
    want = fn(lambda q, k, v: attend(q, k, v, causal, None))(q, k, v, g)
    largest = max(float(jnp.abs(w).max()) for w in want)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, np.asarray(theirs), 4 * EPSILON, largest)


def test_attention_of_many_heads(small, rng) -> None:
    q, k, v = (array(rng, 3, n, 5) for n in (10, 21, 21))
    got = kernels.attention.on(small, causal=True)(q, k, v)
    close(got, np.asarray(attend(q, k, v, True, None)), 4 * EPSILON)
    out, sums = kernels.attention_forward.on(small)(q, k, v)
    g = array(rng, 3, 10, 5)
    gradients = kernels.attention_grad.on(small)(q, k, v, out, sums, g)
    want = jax.vjp(lambda q, k, v: attend(q, k, v, False, None), q, k, v)[1](g)
    for mine, theirs in zip(gradients, want, strict=True):
        close(mine, np.asarray(theirs), 8 * EPSILON)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_heads_side_by_side(nano, rng, causal: bool) -> None:
    q, k, v, g = (bf16(array(rng, n, 3 * 5)) for n in (7, 9, 9, 7))

    def fn(function: Callable[..., Any]) -> Any:
        def run(q: Any, k: Any, v: Any, g: Any) -> Any:
            result, pull = jax.vjp(function, q, k, v)
            return result, *pull(g)

        return run

    chip = fn(lambda q, k, v: kernels.attention(q, k, v, causal=causal, heads=3))
    got = systolith.jit(chip, device=nano)(q, k, v, g)
    want = fn(lambda q, k, v: attend_heads(q, k, v, 3, causal))(q, k, v, g)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, np.asarray(theirs), 6 * EPSILON)


# --- the others ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows,inputs,hidden,outputs", [(1, 1, 1, 1), (5, 6, 9, 3), (33, 10, 17, 6)]
)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_mlp(nano, rng, kind: str, rows: int, inputs: int, hidden: int, outputs: int) -> None:
    x = array(rng, rows, inputs)
    up, down = array(rng, inputs, hidden), array(rng, hidden, outputs) / math.sqrt(hidden)
    if kind == "gelu":
        function: Any = kernels.gelu_mlp
        weights: tuple[np.ndarray, ...] = (up, array(rng, hidden), down, array(rng, outputs))

        def reference(x: Any, up: Any, a: Any, down: Any, b: Any) -> Any:
            return jax.nn.gelu(x @ up + a, approximate=False) @ down + b
    else:
        function = kernels.swiglu_mlp
        weights = array(rng, inputs, hidden), up, down

        def reference(x: Any, gate: Any, up: Any, down: Any) -> Any:
            return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    g = array(rng, rows, outputs)

    def gradients(function: Any) -> Any:
        def fn(g: Any, *arrays: Any) -> Any:
            result, pull = jax.vjp(function, *arrays)
            return result, pull(g)

        return fn

    want, want_gradients = gradients(reference)(g, x, *weights)
    got, got_gradients = systolith.jit(gradients(function), device=nano)(g, x, *weights)
    close(got, np.asarray(want), 4 * EPSILON)
    for mine, theirs in zip(got_gradients, want_gradients, strict=True):
        close(mine, np.asarray(theirs), 6 * EPSILON)
    np.testing.assert_array_equal(function.on(nano)(x, *weights), got)


@pytest.mark.parametrize("shape", [(1,), (4, 4), (7, 13), (400,), (3, 5, 7)])
def test_adamw(nano, rng, shape) -> None:
    p, g, m = (array(rng, *shape) for _ in range(3))
    v = rng.random(shape).astype(np.float32)
    rate, beta1, beta2, eps, decay, t = 0.1, 0.8, 0.9, 1e-3, 0.2, 3
    rates = np.array([rate, 1 / (1 - beta1**t), 1 / (1 - beta2**t)], np.float32)
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}
    new_p, new_m, new_v = kernels.adamw.on(nano, **options)(p, g, m, v, rates)
    want_m = beta1 * m.astype(np.float64) + (1 - beta1) * g
    want_v = beta2 * v.astype(np.float64) + (1 - beta2) * g.astype(np.float64) ** 2
    change = want_m * rates[1] / (np.sqrt(want_v * rates[2]) + eps) + decay * p
    close(new_m, want_m)
    close(new_v, want_v)
    close(new_p, p - rate * change)


def test_adamw_rounds_stochastically(rng) -> None:
    """Changes far below half an ulp of bfloat16 parameters are kept on average, and lost to
    nearest."""
    n = 4096
    p = np.ones(n, BF16)
    g = np.ones(n, np.float32)
    zero = np.zeros(n, np.float32)
    rates = np.array([1e-3, 10.0, 1000.0], np.float32)
    with systolith.Device("golden", config="small", check=True) as device:
        for rounding, low, high in (("nearest", 0.0, 0.0), ("stochastic", 0.8e-3, 1.2e-3)):
            step = kernels.adamw.on(device, decay=0.0, rounding=rounding)
            moved = 1.0 - np.asarray(step(p, g, zero, zero, rates)[0]).astype(np.float64)
            assert low <= moved.mean() <= high


@pytest.mark.parametrize(
    "batch,height,width,channels,outputs,window,stride,padding",
    [
        (1, 1, 1, 1, 1, (1, 1), 1, 0),
        (2, 5, 6, 3, 4, (3, 3), 1, 1),
        (1, 9, 7, 6, 5, (3, 2), 2, 0),
        (2, 8, 8, 4, 9, (2, 2), 2, 1),
        (1, 16, 20, 2, 3, (5, 5), 1, 2),
    ],
)
def test_conv2d(
    nano, rng, batch, height, width, channels, outputs, window, stride, padding
) -> None:
    x = bf16(array(rng, batch, height, width, channels))
    weights = bf16(array(rng, *window, channels, outputs))
    options = {"window": window, "stride": stride, "padding": padding}
    flat = weights.reshape(-1, outputs)
    want = np.asarray(
        jax.lax.conv_general_dilated(
            x, weights, (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
        )
    )  # fmt: skip
    got = kernels.conv2d.on(nano, **options)(x, flat)
    close(got, want)
    matrix = systolith.jit(
        lambda x, w: kernels.conv2d(x, w, size=(height, width), **options), device=nano
    )(x.reshape(-1, channels), flat)
    assert np.asarray(matrix).tobytes() == np.asarray(got).tobytes()

    def reference(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
        )  # fmt: skip

    g = bf16(array(rng, *want.shape))
    wanted = jax.vjp(reference, x, weights)[1](g)
    gradients = systolith.jit(
        lambda x, w, g: jax.vjp(
            lambda x, w: kernels.conv2d(x, w, size=(height, width), **options), x, w
        )[1](g),
        device=nano,
    )(x.reshape(-1, channels), flat, g.reshape(-1, outputs))
    for mine, theirs in zip(gradients, wanted, strict=True):
        close(np.asarray(mine).reshape(theirs.shape), np.asarray(theirs))


@pytest.mark.parametrize(
    "shape,window,stride",
    [((1, 4, 4, 4), (2, 2), None), ((2, 7, 5, 6), (3, 2), 2), ((1, 6, 6, 1), (3, 3), 1)],
)
def test_pooling(nano, rng, shape, window, stride) -> None:
    x = array(rng, *shape).round(1)  # some are equal
    step = window[0] if stride is None else stride
    windows = np.lib.stride_tricks.sliding_window_view(x, window, axis=(1, 2))[:, ::step, ::step]
    options = {"window": window, "stride": stride}
    np.testing.assert_array_equal(kernels.max_pool.on(nano, **options)(x), windows.max((-2, -1)))
    close(kernels.avg_pool.on(nano, **options)(x), windows.mean((-2, -1)))
    g = array(rng, *windows.shape[:-2])
    taken = windows == windows.max((-2, -1), keepdims=True)
    for kind in (kernels.avg_pool, kernels.max_pool):
        want = np.zeros(shape, np.float64)
        spread = np.full(taken.shape, 1.0 / math.prod(window))
        if kind is kernels.max_pool:
            first = taken.reshape(*taken.shape[:-2], -1).argmax(-1)
            spread = np.eye(math.prod(window))[first].reshape(taken.shape)
        for i in range(window[0]):
            for j in range(window[1]):
                for a in range(g.shape[1]):
                    for b in range(g.shape[2]):
                        part = spread[:, a, b, :, i, j] * g[:, a, b]
                        want[:, a * step + i, b * step + j] += part
        back = systolith.jit(
            lambda x, g, kind=kind: jax.vjp(lambda x: kind(x, size=shape[1:3], **options), x)[1](g),
            device=nano,
        )(x.reshape(-1, shape[-1]), g.reshape(-1, shape[-1]))
        close(np.asarray(back[0]).reshape(shape), want)
    flat = x.reshape(-1, shape[-1])
    got = kernels.max_pool.on(nano, size=shape[1:3], **options)(flat)
    np.testing.assert_array_equal(got, windows.max((-2, -1)).reshape(-1, shape[-1]))


# --- all of them --------------------------------------------------------------------------------


def cases() -> dict[str, tuple[Any, dict[str, Any], tuple[np.ndarray, ...]]]:
    """Every kernel of the library: the function, static arguments, arrays."""
    rng = np.random.default_rng(5)

    def make(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return array(rng, *shape, dtype=dtype)

    x, g, gain, bias = make(11, 9), make(11, 9), make(9), make(9)
    q, k, v = make(6, 5), make(21, 5), make(21, 5)
    labels = np.eye(9, dtype=np.float32)[rng.integers(0, 9, 11)]
    state = tuple(np.abs(make(37, dtype=t)) for t in (BF16, np.float32, np.float32, np.float32))
    rates = np.array([0.01, 2.0, 3.0], np.float32)
    image = make(1, 6, 5, 5)
    lse = make(11)
    index = rng.integers(0, 5, 19, dtype=np.int32)
    return {
        "adamw": (kernels.adamw, {"rounding": "stochastic"}, (*state, rates)),
        "attention": (kernels.attention, {"causal": True}, (q, k, v)),
        "attention_forward": (kernels.attention_forward, {}, (q, k, v)),
        "attention_grad": (
            kernels.attention_grad, {"causal": True}, (q, k, v, make(6, 5), make(6), make(6, 5))
        ),
        "avg_pool": (kernels.avg_pool, {"window": (2, 2)}, (image,)),
        "avg_pool_grad": (
            kernels.avg_pool_grad, {"window": (2, 2)}, (image, make(1, 3, 2, 5))
        ),
        "conv2d_grad": (
            kernels.conv2d_grad, {"window": (3, 3), "padding": 1, "stride": 2},
            (image, make(45, 6), make(1, 3, 3, 6)),
        ),
        "max_pool_grad": (
            kernels.max_pool_grad, {"window": (3, 3), "stride": 1}, (image, make(1, 4, 3, 5))
        ),
        "conv2d": (kernels.conv2d, {"window": (3, 3), "padding": 1}, (image, make(45, 6))),
        "cross_entropy": (kernels.cross_entropy, {}, (x, labels)),
        "cumsum": (kernels.cumsum, {"reverse": True}, (x,)),
        "top_k": (kernels.top_k, {"k": 5}, (x,)),
        "cross_entropy_forward": (kernels.cross_entropy_forward, {}, (x, labels)),
        "cross_entropy_grad": (kernels.cross_entropy_grad, {}, (x, labels, lse, make(11))),
        "embedding": (kernels.embedding, {}, (x, index)),
        "embedding_grad": (kernels.embedding_grad, {"rows": 5}, (x, index[:11])),
        "gelu_mlp": (kernels.gelu_mlp, {}, (x, make(9, 6), make(6), make(6, 5), make(5))),
        "batch_norm": (kernels.batch_norm, {}, (x, gain, bias)),
        "batch_norm_grad": (kernels.batch_norm_grad, {}, (x, gain, g)),
        "layernorm": (kernels.layernorm, {}, (x, gain, bias)),
        "layernorm_grad": (kernels.layernorm_grad, {}, (x, gain, g)),
        "matmul": (kernels.matmul, {"transpose_b": True}, (x, make(13, 9))),
        "max_pool": (kernels.max_pool, {"window": (3, 3), "stride": 1}, (image,)),
        "rmsnorm": (kernels.rmsnorm, {}, (x, gain)),
        "rmsnorm_grad": (kernels.rmsnorm_grad, {}, (x, gain, g)),
        "scatter_add": (kernels.scatter_add, {}, (x, index, make(19, 9))),
        "softmax": (kernels.softmax, {}, (x,)),
        "softmax_grad": (kernels.softmax_grad, {}, (np.abs(x), g)),
        "swiglu_mlp": (kernels.swiglu_mlp, {}, (x, make(9, 6), make(9, 6), make(6, 5))),
        "transpose": (kernels.transpose, {}, (x,)),
    }  # fmt: skip


CASES = cases()


def test_every_kernel_has_a_case() -> None:
    """Here, in the page's table of kernels, and among those measured there."""
    assert set(CASES) == set(kernels.__all__)
    page = (Path(__file__).parents[2] / "docs" / "kernel-library.md").read_text()
    described, measured = page.split("## Measured")
    assert set(re.findall(r"`(\w+)\(", described)) >= set(CASES)
    table = measured.split("<!-- kernels -->")[1]
    missing = set(CASES) - set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert not missing, f"not measured: {missing}"


@pytest.fixture(scope="module", params=["rtl", "rtl-fast"])
def gates(request):
    with systolith.Device(request.param, config="nano", seed=7) as device:
        yield device


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_the_gates(gates, name: str) -> None:
    function, static, arrays = CASES[name]
    gates.seed = 7
    got = jax.tree.leaves(function.on(gates, **static)(*arrays))
    with systolith.Device("golden", config="nano", check=True, seed=7) as device:
        want = jax.tree.leaves(function.on(device, **static)(*arrays))
        for mine, theirs in zip(got, want, strict=True):
            assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


REFUSED: dict[str, tuple[Any, dict[str, Any], tuple[tuple[int, ...], ...], str]] = {
    "inner": (kernels.matmul, {}, ((2, 3), (4, 5)), "inner dimensions .* differ: 3 and 4"),
    "operands": (kernels.matmul, {"operands": "int8"}, ((2, 3), (3, 2)), "narrow float, not 'int"),
    "many": (kernels.top_k, {"k": 9}, ((4, 20),), "k must be 1 to 8, not 9"),
    "short row": (kernels.top_k, {"k": 4}, ((4, 3),), "k must be 1 to 3, not 4"),
    "rank": (kernels.softmax, {}, ((2, 3, 4),), "must have rank 2"),
    "labels": (kernels.cross_entropy, {}, ((2, 3), (3, 2)), "must have the shape of"),
    "batch": (kernels.batch_norm, {}, ((2, 3), (3,), (2,)), r"must have the shape \(3,\)"),
    "gain": (kernels.rmsnorm, {}, ((2, 3), (2,)), r"must have the shape \(3,\)"),
    "depth": (kernels.attention, {}, ((2, 3), (4, 5), (4, 5)), "differ in heads or depth"),
    "heads": (kernels.attention, {"heads": 2}, ((4, 3),) * 3, "are not those of 2 heads"),
    "heads twice": (kernels.attention, {"heads": 2}, ((2, 4, 3),) * 3, "first dimension"),
    "future": (kernels.attention, {"causal": True}, ((4, 3), (2, 3), (2, 3)), "as many keys"),
    "scale": (kernels.attention, {"scale": -1.0}, ((4, 3),) * 3, "scale must be positive"),
    "wide": (kernels.attention, {}, ((4, 999),) * 3, "more than PSUM holds"),
    "hidden": (kernels.swiglu_mlp, {}, ((4, 3), (3, 5), (3, 6), (6, 2)), r"the shape \(3, 6\)"),
    "state": (kernels.adamw, {}, ((4,), (4,), (4,), (3,), (3,)), "must have the shape of"),
    "rounding": (kernels.adamw, {"rounding": "up"}, ((4,),) * 4 + ((3,),), "nearest or stochastic"),
    "images": (kernels.max_pool, {"window": (2, 2)}, ((12, 4),), r"need a size=\(height, width\)"),
    "pixels": (
        kernels.max_pool, {"window": (2, 2), "size": (5, 2)}, ((12, 4),), "not made of images"
    ),
    "window": (kernels.max_pool, {"window": (5, 2)}, ((1, 4, 4, 2),), "larger than the image"),
    "image": (kernels.max_pool, {"window": (2, 2)}, ((1, 40, 40, 2),), "does not fit"),
    "slope": (
        kernels.max_pool_grad, {"window": (2, 2)}, ((1, 4, 4, 2), (1, 4, 2, 2)),
        r"must have the shape \(1, 2, 2, 2\)",
    ),
    "gradient": (
        kernels.conv2d_grad, {"window": (1, 1)}, ((1, 23, 23, 2), (2, 2), (1, 23, 23, 2)),
        "does not fit: with padding it has 529 words per partition, PSUM 512",
    ),
    "row": (kernels.softmax, {}, ((4, 3000),), "SBUF is full"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(nano, case: str) -> None:
    function, static, shapes, message = REFUSED[case]
    arrays = [np.ones(shape, np.float32) for shape in shapes]
    with pytest.raises(KernelError, match=message):
        function.on(nano, **static)(*arrays)


def test_a_transformer_block_of_kernels_trains(small, rng) -> None:
    """Kernels and compiled operations together in one step, with all gradients."""
    t, d, h = 12, 8, 16
    params = {
        "gain": np.ones(d, np.float32),
        **{name: array(rng, d, d) / math.sqrt(d) for name in ("q", "k", "v")},
        "out": array(rng, d, d) / math.sqrt(d),
        "gate": array(rng, d, h) / math.sqrt(d),
        "up": array(rng, d, h) / math.sqrt(d),
        "down": array(rng, h, d) / math.sqrt(h),
    }
    x, y = array(rng, t, d), array(rng, t, d)

    def block(p: Any, x: Any, kit: Any) -> Any:
        h = kit.rmsnorm(x, p["gain"])
        q, k, v = (kit.matmul(h, p[name]) for name in ("q", "k", "v"))
        x = x + kit.attention(q, k, v) @ p["out"]
        return x + kit.mlp(x, p["gate"], p["up"], p["down"])

    class Plain:
        matmul = staticmethod(lambda a, b: a @ b)
        rmsnorm = staticmethod(
            lambda x, g: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * g
        )
        attention = staticmethod(lambda q, k, v: attend_heads(q, k, v, 2, True))
        mlp = staticmethod(lambda x, g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d)

    class Chip:
        matmul, rmsnorm, mlp = kernels.matmul, kernels.rmsnorm, kernels.swiglu_mlp
        attention = staticmethod(lambda q, k, v: kernels.attention(q, k, v, causal=True, heads=2))

    def step(kit: Any) -> Any:
        def fn(p: Any, x: Any, y: Any) -> Any:
            loss = lambda p: jnp.mean((block(p, x, kit) - y) ** 2)  # noqa: E731
            value, gradients = jax.value_and_grad(loss)(p)
            return jax.tree.map(lambda a, b: a - 0.05 * b, p, gradients), value

        return fn

    run, want = systolith.jit(step(Chip), device=small), jax.jit(step(Plain))
    mine = theirs = params
    for _ in range(4):
        mine, value = run(mine, x, y)
        theirs, reference = want(theirs, x, y)
        assert abs(float(value) - float(reference)) < 0.02 * float(reference)
    for before, a, b in zip(*map(jax.tree.leaves, (params, mine, theirs)), strict=True):
        # What four steps changed.
        close(np.asarray(a) - before, np.asarray(b) - before, 0.05)
