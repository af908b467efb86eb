"""The generated pages are those that the definitions give."""

from pathlib import Path

import pytest
from systolith import docs
from systolith_hdl import isa, regs

DOCS = Path(__file__).parents[2] / "docs"


def test_pages_are_up_to_date() -> None:
    assert docs.stale_pages(DOCS) == []


def test_check_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check", str(tmp_path)]) == 1
    assert docs.main([str(tmp_path)]) == 0
    assert docs.main(["--check", str(tmp_path)]) == 0
    page = tmp_path / "isa.md"
    page.write_text(page.read_text().replace("MATMUL", "MATMULT"))
    capsys.readouterr()
    assert docs.main(["--check", str(tmp_path)]) == 1
    assert "isa.md is not up to date" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [isa.Opcode, isa.AluOp, isa.Function, isa.FaultCause])
def test_every_member_is_described(kind: type) -> None:
    described = docs.member_docs(kind)
    for member in kind:  # type: ignore[attr-defined]
        assert described[member.name], member


def test_pages_name_everything() -> None:
    page = docs.isa_page()
    for kind in (isa.Opcode, isa.AluOp, isa.Function, isa.FaultCause, isa.WaitMode):
        assert all(f"`{member.name}`" in page for member in kind)
    registers = docs.registers_page()
    assert all(f"`{name}`" in registers for name in regs.REGISTERS)
