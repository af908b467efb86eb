"""Rows picked and added to by index: kernels and `jit`, exact, repeated indices included."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import systolith
from systolith import kernels
from systolith.errors import DeviceFault, KernelError

BF16 = ml_dtypes.bfloat16
#: (rows of the table, columns, indices)
SHAPES = [(10, 8, 5), (7, 5, 9), (3, 1, 40), (20, 300, 33), (1, 4, 1), (4, 8, 64)]


@pytest.fixture(scope="module", params=["nano", "tiny"])
def device(request):
    with systolith.Device("golden", config=request.param, check=True) as device:
        yield device


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, endpoint=True).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def indices(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Some of them far more often than others."""
    return (rows * rng.random(count) ** 3).astype(np.int32)


def added(table: np.ndarray, index: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """One update after the other, in FP32, rounded to the type of the table."""
    out = table.copy()
    for row, update in zip(index, updates, strict=True):
        if np.issubdtype(table.dtype, np.integer):
            with np.errstate(over="ignore"):
                out[row] += update
        else:
            out[row] = (out[row].astype(np.float32) + update.astype(np.float32)).astype(out.dtype)
    return out


def same(got: Any, want: np.ndarray) -> None:
    got = np.asarray(got)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize("rows,columns,count", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, BF16, ml_dtypes.float8_e4m3fn, np.int32, np.int8])
def test_kernels(device, rng, rows: int, columns: int, count: int, dtype: Any) -> None:
    check_kernels(device, rng, rows, columns, count, dtype)


def test_rows_wider_than_sbuf(device, rng) -> None:
    """They are moved in parts."""
    columns = device.config.lanes * (device.config.sbuf_depth + 3) + 1
    check_kernels(device, rng, 3, columns, 5, BF16)


def check_kernels(
    device: systolith.Device,
    rng: np.random.Generator,
    rows: int,
    columns: int,
    count: int,
    dtype: Any,
) -> None:
    table, index = values(rng, (rows, columns), dtype), indices(rng, rows, count)
    updates = values(rng, (count, columns), dtype)
    same(kernels.embedding.on(device)(table, index), table[index])
    zeros = np.zeros_like(table)
    got = kernels.embedding_grad.on(device, rows=rows)(updates, index)
    same(got, added(zeros, index, updates))
    got = kernels.scatter_add.on(device)(table, index, updates)
    same(got, added(table, index, updates))


def test_gradient_of_embedding(device, rng) -> None:
    table, index = values(rng, (9, 6), np.float32), indices(rng, 9, 20)
    gradient = values(rng, (20, 6), np.float32)

    def fn(table: Any, index: Any, gradient: Any) -> Any:
        out, pull = jax.vjp(lambda table: kernels.embedding(table, index), table)
        return out, *pull(gradient)

    out, back = systolith.jit(fn, device=device)(table, index, gradient)
    same(out, table[index])
    same(back, added(np.zeros_like(table), index, gradient))


#: of a table and indices
LOOKUPS = {
    "index": lambda t, i: t[i],
    "take": lambda t, i: jnp.take(t, i, axis=0),
    "in bounds": lambda t, i: t.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False),
    "fill": lambda t, i: t.at[i].get(mode="fill", fill_value=0),
}


@pytest.mark.parametrize("shape", [(10, 8), (13, 9), (5, 1), (12,)])
@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS.keys())
def test_jit(device, rng, lookup: Any, shape: tuple[int, ...]) -> None:
    table, index = values(rng, shape, np.float32), indices(rng, shape[0], 7)
    gradient = values(rng, (7, *shape[1:]), np.float32)
    same(systolith.jit(lookup, device=device)(table, index), table[index])
    # With a table or indices that are known, and one index.
    same(systolith.jit(lambda i: lookup(jnp.asarray(table), i), device=device)(index), table[index])
    same(systolith.jit(lambda t: lookup(t, index), device=device)(table), table[index])
    same(systolith.jit(lookup, device=device)(table, index[:1]), table[index[:1]])

    def pull(t: Any, i: Any, g: Any) -> Any:
        return jax.vjp(lambda t: lookup(t, i), t)[1](g)[0]

    got = systolith.jit(pull, device=device)(table, index, gradient)
    same(got, added(np.zeros_like(table), index, gradient))


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.int8])
@pytest.mark.parametrize("shape", [(10, 8), (13, 9), (12,)])
def test_jit_adds(device, rng, shape: tuple[int, ...], dtype: Any) -> None:
    table, index = values(rng, shape, dtype), indices(rng, shape[0], 11)
    updates = values(rng, (11, *shape[1:]), dtype)
    got = systolith.jit(lambda t, i, u: t.at[i].add(u), device=device)(table, index, updates)
    same(got, added(table, index, updates))


def test_tables_and_indices_that_are_computed(device, rng) -> None:
    """They come from other operations, and results go on into others."""
    x, w = values(rng, (12, 6), np.float32), values(rng, (6, 4), np.float32)
    index = indices(rng, 12, 8)

    def fn(x: Any, w: Any, index: Any) -> Any:
        picked = jnp.tanh(x)[index[::2]]
        return picked, picked.T, (jnp.maximum(picked, 0.0) @ w).sum(axis=0)

    step = systolith.jit(fn, device=device, matmul="float32")
    plain = fn(jnp.asarray(x), jnp.asarray(w), jnp.asarray(index))
    for mine, theirs in zip(step(x, w, index), plain, strict=True):
        # tanh and the order of sums are JAX's and the chip's own.
        error = float(np.abs(np.asarray(mine) - theirs).max())
        print(f"error {error:.1e}")
        assert error < 1e-6


