"""README and handbook: examples run, tables and figures match the code, links lead somewhere."""

import re
from pathlib import Path

import pytest
from systolith.compiler.trace import _HANDLERS, _INTEGER_HANDLERS
from systolith_hdl import psum
from systolith_hdl.config import PRESETS
from systolith_hdl.isa import Opcode
from systolith_hdl.scalar import engine as scalar
from systolith_hdl.scalar import lane as scalar_lane
from systolith_hdl.tensor import (
    ADD_LATENCY,
    MUL_LATENCY,
    PAIR_MUL_LATENCY,
    array_latency,
    matmul_latency,
)
from systolith_hdl.vector import alu
from systolith_hdl.vector import engine as vector
from systolith_hdl.vector import lane as vector_lane

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

_EXAMPLE = re.compile(r"<!-- run -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def examples() -> list:
    """The blocks marked ``<!-- run -->``, with the lines they stand on."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _EXAMPLE.finditer(text):
            line = text.count("\n", 0, match.start(1))
            found.append(pytest.param(page, line, match[1], id=f"{page.name}:{line + 1}"))
    return found


@pytest.mark.parametrize("page,line,code", examples())
def test_example(page: Path, line: int, code: str, tmp_path, monkeypatch) -> None:
    """Runs as it stands, but on the golden device: what needs the gates has tests of its own."""
    monkeypatch.chdir(tmp_path)
    padded = "\n" * line + code.replace('"rtl"', '"golden"')
    exec(compile(padded, str(page), "exec"), {"__name__": "__main__"})


def test_every_page_of_examples_is_found() -> None:
    assert {param.values[0].name for param in examples()} >= {
        "README.md", "compiler.md", "kernels.md", "numerics.md",
    }  # fmt: skip


def rows(page: str, marker: str) -> list[list[str]]:
    """Cells of the table behind ``<!-- marker -->``, without its head."""
    table = (ROOT / page).read_text().split(f"<!-- {marker} -->\n")[1].split("\n\n")[0]
    lines = table.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_primitives() -> None:
    listed = [name for row in rows("docs/compiler.md", "primitives")
              for name in re.findall(r"`([\w-]+)`", row[0])]  # fmt: skip
    assert len(listed) == len(set(listed))
    assert set(listed) == set(_HANDLERS) | set(_INTEGER_HANDLERS)


def test_presets() -> None:
    listed = {row[0].strip("`"): row[1:5] for row in rows("README.md", "presets")}
    assert listed == {
        name: [
            str(config.lanes),
            f"{config.lanes * config.sbuf_depth * 4 // 1024:,} KiB",
            f"{config.lanes * config.psum_depth * 4 // 1024:,} KiB",
            f"{config.peak_macs_per_cycle:,}",
        ]
        for name, config in PRESETS.items()
    }


def test_figures() -> None:
    """The latencies that docs/architecture.md gives."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for config in PRESETS.values():
        n = config.lanes
        longer = 2 if config.fp8_rate == 2 else 0
        assert array_latency(config) == 5 * n + 1 + longer
        assert 4 + matmul_latency(config) == 5 * n + 11 + longer
    assert "`5N + 1` (`array_latency`; `5N + 3`" in text
    assert "`F + 5N + 11` cycles" in text and "`F + 5N + 13` |" in text
    assert (MUL_LATENCY, ADD_LATENCY, psum.ACCUMULATE_LATENCY) == (1, 4, 5)
    assert PAIR_MUL_LATENCY == MUL_LATENCY + 2
    assert f"| ALU latency | {alu.ALU_LATENCY} |" in text
    assert f"`n + {vector.FIXED_CYCLES}` cycles" in text
    for config in PRESETS.values():
        fixed = vector.fixed_cycles(Opcode.AFFINE_SELECT, config)
        assert fixed == vector.FIXED_CYCLES + max(0, config.lanes.bit_length() - 4)
    assert f"`n + {vector.FIXED_CYCLES}`, and 1 more for each doubling of N past 8" in text
    assert f"`n + {vector.fixed_cycles(Opcode.RANGE_SELECT, config)}`: its bounds" in text
    assert f"`n + {vector.fixed_cycles(Opcode.DROPOUT, config)}`: the hash" in text
    assert f"`6 (s - 1) + c + {vector.FIXED_CYCLES}`" in text
    assert vector_lane.LOOP_LATENCY == 6
    assert f"`n + r + {vector.FIXED_CYCLES}`" in text
    assert f"`c + (b - 1) max(c, l) + l + {vector.FIXED_CYCLES + 1}`" in text
    assert f"`n + {vector.FIXED_CYCLES} + {vector.REDUCE_CYCLES} r`" in text
    fixed = vector.fixed_cycles(Opcode.STATISTICS, config)
    assert f"`2 n + {vector.STATISTICS_CYCLES} r + {fixed}`" in text
    assert f"| lane latency | {scalar_lane.LANE_LATENCY}:" in text
    assert f"`n + {scalar.FIXED_CYCLES}` cycles" in text
    assert f"`{scalar.SUM_CYCLES} r` cycles more" in text and scalar.ROW_CYCLES == 1
    assert f"`n + {scalar.TABLE_CYCLES}` cycles (`TABLE_CYCLES`)" in text
    turn = scalar_lane.TURN_CYCLES
    assert f"`{turn} n + {scalar.FIXED_CYCLES + 1}` cycles (`TURN_CYCLES`)" in text


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"
