"""Verilator's own files are compiled once for all builds."""

from pathlib import Path

import pytest
from systolith_hdl.objcache import main


def test_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept by command and identity, of Verilator's files alone; of a failing compile nothing is."""
    calls = tmp_path / "calls"
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n[ "$1" != -fail ] || exit 3\necho "$1 made" > made.o\n'
    )
    compiler.chmod(0o755)
    made = Path("made.o")

    def run(option: str, source: str, identity: str = "1") -> tuple[int, bool]:
        """Status, and whether the compiler ran; the object must be there either way."""
        made.unlink(missing_ok=True)
        before = calls.read_text() if calls.exists() else ""
        command = [str(compiler), option, "-c", "-o", "made.o", source]
        status = main(tmp_path / "objects", identity, command)
        assert status or made.read_text() == f"{option} made\n"
        return status, calls.exists() and calls.read_text() != before

    monkeypatch.chdir(tmp_path)
    assert run("-O1", "/include/verilated.cpp") == (0, True)
    assert run("-O1", "/include/verilated.cpp") == (0, False)
    assert run("-O2", "/include/verilated.cpp") == (0, True)
    assert run("-O1", "/include/verilated_vpi.cpp") == (0, True)
    assert run("-O1", "/include/verilated.cpp", "2") == (0, True)
    for _ in range(2):
        assert run("-O1", "Vtop.cpp") == (0, True)
        assert run("-fail", "/include/verilated.cpp") == (3, True)
