"""The cells in gates against SoftFloat, a sample of every class that `make nightly` runs."""

import numpy as np
import pytest
from systolith_tb import softfloat
from systolith_tb.runner import seed_of_run
from systolith_tb.softfloat import OPERATIONS, compare

CASES = 4000
#: class -> (what of its results must be there, least share of the cases)
PROVES = {
    "exact tie": ("tie", 0.75),
    "cancellation": ("cancelled", 0.7),
    "overflow": ("overflow", 0.3),
    "subnormal result": ("subnormal", 0.6),
    "subnormal": ("subnormal", 0.01),
    "NaN": ("NaN", 1.0),
    "infinity": ("NaN", 0.005),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in OPERATIONS for kind in OPERATIONS[name].classes]
)
def test_class(name: str, kind: str) -> None:
    found = compare(name, kind, seed_of_run(), CASES)
    assert found["mismatches"] == 0
    assert found["cases"] == CASES
    what, share = PROVES.get(kind, ("cases", 1.0))
    assert found[what] >= share * CASES


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one result."""
    add = OPERATIONS["add"]

    def broken(*operands: np.ndarray) -> np.ndarray:
        result = add.gates(*operands).copy()
        result[CASES // 2] ^= 1
        return result

    changed = {"add": softfloat.Operation(add.classes, broken, add.reference, add.terms)}
    monkeypatch.setattr(softfloat, "OPERATIONS", {**OPERATIONS, **changed})
    assert compare("add", "uniform bits", 1, CASES)["mismatches"] == 1
