"""The digits training on the golden device, against the same step run by JAX in float32."""

import jax
import numpy as np
import systolith
from systolith.train import digits


def test_accuracy_is_that_of_float32():
    epochs, batch, rate, seed = 10, 32, 0.15, 0
    with systolith.Device("golden", config="small") as device:
        result = digits.train(device, epochs=epochs, batch=batch, rate=rate, seed=seed)

    data = digits.load()
    assert len(data.train_images) == 1437 and len(data.test_images) == 360
    assert data.train_images.min() == 0.0 and data.train_images.max() == 1.0
    step = jax.jit(digits.make_step(digits.rate_drop(rate, len(result.losses))))
    state = digits.initial_state(seed, rate)
    losses = []
    for batches in digits.epochs_of_batches(data, epochs=epochs, batch=batch, seed=seed):
        for images, labels in batches:
            state, loss = step(state, images, labels)
            losses.append(float(loss))
    guesses = np.asarray(digits.forward(state["params"], data.test_images)).argmax(1)
    accuracy = float((guesses == data.test_labels.argmax(1)).mean())

    first = np.abs(np.array(result.losses[:20]) - losses[:20]).max()
    print(
        f"{len(losses)} steps: test accuracy {result.accuracy:.2%} on the chip, {accuracy:.2%} in "
        f"float32; losses of the first 20 steps at most {first:.1e} apart"
    )
    assert len(losses) == len(result.losses) == 440
    assert result.accuracy >= 0.96
    assert abs(result.accuracy - accuracy) <= 0.015
    assert first < 2e-2
    products = 2 * 64 * 32 + 3 * 32 * 10
    assert result.macs == 440 * batch * products + epochs * 360 * (64 * 32 + 32 * 10)
    np.testing.assert_allclose(state["rate"], rate / 20, rtol=1e-3)
