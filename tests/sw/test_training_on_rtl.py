"""Whole trainings on the chip's gates: the same bits as the golden device."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import systolith
from systolith.train import digits


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def digits_step():
    """(step, state, batches, MACs of a step) of the digits training."""
    data = digits.load()
    batch, steps = 32, 20
    batches = [
        (data.train_images[i * batch :][:batch], data.train_labels[i * batch :][:batch])
        for i in range(steps)
    ]
    macs = batch * (2 * 64 * 32 + 3 * 32 * 10)
    return digits.make_step(1e-3), digits.initial_state(0, 0.15), batches, macs


def odd_step():
    """The same of a three-layer tanh network of odd sizes."""
    rng = np.random.default_rng(5)
    sizes, batch, steps = (13, 37, 21, 3), 19, 20
    state = [
        (floats(rng, a, b) / math.sqrt(a), np.zeros(b, np.float32))
        for a, b in itertools.pairwise(sizes)
    ]

    def loss(layers, x, y):
        for w, b in layers[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = layers[-1]
        return jnp.mean((x @ w + b - y) ** 2)

    def step(layers, x, y):
        value, gradients = jax.value_and_grad(loss)(layers, x, y)
        return jax.tree.map(lambda p, g: p - 0.2 * g, layers, gradients), value

    x = floats(rng, batch, 13)
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2], np.cos(x[:, 3])], 1).astype(np.float32)
    return step, state, [(x, y)] * steps, batch * (2 * 13 * 37 + 3 * 37 * 21 + 3 * 21 * 3)


@pytest.mark.parametrize("config", ["nano", "small"])
def test_same_bits_as_golden(config):
    for name, make in {"digits": digits_step, "odd": odd_step}.items():
        results = {}
        for kind in ("golden", "rtl"):
            fn, state, batches, macs = make()
            with systolith.Device(kind, config=config) as device:
                step = systolith.jit(fn, device=device)
                losses = []
                for x, y in batches:
                    state, loss = step(state, x, y)
                    losses.append(np.asarray(loss))
                leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
                stats = step.stats()
            results[kind] = [*leaves, *losses]
            assert stats["macs"] == macs
            if kind == "rtl":
                assert stats["cycles"] > macs / device.config.peak_macs_per_cycle
                assert 0 < stats["tensor_utilization"] < 1
                assert all(0 < busy <= stats["cycles"] for busy in stats["busy"].values())
                print(
                    f"{name} on {config}: {stats['cycles']} cycles a step, tensor engine "
                    f"{stats['tensor_utilization']:.1%}, busy {stats['busy']}"
                )
        assert losses[-1] < losses[0]
        for golden, rtl in zip(results["golden"], results["rtl"], strict=True):
            np.testing.assert_array_equal(golden.view(np.uint32), rtl.view(np.uint32))
