"""Report folders: the loss curve as a picture, the figures as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .digits import Result


def write(folder: Path, result: Result, figures: dict[str, Any], title: str) -> None:
    """Writes ``loss.png`` and ``report.json``.

    Parameters
    ----------
    figures : what the training was run with and what it took, for the JSON file
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        **figures,
        "test_accuracy": result.accuracy,
        "epoch_losses": result.epoch_losses,
        "epoch_accuracies": result.epoch_accuracies,
        "losses": result.losses,
        "last_step": result.step_stats,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _plot(folder / "loss.png", result, title)


def _plot(path: Path, result: Result, title: str) -> None:
    # Not pyplot: it would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.arange(1, len(result.losses) + 1)
    ends = (
        len(result.losses) / len(result.epoch_losses) * np.arange(1, len(result.epoch_losses) + 1)
    )
    axes.plot(steps, result.losses, color="#b9c6d8", linewidth=0.8, label="loss of a step")
    axes.plot(ends, result.epoch_losses, "o-", color="#1f4e8c", label="mean of an epoch")
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title=title)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(ends, 100 * np.array(result.epoch_accuracies), "s--", color="#c8622c")
    right.set_ylabel("test accuracy (%)", color="#c8622c")
    axes.legend(loc="center right")
    figure.savefig(path)