def test_training_of_an_embedding(device, rng) -> None:
    """Steps of a bag of words with a linear layer follow those of JAX."""
    words, labels = indices(rng, 20, 12), np.eye(3, dtype=np.float32)[rng.integers(0, 3, 12)]
    params = {"table": values(rng, (20, 8), np.float32), "out": values(rng, (8, 3), np.float32)}

    def step(params: Any, words: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean((jnp.tanh(params["table"][words]) @ params["out"] - labels) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value

    run = systolith.jit(step, device=device, matmul="float32")
    mine = theirs = params
    values_ = []
    for _ in range(4):
        mine, value = run(mine, words, labels)
        theirs, reference = jax.jit(step)(theirs, words, labels)
        values_.append(float(value))
        error = abs(float(value) / float(reference) - 1)
        print(f"relative error of the loss {error:.1e}")
        assert error < 1e-6
    assert values_[-1] < values_[0]


@pytest.mark.parametrize("shape", [(10, 8), (12,)])
def test_negative_indices(device, rng, shape: tuple[int, ...]) -> None:
    """As in numpy they count from the end."""
    table = values(rng, shape, np.float32)
    index = np.array([-1, 3, -shape[0], 0, -2], np.int32)
    updates = values(rng, (5, *shape[1:]), np.float32)
    same(systolith.jit(lambda t, i: t[i], device=device)(table, index), table[index])
    got = systolith.jit(lambda t, i, u: t.at[i].add(u), device=device)(table, index, updates)
    same(got, added(table, index % shape[0], updates))


#: of a table and indices
COMPUTED: dict[str, Any] = {
    "arithmetic": lambda t, i: t[i * 2 + 1],
    "other rows": lambda t, i: t[jnp.where(i < 0, i + 5, i)],
    "choice": lambda t, i: jnp.where(i < 2, i + 9, i),
    "sign": lambda t, i: jnp.where((i < 2)[:, None], t[:4], 0.0),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_indices_are_computed(device, rng, case: str) -> None:
    fn = COMPUTED[case]
    table, index = values(rng, (9, 6), np.float32), np.array([0, -1, 2, 3], np.int32)
    same(systolith.jit(fn, device=device)(table, index), fn(jnp.asarray(table), jnp.asarray(index)))


@pytest.mark.parametrize("index", [-10, 9, 2**31 - 1])
def test_an_index_outside_is_a_fault(device, rng, index: int) -> None:
    row = index + 9 if index < 0 else index
    table, wrong = values(rng, (9, 6), np.float32), np.array([3, index, 2], np.int32)
    with pytest.raises(DeviceFault, match="OUT_OF_BOUNDS") as caught:
        systolith.jit(lambda t, i: t[i], device=device)(table, wrong)
    assert "GATHER" in str(caught.value) and f"address {row % 2**32} " in str(caught.value)
    # The device goes on.
    same(kernels.embedding.on(device)(table, wrong[:1]), table[3:4])


REFUSED: dict[str, tuple[Any, str]] = {
    "columns": (lambda t, i: t[:, i], "only whole rows are gathered: gather"),
    "elements": (lambda t, i: t[i, i], "the primitive 'concatenate' is not supported"),
    "clip": (lambda t, i: jnp.take(t, i, axis=0, mode="clip"), "indices are not clipped"),
    "set": (lambda t, i: t.at[i].set(0.0), "the primitive 'scatter' is not supported"),
    "dynamic": (lambda t, i: t[i[0]], "the primitive 'dynamic_slice' is not supported"),
    "matrix of indices": (lambda t, i: t[i.reshape(2, 2)], "at most two dimensions"),
    "columns added": (lambda t, i: t.at[:, i].add(1.0), "only rows that a vector of int32 picks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_forms_are_refused(device, rng, case: str) -> None:
    fn, message = REFUSED[case]
    table, index = values(rng, (9, 6), np.float32), np.array([0, 1, 2, 3], np.int32)
    with pytest.raises(systolith.UnsupportedError, match=message) as caught:
        systolith.jit(fn, device=device)(table, index)
    assert "test_embedding.py" in str(caught.value)


def test_kernels_refuse(device, rng) -> None:
    table, index = values(rng, (9, 6), np.float32), np.array([0, 1], np.int32)
    for arrays, message in (
        ((table, table[0]), "must be a vector of int32"),
        ((table[0], index), "must have rank 2"),
    ):
        with pytest.raises(KernelError, match=message):
            kernels.embedding.on(device)(*arrays)
    with pytest.raises(KernelError, match=r"must have the shape \(9,\)"):
        kernels.embedding_grad.on(device, rows=9)(table, np.zeros(2, np.int32))
    with pytest.raises(KernelError, match=r"must have the shape \(2, 6\)"):
        kernels.scatter_add.on(device)(table, index, table)
    with pytest.raises(KernelError, match="must have the type of"):
        kernels.scatter_add.on(device)(table, index, table[:2].astype(BF16))
