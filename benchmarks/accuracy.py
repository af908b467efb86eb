"""Error of matrix products over K: each operand type, against float64 and the best open peer.

Inputs are float32 numbers uniform in [-1, 1]; results are FP32. Two errors are told apart. That
*of the sum* is against the float64 product of the operands as the tensor engine takes them, after
their rounding: what accumulation loses. That *of the whole* is against the float64 product of the
inputs: what a user sees. Runs on the golden model, whose bits are the chip's. Writes
docs/accuracy.md, accuracy.json and accuracy.svg; run it as ``make bench``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import systolith
from rich.console import Console
from rich.table import Table
from systolith_hdl.config import get_config

DOCS = Path(__file__).resolve().parent.parent / "docs"
DEPTHS = (64, 128, 256, 512, 1024, 2048, 4096)
ROWS = COLUMNS = 64
SEEDS = 4

#: `matmul=` -> (name in the tables, what rounds the inputs)
MODES = {
    "float32": ("FP32, six passes", np.float32),
    "float16": ("FP16", np.float16),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("FP8 E4M3", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("FP8 E5M2", ml_dtypes.float8_e5m2),
}
NUMPY = "numpy float32"
FP16_SUMS = "FP16 accumulation"
#: RedMulE (FP16 operands, FP16 accumulation), its RTL, inputs in [-1, 1]: maximum error of the sum
REDMULE = {64: 0.020, 256: 0.126, 512: 0.257}


def fp16_chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` of FP16 operands as a chain of FP16 fused multiply-adds, K in order."""
    acc = np.zeros((a.shape[0], b.shape[1]), np.float16)
    for k in range(a.shape[1]):
        exact = acc.astype(np.float64) + a[:, k : k + 1].astype(np.float64) * b[k]
        acc = exact.astype(np.float16)
    return acc


def errors(config: str, k: int) -> dict[str, dict[str, float]]:
    """mode -> maximum and RMS error of the sum and of the whole, over all seeds."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    with systolith.Device("golden", config=config) as device:
        products = {
            mode: systolith.jit(lambda a, b: a @ b, device=device, matmul=mode) for mode in MODES
        }
        for seed in range(SEEDS):
            rng = np.random.default_rng([k, seed])
            a = rng.uniform(-1, 1, (ROWS, k)).astype(np.float32)
            b = rng.uniform(-1, 1, (k, COLUMNS)).astype(np.float32)
            results = {}
            for mode, (name, dtype) in MODES.items():
                rounded = tuple(x.astype(dtype).astype(np.float64) for x in (a, b))
                results[name] = np.asarray(products[mode](a, b)), rounded
            results[NUMPY] = a @ b, tuple(x.astype(np.float64) for x in (a, b))
            halves = a.astype(np.float16), b.astype(np.float16)
            results[FP16_SUMS] = fp16_chain(*halves), tuple(x.astype(np.float64) for x in halves)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            for name, (result, (left, right)) in results.items():
                kinds = found.setdefault(name, {"sum": [], "whole": []})
                kinds["sum"].append(result - left @ right)
                kinds["whole"].append(result - exact)
    return {
        name: {
            f"{kind}_{norm}": float(measure(np.abs(lists)))
            for kind, lists in kinds.items()
            for norm, measure in (("max", np.max), ("rms", lambda e: np.sqrt(np.mean(e**2))))
        }
        for name, kinds in found.items()
    }


def plot(path: Path, measured: dict[int, dict[str, dict[str, float]]]) -> None:
    """Both maximum errors over K."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colors = {
        "FP8 E5M2": "#b58db6",
        "FP8 E4M3": "#7d4e9e",
        "BF16": "#1f4e8c",
        "FP16": "#3a9b6d",
        "FP32, six passes": "#111111",
        NUMPY: "#999999",
        FP16_SUMS: "#e0a890",
    }
    with matplotlib.rc_context({"svg.hashsalt": "systolith", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, 2, sharey=True)
        titles = {
            "sum": "Error of the sum\n(against float64 of the rounded operands)",
            "whole": "Error of the whole\n(against float64 of the inputs)",
        }
        for axis, (kind, title) in zip(axes, titles.items(), strict=True):
            for name, color in colors.items():
                style = "--" if name in (NUMPY, FP16_SUMS) else "-"
                values = [measured[k][name][f"{kind}_max"] or np.nan for k in DEPTHS]
                axis.plot(DEPTHS, values, style, marker="o", ms=3, color=color, label=name)
            if kind == "sum":
                axis.plot(
                    list(REDMULE), list(REDMULE.values()), "D", color="#c8622c",
                    label="RedMulE (FP16 accumulation)",
                )  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel="K", title=title)
            axis.set_xticks(DEPTHS, [str(k) for k in DEPTHS])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("maximum absolute error")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def page(config: str, measured: dict[int, dict[str, dict[str, float]]]) -> str:
    """docs/accuracy.md."""
    lanes = get_config(config).lanes
    lines = [
        "# Accuracy of matrix products",
        "",
        f"Made by `make bench` on the golden model, whose bits are the chip's: config `{config}`",
        f"(N = {lanes}), {SEEDS} products of {ROWS} x K by K x {COLUMNS}, inputs uniform in",
        "[-1, 1], results in FP32. [Numerics](numerics.md#tensor-engine) says how sums are made.",
        "",
        "![Maximum error over K](accuracy.svg)",
        "",
    ]
    names = [*(name for name, _ in MODES.values()), NUMPY, FP16_SUMS]
    peer = {k: f"{value:.3f}" for k, value in REDMULE.items()}
    heads = {
        "sum": [
            "## Error of the sum",
            "",
            "Against the float64 product of the operands as the tensor engine takes them, that is",
            "after rounding to their type: what accumulation loses. RedMulE's figures are of this",
            "kind, measured on its RTL; it accumulates in FP16. *FP16 accumulation* is such a",
            "chain of fused multiply-adds in numpy, on the inputs used here. Where the table has 0",
            "(the plot nothing), sums of FP8 products fit FP32. What numpy's float32 product gives",
            "depends on its BLAS.",
            "",
        ],
        "whole": [
            "## Error of the whole",
            "",
            "Against the float64 product of the inputs. Rounding the operands outweighs the sum in",
            "every narrow type.",
            "",
        ],
    }
    for kind, head in heads.items():
        lines += head
        shown = [*names, "RedMulE"] if kind == "sum" else names
        for norm, word in (("max", "Maximum"), ("rms", "RMS")):
            if norm == "rms" and kind == "sum":
                shown = names
            lines += [f"| {word} | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
            for k in DEPTHS:
                cells = [f"{measured[k][name][f'{kind}_{norm}']:.2g}" for name in names]
                if "RedMulE" in shown:
                    cells.append(peer.get(k, ""))
                lines.append(f"| K = {k} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="medium")
    options = parser.parse_args()
    console = Console()
    measured = {}
    for k in DEPTHS:
        console.print(f"[dim]K = {k}[/dim]")
        measured[k] = errors(options.config, k)
    table = Table("K", *measured[DEPTHS[0]], "RedMulE", title="Maximum error of the sum")
    for k in DEPTHS:
        cells = (f"{errors['sum_max']:.0e}" for errors in measured[k].values())
        table.add_row(str(k), *cells, f"{REDMULE[k]:.3f}" if k in REDMULE else "")
    console.print(table)
    (DOCS / "accuracy.md").write_text(page(options.config, measured))
    report = {"config": options.config, "redmule_sum_max": REDMULE, "errors": measured}
    (DOCS / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(DOCS / "accuracy.svg", measured)


if __name__ == "__main__":
    main()
