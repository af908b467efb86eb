"""Handwritten digits: a small network trained from scratch, every operation on the chip.

The network is 64 -> 32 -> 10 with GELU; the loss is softmax cross-entropy; the optimizer is SGD
with momentum and a step size that falls linearly. Forward pass, gradients, optimizer and the
step size itself are one JAX function, `step`; the host only shuffles, picks batches, and compares
predictions with labels.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import nn
from ..api import Device, jit

INPUTS, HIDDEN, CLASSES = 64, 32, 10
TEST_IMAGES = 360
MOMENTUM = 0.9

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 digits of 8 x 8, split once and for all.

    Parameters
    ----------
    train_images, test_images : float32 [n, 64], 0 to 1
    train_labels, test_labels : float32 [n, 10], one-hot
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """Loads the data: 1437 images to train on, 360 to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.data[order] / 16.0).astype(np.float32)
    labels = np.eye(CLASSES, dtype=np.float32)[data.target[order]]
    split = len(order) - TEST_IMAGES
    return Digits(images[:split], labels[:split], images[split:], labels[split:])


def initial_params(seed: int) -> Params:
    """Random weights, zero biases."""
    rng = np.random.default_rng(seed)

    def weights(fan_in: int, fan_out: int, gain: float) -> np.ndarray:
        scale = math.sqrt(gain / fan_in)
        return (rng.normal(size=(fan_in, fan_out)) * scale).astype(np.float32)

    return {
        "w1": weights(INPUTS, HIDDEN, 2.0),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": weights(HIDDEN, CLASSES, 1.0),
        "b2": np.zeros(CLASSES, np.float32),
    }


def forward(params: Params, images: Any) -> jax.Array:
    """Logits [n, 10]."""
    hidden = nn.gelu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params: Params, images: Any, labels: Any) -> jax.Array:
    """Mean cross-entropy of a batch."""
    logits = forward(params, images)
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))


def make_step(drop: float) -> Callable[..., Any]:
    """Returns ``step(state, images, labels) -> (state, loss)``.

    The state holds ``params``, their ``velocity`` and the step size ``rate``, which falls by
    `drop` every step.
    """

    def step(state: dict[str, Any], images: Any, labels: Any) -> tuple[dict[str, Any], jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state["params"], images, labels)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, state["velocity"], gradients)
        params = jax.tree.map(lambda p, v: p - state["rate"] * v, state["params"], velocity)
        rate = jnp.maximum(state["rate"] - drop, 0.0)
        return {"params": params, "velocity": velocity, "rate": rate}, value

    return step


def initial_state(seed: int, rate: float) -> dict[str, Any]:
    """State before the first step."""
    params = initial_params(seed)
    return {
        "params": params,
        "velocity": jax.tree.map(np.zeros_like, params),
        "rate": np.float32(rate),
    }


def epochs_of_batches(
    data: Digits, *, epochs: int, batch: int, seed: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yields for each epoch its (images, labels), in an order that only `seed` decides.

    Images that do not fill a last batch sit the epoch out.
    """
    rng = np.random.default_rng([seed, 1])
    for _ in range(epochs):
        order = rng.permutation(len(data.train_images))
        chosen = [order[at : at + batch] for at in range(0, len(order) - batch + 1, batch)]
        yield [(data.train_images[c], data.train_labels[c]) for c in chosen]


def rate_drop(rate: float, steps: int) -> float:
    """What the step size loses each step to end at a twentieth of `rate`."""
    return 0.95 * rate / steps


@dataclasses.dataclass
class Result:
    """What a training gave.

    Parameters
    ----------
    losses : of every step
    epoch_losses, epoch_accuracies : mean training loss and test accuracy after each epoch
    params : final, on the host
    cycles, macs : simulated, of training and evaluation; cycles are 0 without a clock
    seconds : host time in which the device ran
    step_stats : figures of the last training step
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    epoch_losses: list[float] = dataclasses.field(default_factory=list)
    epoch_accuracies: list[float] = dataclasses.field(default_factory=list)
    params: Params = dataclasses.field(default_factory=dict)
    cycles: int = 0
    macs: int = 0
    seconds: float = 0.0
    step_stats: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch."""
        return self.epoch_accuracies[-1]


def train(
    device: Device,
    *,
    epochs: int = 10,
    batch: int = 32,
    rate: float = 0.15,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, loss, accuracy: None,
) -> Result:
    """Trains and evaluates on a device.

    Parameters
    ----------
    epochs, batch : see `epochs_of_batches`
    rate : step size at the beginning; it falls linearly to a twentieth
    seed : of the initial weights and the order of the images
    on_step : called with step, number of steps and loss
    on_epoch : called with epoch, mean loss and test accuracy
    """
    data = load()
    if not 1 <= batch <= len(data.train_images):
        raise ValueError(f"batch must be 1 to {len(data.train_images)}, not {batch}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    steps = epochs * (len(data.train_images) // batch)
    step = jit(make_step(rate_drop(rate, steps)), device=device)
    predict = jit(forward, device=device)
    result = Result()

    def timed(function: Any, *args: Any) -> Any:
        start = time.perf_counter()
        outputs = function(*args)
        result.seconds += time.perf_counter() - start
        stats = function.stats()
        result.cycles += stats["cycles"] or 0
        result.macs += stats["macs"]
        return outputs

    # One shape for all parts of the test images, of a size that any core holds.
    part = max(n for n in range(1, 8 * device.config.lanes) if TEST_IMAGES % n == 0)
    state = initial_state(seed, rate)
    schedule = epochs_of_batches(data, epochs=epochs, batch=batch, seed=seed)
    for epoch, batches in enumerate(schedule, start=1):
        losses: list[float] = []
        for images, labels in batches:
            state, value = timed(step, state, images, labels)
            losses.append(float(value))
            on_step(len(result.losses) + len(losses), steps, losses[-1])
        right = 0
        for start in range(0, TEST_IMAGES, part):
            chosen = np.arange(start, start + part)
            logits = np.asarray(timed(predict, state["params"], data.test_images[chosen]))
            right += int((logits.argmax(1) == data.test_labels[chosen].argmax(1)).sum())
        result.losses += losses
        result.epoch_losses.append(float(np.mean(losses)))
        result.epoch_accuracies.append(right / TEST_IMAGES)
        on_epoch(epoch, result.epoch_losses[-1], result.epoch_accuracies[-1])
    result.params = {name: np.asarray(value) for name, value in state["params"].items()}
    result.step_stats = step.stats()
    return result
