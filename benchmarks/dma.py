"""Bandwidth of a DMA queue on the gates, against that of the DRAM model; writes docs/dma.md and
docs/dma.json.

    python benchmarks/dma.py [--device rtl-fast] [--configs nano small] [--print]

Part of ``make bench``. Every case is a program of one measured instruction, compared with the
golden model bit for bit. Cycles are those in which the queue had work, so they hold the latency of
DRAM once; they are exact and the same on every machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from systolith.kernel import DType, KernelBuilder, View
from systolith.program import Program
from systolith.runtime import Driver, open_backend
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.formats import FORMATS

DOCS = Path(__file__).resolve().parent.parent / "docs"
TARGET = 90.0  #: percent of the DRAM model's bandwidth, rows of 512 bytes and more
ROWS = (512, 1024, 4096)  #: bytes
Make = Callable[[KernelBuilder, int, DType, int], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Parameters
    ----------
    name, doc : of the table
    make : ``make(nc, row bytes, type, rows)``: the program, with tensors ``x``, ``y`` or both
    bounded : the target holds for it
    step : the number of rows is a multiple of it; None: of that of partitions
    """

    name: str
    doc: str
    make: Make
    bounded: bool = True
    step: int | None = 1


def _tensors(nc: KernelBuilder, row: int, dtype: DType, rows: int, kind: str) -> dict:
    """A matrix with twice the columns that are moved, so that its rows lie apart."""
    columns = row // FORMATS[dtype].bytes
    tensor = nc.dram.tensor("x", (rows, 2 * columns), dtype, kind=kind)
    return {"columns": columns, "tensor": tensor, "item": tensor.itemsize}


def _view(nc: KernelBuilder, rows: int, columns: int) -> View:
    """Rows one after the other, elements across the partitions."""
    per_row = columns // nc.config.lanes
    return nc.sbuf.tile(rows * per_row).view((rows, per_row))


def _after_fetches(nc: KernelBuilder, view: View) -> Callable[..., None]:
    """`nc.dma.load`, once the engines have fetched their instructions: that takes the same bus."""
    nc.vector.memset(view, 0.0)
    return nc.dma.load


def _rows(store: bool) -> Make:
    def make(nc: KernelBuilder, row: int, dtype: DType, rows: int) -> None:
        t = _tensors(nc, row, dtype, rows, "output" if store else "input")
        view = _view(nc, rows, t["columns"])
        lanes, item = nc.config.lanes, t["item"]
        transfer = nc.dma.store if store else _after_fetches(nc, view)
        transfer(view, t["tensor"], 0, (2 * row, lanes * item), item, queue=0)

    return make


