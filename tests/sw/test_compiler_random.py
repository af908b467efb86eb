"""Random programs on cores with little memory: layouts, spills and PSUM under pressure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import systolith
from systolith_hdl.config import CoreConfig

CORES = [
    CoreConfig(name=f"random{lanes}x{depth}", lanes=lanes, sbuf_depth=depth, psum_bank_depth=bank)
    for lanes, depth, bank in ((4, 2048, 64), (4, 256, 8), (8, 256, 8))
]


def rounded_product(x, y):
    """What the tensor engine computes."""
    return jnp.matmul(*(v.astype(jnp.bfloat16).astype(jnp.float32) for v in (x, y)))


def program(choices, inputs, product):
    """Applies random operations to a growing pool of values; returns the last few."""
    pool = list(inputs)
    for op, (first, second, third) in choices:
        a, b = pool[first % len(pool)], pool[second % len(pool)]
        try:
            np.broadcast_shapes(a.shape, b.shape)
            alike = True
        except ValueError:
            alike = False
        if op == 0:
            value = jnp.tanh(a)
        elif op == 1:
            value = jax.nn.sigmoid(a) * a
        elif op == 2 and alike:
            value = a + b
        elif op == 3 and alike:
            value = jnp.clip(a * b, -3, 3)
        elif op == 4 and alike:
            value = a - 0.5 * b
        elif op == 5 and alike:
            value = jnp.where(a > b, a, 0.5 * b)
        elif op == 6 and alike:
            value = jnp.where(a > b, 1.0, a)
        elif op == 7 and a.ndim:
            value = a.T if a.ndim == 2 else a[:, None]
        elif op == 8 and a.ndim:
            value = a.sum(third % a.ndim) * 0.1
        elif op == 9 and a.ndim:
            value = a.max(third % a.ndim, keepdims=bool(third & 1))
        elif op == 10 and a.ndim == 2:
            value = a.reshape(-1)
        elif op == 11 and a.ndim == 2 and a.shape[0] > 2:
            value = a[1:, ::2]
        elif op >= 12 and a.ndim == b.ndim == 2:
            fits = [(x, y) for x in (a, a.T) for y in (b, b.T) if x.shape[1] == y.shape[0]]
            if not fits:
                continue
            value = jnp.tanh(0.3 * product(*fits[third % len(fits)]))
        else:
            continue
        if value.size <= 400:
            pool.append(value)
    return pool[len(inputs) :][-4:] or [pool[0] + 1.0]


@pytest.mark.parametrize("seed", range(20))
def test_random_program(seed):
    rng = np.random.default_rng(seed)
    m, k, f = (int(n) for n in rng.integers(1, 20, 3))
    inputs = [
        rng.normal(size=shape).astype(np.float32) for shape in ((m, k), (k, f), (k,), (m, 1), ())
    ]
    choices = [
        (int(rng.integers(0, 16)), tuple(int(n) for n in rng.integers(0, 1 << 30, 3)))
        for _ in range(rng.integers(5, 30))
    ]
    want = program(choices, [jnp.asarray(value) for value in inputs], rounded_product)
    ran = 0
    for config in CORES:
        with systolith.Device("golden", config=config, check=True, dram_bytes=1 << 20) as device:
            fn = systolith.jit(lambda *args: program(choices, args, jnp.matmul), device=device)
            try:
                got = fn(*inputs)
            except systolith.CompileError as error:
                assert "does not fit" in str(error) and config.sbuf_depth < 2048
                continue
            ran += 1
            for mine, theirs in zip(got, want, strict=True):
                assert mine.shape == theirs.shape
                # A sum one ulp apart may round to the next bfloat16 before the next product.
                np.testing.assert_allclose(mine, theirs, rtol=2e-2, atol=2e-2)
    assert ran
