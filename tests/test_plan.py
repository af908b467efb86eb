"""docs/testplan.md names tests that exist, and leaves out no test file and no bench."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "testplan.md").read_text())


def exists(path: str, name: str) -> bool:
    """Whether a file defines that test; benches may also make theirs by name."""
    if not (ROOT / path).is_file():
        return False
    text = (ROOT / path).read_text()
    if path.startswith("tests/"):
        return re.search(rf"^def {name}\(", text, re.MULTILINE) is not None
    made = rf'^async def {name}\(|^_\w*test\(\s*"{name}"'
    return re.search(made, text, re.MULTILINE) is not None


def test_named_tests_exist() -> None:
    assert len(NAMED) > 100
    missing = [f"{path}::{name}" for path, name in NAMED if not exists(path, name)]
    assert not missing, f"docs/testplan.md names what does not exist: {', '.join(missing)}"


def test_every_test_file_is_named() -> None:
    named = {path for path, _ in NAMED}
    files = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "tb").rglob("bench_*.py")]
    assert len(files) > 20
    missing = sorted({path.relative_to(ROOT).as_posix() for path in files} - named)
    assert not missing, f"docs/testplan.md does not say what these test: {', '.join(missing)}"
