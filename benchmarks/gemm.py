"""GEMM on the RTL: utilization, against the best open peers' figures.

From DRAM to DRAM through the public API; between on-chip memories by a kernel (onchip.py).

Every product is held against the documented formula, bit for bit, before its cycles count. Writes
docs/performance.md and docs/performance.json; run it as ``make bench``. Cycles are exact and the
same on every machine; simulation speed is not, and is printed only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import onchip
import systolith
from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).resolve().parent.parent / "docs"
BF16 = ml_dtypes.bfloat16
FP8 = ml_dtypes.float8_e4m3fn
#: FP8 at twice the rate is measured on this core
PAIRS_CONFIG = "medium-fp8"

#: (m, k, n, DRAM latency) -> (peer's figure, target), utilization in percent
SQUARE = {
    (64, 64, 64, 20): (49.7, 70.0),
    (128, 128, 128, 20): (78.7, 88.0),
    (256, 256, 256, 20): (95.0, 97.0),
    (512, 512, 512, 20): (97.7, 99.0),
    (64, 64, 64, 100): (43.3, 58.0),
    (256, 256, 256, 100): (87.9, 96.0),
    (512, 512, 512, 100): (92.6, 98.5),
}
#: the same of INT8 operands and INT32 results
INT8 = {(256, 256, 256, 20): (95.0, 97.0)}
#: sizes and DRAM latencies of the FP8 products
FP8_SIZES = (64, 128, 256, 512)
FP8_LATENCIES = (20, 100)
#: compared with the same product rounded up to whole tiles
ODD = [(100, 77, 31), (17, 300, 5), (31, 77, 100), (5, 300, 17)]


def formula(a: np.ndarray, b: np.ndarray, lanes: int, *, pairs: bool = False) -> np.ndarray:
    """The documented sum: K in order, one FP32 rounding a step, tiles of `lanes` added up. With
    `pairs`, two tiles make one, in which k and k + `lanes` are summed first."""
    left, right = a.astype(np.float32), b.astype(np.float32)

    def outer(k: int) -> np.ndarray:
        return left[:, k : k + 1] * right[k : k + 1]

    depth = a.shape[1]
    paired = depth // lanes // 2 * 2 if pairs else 0
    steps = [*range(0, paired, 2), *range(paired, -(-depth // lanes))]
    result = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for step, first in enumerate(steps):
        tile = np.zeros_like(result)
        for k in range(first * lanes, min((first + 1) * lanes, depth)):
            tile += outer(k) + outer(k + lanes) if first < paired else outer(k)
        result = result + tile if step else tile
    return result


def measure(
    device: systolith.Device, m: int, k: int, n: int, kind: type = BF16
) -> dict[str, float]:
    """Cycles and utilization of one product, to BF16 or of INT8 to INT32, doorbell to interrupt;
    checks its bits."""
    rng = np.random.default_rng(m * 1_000_003 + k * 1_009 + n)
    made: type = BF16
    if kind is np.int8:
        a, b = (rng.integers(-128, 128, shape).astype(kind) for shape in ((m, k), (k, n)))
        expected = a.astype(np.int32) @ b.astype(np.int32)
        made = np.int32
    else:
        a, b = (rng.standard_normal(shape).astype(kind) for shape in ((m, k), (k, n)))
        pairs = kind is FP8 and device.config.fp8_rate == 2
        expected = formula(a, b, device.config.lanes, pairs=pairs).astype(BF16)

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.numpy.matmul(a, b, preferred_element_type=made)

    product = systolith.jit(multiply, device=device)
    began = time.perf_counter()
    found = np.asarray(product(a, b))
    seconds = time.perf_counter() - began
    assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes(), (m, k, n)
    stats = product.stats()
    return {
        "cycles": stats["cycles"],
        "macs": stats["macs"],
        "utilization": 100 * stats["tensor_utilization"],
        "seconds": seconds,
    }


def fp8(kind: str, config: str, progress: Callable[[str], None]) -> list[dict]:
    """FP8 products at twice the rate, and the same of BF16 on the same core."""
    rows = []
    for latency in FP8_LATENCIES:
        with systolith.Device(kind, config=config, dram_latency=latency, progress=progress) as dev:
            for size in FP8_SIZES:
                progress(f"FP8 {size} x {size} x {size}, latency {latency}")
                plain = measure(dev, size, size, size)
                row = measure(dev, size, size, size, FP8)
                rows.append({"shape": [size] * 3, "latency": latency, **row,
                             "bf16_cycles": plain["cycles"],
                             "ratio": plain["cycles"] / row["cycles"]})  # fmt: skip
    return rows


def squares(
    kind: str, config: str, progress: Callable[[str], None], operands: type = BF16
) -> list[dict]:
    """The square products, at their latencies."""
    rows = []
    products = INT8 if operands is np.int8 else SQUARE
    for latency in sorted({key[3] for key in products}):
        with systolith.Device(kind, config=config, dram_latency=latency, progress=progress) as dev:
            for (m, k, n, at), (peer, target) in products.items():
                if at == latency:
                    progress(f"{m} x {k} x {n}, latency {latency}")
                    row = measure(dev, m, k, n, operands)
                    rows.append({"shape": [m, k, n], "latency": at, "peer": peer,
                                 "target": target, **row})  # fmt: skip
    return rows


def odd_shapes(kind: str, config: str, progress: Callable[[str], None]) -> list[dict]:
    """Shapes that fill no tile, against those rounded up."""
    rows = []
    with systolith.Device(kind, config=config, progress=progress) as device:
        lanes = device.config.lanes
        for shape in ODD:
            progress(f"{shape}")
            row = measure(device, *shape)
            whole = measure(device, *(-(-size // lanes) * lanes for size in shape))
            rows.append({"shape": list(shape), **row, "ratio": row["cycles"] / whole["cycles"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="rtl")
    parser.add_argument("--config", default="medium")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("square", "int8", "odd", "fp8", "on-chip"),
        help="measure and print these rows; the pages are not written",
    )
    options = parser.parse_args()
    console = Console()

    def progress(line: str) -> None:
        console.print(f"[dim]{line}[/dim]")

    device, config = options.device, options.config
    measurements: dict[str, Callable[[], list[dict]]] = {
        "square": lambda: squares(device, config, progress),
        "int8": lambda: squares(device, config, progress, np.int8),
        "odd": lambda: odd_shapes(device, config, progress),
        "fp8": lambda: fp8(device, PAIRS_CONFIG, progress),
        "on-chip": lambda: onchip.rows(device, config, formula, progress),
    }
    square, int8, odd, double, on_chip = (
        measure_rows() if options.only is None or name in options.only else []
        for name, measure_rows in measurements.items()
    )

    lines = [
        "# Performance",
        "",
        f"Made by `make bench`: config `{options.config}`, BF16 operands and results, from DRAM to",
        "DRAM, doorbell to interrupt, DRAM bandwidth 2 bytes per lane and cycle in each direction.",
        "Utilization is MACs / (cycles x N x N). Every product equals the documented formula to",
        "the bit. The peer is Gemmini (int8, 16 x 16, its own RTL and tiling, under the same",
        "Verilator).",
        "",
    ]
    table = Table("product", "latency", "cycles", "utilization", "target", "peer", "M MAC/s")
    header = [
        "| product | DRAM latency | cycles | utilization | target | peer |",
        "|---|---|---|---|---|---|",
    ]
    lines += header
    for row in (*square, *int8):
        name = " x ".join(map(str, row["shape"]))
        if int8 and row is int8[0]:
            lines += ["", "INT8 operands, INT32 results:", "", *header]
        met = "" if row["utilization"] >= row["target"] else " (missed)"
        lines.append(
            f"| {name} | {row['latency']} | {row['cycles']:,} | {row['utilization']:.1f} % | "
            f"{row['target']:.1f} %{met} | {row['peer']:.1f} % |"
        )
        table.add_row(
            name + (" INT8" if row in int8 else ""), str(row["latency"]),
            f"{row['cycles']:,}", f"{row['utilization']:.1f} %",
            f"{row['target']:.1f} %{met}", f"{row['peer']:.1f} %",
            f"{row['macs'] / row['seconds'] / 1e6:.1f}",
        )  # fmt: skip
    lines += [
        "",
        "Shapes that fill no tile, against the same product rounded up to whole tiles (target: at",
        "most 1.15):",
        "",
        "| product | cycles | ratio |",
        "|---|---|---|",
    ]
    odd_table = Table("product", "cycles", "ratio to whole tiles")
    for row in odd:
        name = " x ".join(map(str, row["shape"]))
        met = "" if row["ratio"] <= 1.15 else " (missed)"
        lines.append(f"| {name} | {row['cycles']:,} | {row['ratio']:.2f}{met} |")
        odd_table.add_row(name, f"{row['cycles']:,}", f"{row['ratio']:.2f}")
    lines += [
        "",
        f"FP8 (E4M3) at twice the rate, config `{PAIRS_CONFIG}`: utilization is MACs / (cycles x",
        "2 x N x N), the ratio is cycles of the same product of BF16 operands on the same core to",
        "those of FP8, results of both BF16. Loads bound the small products: in an operand",
        "whose rows are turned, N FP8 elements take a beat of 2N bytes on their way in, and arrive",
        "no sooner than BF16 ones.",
        "",
        "| product | DRAM latency | cycles, BF16 | cycles, FP8 | utilization | ratio |",
        "|---|---|---|---|---|---|",
    ]
    double_table = Table("product", "latency", "BF16", "FP8", "utilization", "ratio")
    for row in double:
        cells = [
            " x ".join(map(str, row["shape"])), str(row["latency"]), f"{row['bf16_cycles']:,}",
            f"{row['cycles']:,}", f"{row['utilization']:.1f} %", f"{row['ratio']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        double_table.add_row(*cells)
    lines += [
        "",
        "## On chip",
        "",
        "Operands in SBUF, FP32 sums in PSUM, from 384 x 512 x 512 on moved to SBUF by the",
        "vector and scalar engines while the array works (`benchmarks/onchip.py`); loading",
        "operands before and storing results after are not counted. *Tensor engine* counts its",
        "BUSY cycles, from taking its first instruction to the write of the last sum in PSUM.",
        "*Program* counts CYCLES, from the doorbell to the last engine's END: the fetch of",
        "instructions from DRAM and, if there is one, the last move to SBUF included. The",
        "target is for the tensor engine. The peer is RedMulE (FP16 with FP16 accumulation, 48",
        "FMAs, its own RTL, ideal memory beside it), from its first operand to its last result.",
        "",
        "| product | tensor engine, cycles | utilization | target | program, cycles | utilization "
        "| peer |",
        "|---|---|---|---|---|---|---|",
    ]
    on_chip_table = Table("on chip", "cycles", "utilization", "target", "program", "peer")
    for row in on_chip:
        name = " x ".join(map(str, row["shape"]))
        met = "" if row["utilization"] >= row["target"] else " (missed)"
        lines.append(
            f"| {name} | {row['tensor_cycles']:,} | {row['utilization']:.2f} % | "
            f"{row['target']:.1f} %{met} | {row['program_cycles']:,} | "
            f"{row['program_utilization']:.2f} % | {row['peer']:.1f} % |"
        )
        on_chip_table.add_row(
            name, f"{row['tensor_cycles']:,}", f"{row['utilization']:.2f} %",
            f"{row['target']:.1f} %{met}", f"{row['program_utilization']:.2f} %",
            f"{row['peer']:.1f} %",
        )  # fmt: skip
    console.print(table)
    console.print(odd_table)
    console.print(double_table)
    console.print(on_chip_table)
    if options.only is not None:
        return
    (DOCS / "performance.md").write_text("\n".join(lines) + "\n")
    for row in (*square, *int8, *odd, *double):
        del row["seconds"]
    report = {
        "config": options.config,
        "square": square,
        "int8": int8,
        "odd": odd,
        "fp8": double,
        "on_chip": on_chip,
    }
    (DOCS / "performance.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
