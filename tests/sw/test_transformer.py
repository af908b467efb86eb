"""The transformer example: equal to the same step in plain JAX but for the rounding of operands,
the same bits on the gates, and it learns."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import systolith

HEADS, CONTEXT, WIDTH = 2, 7, 8


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "transformer.py"
    spec = importlib.util.spec_from_file_location("transformer_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(example: ModuleType) -> Any:
    return example.Text("abcab cabba, acab bac. " * 8)


def params_of(example: ModuleType, text: Any) -> Any:
    return example.initial_params(
        len(text.characters), context=CONTEXT, width=WIDTH, layers=1, seed=3
    )


def plain_loss(params: Any, tokens: Any, targets: Any) -> jax.Array:
    """The same model in float32 without a kernel of ours."""

    def norm(x: Any, gain: Any) -> Any:
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain

    x = tokens @ params["embedding"] + params["position"]
    for layer in params["layers"]:
        h = norm(x, layer["attention_gain"])
        q, k, v = (
            jnp.reshape(h @ layer[name], (CONTEXT, HEADS, WIDTH // HEADS))
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + mixed.reshape(CONTEXT, WIDTH) @ layer["out"]
        h = norm(x, layer["mlp_gain"])
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    logits = norm(x, params["gain"]) @ params["unembedding"]
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


def test_a_step_is_that_of_plain_jax(example: ModuleType, text: Any) -> None:
    params = params_of(example, text)
    tokens, targets = text.piece(CONTEXT, np.random.default_rng(0))
    want, gradients = jax.value_and_grad(plain_loss)(params, tokens, targets)
    with systolith.Device("golden", config="nano", check=True) as device:
        step = systolith.jit(example.make_step(HEADS), device=device)
        state, value = step(
            example.initial_state(params), tokens, targets, example.rates(1, 10, 0.01)
        )
        mean = jax.tree.map(np.asarray, state["mean"])
        assert abs(float(value) - float(want)) < 0.02 * float(want)
    # After the first step the mean is a tenth of the gradient.
    for got, true in zip(jax.tree.leaves(mean), jax.tree.leaves(gradients), strict=True):
        true = np.asarray(true)
        assert np.abs(got / (1 - example.BETA1) - true).max() < 0.05 * np.abs(true).max() + 1e-4


def test_it_learns_and_the_gates_give_the_same_bits(example: ModuleType, text: Any) -> None:
    results = {}
    for kind, steps in (("golden", 30), ("rtl", 2)):
        state = example.initial_state(params_of(example, text))
        rng = np.random.default_rng(1)
        losses = []
        with systolith.Device(kind, config="nano") as device:
            step = systolith.jit(example.make_step(HEADS), device=device)
            for number in range(1, steps + 1):
                tokens, targets = text.piece(CONTEXT, rng)
                state, value = step(state, tokens, targets, example.rates(number, 30, 0.03))
                losses.append(np.float32(value))
        results[kind] = losses
    assert np.mean(results["golden"][:3]) > 0.8 * math.log(len(text.characters))
    assert np.mean(results["golden"][-5:]) < 0.75 * np.mean(results["golden"][:3])
    assert [loss.view(np.uint32) for loss in results["rtl"]] == [
        loss.view(np.uint32) for loss in results["golden"][:2]
    ]


def test_the_text_is_there(example: ModuleType) -> None:
    text = example.Text.of_datasets()
    assert len(text.codes) > 5000 and 25 < len(text.characters) < 40
    tokens, targets = text.piece(12, np.random.default_rng(0))
    assert (tokens[1:] == targets[:-1]).all() and (tokens.sum(axis=1) == 1).all()