def _four(store: bool) -> Make:
    def make(nc: KernelBuilder, row: int, dtype: DType, rows: int) -> None:
        """Rows in another order, from and to places apart in all dimensions."""
        t = _tensors(nc, row, dtype, rows, "output" if store else "input")
        lanes, item = nc.config.lanes, t["item"]
        per_row = t["columns"] // lanes
        tile = nc.sbuf.tile(rows * per_row)
        # Row 4b + 2c + a of SBUF is row 4b + 2 (1 - c) + a of DRAM, and a is outermost.
        view = tile.view((2, rows // 4, 2, per_row), (per_row, 4 * per_row, 2 * per_row, 1))
        strides = (2 * row, 8 * row, -4 * row, lanes * item)
        transfer = nc.dma.store if store else _after_fetches(nc, view)
        transfer(view, t["tensor"], 4 * row, strides, item, queue=0)

    return make


def _turned(store: bool) -> Make:
    def make(nc: KernelBuilder, row: int, dtype: DType, rows: int) -> None:
        """A row to a partition."""
        t = _tensors(nc, row, dtype, rows, "output" if store else "input")
        lanes, item = nc.config.lanes, t["item"]
        view = nc.sbuf.tile(rows // lanes * t["columns"]).view((rows // lanes, t["columns"]))
        transfer = nc.dma.store if store else _after_fetches(nc, view)
        transfer(view, t["tensor"], 0, (2 * row * lanes, item), 2 * row, queue=0)

    return make


def _indexed(store: bool, *, accumulate: bool = False) -> Make:
    def make(nc: KernelBuilder, row: int, dtype: DType, rows: int) -> None:
        t = _tensors(nc, row, dtype, rows, "output" if store and not accumulate else "input")
        lanes = nc.config.lanes
        order = np.random.default_rng(row).permutation(rows).astype(np.int32)
        if accumulate:
            order //= 2  # each twice
        columns = -(-rows // lanes)
        numbers = nc.dram.tensor(
            "numbers", kind="constant", data=np.resize(order, (columns, lanes))
        )
        index = nc.sbuf.tile(columns).view().astype(DType.INT32)
        # On the other queue, if there is one: it is not what is measured.
        nc.dma.load(index, numbers, 0, (4 * lanes,), 4, queue=nc.config.dma_queues - 1)
        view = _view(nc, rows, t["columns"])
        transfer = nc.dma.scatter if store else nc.dma.gather
        transfer(view, t["tensor"], index, queue=0, accumulate=accumulate)

    return make


def _added(nc: KernelBuilder, row: int, dtype: DType, rows: int) -> None:
    t = _tensors(nc, row, dtype, rows, "input")
    view = _view(nc, rows, t["columns"])
    lanes, item = nc.config.lanes, t["item"]
    load = _after_fetches(nc, view)
    load(view, t["tensor"], 0, (2 * row, lanes * item), item, queue=0, accumulate=True)


CASES = (
    Case("load", "rows of a matrix, elements across the partitions", _rows(False)),
    Case("store", "the same back", _rows(True)),
    Case(
        "4-D load",
        "rows in another order, strides in all dimensions of both sides",
        _four(False),
        step=4,
    ),
    Case("4-D store", "the same back", _four(True), step=4),
    Case("turned load", "a row to each partition", _turned(False), step=None),
    Case("turned store", "the same back", _turned(True), step=None),
    Case("gather", "rows in random order, by an index each", _indexed(False)),
    Case("scatter", "the same back", _indexed(True)),
    Case("accumulating load", "added to SBUF, an element per cycle", _added, bounded=False),
    Case(
        "scatter-add",
        "each row read, added and written before the next",
        _indexed(True, accumulate=True),
        bounded=False,
    ),
)


def run(driver: Driver, program: Program) -> tuple[int, list[np.ndarray]]:
    """Cycles of the queue, and what DRAM and SBUF hold then."""
    loaded = driver.load(program)
    rng = np.random.default_rng(1)
    for tensor in program.tensors:
        if tensor.kind in ("input", "output"):
            values = rng.standard_normal(tensor.shape).astype(FORMATS[tensor.dtype].numpy)
            driver.write(loaded.tensors[tensor.name], values)
    counters = driver.run(loaded)
    found = [driver.read(loaded.tensors[t.name]) for t in program.tensors]
    loaded.unload()
    return counters.busy["dma0"], found


def total(config: CoreConfig) -> int:
    """Bytes that a case moves, about: of BF16 they take three quarters of SBUF."""
    return config.sbuf_depth * config.lanes * 4 * 3 // 8


def spill(config: CoreConfig) -> Program:
    """Stores what SBUF holds; SBUF is kept from program to program."""
    nc = KernelBuilder(config, name="spill")
    columns = config.sbuf_depth
    words = nc.dram.tensor("words", (columns, config.lanes), DType.INT32, kind="output")
    nc.dma.store(nc.sbuf.tile(columns).view(), words, lane_stride=4)
    return nc.finish()


def measure(kind: str, config: CoreConfig, progress: Callable[[str], None]) -> Iterator[dict]:
    """Every case on one core."""
    with (
        Driver(open_backend(kind, config, progress=progress)) as driver,
        Driver(open_backend("golden", config)) as golden,
    ):
        for case in CASES:
            for dtype in (DType.FP32, DType.BF16):
                for row in ROWS:
                    step = case.step or config.lanes
                    rows = max(total(config) // row // step, 1) * step
                    nc = KernelBuilder(config, name=case.name)
                    case.make(nc, row, dtype, rows)
                    program = nc.finish()
                    cycles, found = run(driver, program)
                    _, wanted = run(golden, program)
                    for device, results in ((driver, found), (golden, wanted)):
                        results += run(device, spill(config))[1]
                    for mine, theirs in zip(found, wanted, strict=True):
                        assert mine.tobytes() == theirs.tobytes(), (case.name, dtype, row)
                    share = 100 * rows * row / (cycles * config.axi_bytes)
                    yield {
                        "config": config.name,
                        "case": case.name,
                        "type": dtype.name,
                        "row": row,
                        "bytes": rows * row,
                        "cycles": cycles,
                        "bandwidth": share,
                        "target": TARGET if case.bounded else None,
                    }


def page(found: list[dict]) -> str:
    """The text of docs/dma.md."""
    lines = [
        "<!-- Generated by `python benchmarks/dma.py`. -->",
        "",
        "# DMA bandwidth",
        "",
        "One instruction of one queue on the RTL: three eighths of SBUF's bytes, in rows that lie",
        "apart in DRAM. *Bandwidth* is bytes moved (of a scatter-add, bytes added) per cycle in",
        "which the queue had work, against what the DRAM model moves at most: a beat of 2 bytes",
        "per lane, at least 8. The latency of DRAM is in them, 20 cycles. The target for rows of",
        f"512 bytes and more is {TARGET:.0f} %; additions are outside: a queue has one adder.",
        "",
        "| transfer | |",
        "|---|---|",
        *(f"| {case.name} | {case.doc} |" for case in CASES),
    ]
    for config in dict.fromkeys(row["config"] for row in found):
        lines += ["", f"## {config}", "", "| transfer | type | row, bytes | cycles | bandwidth |"]
        lines.append("|---|---|---|---|---|")
        for row in found:
            if row["config"] != config:
                continue
            missed = row["target"] is not None and row["bandwidth"] < row["target"]
            lines.append(
                f"| {row['case']} | {row['type']} | {row['row']:,} | {row['cycles']:,} | "
                f"{row['bandwidth']:.1f} %{' (missed)' if missed else ''} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="rtl", choices=("rtl", "rtl-fast"))
    parser.add_argument("--configs", nargs="+", default=["nano", "small"])
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    console = Console()
    found: list[dict] = []
    table = Table("config", "transfer", "type", "row", "cycles", "bandwidth")
    for name in options.configs:
        for row in measure(options.device, get_config(name), console.print):
            found.append(row)
            table.add_row(
                name, row["case"], row["type"], f"{row['row']:,}", f"{row['cycles']:,}",
                f"{row['bandwidth']:.1f} %",
            )  # fmt: skip
    console.print(table)
    if options.print:
        return
    (DOCS / "dma.md").write_text(page(found))
    (DOCS / "dma.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
