"""`systolith.kernel`: Python functions that make instructions, called from jit code and alone."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from systolith.errors import KernelError
from systolith.kernel import AluOp, DramTensor, DType, Function, KernelBuilder

RNG = np.random.default_rng(3)


def line() -> int:
    """Line number of the caller."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


def blocks(nc: KernelBuilder, x: DramTensor) -> Any:
    """(start, lanes) of the blocks of rows."""
    lanes = nc.config.lanes
    return [(r, min(lanes, x.shape[0] - r)) for r in range(0, x.shape[0], lanes)]


@systolith.kernel
def scaled(nc, x, *, factor=2.0):
    """x * factor, row by row."""
    out = nc.output(x.shape, x.dtype)
    cols = x.shape[1]
    for row, lanes in blocks(nc, x):
        tile = nc.sbuf.tile(cols).view(lanes=lanes)
        nc.dma.load(tile, x, row * cols * x.itemsize, lane_stride=cols * x.itemsize)
        nc.vector.tensor_scalar(tile, tile, AluOp.MUL, factor)
        nc.dma.store(tile, out, row * cols * x.itemsize, lane_stride=cols * x.itemsize)
    return out


@systolith.kernel
def split_sign(nc, x):
    """max(x, 0), min(x, 0) in bfloat16, and the sum of each row."""
    rows, cols = x.shape
    high = nc.output(x.shape, DType.FP32)
    low = nc.output(x.shape, DType.BF16)
    total = nc.output((rows,), DType.FP32)
    for row, lanes in blocks(nc, x):
        tile, part = (nc.sbuf.tile(cols).view(lanes=lanes) for _ in range(2))
        add = nc.sbuf.tile(1).view(lanes=lanes)
        nc.dma.load(tile, x, row * cols * 4, lane_stride=cols * 4)
        nc.vector.reduce(add, tile, AluOp.ADD)
        nc.dma.store(add, total, row * 4, lane_stride=4)
        nc.vector.tensor_scalar(part, tile, AluOp.MAX, 0.0)
        nc.dma.store(part, high, row * cols * 4, lane_stride=cols * 4)
        nc.vector.tensor_scalar(tile, tile, AluOp.MIN, 0.0)
        nc.dma.store(tile, low, row * cols * 2, lane_stride=cols * 2)
    return high, low, total


def bf16(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)


@pytest.fixture(params=["nano", "small"])
def device(request):
    with systolith.Device("golden", config=request.param, check=True) as opened:
        yield opened


