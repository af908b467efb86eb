"""A small transformer that learns to write like the descriptions of scikit-learn's datasets.

A causal language model of characters: embeddings, blocks of attention and a gated perceptron behind
RMS norms, cross-entropy, AdamW. The whole step, forward, backward and optimizer, is one JAX
function that runs on the chip; attention, norms, perceptron, loss and optimizer are kernels of
`systolith.kernels` with gradients of their own, the products between them are compiled. The host
picks pieces of text, turns characters into one-hot rows and draws from the predictions.

    python examples/transformer.py                              # all gates, config small
    python examples/transformer.py --device golden --steps 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import systolith
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from systolith import kernels

BETA1, BETA2 = 0.9, 0.99
Params = dict[str, Any]


class Text:
    """The text to learn: lower case, in the few characters that it has.

    Parameters
    ----------
    characters : what there is, in order
    codes : int [length], the text as places in `characters`
    """

    def __init__(self, text: str) -> None:
        self.characters = "".join(sorted(set(text)))
        place = {character: code for code, character in enumerate(self.characters)}
        self.codes = np.array([place[character] for character in text])

    @classmethod
    def of_datasets(cls) -> Text:
        """What scikit-learn has to say on its datasets."""
        from sklearn import datasets

        loaders = (
            datasets.load_iris, datasets.load_wine, datasets.load_digits,
            datasets.load_diabetes, datasets.load_breast_cancer,
        )  # fmt: skip
        words = " ".join(loader().DESCR for loader in loaders).lower().split()
        kept = [word for word in words if word.strip(".,:;()'\"-").isalpha()]
        return cls(" ".join("".join(c for c in word if c.isalpha() or c in ".,") for word in kept))

    def one_hot(self, codes: np.ndarray) -> np.ndarray:
        """float32 [length, characters]."""
        return np.eye(len(self.characters), dtype=np.float32)[codes]

    def piece(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A piece of the text and the same one character later, one-hot."""
        at = int(rng.integers(len(self.codes) - length))
        rows = self.one_hot(self.codes[at : at + length + 1])
        return rows[:-1], rows[1:]


def initial_params(vocabulary: int, *, context: int, width: int, layers: int, seed: int) -> Params:
    """Random weights of variance 1 / inputs; gains of the norms are 1."""
    rng = np.random.default_rng(seed)

    def weights(rows: int, columns: int) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)

    def gain() -> np.ndarray:
        return np.ones(width, np.float32)

    return {
        "embedding": weights(vocabulary, width),
        "position": weights(context, width),
        "layers": [
            {
                "attention_gain": gain(),
                "query": weights(width, width),
                "key": weights(width, width),
                "value": weights(width, width),
                "out": weights(width, width),
                "mlp_gain": gain(),
                "gate": weights(width, 2 * width),
                "up": weights(width, 2 * width),
                "down": weights(2 * width, width),
            }
            for _ in range(layers)
        ],
        "gain": gain(),
        "unembedding": weights(width, vocabulary),
    }


def forward(params: Params, tokens: Any, *, heads: int) -> jax.Array:
    """Logits [context, characters] of the next character, from one-hot tokens of that shape."""
    x = tokens @ params["embedding"] + params["position"]
    for layer in params["layers"]:
        h = kernels.rmsnorm(x, layer["attention_gain"])
        mixed = kernels.attention(
            h @ layer["query"], h @ layer["key"], h @ layer["value"], causal=True, heads=heads
        )
        x = x + mixed @ layer["out"]
        h = kernels.rmsnorm(x, layer["mlp_gain"])
        x = x + kernels.swiglu_mlp(h, layer["gate"], layer["up"], layer["down"])
    return kernels.rmsnorm(x, params["gain"]) @ params["unembedding"]


def make_step(heads: int) -> Callable[..., Any]:
    """``step(state, tokens, targets, rates) -> (state, loss)``; see `kernels.adamw` for rates."""

    def loss(params: Params, tokens: Any, targets: Any) -> jax.Array:
        return jnp.mean(kernels.cross_entropy(forward(params, tokens, heads=heads), targets))

    def step(state: Params, tokens: Any, targets: Any, rates: Any) -> tuple[Params, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state["params"], tokens, targets)
        leaves, shape = jax.tree.flatten(state["params"])
        updated = [
            kernels.adamw(*leaf, rates, beta1=BETA1, beta2=BETA2, decay=0.01)
            for leaf in zip(
                leaves, *(jax.tree.leaves(t) for t in (gradients, state["mean"], state["square"])),
                strict=True,
            )
        ]  # fmt: skip
        parts = zip(*updated, strict=True)
        params, mean, square = (jax.tree.unflatten(shape, part) for part in parts)
        return {"params": params, "mean": mean, "square": square}, value

    return step


