"""Weights kept in bfloat16: rounding to nearest loses most updates, stochastic rounding does not.

A step of plain SGD moves most weights by less than half a unit of bfloat16's 8 bits. Rounding to
nearest throws every such move away; stochastic rounding makes one move of a whole unit out of it
now and then, so that the weights follow the gradient on average, as those in float32 do.

The network is that of ``systolith train digits``. Everything but the weights is float32 in all
three trainings, and there is no second copy of the weights.

    python examples/stochastic_rounding.py
    python examples/stochastic_rounding.py --device rtl --config nano --epochs 1
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import systolith
from rich.console import Console
from rich.table import Table
from systolith.train import digits

#: name -> (type of the weights, rounding)
WAYS = {
    "float32": ("float32", "nearest"),
    "bfloat16, to nearest": ("bfloat16", "nearest"),
    "bfloat16, stochastically": ("bfloat16", "stochastic"),
}


@dataclasses.dataclass
class Run:
    """One training: its losses, the mean of each epoch, test accuracy and final weights."""

    losses: list[float]
    epoch_losses: list[float]
    accuracy: float
    params: dict[str, np.ndarray]


def make_step(dtype: str, rate: float) -> Callable[..., Any]:
    """``step(params, images, labels) -> (params, loss)`` with weights of a type."""

    def step(params: dict[str, Any], images: Any, labels: Any) -> tuple[dict[str, Any], jax.Array]:
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        loss, gradients = jax.value_and_grad(digits.loss)(wide, images, labels)
        # The only place where a rounding to the type of the weights happens.
        return jax.tree.map(lambda p, g: (p - rate * g).astype(dtype), wide, gradients), loss

    return step


def train(
    dtype: str,
    rounding: str,
    *,
    device: str = "golden",
    config: str = "small",
    epochs: int = 20,
    steps: int | None = None,
    rate: float = 0.01,
    seed: int = 0,
) -> Run:
    """Trains with weights of a type, rounded in one way.

    Parameters
    ----------
    device, config : where
    epochs, rate : passes over the images, step size
    steps : of each epoch; default: all of its batches of 32 images
    seed : of stochastic rounding
    """
    data = digits.load()
    params = {
        name: jnp.asarray(value).astype(dtype) for name, value in digits.initial_params(0).items()
    }
    run = Run([], [], 0.0, {})
    with systolith.Device(device, config=config, seed=seed) as chip:
        step = systolith.jit(make_step(dtype, rate), device=chip, rounding=rounding)
        for batches in digits.epochs_of_batches(data, epochs=epochs, batch=32, seed=0):
            losses = []
            for images, labels in batches[:steps]:
                params, loss = step(params, images, labels)
                losses.append(float(loss))
            run.losses += losses
            run.epoch_losses.append(float(np.mean(losses)))
        run.params = {name: np.asarray(value) for name, value in params.items()}
    wide = {name: value.astype(np.float32) for name, value in run.params.items()}
    guesses = np.asarray(digits.forward(wide, data.test_images)).argmax(1)
    run.accuracy = float((guesses == data.test_labels.argmax(1)).mean())
    return run


def plot(runs: dict[str, Run], path: Path) -> None:
    """Draws the losses of all trainings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("-", ":", "--"), strict=True):
        epochs = range(1, len(run.epoch_losses) + 1)
        axes.plot(epochs, run.epoch_losses, style, linewidth=2, label=f"weights in {name}")
    axes.set(xlabel="epoch", ylabel="mean training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="golden", choices=("golden", "rtl", "rtl-fast"))
    parser.add_argument("--config", default="small")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="where to draw the losses")
    given = parser.parse_args()
    console = Console()
    runs = {}
    for name, (dtype, rounding) in WAYS.items():
        console.print(f"training with weights in {name} ...")
        runs[name] = train(
            dtype,
            rounding,
            device=given.device,
            config=given.config,
            epochs=given.epochs,
            rate=given.rate,
            seed=given.seed,
        )
    table = Table("epoch", *WAYS, title=f"mean loss, {given.device} / {given.config}")
    for epoch in range(given.epochs):
        table.add_row(str(epoch + 1), *(f"{run.epoch_losses[epoch]:.4f}" for run in runs.values()))
    table.add_section()
    table.add_row("test accuracy", *(f"{run.accuracy:.1%}" for run in runs.values()))
    console.print(table)
    if given.plot is not None:
        plot(runs, given.plot)


if __name__ == "__main__":
    main()
