"""docs/tutorial.md: kernels are those of examples/tutorial.py, right, and as fast as it says."""

import importlib.util
import re
import types
from pathlib import Path

import pytest
import systolith

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.fixture(scope="module")
def tutorial() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("tutorial", ROOT / "examples" / "tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_shown_is_in_the_example() -> None:
    source = (ROOT / "examples" / "tutorial.py").read_text()
    shown = re.findall(r"(?<!<!-- run -->\n)```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(shown) >= 9
    for code in shown:
        assert code in source, f"not in examples/tutorial.py:\n{code}"


def test_kernels_are_right_and_clean(tutorial: types.ModuleType) -> None:
    with systolith.Device("golden", config="nano", check=True) as device:
        assert set(tutorial.measure(device).values()) == {None}


def test_cycles_are_those_of_the_page(tutorial: types.ModuleType) -> None:
    """benchmarks/kernels.py writes the page's figures anew."""
    said = {
        name: int(n.replace(",", "")) for name, n in re.findall(r"<!-- (\w+) -->([\d,]+)", TEXT)
    }
    with systolith.Device("rtl-fast", config="nano") as device:
        measured = tutorial.measure(device)
    assert measured == said