def rates(step: int, steps: int, rate: float) -> np.ndarray:
    """Input of `kernels.adamw` at a step from 1 on: the rate falls linearly to a twentieth."""
    falling = rate * (1 - 0.95 * (step - 1) / steps)
    return np.array([falling, 1 / (1 - BETA1**step), 1 / (1 - BETA2**step)], np.float32)


def initial_state(params: Params) -> Params:
    """State before the first step."""
    zeros = jax.tree.map(np.zeros_like, params)
    return {"params": params, "mean": zeros, "square": jax.tree.map(np.copy, zeros)}


def write(
    predict: Callable[..., Any], params: Params, text: Text, *, context: int, length: int, seed: int
) -> str:
    """Text that the model writes after a piece of the learned one."""
    rng = np.random.default_rng(seed)
    at = int(rng.integers(len(text.codes) - context))
    codes = list(text.codes[at : at + context])
    for _ in range(length):
        logits = np.asarray(predict(params, text.one_hot(np.array(codes[-context:]))))[-1]
        odds = np.exp((logits - logits.max()) / 0.6)
        codes.append(int(rng.choice(len(odds), p=odds / odds.sum())))
    return "".join(text.characters[code] for code in codes[context:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("rtl", "rtl-fast", "golden"), default="rtl")
    parser.add_argument("--config", default="small")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--context", type=int, default=48, help="characters of a piece")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=int, default=80, help="characters to write at the end")
    parser.add_argument("--plot", type=Path, help="write a picture of the loss")
    options = parser.parse_args()
    if min(options.steps, options.context, options.width, options.layers, options.heads) < 1:
        parser.error("steps, context, width, layers and heads must be at least 1")
    if options.width % options.heads:
        parser.error(f"width {options.width} is not a multiple of {options.heads} heads")

    console = Console()
    text = Text.of_datasets()
    params = initial_params(
        len(text.characters), context=options.context, width=options.width,
        layers=options.layers, seed=options.seed,
    )  # fmt: skip
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(
        f"{len(text.codes):,} characters of {len(text.characters)} kinds, {count:,} weights"
    )
    rng = np.random.default_rng([options.seed, 1])
    losses: list[float] = []
    cycles = macs = 0
    with systolith.Device(options.device, config=options.config, progress=console.print) as device:
        step = systolith.jit(make_step(options.heads), device=device)
        state = initial_state(params)
        began = time.perf_counter()
        with Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn(), console=console,
        ) as progress:  # fmt: skip
            task = progress.add_task("", total=options.steps, loss="-")
            for number in range(1, options.steps + 1):
                now = rates(number, options.steps, options.rate)
                state, value = step(state, *text.piece(options.context, rng), now)
                losses.append(float(value))
                cycles += step.stats()["cycles"] or 0
                macs += step.stats()["macs"]
                recent = float(np.mean(losses[-20:]))
                progress.update(task, completed=number, loss=f"{recent:.3f}")
        seconds = time.perf_counter() - began
        first, last = (float(np.mean(part)) for part in (losses[:10], losses[-20:]))
        console.print(f"loss {first:.3f} -> {last:.3f} in {seconds:.0f} s, {macs:,} MACs")
        if cycles:
            console.print(
                f"{cycles:,} cycles, {cycles / seconds:,.0f} per second, tensor engine "
                f"{macs / (cycles * device.config.peak_macs_per_cycle):.1%}"
            )
        if options.write:
            predict = systolith.jit(
                lambda params, tokens: forward(params, tokens, heads=options.heads), device=device
            )
            console.print("it writes: ", end="")
            console.print(
                write(
                    predict, state["params"], text, context=options.context,
                    length=options.write, seed=options.seed,
                ),
                style="italic", markup=False, highlight=False,
            )  # fmt: skip
    if options.plot:
        import matplotlib.pyplot as plt

        plt.plot(losses)
        plt.xlabel("step")
        plt.ylabel("cross-entropy")
        plt.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