def array(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_among_compiled_operations(device) -> None:
    x, w = array(7, 5), array(5, 11)
    run = systolith.jit(lambda x, w: jnp.exp(scaled(x @ w, factor=0.5) + 1.0), device=device)
    product = bf16(x).astype(np.float32) @ bf16(w).astype(np.float32)
    np.testing.assert_allclose(run(x, w), np.exp(0.5 * product + 1), rtol=1e-5)


def test_several_results_used_or_not(device) -> None:
    x = array(9, 6)

    def fn(x):
        high, low, total = split_sign(x)
        again, _, _ = split_sign(-x)
        return low, total * 2.0, again, high + low.astype(jnp.float32), total, total

    low, twice, again, both, total, same = map(np.asarray, systolith.jit(fn, device=device)(x))
    assert low.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(low, bf16(np.minimum(x, 0)))
    np.testing.assert_allclose(total, x.sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(same, total)
    np.testing.assert_array_equal(twice, 2 * total)
    np.testing.assert_array_equal(again, np.maximum(-x, 0))
    np.testing.assert_array_equal(both, np.maximum(x, 0) + low.astype(np.float32))


def test_operands_of_every_kind(device) -> None:
    """Transposed, sliced, reshaped, broadcast, known, and of narrow types."""
    x = array(6, 10)
    table = array(3, 4)

    def fn(x, h):
        return (
            scaled(x.T),
            scaled(x[1:5, ::3]),
            scaled(x.reshape(4, 15)),
            scaled(jnp.broadcast_to(x[0], (5, 10))),
            scaled(jnp.asarray(table)),
            scaled(jnp.ones((2, 3))),
            scaled(h),
            scaled((x + 1.0).T),
            scaled(x.astype(jnp.bfloat16).astype(jnp.float32)),
            scaled((x > 0).astype(jnp.bfloat16)),
        )

    h = bf16(array(3, 5))
    got = list(map(np.asarray, systolith.jit(fn, device=device)(x, h)))
    wanted = [
        2 * x.T,
        2 * x[1:5, ::3],
        2 * x.reshape(4, 15),
        np.broadcast_to(2 * x[0], (5, 10)),
        2 * table,
        np.full((2, 3), 2, np.float32),
        bf16(2 * h.astype(np.float32)),
        2 * (x + 1).T,
        2 * bf16(x).astype(np.float32),
        bf16(2.0 * (x > 0)),
    ]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_a_kernel_alone_in_jit_moves_nothing_twice() -> None:
    """Arguments are read and results written where the caller has them."""
    with systolith.Device("golden", config="nano", check=True) as device:
        run = systolith.jit(lambda x: scaled(x), device=device)
        np.testing.assert_array_equal(run(array(8, 3)) is not None, True)
        counts = run.stats()["instructions"]
    assert counts == {"tensor": 1, "vector": 3, "scalar": 1, "dma0": 3, "dma1": 3}


def test_it_gets_all_of_the_memory() -> None:
    """What the program holds in SBUF and PSUM makes room for the kernel, and comes back."""

    @systolith.kernel
    def greedy(nc, x):
        out = nc.output(x.shape, x.dtype)
        tile, sums = nc.sbuf.tile(2000), nc.psum.tile(500)
        view, acc = tile.view(x.shape[1]), sums.view(x.shape[1])
        nc.dma.load(view, x, lane_stride=4 * x.shape[1])
        nc.vector.copy(acc, view)
        nc.vector.copy(view, acc)
        nc.dma.store(view, out, lane_stride=4 * x.shape[1])
        return out

    x, w = array(4, 100), array(100, 4)

    def fn(x, w):
        held = jnp.exp(x)
        gram = x @ w
        return greedy(held * 2.0) + held, gram + jnp.sum(greedy(gram))

    with systolith.Device("golden", config="nano", check=True) as device:
        first, second = map(np.asarray, systolith.jit(fn, device=device)(x, w))
    np.testing.assert_allclose(first, 3 * np.exp(x), rtol=1e-5)
    gram = bf16(x).astype(np.float32) @ bf16(w).astype(np.float32)
    np.testing.assert_allclose(second, gram + gram.sum(), rtol=1e-4, atol=1e-4)


# --- gradients ----------------------------------------------------------------------------------


@systolith.kernel
def squashed(nc, x):
    """tanh(x)."""
    out = nc.output(x.shape, x.dtype)
    cols = x.shape[1]
    for row, lanes in blocks(nc, x):
        tile = nc.sbuf.tile(cols).view(lanes=lanes)
        nc.dma.load(tile, x, row * cols * 4, lane_stride=cols * 4)
        nc.scalar.activate(tile, tile, Function.TANH)
        nc.dma.store(tile, out, row * cols * 4, lane_stride=cols * 4)
    return out


def _squashed_forward(x):
    y = squashed(x)
    return y, y


squashed.defvjp(_squashed_forward, lambda y, g: (g * (1.0 - y * y),))


def test_gradients(device) -> None:
    x, w = array(5, 6), array(6, 6)

    def loss(function):
        return lambda w, x: jnp.mean(function(x @ w) ** 2)

    run = systolith.jit(jax.value_and_grad(loss(squashed)), device=device, matmul="float32")
    value, gradient = run(w, x)
    want, want_gradient = jax.value_and_grad(loss(jnp.tanh))(w, x)
    np.testing.assert_allclose(float(value), want, rtol=1e-4)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-3, atol=1e-5)


def test_without_a_rule_there_is_no_gradient(device) -> None:
    run = systolith.jit(jax.grad(lambda x: jnp.sum(scaled(x))), device=device)
    with pytest.raises(KernelError, match=r"kernel 'scaled' has no gradient; .* defvjp"):
        run(array(2, 2))


# --- alone --------------------------------------------------------------------------------------


def test_alone_on_a_device(device) -> None:
    """Arrays of any rank, from the host or the device; static arguments; figures."""

    @systolith.kernel
    def total(nc, x, y, *, scale):
        a, b, c, d = x.shape
        out = nc.output((a, b), x.dtype)
        for i in range(a):
            tile, other = (nc.sbuf.tile(c * d).view((1, c * d), lanes=b) for _ in range(2))
            add = nc.sbuf.tile(1).view((1, 1), lanes=b)
            for view, tensor in ((tile, x), (other, y)):
                nc.dma.load(view, tensor, 4 * i * b * c * d, lane_stride=4 * c * d)
            nc.vector.tensor_tensor(tile, tile, AluOp.MUL, other, AluOp.MUL, scale)
            nc.vector.reduce(add, tile, AluOp.ADD)
            nc.dma.store(add, out, 4 * i * b, lane_stride=4)
        return out

    x, y = array(3, 4, 2, 5), array(3, 4, 2, 5)
    run = total.on(device, scale=3.0)
    result = run(device.put(x), y)
    np.testing.assert_allclose(result, (3 * x * y).sum((2, 3)), rtol=1e-4, atol=1e-5)
    assert run.stats()["instructions"]["dma0"] == 7
    assert "TENSOR_TENSOR" in run.disassemble()
    called = line() + 2
    with pytest.raises(KernelError, match=rf"'total', called at \S*_functions.py:{called}\b"):
        run(array(3, 5000, 2, 5), array(3, 5000, 2, 5))
    with pytest.raises(TypeError, match=r"are given to \.on\(device\)"):
        run(x, y, scale=2.0)


def test_results_alone_are_a_tuple() -> None:
    with systolith.Device("golden", config="nano", check=True) as device:
        x = array(3, 7)
        high, low, total = split_sign.on(device)(x)
        np.testing.assert_array_equal(high, np.maximum(x, 0))
        assert low.dtype == ml_dtypes.bfloat16 and total.shape == (3,)


def test_without_arrays_and_under_other_transformations(device) -> None:
    """A kernel of no arguments; calls inlined by jax.jit and remat; vmap is refused."""

    @systolith.kernel
    def ones(nc, *, size):
        out = nc.output((size,), DType.FP32)
        tile = nc.sbuf.tile(size).view(lanes=1)
        nc.vector.memset(tile, 1.0)
        nc.dma.store(tile, out)
        return out

    x = array(3, 6)

    def fn(x):
        inner = jax.jit(lambda x: scaled(x, factor=3.0))
        gradient = jax.grad(jax.checkpoint(lambda x: jnp.sum(squashed(x))))(x)
        return jnp.sum(inner(x)) + ones(size=6), gradient

    value, gradient = systolith.jit(fn, device=device)(x)
    np.testing.assert_allclose(value, np.full(6, 1 + 3 * x.sum()), rtol=1e-4)
    np.testing.assert_allclose(gradient, 1 - np.tanh(x) ** 2, rtol=1e-4, atol=1e-6)
    error = _error(device, lambda x: jax.vmap(scaled)(x.reshape(1, 3, 6)[:, :, :]), x)
    assert "cannot be batched by vmap" in str(error)


def test_outside_of_jit_it_says_where_it_runs() -> None:
    with pytest.raises(KernelError, match=r"systolith.jit, or with .on\(device\)"):
        scaled(array(2, 2))


@pytest.mark.parametrize("kind", ["rtl", "rtl-fast"])
def test_same_bits_on_the_gates(kind) -> None:
    x, w = array(7, 5), array(5, 6)

    def fn(x, w):
        high, low, total = split_sign(x @ w)
        return squashed(high), low, scaled(jnp.exp(low.astype(jnp.float32)), factor=0.3), total

    def run(kind: str, **options: Any) -> list[np.ndarray]:
        with systolith.Device(kind, config="nano", **options) as device:
            alone = scaled.on(device)(x)
            return list(map(np.asarray, (alone, *systolith.jit(fn, device=device)(x, w))))

    for mine, theirs in zip(run(kind), run("golden", check=True), strict=True):
        assert mine.tobytes() == theirs.tobytes()


# --- what is refused ----------------------------------------------------------------------------


def _error(device: Any, fn: Any, *arrays: np.ndarray) -> KernelError:
    with pytest.raises(KernelError) as caught:
        systolith.jit(fn, device=device)(*arrays)
    return caught.value


def test_errors_name_the_statement_and_the_call() -> None:
    """Shape, type, memory and capacity, each at the line of the kernel, with the line that called
    it."""
    x = array(4, 4)
    lines: dict[str, int] = {}

    @systolith.kernel
    def wrong(nc, x, *, what):
        out = nc.output(x.shape, x.dtype)
        a, b = nc.sbuf.tile(4).view(), nc.sbuf.tile(5).view()
        p = nc.psum.tile(4).view()
        if what == "shape":
            lines[what] = line() + 1
            nc.vector.tensor_tensor(a, a, AluOp.ADD, b)
        elif what == "type":
            lines[what] = line() + 1
            nc.scalar.activate(a.astype(DType.INT32), a, Function.EXP)
        elif what == "layout":
            lines[what] = line() + 1
            nc.dma.load(p, x, lane_stride=16)
        elif what == "capacity":
            lines[what] = line() + 1
            nc.sbuf.tile(3000)
        elif what == "argument":
            lines[what] = line() + 1
            nc.dma.store(a, x, lane_stride=16)
        elif what == "input":
            lines[what] = line() + 1
            nc.dram.tensor("y", (4,), DType.FP32)
        elif what == "finish":
            lines[what] = line() + 1
            nc.finish()
        return out

    messages = {
        "shape": "shape mismatch",
        "type": "must be FP32",
        "layout": "must lie in SBUF",
        "capacity": "SBUF is full: 3000 columns",
        "argument": "is an argument of the kernel and cannot be stored to",
        "input": "the inputs of a kernel function are its arguments",
        "finish": "whoever calls it finishes the program",
    }
    with systolith.Device("golden", config="nano") as device:
        for what, message in messages.items():
            called = line() + 1
            error = _error(device, lambda x, what=what: wrong(x, what=what), x)
            text = str(error)
            assert message in text, text
            assert error.source is not None
            assert error.source.endswith(f"test_kernel_functions.py:{lines[what]}")
            assert re.search(
                rf"in kernel 'wrong', called at \S*test_kernel_functions.py:{called}\b", text
            )
        # With declared results the body runs first when the program is made.
        late = systolith.kernel(outputs=lambda x, what: x)(wrong.body)
        called = line() + 1
        error = _error(device, lambda x: late(x, what="capacity"), x)
        assert "SBUF is full" in str(error)
        assert re.search(rf"called at \S*test_kernel_functions.py:{called}\b", str(error))


def test_results_must_be_what_was_declared() -> None:
    def declare(**options: Any) -> Any:
        @systolith.kernel(**options)
        def made(nc, x, *, keep=True):
            out, other = nc.output(x.shape, x.dtype), nc.output((1,), DType.FP32)
            tile = nc.sbuf.tile(4).view()
            nc.vector.memset(tile, 1.0)
            nc.dma.store(tile, out, lane_stride=16)
            nc.dma.store(tile[:1].with_lanes(1), other)
            return (out, other) if keep else out

        return made

    x = array(4, 4)
    spec = jax.ShapeDtypeStruct
    one = spec((1,), np.float32)
    with systolith.Device("golden", config="nano", check=True) as device:
        declared = declare(outputs=lambda x: (x, one), name="named")
        assert declared.name == "named"
        got, _ = systolith.jit(lambda x: declared(x), device=device)(x)
        np.testing.assert_array_equal(got, np.ones((4, 4)))
        assert jax.eval_shape(declared, x)[0].shape == (4, 4)  # no device needed
        short = declare(outputs=lambda x: x)
        assert "declared are float32[4, 4]" in str(_error(device, lambda x: short(x), x))
        other_shape = declare(outputs=lambda x: (x, spec((2,), np.float32)))
        error = _error(device, lambda x: other_shape(x), x)
        assert "result 1 is float32[1], declared are float32[4, 4], float32[2]" in str(error)
        more = declare(outputs=lambda x: (x, one, x))
        assert "returns 2 results, declared are 3" in str(_error(device, lambda x: more(x), x))
        assert "in the order made" in str(_error(device, lambda x: declare()(x, keep=False), x))


def test_arguments_that_do_not_fit() -> None:
    x = array(2, 2)
    with systolith.Device("golden", config="nano") as device:
        assert "too many positional arguments" in str(_error(device, lambda x: scaled(x, x), x))
        assert "unexpected keyword argument 'by'" in str(
            _error(device, lambda x: scaled(x, by=2.0), x)
        )
        assert "must be hashable" in str(_error(device, lambda x: scaled(x, factor=[1]), x))
        error = _error(device, lambda x: scaled(jnp.arange(4).reshape(2, 2) > x, x), x)
        assert "kernel 'scaled'" in str(error)
        with pytest.raises(KernelError, match=r"argument x: .*uint16"):
            systolith.jit(lambda x: scaled(jnp.zeros((2, 2), jnp.uint16)), device=device)(x)
        with pytest.raises(systolith.UnsupportedError, match="at most two dimensions"):
            systolith.jit(lambda x: rank3(x), device=device)(x)


@systolith.kernel(outputs=lambda x: jax.ShapeDtypeStruct((1, 2, 2), x.dtype))
def rank3(nc, x):
    """Declares a result that jit has no values for."""
    return nc.output((1, 2, 2), x.dtype)


def test_an_output_outside_of_a_kernel_function_is_one_of_the_program() -> None:
    nc = KernelBuilder("nano")
    out = nc.output((4, 4), DType.FP32)
    assert (out.name, out.kind) == ("out0", "output")
    assert nc.output(4, np.float32, "mine").shape == (4,)
