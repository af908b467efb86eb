"""What the tools said, as ``report.json``, ``report.md``, ``report.html`` and pictures."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

from systolith_hdl.config import CoreConfig

from .flow import Route, Synthesis
from .netlist import Design
from .targets import Kind

#: Resources in the order of tables: key in `Synthesis.totals`, heading.
_COLUMNS = [
    ("lut", "LUTs"),
    ("carry", "carry"),
    ("ff", "flip-flops"),
    ("lutram", "LUT RAM"),
    ("bram", "block RAM"),
    ("dsp", "DSPs"),
]
#: Paths shown, of the worst.
_STAGES = 12


def collect(
    synthesis: Synthesis,
    config: CoreConfig,
    block: str,
    *,
    routes: list[Route] | None = None,
    error: str = "",
    tools: list[str] = (),  # type: ignore[assignment]
) -> dict[str, Any]:
    """Gathers a report as plain data.

    routes : place-and-route runs, None without
    error : what ended the flow early
    """
    target = synthesis.target
    whole = synthesis.totals[synthesis.top.module]
    levels = [
        {
            "name": mapped.unit.name,
            "copies": synthesis.copies[module],
            "own": synthesis.own(module),
            "total": synthesis.totals[module],
        }
        for module, mapped in reversed(synthesis.mapped.items())
    ]
    utilization = []
    for kind, available in target.capacity.items():
        used = whole.get("occupied" if kind is Kind.lut else kind.name, 0)
        utilization.append({"what": kind.value, "used": used, "available": available})
    report: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "block": block,
        "target": target.name,
        "device": target.device,
        "tools": list(tools),
        "total": whole,
        "lut_equivalents": whole.get("lut", 0) + 2 * whole.get("carry", 0),
        "utilization": utilization,
        "levels": levels,
        "memories": _memories(synthesis),
        "bram_bits": {
            "used": sum(m["bits"] * m["copies"] for m in _memories(synthesis) if m["in"] == "bram"),
            "inferred": whole.get("bram", 0) * target.bram_bits,
        },
        "violations": synthesis.violations(),
        "over_capacity": _over(synthesis),
        "error": error,
    }
    macs = synthesis_macs(synthesis)
    if macs:
        report["macs"] = macs
        report["per_mac"] = {key: value / macs for key, value in whole.items()}
    if synthesis.liberty:
        report["liberty"] = synthesis.liberty.name
    if routes is not None:
        report["pnr"] = _routes(synthesis.design, routes, macs)
    return report


def synthesis_macs(synthesis: Synthesis) -> int:
    """MACs in the design."""
    return sum(
        synthesis.copies[module]
        for module, mapped in synthesis.mapped.items()
        if mapped.unit.name in ("mac_narrow", "mac_fp8x2")
    )


def _memories(synthesis: Synthesis) -> list[dict[str, Any]]:
    found = []
    for module, mapped in synthesis.mapped.items():
        for memory, cell in mapped.memories:
            kind = "ff"
            if cell:
                kind = "lutram" if re.search("DPR16X4|RAM32|RAM64|LUT", cell) else "bram"
            found.append(
                {
                    "unit": mapped.unit.name,
                    "name": memory.name,
                    "depth": memory.depth,
                    "width": memory.width,
                    "bits": memory.bits,
                    "copies": synthesis.copies[module],
                    "in": kind,
                }
            )
    return sorted(found, key=lambda m: -m["bits"] * m["copies"])


def _over(synthesis: Synthesis) -> list[str]:
    """What the device has too little of, and the blocks that need most of it."""
    lines = []
    top = synthesis.top.module
    for kind, available in synthesis.target.capacity.items():
        key = "occupied" if kind is Kind.lut else kind.name
        used = synthesis.totals[top].get(key, 0)
        if used <= available:
            continue
        shares = sorted(
            (
                (synthesis.copies[m] * synthesis.own(m).get(key, 0), mapped.unit.name)
                for m, mapped in synthesis.mapped.items()
            ),
            reverse=True,
        )
        most = ", ".join(f"{name} {number:,.0f}" for number, name in shares[:4])
        lines.append(
            f"{kind.value}: {used:,.0f} needed, {available:,} there "
            f"({used / available:.0%}, {used - available:,.0f} too many); most in {most}"
        )
    return lines


def _routes(design: Design, routes: list[Route], macs: int) -> dict[str, Any]:
    runs = [
        {"seed": r.seed, "fmax": r.fmax, "seconds": round(r.seconds, 1), "error": r.error}
        for r in routes
    ]
    found: dict[str, Any] = {"runs": runs}
    good = sorted((r for r in routes if r.fmax is not None), key=lambda r: r.fmax or 0)
    found["utilization"] = (good or routes)[0].utilization if routes else {}
    if good:
        speeds = [r.fmax or 0.0 for r in good]
        median = statistics.median(speeds)
        found |= {"median": median, "lowest": speeds[0], "highest": speeds[-1]}
        if macs:
            found["peak_gops"] = 2 * macs * median / 1000
        # One path for each run: that of the median first.
        order = sorted(good, key=lambda r: abs((r.fmax or 0) - median))
        found["paths"] = _paths(design, order[:3])
    return found


def _paths(design: Design, routes: list[Route]) -> list[dict[str, Any]]:
    """The worst path of each run: its ends and what it goes through, by block and source line."""
    netlist = json.loads(routes[0].netlist.read_text())["modules"]["harness"]
    sources = {
        name: cell["attributes"]["src"]
        for name, cell in netlist["cells"].items()
        if "src" in cell["attributes"]
    }
    found = []
    for route in routes:
        stages: list[dict[str, Any]] = []
        delay = 0.0
        for step in route.path:
            delay += step["delay"]
            if step["type"] == "routing":
                continue
            # LUTs that ABC makes have no source; carry chains, registers and memories have.
            name = step["to"]["cell"].split("$CCU2")[0]
            end = step["type"] != "logic"
            if not name.startswith("dut."):
                if not end:
                    continue
                stage = {"block": "harness", "signal": "register", "source": ""}
            else:
                block, source = design.locate(name[4:], sources.get(name, ""))
                if not source and not end:
                    continue
                stage = {"block": block, "signal": _signal(name) if end else "", "source": source}
            if not stages or {key: stages[-1][key] for key in stage} != stage:
                stages.append(stage | {"at": 0.0})
            stages[-1]["at"] = round(delay, 2)
        kinds = {
            kind: round(sum(s["delay"] for s in route.path if s["type"] == kind), 2)
            for kind in ("logic", "routing")
        }
        cells = sum(s["type"] == "logic" for s in route.path)
        found.append(
            {"seed": route.seed, "fmax": route.fmax, "delay": round(delay, 2), **kinds}
            | {"cells": cells, "stages": stages}
        )
    return found


def _signal(cell: str) -> str:
    """The signal that a cell was named after."""
    return re.split(r"_(?:TRELLIS|CCU2C|LUT4|PFUMX|L6MUX21|MULT18X18D|DP16KD|PDPW16KD)", cell)[
        0
    ].rsplit(".", 1)[-1]


def totals_text(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The main figures in a few lines: (name, value)."""
    rows = [(heading, _number(report["total"].get(key, 0))) for key, heading in _COLUMNS]
    for u in report["utilization"]:
        if u["used"]:
            rows.append((f"{u['what']} of the device", f"{u['used'] / u['available']:.1%}"))
    pnr = report.get("pnr", {})
    if "median" in pnr:
        spread = f"{pnr['lowest']:.1f} to {pnr['highest']:.1f}"
        rows.append((f"Fmax, median of {len(pnr['runs'])}", f"{pnr['median']:.1f} MHz ({spread})"))
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _table(headings: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    marks = ["---" if i < left else "---:" for i in range(len(headings))]
    lines = ["| " + " | ".join(line) + " |" for line in (headings, marks, *rows)]
    return [*lines, ""]


def _name(report: dict[str, Any]) -> str:
    what = f"`{report['config']['name']}`"
    if report["block"] != "chip":
        what = f"`{report['block']}` of {what}"
    return what


def markdown(report: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """The report as text; `old` is the report to compare with."""
    total = report["total"]
    lines = [f"# {_name(report)} on {report['device']}", ""]
    if report["tools"]:
        lines += ["Made by `systolith synth` with " + ", ".join(report["tools"]) + ".", ""]
    if report["error"]:
        lines += [f"**Incomplete: {report['error']}**", ""]
    lines += ["## Totals", ""]
    rows = [
        [
            u["what"],
            _number(u["used"]),
            _number(u["available"]),
            f"{u['used'] / u['available']:.1%}",
        ]
        for u in report["utilization"]
    ]
    lines += _table(["resource", "used", "device", "share"], rows)
    lines += [
        "LUTs count everything that occupies one: carry chains and distributed RAM as well.",
        "",
    ]
    for line in report["over_capacity"]:
        lines += [f"**Over capacity** in {line}.", ""]
    rows = [[heading, _number(total.get(key, 0))] for key, heading in _COLUMNS]
    if report["target"].startswith("ecp5"):
        rows.insert(
            2, ["LUT4 equivalents (a carry cell is two)", _number(report["lut_equivalents"])]
        )
    bits = report["bram_bits"]
    rows.append(
        ["block RAM bits, used of inferred", f"{bits['used']:,} of {bits['inferred']:,.0f}"]
    )
    if total.get("transistors"):
        rows.append(["transistors, CMOS estimate without memories", _number(total["transistors"])])
    if "liberty" in report:
        rows.append([f"area with {report['liberty']}, without memories", f"{total['area']:,.1f}"])
    rows.append(["memory bits", _number(total.get("memory_bits", 0))])
    headings = ["cells", "number"]
    if "per_mac" in report:
        headings.append(f"per MAC ({report['macs']})")
        keys = {heading: key for key, heading in _COLUMNS}
        for row in rows:
            key = keys.get(row[0])
            row.append(f"{report['per_mac'].get(key, 0):,.1f}" if key else "")
    lines += _table(headings, rows)

    lines += ["## Place and route", ""]
    if "pnr" in report:
        lines += _pnr_text(report["pnr"])
    else:
        lines += ["Not asked for.", ""]

    lines += ["## Checks", ""]
    if report["violations"]:
        lines += [f"- {violation}" for violation in report["violations"]]
    else:
        lines += [
            "No latch; every memory above 1 kbit in block RAM or distributed RAM; every "
            "multiplication in DSPs."
        ]
    lines.append("")

    lines += ["## Hierarchy", "", "![Where the LUTs are](levels.png)", ""]
    rows = []
    for level in report["levels"]:
        whole, own = level["total"], level["own"]
        rows.append(
            [f"`{level['name']}`", str(level["copies"])]
            + [_number(whole.get(key, 0)) for key, _ in _COLUMNS]
            + [_number(own.get("occupied", 0)), _number(level["copies"] * own.get("occupied", 0))]
        )
    lines += [
        "One copy with all that is in it; the last two columns are the LUTs occupied by the "
        "module's own cells, in one copy and in all.",
        "",
    ]
    headings = ["module", "copies", *(heading for _, heading in _COLUMNS), "own", "own, all"]
    lines += _table(headings, rows)

    lines += ["## Memories", ""]
    kinds = {"ff": "flip-flops", "lutram": "distributed RAM", "bram": "block RAM"}
    rows = [
        [
            f"`{m['unit']}` {m['name']}",
            f"{m['depth']} x {m['width']}",
            str(m["copies"]),
            f"{m['bits'] * m['copies']:,}",
            kinds[m["in"]],
        ]
        for m in report["memories"]
    ]
    lines += _table(["memory", "words x bits", "copies", "bits", "in"], rows)
    if old is not None:
        lines += ["## Compared with the report before", "", *comparison(report, old)]
    return "\n".join(lines)


def _pnr_text(pnr: dict[str, Any]) -> list[str]:
    lines = []
    rows = [
        [
            str(r["seed"]),
            f"{r['fmax']:.1f} MHz" if r["fmax"] else r["error"],
            f"{r['seconds']:.0f} s",
        ]
        for r in pnr["runs"]
    ]
    if "median" in pnr:
        lines += [
            f"**Fmax {pnr['median']:.1f} MHz**, the median of {len(rows)} seeds "
            f"({pnr['lowest']:.1f} to {pnr['highest']:.1f}).",
            "",
        ]
        if "peak_gops" in pnr:
            lines += [
                f"Peak at that clock: {pnr['peak_gops']:.2f} billion operations per second.",
                "",
            ]
        lines += ["![Fmax by seed](seeds.png)", ""]
    lines += _table(["seed", "Fmax", "time"], rows, 2)
    rows = [
        [name, f"{used:,}", f"{of:,}", f"{used / of:.1%}"]
        for name, (used, of) in pnr["utilization"].items()
        if used and of
    ]
    lines += _table(["cell of the device", "used", "there", "share"], rows)
    for number, worst in enumerate(pnr.get("paths", [])):
        lines += [
            f"### {'Worst path' if not number else 'Worst path with another seed'}",
            "",
            f"Seed {worst['seed']}: {worst['delay']} ns, of them {worst['logic']} in "
            f"{worst['cells']} cells and {worst['routing']} in wires.",
            "",
        ]
        stages = worst["stages"]
        if len(stages) > _STAGES:
            stages = stages[: _STAGES // 2] + stages[-_STAGES // 2 :]
        rows = [
            [f"`{s['block']}`", s["source"], s["signal"] and f"`{s['signal']}`", f"{s['at']:.2f}"]
            for s in stages
        ]
        lines += _table(["block", "source", "register", "ns"], rows, 3)
    return lines


def comparison(report: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Rows of what changed between two reports, by resource and by module."""
    for key in ("block", "target"):
        if report[key] != old[key]:
            return [f"The other report is of {key} {old[key]}.", ""]
    rows = []

    def row(name: str, before: float, after: float) -> None:
        change = f"{after / before - 1:+.1%}" if before else "new"
        rows.append([name, _number(round(before, 1)), _number(round(after, 1)), change])

    for key, heading in _COLUMNS:
        row(heading, old["total"].get(key, 0), report["total"].get(key, 0))
    before, after = old.get("pnr", {}).get("median"), report.get("pnr", {}).get("median")
    if before and after:
        row("median Fmax, MHz", before, after)
    was = {level["name"]: level for level in old["levels"]}
    for level in report["levels"]:
        then = was.get(level["name"], {"own": {}, "copies": 0})
        numbers = [x["own"].get("occupied", 0) * x["copies"] for x in (then, level)]
        if numbers[0] != numbers[1]:
            row(f"LUTs of `{level['name']}`", *numbers)
    gone = set(was) - {level["name"] for level in report["levels"]}
    rows += [[f"`{name}`", "", "", "gone"] for name in sorted(gone)]
    return _table(["", "before", "now", "change"], rows)


def _bars(path: Path, report: dict[str, Any]) -> None:
    """The modules' own LUTs, the largest on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [
        (level["copies"] * level["own"].get("occupied", 0), level) for level in report["levels"]
    ]
    parts = sorted((p for p in parts if p[0]), key=lambda p: -p[0])[:20]
    figure = Figure(figsize=(8, 0.9 + 0.27 * len(parts)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [
        f"{level['name']} x {level['copies']}" if level["copies"] > 1 else level["name"]
        for _, level in parts
    ]
    bars = axes.barh(names, [number for number, _ in parts], color="#1f4e8c")
    axes.bar_label(bars, labels=[f"{number:,.0f}" for number, _ in parts], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8)
    axes.set(xlabel="LUTs occupied by the module's own cells, all copies")
    figure.savefig(path)


def _seeds(path: Path, pnr: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    runs = [run for run in pnr["runs"] if run["fmax"]]
    axes.bar([str(run["seed"]) for run in runs], [run["fmax"] for run in runs], color="#b9c6d8")
    axes.axhline(pnr["median"], color="#c8622c", label=f"median {pnr['median']:.1f} MHz")
    axes.set(xlabel="seed", ylabel="Fmax (MHz)")
    axes.legend(loc="lower right")
    figure.savefig(path)


_STYLE = """body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;padding:.2em .8em}
td{text-align:right}td:first-child,th:first-child{text-align:left}code{font-size:.93em}
img{max-width:100%}"""


def as_html(text: str, title: str) -> str:
    """The Markdown that `markdown` writes, as a page: headings, paragraphs, lists, tables,
    pictures, code and bold."""

    def inline(part: str) -> str:
        part = html.escape(part)
        part = re.sub(r"!\[([^]]*)\]\(([^)]*)\)", r'<img alt="\1" src="\2">', part)
        part = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", part)
        return re.sub(r"`([^`]*)`", r"<code>\1</code>", part)

    body = []
    for block in re.split(r"\n\n+", text.strip()):
        lines = block.split("\n")
        if heading := re.match(r"(#+) (.*)", block):
            level = len(heading[1])
            body.append(f"<h{level}>{inline(heading[2])}</h{level}>")
        elif lines[0].startswith("|"):
            cells = [[inline(c.strip()) for c in line.strip("|").split(" | ")] for line in lines]
            head = "".join(f"<th>{c}</th>" for c in cells[0])
            rows = "".join(
                f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>\n" for row in cells[2:]
            )
            body.append(f"<table><tr>{head}</tr>\n{rows}</table>")
        elif lines[0].startswith("- "):
            body.append(
                "<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>"
            )
        else:
            body.append(f"<p>{inline(block)}</p>")
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(body) + "\n"


def write(
    folder: Path,
    report: dict[str, Any],
    *,
    synthesis: Synthesis | None = None,
    routes: list[Route] | None = None,
    old: dict[str, Any] | None = None,
) -> None:
    """Writes the report's files into `folder`, and the tools' logs into ``logs``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report, old)
    (folder / "report.md").write_text(text)
    title = f"{report['config']['name']} {report['block']} on {report['device']}"
    (folder / "report.html").write_text(as_html(text, title))
    _bars(folder / "levels.png", report)
    if "median" in report.get("pnr", {}):
        _seeds(folder / "seeds.png", report["pnr"])
    if synthesis is None:
        return
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    for mapped in synthesis.mapped.values():
        shutil.copy(mapped.folder / "yosys.log", logs / f"yosys-{mapped.unit.name}.log")
    for route in routes or ():
        shutil.copy(route.folder / "nextpnr.log", logs / f"nextpnr-seed{route.seed}.log")
